"""Progress: a bar for people, plain lines for logs, nothing where nothing is wanted."""

from __future__ import annotations

import io

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
