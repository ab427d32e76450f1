"""wandb: one run over all starts, and no waiting for a network that is not there."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerState

from hqqplus.integrations import wandb as ours
from hqqplus.integrations.wandb import WandbRun, reachable, wandb_mode
from tests.wandb_server import KEY, WandbServer

ARGS = SimpleNamespace(to_dict=dict, run_name=None, output_dir="out", load_best_model_at_end=False)


@pytest.fixture(autouse=True)
def own_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """wandb as on a machine where nobody ever used it."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield running


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> str:
    """A server that is not there: host and port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{host}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return host


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, said: list[str]) -> Callable[..., WandbRun]:
    def run(**kwargs: Any) -> WandbRun:
        given = {"id": "abcd1234", "folder": tmp_path / "out", "mode": "offline", "say": said.append, **kwargs}
        given["folder"].mkdir(exist_ok=True)
        return WandbRun(**given)

    return run


def train(run: WandbRun, first: int, last: int, of: int) -> None:
    """What a Trainer calls, steps `first` to `last` of `of`."""
    state = TrainerState(global_step=first - 1, max_steps=of, is_world_process_zero=True)
    run.callback.on_train_begin(ARGS, state, None, model=None)
    for step in range(first, last + 1):
        state.global_step = step
        run.callback.on_log(ARGS, state, None, model=None, logs={"loss": 1 / step, "eval_perplexity": step * 1.5})
    run.callback.on_train_end(ARGS, state, None, model=None)


def offline_runs(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "wandb").glob("offline-run-*"))


# Offline -------------------------------------------------------------------------------------------------------------


def test_offline_leaves_a_folder_for_every_start_of_the_one_run(make: Callable[..., WandbRun], tmp_path: Path) -> None:
    begun: list[str] = []
    for first, last in ((1, 3), (3, 6)):
        run = make(started=begun.append)
        assert run.mode == "offline"
        train(run, first, last, of=6)
        run.finish()
    assert begun == ["abcd1234", "abcd1234"]
    folders = offline_runs(tmp_path / "out")
    assert len(folders) == 2
    assert all("-abcd1234" in name for name in folders)
    assert sys.modules["wandb"].run is None


def test_disabled_has_no_callback(make: Callable[..., WandbRun], tmp_path: Path) -> None:
    assert make(mode="disabled").callback is None
    assert not (tmp_path / "out" / "wandb").exists()


def test_a_run_of_the_callers_program_is_used_and_left_open(make: Callable[..., WandbRun], tmp_path: Path) -> None:
    import wandb

    theirs = wandb.init(id="theirs00", mode="offline", dir=str(tmp_path))
    run = make()
    train(run, 1, 2, of=2)
    run.finish()
    assert wandb.run is theirs
    assert run.id == "theirs00"
    assert offline_runs(tmp_path / "out") == []
    theirs.finish()


@pytest.mark.parametrize(
    ("variable", "asked", "expected"),
    [
        (None, None, "online"),
        (None, "offline", "offline"),
        ("disabled", "online", "disabled"),
        ("dryrun", "online", "offline"),
        ("run", "offline", "online"),
    ],
)
def test_the_users_mode_wins(
    variable: str | None, asked: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb_mode(asked) == expected


# Online --------------------------------------------------------------------------------------------------------------


def test_a_continued_run_goes_on_in_the_same_one(
    make: Callable[..., WandbRun], server: WandbServer, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for first, last in ((1, 3), (3, 5)):
        run = make(mode="online", project="p", name="n")
        assert run.mode == "online"
        train(run, first, last, of=5)
        run.finish()
    assert not said
    assert list(server.runs) == ["abcd1234"]
    assert (server.projects["abcd1234"], server.names["abcd1234"]) == ("p", "n")
    lines = server.runs["abcd1234"]
    # A step that was trained twice stands there twice, with the same values, so that it draws the same point.
    assert [line["train/global_step"] for line in lines] == [1, 2, 3, 3, 4, 5]
    assert [line["train/loss"] for line in lines] == [1, 1 / 2, 1 / 3, 1 / 3, 1 / 4, 1 / 5]
    assert [line["_step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    # The first start was not through: it counts as one that goes on later.
    assert server.preempted == {"abcd1234"}
    assert server.exits["abcd1234"] == [1, 0]
    assert not [path for path in server.paths if "otel" in path]


def test_a_failure_is_told_to_wandb(make: Callable[..., WandbRun], server: WandbServer) -> None:
    run = make(mode="online")
    train(run, 1, 2, of=2)
    run.finish(RuntimeError("out of memory"))
    assert server.exits["abcd1234"] == [1]
    assert not server.preempted
    assert server.projects["abcd1234"] == "hqqplus"


def test_the_users_variables_win(
    make: Callable[..., WandbRun], server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name, value in (("PROJECT", "theirs"), ("NAME", "their name"), ("DIR", str(tmp_path / "elsewhere"))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = make(mode="online", project="p", name="n")
    train(run, 1, 1, of=1)
    run.finish()
    assert (server.projects["abcd1234"], server.names["abcd1234"]) == ("theirs", "their name")
    assert list((tmp_path / "elsewhere" / "wandb").glob("run-*-abcd1234*"))


def test_a_network_that_fails_in_the_middle_holds_nothing_up(
    make: Callable[..., WandbRun], server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "FINISH_TIMEOUT", 2.0)
    run = make(mode="online")
    run.start()
    server.stop()
    train(run, 1, 3, of=3)
    run.finish()
    assert sys.modules["wandb"].run is None


# Without a network ---------------------------------------------------------------------------------------------------


def test_online_without_a_network_is_offline(
    make: Callable[..., WandbRun], closed: str, said: list[str], tmp_path: Path
) -> None:
    run = make(mode="online")
    assert run.mode == "offline"
    folder = tmp_path / "out" / "wandb" / "offline-run-*-abcd1234"
    assert said == [f"wandb: no connection to {closed}: logging offline; `wandb sync {folder}` later"]
    train(run, 1, 2, of=2)
    run.finish()
    assert len(offline_runs(tmp_path / "out")) == 1
    assert len(said) == 1


def test_without_a_key_nobody_is_asked_for_one(
    make: Callable[..., WandbRun], server: WandbServer, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    run = make(mode="online")
    assert run.mode == "offline"
    assert said[0].startswith(f"wandb: no API key for {server.url.removeprefix('http://')} (`wandb login`")
    assert not server.paths


def test_a_key_of_wandb_login_is_found(
    make: Callable[..., WandbRun], server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    host = server.url.removeprefix("http://")
    (tmp_path / "netrc").write_text(f'machine "{host}"\n  login user\n  password {KEY}\n')
    (tmp_path / "netrc").chmod(0o600)
    assert make(mode="online").mode == "online"


def test_a_server_that_refuses_the_run_is_done_without(
    make: Callable[..., WandbRun],
    server: WandbServer,
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make(mode="online")
    assert run.mode == "online"
    server.refuses = True
    monkeypatch.setattr(ours, "START_TIMEOUT", 2.0)
    train(run, 1, 2, of=2)
    run.finish()
    assert run.mode == "offline"
    assert len(said) == 1
    assert said[0].startswith("wandb: ")
    assert "logging offline; `wandb sync" in said[0]
    assert len(offline_runs(tmp_path / "out")) == 1


def test_a_wandb_that_breaks_costs_its_reports_alone(
    make: Callable[..., WandbRun], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    run = make()
    run.start()
    monkeypatch.setattr(wandb, "log", lambda *_: 1 / 0)
    train(run, 1, 5, of=5)
    run.finish()
    assert said == ["wandb: division by zero: nothing more is reported to it"]


def test_a_service_that_died_costs_its_reports_alone(make: Callable[..., WandbRun], said: list[str]) -> None:
    from wandb.sdk import wandb_setup

    run = make()
    run.start()
    connection: Any = wandb_setup.singleton().ensure_service()
    connection._proc._process.kill()
    connection._proc._process.wait()
    train(run, 1, 5, of=5)
    run.finish()
    assert said
    assert all(text.startswith("wandb: ") for text in said)


def test_reachable() -> None:
    with WandbServer() as server:
        assert reachable(server.url, 5)
        assert reachable(f"{server.url}/no/such/page", 5)
    assert not reachable(server.url, 5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert not reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2)
    assert not reachable("http://no.such.host.invalid", 5)
    assert not reachable("nonsense", 5)


def test_a_proxy_is_gone_through() -> None:
    with WandbServer() as proxy:
        assert reachable("http://only.behind.a.proxy.invalid", 5, {"http": proxy.url})
        assert proxy.paths == ["http://only.behind.a.proxy.invalid"]
