"""Rows of messages, so that the loss is on what the assistant says, where the recipe leaves it open.

Where the chat template marks the assistant's tokens, they are what is trained on. Where it does not, nothing tells
them from others but their place: then the last thing that the assistant says is the completion, all before it the
prompt. `training.assistant_only_loss: false` trains on every token of a conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hqqplus.data_stream import PLACE, StreamFault
from hqqplus.errors import UserError
from hqqplus.integrations.chat_templates import marks_assistant
from hqqplus.recovery.streamed import StreamedRows
from hqqplus.recovery.supervision import MaskedRows

_SETTING = "assistant_only_loss"
_WAY_OUT = "Mend the rows, or give data.masked_rows: drop to leave such rows out"


def answers_only(
    rows: Any, tokenizer: Any, settings: Mapping[str, Any], policy: MaskedRows, say: Callable[[str], None]
) -> tuple[Any, dict[str, Any]]:
    """`rows` and the settings of the trainer, changed as said above; rows of another form as they are.

    Args:
        rows: as `setup.RunData` has them: a data set, or `StreamedRows`.
        policy: what becomes of rows in which the assistant answers nothing.

    Raises:
        UserError: for such a row, or if the tokenizer has no chat template.
    """
    head = rows.head if isinstance(rows, StreamedRows) else rows
    if "messages" not in head.column_names:
        return rows, dict(settings)
    if not tokenizer.chat_template:
        raise UserError(
            "data: the rows are messages, but the tokenizer has no chat template; use a model that has one (mostly "
            "those called Instruct or Chat), or give training.chat_template_path"
        )
    if _SETTING in settings:
        return rows, dict(settings)
    if marks_assistant(tokenizer):
        return rows, {**settings, _SETTING: True}
    say(
        f"training.{_SETTING}: the chat template does not mark what the assistant says: of each conversation the loss "
        "is on the assistant's last turn alone (false: on every token)"
    )
    split = {"function": _split, "remove_columns": ["messages"]}
    if isinstance(rows, StreamedRows):
        stream = rows.rows.map(**split).filter(_Answered(policy))
        return replace(rows, rows=stream, head=_answered(head.map(**split), policy, say)), dict(settings)
    return _answered(rows.map(**split), policy, say), dict(settings)


def _split(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = list(row["messages"] or [])
    last = max((place for place, one in enumerate(messages) if one["role"] == "assistant"), default=0)
    return {"prompt": messages[:last], "completion": messages[last : last + 1] if last else []}


def _answered(rows: Any, policy: MaskedRows, say: Callable[[str], None]) -> Any:
    kept = [number for number, answer in enumerate(rows["completion"]) if answer]
    if len(kept) == len(rows):
        return rows
    missing = len(rows) - len(kept)
    if policy == "refuse" or not kept:
        number = next(iter(set(range(len(rows))) - set(kept)))
        raise UserError(
            f"data: in {missing:,} of {len(rows):,} training rows the assistant answers nothing, the first is row "
            f"{number + 1}. {_WAY_OUT}"
        )
    say(f"data.masked_rows: in {missing:,} of {len(rows):,} training rows the assistant answers nothing: left out")
    return rows.select(kept)


class _Answered:
    """The same for a stream, row by row."""

    def __init__(self, policy: MaskedRows) -> None:
        self.policy = policy

    def __call__(self, row: Mapping[str, Any]) -> bool:
        if not row["completion"] and self.policy == "refuse":
            raise StreamFault(f"data: in row {row[PLACE] + 1} of the stream the assistant answers nothing. {_WAY_OUT}")
        return bool(row["completion"])
