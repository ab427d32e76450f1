"""Signals: what takes them, and what a run that is told to stop leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hqqplus.errors import UserError
from hqqplus.integrations.safekeeping import Watch
from hqqplus.recipe import Recipe
from hqqplus.recovery.checkpoints import read_manifest
from hqqplus.recovery.stopping import SIGNALS, Interrupted, Stopper, how_to_go_on


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_the_training_a_signal_ends_the_run_at_once(number: int) -> None:
    before = signal.getsignal(number)
    with Stopper().listening(), pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == 128 + number
    assert str(caught.value) == f"stopped by {signal.Signals(number).name}"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_training_a_signal_is_noted(number: int) -> None:
    with Stopper().listening() as stopper:
        with stopper.at_whole_steps():
            assert stopper.requested == 0
            os.kill(os.getpid(), number)
            assert stopper.requested == number
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stopper.requested == number, "the first one is what stopped it"
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), number)


def test_ctrl_c_twice_ends_one_process_but_not_one_of_several() -> None:
    with Stopper().listening() as stopper, stopper.at_whole_steps():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
    # A launcher sends it once more than the terminal has.
    with Stopper(processes=2).listening() as stopper, stopper.at_whole_steps():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopper.requested == signal.SIGINT


def test_a_forked_worker_dies_of_it_as_ever() -> None:
    with Stopper().listening() as stopper, stopper.at_whole_steps():
        ready, is_ready = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(is_ready, b"x")
            time.sleep(600)
            os._exit(0)
        os.read(ready, 1)  # a signal that comes while the child is set up is lost
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert stopper.requested == 0


def test_in_another_thread_nothing_is_touched() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Stopper().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_what_is_said() -> None:
    assert how_to_go_on(signal.SIGTERM, "out/checkpoint-4") == (
        "stopped by SIGTERM: out/checkpoint-4 is complete; the same command continues"
    )
    assert "no optimizer step was done yet" in how_to_go_on(signal.SIGINT, None)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("entry", ["train", "cli"])
def test_both_entries_exit_with_what_a_scheduler_understands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    entry: str,
) -> None:
    from hqqplus import cli, train

    def stopped(*args: Any, **kwargs: Any) -> None:
        raise Interrupted(number, how_to_go_on(number, "out/checkpoint-4"))

    monkeypatch.setattr(train, "run", stopped)
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name_or_path: a}\ndata: {path_or_name: b}\noutput_dir: out\n")
    if entry == "train":
        code = train.main([str(path)])
        said = capsys.readouterr().err
    else:
        result = CliRunner().invoke(cli.app, ["train", str(path)])
        code, said = result.exit_code, result.stderr
    assert code == 128 + number
    name = signal.Signals(number).name
    assert said == f"hqqplus: stopped by {name}: out/checkpoint-4 is complete; the same command continues\n"


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(random_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    rows = tmp_path / "rows.jsonl"
    texts = [f"{i} is the number that comes before {i + 1}, and {i - 1} before it" for i in range(60)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(output: str, **training: Any) -> Recipe:
        settings = {
            "max_steps": 10,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 2e-3,
            "logging_steps": 4,
            "save_steps": 4,
            "eval_steps": 3,
            **training,
        }
        return Recipe.model_validate(
            {
                "model": {"name_or_path": str(random_model("llama")), "dtype": "float32"},
                "adapter": {"r": 2, "lora_dropout": 0.1, "init": "default"},
                "data": {"path_or_name": str(rows), "max_length": 32, "packing": False},
                "training": settings,
                "evaluation": {"max_tokens": 300, "parent": False},
                "output_dir": str(tmp_path / output),
            }
        )

    return make


def signalled(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of optimizer step `step`, between its two micro-batches."""
    saw, seen = Watch.saw, []

    def first(self: Watch, *args: Any) -> None:
        saw(self, *args)
        seen.append(1)
        if len(seen) == 2 * step - 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Watch, "saw", first)


