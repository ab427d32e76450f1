"""What the parent says of the training rows, computed once and kept on the disk, for a student that it does not fit
beside.

A cache is a folder of raw little-endian arrays, mapped into memory:

    manifest.json   what it was made of, k, counts, the size and SHA-256 of each file; a folder without it is none
    keys.bin        uint8 [rows, 16]: what tells a row: BLAKE2b of its tokens, labels and documents
    ends.bin        int64 [rows]: where a row's positions end; they begin where those of the row before end
    ids.bin         int32 [positions, k]: the likeliest tokens, the likeliest first
    logprobs.bin    float16 [positions, k]: the natural logarithms of their probabilities

The mass of all other tokens is what is missing to 1. Positions are those whose next token counts for the loss: no
prompt, no padding, and in a packed row none whose next token begins another document. A row is looked up by what is
in it, so it may be shuffled, sharded and collated in any way, and rows that are alike are stored once.

While it is being made the folder is called NAME.partial. What `progress.json` there notes is on the disk for certain;
the rest of it is done again by the next start, and the finished files are the same to the byte.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from torch import Tensor

from hqqplus.errors import UserError
from hqqplus.files import check_output, check_space, full_disk, locked_folder, move_folder, write_json
from hqqplus.progress import WorkProgress
from hqqplus.recovery.distillation import Head, TopTargets
from hqqplus.recovery.identity import Identity
from hqqplus.recovery.rows import KEY_BYTES, Row, Survey, iterate
from hqqplus.recovery.teacher import OnlineTeacher
from hqqplus.untrusted import check_link, read_json

MANIFEST, PROGRESS = "manifest.json", "progress.json"
_FORMAT = 1
_FILES = ("keys.bin", "ends.bin", "ids.bin", "logprobs.bin")
# What the collator adds to a batch.
IDS, LOG_PROBS = "teacher_ids", "teacher_log_probs"
# Tokens of rows that are worked on together, and of documents of like length that go through the parent together.
_BLOCK_TOKENS, _BATCH_TOKENS = 2**16, 2**13
# Logits that are held in float32 at a time: 64 MiB.
_CHUNK_ELEMENTS = 2**24
# Between two notes of how far it is. Each of them waits for the disk.
_NOTE_SECONDS = 20.0
# float16 has nothing below; the probability is 0 in any case.
_LEAST = -65504.0


# Reading -------------------------------------------------------------------------------------------------------------


class TeacherCache:
    """A finished cache. Opened by `TeacherCache.open` or `build_cache`.

    It may be sent to other processes: the files are mapped where they are first read.

    Attributes:
        k: tokens a position. vocabulary: tokens there are. rows, positions: how many are stored.
    """

    has_hidden = False

    def __init__(self, folder: Path, manifest: Mapping[str, Any], where: str = "distillation") -> None:
        self.folder, self.where, self._manifest = folder, where, dict(manifest)
        self.k, self.vocabulary = int(manifest["k"]), int(manifest["vocabulary"])
        self.rows, self.positions = int(manifest["rows"]), int(manifest["positions"])
        self._mapped: _Mapped | None = None

    @classmethod
    def open(
        cls, folder: str | Path, identity: Identity | None = None, *, verify: bool = True, where: str = "distillation"
    ) -> TeacherCache:
        """The cache in `folder`.

        Args:
            identity: what it has to be made of; None takes any.
            verify: read all of it and compare it with the hashes in the manifest; else sizes alone are compared.

        Raises:
            UserError: if it is none, is damaged, or was made of something else (and of what).
        """
        folder = Path(folder)
        advice = "delete the folder, and it will be made anew"
        try:
            manifest = read_json(folder / MANIFEST)
            if manifest["format"] != _FORMAT:
                raise UserError(f"{where}: {folder}: this cache has another format: {advice}")
            made_of, files = Identity(**manifest["identity"]), manifest["files"]
            _check_counts(manifest)
            cache = cls(folder, manifest, where)
        except OSError:
            raise UserError(f"{where}: {folder}: there is no cache of a teacher (no {MANIFEST}): {advice}") from None
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{where}: {folder}: {MANIFEST} is damaged: {advice}") from None
        if identity is not None and (changes := identity.differences(made_of)):
            raise UserError(
                f"{where}: {folder}: this cache is of {' and '.join(changes)}: name another folder, or {advice}"
            )
        for name in _FILES:
            path = folder / name
            check_link(folder, path)
            if not path.is_file() or path.stat().st_size != files[name]["size"]:
                raise UserError(f"{where}: {folder}: {name} is not as long as it was written: {advice}")
            if verify and _sha256(path) != files[name]["sha256"]:
                raise UserError(f"{where}: {folder}: {name} is damaged (its SHA-256 is another one): {advice}")
        return cache

    def lookup(self, example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """ids [n, k] int32 and log-probabilities [n, k] float16 of the n predicted tokens of a row, in order.

        Raises:
            UserError: if the row is not in the cache.
        """
        if self._mapped is None:
            self._mapped = _Mapped(self.folder, self.rows, self.positions, self.k)
            if not self._mapped.is_sound():
                raise UserError(
                    f"{self.where}: {self.folder}: its files do not belong together: delete the folder, and it will "
                    "be made anew"
                )
        found = self._mapped.find(Row.of(example).key)
        if found is None:
            raise UserError(
                f"{self.where}: {self.folder}: a training row is not in this cache: delete the folder, and it will be "
                "made anew"
            )
        return self._mapped.ids[found], self._mapped.log_probs[found]

    def collator(self, collate: Callable[[list[Any]], dict[str, Any]]) -> Collator:
        """`collate`, which also puts the targets of the batch into it."""
        return Collator(self, collate)

    def targets(self, inputs: dict[str, Any]) -> TopTargets:
        """The targets that the collator put into a batch; they are taken out of it."""
        return TopTargets(inputs.pop(IDS), inputs.pop(LOG_PROBS))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}


class Collator:
    """A trainer's collator, and the targets of each batch: ids int32 and log-probabilities float16, both [n, k]."""

    def __init__(self, cache: TeacherCache, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.cache, self.collate = cache, collate

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        found = [self.cache.lookup(example) for example in examples]
        batch = dict(self.collate(examples))
        for name, parts in zip((IDS, LOG_PROBS), zip(*found, strict=True), strict=True):
            batch[name] = torch.from_numpy(np.concatenate(parts))
        return batch


class _Mapped:
    """The files of a cache in memory, mapped where they are large."""

    def __init__(self, folder: Path, rows: int, positions: int, k: int) -> None:
        keys = np.fromfile(folder / "keys.bin", dtype=">u8").reshape(rows, 2)
        self._ends = np.fromfile(folder / "ends.bin", dtype="<i8")
        self._order = np.argsort(keys[:, 0], kind="stable")
        self._first, self._second = keys[self._order].astype(np.uint64).T
        self.ids = np.memmap(folder / "ids.bin", dtype="<i4", mode="r", shape=(positions, k))
        self.log_probs = np.memmap(folder / "logprobs.bin", dtype="<f2", mode="r", shape=(positions, k))

    def is_sound(self) -> bool:
        """Whether rows end where others begin, and the last of them with the file."""
        return bool((np.diff(self._ends, prepend=0) >= 0).all()) and int(self._ends[-1]) == len(self.ids)

    def find(self, key: bytes) -> slice | None:
        """The positions of the row of that key; None if there is no such row."""
        first, second = np.frombuffer(key, dtype=">u8").astype(np.uint64)
        place = int(np.searchsorted(self._first, first))
        while place < len(self._first) and self._first[place] == first:
            if self._second[place] == second:
                row = int(self._order[place])
                return slice(int(self._ends[row - 1]) if row else 0, int(self._ends[row]))
            place += 1
        return None


def _check_counts(manifest: Mapping[str, Any]) -> None:
    """Check that the counts of a manifest are some, and that the sizes of its files follow from them.

    Raises:
        ValueError, TypeError, KeyError: if not.
    """
    counts = [manifest[name] for name in ("k", "vocabulary", "rows", "positions")]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError("counts must be integers above 0")
    k, _, rows, positions = counts
    sizes = (KEY_BYTES * rows, 8 * rows, 4 * k * positions, 2 * k * positions)
    for name, size in zip(_FILES, sizes, strict=True):
        if manifest["files"][name]["size"] != size or not isinstance(manifest["files"][name]["sha256"], str):
            raise ValueError(f"the size of {name} does not follow from the counts")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Making --------------------------------------------------------------------------------------------------------------


def build_cache(
    folder: str | Path,
    rows: Any,
    teacher: OnlineTeacher,
    identity: Identity,
    *,
    k: int = 64,
    where: str = "distillation",
    quiet: bool = False,
    block_tokens: int = _BLOCK_TOKENS,
    batch_tokens: int = _BATCH_TOKENS,
    note_seconds: float = _NOTE_SECONDS,
) -> TeacherCache:
    """The cache of `rows` in `folder`: opened if it is there, made (or gone on with) if not. Of one process at a time.

    Args:
        rows: a `datasets.Dataset` of prepared rows: input_ids, labels and, where they are packed, seq_lengths.
        teacher: the parent. It sees each document alone, so nothing depends on how rows are packed.
        identity: what is put into the manifest and compared with what is there.
        k: tokens a position; all of them if the vocabulary is smaller. Takes 6 k bytes a position.
        block_tokens, batch_tokens: tokens of rows between two possible notes of progress, and in one batch.
        note_seconds: time between two notes.

    Raises:
        UserError: if the folder holds something else, the disk is full, or no token counts for the loss.
    """
    folder = Path(folder)
    if is_made(folder):
        return TeacherCache.open(folder, identity, where=where)
    check_output(folder, where)
    head = teacher.head
    k = min(k, head.weight.shape[0])
    survey = Survey.of(rows)
    if not survey.positions:
        raise UserError(f"{where}: no token of the training rows counts for the loss: there is nothing to learn")
    settings = {
        "k": k,
        "vocabulary": head.weight.shape[0],
        "block_tokens": block_tokens,
        "batch_tokens": batch_tokens,
    }
    partial = folder.with_name(f"{folder.name}.partial")
    with full_disk(partial, where, "make room and run it again: it goes on where it was"):
        partial.mkdir(parents=True, exist_ok=True)
        with locked_folder(partial, where), _Writer(partial, identity, settings, where) as writer:
            done = sum(path.stat().st_size for path in partial.iterdir())
            check_space(partial, survey.positions * k * 6 + survey.rows * (KEY_BYTES + 8) - done, where)
            with WorkProgress(survey.tokens, writer.tokens, quiet, "tokens", what="asking the teacher") as progress:
                for seen, block in _blocks(rows, writer.seen, writer.keys, block_tokens):
                    for row, (ids, log_probs) in zip(block, _top(block, teacher, head, k, batch_tokens), strict=True):
                        writer.add(row, ids, log_probs)
                    writer.seen = seen
                    writer.note(note_seconds)
                    progress.advance(sum(len(row.input_ids) for row in block))
            writer.finish(survey)
            move_folder(partial, folder)
    (folder / PROGRESS).unlink(missing_ok=True)
    return TeacherCache.open(folder, identity, verify=False, where=where)


def is_made(folder: Path) -> bool:
    """Whether `folder` is there. What a process that was killed in its last step left in it is removed."""
    if not folder.exists():
        return False
    (folder / PROGRESS).unlink(missing_ok=True)
    return True


def _blocks(rows: Any, seen: int, known: set[bytes], tokens: int) -> Iterator[tuple[int, list[Row]]]:
    """(rows of the data set looked at up to the end of the block, its new rows), from row `seen` on."""
    if seen >= len(rows):
        return  # All was done when it was killed, and `datasets` selects no empty range.
    block: list[Row] = []
    size, new, number = 0, set[bytes](), seen
    for number, row in enumerate(iterate(rows.select(range(seen, len(rows)))), start=seen + 1):
        if (key := row.key) in known or key in new:
            continue
        new.add(key)
        block.append(row)
        size += len(row.input_ids)
        if size >= tokens:
            yield number, block
            block, size, new = [], 0, set()
    if block:
        yield number, block


def _top(
    rows: list[Row], teacher: OnlineTeacher, head: Head, k: int, batch_tokens: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids [n, k], log-probabilities [n, k]) of the predicted tokens of each row."""
    shapes = [len(row.predicted) for row in rows]
    found = [(np.empty((n, k), np.int32), np.empty((n, k), np.float16)) for n in shapes]
    documents = [document for number, row in enumerate(rows) for document in _documents(number, row)]
    for batch in _batches(documents, batch_tokens):
        longest = len(batch[0].input_ids)
        ids = np.zeros((len(batch), longest), np.int64)
        mask = np.zeros_like(ids)
        for line, document in enumerate(batch):
            ids[line, : len(document.input_ids)] = document.input_ids
            mask[line, : len(document.input_ids)] = 1
        device = teacher.model.device
        inputs = {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
        hidden = teacher.hidden_states(inputs)  # [B, L, d]
        for line, document in enumerate(batch):
            top, log_probs = _top_of(hidden[line, torch.from_numpy(document.predicted - 1).to(device)], head, k)
            found[document.row][0][document.place] = top.to(torch.int32).cpu().numpy()
            found[document.row][1][document.place] = log_probs.clamp(min=_LEAST).half().cpu().numpy()
    return found


@torch.no_grad()
def _top_of(hidden: Tensor, head: Head, k: int) -> tuple[Tensor, Tensor]:
    """hidden [n, d] -> the k likeliest tokens [n, k], the likeliest first, and their log-probabilities in float32."""
    chunks = []
    for part in hidden.split(max(1, _CHUNK_ELEMENTS // head.weight.shape[0])):
        logits = head.logits(part)
        top = logits.topk(k, dim=-1)
        chunks.append((top.indices, top.values - logits.logsumexp(-1, keepdim=True)))
    ids, log_probs = zip(*chunks, strict=True)
    return torch.cat(ids), torch.cat(log_probs)


@dataclass(frozen=True, eq=False)
class _Document:
    """A document of row number `row`: its tokens, which of them are predicted, and where those are among the row's."""

    row: int
    input_ids: np.ndarray
    predicted: np.ndarray
    place: slice


def _documents(number: int, row: Row) -> Iterator[_Document]:
    """Those documents of a row of which something is predicted."""
    predicted = row.predicted
    for start, length in zip(row.starts, row.seq_lengths, strict=True):
        first, last = np.searchsorted(predicted, [start, start + length])
        if last > first:
            own = predicted[first:last] - start
            yield _Document(number, row.input_ids[start : start + length], own, slice(int(first), int(last)))


def _batches(documents: list[_Document], tokens: int) -> Iterator[list[_Document]]:
    """By falling length, so that little is padded; at most `tokens` tokens with the padding, or one document."""
    batch: list[_Document] = []
    for document in sorted(documents, key=lambda document: -len(document.input_ids)):
        if batch and (len(batch) + 1) * len(batch[0].input_ids) > tokens:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


class _Writer:
    """NAME.partial: files that grow, and a note of how far they are on the disk for certain.

    Attributes:
        seen: rows of the data set that are done. keys: of the rows that are written. tokens: in those rows.
    """

    def __init__(self, folder: Path, identity: Identity, settings: dict[str, Any], where: str) -> None:
        self._folder, self._identity, self._settings = folder, identity, settings
        noted = self._read(where)
        self.seen, self.tokens, self._end = noted["seen"], noted["tokens"], noted["positions"]
        self._sizes: dict[str, int] = noted["sizes"]
        self._noted = time.monotonic()
        self._files: dict[str, BinaryIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for name in _FILES:
            path = self._folder / name
            path.touch()
            # What was written after the last note may not be there in full.
            os.truncate(path, self._sizes.get(name, 0))
            self._files[name] = self._stack.enter_context(open(path, "ab"))
        stored = (self._folder / "keys.bin").read_bytes()
        self.keys = {stored[start : start + KEY_BYTES] for start in range(0, len(stored), KEY_BYTES)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, row: Row, ids: np.ndarray, log_probs: np.ndarray) -> None:
        """A row with its targets."""
        self._end += len(ids)
        self.tokens += len(row.input_ids)
        self.keys.add(row.key)
        arrays = (np.array([self._end], "<i8"), ids.astype("<i4"), log_probs.astype("<f2"))
        for name, part in zip(_FILES, (row.key, *(array.tobytes() for array in arrays)), strict=True):
            self._files[name].write(part)

    def note(self, seconds: float = 0.0) -> None:
        """Note how far it is, if that was `seconds` ago."""
        if time.monotonic() - self._noted < seconds:
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._sizes = {name: (self._folder / name).stat().st_size for name in _FILES}
        self._save()
        self._noted = time.monotonic()

    def finish(self, survey: Survey) -> None:
        """Write the manifest."""
        self.note()
        files = {
            name: {"size": size, "sha256": _sha256(self._folder / name)} for name, size in sorted(self._sizes.items())
        }
        manifest = {
            "format": _FORMAT,
            "identity": asdict(self._identity),
            "k": self._settings["k"],
            "vocabulary": self._settings["vocabulary"],
            "rows": survey.rows,
            "positions": self._end,
            "files": files,
        }
        write_json(self._folder / MANIFEST, manifest)

    def _save(self) -> None:
        progress = {
            "format": _FORMAT,
            "identity": asdict(self._identity),
            "settings": self._settings,
            "seen": self.seen,
            "tokens": self.tokens,
            "positions": self._end,
            "sizes": self._sizes,
        }
        write_json(self._folder / PROGRESS, progress)

    def _read(self, where: str) -> dict[str, Any]:
        """What an earlier start noted."""
        nothing: dict[str, Any] = {"seen": 0, "tokens": 0, "positions": 0, "sizes": {}}
        path, advice = self._folder / PROGRESS, "delete it, or name another folder"
        if not path.is_file():
            if any(item.name not in _FILES and item.name[0] != "." for item in self._folder.iterdir()):
                raise UserError(
                    f"{where}: {self._folder}: this folder is in the way, and no unfinished cache: {advice}"
                )
            return nothing
        try:
            noted = read_json(path)
            made_of, settings = Identity(**noted["identity"]), noted["settings"]
            counts = [*(noted[name] for name in ("seen", "tokens", "positions")), *noted["sizes"].values()]
            whole = noted["format"] == _FORMAT and isinstance(settings, dict)
            whole = whole and all(isinstance(count, int) and count >= 0 for count in counts)
            # Nothing is noted but what these files hold.
            whole = whole and noted["sizes"].keys() <= {*_FILES}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            whole = False
        if not whole:
            raise UserError(f"{where}: {self._folder}: {PROGRESS} is damaged: {advice}")
        changes = self._identity.differences(made_of)
        changes += [
            f"{key} {settings.get(key)}, not {value}"
            for key, value in self._settings.items()
            if settings.get(key) != value
        ]
        if changes:
            raise UserError(f"{where}: {self._folder}: an unfinished cache of {' and '.join(changes)}: {advice}")
        short = [n for n, size in noted["sizes"].items() if not self._is_as_long(n, size)]
        return nothing if short else noted

    def _is_as_long(self, name: str, size: int) -> bool:
        path = self._folder / name
        return path.is_file() and path.stat().st_size >= size
