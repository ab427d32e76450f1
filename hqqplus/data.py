"""Rows to train and to measure on: where they come from, and what shape they have."""

from __future__ import annotations

import difflib
import functools
import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hqqplus.embedded import DATA_NAME
from hqqplus.errors import UserError
from hqqplus.untrusted import arrow_fault

# datasets counts every data set that is read, local files too, with a request to its makers. Read when it is imported.
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Suffix of a file -> the builder of `datasets` that reads it; a text file is read here, as one document.
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SUFFIXES = (*_BUILDERS, ".txt")
_ALLOWED = (
    f"Allowed: a file ({', '.join(_SUFFIXES)}), a folder of such files, '{DATA_NAME}', "
    "or the name of a data set on the Hugging Face hub"
)
# TRL's name of a column -> the field of `RowForm` (and of a recipe) that names ours.
_OPTIONS = {"text": "text_field", "prompt": "prompt", "completion": "completion", "messages": "messages"}
# Rows whose messages are looked at one by one, where the column's type alone does not prove their form.
_CHECKED_ROWS = 100
# Columns that an error names.
_LISTED = 30


def load_rows(
    path_or_name: str, split: str = "train", config_name: str | None = None, where: str = "data.path_or_name"
) -> Dataset:
    """The rows of one split, memory-mapped.

    `path_or_name` is one of:

    - a local file: `.jsonl`, `.json`, `.csv`, `.parquet`; or `.txt`, which is one document (one row, column "text").
      A file has one split, "train";
    - a local folder that holds such files; `datasets` infers the splits from their names (train.jsonl, ...);
    - "embedded:pydoc", the documentation of this Python (splits "train" and "validation", column "text"); building it
      takes some seconds, once per process;
    - the name of a data set on the hub, with `config_name` where it has several configurations.

    A string that ends in a known suffix, starts with ".", "/" or "~" and has a separator, or exists on disk is a
    path. `split` takes slices and sums as `datasets` does: "train[:1000]", "train[:5%]+validation".

    Raises:
        UserError: nothing there, an unknown suffix, no such split, no rows, a malformed line (with its number), or
            a hub that cannot be reached. The message starts with `where`, the option that the user set.
    """
    if path_or_name.startswith("embedded:"):
        rows = _embedded(path_or_name, split, config_name, where)
    elif _looks_local(path_or_name):
        rows = _local(path_or_name, split, config_name, where)
    else:
        rows = _from_hub(path_or_name, split, config_name, where)
    if len(rows) == 0:
        raise UserError(f"{where}: split '{split}' of '{path_or_name}' is empty; at least one row is needed")
    return rows


def _looks_local(name: str) -> bool:
    path = Path(name).expanduser()
    dotted = name.startswith((".", "/", "~")) and ("/" in name or "\\" in name)
    return dotted or path.suffix.lower() in _SUFFIXES or path.exists()


@functools.lru_cache(maxsize=1)
def _embedded_splits() -> dict[str, list[str]]:
    from hqqplus.embedded.corpus import build

    return build()


def _embedded(name: str, split: str, config_name: str | None, where: str) -> Dataset:
    from datasets import Dataset

    if name != DATA_NAME:
        raise UserError(f"{where}: there is no '{name}'. {_ALLOWED}")
    _refuse_config(config_name, name, where)
    splits = {key: Dataset.from_dict({"text": texts}) for key, texts in _embedded_splits().items()}
    return _pick(splits, split, name, where)


