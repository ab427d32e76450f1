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

FILE_NAME = "measurements.json"


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
        return Measurement(
            {name: perplexity(model, windows, self.batch_size).perplexity for name, windows in self.windows.items()},
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
        digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()
        notes = self._read()
        try:
            if notes[stage]["digest"] == digest:
                return Measurement(**notes[stage]["measurement"])
        except (KeyError, TypeError):
            pass  # not noted, or by someone else
        measurement = measure()
        if self.writes:
            write_json(self.path, {**notes, stage: {"digest": digest, "measurement": asdict(measurement)}})
        return measurement

    def _read(self) -> dict[str, Any]:
        try:
            notes = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}
