"""Rows that are read while they are used and are never all in memory: the counterpart of `data.load_rows`."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqqplus.data import (
    _ALLOWED,
    _BUILDERS,
    _SUFFIXES,
    _bad_split,
    _embedded,
    _json_kind,
    _looks_local,
    _no_split,
    _refuse_config,
    _refuse_fatal,
    _translate,
    load_rows,
)
from hqqplus.errors import UserError
from hqqplus.row_forms import RowForm, filled, with_beginning, with_ending

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HEAD_ROWS, HEAD_CHARACTERS = 10_000, 20_000_000
"""Of a stream, what is looked at before training: so many rows, or as many as hold so much text."""
PLACE = "place"
"""The column of a streamed row that says which row of its source it is, from 0."""
_CHECKED_ROWS = 100
# Bytes of each file that are looked at for what ends the process: all of them would be days for some streams.
_LOOKED_AT = 2**24


class StreamFault(UserError):
    """What is wrong with a stream, found out while it is read.

    Still one sentence after a worker of a data loader has met it: torch raises a worker's error anew, with the whole
    traceback for a message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


# Reading -------------------------------------------------------------------------------------------------------------


def stream_rows(
    path_or_name: str, split: str = "train", config_name: str | None = None, where: str = "data.path_or_name"
) -> IterableDataset:
    """The rows of one split as a stream.

    `path_or_name` is what `load_rows` takes. Two things differ: a text file gives a row for each paragraph (ended by
    an empty line), since all of it as one row would have to be in memory; and a split cannot be sliced. A `.json` file
    that is one list has to be read whole to be understood at all.

    Raises:
        UserError: nothing there, an unknown suffix, no such split, a slice, or a hub that cannot be reached. A file
            that is damaged further on is found out where it is read.
    """
    if path_or_name.startswith("embedded:"):
        return _embedded(path_or_name, split, config_name, where).to_iterable_dataset()
    path = Path(path_or_name).expanduser().absolute()
    if not _looks_local(path_or_name):
        return _stream(path_or_name, split, where, name=path_or_name, config_name=config_name, hub=True)
    if not path.exists() or (path.is_file() and (path.suffix.lower() not in _SUFFIXES or path.stat().st_size == 0)):
        load_rows(path_or_name, split, config_name, where)  # refuses it in its own words
    for file in local_files(path_or_name):
        _refuse_fatal(file, str(file) if path.is_dir() else path_or_name, where, _LOOKED_AT)
    if path.is_dir():
        suffixes = {file.suffix.lower() for file in local_files(path_or_name)}
        if not suffixes:
            raise UserError(f"{where}: the folder '{path_or_name}' holds no data file. {_ALLOWED}")
        options: dict[str, Any] = {"sample_by": "document"} if suffixes == {".txt"} else {}
        return _stream(str(path), split, where, name=path_or_name, config_name=config_name, **options)
    _refuse_config(config_name, path_or_name, where)
    # `datasets` takes data_files for glob patterns.
    files: dict[str, Any] = {"data_files": glob.escape(str(path))}
    if path.suffix.lower() == ".txt":
        return _stream("text", split, where, name=path_or_name, sample_by="paragraph", **files)
    return _stream(_BUILDERS[path.suffix.lower()], split, where, name=path_or_name, **files)


def _stream(
    source: str,
    split: str,
    where: str,
    *,
    name: str,
    config_name: str | None = None,
    hub: bool = False,
    **options: Any,
) -> IterableDataset:
    from datasets import load_dataset

    try:
        return load_dataset(source, config_name, split=split, streaming=True, **options)
    except Exception as error:
        if "Bad split" in str(error):
            there = re.findall(r"'([^']*)'", str(error).partition("Available splits:")[2])
            if re.search(r"[\[\]%]", split):
                raise UserError(
                    f"{where}: the split '{split}' of '{name}' is a slice, and a stream has only whole splits: "
                    f"{', '.join(there)}"
                ) from error
            if re.fullmatch(r"\w+(\.\w+)*", split):
                _no_split(name, split, there, where, error)
            _bad_split(name, split, where, error)
        if (fault := _line_fault(name)) is not None:
            raise UserError(f"{where}: '{name}', {fault}") from error
        _translate(error, name, split, where, hub=hub)


