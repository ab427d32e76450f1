"""What stages cost is noted, kept across restarts, and forgotten with the run that it was of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hqqplus.recovery import costs as module
from hqqplus.recovery.costs import Costs, peak_resident_bytes, untimed
from hqqplus.recovery.measure import FILE_NAME, Measurement, Notebook

CPU = torch.device("cpu")
MEASURED = Measurement({"evaluation": 2.0}, ["so"], 1)


@pytest.fixture
def notes(tmp_path: Path) -> Notebook:
    return Notebook(tmp_path, writes=True)


def clock(monkeypatch: pytest.MonkeyPatch, times: list[float], peaks: list[int]) -> None:
    monkeypatch.setattr(module.time, "monotonic", lambda: times.pop(0))
    monkeypatch.setattr(module, "peak_resident_bytes", lambda: peaks.pop(0))


def test_stages_are_noted_beside_the_measurements(notes: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, [10.0, 12.5, 20.0, 21.0], [700, 900])
    notes.note("parent", "it", MEASURED)
    costs = Costs(notes, "run", CPU)
    with costs.stage("quantize"):
        pass
    with costs.stage("train"):
        pass
    assert costs.to_dict(60.0) == {
        "memory": "process",
        "stages": {
            "quantize": {"seconds": 2.5, "peak_bytes": 700},
            # Its seconds are those of all starts.
            "train": {"seconds": 60.0, "peak_bytes": 900},
        },
    }
    assert notes.noted("parent", "it") == MEASURED


def test_a_later_start_keeps_what_an_earlier_one_did(notes: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, [0.0, 5.0, 0.0, 1.0, 0.0, 2.0], [900, 400, 500])
    with Costs(notes, "run", CPU).stage("calibrate"):
        pass
    again = Costs(Notebook(notes.path.parent, writes=True), "run", CPU)
    with again.stage("quantize"):
        pass
    with again.stage("calibrate"):
        pass
    # Done twice it counts once; the peak is the highest that was seen.
    assert again.to_dict(0.0)["stages"] == {
        "calibrate": {"seconds": 2.0, "peak_bytes": 900},
        "quantize": {"seconds": 1.0, "peak_bytes": 400},
    }
    assert Costs(notes, "another run", CPU).to_dict(0.0)["stages"] == {}


def test_a_stage_that_fails_is_not_noted(notes: Notebook) -> None:
    costs = Costs(notes, "run", CPU)
    with pytest.raises(RuntimeError), costs.stage("train"):
        raise RuntimeError
    assert costs.to_dict(1.0)["stages"] == {}


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    with Costs(Notebook(tmp_path, writes=False), "run", CPU).stage("train"):
        pass
    assert not (tmp_path / FILE_NAME).exists()
    with untimed("train"):
        pass


@pytest.mark.parametrize(
    "costs", [1, {"digest": 1}, {"stages": []}, {"stages": {"a": 1}}, {"stages": {"a": {"seconds": "x"}}}]
)
def test_notes_of_someone_else_are_ignored(notes: Notebook, costs: Any) -> None:
    notes.note_cost("run", "train", 1.0, 2)
    noted = json.loads(notes.path.read_text())["costs"]
    found = {**noted, **costs} if isinstance(costs, dict) else costs
    notes.path.write_text(json.dumps({"costs": found}))
    assert notes.costs("run") == {}
    notes.note_cost("run", "train", 3.0, None)
    assert notes.costs("run")["train"]["seconds"] == 3.0


def test_the_peak_of_a_process_is_what_it_has_used() -> None:
    before = peak_resident_bytes()
    assert before is not None
    block = bytearray(200_000_000)
    block[::4096] = b"x" * len(block[::4096])
    after = peak_resident_bytes()
    assert after is not None
    # A process that had used more before, in other tests, does not rise.
    assert after >= max(before, 200_000_000)


@pytest.mark.gpu
def test_the_peak_of_a_stage_on_a_gpu(notes: Notebook) -> None:
    device = torch.device("cuda")
    costs = Costs(notes, "run", device)
    with costs.stage("large"):
        block = torch.empty(2**26, dtype=torch.uint8, device=device)
        del block
    with costs.stage("small"):
        torch.empty(2**20, dtype=torch.uint8, device=device)
    found = costs.to_dict(0.0)
    assert found["memory"] == "gpu"
    assert found["stages"]["large"]["peak_bytes"] >= 2**26
    # Each stage has a peak of its own.
    assert found["stages"]["small"]["peak_bytes"] < found["stages"]["large"]["peak_bytes"] - 2**25
