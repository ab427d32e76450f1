"""Rows in which the loss sees no token: found, counted, shown, refused or left out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from hqqplus.data_stream import PLACE, StreamFault
from hqqplus.errors import UserError
from hqqplus.integrations.trl import sft_config
from hqqplus.recovery.prepare import Preparation
from hqqplus.recovery.rows import ROW_ID, Survey, add_row_ids, describe_rows, iterate
from hqqplus.recovery.streamed import StreamedRows
from hqqplus.recovery.supervision import Cut, share, supervised_tokens

# Marks what the assistant says, as TRL asks for it.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def preparation(tokenizer: Any, tmp_path: Path, said: list[str]) -> Callable[..., Preparation]:
    def make(masked: Any = "refuse", **settings: Any) -> Preparation:
        values = {"output_dir": str(tmp_path), "max_length": 16, "use_cpu": True, "bf16": False, **settings}
        return Preparation(tokenizer, sft_config(values, "test"), masked, said.append)

    return make


def pairs(*lengths: tuple[int, int]) -> Dataset:
    """Prompts and completions of so many letters."""
    return Dataset.from_dict({"prompt": ["p" * n for n, _ in lengths], "completion": ["c" * n for _, n in lengths]})


def streamed(rows: Dataset) -> StreamedRows:
    placed = rows.add_column(PLACE, list(range(len(rows))))
    return StreamedRows(placed.to_iterable_dataset(), rows.select(range(1)), "embedded:test")


# Counting ------------------------------------------------------------------------------------------------------------


def test_what_counts_is_what_is_predicted() -> None:
    rows = Dataset.from_dict(
        {"input_ids": [[1, 2, 3, 4], [1, 2, 3], [5]], "labels": [[1, -100, 3, 4], [-100, -100, 3], [5]]}
    )
    counts, tokens = supervised_tokens(rows)
    assert (counts.tolist(), tokens) == ([2, 1, 0], 8)
    # The last two tokens are cut off; or the first two.
    assert supervised_tokens(rows, Cut(2))[0].tolist() == [0, 0, 0]
    assert supervised_tokens(rows, Cut(2, end=True))[0].tolist() == [1, 1, 0]
    assert supervised_tokens(rows, Cut(3))[1] == 7
    # Without labels all count; of equal lengths, a batch comes as one array.
    assert supervised_tokens(Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]}))[0].tolist() == [1, 1]


def test_packed_documents_begin_unpredicted() -> None:
    rows = Dataset.from_dict(
        {
            "input_ids": [[1, 2, 3, 4, 5], [6, 7, 8]],
            "labels": [[1, 2, -100, 4, 5], [6, -100, 8]],
            "seq_lengths": [[2, 1, 2], [1, 2]],
        }
    )
    counts, tokens = supervised_tokens(rows)
    assert (counts.tolist(), tokens) == ([len(row.predicted) for row in iterate(rows)], 8)
    assert counts.tolist() == [2, 1]
    assert share(rows) == "3 of 8 tokens (37.5%) in 2 training rows are supervised"


@pytest.mark.parametrize(
    ("settings", "cut"),
    [
        ({}, Cut(16)),
        ({"truncation_mode": "keep_end"}, Cut(16, end=True)),
        ({"packing": True}, Cut(16)),
        ({"packing": True, "packing_strategy": "bfd_split"}, Cut()),
        ({"packing": True, "packing_strategy": "wrapped"}, Cut()),
    ],
)
def test_the_cut_is_that_of_trl(preparation: Callable[..., Preparation], settings: dict[str, Any], cut: Cut) -> None:
    assert Cut.of(preparation(**settings).arguments) == cut


# Refusing and leaving out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_a_prompt_longer_than_max_length(
    preparation: Callable[..., Preparation], said: list[str], tokenizer: Any, packing: bool
) -> None:
    rows = pairs((4, 4), (20, 4), (3, 2), (16, 30))
    with pytest.raises(UserError) as caught:
        preparation(packing=packing).of(rows)
    assert str(caught.value) == (
        "data: 2 of 4 training rows have no supervised token: row 2 has no supervised token within data.max_length "
        "(16 tokens of its 25): masked, in brackets: [pppppppppppppppp], cut off: 'ppppcccc</s>'. Give a larger "
        "data.max_length, or data.masked_rows: drop to leave such rows out"
    )
    assert said == []
    found = preparation("drop", packing=packing).of(rows)
    assert said[0] == "data.masked_rows: 2 of 4 training rows have no supervised token: left out"
    text = "".join(tokenizer.decode(row["input_ids"]) for row in found)
    assert sorted(text.replace("</s>", "|")) == sorted("ppppcccc|pppcc|")
    assert said[1].startswith("data: 8 of 15 tokens (53.3%) in ")
    assert list(found[ROW_ID]) == list(range(len(found)))


def test_a_part_of_a_document_that_packing_splits(preparation: Callable[..., Preparation], said: list[str]) -> None:
    rows = pairs((40, 4), (3, 2))
    settings = {"packing": True, "packing_strategy": "bfd_split"}
    with pytest.raises(UserError, match=r"2 of 4 training rows .* every one that follows another is masked, in brac"):
        preparation(**settings).of(rows)
    found = preparation("drop", **settings).of(rows)
    assert supervised_tokens(found)[0].min() > 0
    assert said[0].startswith("data.masked_rows: 2 of 4 ")


def test_where_no_row_is_left_there_is_nothing_to_train_on(preparation: Callable[..., Preparation]) -> None:
    with pytest.raises(UserError, match="2 of 2 training rows have no supervised token"):
        preparation("drop").of(pairs((20, 4), (30, 4)))


def test_a_single_token(preparation: Callable[..., Preparation]) -> None:
    rows = Dataset.from_dict({"input_ids": [[70, 71, 72], [70]]})
    with pytest.raises(
        UserError, match="row 2 has no supervised token: it is a single token, and nothing comes befor"
    ):
        preparation().of(rows)


def test_long_rows_are_shown_by_their_ends(preparation: Callable[..., Preparation]) -> None:
    rows = Dataset.from_dict({"prompt": ["a" + "b" * 900 + "c"], "completion": ["d"]})
    with pytest.raises(UserError) as caught:
        preparation(max_length=902).of(rows)
    assert f"[a{'b' * 199} ... {'b' * 199}c], cut off: 'd</s>'" in str(caught.value)


def messages(*said_by: tuple[str, ...]) -> Dataset:
    return Dataset.from_dict(
        {"messages": [[{"role": role, "content": role[:4]} for role in roles] for roles in said_by]}
    )


@pytest.mark.parametrize("stream", [False, True])
def test_an_assistant_who_says_nothing(
    preparation: Callable[..., Preparation], tokenizer: Any, said: list[str], stream: bool
) -> None:
    tokenizer.chat_template = TEMPLATE
    rows = messages(("user", "assistant"), ("system", "user"), ("user", "assistant"))
    given: Any = streamed(rows) if stream else rows
    what = (
        "row 2 of the stream has no supervised token: the chat template marks none as the assistant's in [systuser]"
        if stream
        else "1 of 3 training rows have no supervised token: row 2 has no supervised token: the chat template marks "
        "none as the assistant's in [systuser]"
    )
    with pytest.raises(UserError) as caught:
        list(islice(iter(preparation(assistant_only_loss=True).of(given)), 3))
    assert what in str(caught.value)
    found = list(islice(iter(preparation("drop", assistant_only_loss=True).of(given)), 2))
    assert [tokenizer.decode(row["input_ids"]) for row in found] == ["userassi"] * 2
    assert [sum(label != -100 for label in row["labels"]) for row in found] == [4, 4]


def test_a_stream_is_refused_where_the_row_comes_up(
    preparation: Callable[..., Preparation], tokenizer: Any, said: list[str]
) -> None:
    rows = pairs((4, 4), (3, 2), (20, 4))
    found = iter(preparation().of(streamed(rows)))
    assert said == [
        "data: 5 of 9 tokens (55.6%) in the first 1 training rows are supervised",
        "data: the first row, masked text in brackets: [pppp]cccc</s>",
    ]
    with pytest.raises(
        StreamFault, match=r"^data: row 3 of the stream has no supervised token within data.max_length"
    ):
        list(islice(found, 3))
    for packing in (False, True):
        found = iter(preparation("drop", packing=packing).of(streamed(rows)))
        text = "".join(tokenizer.decode(row["input_ids"]) for row in islice(found, 2))
        assert "pppp" * 4 not in text
    # A stream of nothing else would never come to an end.
    only = StreamedRows(streamed(pairs((20, 4))).rows, pairs((4, 4)), "embedded:test")
    with pytest.raises(StreamFault, match="there is no row to train on"):
        next(iter(preparation("drop").of(only)))


def test_a_cache_that_cannot_be_written(
    preparation: Callable[..., Preparation], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    rows = pairs((4, 4))
    monkeypatch.setattr(Dataset, "map", full)
    with pytest.raises(
        UserError, match=r"the cache of datasets \(HF_DATASETS_CACHE\) cannot be written or read: .*No s"
    ):
        preparation().of(rows)


# Row ids -------------------------------------------------------------------------------------------------------------


def test_ids_change_nothing_that_digests_see(tokenizer: Any) -> None:
    rows = Dataset.from_dict({"input_ids": [[70, 71, 72], [73, 74]], "labels": [[-100, 71, 72], [73, 74]]})
    numbered = add_row_ids(rows)
    assert list(numbered[ROW_ID]) == [0, 1]
    assert Survey.of(numbered) == Survey.of(rows)
    assert list(add_row_ids(numbered.select([1]))[ROW_ID]) == [0]
    text = tokenizer.decode([73, 74])
    assert describe_rows(numbered, [1, 5], tokenizer) == f"row 1 of 2: {text!r}; row 5 of 2"
    long = add_row_ids(Dataset.from_dict({"input_ids": [[70] * 500]}))
    assert describe_rows(long, [0], tokenizer) == f"row 0 of 1: {tokenizer.decode([70] * 80)!r}"