def _local(name: str, split: str, config_name: str | None, where: str) -> Dataset:
    from datasets import Dataset, load_dataset

    path = Path(name).expanduser().absolute()
    if not path.exists():
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{where}: there is no file or folder '{name}' (looked for {path}){_hint(path.name, near)}")
    if path.is_dir():
        return _folder(path, name, split, config_name, where)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(f"{where}: cannot read '{name}': unknown suffix '{path.suffix}'. {_ALLOWED}")
    _refuse_config(config_name, name, where)
    if path.stat().st_size == 0:
        raise UserError(f"{where}: '{name}' is an empty file; at least one row is needed")
    if suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"{where}: cannot read '{name}' as UTF-8 text: {error}") from error
        return _pick({"train": Dataset.from_dict({"text": [text] if text.strip() else []})}, split, name, where)
    _refuse_fatal(path, name, where)
    try:
        # `datasets` takes data_files for glob patterns.
        with _without_log():
            return _sound(load_dataset(_BUILDERS[suffix], data_files=glob.escape(str(path)), split=split))
    except Exception as error:
        # The readers name a byte or a row of a block, at best: find the line for the user.
        fault = _json_fault(path) if suffix in (".jsonl", ".json") else None
        if fault is not None:
            raise UserError(f"{where}: '{name}', {fault}") from error
        _translate(error, name, split, where)


def _folder(path: Path, name: str, split: str, config_name: str | None, where: str) -> Dataset:
    from datasets import load_dataset

    found = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
    # A folder of text files reads as one document a file, like the single file; `datasets` would make rows of lines.
    options = {"sample_by": "document"} if found & set(_SUFFIXES) == {".txt"} else {}
    for file in sorted(path.rglob("*.json*")):
        _refuse_fatal(file, str(file), where)
    try:
        with _without_log():
            return _sound(load_dataset(str(path), config_name, split=split, **options))
    except Exception as error:
        if not found & {*_SUFFIXES, ".arrow"}:
            raise UserError(f"{where}: the folder '{name}' holds no data file. {_ALLOWED}") from error
        for file in sorted(path.rglob("*.json*")):
            fault = _json_fault(file) if file.suffix.lower() in (".jsonl", ".json") else None
            if fault is not None:
                raise UserError(f"{where}: '{file}', {fault}") from error
        _translate(error, name, split, where)


def _from_hub(name: str, split: str, config_name: str | None, where: str) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(name, config_name, split=split)
    except Exception as error:
        _translate(error, name, split, where, hub=True)


def _translate(error: Exception, name: str, split: str, where: str, hub: bool = False) -> NoReturn:
    """Raise what `datasets` said of `name` as one sentence for the user."""
    text = str(error)
    if "Unknown split" in text:
        there = re.findall(r"'([^']*)'", text.partition("Should be one of")[2])
        _no_split(name, split, there, where, error)
    if "Unrecognized instruction format" in text:
        _bad_split(name, split, where, error)
    if "corresponds to no data" in text:
        raise UserError(f"{where}: a split of '{name}' is empty; at least one row is needed ({text})") from error
    cache = _cache()
    if (isinstance(error, FileNotFoundError) and cache in text) or "metadata bytes" in text:
        raise UserError(
            f"{where}: the copy of '{name}' in the cache of datasets is damaged, or half of it was removed: remove "
            f"the rest in {cache} too, and start again"
        ) from error
    cause = error.__cause__ or error
    reason = " ".join(str(cause).split()) or type(cause).__name__
    if len(reason) > 400:
        reason = reason[:400] + " ..."
    if not hub:
        raise UserError(f"{where}: cannot read '{name}': {reason}") from error
    raise UserError(
        f"{where}: '{name}' is no local path, and loading it from the Hugging Face hub failed: {reason}. {_ALLOWED}"
    ) from error


def _cache() -> str:
    import datasets

    return str(datasets.config.HF_DATASETS_CACHE)


def _refuse_config(config_name: str | None, name: str, where: str) -> None:
    if config_name is not None:
        raise UserError(
            f"{where}: '{name}' has no configurations, so config_name '{config_name}' means nothing; leave it out"
        )


def _no_split(name: str, split: str, there: Iterable[str], where: str, cause: Exception | None = None) -> NoReturn:
    there = list(there)
    listed = ", ".join(f"'{key}'" for key in there) or "none"
    hint, split = _hint(split, there), _short(split)
    raise UserError(f"{where}: '{name}' has no split '{split}'; it has {listed}{hint}") from cause


