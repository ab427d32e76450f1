"""What a run reports, over all of its starts; and that it reports nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hqqplus.errors import UserError
from hqqplus.integrations import tracking as integration
from hqqplus.integrations.tracking import JsonlLog, TensorBoard
from hqqplus.integrations.wandb import GuardedWandb
from hqqplus.recipe import Recipe
from hqqplus.recovery.tracking import IDS, LOG, Tracking, reported_by_transformers, run_id, trackers
from tests.conftest import ROOT

WORDS = ("the", "of", "a", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))

    def recipe(seed: int = 0, **tracking: Any) -> Recipe:
        sections = {"model": {"name_or_path": "m"}, "data": {"path_or_name": "d"}, "tracking": tracking}
        return Recipe.model_validate({**sections, "output_dir": str(tmp_path / "out"), "seed": seed})

    return recipe


def kinds(tracked: Tracking) -> list[type]:
    return [type(callback) for callback in tracked.callbacks]


# What is reported to -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report_to", "named", "left"),
    [
        ("none", [], ["none"]),
        ("wandb", ["wandb"], ["none"]),
        (["wandb", "mlflow", "tensorboard"], ["wandb", "mlflow", "tensorboard"], ["mlflow"]),
    ],
)
def test_transformers_makes_the_callbacks_that_are_not_ours(
    make: Callable[..., Recipe], report_to: Any, named: list[str], left: list[str]
) -> None:
    recipe = make(report_to=report_to)
    assert trackers(recipe) == named
    assert reported_by_transformers(recipe) == left


def test_the_log_is_always_written_and_nothing_else_is_asked_for(make: Callable[..., Recipe]) -> None:
    assert kinds(Tracking(make(), None, print)) == [JsonlLog]


def test_the_main_process_reports_for_all(make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "require", lambda _: None)
    recipe = make(report_to=["wandb"], mode="offline")
    assert kinds(Tracking(recipe, None, print)) == [JsonlLog, GuardedWandb]
    others = Tracking(recipe, None, print, main=False)
    assert (others.callbacks, others.wandb) == ([], None)


def test_tensorboard_is_in_the_output_folder(make: Callable[..., Recipe]) -> None:
    pytest.importorskip("tensorboard")
    assert kinds(Tracking(make(report_to="tensorboard"), None, print)) == [JsonlLog, TensorBoard]


def test_disabled_is_none(make: Callable[..., Recipe], tmp_path: Path) -> None:
    tracked = Tracking(make(report_to="wandb", mode="disabled"), None, print)
    tracked.save(tmp_path)
    assert kinds(tracked) == [JsonlLog]
    assert not (tmp_path / IDS).exists()


def test_a_missing_package_is_said_in_every_process(
    make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration, "_is_installed", lambda name: False)
    for main in (True, False):
        with pytest.raises(UserError, match=r"^tracking\.report_to: tensorboard needs a package"):
            Tracking(make(report_to="tensorboard"), None, print, main)


def test_settings_that_wandb_refuses_cost_its_reports_alone(
    make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "soon")
    said: list[str] = []
    assert kinds(Tracking(make(report_to="wandb"), None, said.append)) == [JsonlLog]
    assert len(said) == 1
    assert said[0].endswith(": nothing is reported to it")
    monkeypatch.undo()
    wandb.teardown()


# The id --------------------------------------------------------------------------------------------------------------


def test_the_id_is_kept_in_the_checkpoint(make: Callable[..., Recipe], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    first = Tracking(make(report_to="wandb", mode="offline"), None, print)
    assert first.wandb is not None
    first.save(checkpoint)
    # In another folder, on another machine: it is the checkpoint that is continued.
    second = Tracking(make(report_to="wandb", mode="offline"), checkpoint, print)
    assert second.wandb is not None
    assert second.wandb.id == first.wandb.id
    assert len(first.wandb.id) == 8
    assert Tracking(make(report_to="wandb", mode="offline"), None, print).wandb.id != first.wandb.id


def test_a_start_that_had_no_checkpoint_yet_is_continued_too(tmp_path: Path) -> None:
    (tmp_path / IDS).write_text(json.dumps({"wandb": "abcd1234", "recipe_digest": "same"}))
    assert run_id(tmp_path, None, "same") == "abcd1234"
    assert run_id(tmp_path, None, "another") != "abcd1234"


@pytest.mark.parametrize("damaged", ["", "[]", '{"wandb": 3}', '{"wandb": ""}', '{"wandb'])
def test_a_damaged_id_is_replaced(tmp_path: Path, damaged: str) -> None:
    (tmp_path / IDS).write_text(damaged)
    assert run_id(tmp_path, tmp_path, "d").isalnum()


def test_the_users_id_goes_first(make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "theirs")
    tracked = Tracking(make(report_to="wandb", mode="offline"), None, print)
    assert tracked.wandb is not None
    assert tracked.wandb.id == "theirs"


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(random_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    rows = [{"text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 16))} for i in range(1, 40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def recipe(name: str, **tracking: Any) -> Path:
        values = {
            "model": {"name_or_path": str(random_model("llama"))},
            "adapter": {"r": 4, "lora_dropout": 0.1},
            "data": {"path_or_name": str(tmp_path / "train.jsonl"), "max_length": 64},
            "training": {
                "max_steps": 16,
                "save_steps": 4,
                "eval_steps": 4,
                # Not a divisor of save_steps: a mean that spans a checkpoint has to come out the same.
                "logging_steps": 3,
                "per_device_train_batch_size": 2,
            },
            "evaluation": {"max_tokens": 300, "parent": False},
            "tracking": tracking,
            "output_dir": str(tmp_path / name),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return recipe


def start(recipe: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-m", "hqqplus.train", str(recipe)]
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)


@pytest.mark.slow
def test_killed_and_continued_is_one_run_in_every_report(write: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    reports = {"report_to": ["wandb", "tensorboard"], "mode": "offline"}
    process = start(write("whole"))
    output, _ = process.communicate()
    assert process.returncode == 0, output

    recipe, folder = write("killed", **reports), tmp_path / "killed"
    process = start(recipe)
    while not (folder / "checkpoint-8").is_dir():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = json.loads((folder / "checkpoint-8" / IDS).read_text())["wandb"]
    with (folder / LOG).open("a") as log:
        log.write('{"step": 15, "epoch": 0.7, "lo')
    process = start(recipe)
    output, _ = process.communicate()
    assert process.returncode == 0, output

    # To the byte, though the one run was also reported to others.
    assert (folder / LOG).read_bytes() == (tmp_path / "whole" / LOG).read_bytes()
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12, 15]
    assert [line["step"] for line in lines if "eval_perplexity" in line] == [4, 8, 12, 16]
    # Two starts, one run.
    folders = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(path.name.endswith(f"-{kept}") for path in folders)
    assert json.loads((folder / "checkpoint-16" / IDS).read_text())["wandb"] == kept
    # Every step is drawn once, with the value of the log.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    drawn = {event.step: event.value for event in events.Scalars("train/loss")}
    assert drawn == pytest.approx({line["step"]: line["loss"] for line in lines if "loss" in line})
    assert len(events.Scalars("train/loss")) == len(drawn)


WITHOUT_SOCKETS = """
import os, socket, sys

