"""Training rows as a collator gets them: what tells one from another, and which of their tokens are predicted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hqqplus.recovery.distillation import IGNORED

KEY_BYTES = 16


@dataclass(frozen=True, eq=False)
class Row:
    """A training row as the trainer's collator gets it: tokens [L], labels [L], and the lengths of its documents."""

    input_ids: np.ndarray
    labels: np.ndarray
    seq_lengths: np.ndarray

    @classmethod
    def of(cls, example: Mapping[str, Any]) -> Row:
        """Without labels every token counts; without `seq_lengths` the row is one document.

        Raises:
            ValueError: if the lengths disagree.
        """
        ids = np.asarray(example["input_ids"], dtype=np.int32)
        labels = np.asarray(example["labels"], dtype=np.int32) if "labels" in example else ids
        lengths = np.asarray(example.get("seq_lengths", [len(ids)]), dtype=np.int64)
        if len(labels) != len(ids) or lengths.sum() != len(ids):
            raise ValueError(f"a row of {len(ids)} tokens, {len(labels)} labels, documents of {lengths.tolist()}")
        return cls(ids, labels, lengths)

    @property
    def key(self) -> bytes:
        """16 bytes that no other row has."""
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        for part in (np.array([len(self.input_ids)]), self.input_ids, self.labels, self.seq_lengths):
            digest.update(part.astype(part.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.digest()

    @property
    def starts(self) -> np.ndarray:
        """Where its documents begin."""
        return np.cumsum(self.seq_lengths) - self.seq_lengths

    @property
    def predicted(self) -> np.ndarray:
        """Which tokens [n] are predicted: those that count and have one before them in their document, ascending."""
        counts = self.labels != IGNORED
        counts[self.starts[self.starts < len(counts)]] = False
        return np.flatnonzero(counts)


def iterate(rows: Any) -> Iterator[Row]:
    """The rows of a `datasets.Dataset` with the columns input_ids, labels and perhaps seq_lengths."""
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in rows.column_names]
    for batch in rows.select_columns(columns).with_format("numpy").iter(batch_size=256):
        for values in zip(*batch.values(), strict=True):
            yield Row.of(dict(zip(batch, values, strict=True)))


@dataclass(frozen=True)
class Survey:
    """Different rows, the tokens in them and those predicted; `digest` is of the rows, whatever their order."""

    digest: str
    rows: int
    tokens: int
    positions: int

    @classmethod
    def of(cls, rows: Any) -> Survey:
        keys: set[bytes] = set()
        tokens = positions = 0
        for row in iterate(rows):
            if (key := row.key) not in keys:
                keys.add(key)
                tokens += len(row.input_ids)
                positions += len(row.predicted)
        # Sorted: the order of the rows does not matter.
        return cls(digest_of(sorted(keys)), len(keys), tokens, positions)


def digest_of(parts: Iterable[bytes]) -> str:
    """A digest of byte strings, one after the other."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
