"""Only a checkpoint that is whole, and of the same recipe, is continued from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hqqplus.errors import UserError
from hqqplus.recipe import Recipe
from hqqplus.recovery.checkpoints import (
    MANIFEST,
    checkpoint_folder,
    discard_incomplete,
    last_complete,
    read_manifest,
    write_manifest,
)


def recipe(**adapter: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": "some/model"},
            "adapter": adapter,
            "data": {"path_or_name": "rows.jsonl"},
            "output_dir": "runs/it",
        }
    )


def checkpoint(output_dir: Path, step: int, of: Recipe | None = None) -> Path:
    """A complete checkpoint as the trainer leaves it, with files in a folder of it too."""
    folder = checkpoint_folder(output_dir, step)
    (folder / "global_step").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "global_step/rng.pth"):
        (folder / name).write_bytes(b"x" * 100)
    write_manifest(folder, of or recipe(), step, 2.5 * step, 1000 * step)
    return folder


def truncate(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"x" * 99)


def lose_a_file(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


def lose_a_file_below(folder: Path) -> None:
    (folder / "global_step" / "rng.pth").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def halve_the_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def empty_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("")


def replace_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"step": 1}')


def add_a_file(folder: Path) -> None:
    (folder / "scheduler.pt").write_bytes(b"x")


DAMAGES = [
    truncate,
    lose_a_file,
    lose_a_file_below,
    lose_the_manifest,
    halve_the_manifest,
    empty_the_manifest,
    replace_the_manifest,
    add_a_file,
]


def test_a_complete_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 7)
    found = last_complete(tmp_path, recipe())
    assert found is not None
    assert found[0] == folder == tmp_path / "checkpoint-7"
    manifest = found[1]
    assert (manifest.step, manifest.train_seconds, manifest.tokens) == (7, 17.5, 7000)
    assert manifest.files == {"adapter_model.safetensors": 100, "global_step/rng.pth": 100, "optimizer.pt": 100}
    assert manifest.recipe["model"]["name_or_path"] == "some/model"
    assert discard_incomplete(tmp_path) == []


def test_nothing_there(tmp_path: Path) -> None:
    assert last_complete(tmp_path / "missing", recipe()) is None
    assert discard_incomplete(tmp_path / "missing") == []
    assert last_complete(tmp_path, recipe()) is None


def test_the_newest_is_the_highest_number_not_the_last_name(tmp_path: Path) -> None:
    for step in (100, 9, 10):
        checkpoint(tmp_path, step)
    found = last_complete(tmp_path, recipe())
    assert found is not None
    assert found[1].step == 100
    truncate(tmp_path / "checkpoint-100")
    found = last_complete(tmp_path, recipe())
    assert found is not None
    assert found[1].step == 10


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_does_not_count_and_is_removed(tmp_path: Path, damage: Any) -> None:
    whole, broken = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    damage(broken)
    assert read_manifest(broken) is None
    found = last_complete(tmp_path, recipe())
    assert found is not None
    assert found[0] == whole
    assert discard_incomplete(tmp_path) == [broken]
    assert list(tmp_path.iterdir()) == [whole]
    assert read_manifest(whole) == found[1]


def test_only_a_damaged_one(tmp_path: Path) -> None:
    truncate(checkpoint(tmp_path, 4))
    assert last_complete(tmp_path, recipe()) is None


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    for name in ("checkpoint-best", "adapter", "checkpoint-12-old", "my-checkpoint-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    assert discard_incomplete(tmp_path) == []
    assert sorted(tmp_path.rglob("*")) == before
    found = last_complete(tmp_path, recipe())
    assert found is not None
    assert found[1].step == 4


def test_a_checkpoint_of_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4, recipe(r=8))
    with pytest.raises(UserError) as caught:
        last_complete(tmp_path, recipe(r=32))
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert "adapter.r: 8 -> 32" in message
    assert "output_dir" in message
    assert "lora_alpha" not in message
    assert folder.is_dir()


def test_the_recipe_may_change_in_what_leaves_the_weights_alone(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    other = recipe().model_copy(update={"output_dir": "elsewhere"})
    assert last_complete(tmp_path, other) is not None


def test_of_two_recipes_the_newest_complete_checkpoint_decides(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    newer = checkpoint(tmp_path, 8, recipe(r=8))
    with pytest.raises(UserError, match="another recipe"):
        last_complete(tmp_path, recipe())
    truncate(newer)
    found = last_complete(tmp_path, recipe())
    assert found is not None
    assert found[1].step == 4


def test_the_manifest_survives_json(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4)
    values = json.loads((folder / MANIFEST).read_text())
    assert Recipe.model_validate(values["recipe"]) == recipe()
    assert not [path for path in folder.rglob("*") if "tmp" in path.name]
