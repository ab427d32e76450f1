"""Solutions of a calibration on the disk: a folder with a safetensors file for each block, and `manifest.json`.

    manifest.json        what was calibrated, how, and by block: its file, the file's sha256, losses, statistics
    block-0000.safetensors
        LAYER.W_q, LAYER.scale, LAYER.offset, LAYER.blocks       as packed layers store them
        LAYER.lora_A, LAYER.lora_B, LAYER.singular_values        start factors of LoRA, where they were asked for

A block is finished when its file is on the disk and the manifest names it. `SolutionFolder` is the folder of a
calibration at work, which continues after the last finished block; `read_solutions` reads one that is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from hqqplus.errors import UserError
from hqqplus.files import locked_folder, replacing, write_json
from hqqplus.modules.replace import Solutions
from hqqplus.quantization import PackedTensor, QuantPlan, QuantSpec
from hqqplus.quantization.solver import SOLVER_VERSION
from hqqplus.quantization.statistics import LayerStatistics
from hqqplus.quantization.tensor import state_shapes
from hqqplus.recipe_yaml import shown
from hqqplus.untrusted import inside, read_json

MANIFEST = "manifest.json"
_FORMAT = 1
_FACTOR_NAMES = ("lora_A", "lora_B", "singular_values")

StartFactors = tuple[Tensor, Tensor, Tensor]
"""A [rank, in_features], B [out_features, rank] and the singular values [rank] of a weighted residual."""


@dataclass(frozen=True)
class BlockReport:
    """How one block came out. Losses are ||output - wanted||^2 / ||wanted||^2 on the held-out samples.

    Attributes:
        name: of the block.
        losses: by name of a start ("data-free", "importance", "feedback"), those that were tried.
        start: the start that was taken.
        curve: the loss of that start, and after each epoch of its reconstruction.
        loss: of what was stored.
        seconds: that it took.
        layers: module name -> what quantization did to the weight.
    """

    name: str
    losses: dict[str, float]
    start: str
    curve: tuple[float, ...]
    loss: float
    seconds: float
    layers: dict[str, LayerStatistics]

    @property
    def before(self) -> float:
        """The loss without data, where it was measured, else that of the start."""
        return self.losses.get("data-free", self.curve[0])

    def to_json(self) -> dict[str, Any]:
        layers = {name: statistics.to_dict() for name, statistics in self.layers.items()}
        return {**self.__dict__, "curve": list(self.curve), "layers": layers}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BlockReport:
        """What `to_json` gave.

        Raises:
            KeyError, TypeError: if something is missing or unknown.
        """
        layers = {name: LayerStatistics.from_dict(entry) for name, entry in values["layers"].items()}
        report = cls(**{**values, "curve": tuple(values["curve"]), "layers": layers})
        numbers = (*report.losses.values(), *report.curve, report.loss, report.seconds)
        if not report.curve or not all(isinstance(number, int | float) for number in numbers):
            raise TypeError("losses must be numbers")
        if not isinstance(report.name, str) or not isinstance(report.start, str):
            raise TypeError("names must be strings")
        return report


@dataclass(frozen=True)
class SolvedBlock:
    """A block's packed layers and start factors by module name, and the report on it."""

    packed: dict[str, PackedTensor]
    factors: dict[str, StartFactors]
    report: BlockReport

    def to_bytes(self) -> bytes:
        """Its safetensors file."""
        tensors = {f"{name}.{key}": t for name, packed in self.packed.items() for key, t in packed.state().items()}
        for name, factors in self.factors.items():
            tensors.update({f"{name}.{key}": t for key, t in zip(_FACTOR_NAMES, factors, strict=True)})
        return save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, {"format": "pt"})


