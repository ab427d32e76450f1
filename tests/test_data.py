"""`hqqplus.data`: every kind of source, every error a user can make, and what TRL is given."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import hqqplus.data
from hqqplus.data import RowForm, load_rows
from hqqplus.errors import UserError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class Tokenizer:
    """As much of a tokenizer as `documents` looks at."""

    def __init__(self, chat_template: str | None = None, error: Exception | None = None) -> None:
        self.chat_template, self.error = chat_template, error

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        if self.error:
            raise self.error
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def test_each_kind_of_file(tmp_path: Path) -> None:
    rows = [{"text": "one\n"}, {"text": "zwei ä"}]
    parquet = str(tmp_path / "a.parquet")
    Dataset.from_list(rows).to_parquet(parquet)
    for path in (
        write(tmp_path / "a.jsonl", lines(*rows)),
        write(tmp_path / "upper.JSONL", "\n" + lines(*rows)),
        write(tmp_path / "a.json", json.dumps(rows, indent=1)),
        write(tmp_path / "lines.json", lines(*rows)),
        write(tmp_path / "a.csv", 'text\n"one\n"\nzwei ä\n'),
        write(tmp_path / "glob[1]*?.jsonl", lines(*rows)),
        write(tmp_path / ".hidden" / "a.jsonl", lines(*rows)),
        parquet,
    ):
        assert load_rows(path).to_list() == rows, path


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    text = "one\n\ntwo\n\n\x0cthree"
    assert load_rows(write(tmp_path / "a.txt", text)).to_list() == [{"text": text}]


def test_a_path_is_taken_from_the_working_folder_and_from_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.txt", "here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("a.txt", "./a.txt", "~/a.txt"):
        assert load_rows(path)["text"][:] == ["here"]


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    # datasets goes by name and time: an archive, or cp -p, brings another file under both.
    for folder, name in (("", "a.jsonl"), ("rows", "train.jsonl")):
        for text in ("one", "two"):
            path = write(tmp_path / folder / name, lines({"text": text}))
            os.utime(path, (1e9, 1e9))
            assert load_rows(str(tmp_path / folder) if folder else path)["text"][:] == [text]


def test_a_folder_has_the_splits_that_its_files_are_named_for(tmp_path: Path) -> None:
    write(tmp_path / "rows" / "train.jsonl", lines({"text": "a"}, {"text": "b"}, {"text": "c"}))
    write(tmp_path / "rows" / "test.jsonl", lines({"text": "d"}))
    folder = str(tmp_path / "rows")
    assert load_rows(folder)["text"][:] == ["a", "b", "c"]
    assert load_rows(folder, "test")["text"][:] == ["d"]
    assert load_rows(folder, "train[1:]+test")["text"][:] == ["b", "c", "d"]
    with pytest.raises(
        UserError, match=r"^data.path_or_name: '.*rows' has no split 'tests'; it has '.*'; did you mean 'test'\?$"
    ):
        load_rows(folder, "tests")


def test_a_folder_of_text_files_has_one_document_a_file(tmp_path: Path) -> None:
    write(tmp_path / "t" / "train-1.txt", "one\n\ntwo")
    write(tmp_path / "t" / "train-2.txt", "three")
    assert sorted(load_rows(str(tmp_path / "t"))["text"]) == ["one\n\ntwo", "three"]


@pytest.fixture
def pydoc(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The embedded corpus, faked; the list counts how often it is built."""
    built: list[int] = []

    def build() -> dict[str, list[str]]:
        built.append(1)
        return {"train": ["a", "b", "c", "d"], "validation": ["v"]}

    monkeypatch.setattr("hqqplus.embedded.corpus.build", build)
    hqqplus.data._embedded_splits.cache_clear()
    yield built
    hqqplus.data._embedded_splits.cache_clear()


def test_the_embedded_corpus_is_built_once(pydoc: list[int]) -> None:
    assert load_rows("embedded:pydoc").to_list() == [{"text": text} for text in "abcd"]
    assert load_rows("embedded:pydoc", "validation").to_list() == [{"text": "v"}]
    assert load_rows("embedded:pydoc", "train[:50%]+validation")["text"][:] == ["a", "b", "v"]
    assert pydoc == [1]


