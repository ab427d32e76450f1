"""Prepared rows, kept for the next start under a name that says all that they were made of.

A folder of the cache is named by the SHA-256 of the rows' contents, of the tokenizer and its chat template, of the
settings that a preparation reads, and of the versions of the libraries that do it. So there is nothing to compare: of
another tokenizer, or of a file that was changed under its old name, there is another folder, or none yet.

    rows/            a data set as `datasets` saves it, mapped into memory when it is read
    manifest.json    size and SHA-256 of each file in it, and what was said of the rows; a folder without it is none

A folder is filled under another name and then renamed, so several processes may make the same one at once. What is not
as it was written is made anew. Nothing is ever removed that another run may be reading: the whole cache may be
deleted while none is at work.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqplus.digests import template_digest, text_digest, tokenizer_digest
from hqqplus.files import write_json
from hqqplus.progress import WorkProgress
from hqqplus.untrusted import read_json

PREPARATION_VERSION = 1
"""To be raised with every change of hqqplus that changes prepared rows."""
MANIFEST, ROWS = "manifest.json", "rows"
READ_SETTINGS = (
    "assistant_only_loss", "chat_template_path", "completion_only_loss", "dataset_kwargs", "dataset_text_field",
    "eos_token", "max_length", "packing", "packing_strategy", "seed", "shuffle_dataset", "truncation_mode",
)  # fmt: skip
"""What a preparation reads of the trainer's settings, and changes the rows by."""
_LIBRARIES = ("trl", "transformers", "tokenizers", "datasets")
_PROBES = ("Hello, world!", " two  spaces\n\tand a tab", "naïve café – Straße 42 日本語 🙂", "<s>[INST] x </s>")
_CHUNK = 2**22
# A folder that a killed process left half filled is removed after so many seconds: by then nobody fills it.
_STALE_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Kept:
    """Prepared rows, and what was said while they were made."""

    rows: Any
    said: tuple[str, ...]


class RowCache:
    """A folder of prepared rows.

    Args:
        folder: made when the first rows are kept.
        say: is told where rows are taken from, and why they could not be kept.
    """

    def __init__(self, folder: str | Path, say: Callable[[str], None]) -> None:
        self.folder, self._say = Path(folder).expanduser(), say

    def has(self, key: str) -> bool:
        """Whether there are rows of this key, damaged perhaps."""
        return (self.folder / key / MANIFEST).is_file()

    def open(self, key: str) -> Kept | None:
        """The rows of this key; None where there are none, or they are not as they were written."""
        from datasets import load_from_disk

        place = self.folder / key
        if not place.exists():
            return None
        try:
            manifest = read_json(place / MANIFEST)
            files, said = manifest["files"], tuple(str(line) for line in manifest["said"])
        except (OSError, ValueError, KeyError, TypeError):
            files, said = {}, ()
        try:
            if _described(place / ROWS) == files:
                return Kept(load_from_disk(str(place / ROWS)), said)
        except Exception:
            # Whatever it is: what cannot be read is made anew.
            pass
        self._say(f"data.cache: {place} is damaged: the rows are prepared anew")
        shutil.rmtree(place, ignore_errors=True)
        return None

    def keep(self, key: str, rows: Any, said: Iterable[str] = ()) -> None:
        """Keep `rows` under `key`. What goes wrong is said and no more: the rows are there all the same."""
        place = self.folder / key
        aside = place.with_name(f".{key}.{secrets.randbelow(10**12)}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_rest()
            rows.save_to_disk(str(aside / ROWS))
            write_json(aside / MANIFEST, {"files": _described(aside / ROWS), "said": list(said)})
            if not (place / MANIFEST).is_file():
                aside.rename(place)
        except OSError as error:
            if not (place / MANIFEST).is_file():  # else another process was faster
                reason = error.strerror or type(error).__name__
                self._say(f"data.cache: the prepared rows are not kept in {self.folder}: {reason}")
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _remove_rest(self) -> None:
        for path in self.folder.glob(".*.tmp"):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def row_key(contents: str, tokenizer: Any, arguments: Any, masked: str) -> str | None:
    """What tells rows that were prepared in this way from all others: 64 hexadecimal digits. None where that is not
    known: a tokenizer that is written in Python may depend on anything.

    Args:
        contents: of the rows before they are prepared, as `contents_sha256` tells them.
        tokenizer: with the chat template that is used.
        arguments: of the trainer, with `packing` as it is settled.
        masked: what becomes of rows without a supervised token.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    made_of = {
        "version": PREPARATION_VERSION,
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "tokenizer": [
            type(tokenizer).__name__,
            tokenizer_digest(tokenizer),
            template_digest(tokenizer),
            bool(getattr(tokenizer, "split_special_tokens", False)),
            [tokenizer(probe)["input_ids"] for probe in _PROBES],
        ],
        # Of a chat template's file the path says nothing: what was in it is in the template's digest.
        "settings": {name: getattr(arguments, name) for name in READ_SETTINGS if name != "chat_template_path"},
        "masked": masked,
        "rows": contents,
    }
    text = json.dumps(made_of, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def contents_sha256(rows: Any) -> str:
    """A SHA-256 of the columns of a data set, their types and all that is in them, row by row in their order."""
    import pyarrow

    digest = hashlib.sha256(text_digest([str(rows.features), len(rows)]).encode())
    with WorkProgress(len(rows), unit="rows", what="hashing the rows") as progress:
        for table in rows.with_format("arrow").iter(batch_size=1000):
            # A copy: how it was cut into pieces before leaves traces in what is no copy.
            table = table.take(pyarrow.array(range(table.num_rows))).combine_chunks()
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
                stream.write_table(table.replace_schema_metadata(None))
            digest.update(sink.getvalue())
            progress.advance(table.num_rows)
    return digest.hexdigest()


def _described(folder: Path) -> Mapping[str, Any]:
    """File -> its size and SHA-256."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path: path.stat().st_size for path in paths}
    found = {}
    with WorkProgress(sum(sizes.values()), unit="bytes", what="checking the prepared rows") as progress:
        for path in paths:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while piece := file.read(_CHUNK):
                    digest.update(piece)
                    progress.advance(len(piece))
            name = path.relative_to(folder).as_posix()
            found[name] = {"size": sizes[path], "sha256": digest.hexdigest()}
    return found


def default_folder() -> Path:
    """Beside the cache of `datasets`, whose rows these are made of."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "hqqplus_rows"
