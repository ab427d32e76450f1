"""A run that continues does so with the data with which it began."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hqqplus.errors import UserError
from hqqplus.recipe import Recipe
from hqqplus.recovery.rows import add_row_ids
from hqqplus.recovery.sources import FILE_NAME, Sources
from hqqplus.recovery.streamed import EndlessRows


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Recipe]:
    for name in ("train", "test", "book"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")

    def make(**sections: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "model": {"name_or_path": "some/model"},
                "data": {
                    "path_or_name": str(tmp_path / "train.jsonl"),
                    "eval_path_or_name": str(tmp_path / "test.jsonl"),
                },
                "evaluation": {"texts": {"book": str(tmp_path / "book.jsonl")}},
                "output_dir": str(tmp_path / "out"),
                **sections,
            }
        )

    return make


def check(recipe: Recipe, resumed: bool, writes: bool = True) -> None:
    Sources(recipe.output_dir, resumed, writes).check_files(recipe)


@pytest.mark.parametrize(
    ("name", "where"),
    [("train", "data.path_or_name"), ("test", "data.eval_path_or_name"), ("book", "evaluation.texts.book")],
)
def test_a_file_that_changed_or_vanished(make: Callable[..., Recipe], tmp_path: Path, name: str, where: str) -> None:
    recipe, path = make(), tmp_path / f"{name}.jsonl"
    check(recipe, resumed=False)
    content = path.read_bytes()
    path.touch()  # another time is no other content
    check(recipe, resumed=True)
    path.write_bytes(content.replace(name.encode(), name.upper().encode()))
    with pytest.raises(
        UserError, match=rf"^{where}: {name}.jsonl of .* has changed since this run began; a run contin"
    ):
        check(recipe, resumed=True)
    path.unlink()
    with pytest.raises(UserError, match=rf"^{where}: {name}.jsonl of .*, with which this run began, has vanished; "):
        check(recipe, resumed=True)
    path.write_bytes(content)
    check(recipe, resumed=True)
    # Another run in the same place begins with what is there.
    path.write_bytes(content + content)
    check(recipe, resumed=False)
    check(recipe, resumed=True)


def test_files_of_a_folder(make: Callable[..., Recipe], tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "train-0.jsonl").write_text("{}")
    recipe = make(data={"path_or_name": str(folder)})
    check(recipe, resumed=False)
    (folder / "notes.md").write_text("no data")
    check(recipe, resumed=True)
    (folder / "train-1.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"train-1.jsonl of .* was not there when this run began"):
        check(recipe, resumed=True)


def test_what_a_recipe_names_anew_is_noted(make: Callable[..., Recipe], tmp_path: Path) -> None:
    check(make(), resumed=False)
    other = make(evaluation={"texts": {"book": str(tmp_path / "test.jsonl")}})
    check(other, resumed=True)
    noted = json.loads((tmp_path / "out" / FILE_NAME).read_text())
    assert noted["evaluation.texts.book"]["name"] == str(tmp_path / "test.jsonl")


def test_a_run_that_noted_nothing_continues(make: Callable[..., Recipe], tmp_path: Path) -> None:
    check(make(), resumed=True, writes=False)
    assert not (tmp_path / "out").exists(), "only one process writes"
    check(make(data={"path_or_name": "some/hub-set"}), resumed=True)
    (tmp_path / "out" / FILE_NAME).write_text("{")
    check(make(), resumed=True)


def test_rows_that_are_others(tmp_path: Path) -> None:
    rows = add_row_ids(Dataset.from_dict({"input_ids": [[i, i + 1, i + 2] for i in range(3000)]}))
    Sources(tmp_path, False, True).check_rows(rows)
    Sources(tmp_path, True, False).check_rows(rows)
    for other in (rows.select(range(2999)), rows.select([1, 0, *range(2, 3000)])):
        with pytest.raises(UserError, match="the training rows are not those with which this run began; a run contin"):
            Sources(tmp_path, True, True).check_rows(other)
    streamed = EndlessRows(rows.to_iterable_dataset(), "embedded:test")
    Sources(tmp_path, False, True).check_rows(streamed)
    Sources(tmp_path, True, True).check_rows(streamed)
    shuffled = EndlessRows(rows.to_iterable_dataset().shuffle(seed=1), "embedded:test")
    with pytest.raises(UserError, match="not those with which this run began"):
        Sources(tmp_path, True, True).check_rows(shuffled)
