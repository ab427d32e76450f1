"""Of conversations the loss is on what the assistant says; the share and the example show it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset

from hqqplus import models
from hqqplus.errors import UserError
from hqqplus.integrations.trl import prepare_rows, sft_config
from hqqplus.recipe import Recipe
from hqqplus.recovery import prepare, preview, setup
from hqqplus.recovery.prepare import Preparation
from hqqplus.recovery.supervision import example

CPU = torch.device("cpu")
PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
TALK = [("human", "hi"), ("gpt", "ho"), ("human", "and?"), ("gpt", "no")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer(random_model: Callable[..., Path]) -> Any:
    return models.load_tokenizer(str(random_model("llama")))


@pytest.fixture
def make(tmp_path: Path, random_model: Callable[..., Path]) -> Callable[..., Recipe]:
    def make(*conversations: Any, training: Any = None, **data: Any) -> Recipe:
        rows = [{"c": [{"from": who, "value": said} for who, said in one]} for one in conversations]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = {"path_or_name": str(path), "eval_path_or_name": str(path), "sharegpt": "c", "max_length": 64}
        return Recipe.model_validate(
            {
                "model": {"name_or_path": str(random_model("llama"))},
                "data": {"packing": False, **section, **data},
                "training": training or {},
                "output_dir": str(tmp_path / "out"),
            }
        )

    return make


def prepared(recipe: Recipe, tokenizer: Any, said: list[str]) -> Any:
    train = setup.load_data(recipe, tokenizer, said.append).train
    settings = setup.trainer_settings(recipe, CPU, said.append)
    rows = setup.TrainingRows(train, tokenizer, settings, False, said.append, recipe.data.masked_rows)
    rows.settle(False)
    return rows.rows


@pytest.mark.parametrize("streaming", [False, True])
def test_the_loss_is_on_the_assistant(
    make: Callable[..., Recipe], tokenizer: Any, said: list[str], streaming: bool
) -> None:
    training = {"max_steps": 1}
    tokenizer.chat_template = MARKED
    options = {"streaming": streaming, "training": training}
    rows = prepared(make(TALK, **options), tokenizer, said)
    shown = "[<user>hi<assistant>]ho[<user>and?<assistant>]no"
    assert said[-1] == f"data: the first row, masked text in brackets: {shown}"
    row = next(iter(rows))
    assert [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100] == tokenizer("hono")[
        "input_ids"
    ]

    tokenizer.chat_template = PLAIN
    prepared(make(TALK, **options), tokenizer, said)
    assert any("the loss is on the assistant's last turn alone (false: on every token)" in line for line in said)
    assert said[-1].endswith("[<user>hi<assistant>ho<user>and?<assistant>]no")

    # Asked for: every token.
    prepared(make(TALK, streaming=streaming, training={**training, "assistant_only_loss": False}), tokenizer, said)
    assert said[-1].endswith("brackets: <user>hi<assistant>ho<user>and?<assistant>no")


def test_conversations_without_an_answer(make: Callable[..., Recipe], tokenizer: Any, said: list[str]) -> None:
    tokenizer.chat_template = PLAIN
    alone = [("gpt", "nobody asked")]
    with pytest.raises(UserError, match="in 1 of 2 training rows the assistant answers nothing, the first is row 2"):
        prepared(make(TALK, alone), tokenizer, said)
    assert len(prepared(make(TALK, alone, masked_rows="drop"), tokenizer, said)) == 1
    assert any(line.endswith("in 1 of 2 training rows the assistant answers nothing: left out") for line in said)
    stream = make(TALK, alone, streaming=True, training={"max_steps": 1})
    with pytest.raises(UserError, match="the assistant answers nothing"):
        next(iter(prepared(stream, tokenizer, said)))


def test_without_a_chat_template(make: Callable[..., Recipe], tokenizer: Any, said: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the rows are messages, but the tokenizer has no chat template"):
        prepared(make(TALK), tokenizer, said)
    path = tmp_path / "template.jinja"
    path.write_text(MARKED)
    prepared(make(TALK, training={"chat_template_path": str(path)}), tokenizer, said)
    assert said[-1].endswith("]no")


def test_a_row_that_the_template_refuses(make: Callable[..., Recipe], tokenizer: Any, said: list[str]) -> None:
    refusing = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not so') }}{% endif %}"
    tokenizer.chat_template = refusing + MARKED
    recipe = make(TALK, [("human", "no"), ("gpt", "a")])
    rows, _ = setup.form_of(recipe).plain(setup.load_rows(recipe.data.path_or_name), tokenizer)
    arguments = sft_config({"output_dir": "o", "max_length": 64, "use_cpu": True, "assistant_only_loss": True}, "a")
    with pytest.raises(UserError, match="chat template refuses the messages of row 2: not so"):
        Preparation(tokenizer, arguments, "refuse", said.append).of(rows)


# Shown and previewed -------------------------------------------------------------------------------------------------


def test_an_example_is_safe_and_short(tokenizer: Any) -> None:
    text = "a\x1b[31m\r\n" + "b" * 500
    ids = tokenizer(text)["input_ids"]
    rows = Dataset.from_dict({"input_ids": [ids], "labels": [[-100] * 3 + ids[3:]]})
    shown = example(rows, tokenizer)
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert "\n" not in shown
    assert len(shown) < 300
    many = Dataset.from_dict({"input_ids": [ids[:20]], "labels": [[-100, 65] * 10]})
    assert example(many, tokenizer).endswith(" ...")


def test_a_preview_needs_no_weights(
    make: Callable[..., Recipe], random_model: Callable[..., Path], tmp_path: Path, said: list[str]
) -> None:
    import shutil

    folder = tmp_path / "tokenizer"
    shutil.copytree(random_model("llama"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(MARKED)
    recipe = make(TALK, TALK[:2], [("human", "h" * 80), ("gpt", "a")], masked_rows="drop", packing="auto")
    recipe = Recipe.model_validate({**setup_values(recipe), "model": {"name_or_path": str(folder)}})
    found = preview.preview(recipe, said.append)
    assert (found.rows, found.whole, found.max_length, found.supervised) == (2, True, 64, 6)
    assert found.documents == {"evaluation": 3}
    assert found.median < found.longest == found.most == len("<user>hi<assistant>ho<user>and?<assistant>no")
    assert found.cut == 0
    assert any("1 of 3 training rows have no supervised token: left out" in line for line in said)
    assert found.lines()[-1].endswith("[<user>hi<assistant>]ho[<user>and?<assistant>]no")
    assert json.loads(json.dumps(found.to_json()))["rows"] == 2


def setup_values(recipe: Recipe) -> dict[str, Any]:
    from hqqplus.recipe import to_dict

    return to_dict(recipe)


@pytest.mark.parametrize("settings", [{"packing": True}, {"packing": True, "packing_strategy": "wrapped"}, {}])
def test_rows_come_out_the_same_in_pieces(
    tokenizer: Any, said: list[str], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Dataset.from_dict({"text": [f"{i} " * (i % 7 + 1) for i in range(2300)]})
    arguments = sft_config({"output_dir": "o", "max_length": 24, "use_cpu": True, **settings}, "a")
    monkeypatch.setattr(prepare, "_PIECE", 1000)
    found = Preparation(tokenizer, arguments, "refuse", said.append).of(rows)
    expected = prepare_rows(rows, tokenizer, arguments)
    assert found.select_columns(expected.column_names).to_list() == expected.to_list()