# Nobody is told to stay offline: with everything on this machine there is nothing to ask for, and nobody to tell.
for name in [name for name in os.environ if name.startswith(("HF_", "WANDB_"))]:
    del os.environ[name]

def refuse(*args, **kwargs):
    # At once: an exception could be caught, or end a thread alone.
    print(f"a connection was tried: {args}", file=sys.stderr, flush=True)
    os._exit(3)

def local(address):
    return not isinstance(address, tuple) or address[0] in ("localhost", "127.0.0.1", "::1")

for name in ("connect", "connect_ex", "sendto"):
    def guarded(self, *args, made=getattr(socket.socket, name)):
        return made(self, *args) if local(args[-1]) else refuse(self, *args)
    setattr(socket.socket, name, guarded)

def resolve(host, *args, made=socket.getaddrinfo, **kwargs):
    return made(host, *args, **kwargs) if host in (None, "localhost", "127.0.0.1", "::1") else refuse(None, host)

socket.getaddrinfo = resolve
socket.gethostbyname = lambda host: refuse(None, host)

if sys.argv[1] == "try":
    import urllib.request
    urllib.request.urlopen("http://example.com")

from hqqplus.train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_reports_to_nobody_connects_to_nobody(
    write: Callable[..., Path], run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run_python("-c", WITHOUT_SOCKETS, str(write("alone")))
    tried = run_python("-c", WITHOUT_SOCKETS, "try", check=False)
    assert tried.returncode == 3
    assert "a connection was tried" in tried.stderr
