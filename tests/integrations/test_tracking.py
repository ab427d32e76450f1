"""The log of JSON lines, TensorBoard, and trackers that are not installed."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hqqplus.errors import UserError
from hqqplus.integrations import tracking
from hqqplus.integrations.tracking import PACKAGES, JsonlLog, TensorBoard, log_line, require
from hqqplus.recipe import TRACKERS

THIRD = 1 / 3


def state_of(*history: Mapping[str, Any], step: int = 0, **kwargs: Any) -> TrainerState:
    return TrainerState(global_step=step, log_history=[dict(entry) for entry in history], **kwargs)


def as_saved(state: TrainerState, folder: Path) -> TrainerState:
    """As a later process reads it from a checkpoint."""
    state.save_to_json(str(folder / "trainer_state.json"))
    return TrainerState.load_from_json(str(folder / "trainer_state.json"))


def train(log: JsonlLog, state: TrainerState, last: int) -> None:
    """What a Trainer calls, up to step `last`, with an evaluation at every second one."""
    log.on_train_begin(None, state, None)
    for step in range(state.global_step + 1, last + 1):
        state.global_step, state.epoch = step, step / 7
        entries = [{"loss": THIRD * step, "kl": step, "learning_rate": 1e-4 / step}]
        entries += [{"eval_perplexity": math.exp(step)}] if step % 2 == 0 else []
        for entry in entries:
            logs = {**entry, "epoch": state.epoch}
            state.log_history.append({**logs, "step": step})
            log.on_log(None, state, None, logs=logs)


# Lines ---------------------------------------------------------------------------------------------------------------


def test_a_line_has_every_digit_in_an_order_of_its_own() -> None:
    line = log_line({"learning_rate": 1e-05, "loss": THIRD, "grad_norm": 0.1 + 0.2, "epoch": 0.5, "step": 3})
    assert line == (
        '{"step": 3, "epoch": 0.5, "loss": 0.3333333333333333, "grad_norm": 0.30000000000000004, '
        '"learning_rate": 1e-05}\n'
    )
    assert json.loads(line)["loss"] == THIRD


def test_a_number_that_is_none_is_null() -> None:
    entry = {"step": 1, "loss": math.nan, "grad_norm": math.inf}
    assert json.loads(log_line(entry)) == {"step": 1, "loss": None, "grad_norm": None}


def test_nothing_of_the_clock_is_in_a_line() -> None:
    timed = {"train_runtime": 3.2, "train_tokens_per_second": 7.0, "eval_runtime": 1.0, "eval_mem_cpu_peaked_delta": 9}
    assert log_line({"step": 2, "loss": 1.0, "num_input_tokens_seen": 64, **timed}) == log_line(
        {"step": 2, "loss": 1.0, "num_input_tokens_seen": 64}
    )
    assert log_line({"step": 9, "train_runtime": 3.2, "train_loss": 2.0, "total_flos": 1e9}) == ""


# The log -------------------------------------------------------------------------------------------------------------


def test_a_continued_log_is_that_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    train(JsonlLog(whole), state_of(), 9)

    state = state_of()
    log = JsonlLog(killed)
    train(log, state, 4)
    checkpoint = as_saved(state, tmp_path)
    train(log, state, 6)
    # Killed in the middle of a line, which the next start must not go on with; and a line before it was lost.
    written = killed.read_text().splitlines(keepends=True)
    killed.write_text("".join(written[1:]) + '{"step": 7, "epoch": 1.0, "lo')

    train(JsonlLog(killed), checkpoint, 9)
    assert killed.read_bytes() == whole.read_bytes()
    steps = [json.loads(line)["step"] for line in killed.read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9]


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    state = state_of()
    train(JsonlLog(tmp_path / "log.jsonl"), state, 1)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_a_run_that_starts_anew_has_a_log_of_its_own(tmp_path: Path) -> None:
    train(JsonlLog(tmp_path / "log.jsonl"), state_of(), 3)
    JsonlLog(tmp_path / "log.jsonl").on_train_begin(None, state_of(), None)
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_the_evaluation_that_begins_a_training_is_not_logged_again_when_it_continues(tmp_path: Path) -> None:
    state, log = state_of(step=4), JsonlLog(tmp_path / "log.jsonl")
    train(log, state, 4)
    for _ in range(2):
        log.on_log(None, state, None, logs={"eval_perplexity": 2.5})
    state.log_history = [{"step": 4, "eval_perplexity": 2.5}] * 2
    log.on_train_begin(None, state, None)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 4, "eval_perplexity": 2.5}\n'


def test_one_process_writes_for_all(tmp_path: Path) -> None:
    train(JsonlLog(tmp_path / "log.jsonl"), state_of(is_world_process_zero=False), 3)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_full_disk_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, state = JsonlLog(tmp_path / "log.jsonl"), state_of()
    train(log, state, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"^log: .*log\.jsonl: the disk is full"):
        train(log, state, 2)


# TensorBoard ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path: Path) -> Any:
    return SimpleNamespace(to_json_string=lambda: "{}", output_dir=str(tmp_path))


def board(folder: Path, state: TrainerState, last: int, arguments: Any, end: bool = True) -> TensorBoard:
    callback = TensorBoard(folder)
    callback.on_train_begin(arguments, state, None)
    for step in range(state.global_step + 1, last + 1):
        state.global_step = step
        callback.on_log(arguments, state, None, logs={"loss": THIRD * step})
    if end:
        callback.on_train_end(arguments, state, None)
    return callback


def drawn(folder: Path) -> list[int]:
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def test_tensorboard_draws_every_step_once(tmp_path: Path, arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    folder = tmp_path / "tensorboard"
    board(folder, state_of(), 6, arguments, end=False)
    board(folder, state_of(step=4), 9, arguments)
    assert drawn(folder) == list(range(1, 10))
    # Killed before its first checkpoint, a run starts anew.
    board(folder, state_of(), 3, arguments)
    assert drawn(folder) == [1, 2, 3]


def test_the_users_folder_goes_first(tmp_path: Path, arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "theirs"))
    board(tmp_path / "ours", state_of(), 2, arguments)
    assert drawn(tmp_path / "theirs") == [1, 2]
    assert not (tmp_path / "ours").exists()


# Trackers ------------------------------------------------------------------------------------------------------------


def test_every_tracker_has_a_package() -> None:
    assert set(PACKAGES) == set(TRACKERS) - {"none"}
    # Those of the installed transformers; a name of a later one is refused as unknown.
    assert set(INTEGRATION_TO_CALLBACK) <= set(PACKAGES)


def test_a_tracker_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None if "board" in name else object())
    require(["wandb"])
    with pytest.raises(UserError) as caught:
        require(["wandb", "tensorboard"])
    assert str(caught.value) == (
        "tracking.report_to: tensorboard needs a package that is not installed: pip install 'hqqplus[tensorboard]'"
    )


def test_a_tracker_in_a_package_that_is_missing_is_missing() -> None:
    if importlib.util.find_spec("azureml") is not None:
        pytest.skip("azureml is installed")
    with pytest.raises(UserError, match="azure_ml needs a package"):
        require(["azure_ml"])
