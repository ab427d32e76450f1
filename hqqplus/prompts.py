"""Prompts from a file, and what was generated to a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqqplus.errors import UserError
from hqqplus.files import check_output, full_disk, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What `generate` adds to a row.
RESULT_KEYS = ("generated", "finish_reason", "generated_tokens")


@dataclass(frozen=True)
class Prompt:
    """One prompt: a text, or the messages of a chat."""

    row: Mapping[str, Any]
    """All that its line holds."""
    where: str
    """`prompts.jsonl:3`."""

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Its tokens: of a text with what the tokenizer puts around it, of messages by the chat template, up to where
        the assistant speaks.

        Raises:
            UserError: naming its line, if there are no tokens, no chat template, or the template refuses the messages.
        """
        if "prompt" in self.row:
            ids = list(tokenizer(self.row["prompt"])["input_ids"])
        else:
            ids = encode_messages(tokenizer, self.row["messages"], self.where)
        if not ids:
            raise UserError(f"{self.where}: an empty prompt needs a tokenizer that puts BOS in front; write some text")
        return ids


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str
) -> list[int]:
    """The tokens of a chat by the tokenizer's template, up to where the assistant speaks.

    Raises:
        UserError: without a template, or if it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: the tokenizer has no chat template: name one by --chat-template FILE, or continue plain text"
        )
    try:
        chat: Any = [dict(message) for message in messages]
        encoded: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(encoded["input_ids"])
    except Exception as error:  # a template raises whatever its author and jinja2 do
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: the chat template refuses these messages: {said}") from error


def use_template(tokenizer: PreTrainedTokenizerBase, path: str | Path | None) -> None:
    """Have the tokenizer use the chat template (Jinja) in file `path`; None leaves its own.

    Raises:
        UserError: if the file cannot be read, or is no template.
    """
    if path is None:
        return
    from jinja2 import TemplateError, TemplateSyntaxError

    text = _read(Path(path), "--chat-template")
    if not text.strip():
        raise UserError(f"--chat-template: {path}: the file is empty")
    tokenizer.chat_template = text
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(f"--chat-template: {path}:{error.lineno}: {error.message}") from None
    except (TemplateError, TypeError, ValueError, LookupError):
        pass  # it may ask for more than one message of a user


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts in a file: a line a prompt in `.txt`, `{"prompt": ...}` or `{"messages": [...]}` in `.jsonl`.

    Blank lines are left out. What else a line of JSON holds stays with it.

    Raises:
        UserError: naming file and line.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--file: {path}: the name must end in .txt (a line a prompt) or .jsonl")
    lines = _read(path, "--file").split("\n")
    prompts = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = {"prompt": line} if path.suffix == ".txt" else _row(line, where)
        prompts.append(Prompt(row, where))
    if not prompts:
        raise UserError(f"--file: {path}: there is no prompt in it")
    return prompts


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        line.encode("utf-8")
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets, half of a surrogate pair
        raise UserError(f"{where}: {str(error).partition(';')[0]}") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise UserError(f'{where}: expected {{"prompt": "..."}} or {{"messages": [...]}}')
    if taken := [key for key in RESULT_KEYS if key in row]:
        raise UserError(f"{where}: {taken[0]} is what the result adds: rename it")
    if "prompt" in row and not isinstance(row["prompt"], str):
        raise UserError(f"{where}: prompt must be a string")
    if "messages" in row:
        messages = row["messages"]
        good = isinstance(messages, list) and all(
            isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
        )
        if not good or not messages:
            raise UserError(f'{where}: messages must be a list of {{"role": "...", "content": "..."}}')
    return row


def check_results(path: str | Path) -> None:
    """Refuse, before the work, a file that could not be written after it.

    Raises:
        UserError: as said.
    """
    if Path(path).is_dir():
        raise UserError(f"--out: {path}: this is a folder, a file is needed")
    check_output(Path(path).absolute().parent, "--out")


def write_results(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` as lines of JSON, all of them or none.

    Raises:
        UserError: if the disk is full.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with full_disk(path, "--out"):
        write_text(path, text)


def _read(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where}: {path}: it is not text in UTF-8") from None
    except OSError as error:
        raise UserError(f"{where}: {path}: it cannot be read ({error.strerror or error})") from None