@pytest.mark.parametrize(
    ("name", "split", "config", "message"),
    [
        ("embedded:pydoc", "test", None, r"has no split 'test'; it has 'train', 'validation'$"),
        ("embedded:pydoc", "train[:3x]", None, r"cannot read the split 'train\[:3x\]'.*allowed: a name, a slice"),
        ("embedded:pydoc", "train[3:3]", None, r"split 'train\[3:3\]' of 'embedded:pydoc' is empty"),
        ("embedded:pydoc", "train", "en", r"has no configurations, so config_name 'en'"),
        ("embedded:other", "train", None, r"there is no 'embedded:other'. Allowed: .*'embedded:pydoc'"),
    ],
)
@pytest.mark.usefixtures("pydoc")
def test_embedded_errors(name: str, split: str, config: str | None, message: str) -> None:
    with pytest.raises(UserError, match="^data.path_or_name: .*" + message):
        load_rows(name, split, config)


def test_a_name_that_is_no_path_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Dataset:
        asked.append((args, kwargs))
        return Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_rows("org/name.v2", "train[:1]", "en")
    assert asked == [(("org/name.v2", "en"), {"split": "train[:1]"})]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach 'org/name' on the Hub"),
            r"is no local path, and loading it from the Hugging Face hub failed: Couldn't reach .* Allowed: a file",
        ),
        (ValueError("Unknown split \"dev\". Should be one of ['train', 'test']."), r"it has 'train', 'test'$"),
        (KeyError(), r"hub failed: KeyError\."),
        (RuntimeError("x" * 1000), r"x{400} \.\.\.\. Allowed"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> Dataset:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^TEXTS: 'org/name' .*" + message) as caught:
        load_rows("org/name", "dev", where="TEXTS")
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["trian.jsonl", "./nothing", "~/nothing/at-all", "/nothing/here", "a/b.parquet"])
def test_a_missing_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write(tmp_path / "train.jsonl", lines({"text": "a"}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no file or folder") as caught:
        load_rows(name)
    assert name in str(caught.value)
    assert ("did you mean 'train.jsonl'" in str(caught.value)) == (name == "trian.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xyz", "x", r"unknown suffix '\.xyz'\. Allowed: a file \(\.jsonl, \.json, \.csv, \.parquet, \.txt\)"),
        ("a.jsonl", "", "is an empty file"),
        ("a.txt", " \n", "is empty; at least one row"),
        ("a.csv", "text\n", "is empty; at least one row"),
        ("a.jsonl", "\n\n", "cannot read|is empty"),
        ("a.json", "[]", "cannot read|is empty"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', r"', line 3: not valid JSON: .*column 13"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b', r"', line 2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n3\n', r"', line 2: expected one JSON object .* a line, got a number"),
        ("a.jsonl", '["a"]\n["b"]\n', r"', line 1: expected one JSON object .* got a list"),
        ("a.json", '[{"text": "a"},\n{"text": "b"]', r"', line 2: not valid JSON"),
        ("a.json", '[{"text": "a"}, "b"]', r"', item 2: expected an object .* got a string"),
        ("a.parquet", "no parquet", "cannot read"),
    ],
)
def test_what_a_file_can_have_wrong(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        load_rows(path, where="data.eval")
    assert str(caught.value).startswith("data.eval: ")
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="as UTF-8 text"):
        load_rows(str(path))


