"""A run that is killed or stopped anywhere, and continued by the same command, ends as one that never was: the same
bits in every file, but for times."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import EVERYTHING, Place, Runs, check_disk, differences, stamps
from tests.faults.server import ROOT, Kill, request_of

pytestmark = pytest.mark.slow

TRAINER = "hqqplus.integrations.trl:RecoveryTrainer"
# Two micro-batches make a step, five steps an epoch.
MICRO_BATCH = f"{TRAINER}.training_step"

STREAMED: dict[str, Any] = {"data__streaming": True, "data__shuffle_buffer": 8}
PLAIN: dict[str, Any] = {}
PACKED: dict[str, Any] = {
    "data__packing": True,
    "data__max_length": 192,
    "training__per_device_train_batch_size": 1,
    "training__optim": "paged_adamw_8bit",
}
EPOCHS: dict[str, Any] = {
    "training__max_steps": None,
    **{f"training__{name}_steps": None for name in ("save", "eval", "logging")},
    **{f"training__{name}_strategy": "epoch" for name in ("save", "eval", "logging")},
    "training__num_train_epochs": 2,
}
EVALUATED_AFTER_THE_CHECKPOINT: dict[str, Any] = {
    "training__max_steps": 10,
    "training__save_steps": 5,
    "training__eval_steps": None,
    "training__eval_strategy": "epoch",
}


def at(name: str, call: int = 1, after: bool = False, number: int = signal.SIGKILL) -> Kill:
    return Kill(at=name, call=call, after=after, signal=int(number))


def interrupt(runs: Runs, changes: dict[str, Any], kill: Kill, code: int) -> tuple[Place, str]:
    """A run that was interrupted, and what it printed."""
    place = runs.place(**changes)
    run = runs.start(place, kill)
    found = run.wait()
    assert found == code, f"exit code {found}\n{run.output}"
    check_disk(place)
    return place, run.output


def finish_as(runs: Runs, place: Place, changes: dict[str, Any]) -> str:
    """Let an interrupted run come through and compare it with an uninterrupted one; then start it once more."""
    output = runs.finish(place).output
    whole, _ = runs.reference(**changes)
    assert not (changed := differences(place, whole)), "\n".join([*changed, output])
    before = stamps(place)
    assert "already finished" in runs.finish(place).output
    assert stamps(place) == before
    return output


# Rarer, and alike to others: not in CI.
RARER = {
    "before the first step",
    "between training and report",
    "during calibration, at once",
    "in the last step",
    "in the last step of an epoch",
    "in the middle of an epoch that ends with an evaluation",
    "while it saves",
}


def cases(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.long if name in RARER else ()) for name in names]


KILLS = {
    "during the distillation cache": (EVERYTHING, at("hqqplus.recovery.teacher_cache:_Writer.note", 3), None),
    "during calibration": (EVERYTHING, at("hqqplus.calibration.store:SolutionFolder.add", 2), None),
    "during a checkpoint write": (PLAIN, Kill(saving=5), 3),
    "during evaluation": (PLAIN, at("hqqplus.evaluation.perplexity:_token_nll", 2), 3),
    "mid-epoch, in a step": (PLAIN, at(MICRO_BATCH, 8), 3),
    "after epoch 1": (PLAIN, at(MICRO_BATCH, 13, after=True), 6),
    "between training and report": (PLAIN, at("hqqplus.adapters:ship_adapter"), 8),
    "after the last step of an epoch": (
        EVALUATED_AFTER_THE_CHECKPOINT,
        at("hqqplus.recovery.checkpoints:publish", after=True),
        5,
    ),
    "with streaming data": (STREAMED, at(MICRO_BATCH, 14), 6),
    "with packing and the 8-bit optimizer": (PACKED, at(MICRO_BATCH, 14), 6),
}


@pytest.mark.parametrize("case", cases(KILLS))
def test_killed(runs: Runs, case: str) -> None:
    changes, kill, step = KILLS[case]
    place, _ = interrupt(runs, changes, kill, -signal.SIGKILL)
    assert place.newest == step
    output = finish_as(runs, place, changes)
    assert (f"continuing from {place.out / f'checkpoint-{step}'}" in output) == (step is not None)


STOPS = {
    # In the middle of gradient accumulation, at a step where an evaluation is due: it is made up for.
    "where an evaluation is due": (PLAIN, at(MICRO_BATCH, 7, True, signal.SIGTERM), 143, 4),
    "in the last step of an epoch": (PLAIN, at(MICRO_BATCH, 10, False, signal.SIGINT), 130, 5),
    "between two logs": (PLAIN, at(MICRO_BATCH, 13, False, signal.SIGUSR1), 138, 7),
    "in the last step of an epoch that ends with an evaluation": (
        EPOCHS,
        at(MICRO_BATCH, 9, True, signal.SIGTERM),
        143,
        5,
    ),
    "in the middle of an epoch that ends with an evaluation": (
        EPOCHS,
        at(MICRO_BATCH, 15, True, signal.SIGUSR1),
        138,
        8,
    ),
    "before the first step": (PLAIN, at(f"{TRAINER}.create_optimizer", 1, False, signal.SIGTERM), 143, 1),
    "while it evaluates": (PLAIN, at(f"{TRAINER}.measure", 1, False, signal.SIGINT), 130, 5),
    "while it saves": (PLAIN, at("hqqplus.recovery.checkpoints:publish", 1, False, signal.SIGTERM), 143, 4),
    "in the last step": (PLAIN, at(MICRO_BATCH, 16, False, signal.SIGTERM), 143, 8),
}


@pytest.mark.parametrize("case", cases(STOPS))
def test_stopped_at_a_whole_step(runs: Runs, case: str) -> None:
    changes, kill, code, step = STOPS[case]
    place, output = interrupt(runs, changes, kill, code)
    name = signal.Signals(kill.signal).name
    assert f"stopped by {name}: {place.out / f'checkpoint-{step}'} is complete" in output
    assert "Traceback" not in output
    assert place.newest == step
    assert f"continuing from {place.out / f'checkpoint-{step}'}" in finish_as(runs, place, changes)


# Outside the training a signal ends a run at once.
AT_ONCE = {
    "during calibration, at once": (
        EVERYTHING,
        at("hqqplus.calibration.store:SolutionFolder.add", 2, False, signal.SIGUSR1),
        138,
    ),
    "after the training": (PLAIN, at("hqqplus.adapters:ship_adapter", 1, False, signal.SIGTERM), 143),
}


@pytest.mark.parametrize("case", cases(AT_ONCE))
def test_stopped_at_once(runs: Runs, case: str) -> None:
    changes, kill, code = AT_ONCE[case]
    place, output = interrupt(runs, changes, kill, code)
    assert f"hqqplus: stopped by {signal.Signals(kill.signal).name}" in output
    assert "Traceback" not in output
    finish_as(runs, place, changes)


def both(runs: Runs, place: Place, kill: Kill | None = None) -> list[tuple[int, str]]:
    """Exit code and output of two processes of a run on the CPU (gloo); the second one gets the signal.

    They are told what torchrun tells its processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in (0, 1):
        environment = {
            "ACCELERATE_USE_CPU": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        started.append(runs.start(place, kill if rank == 1 else None, environment=environment))
    return [(run.wait(), run.output) for run in started]


def test_two_processes_stop_together(runs: Runs) -> None:
    changes = {"quantization__save_to": "BASE"}
    whole, place = runs.place(**changes), runs.place(**changes)
    for code, output in both(runs, whole):
        assert code == 0, output
    # The first micro-batch of step 4, in one of them.
    found = both(runs, place, at(MICRO_BATCH, 7, True, signal.SIGTERM))
    assert [code for code, _ in found] == [143, 143], "\n".join(output for _, output in found)
    assert f"stopped by SIGTERM: {place.out / 'checkpoint-4'} is complete" in found[1][1]
    assert place.newest == 4
    check_disk(place)
    for code, output in both(runs, place):
        assert code == 0, output
    assert not (changed := differences(place, whole)), "\n".join(changed)
    before = stamps(place)
    for (code, output), speaks in zip(both(runs, place), (True, False), strict=True):
        assert code == 0, output
        assert ("already finished" in output) == speaks
    assert stamps(place) == before


@pytest.mark.gpu
def test_killed_with_paged_state(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """On a GPU; there torch and cuBLAS have to be asked for operations that add in the same order each time."""
    runs = Runs(None, tmp_path, random_model("llama"))
    changes = {
        "model__attn_implementation": "eager",
        "training__optim": "paged_adamw_8bit",
        "training__full_determinism": True,
    }

    def start(place: Place, kill: Kill | None = None) -> tuple[int, str]:
        log = place.folder / f"{len(list(place.folder.glob('*.log'))):03}.log"
        environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        request = request_of([str(place.recipe)], place.folder, log, kill, environment)
        command = [sys.executable, "-m", "tests.faults.server", json.dumps(request)]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode, log.read_text()

    whole, place = runs.place(**changes), runs.place(**changes)
    for each, kill, wanted in ((whole, None, 0), (place, at(MICRO_BATCH, 8), -signal.SIGKILL), (place, None, 0)):
        code, output = start(each, kill)
        assert code == wanted, output
        check_disk(each)
    assert "continuing from" in output
    assert not (changed := differences(place, whole)), "\n".join(changed)
