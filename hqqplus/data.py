"""Rows to train and to measure on: where they come from, and what shape they have."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hqqplus.embedded import DATA_NAME
from hqqplus.errors import UserError
from hqqplus.progress import WorkProgress
from hqqplus.row_forms import RowForm as RowForm
from hqqplus.row_forms import hint, short
from hqqplus.untrusted import arrow_fault

# datasets counts every data set that is read, local files too, with a request to its makers. Read when it is imported.
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

if TYPE_CHECKING:
    from datasets import Dataset

# Suffix of a file -> the builder of `datasets` that reads it; a text file is read here, as one document.
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SUFFIXES = (*_BUILDERS, ".txt")
_ALLOWED = (
    f"Allowed: a file ({', '.join(_SUFFIXES)}), a folder of such files, '{DATA_NAME}', "
    "or the name of a data set on the Hugging Face hub"
)
# Of a file that is hashed, so much at a time.
_PIECE_BYTES = 2**22


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
        raise UserError(f"{where}: there is no file or folder '{name}' (looked for {path}){hint(path.name, near)}")
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
            options = {"data_files": glob.escape(str(path)), "cache_dir": _place_of(path)}
            return _sound(load_dataset(_BUILDERS[suffix], split=split, **options))
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
            return _sound(load_dataset(str(path), config_name, split=split, cache_dir=_place_of(path), **options))
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


def _place_of(path: Path) -> str:
    """Where `datasets` keeps its copy of a file or folder: told by what is in it.

    By itself it goes by the name and by when the file was written, and so takes an old copy for a file that was
    replaced by one of the same time, as archives and `cp -p` do.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    sizes = {file: file.stat().st_size for file in files}
    digest = hashlib.sha256()
    with WorkProgress(sum(sizes.values()), unit="bytes", what="hashing the data") as progress:
        for file in files:
            digest.update(f"{file.relative_to(path).as_posix()} {sizes[file]}:".encode("utf-8", "surrogateescape"))
            with open(file, "rb") as content:
                while piece := content.read(_PIECE_BYTES):
                    digest.update(piece)
                    progress.advance(len(piece))
    return str(Path(_cache()) / "hqqplus_files" / digest.hexdigest()[:32])


def _refuse_config(config_name: str | None, name: str, where: str) -> None:
    if config_name is not None:
        raise UserError(
            f"{where}: '{name}' has no configurations, so config_name '{config_name}' means nothing; leave it out"
        )


def _no_split(name: str, split: str, there: Iterable[str], where: str, cause: Exception | None = None) -> NoReturn:
    there = list(there)
    listed = ", ".join(f"'{key}'" for key in there) or "none"
    near, split = hint(split, there), short(split)
    raise UserError(f"{where}: '{name}' has no split '{split}'; it has {listed}{near}") from cause


def _bad_split(name: str, split: str, where: str, cause: Exception | None = None) -> NoReturn:
    raise UserError(
        f"{where}: cannot read the split '{short(split)}' of '{name}'; allowed: a name, a slice such as "
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
