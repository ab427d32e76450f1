"""What lies in the folder of a run, or of `hqqplus quantize`, as the pages show it: read with care, for it may come
from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hqqplus.errors import UserError
from hqqplus.evaluation.layers import FILE_NAME as LAYERS
from hqqplus.evaluation.layers import Layers
from hqqplus.evaluation.report import Report
from hqqplus.untrusted import read_json

REPORT = "report.json"
# Of a run, of a packed folder: they know what was quantized and how also where a recipe names a packed model.
_FINGERPRINTS = ("adapter/hqqplus.json", "hqqplus.json")
# Sections of a recipe that are looked into.
_SECTIONS = ("model", "quantization", "calibration", "adapter", "recovery", "data", "training", "evaluation")

Number = float | None


class Sample(BaseModel):
    """A prompt and its completions; None at a stage that was not sampled."""

    prompt: str
    parent: str | None = None
    quantized: str | None = None
    recovered: str | None = None


class Cost(BaseModel):
    """Of one stage."""

    seconds: float = Field(ge=0, allow_inf_nan=False)
    peak_bytes: int | None = Field(None, ge=0)


class Costs(BaseModel):
    """`memory` says whose peaks they are: the GPU's, or the whole process's."""

    memory: str = "process"
    stages: dict[str, Cost] = {}


class Figures(BaseModel):
    """A `Report` after its way through JSON: None is what was not measured, or what is no finite number."""

    model_config = ConfigDict(extra="ignore")

    name: str
    ppl_parent: Number
    ppl_quantized: Number
    ppl_recovered: Number
    recovery: Number
    bits_per_weight: Number
    backbone_bytes: int = Field(ge=0)
    parent_bytes: int = Field(ge=0)
    adapter_bytes: int = Field(ge=0)
    adapter_parameters: int = Field(ge=0)
    train_seconds: Number
    tokens_per_second: Number
    device: str
    samples: list[Sample] = []
    texts: dict[str, dict[str, Number]] = {}
    loss_curve: list[tuple[float, Number]] = []
    ppl_curve: list[tuple[float, Number]] = []
    evaluation: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    versions: dict[str, str] = {}
    linear_weights: int = Field(0, ge=0)
    costs: Costs = Costs()

    @field_validator("recipe")
    @classmethod
    def _has_sections(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        for name in _SECTIONS:
            if not isinstance(recipe.get(name, {}), dict):
                raise ValueError(f"{name} is no section")
        return recipe


@dataclass(frozen=True)
class Run:
    """A folder that can be shown.

    Attributes:
        name: of the folder, or a longer part of its path where others have the same.
        figures: None of a folder of `hqqplus quantize`, which has not been measured.
        layers: None where they are not known.
        lacks_layers: why they are not.
        model: what was quantized, by the name that it was given.
        quantization: how, with `nbits`, `group_size` and `overrides`; empty where that is not known.
    """

    name: str
    figures: Figures | None
    layers: Layers | None
    lacks_layers: str = ""
    model: str = "a model"
    quantization: Mapping[str, Any] = field(default_factory=dict)

    @property
    def linear_weights(self) -> int:
        """Weights that `bits_per_weight` is an average over; 0 where they are not known."""
        if self.figures is not None and self.figures.linear_weights:
            return self.figures.linear_weights
        layers = self.layers.layers if self.layers is not None else ()
        return sum(layer.statistics.weights for layer in layers if not layer.embedding)

    @property
    def bits_per_weight(self) -> float | None:
        """Of the packed linear layers, scales and zeros included."""
        if self.figures is not None:
            return self.figures.bits_per_weight
        bits = self.layers.bits_per_weight if self.layers is not None else math.nan
        return bits if math.isfinite(bits) else None

    @property
    def bits_with_adapter(self) -> float | None:
        """The same with the adapter's bits; None where it is not known over how many weights."""
        if self.figures is None or self.bits_per_weight is None or not self.linear_weights:
            return None
        return self.bits_per_weight + 8 * self.figures.adapter_bytes / self.linear_weights


def run_of(report: Report, layers: Layers | None, folder: str | Path) -> Run:
    """What `open_run` would read back of a report and layers that are just being written to `folder`."""
    figures = Figures.model_validate(report.to_json())
    shown = None if layers is None else Layers.from_json(layers.to_json())
    lacking = "" if layers is not None else _no_layers()
    return Run(figures.name, figures, shown, lacking, *_origin(Path(folder), figures, shown))


def open_run(folder: str | Path) -> Run:
    """Read the run in `folder`, or the packed model that `hqqplus quantize` left there.

    Raises:
        UserError: naming the folder, if it is neither, has not ended, or is damaged.
    """
    folder = Path(folder)
    name = folder.resolve().name or str(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    try:
        figures = Figures.model_validate(read_json(folder / REPORT))
    except FileNotFoundError:
        figures = None
    except ValidationError as error:
        raise UserError(f"{folder}: its {REPORT} cannot be read: {_first(error)}") from None
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{folder}: its {REPORT} cannot be read: {error}") from None
    layers, reason = _layers(folder)
    if figures is not None:
        return Run(name, figures, layers, reason, *_origin(folder, figures, layers))
    if (folder / "measurements.json").exists() or (folder / "log.jsonl").exists():
        raise UserError(f"{folder}: there is no {REPORT}: this run has not ended; its command goes on with it")
    if layers is None:
        why = f"its {reason}" if (folder / LAYERS).exists() else f"there is no {REPORT} and no {LAYERS}"
        raise UserError(f"{folder}: {why}: name the folder of a finished run, or one that `hqqplus quantize` wrote")
    return Run(name, None, layers, "", *_origin(folder, None, layers))


def _origin(folder: Path, figures: Figures | None, layers: Layers | None) -> tuple[str, Mapping[str, Any]]:
    """The model of a run and its quantization."""
    for name in _FINGERPRINTS:
        try:
            found = read_json(folder / name)
            quantization = found["quantization"]
            if isinstance(quantization, dict):
                return str(found["base"]), quantization
        except (OSError, ValueError, TypeError, LookupError):
            continue  # not there, or moved away from it
    if figures is not None:
        recipe = figures.recipe
        return str(recipe.get("model", {}).get("name_or_path", "a model")), recipe.get("quantization", {})
    return (layers.title if layers is not None else "a model"), {}


def _layers(folder: Path) -> tuple[Layers | None, str]:
    try:
        return Layers.from_json(read_json(folder / LAYERS)), ""
    except FileNotFoundError:
        return None, _no_layers()
    except KeyError as error:
        return None, f"{LAYERS} cannot be read: {error} is missing"
    except (OSError, ValueError, TypeError, OverflowError) as error:
        return None, f"{LAYERS} cannot be read: {error}"


def _no_layers() -> str:
    return f"there is no {LAYERS}: the model was packed elsewhere, or before runs kept one"


def _first(error: ValidationError) -> str:
    """The first of a validation's complaints, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    said = "it is missing" if first["type"] == "missing" else str(first["msg"])
    return f"{where}: {said}" if where else said
