"""Runs of a small recipe with everything on; what must hold of their files after a kill, and in the end."""

from __future__ import annotations

import difflib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

import hqqplus
from hqqplus.evaluation.report import read_report
from hqqplus.recovery.checkpoints import read_manifest
from hqqplus.recovery.teacher_cache import TeacherCache
from tests.faults.server import ForkServer, Kill, Run

# Of all runs of one length: a path is then as long as any other, in files that hold lengths too.
_NAME = "run-{:04}"
_WORDS = ("the", "of", "a", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they")
# What a run keeps under its final name. Anything else is a temporary name, which a dot or a suffix tells.
_KEPT = {"adapter", "backbone", "teacher"} | {"data.json", "log.jsonl", "measurements.json"}
_KEPT |= {"report.json", "report.md", "report.png", "report.html", "layers.json"}
_TEMPORARY = re.compile(r"\..+|teacher\.partial")
_OF_THE_TEST = (".log", ".changes", ".probe")
# Of files that are JSON, what is a time.
_TIMES = {"train_seconds", "tokens_per_second", "seconds", "time", "train_runtime", "train_samples_per_second"} | {
    "train_steps_per_second",
    "costs",
}


@dataclass(frozen=True)
class Place:
    """The folder of a run: its recipe, what it writes, what it prints."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def newest(self) -> int | None:
        """Step of the newest checkpoint."""
        return max(self.checkpoints(), default=None)

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that are there, ascending."""
        return sorted(int(path.name.rpartition("-")[2]) for path in self.out.glob("checkpoint-*"))


class Runs:
    """Starts runs of recipes in folders of their own below `root`.

    Args:
        server: None where only places are asked for.
        model: a folder.
    """

    def __init__(self, server: ForkServer | None, root: Path, model: Path) -> None:
        self.server, self.root, self._model, self._made = server, root, model, 0
        self._references: dict[str, tuple[Place, Run]] = {}
        rows = [{"text": " ".join(_WORDS[(i * k) % len(_WORDS)] for k in range(1, 16))} for i in range(1, 29)]
        for name, part in (("train", rows[:20]), ("eval", rows[20:])):
            (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))

    def place(self, **changes: Any) -> Place:
        """A new folder with a recipe; keyword arguments `section__key` replace values."""
        place = Place(self.root / _NAME.format(self._made))
        self._made += 1
        place.folder.mkdir()
        values: dict[str, Any] = {
            "model": {"name_or_path": str(self._model)},
            "quantization": {"nbits": 2, "group_size": 32},
            "adapter": {"r": 4, "lora_dropout": 0.1},
            "data": {
                "path_or_name": str(self.root / "train.jsonl"),
                "eval_path_or_name": str(self.root / "eval.jsonl"),
                "max_length": 64,
                "packing": False,
            },
            "training": {
                "max_steps": 8,
                "save_steps": 3,
                "eval_steps": 4,
                "logging_steps": 2,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2,
                "warmup_steps": 2,
                "disable_tqdm": True,
            },
            "evaluation": {"max_tokens": 300, "prompts": ["the"], "max_new_tokens": 2, "parent": False},
            "output_dir": str(place.out),
        }
        for name, value in changes.items():
            section, _, key = name.partition("__")
            if value is None:
                values[section].pop(key, None)
            else:
                values.setdefault(section, {})[key] = str(place.base) if value == "BASE" else value
        place.recipe.write_text(yaml.safe_dump(values))
        return place

    def start(self, place: Place, kill: Kill | None = None, **options: Any) -> Run:
        """`options` are those of `ForkServer.start`."""
        assert self.server is not None
        log = place.folder / f"{len(list(place.folder.glob('*.log'))):03}.log"
        log.touch()
        return self.server.start([str(place.recipe)], place.folder, log, kill, **options)

    def finish(self, place: Place) -> Run:
        """Start it, and let it come through."""
        run = self.start(place)
        code = run.wait()
        assert code == 0, f"exit code {code}\n{run.output}"
        assert "is skipped" not in run.output
        return run

    def reference(self, **changes: Any) -> tuple[Place, Run]:
        """An uninterrupted run with these changes; made once."""
        key = json.dumps(changes, sort_keys=True)
        if key not in self._references:
            place = self.place(**changes)
            self._references[key] = place, self.finish(place)
        return self._references[key]


EVERYTHING: dict[str, Any] = {
    "quantization__save_to": "BASE",
    "calibration__method": "block",
    "calibration__samples": 8,
    "calibration__length": 32,
    "calibration__epochs": 1,
    "recovery__loss": "kd",
    "recovery__teacher": "cache",
    "recovery__hidden_weight": 0.0,
    "recovery__top_k": 8,
    "recovery__scales": "bake",
    "evaluation__parent": True,
}
"""Changes that make a recipe one with all that a run can do."""


