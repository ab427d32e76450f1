"""Prepared rows are kept by what they were made of: never served for anything else, and never damaged."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from trl import SFTTrainer

from hqqplus import models
from hqqplus.recipe import Recipe, identity, to_dict
from hqqplus.recovery import prepare, row_cache, setup
from hqqplus.recovery.row_cache import READ_SETTINGS, RowCache, contents_sha256, row_key
from hqqplus.recovery.rows import ROW_ID

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer(random_model: Callable[..., Path]) -> Any:
    return models.load_tokenizer(str(random_model("llama")))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows TRL was given to prepare, each time."""
    found: list[int] = []
    real = prepare.prepare_rows

    def counted(rows: Any, *arguments: Any) -> Any:
        found.append(len(rows))
        return real(rows, *arguments)

    monkeypatch.setattr(prepare, "prepare_rows", counted)
    return found


@pytest.fixture
def start(tmp_path: Path, tokenizer: Any, said: list[str]) -> Callable[..., Any]:
    """The prepared rows of a run over `rows.jsonl`, as a start of it makes or finds them."""

    def start(tokenizer: Any = tokenizer, packing: Any = False, training: Any = None, **data: Any) -> Any:
        recipe = Recipe.model_validate(
            {
                "model": {"name_or_path": "a"},
                "data": {
                    "path_or_name": str(tmp_path / "rows.jsonl"),
                    "eval_path_or_name": str(tmp_path / "rows.jsonl"),
                    "max_length": 16,
                    "packing": packing,
                    **data,
                },
                "training": training or {},
                "output_dir": str(tmp_path / "out"),
            }
        )
        said.clear()
        train = setup.load_data(recipe, tokenizer, said.append).train
        settings = setup.trainer_settings(recipe, CPU, said.append)
        cache = setup.row_cache(recipe, said.append)
        rows = setup.TrainingRows(train, tokenizer, settings, packing, said.append, recipe.data.masked_rows, cache)
        rows.check()
        rows.settle(packing is True)
        return rows.rows

    write(tmp_path, [f"text {i} of some" for i in range(30)])
    return start