def test_a_file_has_one_split_and_no_configuration(tmp_path: Path) -> None:
    for path in (write(tmp_path / "a.jsonl", lines({"text": "a"})), write(tmp_path / "a.txt", "a")):
        with pytest.raises(UserError, match=r"has no split 'validation'; it has 'train'$"):
            load_rows(path, "validation")
        with pytest.raises(UserError, match="cannot read the split"):
            load_rows(path, "train[:1x]")
        with pytest.raises(UserError, match="no configurations"):
            load_rows(path, config_name="en")


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "notes" / "README.md", "# hi")
    for name in ("empty", "notes"):
        with pytest.raises(UserError, match=r"holds no data file\. Allowed"):
            load_rows(str(tmp_path / name))
    write(tmp_path / "bad" / "train.jsonl", lines({"text": "a"}))
    write(tmp_path / "bad" / "test.jsonl", '{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"test\.jsonl', line 2: not valid JSON"):
        load_rows(str(tmp_path / "bad"))


def test_importing_costs_neither_torch_nor_datasets(run_python: Callable[..., Any]) -> None:
    run_python("-c", "import sys, hqqplus.data; assert not {'torch', 'datasets'} & set(sys.modules)")


# --- RowForm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "^no form of row"),
        ({"text_field": "a", "messages": "b"}, "^more than one form"),
        ({"text_field": "a", "prompt": "b", "completion": "c"}, "^more than one form"),
        ({"prompt": "a"}, "^prompt needs completion"),
        ({"completion": "a"}, "^completion needs prompt"),
    ],
)
def test_exactly_one_form(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RowForm(**fields)


TEXTS = {"text": ["a"], "number": [1], "chat": [CHAT], "strings": [["a"]], "from": [[{"from": "x", "value": "y"}]]}
PAIR = {"prompt": "text", "completion": "text"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"text_field": "txt"},
            r"text_field: there is no column 'txt'; the columns are 'text', .*did you mean 'text'",
        ),
        ({**PAIR, "completion": "nowhere"}, r"completion: there is no column 'nowhere'"),
        ({"text_field": "number"}, r"text_field: column 'number' must hold text, but it is of type int64$"),
        ({"text_field": "strings"}, r"text_field: column 'strings' must hold text, but it is List"),
        ({"text_field": "chat"}, r"column 'chat' holds lists of messages; use messages: chat"),
        ({"messages": "text"}, r"messages: column 'text' must hold lists of messages .* of type string"),
        ({"messages": "strings"}, r"must hold lists of messages .* List\(Value\('string'\)\)"),
        ({"messages": "from"}, r"must hold lists of messages .*'from'.*'value'"),
        ({"prompt": "chat", "completion": "text"}, r"must both hold text or both hold lists of messages"),
    ],
)
def test_check_names_the_column_and_what_is_there(fields: dict[str, str], message: str) -> None:
    rows = Dataset.from_dict(TEXTS)
    with pytest.raises(UserError, match="^here: .*" + message):
        RowForm(**fields).check(rows, "here")
    with pytest.raises(UserError, match=message):
        RowForm(**fields).to_sft(rows, None)
    with pytest.raises(UserError, match=message):
        RowForm(**fields).documents(rows, Tokenizer())


def test_check_takes_what_datasets_makes_of_messages(tmp_path: Path) -> None:
    tool = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"b": 1}}]}
    for index, messages in enumerate(
        (CHAT, [*CHAT, tool], [{"role": "user", "content": [{"type": "text"}]}, CHAT[1]])
    ):
        rows = load_rows(write(tmp_path / f"{index}.jsonl", lines({"m": messages})))
        RowForm(messages="m").check(rows)
    mixed = load_rows(write(tmp_path / "mixed.jsonl", lines({"m": ["a", {"role": 1}]})))
    with pytest.raises(UserError, match="must hold lists of messages"):
        RowForm(messages="m").check(mixed)


def test_a_column_of_mixed_types_is_no_text(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "a.jsonl", lines({"text": "a"}, {"text": 3})))
    with pytest.raises(UserError, match="must hold text"):
        RowForm("text").check(rows)


def test_to_sft_gives_the_columns_of_trl_and_nothing_else() -> None:
    rows = Dataset.from_dict({"body": ["a", "b</s>"], "label": [0, 1]})
    assert RowForm("body").to_sft(rows, "</s>").to_list() == [{"text": "a</s>"}, {"text": "b</s>"}]
    assert RowForm("body").to_sft(rows, None).to_list() == [{"text": "a"}, {"text": "b</s>"}]

    rows = Dataset.from_dict({"completion": ["q"], "prompt": ["a"], "x": [1]})
    swapped = RowForm(prompt="completion", completion="prompt").to_sft(rows, "</s>")
    assert swapped.to_list() == [{"prompt": "q", "completion": "a</s>"}]

    rows = Dataset.from_dict({"chat": [CHAT], "text": ["x"]})
    assert RowForm(messages="chat").to_sft(rows, "</s>").to_list() == [{"messages": CHAT}]

    rows = Dataset.from_dict({"p": [CHAT[:1]], "c": [CHAT[1:]]})
    talk = RowForm(prompt="p", completion="c").to_sft(rows, "</s>")
    assert talk.to_list() == [{"prompt": CHAT[:1], "completion": CHAT[1:]}]


