"""How far a long piece of work is, on stderr: a bar where a person looks on, else a plain line now and then."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

_LINE_SECONDS = 15.0


class WorkProgress:
    """Counts units of work: `with WorkProgress(total) as progress: ...; progress.advance(1000, "the next layer")`.

    Weights rather than layers, tokens rather than rows: layers differ a hundredfold in size and so does the time that
    they take; weights do not.

    Args:
        total: how many there are.
        done: how many of them were done by an earlier start.
        quiet: show nothing.
        unit: what is counted.
        line_seconds: time between two lines, where there is no bar.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        quiet: bool = False,
        unit: str = "weights",
        line_seconds: float = _LINE_SECONDS,
    ) -> None:
        self._total, self._first, self._done = total, done, done
        self._unit, self._line_seconds = unit, line_seconds
        self._started = self._shown = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._console: Any = None
        if not quiet:
            from rich.console import Console

            self._console = Console(stderr=True, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._console is not None and self._console.is_terminal and self._done < self._total:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            # Rate and time left are of all that was done here: layers come in too few pieces for a moving window.
            self._bar = Progress(
                BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[pace]}  {task.description}"),
                console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=self._total, completed=self._done, pace="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False)

    def advance(self, units: int, name: str = "") -> None:
        """So many further units are done; `name` is what was just worked on."""
        self._done += units
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=name, pace=self.pace())
        elif units and time.monotonic() - self._shown >= self._line_seconds:
            self._shown = time.monotonic()
            share = 100 * self._done / max(self._total, 1)
            self.say(f"{share:.1f} % of {count(self._total)} {self._unit}, {self.pace()}")

    def pace(self) -> str:
        """`1.2 M weights/s, 3:20 left`."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self._done - self._first) / seconds
        if rate <= 0:
            return ""
        return f"{count(rate)} {self._unit}/s, {clock((self._total - self._done) / rate)} left"


def count(number: float) -> str:
    """A large number as people read it: 6.98 G."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
