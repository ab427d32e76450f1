"""What the stages of a run cost: seconds, and the most memory that was in use."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from hqqplus.recovery.measure import Notebook

Timed = Callable[[str], AbstractContextManager[None]]
"""`with timed("quantize"): ...` notes what the block cost."""


def untimed(stage: str) -> AbstractContextManager[None]:
    """A `Timed` that notes nothing."""
    return nullcontext()


class Costs:
    """Notes what stages cost, in the notes of the run: a stage that an earlier start did keeps what it cost there.

    A stage that a later start had to do again counts once. Of several processes it is the main one that notes, for
    itself.

    Args:
        depends_on: what the run is; costs of another one are forgotten.
        device: where the model is. Of a GPU the peak is PyTorch's own count of each stage; else it is the resident
            memory of the process, as the system has it, which does not go down again between stages.
        hold: write nothing before `release`: a run that may yet be refused changes no file of the one before it.
    """

    def __init__(self, notes: Notebook, depends_on: Any, device: torch.device, hold: bool = False) -> None:
        self._notes, self._depends_on, self._device = notes, depends_on, device
        self._held: list[tuple[str, float, int | None]] | None = [] if hold else None

    def release(self) -> None:
        """Note what was held back, and from now on everything at once."""
        held, self._held = self._held or [], None
        for cost in held:
            self._notes.note_cost(self._depends_on, *cost)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A block that is stage `name`; nothing is noted where it fails."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        started = time.monotonic()
        yield
        cost = name, time.monotonic() - started, self._peak()
        if self._held is None:
            self._notes.note_cost(self._depends_on, *cost)
        else:
            self._held.append(cost)

    def to_dict(self, train_seconds: float) -> dict[str, Any]:
        """For the report: {"memory": "gpu" or "process", "stages": {stage: {"seconds", "peak_bytes"}}}.

        Args:
            train_seconds: those of the training over all starts, which its checkpoints count.
        """
        stages = self._notes.costs(self._depends_on)
        if "train" in stages:
            stages["train"]["seconds"] = train_seconds
        return {"memory": "gpu" if self._device.type == "cuda" else "process", "stages": stages}

    def _peak(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return peak_resident_bytes()


def peak_resident_bytes() -> int | None:
    """The most memory that this process ever had resident, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
