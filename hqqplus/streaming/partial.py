"""Work on a folder that outlives the process: `partial_folder`.

While OUTPUT is being made there is OUTPUT.partial, which becomes OUTPUT by a rename:

    progress.json     what is being made, of what, and how far it is
    NAME.part         the file in work
    model/            finished files

A file counts as finished, and a tensor of the file in work as written, when it is on the disk for certain; whatever
comes after that in a process that is killed is done again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqplus.errors import UserError
from hqqplus.files import check_space, locked_folder, move_folder, write_json
from hqqplus.quantization.statistics import LayerStatistics
from hqqplus.shards import Form, SafetensorsWriter
from hqqplus.untrusted import read_json

_FORMAT = 1
# Between two notes of how far a file is. Each of them waits for the disk.
_NOTE_SECONDS = 20.0


@dataclass
class _Progress:
    """What `progress.json` holds."""

    settings: dict[str, Any]
    source: dict[str, Any]
    files: dict[str, int]  # finished ones, and their size
    current: str | None  # the file in work
    tensors: list[str]  # that were written to it
    layers: dict[str, LayerStatistics]

    def to_json(self) -> dict[str, Any]:
        layers = {name: statistics.to_dict() for name, statistics in self.layers.items()}
        return {"format": _FORMAT, **self.__dict__, "layers": layers}

    @classmethod
    def read(cls, path: Path) -> _Progress | None:
        """None where there is no such file, or nothing that can be understood."""
        try:
            values = read_json(path)
            if values.pop("format") != _FORMAT:
                return None
            layers = {name: LayerStatistics.from_dict(entry) for name, entry in values.pop("layers").items()}
            progress = cls(**values, layers=layers)
            return progress if progress._is_sound() else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def _is_sound(self) -> bool:
        """Whether what was read is of the types that it should be."""
        return (
            all(isinstance(value, dict) for value in (self.settings, self.source, self.files))
            and isinstance(self.current, str | None)
            and isinstance(self.tensors, list)
            and all(isinstance(name, str) for name in self.tensors)
        )


class FileInWork:
    """A safetensors file that is being written.

    Attributes:
        writer: puts tensors into it.
        written: tensors (by whatever names the caller gave to `note`) that need not be written again.
    """

    def __init__(self, writer: SafetensorsWriter, partial: PartialFolder) -> None:
        self.writer, self._partial, self._noted = writer, partial, time.monotonic()

    @property
    def written(self) -> Collection[str]:
        return self._partial.progress.tensors

    def note(self, name: str, layer: str | None = None, statistics: LayerStatistics | None = None) -> None:
        """Tensor `name` was written; a packed one with the statistics of its layer."""
        progress = self._partial.progress
        progress.tensors.append(name)
        if layer is not None and statistics is not None:
            progress.layers[layer] = statistics
        if time.monotonic() - self._noted >= _NOTE_SECONDS:
            self.writer.sync()
            self._partial.save()
            self._noted = time.monotonic()


class PartialFolder:
    """OUTPUT.partial, held by this process. Made by `partial_folder`.

    Attributes:
        path: the folder.
        model: the folder in it that becomes OUTPUT.
    """

    def __init__(self, path: Path, output: Path, progress: _Progress) -> None:
        self.path, self.model, self._output, self.progress = path, path / "model", output, progress

    @property
    def layers(self) -> dict[str, LayerStatistics]:
        """Layers that are written."""
        return self.progress.layers

    @property
    def begun(self) -> bool:
        """Whether there is anything that need not be done again."""
        return bool(self.progress.files or self.progress.tensors)

    def save(self) -> None:
        write_json(self.path / "progress.json", self.progress.to_json())

    def finished(self, files: Mapping[str, Mapping[str, Form]], layers: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Which of `files` (name -> the forms of their tensors) are finished; forget what is not as it was noted.

        Args:
            layers: name of the file -> name of the tensor, as it was noted -> its layer.
        """
        progress, known = self.progress, self.progress.layers
        whole = [
            name
            for name, forms in files.items()
            if (self.model / name).is_file()
            and (self.model / name).stat().st_size == progress.files.get(name)
            and SafetensorsWriter.fits(self.model / name, forms)
            and all(layer in known for layer in layers[name].values())
        ]
        progress.files = {name: progress.files[name] for name in whole}
        current = progress.current
        if current is None or current not in files or not SafetensorsWriter.fits(self._part(current), files[current]):
            progress.current, progress.tensors = None, []
        else:
            packed = layers[current]
            progress.tensors = [name for name in progress.tensors if name not in packed or packed[name] in known]
        kept = {layer for name in whole for layer in layers[name].values()}
        if progress.current is not None:
            in_work = layers[progress.current]
            kept.update(in_work[name] for name in progress.tensors if name in in_work)
        progress.layers = {name: statistics for name, statistics in known.items() if name in kept}
        return whole

    def check_space(self, needed: int) -> None:
        """Refuse, before the work, what would not fit: `needed` bytes in all, of which some may be there.

        Raises:
            UserError: with the bytes that are needed and those that are free.
        """
        there = [*self.model.iterdir(), *self.path.glob("*.part")]
        # Blocks: of a file in work only a part is on the disk.
        check_space(self._output, needed - sum(path.stat().st_blocks * 512 for path in there), "output")

    @contextmanager
    def writing(self, name: str, forms: Mapping[str, Form]) -> Iterator[FileInWork]:
        """File `name` in work; finished, and in `model`, at the end of the block."""
        progress, part = self.progress, self._part(name)
        resume = progress.current == name
        if not resume:
            progress.current, progress.tensors = name, []
        with SafetensorsWriter(part, forms, resume) as writer:
            yield FileInWork(writer, self)
        os.replace(part, self.model / name)
        progress.files[name] = (self.model / name).stat().st_size
        progress.current, progress.tensors = None, []
        self.save()

    def discard(self) -> None:
        """Give up: nothing that was done is of use."""
        shutil.rmtree(self.path, ignore_errors=True)

    def become_output(self) -> None:
        """The last step: what stood at OUTPUT is replaced by what was made."""
        move_folder(self.model, self._output)
        self.discard()

    def _part(self, name: str) -> Path:
        return self.path / f"{name}.part"


