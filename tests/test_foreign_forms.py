"""Rows of alpaca and sharegpt: what they become, and what is refused, and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hqqplus import models
from hqqplus.data import RowForm, load_rows
from hqqplus.data_stream import StreamFault, plain_stream, stream_rows
from hqqplus.errors import UserError
from hqqplus.foreign_forms import ROLES, TEMPLATE, Alpaca, ShareGPT, alpaca_prompt, prompt_problem
from tests.recipes import SMALLEST, refused, write

TEXT = st.text(max_size=30)
ROWS = [
    {"instruction": "Add.", "input": "2 and 3", "output": "5"},
    {"instruction": "Greet.", "input": "", "output": "Hello"},
    {"instruction": "Wait.", "input": None, "output": ""},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer(random_model: Callable[..., Path]) -> Any:
    return models.load_tokenizer(str(random_model("llama")))


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# alpaca --------------------------------------------------------------------------------------------------------------


def test_alpaca_without_a_chat_template(tokenizer: Any) -> None:
    rows, form = RowForm(alpaca=True).plain(Dataset.from_list(ROWS), tokenizer)
    assert form == RowForm(prompt="prompt", completion="completion")
    assert rows.to_list()[:2] == [
        {"prompt": "Task:\nAdd.\n\nGiven:\n2 and 3\n\nAnswer:\n", "completion": "5"},
        {"prompt": "Task:\nGreet.\n\nAnswer:\n", "completion": "Hello"},
    ]
    assert form.to_sft(rows, "</s>")["completion"][:] == ["5</s>", "Hello</s>"], "an empty answer is left out"


def test_alpaca_with_a_chat_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    form = RowForm(alpaca=True)
    rows, plain = form.plain(Dataset.from_list(ROWS), tokenizer)
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "Add.\n\n2 and 3"}],
        "completion": [{"role": "assistant", "content": "5"}],
    }
    assert len(plain.to_sft(rows, "</s>")) == 2
    assert form.documents(Dataset.from_list(ROWS), tokenizer) == [
        "<user>Add.\n\n2 and 3<assistant>5",
        "<user>Greet.<assistant>Hello",
    ]
    # A prompt of one's own wins.
    own = RowForm(alpaca=True, alpaca_prompt="{instruction}?\n\n({input})\n\n")
    assert own.plain(Dataset.from_list(ROWS), tokenizer)[0]["prompt"][:2] == ["Add.?\n\n(2 and 3)\n\n", "Greet.?\n\n"]


def test_alpaca_without_the_column_of_inputs(tokenizer: Any) -> None:
    rows = Dataset.from_list([{"instruction": "Greet.", "output": "Hello"}])
    assert RowForm(alpaca=True).plain(rows, tokenizer)[0]["prompt"][:] == ["Task:\nGreet.\n\nAnswer:\n"]


@given(TEXT, TEXT)
def test_what_a_row_says_is_never_a_placeholder(instruction: str, given: str) -> None:
    instruction, given = "{input}" + instruction, "{instruction}" + given
    assert alpaca_prompt(TEMPLATE, instruction, given) == f"Task:\n{instruction}\n\nGiven:\n{given}\n\nAnswer:\n"
    assert alpaca_prompt(TEMPLATE, instruction, " ") == f"Task:\n{instruction}\n\nAnswer:\n"


@given(TEXT, TEXT | st.none(), TEXT | st.none())
def test_alpaca_keeps_what_stands_there(instruction: str, given: str | None, output: str | None) -> None:
    row = {"instruction": instruction, "input": given, "output": output}
    said, plain = Alpaca(None)(row, 0), Alpaca(TEMPLATE)(row, 0)
    asked = any(part.strip() for part in (instruction, given or ""))
    if not asked or not (output or "").strip():
        assert said == {"prompt": [], "completion": []}
        assert plain == {"prompt": None, "completion": None}
        return
    assert said["completion"] == [{"role": "assistant", "content": output}]
    assert plain["completion"] == output
    for part in (instruction, given or ""):
        if part.strip():
            assert part in said["prompt"][0]["content"]
            assert part in plain["prompt"]


def test_a_template_of_a_prompt() -> None:
    assert prompt_problem(TEMPLATE) is None
    assert prompt_problem("{instruction}") is None
    assert "{instruction} must stand in it" in str(prompt_problem("{input}"))
    assert "a part of its own" in str(prompt_problem("{instruction} {input}"))


# sharegpt ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from([name for name in ROLES if name != "system"]), TEXT), min_size=1))
def test_conversations_become_messages(turns: list[tuple[str, str]]) -> None:
    turns = [*turns, ("gpt", "end")]
    expected = [{"role": ROLES[name], "content": text} for name, text in turns]
    for speaker, said in (("from", "value"), ("role", "content")):
        row = {"c": [{speaker: name, said: text} for name, text in turns]}
        assert ShareGPT("c", "data")(row, 0) == {"messages": expected}
    # With columns of both kinds, the empty ones of the other kind are there too.
    row = {"c": [{"from": name, "value": text, "role": None, "content": None} for name, text in turns]}
    assert ShareGPT("c", "data")(row, 0) == {"messages": expected}


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["from", "value", "x"]), inner),
    max_leaves=6,
)


@given(ANYTHING)
def test_whatever_stands_there_is_messages_or_refused_with_its_row(value: Any) -> None:
    found, refusal = None, ""
    try:
        found = ShareGPT("c", "data")({"c": value}, 6)["messages"]
    except UserError as error:
        refusal = str(error)
    assert found is not None or refusal.startswith("data: row 7: column 'c'")
    assert found is None or all(one["role"] in ROLES.values() and isinstance(one["content"], str) for one in found)


TALK = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([*TALK, {"from": "bing", "value": "x"}], "turn 3: 'bing' speaks; allowed are human, user, gpt, assistant"),
        ([{"from": "human"}], r"turn 1: it has no text \('value'\)"),
        ([{"value": "a"}], r"turn 1: it does not say who speaks \('from'\); it has 'value'"),
        ([*TALK, {"from": "system", "value": "x"}], "turn 3: a system turn can only be the first one"),
        ([TALK[0]], "in none of its 1 turns speaks gpt or assistant"),
    ],
)
def test_malformed_conversations(tokenizer: Any, tmp_path: Path, turns: list[Any], message: str) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"c": TALK}, {"c": turns}])
    form = RowForm(sharegpt="c")
    with pytest.raises(UserError, match=f"^data: row 2: column 'c'.*{message}"):
        form.plain(load_rows(path), tokenizer)
    stream, _ = plain_stream(stream_rows(path), form, tokenizer, path, "data")
    with pytest.raises(StreamFault, match=f"^data: row 2: column 'c'.*{message}"):
        list(stream)


def test_a_stream_comes_to_the_same(tokenizer: Any, tmp_path: Path) -> None:
    for form, rows in ((RowForm(sharegpt="c"), [{"c": TALK}, {"c": TALK[:2]}]), (RowForm(alpaca=True), ROWS)):
        path = lines(tmp_path / f"{form.alpaca}.jsonl", rows)
        whole, plain = form.plain(load_rows(path), tokenizer)
        stream, same = plain_stream(stream_rows(path), form, tokenizer, path, "data")
        assert same == plain
        assert list(stream) == whole.to_list()


# Columns and recipes -------------------------------------------------------------------------------------------------


def test_columns_that_are_missing_or_of_another_type(tokenizer: Any) -> None:
    rows = Dataset.from_list([{"instructions": "a", "output": 1, "c": "text"}])
    with pytest.raises(
        UserError,
        match=r"^data: alpaca: there is no column 'instruction'; the columns are 'instructions', 'output', 'c'; did",
    ):
        RowForm(alpaca=True).check(rows)
    with pytest.raises(UserError, match=r"^data: alpaca: column 'output' must hold text, but it is of type int64$"):
        RowForm(alpaca=True).check(rows.rename_column("instructions", "instruction"))
    with pytest.raises(UserError, match=r"^data: sharegpt: there is no column 'd'"):
        RowForm(sharegpt="d").check(rows)
    with pytest.raises(UserError, match=r"^data: sharegpt: column 'c' must hold lists of turns"):
        RowForm(sharegpt="c").plain(rows, tokenizer)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ("alpaca: true, messages: a", "data.alpaca: messages, alpaca are given; exactly one of"),
        ("alpaca: true, sharegpt: a", "data.sharegpt: alpaca, sharegpt are given; exactly one of"),
        ("alpaca: 1", "data.alpaca: 1 is an integer; true or false is needed"),
        ("alpaca_prompt: a", "data.alpaca_prompt: goes with alpaca: true"),
        ("alpaca: true, alpaca_prompt: a", "data.alpaca_prompt: {instruction} must stand in it"),
        ("cache: 1", "data.cache: 1 is an integer; true, false or the path of a folder is needed"),
    ],
)
def test_recipes_that_are_refused(tmp_path: Path, fields: str, problem: str) -> None:
    text = SMALLEST.replace("data:\n  path_or_name: some/data\n", f"data: {{path_or_name: x, {fields}}}\n")
    (line,) = refused(tmp_path, text)
    assert line.startswith(f"recipe.yaml:3: {problem}")


def test_alpaca_false_is_no_form(tmp_path: Path) -> None:
    from hqqplus.recipe import load_recipe

    recipe = load_recipe(write(tmp_path, SMALLEST), ["data.alpaca=false"])
    assert recipe.data.text_field == "text"