def local_files(path_or_name: str) -> list[Path]:
    """The data files that `path_or_name` names on this machine, in order; none for a data set of the hub."""
    if path_or_name.startswith("embedded:") or not _looks_local(path_or_name):
        return []
    path = Path(path_or_name).expanduser().absolute()
    if not path.is_dir():
        return [path]
    found = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in found if file.suffix.lower() in {*_SUFFIXES, ".arrow"})


def read_fault(error: Exception, path_or_name: str, where: str) -> StreamFault:
    """What `error` says about reading the stream `path_or_name`, as one sentence."""
    gone = [file for file in local_files(path_or_name) if not file.exists()]
    if gone:
        return StreamFault(f"{where}: '{path_or_name}' has vanished while it was read (looked for {gone[0]})")
    if (fault := _line_fault(path_or_name)) is not None:
        return StreamFault(f"{where}: '{path_or_name}', {fault}")
    reason = " ".join(str(error).split()) or type(error).__name__
    return StreamFault(f"{where}: cannot read on in '{path_or_name}': {reason[:400]}")


def _line_fault(path_or_name: str) -> str | None:
    """Where a file of JSON lines is none, in words, found without holding more than a line; None if it is."""
    for path in local_files(path_or_name):
        if path.suffix.lower() != ".jsonl":
            continue
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.strip():
                        continue
                    try:
                        value = json.loads(line.rstrip())
                    except UnicodeDecodeError:
                        return f"line {number}: not UTF-8"
                    except json.JSONDecodeError as error:
                        return f"line {number}: not valid JSON: {error.msg} (column {error.colno})"
                    if not isinstance(value, dict):
                        return f"line {number}: expected one JSON object {{...}} a line, got {_json_kind(value)}"
        except OSError:
            continue
    return None


def plain_stream(
    stream: IterableDataset, form: RowForm, tokenizer: Any, name: str, where: str
) -> tuple[IterableDataset, RowForm]:
    """`RowForm.plain` for a stream. A row that is malformed is refused where it is read.

    Raises:
        UserError: a column is missing or has the wrong type, the beginning cannot be read, or there is no row.
    """
    from datasets import Dataset

    if form.is_plain:
        return stream, form
    try:
        first = list(stream.take(_CHECKED_ROWS))
    except Exception as error:
        raise read_fault(error, name, where) from error
    if not first:
        raise UserError(f"{where}: '{name}' is empty; at least one row is needed")
    there = list(dict.fromkeys(column for row in first for column in row))
    # Of any type: a row of the wrong one is told by its number.
    form.check(Dataset.from_dict({column: [] for column in there}), where)
    turned, plain = form.turned(tokenizer, where)
    return stream.map(_Turned(turned), with_indices=True, remove_columns=there), plain


class _Turned:
    """A row of another project's form -> the same in one of ours."""

    def __init__(self, turned: Any) -> None:
        self.turned = turned

    def __call__(self, row: dict[str, Any], place: int) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self.turned(row, place)
        except UserError as error:
            raise StreamFault(str(error)) from None
        return found


