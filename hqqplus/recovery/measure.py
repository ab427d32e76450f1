"""Measuring a model the way every other stage of the run measures it, and remembering it across restarts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hqqplus.evaluation.perplexity import Windows, perplexity
from hqqplus.evaluation.samples import complete
from hqqplus.files import write_json
from hqqplus.integrations.fsdp import in_lockstep
from hqqplus.untrusted import read_json

FILE_NAME = "measurements.json"
# Beside the stages.
_COSTS = "costs"


@dataclass(frozen=True)
class Measurement:
    """Perplexity on each evaluation set (name -> value), completions of the prompts, and the model's size in bytes."""

    perplexities: dict[str, float]
    samples: list[str]
    model_bytes: int


@dataclass(frozen=True)
class Meter:
    """Measures any model on the same windows and prompts.

    Attributes:
        windows: evaluation set -> its windows.
    """

    windows: Mapping[str, Windows]
    tokenizer: Any
    prompts: Sequence[str]
    max_new_tokens: int
    batch_size: int

    def measure(self, model: Any, model_bytes: int) -> Measurement:
        """Of a sharded model (FSDP2) by all processes together."""
        with in_lockstep(model):
            return Measurement(
                {
                    name: perplexity(model, windows, self.batch_size).perplexity
                    for name, windows in self.windows.items()
                },
                complete(model, self.tokenizer, self.prompts, self.max_new_tokens),
                model_bytes,
            )


class Notebook:
    """Measurements of this run by stage, on disk: a restarted run measures nothing twice.

    Each is kept under a digest of all that it depends on, and ignored where that has changed.
    """

    def __init__(self, output_dir: str | Path, writes: bool) -> None:
        self.path, self.writes = Path(output_dir) / FILE_NAME, writes

    def recall(self, stage: str, depends_on: Any, measure: Callable[[], Measurement]) -> Measurement:
        """The noted measurement of `stage`, or `measure()`, which is then noted."""
        return self.noted(stage, depends_on) or self.note(stage, depends_on, measure())

    def noted(self, stage: str, depends_on: Any) -> Measurement | None:
        """The noted measurement of `stage`, if there is one."""
        try:
            note = self._read()[stage]
            return _measurement(note["measurement"]) if note["digest"] == _digest(depends_on) else None
        except (KeyError, TypeError):
            return None  # not noted, or by someone else

    def note(self, stage: str, depends_on: Any, measurement: Measurement) -> Measurement:
        """Note `measurement`, and return it."""
        if self.writes:
            entry = {"digest": _digest(depends_on), "measurement": asdict(measurement)}
            write_json(self.path, {**self._read(), stage: entry})
        return measurement

    def costs(self, depends_on: Any) -> dict[str, dict[str, Any]]:
        """What stages cost: stage -> {"seconds", "peak_bytes"}, the latter None where it is not known."""
        try:
            found = self._read()[_COSTS]
            stages = found["stages"].items() if found["digest"] == _digest(depends_on) else ()
            costs = {name: {key: cost[key] for key in ("seconds", "peak_bytes")} for name, cost in stages}
        except (KeyError, TypeError, AttributeError):
            return {}  # not noted, or by someone else
        known = [cost["seconds"] for cost in costs.values()]
        known += [cost["peak_bytes"] for cost in costs.values() if cost["peak_bytes"] is not None]
        return costs if all(isinstance(number, int | float) for number in known) else {}

    def note_cost(self, depends_on: Any, stage: str, seconds: float, peak_bytes: int | None) -> None:
        """Note what `stage` cost: its seconds in the place of earlier ones, its peak if it is higher than before."""
        if self.writes:
            costs = self.costs(depends_on)
            peaks = [peak_bytes, costs.get(stage, {}).get("peak_bytes")]
            peak = max((peak for peak in peaks if peak is not None), default=None)
            costs[stage] = {"seconds": seconds, "peak_bytes": peak}
            entry = {"digest": _digest(depends_on), "stages": costs}
            write_json(self.path, {**self._read(), _COSTS: entry})

    def _read(self) -> dict[str, Any]:
        try:
            notes = read_json(self.path)
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}


def _measurement(values: Any) -> Measurement:
    """What `asdict` made a note of.

    Raises:
        TypeError: if it is none.
    """
    found = Measurement(**values)
    if not isinstance(found.perplexities, dict) or not isinstance(found.samples, list):
        raise TypeError("perplexities by name and a list of samples are needed")
    numbers = (*found.perplexities.values(), found.model_bytes)
    if not all(isinstance(n, int | float) for n in numbers) or not all(isinstance(s, str) for s in found.samples):
        raise TypeError("perplexities are numbers, samples are strings")
    return found


def _digest(depends_on: Any) -> str:
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()