@contextmanager
def partial_folder(output: Path, settings: dict[str, Any], source: dict[str, Any]) -> Iterator[PartialFolder]:
    """OUTPUT.partial for the length of a block; it is left for the next start where that can go on with it.

    Args:
        settings: how OUTPUT is made; source: what of. Both as JSON has them. Work is continued if both are the same.

    Raises:
        UserError: if it holds something else, or another process is at work in it.
    """
    path = output.with_name(f"{output.name}.partial")
    if path.exists() and not path.is_dir():
        raise UserError(f"output: {path}: this file is in the way: remove it, or name another output")
    settings, source = json.loads(json.dumps([settings, source]))  # as they will be read
    path.mkdir(parents=True, exist_ok=True)
    with locked_folder(path, "output"):
        progress = _continue(path, settings, source) or _Progress(settings, source, {}, None, [], {})
        partial = PartialFolder(path, output, progress)
        # First: a folder without it is nobody's.
        partial.save()
        partial.model.mkdir(exist_ok=True)
        try:
            yield partial
        finally:
            if not partial.begun:
                partial.discard()


def remove_rest(output: Path) -> None:
    """Remove what is left of OUTPUT.partial where a process was killed right after OUTPUT got its name."""
    path = output.with_name(f"{output.name}.partial")
    if not path.is_dir() or not {entry.name for entry in path.iterdir()} <= {"progress.json", "configuration"}:
        return
    # Held by another process, it is a beginning.
    with suppress(UserError), locked_folder(path, "output"):
        shutil.rmtree(path)


def _continue(path: Path, settings: dict[str, Any], source: dict[str, Any]) -> _Progress | None:
    """What an earlier start noted in folder `path`; None if the folder is empty."""
    if not any(path.iterdir()):
        return None
    advice = "delete it, or name another output"
    progress = _Progress.read(path / "progress.json")
    if progress is None:
        raise UserError(f"output: {path}: this folder is in the way, and no unfinished quantization: {advice}")
    if progress.settings != settings:
        changed = ", ".join(_differences(progress.settings, settings))
        raise UserError(f"output: {path}: an unfinished quantization with other settings ({changed}): {advice}")
    if progress.source != source:
        raise UserError(f"output: {path}: an unfinished quantization of another checkpoint: {advice}")
    return progress


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict) and key == "quantization":
            yield from _differences(before, after)
        elif before != after:
            yield f"{key}: {before} -> {after}"
