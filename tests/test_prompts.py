"""Prompts from files, results to files, chat templates from files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hqqplus.errors import UserError
from hqqplus.models import load_tokenizer
from hqqplus.prompts import check_results, read_prompts, use_template, write_results

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def tokenizer(random_model: Callable[..., Path]) -> Any:
    return load_tokenizer(str(random_model("llama")))


def test_a_line_a_prompt(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff one \r\n\n \u2028two\u0085\n".encode())
    first, second = read_prompts(path)
    assert [first.row, second.row] == [{"prompt": " one "}, {"prompt": " \u2028two\u0085"}]
    assert [first.where, second.where] == [f"{path}:1", f"{path}:3"]
    assert first.encode(tokenizer) == tokenizer(" one ")["input_ids"]


def test_lines_of_json_keep_what_else_they_hold(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a", "id": [1, "é"]}, {**CHAT, "n": None}]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_prompts(path)
    assert [prompt.row for prompt in found] == rows
    with pytest.raises(
        UserError, match=rf"^{path}:2: the tokenizer has no chat template: name one by --chat-template"
    ):
        found[1].encode(tokenizer)
    tokenizer.chat_template = TEMPLATE
    expected = tokenizer("<user>hi\n<assistant>", add_special_tokens=False)["input_ids"]
    assert found[1].encode(tokenizer) == expected
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(
        UserError, match=rf"^{path}:2: the chat template refuses these messages: roles must alternate$"
    ):
        found[1].encode(tokenizer)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected "),
        ('{"text": "a"}', "expected "),
        (json.dumps({"prompt": "a", **CHAT}), "expected "),
        ('{"prompt": 1}', "prompt must be a string"),
        ('{"prompt": "\\ud800"}', "surrogates not allowed"),
        ("[" * 100_000, "recursion"),
        ('{"messages": []}', "messages must be a list"),
        ('{"messages": [{"content": "a"}]}', "messages must be a list"),
        ('{"prompt": "a", "generated": "b"}', "generated is what the result adds"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_lines(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "good"}}\n{line}\n')
    with pytest.raises(UserError) as refused:
        read_prompts(path)
    assert str(refused.value).startswith(f"{path}:2: ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, said in (
        ("empty.txt", "there is no prompt in it"),
        ("latin.txt", "it is not text in UTF-8"),
        ("none.txt", "No such file"),
        ("prompts.csv", r"the name must end in \.txt"),
    ):
        with pytest.raises(UserError, match=rf"^--file: {tmp_path / name}: .*{said}"):
            read_prompts(tmp_path / name)


def test_results(tmp_path: Path) -> None:
    rows = [{"prompt": "é\n", "generated": "日"}, {"prompt": "b", "generated": ""}]
    check_results(tmp_path / "new" / "out.jsonl")
    write_results(tmp_path / "new" / "out.jsonl", rows)
    lines = (tmp_path / "new" / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    with pytest.raises(TypeError):
        write_results(tmp_path / "new" / "out.jsonl", [*rows, {"prompt": object()}])
    assert len((tmp_path / "new" / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert len(list((tmp_path / "new").iterdir())) == 1
    with pytest.raises(UserError, match="this is a folder"):
        check_results(tmp_path)
    with pytest.raises(UserError, match="is a file, a folder is needed"):
        check_results(tmp_path / "new" / "out.jsonl" / "deeper")


def test_a_template_from_a_file(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    use_template(tokenizer, None)
    assert tokenizer.chat_template is None
    use_template(tokenizer, path)
    assert tokenizer.apply_chat_template(CHAT["messages"], tokenize=False) == "<user>hi\n<assistant>"
    path.write_text("{{ raise_exception('the first message must be the system message') }}")
    use_template(tokenizer, path)  # is one, though it does not take what it is tried on
    for text, said in (
        ("a\n{% for %}", rf"^--chat-template: {path}:2: "),
        ("  ", "the file is empty"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            use_template(tokenizer, path)