def test_rows_with_nothing_to_train_on_are_dropped() -> None:
    rows = Dataset.from_dict({"text": ["a", "", None, " \n"]})
    assert RowForm("text").to_sft(rows, None)["text"][:] == ["a"]
    rows = Dataset.from_dict({"p": ["", "q", None, "q"], "c": ["a", " ", "a", None]})
    assert RowForm(prompt="p", completion="c").to_sft(rows, None).to_list() == [{"prompt": "", "completion": "a"}]
    rows = Dataset.from_dict({"m": [CHAT, [], None]})
    assert RowForm(messages="m").to_sft(rows, None).to_list() == [{"messages": CHAT}]
    with pytest.raises(UserError, match=r"every row is empty in 'text'"):
        RowForm("text").to_sft(Dataset.from_dict({"text": ["", " "]}), None)


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text(max_size=8), max_size=5), ending=st.sampled_from(["</s>", "x", "🙂"]))
def test_the_ending_is_there_exactly_once(texts: list[str], ending: str) -> None:
    texts = ["x" + text for text in texts] + ["x" + ending]
    datasets.disable_progress_bars()
    got = RowForm("text").to_sft(Dataset.from_dict({"text": texts}), ending)["text"][:]
    assert got == [text if text.endswith(ending) else text + ending for text in texts]
    again = RowForm("text").to_sft(Dataset.from_dict({"text": got}), ending)["text"][:]
    assert again == got


def test_documents() -> None:
    rows = Dataset.from_dict({"p": ["q ", "", None], "c": ["a", " ", "a"], "m": [CHAT, [], None]})
    assert RowForm("c").documents(rows, Tokenizer()) == ["a", "a"]
    assert RowForm(prompt="p", completion="c").documents(rows, Tokenizer()) == ["q a"]
    assert RowForm(messages="m").documents(rows, Tokenizer(TEMPLATE)) == ["<user>hi<assistant>ho"]
    talk = Dataset.from_dict({"p": [CHAT[:1]], "c": [CHAT[1:]]})
    assert RowForm(prompt="p", completion="c").documents(talk, Tokenizer(TEMPLATE)) == ["<user>hi<assistant>ho"]


def test_documents_need_a_chat_template_that_takes_them() -> None:
    rows = Dataset.from_dict({"m": [CHAT]})
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        RowForm(messages="m").documents(rows, Tokenizer())
    with pytest.raises(UserError, match="refuses the messages of row 1: roles must alternate"):
        RowForm(messages="m").documents(rows, Tokenizer(TEMPLATE, ValueError("roles must alternate")))


def test_a_real_chat_template(random_model: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_model())
    tokenizer.chat_template = TEMPLATE
    assert RowForm(messages="m").documents(Dataset.from_dict({"m": [CHAT]}), tokenizer) == ["<user>hi<assistant>ho"]


def test_trl_adds_no_second_ending(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """What the docstring of `to_sft` says of TRL, by running its preparation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = random_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for form, columns in (
        (RowForm("t"), {"t": ["ab", "cd</s>"]}),
        (RowForm(prompt="p", completion="t"), {"p": ["x", "y"], "t": ["ab", "cd</s>"]}),
    ):
        rows = Dataset.from_dict(columns)
        prepared = []
        for ending in (None, tokenizer.eos_token):
            arguments = SFTConfig(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False)
            trainer = SFTTrainer(
                model=AutoModelForCausalLM.from_pretrained(folder),
                args=arguments,
                train_dataset=form.to_sft(rows, ending),
                processing_class=tokenizer,
            )
            prepared.append([row["input_ids"] for row in trainer.train_dataset])
        assert prepared[0] == prepared[1]
        for ids in prepared[1]:
            assert ids.count(tokenizer.eos_token_id) == 1
            assert ids[-1] == tokenizer.eos_token_id


def test_real_rows(shared: Path) -> None:
    rows = load_rows(str(shared / "data" / "gsm8k" / "test.jsonl"), "train[:20]")
    form = RowForm(prompt="question", completion="answer")
    form.check(rows)
    prepared = form.to_sft(rows, "</s>")
    assert prepared.column_names == ["prompt", "completion"]
    assert all(row["completion"].endswith("</s>") for row in prepared)
    assert len(load_rows(str(shared / "data" / "wikitext-2" / "validation.txt"))) == 1


def test_half_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    path = write(tmp_path / "a.jsonl", lines({"text": "a"}))
    rows = load_rows(path)
    copies = list(cache.rglob("*.arrow"))
    content = copies[0].read_bytes()
    for damage in (copies[0].unlink, lambda: copies[0].write_bytes(content[:100])):
        damage()
        # What is read already stays: the file is mapped.
        assert rows[0] == {"text": "a"}
        with pytest.raises(
            UserError, match=r"the copy of '.*a.jsonl' in the cache of datasets is damaged, .*/cache too"
        ):
            load_rows(path)
    shutil.rmtree(cache)
    assert load_rows(path).to_list() == rows.to_list()
