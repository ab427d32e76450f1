"""Work shared out to threads, each of which has torch for itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_threads(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """`work` done for each of `items` on a CPU, by as many threads as torch would use; without gradients.

    Threads that share each of thousands of small operations spend their time waiting for one another, and on a machine
    with other work for a thread that is not running at all; threads with an item each do not. Results are to be new
    tensors: those of inference mode may be written by their own thread only.
    """
    own = torch.get_num_threads()
    threads = min(own, len(items))
    with torch.no_grad():
        if threads < 2:
            return [work(item) for item in items]

        @torch.no_grad()
        def alone(item: _Item) -> _Result:
            return work(item)

        try:
            # What a new thread sets for itself is also what threads after it begin with: it is set back below.
            with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
                return list(pool.map(alone, items))
        finally:
            torch.set_num_threads(own)