def _bad_split(name: str, split: str, where: str, cause: Exception | None = None) -> NoReturn:
    raise UserError(
        f"{where}: cannot read the split '{_short(split)}' of '{name}'; allowed: a name, a slice such as "
        "'train[:1000]' or 'train[:5%]', and sums of those with '+'"
    ) from cause


def _pick(splits: Mapping[str, Dataset], split: str, name: str, where: str) -> Dataset:
    """`split`, with slices and sums, of data sets that are already in memory."""
    from datasets import ReadInstruction, concatenate_datasets

    try:
        wanted = ReadInstruction.from_spec(split).to_absolute({key: len(rows) for key, rows in splits.items()})
    except ValueError as error:
        if "Unknown split" in str(error):
            _no_split(name, split, splits, where, error)
        _bad_split(name, split, where, error)
    # `select` refuses an empty range that begins at the end.
    parts = [(splits[part.splitname], range(part.from_, part.to)) for part in wanted]
    return concatenate_datasets([rows.select(part if len(part) else []) for rows, part in parts])


@contextmanager
def _without_log() -> Iterator[None]:
    """Without what the readers log of an error that they raise."""
    log = logging.getLogger("datasets.packaged_modules")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _sound(rows: Dataset) -> Dataset:
    """`rows`, whose text is text in UTF-8: Arrow's readers take it for that (2 GB/s and more).

    Raises:
        pyarrow.ArrowInvalid: if it is not.
    """
    rows.data.validate(full=True)
    return rows


def _refuse_fatal(path: Path, name: str, where: str, most: int | None = None) -> None:
    """Refuse what would end the process where `datasets` reads it; in a stream, in its first `most` bytes."""
    if path.suffix.lower() not in (".jsonl", ".json") or not path.is_file():
        return
    fault = arrow_fault(path, most)
    if fault is not None and fault.startswith("nested"):
        # Of all the file: brackets that are never closed look like that too.
        found = _json_fault(path)
        fault = found if found is not None and "recursion" not in found else fault
    if fault is not None:
        raise UserError(f"{where}: '{name}', {fault}")


