"""Two thousand steps: what a run takes of memory and file descriptors does not grow."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from tests.faults.runs import EVERYTHING, Runs

STEPS, SAVED_EVERY = 2000, 50
# Until then caches fill and the allocator finds its size.
WARM_UP = 10
MEGABYTE = 1e6

LONG: dict[str, Any] = {
    **EVERYTHING,
    "training__max_steps": STEPS,
    "training__save_steps": SAVED_EVERY,
    "training__eval_steps": 100,
    "training__logging_steps": 10,
    "training__gradient_accumulation_steps": 1,
    "training__learning_rate": 1e-4,
}


@pytest.mark.slow
@pytest.mark.long
def test_memory_and_file_handles_are_steady(runs: Runs, record_property: Any) -> None:
    place = runs.place(**LONG)
    run = runs.start(place, probe="hqqplus.recovery.checkpoints:rotate")
    assert run.wait() == 0, run.output
    assert place.checkpoints() == [STEPS - SAVED_EVERY, STEPS]
    resident, handles = zip(*run.memory, strict=True)
    assert len(resident) == STEPS // SAVED_EVERY
    early, late = (statistics.median(part) for part in (resident[WARM_UP : 2 * WARM_UP], resident[-WARM_UP:]))
    slope, _ = statistics.linear_regression(range(len(resident) - WARM_UP), resident[WARM_UP:])
    figures = {
        "seconds": run.seconds,
        "MB at each checkpoint": [round(size / MEGABYTE, 1) for size in resident],
        "MB early and late": [early / MEGABYTE, late / MEGABYTE],
        "KB a step": slope / SAVED_EVERY / 1e3,
        "file descriptors": sorted(set(handles)),
    }
    record_property("figures", figures)
    print(figures)
    assert late <= 1.02 * early + 4 * MEGABYTE, figures
    # 2,000 steps more would take 8 MB more at most.
    assert slope / SAVED_EVERY <= 4e3, figures
    assert len(set(handles[WARM_UP:])) == 1, figures
