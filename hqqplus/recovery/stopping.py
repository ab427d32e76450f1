"""SIGTERM, SIGINT and SIGUSR1: what is being trained is saved at the next whole optimizer step, then the run ends.

Everything outside the training is either short or kept piece by piece, so there a signal ends the run at once. The
exit code is 128 + the signal's number, as a shell reports it of a process that the signal killed: 143, 130, 138.
Schedulers take that for an interruption, and may start the same command again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has. `signal` is the signal's number; the text says how to go on."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text or f"stopped by {signal.Signals(number).name}")
        self.signal = number

    @property
    def exit_code(self) -> int:
        return 128 + self.signal


class Stopper:
    """Takes the signals of a run.

    Attributes:
        requested: number of the signal that asked this process to stop; 0 while none did.
    """

    def __init__(self, processes: int = 1) -> None:
        self.requested = 0
        self._processes, self._patient, self._owner = processes, False, os.getpid()

    @contextmanager
    def listening(self) -> Iterator[Stopper]:
        """Take the signals within the block. Only the main thread of a process can; elsewhere this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_whole_steps(self) -> Iterator[None]:
        """Within the block a signal is only noted: who trains asks for `requested` where it can stop."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A worker that was forked off, of a data loader for one: it dies as it would have without us.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        # A launcher passes on what the terminal has sent already: with several processes, once more means nothing.
        again = self.requested == number == signal.SIGINT and self._processes == 1
        self.requested = self.requested or number
        if not self._patient or again:
            raise Interrupted(number)


def how_to_go_on(number: int, checkpoint: Any) -> str:
    """What is said when a run was stopped."""
    kept = f"{checkpoint} is complete" if checkpoint is not None else "no optimizer step was done yet"
    return f"stopped by {signal.Signals(number).name}: {kept}; the same command continues"
