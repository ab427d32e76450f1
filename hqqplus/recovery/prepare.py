"""From the rows of a recipe to those that a trainer takes: tokens and labels, cut or packed, each with a number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hqqplus.data_stream import read_fault
from hqqplus.errors import UserError
from hqqplus.integrations.chat_templates import training_template
from hqqplus.integrations.trl import prepare_rows
from hqqplus.recovery.rows import add_row_ids
from hqqplus.recovery.streamed import WHERE, EndlessRows, StreamedRows, no_row
from hqqplus.recovery.supervision import Assisted, Cut, Guard, MaskedRows, settle_assisted, settle_masked, share


@dataclass(frozen=True)
class Preparation:
    """How rows are prepared.

    Attributes:
        arguments: of the trainer (`SFTConfig`); whether they pack is settled.
        masked: what becomes of rows without a supervised token.
    """

    tokenizer: Any
    arguments: Any
    masked: MaskedRows
    say: Callable[[str], None]

    def of(self, rows: Any) -> Any:
        """The rows that are trained on, with their `ROW_ID`: a data set, or `EndlessRows` of a stream.

        Raises:
            UserError: if a row has no supervised token and such rows are not to be left out; or if the cache of
                `datasets` is not there any more, or full.
        """
        if isinstance(rows, StreamedRows):
            return self._stream(rows)
        try:
            return add_row_ids(self._rows(rows))
        except OSError as error:
            raise _no_cache(error) from error

    def tokenized(self, rows: Any) -> Any:
        """The rows with tokens and labels, not yet cut or packed, which `of` takes too. Of a stream, its beginning.

        So what is wrong with rows is found out before there is a model.

        Raises:
            UserError: as `of`.
        """
        if isinstance(rows, StreamedRows):
            return replace(rows, head=self.tokenized(rows.head))
        try:
            found = prepare_rows(rows, self.tokenizer, self._uncut)
        except RuntimeError as error:
            # TRL's refusal of rows in which the assistant says nothing; it does not say which they are.
            if not self._assistant_only(rows) or "assistant" not in str(error):
                raise
            rows = settle_assisted(rows, self._assisted("drop"), self.masked, self.say)
            found = prepare_rows(rows, self.tokenizer, self._uncut)
        except OSError as error:
            raise _no_cache(error) from error
        return settle_masked(found, self.tokenizer, self.masked, Cut.of(self.arguments), self.say)

    def _rows(self, rows: Any, which: str = "") -> Any:
        rows = prepare_rows(self.tokenized(rows), self.tokenizer, self.arguments)
        # A packing that splits documents may leave one with the masked part of them.
        rows = settle_masked(rows, self.tokenizer, self.masked, Cut(), self.say)
        self.say(f"data: {share(rows, which)}")
        return rows

    def _stream(self, train: StreamedRows) -> EndlessRows:
        # What is wrong with the beginning is said before training, and with numbers.
        self._rows(train.head, "the first ")
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


def _no_cache(error: OSError) -> UserError:
    return UserError(
        "data: the training rows cannot be prepared, because the cache of datasets (HF_DATASETS_CACHE) cannot be "
        f"written or read: {error}"
    )
