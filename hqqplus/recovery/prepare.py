"""From the rows of a recipe to those that a trainer takes: tokens and labels, cut or packed, each with a number."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from jinja2 import TemplateError

from hqqplus.data_stream import read_fault
from hqqplus.errors import UserError
from hqqplus.integrations.chat_templates import training_template
from hqqplus.integrations.trl import prepare_rows
from hqqplus.progress import WorkProgress, without_bars_of_libraries
from hqqplus.recovery.row_cache import Kept, RowCache, row_key
from hqqplus.recovery.rows import add_row_ids
from hqqplus.recovery.streamed import WHERE, EndlessRows, StreamedRows, no_row
from hqqplus.recovery.supervision import (
    Assisted,
    Cut,
    Guard,
    MaskedRows,
    example,
    settle_assisted,
    settle_masked,
    share,
)

# Rows that are tokenized, or cut, between two signs of progress: at least so many, more where there are processes to
# start for each, and always whole batches of those that TRL packs.
_PIECE, _PIECE_OF_PROCESSES, _BATCH, _MOST_PIECES = 2000, 50_000, 1000, 100


@dataclass(frozen=True)
class Keeping:
    """Where prepared rows are kept, and what the rows that they are made of are told by (`contents_sha256`)."""

    cache: RowCache
    contents: str


@dataclass(frozen=True)
class Preparation:
    """How rows are prepared.

    Attributes:
        arguments: of the trainer (`SFTConfig`); whether they pack is settled.
        masked: what becomes of rows without a supervised token.
        keeping: where they are looked for first, and kept; None for nowhere.
        noted: what was said about rows that are left out.
    """

    tokenizer: Any
    arguments: Any
    masked: MaskedRows
    say: Callable[[str], None]
    keeping: Keeping | None = None
    noted: list[str] = field(default_factory=list)

    def of(self, rows: Any, tokenized: Any = None) -> Any:
        """The rows that are trained on, with their `ROW_ID`: a data set, or `EndlessRows` of a stream.

        Args:
            tokenized: the same rows as `tokenized` gives them, where that was done before.

        Raises:
            UserError: if a row has no supervised token and such rows are not to be left out; or if the cache of
                `datasets` is not there any more, or full.
        """
        if isinstance(rows, StreamedRows):
            return self._stream(rows, self.tokenized(rows).head if tokenized is None else tokenized.head)
        kept = self._open()
        if kept is not None:
            for line in kept.said:
                self.say(line)
            self._show(kept.rows)
            return add_row_ids(kept.rows)
        try:
            made = self._rows(self.tokenized(rows) if tokenized is None else tokenized)
            if self._key is not None and self.keeping is not None and PartialState().is_local_main_process:
                self.keeping.cache.keep(self._key, made, self.noted)
            return add_row_ids(made)
        except OSError as error:
            raise _no_cache(error) from error

    def is_kept(self, rows: Any) -> bool:
        """Whether `of` will find the rows prepared, if nothing happens to them until then."""
        if self._key is None or self.keeping is None or isinstance(rows, StreamedRows):
            return False
        return _all(self.keeping.cache.has(self._key))

    def tokenized(self, rows: Any) -> Any:
        """The rows with tokens and labels, not yet cut or packed, which `of` takes too. Of a stream, its beginning.

        So what is wrong with rows is found out before there is a model.

        Raises:
            UserError: as `of`.
        """
        if isinstance(rows, StreamedRows):
            return replace(rows, head=self.tokenized(rows.head))
        try:
            found = self._prepared(rows, self._uncut, "tokenizing")
        except RuntimeError as error:
            # TRL's refusal of rows in which the assistant says nothing; it does not say which they are.
            if not self._assistant_only(rows) or "assistant" not in str(error):
                raise
            rows = settle_assisted(rows, self._assisted("drop"), self.masked, self._note)
            found = self._prepared(rows, self._uncut, "tokenizing")
        except TemplateError as error:
            raise self._refused(rows, error) from error
        except OSError as error:
            raise _no_cache(error) from error
        return settle_masked(found, self.tokenizer, self.masked, Cut.of(self.arguments), self._note)

    def _rows(self, tokenized: Any, which: str = "") -> Any:
        rows = self._prepared(tokenized, self.arguments, "packing" if self.arguments.packing else "cutting")
        # A packing that splits documents may leave one with the masked part of them.
        rows = settle_masked(rows, self.tokenizer, self.masked, Cut(), self._note)
        self._show(rows, which)
        return rows

    def _prepared(self, rows: Any, arguments: Any, what: str) -> Any:
        """`prepare_rows`, piece by piece, which comes to the same: a batch that is packed lies in one piece."""
        from datasets import concatenate_datasets

        size = max(_PIECE_OF_PROCESSES if (arguments.dataset_num_proc or 1) > 1 else _PIECE, len(rows) // _MOST_PIECES)
        size = math.ceil(size / _BATCH) * _BATCH
        if arguments.shuffle_dataset:
            size = max(size, len(rows))
        pieces = []
        with WorkProgress(len(rows), unit="rows", what=what) as progress, without_bars_of_libraries():
            for start in range(0, len(rows), size):
                piece = rows.select(range(start, min(start + size, len(rows)))) if size < len(rows) else rows
                pieces.append(prepare_rows(piece, self.tokenizer, arguments))
                progress.advance(len(piece))
        return pieces[0] if len(pieces) == 1 else concatenate_datasets(pieces)

    def _refused(self, rows: Any, error: TemplateError) -> UserError:
        """Which row the chat template refuses."""
        for number, row in enumerate(rows, start=1):
            messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
            try:
                self.tokenizer.apply_chat_template(messages, tokenize=False)
            except TemplateError as own:
                return UserError(f"data: the tokenizer's chat template refuses the messages of row {number}: {own}")
        return UserError(f"data: the tokenizer's chat template refuses messages of the training rows: {error}")

    def _note(self, text: str) -> None:
        self.noted.append(text)
        self.say(text)

    def _show(self, rows: Any, which: str = "") -> None:
        self.say(f"data: {share(rows, which)}")
        self.say(f"data: {example(rows, self.tokenizer)}")

    @cached_property
    def _key(self) -> str | None:
        if self.keeping is None:
            return None
        return row_key(self.keeping.contents, self.tokenizer, self.arguments, self.masked)

    def _open(self) -> Kept | None:
        """The rows that are kept, if every process finds them: preparing them takes all of them together."""
        if self._key is None or self.keeping is None:
            return None
        kept = self.keeping.cache.open(self._key)
        return kept if _all(kept is not None) else None

    def _stream(self, train: StreamedRows, head: Any) -> EndlessRows:
        # What is wrong with the beginning is said before training, and with numbers.
        self._rows(head, "the first ")
        rows = train.rows
        if self._assistant_only(train.head):
            rows = rows.filter(self._assisted(self.masked))
        try:
            # TRL looks at the first row before each of its steps.
            rows = prepare_rows(rows, self.tokenizer, self._uncut)
            rows = rows.filter(Guard(self.tokenizer, self.masked, Cut.of(self.arguments)))
            rows = prepare_rows(rows, self.tokenizer, self.arguments)
        except UserError:
            raise
        except StopIteration:
            raise no_row(train.name) from None
        except Exception as error:
            raise read_fault(error, train.name, WHERE) from error
        return EndlessRows(rows.filter(Guard(self.tokenizer, self.masked, Cut())), train.name)

    @cached_property
    def _uncut(self) -> Any:
        """The arguments with which rows are tokenized and no more."""
        changed = copy.copy(self.arguments)
        changed.max_length, changed.packing, changed.shuffle_dataset = None, False, False
        return changed

    def _assistant_only(self, rows: Any) -> bool:
        first = next(iter(rows))
        return bool(self.arguments.assistant_only_loss) and isinstance(
            first.get("messages", first.get("prompt")), list
        )

    def _assisted(self, masked: MaskedRows) -> Assisted:
        return Assisted(self.tokenizer, training_template(self.tokenizer), masked)


def _all(here: bool) -> bool:
    """Whether it is so in every process."""
    if PartialState().num_processes == 1:
        return here
    return all(gather_object([here]))


def _no_cache(error: OSError) -> UserError:
    return UserError(
        "data: the training rows cannot be prepared, because the cache of datasets (HF_DATASETS_CACHE) cannot be "
        f"written or read: {error}"
    )
