"""Forms of rows that other projects have made common, turned into those that are trained on.

alpaca: the columns instruction, output and, mostly, input. The loss is on the output alone. Where the tokenizer has a
chat template, the user's turn is the instruction, an empty line, the input; else the prompt is made by `TEMPLATE`.

sharegpt: a column of conversations, lists of `{"from": "human", "value": "..."}`, which become messages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hqqplus.errors import UserError

if TYPE_CHECKING:
    from datasets import Features

INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"
"""The columns of alpaca; the second may be missing."""
TEMPLATE = "Task:\n{instruction}\n\nGiven:\n{input}\n\nAnswer:\n"
"""The prompt of an alpaca row for a tokenizer without a chat template. A row without input has no part of it that
mentions `{input}`: parts are separated by empty lines."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Who speaks in a conversation of sharegpt -> the role of the message."""

_PLACEHOLDER = re.compile(r"\{(instruction|input)\}")


def prompt_problem(template: str) -> str | None:
    """What is wrong with a template for the prompt of alpaca rows; None where nothing is."""
    if "{instruction}" not in template:
        return "{instruction} must stand in it, where the row's instruction goes"
    if any("{instruction}" in part and "{input}" in part for part in template.split("\n\n")):
        return "{input} must stand in a part of its own, between empty lines: it is left out where a row has no input"
    return None


def alpaca_prompt(template: str, instruction: str, given: str) -> str:
    """`template` filled in; without the parts that mention `{input}` where `given` is blank."""
    if not given.strip():
        template = "\n\n".join(part for part in template.split("\n\n") if "{input}" not in part)
    values = {"instruction": instruction, "input": given}
    # At once: what a row says may look like a placeholder.
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)


@dataclass(frozen=True)
class Alpaca:
    """A row of alpaca -> prompt and completion; messages, unless there is a `template` for the prompt.

    A row without instruction, input and output is None or empty, and left out like all such rows.
    """

    template: str | None

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        instruction, given, output = (str(row.get(name) or "") for name in (INSTRUCTION, INPUT, OUTPUT))
        empty = not (instruction.strip() or given.strip()) or not output.strip()
        if self.template is not None:
            prompt = None if empty else alpaca_prompt(self.template, instruction, given)
            return {"prompt": prompt, "completion": None if empty else output}
        asked = "\n\n".join(part for part in (instruction, given) if part.strip())
        return {
            "prompt": [] if empty else [{"role": "user", "content": asked}],
            "completion": [] if empty else [{"role": "assistant", "content": output}],
        }

    @property
    def features(self) -> Features:
        from datasets import Features, Value

        kind = _messages() if self.template is None else Value("string")
        return Features({"prompt": kind, "completion": kind})


@dataclass(frozen=True)
class ShareGPT:
    """A row with a conversation in `column` -> messages.

    Raises:
        UserError: when called with a row whose conversation is none; the message starts with `where`, and names the
            row and the turn.
    """

    column: str
    where: str

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        turns = row.get(self.column)
        if turns is None or turns == []:
            return {"messages": []}  # left out, like all empty rows
        head = f"{self.where}: row {number + 1}: column '{self.column}'"
        if not isinstance(turns, list):
            raise UserError(f'{head} must hold a list of turns {{"from": ..., "value": ...}}')
        messages = [_message(turn, f"{head}, turn {place}") for place, turn in enumerate(turns, start=1)]
        for place, message in enumerate(messages[1:], start=2):
            if message["role"] == "system":
                raise UserError(f"{head}, turn {place}: a system turn can only be the first one")
        if all(message["role"] != "assistant" for message in messages):
            raise UserError(f"{head}: in none of its {len(messages)} turns speaks gpt or assistant")
        return {"messages": messages}

    @property
    def features(self) -> Features:
        from datasets import Features

        return Features({"messages": _messages()})


def _message(turn: Any, head: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise UserError(f'{head}: it must be {{"from": ..., "value": ...}}')
    # Some files have the names that messages have.
    speaker = turn.get("from") if turn.get("from") is not None else turn.get("role")
    said = turn.get("value") if turn.get("value") is not None else turn.get("content")
    if not isinstance(speaker, str):
        there = ", ".join(f"'{name}'" for name, value in turn.items() if value is not None) or "nothing"
        raise UserError(f"{head}: it does not say who speaks ('from'); it has {there}")
    if speaker not in ROLES:
        raise UserError(f"{head}: {_short(speaker)!r} speaks; allowed are {', '.join(ROLES)}")
    if not isinstance(said, str):
        raise UserError(f"{head}: it has no text ('value')")
    return {"role": ROLES[speaker], "content": said}


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _messages() -> Any:
    from datasets import List, Value

    return List({"role": Value("string"), "content": Value("string")})
