"""Training rows as a collator gets them: what tells one from another, and which of their tokens are predicted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hqqplus.digests import KEY_BYTES, digest_of
from hqqplus.integrations.safekeeping import ROW_ID
from hqqplus.recovery.distillation import IGNORED

# Of the text of a row that is told from others by it, so many characters, and the tokens that surely hold as many.
_SHOWN, _SHOWN_TOKENS = 80, 100


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


def add_row_ids(rows: Any) -> Any:
    """A data set of prepared rows with the column `ROW_ID`, so that a batch can be traced back to its rows."""
    if ROW_ID in rows.column_names:
        rows = rows.remove_columns(ROW_ID)
    return rows.add_column(ROW_ID, np.arange(len(rows)))


def describe_rows(
    rows: Any, ids: Sequence[int], tokenizer: Any, tokens: Mapping[int, Sequence[int]] | None = None
) -> str:
    """Which prepared rows `ids` are, in one line: their number among them, and how their text begins.

    Args:
        rows: as they were handed to the trainer, with their `ROW_ID`; a data set or a stream.
        tokens: id -> its token ids, or the first of them. A row of a stream can be looked up in no other way, and is
            only numbered without.
    """
    from datasets import IterableDataset

    streamed = isinstance(rows, IterableDataset)
    lines = []
    for number in ids:
        found = (tokens or {}).get(number)
        # An id that a data set does not have comes from elsewhere.
        if found is None and not streamed and 0 <= number < len(rows):
            found = rows[int(number)]["input_ids"]
        where = f"row {number} of the stream" if streamed else f"row {number} of {len(rows):,}"
        text = "" if found is None else f": {tokenizer.decode(list(found[:_SHOWN_TOKENS]))[:_SHOWN]!r}"
        lines.append(where + text)
    return "; ".join(lines)
