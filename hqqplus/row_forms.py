"""The shapes that rows come in, and how each of them becomes what a trainer takes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hqqplus.errors import UserError
from hqqplus.foreign_forms import INPUT, INSTRUCTION, OUTPUT, TEMPLATE, Alpaca, ShareGPT, prompt_problem

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    Plain = tuple[Dataset, "RowForm"]

# TRL's name of a column -> the field of `RowForm` (and of a recipe) that names ours.
_OPTIONS = {"text": "text_field", "prompt": "prompt", "completion": "completion", "messages": "messages"}
# Rows whose messages are looked at one by one, where the column's type alone does not prove their form.
_CHECKED_ROWS = 100
# Columns that an error names.
_LISTED = 30


@dataclass(frozen=True)
class RowForm:
    """Which columns hold the text: exactly one of `text_field`, `prompt` with `completion`, `messages`, `alpaca` and
    `sharegpt`.

    Prompt and completion are both strings, or both lists of messages; messages are lists of
    `{"role": ..., "content": ...}`. The last two are turned into one of the others first (`plain`): `alpaca` has
    columns of its own, whose prompt `alpaca_prompt` makes; `sharegpt` names the column of conversations.

    Raises:
        UserError: no form or more than one is given, a prompt without a completion, or a template of a prompt that is
            none.
    """

    text_field: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    alpaca: bool = False
    alpaca_prompt: str | None = None
    sharegpt: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            there, lacking = ("prompt", "completion") if self.completion is None else ("completion", "prompt")
            raise UserError(f"{there} needs {lacking} beside it: they are the two columns of one form of row")
        forms = [field for field in (self.text_field, self.prompt, self.messages, self.sharegpt) if field is not None]
        if len(forms) + self.alpaca != 1:
            raise UserError(
                f"{'more than one' if forms else 'no'} form of row is given; allowed is exactly one of text_field, "
                "prompt with completion, messages, alpaca, sharegpt"
            )
        if self.alpaca_prompt is not None:
            problem = prompt_problem(self.alpaca_prompt) if self.alpaca else "it goes with alpaca"
            if problem:
                raise UserError(f"alpaca_prompt: {problem}")

    @property
    def columns(self) -> dict[str, str]:
        """TRL's name of each column ("text"; "prompt", "completion"; "messages") -> its name in the data set; nothing
        for a form that is not `plain`."""
        named = {name: getattr(self, option) for name, option in _OPTIONS.items()}
        return {name: column for name, column in named.items() if column is not None}

    @property
    def is_plain(self) -> bool:
        """Whether rows of this form are taken as they are, and not turned into another form first."""
        return bool(self.columns)

    def plain(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, where: str = "data") -> Plain:
        """The rows in a form that is trained on as it is, and that form.

        Raises:
            UserError: the columns are not there (see `check`), or a row is malformed; the message has its number.
        """
        self.check(dataset, where)
        if self.is_plain:
            return dataset, self
        turned, form = self.turned(tokenizer, where)
        rows = dataset.map(turned, with_indices=True, remove_columns=dataset.column_names, features=turned.features)
        return rows, form

    def turned(self, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[Alpaca | ShareGPT, RowForm]:
        """(row, its number from 0) -> the row in a plain form, and that form."""
        if self.sharegpt is not None:
            return ShareGPT(self.sharegpt, where), RowForm(messages="messages")
        talks = bool(getattr(tokenizer, "chat_template", None)) and self.alpaca_prompt is None
        return Alpaca(None if talks else self.alpaca_prompt or TEMPLATE), RowForm(
            prompt="prompt", completion="completion"
        )

    def check(self, dataset: Dataset, where: str = "data") -> None:
        """Prove that `dataset` has these columns, and that they hold what they should.

        Raises:
            UserError: a column is missing (the message lists those there) or has the wrong type.
        """
        if not self.is_plain:
            self._check_foreign(dataset, where)
            return
        for name, column in self.columns.items():
            _check_column(dataset, column, f"{where}: {_OPTIONS[name]}")
        talk = {name: _is_messages(dataset, column) for name, column in self.columns.items()}
        for name, column in self.columns.items():
            feature = dataset.features[column]
            if name == "messages" and not talk[name]:
                raise UserError(
                    f"{where}: messages: column '{column}' must hold lists of messages "
                    f'{{"role": ..., "content": ...}}, but it is {_describe(feature)}'
                )
            if name != "messages" and not talk[name] and not is_string(feature):
                raise UserError(
                    f"{where}: {_OPTIONS[name]}: column '{column}' must hold text, but it is {_describe(feature)}"
                )
        if talk.get("text"):
            raise UserError(
                f"{where}: text_field: column '{self.text_field}' holds lists of messages; "
                f"use messages: {self.text_field}"
            )
        if len(set(talk.values())) > 1:
            raise UserError(
                f"{where}: prompt and completion must both hold text or both hold lists of messages; "
                f"'{self.prompt}' is {_describe(dataset.features[str(self.prompt)])} and "
                f"'{self.completion}' is {_describe(dataset.features[str(self.completion)])}"
            )

    def _check_foreign(self, dataset: Dataset, where: str) -> None:
        from datasets import LargeList, List

        if self.sharegpt is not None:
            head = f"{where}: sharegpt"
            _check_column(dataset, self.sharegpt, head)
            feature = dataset.features[self.sharegpt]
            if not isinstance(feature, List | LargeList) and not _is_empty(feature):
                raise UserError(
                    f"{head}: column '{self.sharegpt}' must hold lists of turns "
                    f'{{"from": ..., "value": ...}}, but it is {_describe(feature)}'
                )
            return
        head = f"{where}: alpaca"
        for column in (INSTRUCTION, OUTPUT):
            _check_column(dataset, column, head)
        for column in (INSTRUCTION, INPUT, OUTPUT):
            if column in dataset.column_names:
                feature = dataset.features[column]
                if not is_string(feature) and not _is_empty(feature):
                    raise UserError(f"{head}: column '{column}' must hold text, but it is {_describe(feature)}")

    def to_sft(self, dataset: Dataset, eos_token: str | None, bos_token: str | None = None) -> Dataset:
        """The rows as TRL's `SFTTrainer` takes them: exactly {"text"}, {"prompt", "completion"} or {"messages"}.

        `bos_token` is put in front of the text (or prompt) and `eos_token` behind the text (or completion), each
        unless it is there. Rows without text, completion or messages are dropped (`SFTTrainer` fails on a null, and
        trains on a bare EOS where the text is empty).

        What TRL 1.16 does by itself (`SFTTrainer._prepare_dataset`):

        - text and prompt + completion: it appends `tokenizer.eos_token` to the text (or the completion) unless it
          already ends with it, so appending it here as well never doubles it, and makes the rows complete for anyone
          else who reads them. A tokenizer without an EOS token makes TRL fail in `str.endswith`;
        - it then tokenizes with special tokens, so a tokenizer that puts BOS in front does so; a tokenizer whose own
          post-processor appends EOS (`add_eos_token=True`) ends in two of them, and only the tokenizer can mend that;
        - prompt and prompt + completion are tokenized separately, and the completion starts where the two differ;
          the loss is on the completion alone unless `completion_only_loss=False`;
        - messages go through the chat template, and nothing is appended: the end of a turn is the template's affair.
          So nothing is appended to them here either.

        Raises:
            UserError: the columns are not there (see `check`), or no row is left.
            ValueError: the form is not plain.
        """
        if not self.is_plain:
            raise ValueError("alpaca and sharegpt are turned into another form first: see RowForm.plain")
        self.check(dataset)
        names = self.columns
        rows = dataset.select_columns(list(names.values()))
        # By way of names that cannot clash: the prompt's column may be called "completion".
        rows = rows.rename_columns({column: f"_{name}" for name, column in names.items()})
        rows = rows.rename_columns({f"_{name}": name for name in names})
        rows = rows.filter(filled)
        if len(rows) == 0:
            columns = " and ".join(f"'{column}'" for column in names.values())
            raise UserError(f"data: every row is empty in {columns}; at least one row with text is needed")
        first, last = ("prompt", "completion") if "completion" in names else ("text", "text")
        if bos_token and first in names and is_string(rows.features[first]):
            rows = rows.map(with_beginning, fn_kwargs={"column": first, "beginning": bos_token})
        if eos_token and last in names and is_string(rows.features[last]):
            rows = rows.map(with_ending, fn_kwargs={"column": last, "ending": eos_token})
        return rows

    def documents(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The text of each row, to measure perplexity on: the text; the prompt with its completion; or what the
        tokenizer's chat template makes of the messages. Empty ones are dropped.

        Raises:
            UserError: the columns are not there (see `check`); there are messages, and the tokenizer has no chat
                template, or the template refuses them.
        """
        if not self.is_plain:
            rows, form = self.plain(dataset, tokenizer)
            return form.documents(rows, tokenizer)
        self.check(dataset)
        names = self.columns
        rows = dataset.select_columns(list(names.values()))
        texts = []
        for number, row in enumerate(rows, start=1):
            parts = [row[column] for column in names.values()]
            if any(part is None for part in parts):
                continue
            if isinstance(parts[0], str):
                text = "".join(parts)
            else:
                messages = [message for part in parts for message in part]
                text = _templated(messages, tokenizer, number) if messages else ""
            if text.strip():
                texts.append(text)
        return texts


