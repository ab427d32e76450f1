"""What every reader owes to every input: a result, or a `UserError` of one sentence a problem."""

from __future__ import annotations

import faulthandler
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hqqplus.errors import UserError

# Address space that reading one damaged file may take beyond what the process has. The inputs are a few kilobytes.
MEMORY_BYTES = 2**31
# A guard against hanging, no measure of speed: the slowest example takes a few seconds on a busy machine.
HANG_SECONDS = 900
_LONGEST_LINE = 6000


def run(examples: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """`check` on that many examples of `strategy`, with bounded memory, and a traceback should one of them hang."""

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(strategy)
    def each(example: Any) -> None:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__)
        try:
            check(example)
        finally:
            faulthandler.cancel_dump_traceback_later()

    with bounded_memory():
        each()


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Refuse this process more than `MEMORY_BYTES` beyond what it has mapped now."""
    limits, mapped = resource.getrlimit(resource.RLIMIT_AS), Path("/proc/self/statm")
    if not mapped.exists():  # not on Linux
        yield
        return
    pages = int(mapped.read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def judged(read: Callable[[], Any]) -> Any:
    """What `read` returns; None where it refuses its input as it should. Any other exception passes, and fails."""
    try:
        return read()
    except UserError as error:
        check_sentence(str(error))
        return None


def check_sentence(message: str) -> None:
    """A message that can be printed: lines with words, none of them endless, no traceback, no memory run out."""
    lines = message.split("\n")
    assert message.strip(), "an error without words"
    for line in lines:
        assert line.strip(), message
        assert len(line) <= _LONGEST_LINE, line[:300]
    assert "Traceback (most recent" not in message
    assert "MemoryError" not in message, message
    assert "allocate memory" not in message, message
    message.encode("utf-8", "backslashreplace")


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Relative path -> size and time of all files in `folder`."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        found[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns)
    return found
