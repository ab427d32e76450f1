"""Training rows that are read while they are trained on, again and again.

A trainer cannot tell where in a stream of unknown length it was: it skips the batches it has had, in the pass that it
believes to be in. So the passes are made here, and the trainer sees one that never ends. Skipping then leads to the
same row in the same pass, whatever was shuffled on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.utils.data
from datasets import Dataset, IterableDataset

from hqqplus.data_stream import (
    Streamed,
    StreamFault,
    local_files,
    plain_stream,
    read_fault,
    stream_rows,
    to_sft,
)
from hqqplus.errors import UserError
from hqqplus.recipe import Recipe
from hqqplus.recovery.rows import ROW_ID
from hqqplus.row_forms import RowForm, is_string

Say = Callable[[str], None]

WHERE = "data.path_or_name"
# Of an evaluation split that is streamed, so many documents are measured on.
EVALUATION_ROWS = 500
_COLUMNS = ("input_ids", "labels", "seq_lengths")


@dataclass(frozen=True)
class StreamedRows:
    """What is trained on, as a stream.

    Attributes:
        rows: one pass, as TRL wants rows before they are tokenized, with their `PLACE`.
        head: the first of them as a data set, without that.
        name: of the source, as the recipe has it.
    """

    rows: IterableDataset
    head: Dataset
    name: str


def stream_data(
    recipe: Recipe,
    tokenizer: Any,
    form: RowForm,
    eos: str | None,
    bos: str | None,
    held_out: tuple[float, int],
    say: Say,
) -> tuple[StreamedRows, list[str] | None, Callable[[], list[str]]]:
    """The training rows of a recipe that streams; the documents held out for evaluation, or None where the recipe
    names some elsewhere; and the documents at the beginning of the training rows.

    Args:
        held_out: the share of the beginning of the stream that is held out where no evaluation set is named, and how
            many rows it may be at most.

    Raises:
        UserError: for a file, split or column that is missing or wrong, as far as the beginning shows it.
    """
    section = recipe.data
    name = section.path_or_name

    def opened(split: str, where: str, most: int | None = None) -> Streamed:
        stream = stream_rows(name, split, section.config_name, where)
        stream, plain = plain_stream(stream, form, tokenizer, name, where)
        return Streamed.of(stream, plain, name, where, most=most)

    found = opened(section.split, WHERE)
    texts: list[str] | None = None
    count = 0
    if section.eval_path_or_name is None and section.eval_split is not None:
        other = opened(section.eval_split, "data.eval_split", EVALUATION_ROWS)
        texts = other.form.documents(other.part(0, EVALUATION_ROWS), tokenizer)
        if not other.whole:
            say(f"evaluation on the first {len(other.head):,} rows of the split '{section.eval_split}', a stream")
    elif section.eval_path_or_name is None:
        if len(found.head) < 2:
            raise UserError(f"{WHERE}: one row is too few to train on and to hold out from")
        count = min(max(1, int(len(found.head) * held_out[0])), held_out[1])
        texts = found.form.documents(found.part(0, count), tokenizer)
        say(
            f"no evaluation set named: the first {count:,} rows of the stream are held out (data.eval_path_or_name or "
            "data.eval_split)"
        )
    train = found.part(count, len(found.head))
    head = found.form.to_sft(train, eos, bos)
    if not found.whole:
        say(f"data.streaming: what looks at text before training sees the first {len(train):,} rows")
    rows = found.without(count)
    if section.shuffle_buffer > 1:
        rows = rows.shuffle(seed=recipe.seed, buffer_size=section.shuffle_buffer)
    text = [column for column in head.column_names if is_string(head.features[column])]
    return (
        StreamedRows(to_sft(rows, text, eos, bos), head, name),
        texts,
        lambda: found.form.documents(train, tokenizer),
    )


class EndlessRows(IterableDataset):
    """Prepared rows of a stream, pass after pass, each with the number `ROW_ID` that no other has.

    Every pass is shuffled in an order of its own, always the same. Each worker of a data loader reads the files that
    fall to it, so the order depends on how many workers there are; processes read the same, and take turns.

    Args:
        rows: one pass.
        name: of the source.
    """

    def __init__(self, rows: IterableDataset, name: str) -> None:
        # Only so that TRL and accelerate take it for what it is: the rows come from `__iter__`.
        super().__init__(rows._ex_iterable)
        self.rows, self.name = rows, name
        self._files = _stamps(name)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        own, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # A data set shares the number of its pass with its copies in other workers, who may be in another one.
        rows = self.rows.map(_same)
        number = turn = 0
        while True:
            self._check_files()
            rows.set_epoch(turn)
            before = number
            try:
                for row in rows:
                    yield {**{name: row[name] for name in _COLUMNS if name in row}, ROW_ID: number * workers + own}
                    number += 1
            except UserError:
                raise
            except Exception as error:
                raise read_fault(error, self.name, WHERE) from error
            if number == before:
                if own:
                    return  # fewer files than workers
                raise no_row(self.name)
            turn += 1

    def set_epoch(self, epoch: int) -> None:
        """The trainer's passes are none of ours."""

    @property
    def num_shards(self) -> int:
        """1, so that no process is given a part of the files: the rows would not depend on the seed alone."""
        return 1

    n_shards = num_shards

    @property
    def column_names(self) -> None:
        return None

    def _check_files(self) -> None:
        for path, before in self._files.items():
            now = _stamp(path)
            if now is None:
                raise StreamFault(f"{WHERE}: '{self.name}' has vanished while it was read (looked for {path})")
            if now != before:
                raise StreamFault(f"{WHERE}: '{self.name}' has changed while it was trained on ({path})")


def _same(row: dict[str, Any]) -> dict[str, Any]:
    return row


def no_row(name: str) -> StreamFault:
    """A stream whose rows are all empty or, where the recipe leaves those out, masked."""
    return StreamFault(f"{WHERE}: in all of '{name}' there is no row to train on")


def _stamps(name: str) -> dict[Path, tuple[int, int]]:
    return {path: stamp for path in local_files(name) if (stamp := _stamp(path)) is not None}


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size, and when it was last written."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
