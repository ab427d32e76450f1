"""Only a checkpoint that is whole, and of the same recipe, is continued from."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hqqplus.errors import UserError
from hqqplus.recipe import Recipe
from hqqplus.recovery.checkpoints import (
    ASIDE,
    MANIFEST,
    Damaged,
    Manifest,
    Search,
    checkpoint_folder,
    find_checkpoint,
    publish,
    put_aside,
    read_manifest,
    rotate,
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


def newest(output_dir: Path) -> Manifest:
    manifest = find_checkpoint(output_dir, recipe()).manifest
    assert manifest is not None
    return manifest


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


def change_a_byte(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"x" * 50 + b"y" + b"x" * 49)


def link_elsewhere(folder: Path) -> None:
    (folder / "optimizer.pt").rename(folder.parent / "elsewhere")
    (folder / "optimizer.pt").symlink_to(folder.parent / "elsewhere")


def number_the_hashes(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"sha256": "', '"sha256": 1, "was": "'))


# What is done to it -> what is said of it.
DAMAGES = {
    truncate: "optimizer.pt has 99 bytes instead of 100",
    lose_a_file: "optimizer.pt is missing",
    lose_a_file_below: "global_step/rng.pth is missing",
    lose_the_manifest: "hqqplus_checkpoint.json is missing",
    halve_the_manifest: "hqqplus_checkpoint.json is damaged",
    empty_the_manifest: "hqqplus_checkpoint.json is damaged",
    replace_the_manifest: "hqqplus_checkpoint.json is damaged",
    number_the_hashes: "hqqplus_checkpoint.json is damaged (files)",
    add_a_file: "scheduler.pt does not belong to it",
    change_a_byte: "the contents of optimizer.pt have changed since it was written (sha256)",
    link_elsewhere: "optimizer.pt is a link",
}


def test_a_complete_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 7)
    found = find_checkpoint(tmp_path, recipe())
    assert found.folder == folder == tmp_path / "checkpoint-7"
    assert found.skipped == {}
    manifest = found.manifest
    assert manifest is not None
    assert (manifest.step, manifest.train_seconds, manifest.tokens) == (7, 17.5, 7000)
    digest = hashlib.sha256(b"x" * 100).hexdigest()
    names = ("adapter_model.safetensors", "global_step/rng.pth", "optimizer.pt")
    assert manifest.files == {name: {"size": 100, "sha256": digest} for name in names}
    assert manifest.recipe["model"]["name_or_path"] == "some/model"


def test_nothing_there(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "missing", recipe()) == Search()
    assert find_checkpoint(tmp_path, recipe()) == Search()
    put_aside(tmp_path / "missing", [])


def test_the_newest_is_the_highest_number_not_the_last_name(tmp_path: Path) -> None:
    for step in (100, 9, 10):
        checkpoint(tmp_path, step)
    assert newest(tmp_path).step == 100
    truncate(tmp_path / "checkpoint-100")
    assert newest(tmp_path).step == 10


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path: Path, damage: Any) -> None:
    whole, broken = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    damage(broken)
    with pytest.raises(Damaged, match=re.escape(DAMAGES[damage])):
        read_manifest(broken)
    found = find_checkpoint(tmp_path, recipe())
    assert found.folder == whole
    assert found.skipped == {broken: DAMAGES[damage]}
    before = {path.name: path.read_bytes() for path in broken.glob("*") if path.is_file()}
    put_aside(tmp_path, list(found.skipped))
    # Nothing of it is lost, and its name is free.
    kept = tmp_path / "damaged-checkpoint-8"
    assert {path.name: path.read_bytes() for path in kept.glob("*") if path.is_file()} == before
    assert find_checkpoint(tmp_path, recipe()) == Search(whole, found.manifest)
    # Once more at the same step.
    damage(checkpoint(tmp_path, 8)) if damage is not link_elsewhere else truncate(checkpoint(tmp_path, 8))
    put_aside(tmp_path, [broken])
    assert not broken.exists()


def test_only_a_damaged_one(tmp_path: Path) -> None:
    truncate(checkpoint(tmp_path, 4))
    found = find_checkpoint(tmp_path, recipe())
    assert found.folder is None
    assert found.manifest is None
    assert list(found.skipped) == [tmp_path / "checkpoint-4"]


def test_what_was_being_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    for name in ("checkpoint-best", "adapter", "checkpoint-12-old", "my-checkpoint-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / ASIDE / "checkpoint-8").mkdir(parents=True)
    (tmp_path / ASIDE / "checkpoint-8" / "optimizer.pt").write_bytes(b"x")
    (tmp_path / f"{ASIDE}-old").mkdir()
    put_aside(tmp_path, [])
    assert sorted(tmp_path.rglob("*")) == before
    assert newest(tmp_path).step == 4


def test_a_checkpoint_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    aside = checkpoint(tmp_path / ASIDE, 8)
    assert find_checkpoint(tmp_path, recipe()) == Search()
    publish(aside, tmp_path / "checkpoint-8")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]
    # Over one of the same step.
    publish(checkpoint(tmp_path / ASIDE, 8), tmp_path / "checkpoint-8")
    assert newest(tmp_path).step == 8


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [2, 4, 8, 16]),
        (0, None, [2, 4, 8, 16]),
        (9, None, [2, 4, 8, 16]),
        (2, None, [8, 16]),
        (1, None, [16]),
        (1, 4, [4, 16]),
        (2, 4, [4, 16]),
        (3, 2, [2, 8, 16]),
        (2, 16, [8, 16]),
    ],
)
def test_rotation(tmp_path: Path, limit: int | None, best: int | None, kept: list[int]) -> None:
    for step in (16, 4, 2, 8):  # by number, whatever their age
        checkpoint(tmp_path, step)
    rotate(tmp_path, limit, str(tmp_path / f"checkpoint-{best}") if best else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"checkpoint-{step}" for step in kept)
    rotate(tmp_path / "missing", limit)


def test_a_checkpoint_of_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4, recipe(r=8))
    with pytest.raises(UserError) as caught:
        find_checkpoint(tmp_path, recipe(r=32))
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert "adapter.r: 8 -> 32" in message
    assert "output_dir" in message
    assert "lora_alpha" not in message
    assert folder.is_dir()


def test_the_recipe_may_change_in_what_leaves_the_weights_alone(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    other = recipe().model_copy(update={"output_dir": "elsewhere"})
    assert find_checkpoint(tmp_path, other).folder is not None


def test_of_two_recipes_the_newest_complete_checkpoint_decides(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    newer = checkpoint(tmp_path, 8, recipe(r=8))
    with pytest.raises(UserError, match="another recipe"):
        find_checkpoint(tmp_path, recipe())
    truncate(newer)
    assert newest(tmp_path).step == 4


def test_the_manifest_survives_json(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4)
    values = json.loads((folder / MANIFEST).read_text())
    assert Recipe.model_validate(values["recipe"]) == recipe()
    assert not [path for path in folder.rglob("*") if "tmp" in path.name]