# After a kill --------------------------------------------------------------------------------------------------------


def check_disk(place: Place) -> None:
    """What is under a final name is whole, and it loads; anything else has a temporary name."""
    # Two are kept, and one more until the oldest is removed.
    assert len(place.checkpoints()) <= 3
    loads = [folder for folder in (place.base, place.out / "backbone", place.out / "adapter") if folder.exists()]
    for folder in loads:
        # An adapter is looked for on the base that lies beside it, which is there before it.
        hqqplus.load(folder)
    for path in place.out.glob("*"):
        if path.name.startswith("checkpoint-"):
            _check_checkpoint(path)
        elif path.name not in _KEPT:
            assert _TEMPORARY.fullmatch(path.name), path
    if (teacher := place.out / "teacher").exists():
        TeacherCache.open(teacher)
    if (place.out / "report.json").exists():
        assert read_report(place.out) is not None
        assert (place.out / "adapter").is_dir()
    if (place.out / "measurements.json").exists():
        json.loads((place.out / "measurements.json").read_text())


def _check_checkpoint(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert folder.name == f"checkpoint-{manifest.step}"
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    for name in ("optimizer.pt", "scheduler.pt"):
        assert torch.load(folder / name, weights_only=True)
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == manifest.step


# In the end ----------------------------------------------------------------------------------------------------------


def files(place: Place) -> dict[str, Path]:
    """Relative name -> path of all files that a run wrote and keeps, and of its folders, whose names end in "/".

    What it printed and the rows' cache are left out, and all checkpoints but the newest: a run that was stopped has
    some at other steps.
    """
    left_out = ("datasets/", *(f"out/checkpoint-{step}/" for step in place.checkpoints()[:-1]))
    found = {}
    for path in sorted(place.folder.rglob("*")):
        name = path.relative_to(place.folder).as_posix() + "/" * path.is_dir()
        if not name.startswith(left_out) and path.suffix not in _OF_THE_TEST:
            found[name] = path
    return found


def differences(ours: Place, theirs: Place) -> list[str]:
    """In what the files of two runs differ, bit for bit, but for times and the names of their folders."""
    mine, others = files(ours), files(theirs)
    found = [f"{name} is left over" for name in mine.keys() - others.keys()]
    found += [f"{name} is missing" for name in others.keys() - mine.keys()]
    for name in sorted(name for name in mine.keys() & others.keys() if not name.endswith("/")):
        found += _difference(name, _content(mine[name], ours), _content(others[name], theirs))
    return found


def _content(path: Path, place: Place) -> Any:
    """What is compared of a file."""

    def renamed(content: bytes) -> bytes:
        return content.replace(place.folder.name.encode(), _NAME.format(0).encode())

    if path.name == "training_args.bin":
        # The name of the folder is in it, and with it the checksums of the archive change.
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("serialization_id")]
            return b"".join(renamed(archive.read(name)) for name in names)
    raw = renamed(path.read_bytes())
    if path.suffix == ".json":
        # Of a checkpoint the files themselves are compared.
        skipped = {"hqqplus_checkpoint.json": {"files", "recipe_digest"}, "measurements.json": {"digest"}}
        return _without(json.loads(raw), _TIMES | skipped.get(path.name, set()))
    if path.name in ("report.md", "README.md"):
        # "1.3 s, 1,234 tokens/s"
        return re.sub(rb"[\d.,]+ (s|min|tokens/s)\b", b"", raw)
    if path.name == "report.html":
        # What it shows of times and memory is what report.json holds of them.
        return re.sub(rb"<section><h2>Memory and time</h2>.*?</section>", b"", raw, flags=re.DOTALL)
    return raw


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


def _difference(name: str, ours: Any, theirs: Any) -> list[str]:
    if ours == theirs:
        return []
    if isinstance(ours, bytes):
        return [f"{name} differs ({len(ours)} and {len(theirs)} bytes)"]
    before, after = (json.dumps(value, indent=1).splitlines() for value in (theirs, ours))
    lines = difflib.unified_diff(before, after, lineterm="", n=0)
    return [f"{name}: {' '.join(line for line in lines if not line.startswith(('---', '+++')))[:400]}"]


def stamps(place: Place) -> dict[str, tuple[int, int, int]]:
    """Which file each one is, how long, and when it was written."""
    stats = {name: path.stat() for name, path in files(place).items()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
