"""What one process finds out for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hqqplus.errors import UserError

T = TypeVar("T")


def from_main(state: Any, find: Callable[[], T]) -> T:
    """`find()`, called by the main process alone and handed to the others; what it refuses, all of them refuse.

    Args:
        state: `accelerate.PartialState`.

    Raises:
        UserError: in every process, if it was raised in the main one.
    """
    if state.num_processes == 1:
        return find()
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [None, None]
    if state.is_main_process:
        try:
            answer = [find(), None]
        except UserError as error:
            answer = [None, str(error)]
        except BaseException as error:
            # Or the others would wait until the time limit of the process group.
            broadcast_object_list([None, f"{type(error).__name__} in the main process: {error}"])
            raise
    broadcast_object_list(answer)
    found, refusal = answer
    if refusal is not None:
        raise UserError(refusal)
    return found
