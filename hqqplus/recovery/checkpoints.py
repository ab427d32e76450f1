"""Checkpoints that are whole or not there, and which of them a run may continue from.

A Trainer writes a checkpoint file by file into its final folder. A process killed meanwhile leaves a folder that
looks like the newest checkpoint and is not one, and a missing optimizer file would even be replaced by a fresh
optimizer in silence. So a checkpoint is written to a folder aside, gets a manifest with size and sha256 of every file,
is synced to the disk and then renamed; a run continues from the newest one that agrees with its manifest.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hqqplus.errors import UserError
from hqqplus.files import move_folder, remove_leftovers, sha256_of_file, sync, write_json
from hqqplus.recipe import differences, recipe_digest, to_dict

MANIFEST = "hqqplus_checkpoint.json"
# Where a checkpoint is written before it is one. What a killed process leaves there is of no use to anybody.
ASIDE = ".checkpoint-being-written"
_DAMAGED = "damaged-"
_FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself.

    Attributes:
        step: optimizer steps done.
        files: relative path -> size in bytes and sha256, of everything in the folder but the manifest.
        recipe_digest, recipe: of the run that wrote it.
        train_seconds, tokens: time spent and tokens seen in training up to here, over all runs of it.
        identity: what the training depends on beside the recipe, name -> value (`run_identity`).
        versions: of the packages that wrote it.
    """

    step: int
    files: dict[str, dict[str, Any]]
    recipe_digest: str
    recipe: dict[str, Any]
    train_seconds: float
    tokens: int
    identity: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """What `find_checkpoint` found.

    Attributes:
        folder, manifest: of the newest complete checkpoint; None where there is none.
        skipped: newer ones that are damaged, with the reason.
    """

    folder: Path | None = None
    manifest: Manifest | None = None
    skipped: Mapping[Path, str] = field(default_factory=dict)


class Damaged(Exception):
    """A folder is no complete checkpoint; the text says why."""


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / f"checkpoint-{step}"


def write_manifest(
    folder: Path,
    recipe: Any,
    step: int,
    train_seconds: float,
    tokens: int,
    identity: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Declare the checkpoint in `folder` complete."""
    files = {
        name: {"size": path.stat().st_size, "sha256": sha256_of_file(path)} for name, path in _files(folder).items()
    }
    manifest = Manifest(
        step,
        files,
        recipe_digest(recipe),
        to_dict(recipe),
        train_seconds,
        tokens,
        dict(identity or {}),
        dict(versions or {}),
    )
    write_json(folder / MANIFEST, asdict(manifest))


def publish(aside: Path, folder: Path) -> None:
    """Make the complete checkpoint in `aside` that of `folder`: on the disk before it has its name."""
    sync(aside)
    move_folder(aside, folder)
    if aside.parent.name == ASIDE:
        aside.parent.rmdir()
    sync(folder.parent, recursive=False)


def rotate(output_dir: str | Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`, but never the newest, nor the folder `best`."""
    if limit is None or limit <= 0:
        return
    folders = _folders(output_dir)
    kept = {folders[-1], Path(best)} if folders and best is not None else set(folders[-1:])
    surplus = len(folders) - max(limit, len(kept))
    for folder in [folder for folder in folders if folder not in kept][: max(surplus, 0)]:
        # Renamed first: killed halfway, the rest has not the name of a checkpoint.
        doomed = folder.with_name(f"{ASIDE}-old")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`, which its files agree with.

    Raises:
        Damaged: if they do not, or the manifest is missing or damaged itself.
    """
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest(**values)
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, TypeError, RecursionError):
        raise Damaged(f"{MANIFEST} is damaged") from None
    if wrong := _wrong_types(manifest):
        raise Damaged(f"{MANIFEST} is damaged ({wrong})")
    found = _files(folder)
    for name in sorted(manifest.files.keys() | found.keys()):
        if name not in found:
            raise Damaged(f"{name} is missing")
        if name not in manifest.files:
            raise Damaged(f"{name} does not belong to it")
        if found[name].is_symlink():
            raise Damaged(f"{name} is a link")
        size = found[name].stat().st_size
        if size != manifest.files[name]["size"]:
            raise Damaged(f"{name} has {size:,} bytes instead of {manifest.files[name]['size']:,}")
    # Reading everything comes after what is cheap.
    for name, path in found.items():
        try:
            contents = sha256_of_file(path)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        if contents != manifest.files[name]["sha256"]:
            raise Damaged(f"the contents of {name} have changed since it was written (sha256)")
    return manifest


def find_checkpoint(output_dir: str | Path, recipe: Any) -> Search:
    """The newest complete checkpoint of `recipe` in `output_dir`, and those passed over on the way to it.

    Raises:
        UserError: if the newest complete checkpoint belongs to a recipe that trains differently; says in what.
    """
    skipped: dict[Path, str] = {}
    for folder in reversed(_folders(output_dir)):
        try:
            manifest = read_manifest(folder)
        except Damaged as error:
            skipped[folder] = str(error)
            continue
        if manifest.recipe_digest != recipe_digest(recipe):
            changes = differences(manifest.recipe, to_dict(recipe))
            raise UserError(
                f"{folder}: this checkpoint was made by another recipe ({'; '.join(changes[:5])}); "
                "give this run its own output_dir, or remove the folder to start anew"
            )
        return Search(folder, manifest, skipped)
    return Search(skipped=skipped)


def damaged_name(folder: Path) -> str:
    """What a damaged checkpoint is called from then on."""
    return f"{_DAMAGED}{folder.name}"


def put_aside(output_dir: str | Path, damaged: Sequence[Path]) -> None:
    """Take the name of a checkpoint from the `damaged` ones, and remove what a killed process was writing."""
    for folder in damaged:
        target = folder.with_name(damaged_name(folder))
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    for left in Path(output_dir).glob(f"{ASIDE}*"):
        shutil.rmtree(left)
    remove_leftovers(output_dir)


def _wrong_types(manifest: Manifest) -> str:
    """Which field is not what it should be; empty where all are. The file may hold anything."""
    kinds: dict[str, Any] = {
        "step": int,
        "files": dict,
        "recipe_digest": str,
        "recipe": dict,
        "train_seconds": (int, float),
        "tokens": int,
        "identity": dict,
        "versions": dict,
    }
    for name, kind in kinds.items():
        if not isinstance(getattr(manifest, name), kind):
            return name
    for entry in manifest.files.values():
        if not (
            isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        ):
            return "files"
    return ""


def _folders(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders in `output_dir` by ascending step."""
    root = Path(output_dir)
    folders = [path for path in root.glob("checkpoint-*") if path.is_dir()]
    found = [(int(match[1]), path) for path in folders if (match := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _files(folder: Path) -> dict[str, Path]:
    """Relative path -> path of every file in `folder` but the manifest; links, wherever they lead, count as files."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths) if path != folder / MANIFEST}
