"""How many tokens of the training rows the loss sees, and what becomes of rows in which it sees none.

A row without a supervised token (its prompt fills all of max_length, say) trains nothing, and a batch of such rows has
no loss at all. Nobody means that, so such rows are refused before training, or left out where the recipe says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hqqplus.data_stream import PLACE, StreamFault
from hqqplus.errors import UserError
from hqqplus.evaluation.report import visible
from hqqplus.recovery.distillation import IGNORED

MaskedRows = Literal["refuse", "drop"]

# Of each end of a text that is shown, so many characters.
_SHOWN = 200
# The same of an example, and the parts of it that are shown, masked ones and others in turn.
_SHOWN_OF_EXAMPLE, _PARTS = 80, 6
_OUT = "Give a larger data.max_length, or data.masked_rows: drop to leave such rows out"


@dataclass(frozen=True)
class Cut:
    """What is kept of a row when it is cut to `length` tokens: its beginning, or its end; None keeps all."""

    length: int | None = None
    end: bool = False

    @classmethod
    def of(cls, arguments: Any) -> Cut:
        """What TRL does under these arguments to rows that it does not split."""
        if arguments.packing:
            # Packing cuts off ends, or splits and loses nothing.
            return cls(arguments.max_length if arguments.packing_strategy == "bfd" else None)
        return cls(arguments.max_length, arguments.truncation_mode == "keep_end")

    def window(self, length: int) -> slice:
        if self.length is None or length <= self.length:
            return slice(0, length)
        return slice(length - self.length, length) if self.end else slice(0, self.length)


def supervised_tokens(rows: Any, cut: Cut = Cut()) -> tuple[np.ndarray, int]:
    """Tokens that the loss sees in each row of a data set, [n]; and the tokens that there are in all of them.

    Labels count that are not masked and have a token before them in their document: nothing predicts the first one.

    Args:
        rows: with the columns input_ids or labels, and perhaps seq_lengths, the lengths of its documents.
        cut: rows are seen as they are after it.
    """
    counts: list[int] = []
    tokens = 0
    column = "labels" if "labels" in rows.column_names else "input_ids"
    packed = "seq_lengths" in rows.column_names
    columns = rows.select_columns([column, "seq_lengths"] if packed else [column]).with_format("numpy")
    for batch in columns.iter(batch_size=1000):
        for number, labels in enumerate(batch[column]):
            seen = np.asarray(labels) != IGNORED
            if packed:
                lengths = np.asarray(batch["seq_lengths"][number])
                starts = (np.cumsum(lengths) - lengths).astype(int)
                seen = seen.copy()
                seen[starts[starts < len(seen)]] = False
            else:
                seen = seen[cut.window(len(seen))]
            tokens += len(seen)
            counts.append(int(np.count_nonzero(seen if packed else seen[1:])))
    return np.array(counts, dtype=np.int64), tokens


def settle_masked(rows: Any, tokenizer: Any, policy: MaskedRows, cut: Cut, say: Callable[[str], None]) -> Any:
    """The rows of a data set that have a supervised token after `cut`.

    Raises:
        UserError: if one has none and `policy` is to refuse them, or none has one.
    """
    counts, _ = supervised_tokens(rows, cut)
    masked = np.flatnonzero(counts == 0)
    if len(masked) == 0:
        return rows
    if policy == "refuse" or len(masked) == len(counts):
        number = int(masked[0])
        raise UserError(
            _refusal(f"{len(masked):,} of {len(counts):,} training rows have", number, rows, tokenizer, cut)
        )
    say(f"data.masked_rows: {len(masked):,} of {len(counts):,} training rows have no supervised token: left out")
    return rows.select(np.flatnonzero(counts))


def share(rows: Any, which: str = "") -> str:
    """How many tokens of the prepared `rows`, a data set, are supervised, in a line."""
    counts, tokens = supervised_tokens(rows)
    part = counts.sum() / tokens if tokens else 0.0
    return f"{counts.sum():,} of {tokens:,} tokens ({part:.1%}) in {which}{len(counts):,} training rows are supervised"


def example(rows: Any, tokenizer: Any, cut: Cut = Cut()) -> str:
    """How the first of the tokenized `rows` begins after `cut`, in a line: its first document, masked text in
    brackets."""
    row = rows[0]
    ids, labels = row["input_ids"], row["labels"] if "labels" in rows.column_names else row["input_ids"]
    window = slice(0, row["seq_lengths"][0]) if "seq_lengths" in rows.column_names else cut.window(len(ids))
    parts = list(_marked(ids[window], labels[window], tokenizer, _SHOWN_OF_EXAMPLE))
    text = "".join(parts[:_PARTS]) + (" ..." if len(parts) > _PARTS else "")
    line = visible(text).replace("\n", "\\n")
    return f"the first row, masked text in brackets: {line}"


class Guard:
    """The same for a stream, row by row: a filter for tokenized rows.

    Raises:
        StreamFault: when called with a row that has no supervised token, if `policy` is to refuse it.
    """

    def __init__(self, tokenizer: Any, policy: MaskedRows, cut: Cut) -> None:
        self.tokenizer, self.policy, self.cut = tokenizer, policy, cut

    def __call__(self, row: Mapping[str, Any]) -> bool:
        labels = row["labels"]
        if any(label != IGNORED for label in labels[self.cut.window(len(labels))][1:]):
            return True
        if self.policy == "refuse":
            place = row.get(PLACE)
            which = "a row" if place is None else f"row {place + 1}"
            raise StreamFault(f"data: {which} of the stream has {_because(row, self.tokenizer, self.cut)}. {_OUT}")
        return False


# Rows of messages in which nobody assists ----------------------------------------------------------------------------


class Assisted:
    """Whether the chat template marks a token of the assistant's in a row of messages: a filter for rows as they come.

    TRL's own answer to a row without is an error that does not say which. For a stream and `policy: refuse` the same
    one is raised here with the row in it.
    """

    def __init__(self, tokenizer: Any, template: str | None, policy: MaskedRows = "drop") -> None:
        self.tokenizer, self.template, self.policy = tokenizer, template, policy

    def __call__(self, row: Mapping[str, Any]) -> bool:
        if 1 in self._rendered(row)["assistant_masks"]:
            return True
        if self.policy == "refuse":
            raise StreamFault(f"data: row {row[PLACE] + 1} of the stream has {self.because(row)}. {_OUT}")
        return False

    def because(self, row: Mapping[str, Any]) -> str:
        text = self.tokenizer.decode(self._rendered(row)["input_ids"])
        return f"no supervised token: the chat template marks none as the assistant's in [{_ends(text)}]"

    def _rendered(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, return_dict=True, return_assistant_tokens_mask=True
        )


def settle_assisted(rows: Any, assisted: Assisted, policy: MaskedRows, say: Callable[[str], None]) -> Any:
    """The rows of a data set of messages in which the assistant says something.

    Raises:
        UserError: if it does not in one and `policy` is to refuse that, or in none.
    """
    kept = [number for number, row in enumerate(rows) if assisted(row)]
    missing = len(rows) - len(kept)
    if missing and (policy == "refuse" or not kept):
        number = next(iter(set(range(len(rows))) - set(kept)))
        raise UserError(
            f"data: {missing:,} of {len(rows):,} training rows have no supervised token: row {number + 1} has "
            f"{assisted.because(rows[number])}. Mend the template or the rows, or give data.masked_rows: drop to "
            "leave such rows out"
        )
    if missing:
        say(f"data.masked_rows: {missing:,} of {len(rows):,} training rows have no supervised token: left out")
    return rows.select(kept) if missing else rows


# In words ------------------------------------------------------------------------------------------------------------


def _refusal(how_many: str, number: int, rows: Any, tokenizer: Any, cut: Cut) -> str:
    return (
        f"data: {how_many} no supervised token: row {number + 1} has {_because(rows[number], tokenizer, cut)}. {_OUT}"
    )


def _because(row: Mapping[str, Any], tokenizer: Any, cut: Cut) -> str:
    """Why a row has none, and the row: masked tokens in brackets."""
    ids, labels = list(row["input_ids"]), list(row["labels"] if "labels" in row else row["input_ids"])
    window = cut.window(len(ids))
    text = "".join(_marked(ids[window], labels[window], tokenizer))
    if len(ids[window]) < 2:
        return f"no supervised token: it is a single token, and nothing comes before it to predict it from: {text!r}"
    if any(label != IGNORED for label in labels[1:]):
        lost = tokenizer.decode(ids[window.stop :] if not cut.end else ids[: window.start])
        return (
            f"no supervised token within data.max_length ({cut.length:,} tokens of its {len(ids):,}): masked, in "
            f"brackets: {text}, cut off: {_ends(lost)!r}"
        )
    return f"no supervised token: every one that follows another is masked, in brackets: {text}"


def _marked(ids: list[int], labels: list[int], tokenizer: Any, shown: int = _SHOWN) -> Iterator[str]:
    """Runs of tokens, decoded; masked ones in brackets."""
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            text = _ends(tokenizer.decode(ids[start:end]), shown)
            yield f"[{text}]" if labels[start] == IGNORED else text
            start = end


def _ends(text: str, shown: int = _SHOWN) -> str:
    return text if len(text) <= 2 * shown else f"{text[:shown]} ... {text[-shown:]}"
