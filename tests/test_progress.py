"""Progress: a bar for people, plain lines for logs, nothing where nothing is wanted."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from hqqplus import progress
from hqqplus.progress import WorkProgress, clock, count


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_plain_line_every_so_often(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with WorkProgress(4_000_000, done=1_000_000) as bar:
        for _ in range(6):
            time.now += 5
            bar.advance(250_000, "model.layers.0.mlp.up_proj")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "43.8 % of 4 M weights, 50 k weights/s, 0:45 left\n"  # the million that was there says nothing of the pace
        "62.5 % of 4 M weights, 50 k weights/s, 0:30 left\n"
    )


def test_short_work_says_nothing(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with WorkProgress(100) as bar:
        time.now += 10
        bar.advance(100)
    assert capsys.readouterr() == ("", "")


def test_quiet_says_nothing_at_all(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with WorkProgress(100, quiet=True) as bar:
        bar.say("continuing")
        time.now += 100
        bar.advance(50)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(time: Clock) -> None:
    file = io.StringIO()
    bar = WorkProgress(4_000_000)
    bar._console = Console(file=file, force_terminal=True, width=100)
    with bar:
        time.now += 10
        bar.say("[goes] on")
        bar.advance(1_000_000, "model.layers.0.mlp.up_proj")
    text = file.getvalue()
    assert "\x1b[" in text
    assert "25%" in text
    assert "100 k weights/s, 0:30 left" in text
    assert "model.layers.0.mlp.up_proj" in text
    assert "[goes] on" in text


def test_an_error_takes_the_bar_away(time: Clock) -> None:
    file = io.StringIO()
    bar = WorkProgress(10)
    bar._console = Console(file=file, force_terminal=True)
    with pytest.raises(RuntimeError), bar:
        raise RuntimeError
    assert bar._bar.live.is_started is False


def test_nothing_to_do(capsys: pytest.CaptureFixture[str], time: Clock) -> None:
    with WorkProgress(0) as bar:
        time.now += 100
        bar.advance(0)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (12, "12"), (1234, "1.23 k"), (6.98e9, "6.98 G"), (1_500_000, "1.5 M")]
)
def test_count(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (750, "12:30"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# What is shown at all ------------------------------------------------------------------------------------------------


def test_output_settles_it_for_all_that_is_called(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with WorkProgress(100, unit="rows", what="working") as bar:
            time.now += 20
            bar.advance(50)
        progress.say("a step")
        progress.warn("a result")

    work()
    line = "working: 50.0 % of 100 rows, 2.5 rows/s, 0:20 left\n"
    assert capsys.readouterr() == ("hqqplus: a step\nhqqplus: a result\n", line)
    with progress.output(quiet=True):
        with progress.output():
            work()
        assert capsys.readouterr() == ("hqqplus: a result\n", "")
    with progress.output(as_json=True):
        work()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{line}hqqplus: a step\nhqqplus: a result\n"
    work()
    assert capsys.readouterr().out.startswith("hqqplus: a step")


def test_only_the_main_process_shows_any(
    time: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with WorkProgress(100) as bar:
        time.now += 20
        bar.advance(50)
    progress.say("a step")
    progress.warn("a result")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    progress.say("a step")
    assert capsys.readouterr().out == "hqqplus: a step\n"


def test_the_bars_of_libraries_are_for_terminals_and_come_back() -> None:
    import datasets
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    def shown() -> list[bool]:
        return [
            logging.is_progress_bar_enabled(),
            not datasets.are_progress_bars_disabled(),
            not hub.are_progress_bars_disabled(),
        ]

    before = shown()
    with progress.output():
        assert shown() == [False, False, False]
    assert shown() == before
    with pytest.raises(RuntimeError), progress.output():
        raise RuntimeError
    assert shown() == before


def test_one_bar_at_a_time(time: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "_console", lambda: Console(file=file, force_terminal=True, width=100))
    with WorkProgress(10, what="training") as outer:
        assert outer._bar.live.is_started
        with WorkProgress(10, what="perplexity") as inner:
            assert inner._bar.live.is_started
            assert not outer._bar.live.is_started
            outer.advance(1)
        assert not inner._bar.live.is_started
        assert outer._bar.live.is_started
    assert not outer._bar.live.is_started
    assert progress._at_work == []
    with pytest.raises(RuntimeError), WorkProgress(10) as outer, WorkProgress(10):
        raise RuntimeError
    assert progress._at_work == []
    assert not outer._bar.live.is_started


def test_what_is_printed_does_not_garble_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen, log = Terminal(), io.StringIO()
    monkeypatch.setattr(progress, "_console", lambda: Console(file=screen, force_terminal=True, width=100))
    for out in (screen, log):
        monkeypatch.setattr(sys, "stdout", out)
        with WorkProgress(10, what="training"):
            progress.say("a step")
        assert sys.stdout is out
    # On the terminal above the bar; to a file past it.
    assert screen.getvalue().count("hqqplus: a step\n") == 1
    assert log.getvalue() == "hqqplus: a step\n"


def test_logs_do_not_garble_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "_console", lambda: Console(stderr=True, force_terminal=True, width=100))
    log, handler = logging.getLogger("hqqplus.tests"), logging.StreamHandler()
    log.addHandler(handler)
    try:
        with WorkProgress(10, what="training"):
            assert handler.stream is not screen
            log.warning("mind this")
        assert handler.stream is screen
    finally:
        log.removeHandler(handler)
    # A line of its own: the bar was wiped before it, and is drawn below.
    assert re.search(r"(^|\x1b\[2K|\n)mind this *(\x1b\[0m)?\n", screen.getvalue())