def write(folder: Path, texts: list[str], time: float = 1e9) -> None:
    """Files of the same name and the same time, whatever is in them."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "answer": "yes"}) + "\n" for text in texts))
    os.utime(path, (time, time))


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "hqqplus_rows").glob("*"))


def test_a_second_start_tokenizes_nothing(start: Callable[..., Any], asked: list[int], said: list[str]) -> None:
    for packing in (False, True):
        first = start(packing=packing)
        lines = said[:]
        assert asked
        asked.clear()
        second = start(packing=packing)
        assert asked == []
        assert second.to_list() == first.to_list()
        assert second.features == first.features
        assert second[ROW_ID][:] == list(range(len(second)))
        assert said == lines, "the share and the example are said again"


def test_a_file_of_the_same_name_and_time_with_other_rows(start: Callable[..., Any], tmp_path: Path) -> None:
    before = start()
    write(tmp_path, [f"test {i} of some" for i in range(30)])  # of the same size, too
    after = start()
    assert before["input_ids"][:] != after["input_ids"][:]
    assert start(cache=False)["input_ids"][:] == after["input_ids"][:]
    write(tmp_path, [f"text {i} of some" for i in range(30)])
    assert start()["input_ids"][:] == before["input_ids"][:]
    assert len(kept(tmp_path)) == 2


def other_vocabulary(tokenizer: Any) -> Any:
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = values["model"]["vocab"]
    vocabulary["t"], vocabulary["s"] = vocabulary["s"], vocabulary["t"]
    from tokenizers import Tokenizer

    changed = copy.deepcopy(tokenizer)
    changed._tokenizer = Tokenizer.from_str(json.dumps(values))
    return changed


def test_another_tokenizer_of_the_same_name(start: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    before, after = start(), start(tokenizer=other_vocabulary(tokenizer))
    assert before["input_ids"][:] != after["input_ids"][:]
    assert len(kept(tmp_path)) == 2
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{{ messages }}"
    start(tokenizer=chatty)
    assert len(kept(tmp_path)) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 12},
        {"packing": True},
        {"eos": False},
        {"text_field": "answer"},
        {"prompt": "text", "completion": "answer", "max_length": 64},
        {"masked_rows": "drop"},
        {"training": {"truncation_mode": "keep_end"}},
        {"training": {"shuffle_dataset": True}},
    ],
)
def test_what_else_rows_are_made_of(
    start: Callable[..., Any], tmp_path: Path, asked: list[int], change: dict[str, Any]
) -> None:
    start()
    asked.clear()
    found = start(**change)
    assert asked
    assert len(kept(tmp_path)) == 2
    assert start(**change, cache=False).to_list() == found.to_list()


def test_what_rows_are_not_made_of(start: Callable[..., Any], asked: list[int]) -> None:
    start(training={"learning_rate": 1e-3})
    asked.clear()
    start(training={"learning_rate": 1e-4, "max_steps": 3, "per_device_train_batch_size": 4})
    assert asked == []


def test_the_key_has_all_that_a_preparation_reads() -> None:
    source = inspect.getsource(SFTTrainer._prepare_dataset)
    read = set(re.findall(r"\bargs\.(\w+)", source))
    # How many processes do it is no matter.
    assert read - {"dataset_num_proc"} <= set(READ_SETTINGS)


@pytest.mark.parametrize("damage", ["flipped", "short", "gone", "manifest", "no manifest"])
def test_a_damaged_cache_is_remade(
    start: Callable[..., Any], tmp_path: Path, asked: list[int], said: list[str], damage: str
) -> None:
    before = start().to_list()
    (folder,) = kept(tmp_path)
    rows = next((folder / "rows").glob("*.arrow"))
    content = bytearray(rows.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        rows.write_bytes(content)
    elif damage == "short":
        rows.write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        rows.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text('{"files":')
    else:
        (folder / "manifest.json").unlink()
    asked.clear()
    assert start().to_list() == before
    assert asked
    assert f"data.cache: {folder} is damaged: the rows are prepared anew" in said
    asked.clear()
    assert start().to_list() == before
    assert asked == []


def test_two_processes_that_make_the_same(tmp_path: Path, said: list[str]) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]})
    cache = RowCache(tmp_path / "rows", said.append)
    real = datasets.Dataset.save_to_disk

    def meanwhile(self: Any, path: str) -> None:
        # Another process is done before this one is.
        datasets.Dataset.save_to_disk = real
        RowCache(tmp_path / "rows", said.append).keep("a" * 64, rows, ["theirs"])
        real(self, path)

    datasets.Dataset.save_to_disk = meanwhile
    try:
        cache.keep("a" * 64, rows, ["mine"])
    finally:
        datasets.Dataset.save_to_disk = real
    found = cache.open("a" * 64)
    assert found is not None
    assert (found.rows.to_list(), found.said) == (rows.to_list(), ("theirs",))
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["a" * 64]
    assert said == []


def test_a_full_disk_costs_the_cache_and_no_more(
    start: Callable[..., Any], tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    expected = start(cache=False).to_list()
    monkeypatch.setattr(row_cache, "write_json", full)
    assert start().to_list() == expected
    folder = tmp_path / "cache" / "hqqplus_rows"
    assert f"data.cache: the prepared rows are not kept in {folder}: No space left on device" in said
    assert kept(tmp_path) == []


def test_the_place_is_the_recipes_and_no_part_of_what_it_trains(
    start: Callable[..., Any], tmp_path: Path, asked: list[int]
) -> None:
    start(cache=str(tmp_path / "here"))
    assert len(list((tmp_path / "here").iterdir())) == 1
    start(cache=False)
    assert kept(tmp_path) == []
    values = {"model": {"name_or_path": "a"}, "data": {"path_or_name": "b"}, "output_dir": "c"}
    for cache in (True, False, "d"):
        recipe = Recipe.model_validate({**values, "data": {"path_or_name": "b", "cache": cache}})
        assert "cache" not in identity(to_dict(recipe))["data"]


def test_what_was_left_out_is_said_again(start: Callable[..., Any], tmp_path: Path, said: list[str]) -> None:
    write(tmp_path, ["p", "p" * 40, "q"])
    form = {"prompt": "text", "completion": "answer", "masked_rows": "drop"}
    start(**form)
    line = "data.masked_rows: 1 of 3 training rows have no supervised token: left out"
    assert said.count(line) == 1
    start(**form)
    assert said.count(line) == 1


def test_a_tokenizer_in_python_is_not_trusted(tokenizer: Any) -> None:
    class Own:
        backend_tokenizer = None

    assert row_key("a", Own(), None, "drop") is None


def test_contents_whatever_the_pieces(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(2500)]})
    pieces = datasets.concatenate_datasets([rows.select(range(700)), rows.select(range(700, 2500))])
    assert contents_sha256(pieces) == contents_sha256(rows)
    assert contents_sha256(rows.select(list(range(2500)))) == contents_sha256(rows)
    assert contents_sha256(rows.select(range(2499))) != contents_sha256(rows)
    assert contents_sha256(rows.rename_column("text", "txt")) != contents_sha256(rows)
    # What stands in one row or in two is not the same.
    one, two = datasets.Dataset.from_dict({"text": ["ab", "c"]}), datasets.Dataset.from_dict({"text": ["a", "bc"]})
    assert contents_sha256(one) != contents_sha256(two)