def state_of(recipe: Recipe, step: int) -> dict[str, Any]:
    folder = Path(recipe.output_dir) / f"checkpoint-{step}"
    read_manifest(folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return {
        "log": state["log_history"],
        "adapter": (folder / "adapter_model.safetensors").read_bytes(),
        "optimizer": {key: {name: v.tolist() for name, v in entry.items()} for key, entry in optimizer.items()},
        "sums": json.loads((folder / "hqqplus_log_0.json").read_text()),
    }


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_that_was_not(
    make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hqqplus.train import main, run

    whole = make("whole")
    report = run(whole)
    expected = state_of(whole, 10)
    stopped = make("stopped")
    # In the middle between two log entries and two checkpoints, then where an evaluation is due.
    for step, history in ((5, [3, 4]), (6, [3, 4])):
        with monkeypatch.context() as patch:
            done = 0 if step == 5 else 5
            signalled(patch, step - done)
            with pytest.raises(Interrupted, match=f"checkpoint-{step} is complete; the same command continues"):
                run(stopped)
        log = state_of(stopped, step)["log"]
        assert [entry["step"] for entry in log] == history
    assert "continuing from" in capsys.readouterr().out
    run(stopped)
    assert state_of(stopped, 10) == expected
    assert [entry["step"] for entry in expected["log"] if "eval_loss" in entry] == [3, 6, 9, 10]
    assert all("entropy" in entry for entry in expected["log"] if "loss" in entry)
    assert not any("entropy" in entry for entry in expected["log"] if "eval_loss" in entry)
    output = Path(stopped.output_dir)
    assert sorted(path.name for path in output.glob("*checkpoint*")) == ["checkpoint-10", "checkpoint-8"]
    # A run that is through is left alone, and says so.
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    capsys.readouterr()
    again = run(stopped)
    assert capsys.readouterr().out.startswith("hqqplus: already finished: adapter in ")
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert (again.ppl_recovered, again.loss_curve) == (report.ppl_recovered, report.loss_curve)
    assert main is sys.modules["hqqplus.train"].main


@pytest.mark.slow
def test_a_loss_that_is_no_number_halts_the_run(make: Callable[..., Recipe]) -> None:
    from hqqplus.train import run

    recipe = make("diverged", learning_rate=1e30, max_grad_norm=0.0, save_steps=1, warmup_steps=0, eval_steps=100)
    with pytest.raises(UserError) as caught:
        run(recipe)
    text = str(caught.value)
    named = r"in the batch of rows \d+(, \d+)* \(row \d+ of 57: '"
    assert re.match(rf"step 2: the loss \(nan\) is not finite {named}", text)
    assert f"the last good checkpoint is {Path(recipe.output_dir) / 'checkpoint-1'}" in text
    assert sorted(path.name for path in Path(recipe.output_dir).glob("*checkpoint*")) == ["checkpoint-1"]


@pytest.mark.slow
def test_a_gradient_that_is_no_number_halts_the_run_before_it_is_used(
    make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hqqplus.train import run

    saw, steps = Watch.saw, []

    def poison(self: Watch, *args: Any) -> None:
        saw(self, *args)
        steps.append(1)
        if len(steps) == 2 * 6:
            gradient = next(p.grad for p in self.trainer.model.parameters() if p.grad is not None)
            gradient.view(-1)[-1] = torch.inf

    monkeypatch.setattr(Watch, "saw", poison)
    recipe = make("poisoned")
    with pytest.raises(UserError, match=r"^step 6: a gradient is not finite.*checkpoint-4, and nothing was written"):
        run(recipe)


def test_a_folder_belongs_to_one_run_at_a_time(make: Callable[..., Recipe]) -> None:
    from hqqplus.files import locked_folder
    from hqqplus.train import run

    recipe = make("held")
    output = Path(recipe.output_dir)
    output.mkdir()
    with locked_folder(output, "test"), pytest.raises(UserError, match=r"^output_dir: .*held: another process is at"):
        run(recipe)
    assert list(output.iterdir()) == []