# What is known before training ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Streamed:
    """A stream of one form, and its beginning.

    Attributes:
        rows: as they come, each under the names that TRL has for its columns, with its `PLACE`.
        head: the first of them, without that.
        whole: the stream has no more than its head.
        form: the same form under TRL's names, for what takes a data set and its form.
    """

    rows: IterableDataset
    head: list[dict[str, Any]]
    whole: bool
    form: RowForm

    @classmethod
    def of(
        cls,
        stream: IterableDataset,
        form: RowForm,
        name: str,
        where: str,
        most: int | None = None,
    ) -> Streamed:
        """`stream`, its beginning read (at most `most` rows, by default `HEAD_ROWS`) and its columns checked.

        Raises:
            UserError: a column is missing or has the wrong type, the beginning cannot be read, or there is no row.
        """
        from datasets import Dataset

        first: list[dict[str, Any]] = []
        try:
            for row in stream.take(_CHECKED_ROWS):
                first.append(row)
        except UserError:
            raise
        except Exception as error:
            raise read_fault(error, name, where) from error
        if not first:
            raise UserError(f"{where}: '{name}' is empty; at least one row is needed")
        there = list(dict.fromkeys(column for row in first for column in row))
        if not set(form.columns.values()) <= set(there):
            form.check(Dataset.from_dict({column: [] for column in there}), where)
        examples = _examples(form, first, name, where)
        form.check(Dataset.from_dict({form.columns[column]: [value] for column, value in examples.items()}), where)
        kinds = {column: str if isinstance(value, str) else list for column, value in examples.items()}
        named = _Named(form.columns, kinds, name, where)
        rows = stream.map(named, with_indices=True, remove_columns=there)
        head: list[dict[str, Any]] = []
        whole, size = True, 0
        try:
            for row in rows:
                if len(head) == (HEAD_ROWS if most is None else most) or size > HEAD_CHARACTERS:
                    whole = False
                    break
                head.append({column: row[column] for column in kinds})
                size += sum(_size(value) for value in head[-1].values())
        except UserError:
            raise
        except Exception as error:
            raise read_fault(error, name, where) from error
        text, prompt, completion, talk = (
            column if column in kinds else None for column in ("text", "prompt", "completion", "messages")
        )
        return cls(rows, head, whole, RowForm(text, prompt, completion, talk))

    def part(self, start: int, end: int) -> Dataset:
        """Rows `start` to `end` of the head as a data set, for `form`.

        Raises:
            UserError: if they do not fit into columns of one type each.
        """
        from datasets import Dataset

        try:
            return Dataset.from_list(self.head[start:end])
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise UserError(f"data: the rows of the stream differ in their types: {reason}") from error

    def without(self, count: int) -> IterableDataset:
        """The stream without the first `count` rows, wherever they, or copies of them, come up.

        By what they say: a loader's workers have streams of their own, and number their rows anew.
        """
        if not count:
            return self.rows
        kept_out = {_digest(row) for row in self.head[:count]}
        return self.rows.filter(lambda row: _digest({c: v for c, v in row.items() if c != PLACE}) not in kept_out)


def to_sft(rows: IterableDataset, columns: list[str], eos_token: str | None, bos_token: str | None) -> IterableDataset:
    """`RowForm.to_sft` for a stream whose text columns are `columns`: empty rows left out, BOS and EOS where given."""
    rows = rows.filter(lambda row: filled({name: value for name, value in row.items() if name != PLACE}))
    if bos_token and columns:
        rows = rows.map(with_beginning, fn_kwargs={"column": columns[0], "beginning": bos_token})
    if eos_token and columns:
        rows = rows.map(with_ending, fn_kwargs={"column": columns[-1], "ending": eos_token})
    return rows


@dataclass(frozen=True)
class _Named:
    """A row of the source -> the same under TRL's names, with its place, if it holds what the first ones do."""

    columns: Mapping[str, str]
    kinds: Mapping[str, type]
    name: str
    where: str

    def __call__(self, row: dict[str, Any], place: int) -> dict[str, Any]:
        found: dict[str, Any] = {PLACE: place}
        for column, source in self.columns.items():
            value = row.get(source)
            if value is not None and not _is(value, self.kinds[column]):
                wanted = "text" if self.kinds[column] is str else 'messages {"role": ..., "content": ...}'
                raise StreamFault(
                    f"{self.where}: row {place + 1} of '{self.name}': column '{source}' must hold {wanted} as the "
                    f"rows before do, but it holds {_json_kind(value)}"
                )
            found[column] = value
        return found


def _examples(form: RowForm, rows: list[dict[str, Any]], name: str, where: str) -> dict[str, Any]:
    """TRL's name of each column -> what the first row that has something there holds."""
    found: dict[str, Any] = {}
    for column, source in form.columns.items():
        found[column] = next((row[source] for row in rows if row.get(source) is not None), None)
        if found[column] is None:
            raise UserError(f"{where}: column '{source}' is empty in the first {len(rows)} rows of '{name}'")
    return found


def _is(value: Any, kind: type) -> bool:
    if kind is str or not isinstance(value, list):
        return isinstance(value, kind)
    return all(isinstance(part, dict) and isinstance(part.get("role"), str) and "content" in part for part in value)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str) else len(json.dumps(value, default=str))


def _digest(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(dict(row), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