def _check_column(dataset: Dataset, column: str, head: str) -> None:
    """Refuse `dataset` without `column`, naming those there are."""
    if column in dataset.column_names:
        return
    listed = ", ".join(f"'{short(other)}'" for other in dataset.column_names[:_LISTED])
    listed += f" and {more} more" if (more := len(dataset.column_names) - _LISTED) > 0 else ""
    raise UserError(
        f"{head}: there is no column '{column}'; the columns are {listed}{hint(column, dataset.column_names)}"
    )


def _is_empty(feature: Any) -> bool:
    """Whether nothing at all stands in the column, so that nobody knows of what type it is."""
    return getattr(feature, "dtype", None) == "null"


def _templated(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            "data: the rows are messages, but the tokenizer has no chat template; use a model that has one (mostly "
            "those called Instruct or Chat), or rows of text or of prompt and completion"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:
        raise UserError(
            f"data: the tokenizer's chat template refuses the messages of row {number}: {error}"
        ) from error


def filled(row: dict[str, Any]) -> bool:
    """Is there something to train on? A prompt may be empty, its completion may not."""
    if any(value is None for value in row.values()):
        return False
    last = next(row[name] for name in ("text", "completion", "messages") if name in row)
    if isinstance(last, str):
        return bool(last.strip())
    return all(len(messages) > 0 for messages in row.values())


def with_beginning(row: dict[str, Any], column: str, beginning: str) -> dict[str, Any]:
    text = row[column]
    return {column: text if text.startswith(beginning) else beginning + text}


def with_ending(row: dict[str, Any], column: str, ending: str) -> dict[str, Any]:
    text = row[column]
    return {column: text if text.endswith(ending) else text + ending}


def is_string(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _is_messages(dataset: Dataset, column: str) -> bool:
    from datasets import LargeList, List

    feature = dataset.features[column]
    if not isinstance(feature, List | LargeList):
        return False
    if isinstance(feature.feature, dict) and is_string(feature.feature.get("content")):
        return is_string(feature.feature.get("role"))
    # Messages with differing keys, or content in parts, come as free-form JSON: only the values can tell.
    values = dataset.select(range(min(_CHECKED_ROWS, len(dataset))))[column]
    messages = [message for value in values if value is not None for message in value]
    return bool(messages) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in messages
    )


def _describe(feature: Any) -> str:
    from datasets import Features

    if not hasattr(feature, "dtype") or isinstance(feature, dict):
        return f"{Features({'_': feature})['_']}"
    return f"of type {feature.dtype}" if type(feature).__name__ == "Value" else str(feature)


def hint(wrong: str, there: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, list(there), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def short(text: str) -> str:
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