def _json_fault(path: Path) -> str | None:
    """Where `path` is not JSON lines (or, for `.json`, one JSON list of objects), in words; None if it is."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1}: not UTF-8"
    except OSError:
        return None
    if path.suffix.lower() == ".json" and not _starts_with_object_line(text):
        return _json_document_fault(text)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = _loads(line)
        except json.JSONDecodeError as error:
            return f"line {number}: not valid JSON: {error.msg} (column {error.colno})"
        if not isinstance(value, dict):
            return f"line {number}: expected one JSON object {{...}} a line, got {_json_kind(value)}"
    return None


def _starts_with_object_line(text: str) -> bool:
    try:
        return isinstance(_loads(text.lstrip().partition("\n")[0]), dict)
    except json.JSONDecodeError:
        return False


def _json_document_fault(text: str) -> str | None:
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        return f"line {error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
    if not isinstance(value, list):
        return None if isinstance(value, dict) else f"expected a list of objects, got {_json_kind(value)}"
    for number, item in enumerate(value, start=1):
        if not isinstance(item, dict):
            return f"item {number}: expected an object {{...}}, got {_json_kind(item)}"
    return None


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise json.JSONDecodeError(str(error).partition(";")[0], text, 0) from None


def _json_kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _hint(wrong: str, there: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, list(there), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _short(text: str) -> str:
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@dataclass(frozen=True)
class RowForm:
    """Which columns hold the text: exactly one of `text_field`, `prompt` with `completion`, or `messages`.

    Prompt and completion are both strings, or both lists of messages; messages are lists of
    `{"role": ..., "content": ...}`.

    Raises:
        UserError: no form or more than one is given, or a prompt without a completion.
    """

    text_field: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            there, lacking = ("prompt", "completion") if self.completion is None else ("completion", "prompt")
            raise UserError(f"{there} needs {lacking} beside it: they are the two columns of one form of row")
        forms = [field for field in (self.text_field, self.prompt, self.messages) if field is not None]
        if len(forms) != 1:
            raise UserError(
                f"{'more than one' if forms else 'no'} form of row is given; allowed is exactly one of text_field, "
                "prompt with completion, messages"
            )

    @property
    def columns(self) -> dict[str, str]:
        """TRL's name of each column ("text"; "prompt", "completion"; "messages") -> its name in the data set."""
        named = {name: getattr(self, option) for name, option in _OPTIONS.items()}
        return {name: column for name, column in named.items() if column is not None}

    def check(self, dataset: Dataset, where: str = "data") -> None:
        """Prove that `dataset` has these columns, and that they hold what they should.

        Raises:
            UserError: a column is missing (the message lists those there) or has the wrong type.
        """
        for name, column in self.columns.items():
            if column not in dataset.column_names:
                listed = ", ".join(f"'{_short(other)}'" for other in dataset.column_names[:_LISTED])
                listed += f" and {more} more" if (more := len(dataset.column_names) - _LISTED) > 0 else ""
                raise UserError(
                    f"{where}: {_OPTIONS[name]}: there is no column '{column}'; the columns are {listed}"
                    f"{_hint(column, dataset.column_names)}"
                )
        talk = {name: _is_messages(dataset, column) for name, column in self.columns.items()}
        for name, column in self.columns.items():
            feature = dataset.features[column]
            if name == "messages" and not talk[name]:
                raise UserError(
                    f"{where}: messages: column '{column}' must hold lists of messages "
                    f'{{"role": ..., "content": ...}}, but it is {_describe(feature)}'
                )
            if name != "messages" and not talk[name] and not _is_string(feature):
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
        """
        self.check(dataset)
        names = self.columns
        rows = dataset.select_columns(list(names.values()))
        # By way of names that cannot clash: the prompt's column may be called "completion".
        rows = rows.rename_columns({column: f"_{name}" for name, column in names.items()})
        rows = rows.rename_columns({f"_{name}": name for name in names})
        rows = rows.filter(_filled)
        if len(rows) == 0:
            columns = " and ".join(f"'{column}'" for column in names.values())
            raise UserError(f"data: every row is empty in {columns}; at least one row with text is needed")
        first, last = ("prompt", "completion") if "completion" in names else ("text", "text")
        if bos_token and first in names and _is_string(rows.features[first]):
            rows = rows.map(_with_beginning, fn_kwargs={"column": first, "beginning": bos_token})
        if eos_token and last in names and _is_string(rows.features[last]):
            rows = rows.map(_with_ending, fn_kwargs={"column": last, "ending": eos_token})
        return rows

    def documents(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The text of each row, to measure perplexity on: the text; the prompt with its completion; or what the
        tokenizer's chat template makes of the messages. Empty ones are dropped.

        Raises:
            UserError: the columns are not there (see `check`); there are messages, and the tokenizer has no chat
                template, or the template refuses them.
        """
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


def _filled(row: dict[str, Any]) -> bool:
    """Is there something to train on? A prompt may be empty, its completion may not."""
    if any(value is None for value in row.values()):
        return False
    last = next(row[name] for name in ("text", "completion", "messages") if name in row)
    if isinstance(last, str):
        return bool(last.strip())
    return all(len(messages) > 0 for messages in row.values())


def _with_beginning(row: dict[str, Any], column: str, beginning: str) -> dict[str, Any]:
    text = row[column]
    return {column: text if text.startswith(beginning) else beginning + text}


def _with_ending(row: dict[str, Any], column: str, ending: str) -> dict[str, Any]:
    text = row[column]
    return {column: text if text.endswith(ending) else text + ending}


def _is_string(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _is_messages(dataset: Dataset, column: str) -> bool:
    from datasets import LargeList, List

    feature = dataset.features[column]
    if not isinstance(feature, List | LargeList):
        return False
    if isinstance(feature.feature, dict) and _is_string(feature.feature.get("content")):
        return _is_string(feature.feature.get("role"))
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
