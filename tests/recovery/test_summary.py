"""What the report is told, from measurements and the trainer's log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hqqplus.recovery.measure import Measurement
from hqqplus.recovery.summary import curve, further_sets, how_to_load, side_by_side

LOG = [
    {"step": 5, "loss": 3.0, "learning_rate": 0.1},
    {"step": 10, "eval_loss": 2.5, "eval_perplexity": 12.0},
    {"step": 10, "loss": 2.0},
    {"step": 20, "eval_perplexity": float("inf")},
    {"step": 20, "train_runtime": 1.0, "train_loss": 2.5},
]
BEFORE = Measurement({"evaluation": 9.0, "stories": 5.0}, ["one", "two"], 10)
AFTER = Measurement({"evaluation": 7.0, "stories": 4.0}, ["eins", "zwei"], 11)
MEASURED = {"parent": None, "quantized": BEFORE, "recovered": AFTER}


def test_a_curve_holds_the_entries_that_have_it() -> None:
    assert curve(LOG, "loss") == [[5, 3.0], [10, 2.0]]
    assert curve(LOG, "eval_perplexity") == [[10, 12.0], [20, float("inf")]]
    assert curve(LOG, "grad_norm") == []


def test_samples_side_by_side() -> None:
    assert side_by_side(["1", "2"], MEASURED) == [
        {"prompt": "1", "parent": None, "quantized": "one", "recovered": "eins"},
        {"prompt": "2", "parent": None, "quantized": "two", "recovered": "zwei"},
    ]
    assert side_by_side([], MEASURED) == []


def test_further_sets_leave_out_the_evaluation_set() -> None:
    assert further_sets(["stories"], MEASURED) == {"stories": {"parent": None, "quantized": 5.0, "recovered": 4.0}}


def test_how_to_load_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import hqqplus

    monkeypatch.setattr(hqqplus, "load", lambda *args, **kwargs: (args, kwargs), raising=False)
    scope: dict[str, Any] = {}
    exec(how_to_load("runs/base", Path("runs/it/adapter")), scope)
    assert scope["model"] == (("runs/base",), {"adapter": "runs/it/adapter"})
