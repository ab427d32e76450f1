"""Which checkpoint a run may continue from.

A Trainer checkpoint is written file by file. A process killed meanwhile leaves a folder that looks like the newest
checkpoint and is not one; a missing optimizer file would even be replaced by a fresh optimizer in silence. So a
manifest is written last, with the size of every file, and only a folder that agrees with its manifest counts.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hqqplus.errors import UserError
from hqqplus.files import write_json
from hqqplus.recipe import differences, recipe_digest, to_dict

MANIFEST = "hqqplus_checkpoint.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself.

    Attributes:
        step: optimizer steps done.
        files: relative path -> size in bytes, of everything in the folder but the manifest.
        recipe_digest, recipe: of the run that wrote it.
        train_seconds, tokens: time spent and tokens seen in training up to here, over all runs of it.
    """

    step: int
    files: dict[str, int]
    recipe_digest: str
    recipe: dict[str, Any]
    train_seconds: float
    tokens: int


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / f"checkpoint-{step}"


def write_manifest(folder: Path, recipe: Any, step: int, train_seconds: float, tokens: int) -> None:
    """Declare the checkpoint in `folder` complete."""
    manifest = Manifest(step, _sizes(folder), recipe_digest(recipe), to_dict(recipe), train_seconds, tokens)
    write_json(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of the checkpoint in `folder`; None if it is missing, damaged, or disagrees with the files."""
    try:
        manifest = Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return manifest if _sizes(folder) == manifest.files else None


def last_complete(output_dir: str | Path, recipe: Any) -> tuple[Path, Manifest] | None:
    """The newest complete checkpoint of `recipe` in `output_dir`, and its manifest; None where there is none.

    Raises:
        UserError: if the newest complete checkpoint belongs to a recipe that trains differently; says in what.
    """
    complete = [(folder, manifest) for folder in _folders(output_dir) if (manifest := read_manifest(folder))]
    if not complete:
        return None
    folder, manifest = complete[-1]
    if manifest.recipe_digest != recipe_digest(recipe):
        changes = differences(manifest.recipe, to_dict(recipe))
        raise UserError(
            f"{folder}: this checkpoint was made by another recipe ({'; '.join(changes[:5])}); "
            "give this run its own output_dir, or remove the folder to start anew"
        )
    return folder, manifest


def discard_incomplete(output_dir: str | Path) -> list[Path]:
    """Delete the checkpoints that a killed process left unfinished, and return their paths."""
    broken = [folder for folder in _folders(output_dir) if read_manifest(folder) is None]
    for folder in broken:
        shutil.rmtree(folder)
    return broken


def _folders(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders in `output_dir` by ascending step."""
    root = Path(output_dir)
    folders = [path for path in root.glob("checkpoint-*") if path.is_dir()]
    found = [(int(match[1]), path) for path in folders if (match := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _sizes(folder: Path) -> dict[str, int]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(paths)}