@dataclass(frozen=True)
class _Entry:
    """What the manifest holds of a block. `specs`: module name -> (spec, shape)."""

    file: str
    sha256: str
    specs: dict[str, tuple[QuantSpec, tuple[int, int]]]
    report: BlockReport

    def to_json(self) -> dict[str, Any]:
        specs = {name: {"spec": spec.to_dict(), "shape": shape} for name, (spec, shape) in self.specs.items()}
        return {"file": self.file, "sha256": self.sha256, "specs": specs, "report": self.report.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> _Entry:
        specs = {}
        for name, entry in values["specs"].items():
            out_features, in_features = entry["shape"]
            if not all(isinstance(size, int) and size > 0 for size in (out_features, in_features)):
                raise TypeError(f"the shape of {name} must be two integers above 0")
            specs[name] = QuantSpec(**entry["spec"]), (out_features, in_features)
        file, sha256 = values["file"], values["sha256"]
        if not isinstance(file, str) or not isinstance(sha256, str):
            raise TypeError("file and sha256 must be strings")
        return cls(file, sha256, specs, BlockReport.from_json(values["report"]))


class SolutionFolder:
    """The solutions of a calibration at work, block by block. Made by `solution_folder`.

    Args:
        path: the folder; None keeps nothing on the disk.
        settings: what the solutions depend on, as JSON has it.
        entries: what an earlier start noted.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], entries: dict[str, _Entry]) -> None:
        self.path, self.settings, self._entries, self._complete = path, settings, entries, False
        # What a damaged block held. If it comes out as before, what was built on it stands.
        self._lost: dict[str, str] = {}

    def finished(self, blocks: Sequence[str]) -> dict[str, SolvedBlock]:
        """Those of `blocks` that are whole. A damaged one is noted as one to be done again."""
        found = {}
        for name in blocks:
            entry = self._entries.get(name)
            if entry is None:
                continue
            solved = self._read(entry)
            if solved is None:
                self._lost[name] = entry.sha256
            else:
                found[name] = solved
        return found

    def add(self, solved: SolvedBlock) -> bool:
        """Take `solved`, on the disk for certain afterwards. False if what was built on an earlier one is void now."""
        content, name = solved.to_bytes(), solved.report.name
        sha256 = hashlib.sha256(content).hexdigest()
        index = list(self._entries).index(name) if name in self._entries else len(self._entries)
        file = self._entries[name].file if name in self._entries else f"block-{index:04}.safetensors"
        specs = {layer: (packed.spec, packed.shape) for layer, packed in solved.packed.items()}
        stands = self._lost.get(name, sha256) == sha256
        if not stands:
            self._entries = dict(list(self._entries.items())[:index])
        self._entries[name] = _Entry(file, sha256, specs, solved.report)
        if self.path is not None:
            with replacing(self.path / file) as temporary, open(temporary, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            self.save()
        return stands

    def complete(self) -> None:
        """Note that no block is left to do."""
        self._complete = True
        if self.path is not None:
            self.save()

    @property
    def digest(self) -> str:
        """What tells these solutions from others: of the settings and of all that was found."""
        return _digest(self.settings, self._entries)

    def _read(self, entry: _Entry) -> SolvedBlock | None:
        if self.path is None:
            return None
        try:
            content = (self.path / entry.file).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load

        packed, factors = {}, {}
        try:
            tensors = load(content)
            for name, (spec, shape) in entry.specs.items():
                packed[name] = _packed(name, spec, shape, tensors)
                if f"{name}.{_FACTOR_NAMES[0]}" in tensors:
                    a, b, singular = (tensors[f"{name}.{key}"] for key in _FACTOR_NAMES)
                    factors[name] = a, b, singular
        except (SafetensorError, ValueError, KeyError):
            return None  # the manifest is not of this file
        return SolvedBlock(packed, factors, entry.report)

    def save(self) -> None:
        """Write the manifest."""
        assert self.path is not None
        blocks = {name: entry.to_json() for name, entry in self._entries.items()}
        head = {"format": _FORMAT, "complete": self._complete, "settings": self.settings}
        write_json(self.path / MANIFEST, {**head, "blocks": blocks})


@contextmanager
def solution_folder(path: str | Path | None, settings: dict[str, Any]) -> Iterator[SolutionFolder]:
    """The folder of a calibration for the length of a block; what an earlier start finished in it is there.

    Args:
        path: where; None for a calibration that leaves nothing on the disk.
        settings: what the solutions depend on (`describe_settings`). Work is continued if it is the same.

    Raises:
        UserError: if the folder holds something else, or another process is at work in it.
    """
    settings = json.loads(json.dumps(settings))  # as they will be read
    if path is None:
        yield SolutionFolder(None, settings, {})
        return
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"calibration: {path}: this file is in the way: remove it, or name another folder")
    path.mkdir(parents=True, exist_ok=True)
    with locked_folder(path, "calibration"):
        entries: dict[str, _Entry] = {}
        if any(path.iterdir()):
            noted, entries, _ = _read_manifest(path)
            if changed := list(_differences(noted, settings)):
                raise UserError(
                    f"calibration: {path}: this folder holds solutions with other settings ({', '.join(changed)}): "
                    "delete it, or name another folder"
                )
        folder = SolutionFolder(path, settings, entries)
        folder.save()
        yield folder


def read_solutions(path: str | Path) -> tuple[Solutions, list[BlockReport]]:
    """The solutions in folder `path`, and the reports on its blocks. Tensors are read as they are asked for.

    Raises:
        UserError: if the folder holds none, or not all of them. Later, on reading: if a file has gone or is damaged.
    """
    path = Path(path)
    settings, entries, complete = _read_manifest(path)
    if not complete:
        raise UserError(f"calibration: {path}: this calibration is unfinished: run it again, it goes on where it was")
    return Solutions(_Stored(path, entries), _digest(settings, entries)), [entry.report for entry in entries.values()]


class _Stored(Mapping[str, PackedTensor]):
    """Module name -> packed tensor, straight from the files."""

    def __init__(self, path: Path, entries: Mapping[str, _Entry]) -> None:
        self._path = path
        self._places = {name: (entry, form) for entry in entries.values() for name, form in entry.specs.items()}

    def __getitem__(self, name: str) -> PackedTensor:
        from safetensors import SafetensorError, safe_open

        entry, (spec, shape) = self._places[name]
        try:
            with safe_open(self._path / entry.file, framework="pt") as file:
                names = [f"{name}.{key}" for key in state_shapes(spec, *shape)]
                return _packed(name, spec, shape, {key: file.get_tensor(key) for key in names})
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"calibration: {self._path / entry.file}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def describe_settings(
    model: nn.Module, plan: QuantPlan, options: Mapping[str, Any], input_ids: Tensor, version: str
) -> dict[str, Any]:
    """What solutions depend on. Weights and tokens stand in it by their sha256 (some ten seconds for 16 GB)."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if config is not None else {}
    # Where a model was found, and by what it was written, is not what it is.
    kept = {k: v for k, v in values.items() if not k.startswith("_") and k != "transformers_version"}
    tokens = input_ids.detach().cpu().contiguous()
    return {
        "model": type(model).__name__,
        "weights": weights.hexdigest(),
        "config": json.loads(json.dumps(kept, default=str, sort_keys=True)),
        "plan": {**plan.default.to_dict(), "overrides": [list(item) for item in plan.overrides.items()]}
        | {"skip": list(plan.skip), "solver": plan.solver.to_dict()},
        "options": dict(options),
        "input_ids": {
            "shape": list(tokens.shape),
            "sha256": hashlib.sha256(tokens.view(torch.uint8).numpy().data).hexdigest(),
        },
        "hqqplus": version,
        "solver": SOLVER_VERSION,
    }


def _packed(name: str, spec: QuantSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> PackedTensor:
    """The packed tensor of layer `name`.

    Raises:
        ValueError: if `tensors` lacks a part of it, or has one of another form.
    """
    parts = {}
    for key, form in state_shapes(spec, *shape).items():
        tensor = tensors.get(f"{name}.{key}")
        if tensor is None or (tuple(tensor.shape), tensor.dtype) != form:
            raise ValueError(f"{name}.{key} is missing or has another form than {MANIFEST} says")
        parts[key] = tensor
    return PackedTensor(**parts, spec=spec, shape=shape)


def _read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, _Entry], bool]:
    """Settings, blocks, and whether these are all."""
    try:
        values = read_json(path / MANIFEST)
        if values["format"] != _FORMAT:
            raise UserError(f"{MANIFEST} is of format {shown(values['format'])}, this version reads {_FORMAT}")
        entries = {name: _Entry.from_json(entry) for name, entry in values["blocks"].items()}
        for entry in entries.values():
            inside(path, entry.file, MANIFEST)
        if not isinstance(values["settings"], dict):
            raise TypeError("settings must be an object")
        return values["settings"], entries, bool(values["complete"])
    except FileNotFoundError:
        raise UserError(
            f"calibration: {path}: this folder is in the way, and holds no calibration: name another folder"
        ) from None
    except UserError as error:
        raise UserError(f"calibration: {path}: {error}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"calibration: {path / MANIFEST}: it is damaged ({error}): delete the folder") from None


def _digest(settings: Mapping[str, Any], entries: Mapping[str, _Entry]) -> str:
    found = {name: entry.sha256 for name, entry in entries.items()}
    return hashlib.sha256(json.dumps([settings, found], sort_keys=True).encode()).hexdigest()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{above}{key}.")
        elif before != after:
            hashes = "sha256" in key or key == "weights"
            yield f"{above}{key}" if hashes else f"{above}{key}: {before} -> {after}"
