"""Chats: what the model gets to read, what is kept from turn to turn, and the terminal."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hqqplus import cli
from hqqplus.conversation import HELP, Answer, Conversation, converse, lines_of, writer_to
from hqqplus.errors import UserError
from hqqplus.evaluation.samples import complete
from hqqplus.generation import chat_config, new_text
from hqqplus.integrations.kv_cache import quantized_cache
from hqqplus.models import load_with_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "# {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}# assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def loaded() -> Any:
    model, tokenizer = load_with_tokenizer("embedded:pydoc")
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def by_definition(model: Any, tokenizer: Any, messages: list[dict[str, str]], count: int) -> str:
    """The greedy answer to all messages, read anew."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], 1)
            if following.item() == tokenizer.eos_token_id:
                break
    return new_text(tokenizer, ids[0].tolist(), length)


def held(
    model: Any, tokenizer: Any, turns: list[str], count: int = 10, **options: Any
) -> tuple[Conversation, list[Answer]]:
    """A greedy chat of so many tokens to an answer, each checked against what was streamed."""
    conversation = Conversation(model, tokenizer, chat_config(model, tokenizer, count, 0), **options)
    answers = []
    for turn in turns:
        pieces: list[str] = []
        answers.append(conversation.say(turn, pieces.append))
        assert "".join(pieces) == answers[-1].text
    return conversation, answers


def test_kept_turns_are_answered_as_if_read_anew(loaded: Any) -> None:
    conversation, answers = held(*loaded, ["Return a", "Open the file", "and then"], system="Write.")
    messages = [{"role": "system", "content": "Write."}]
    for turn, answer in zip(["Return a", "Open the file", "and then"], answers, strict=True):
        messages.append({"role": "user", "content": turn})
        assert answer.text == by_definition(*loaded, messages, 10)
        messages.append({"role": "assistant", "content": answer.text})
    assert conversation.messages == messages
    assert answers[0].kept == 0
    assert all(answer.kept > answer.read > 0 for answer in answers[1:])
    assert all((answer.tokens, answer.finish_reason) == (10, "length") for answer in answers)


def test_other_turns_are_read_from_where_they_differ(loaded: Any) -> None:
    conversation, _ = held(*loaded, ["Return a", "Open the file"])
    conversation.reset()
    assert conversation.messages == []
    again = conversation.say("Return b", lambda piece: None)
    assert 0 < again.kept < 10
    assert again.text == by_definition(*loaded, [{"role": "user", "content": "Return b"}], 10)
    conversation.set_system("Write.")
    turns = conversation.messages
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]
    answer = conversation.say("more", lambda piece: None)
    assert answer.text == by_definition(*loaded, [*turns, {"role": "user", "content": "more"}], 10)
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Write."}]


@pytest.mark.parametrize("kind", ["gemma2", "mistral"])
def test_nothing_is_kept_of_sliding_attention(random_model: Callable[..., Path], kind: str) -> None:
    model, tokenizer = load_with_tokenizer(random_model(kind))
    tokenizer.chat_template = TEMPLATE
    model.config.sliding_window = 16
    conversation, answers = held(model, tokenizer, ["abc", "def"], 4)
    assert [answer.kept for answer in answers] == [0, 0]
    assert answers[1].text == by_definition(model, tokenizer, conversation.messages[:3], 4)


def test_nothing_is_kept_of_a_quantized_cache(loaded: Any) -> None:
    pytest.importorskip("hqq")
    model, tokenizer = loaded
    config = chat_config(model, tokenizer, 10, 0)
    config.update(**quantized_cache(model, 8))
    conversation = Conversation(model, tokenizer, config)
    answers = [conversation.say(turn, lambda piece: None) for turn in ("Return a", "Open the file")]
    assert [answer.kept for answer in answers] == [0, 0]
    assert [answer.text for answer in answers] == [
        answer.text for answer in held(*loaded, ["Return a", "Open the file"])[1]
    ]


def test_ctrl_c_ends_the_answer_and_not_the_chat(loaded: Any) -> None:
    conversation, _ = held(*loaded, ["Return a"])
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    stopped = conversation.say("Open the file", write)
    assert stopped.finish_reason == "interrupted"
    assert stopped.text == "".join(pieces)
    assert 3 <= stopped.tokens < 10
    assert conversation.messages[-1] == {"role": "assistant", "content": stopped.text}
    # Its keys and values may be half written: they are not used.
    after = conversation.say("and then", lambda piece: None)
    assert after.kept == 0
    assert after.text == by_definition(*loaded, conversation.messages[:-1], 10)


def test_what_cannot_be_answered_was_not_said(loaded: Any) -> None:
    conversation, _ = held(*loaded, ["Return a"])
    before = list(conversation.messages)
    with pytest.raises(UserError, match=r"^chat: that makes \d+ tokens, and the model reads 512: .*/reset$"):
        conversation.say("word " * 600, lambda piece: None)
    conversation.messages.append({"role": "tool", "content": ""})
    with pytest.raises(UserError, match=r"^chat: the chat template refuses these messages: no tools$"):
        conversation.say("x", lambda piece: None)
    conversation.messages.pop()
    assert conversation.messages == before


def test_an_answer_ends_with_the_context(loaded: Any) -> None:
    _, tokenizer = loaded
    words = "word " * 470
    length = len(tokenizer(f"# user: {words}\n# assistant: ", add_special_tokens=False)["input_ids"])
    room = 512 - length
    assert 0 < room < 100
    _, (answer,) = held(*loaded, [words], 512)
    assert (answer.finish_reason, answer.tokens) == ("context", room)
    _, (answer,) = held(*loaded, [words], 2)
    assert (answer.finish_reason, answer.tokens) == ("length", 2)


def test_plain_text_goes_on(loaded: Any) -> None:
    conversation, answers = held(*loaded, ["Return a", "Open the"], plain=True)
    assert answers[0].text == complete(*loaded, ["Return a"], 10)[0]
    text = f"Return a{answers[0].text}"
    text += "" if text.endswith("\n") else "\n"
    assert answers[1].text == complete(*loaded, [text + "Open the"], 10)[0]
    with pytest.raises(UserError, match="--plain uses none"):
        conversation.set_system("x")
    with pytest.raises(UserError, match="--plain uses none"):
        Conversation(*loaded, chat_config(*loaded, 10), plain=True, system="x")


def test_without_a_template(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded[1], "chat_template", None)
    with pytest.raises(UserError, match=r"^chat: the tokenizer has no chat template: .*--chat-template.*--plain$"):
        Conversation(*loaded, chat_config(*loaded, 10))


# The terminal --------------------------------------------------------------------------------------------------------


def test_commands(loaded: Any) -> None:
    conversation, _ = held(*loaded, [], 3)
    lines = iter(
        ["", "/help", "/system Write.", "Return a", "//x", "/none", "/system", "/reset", "word " * 600, "/exit", "x"]
    )
    written: list[str] = []
    notes: list[str] = []
    figures: list[str] = []
    converse(conversation, lambda: next(lines, None), written.append, notes.append, figures.append)
    assert next(lines) == "x"
    assert notes[:2] == [HELP, "the system message is set"]
    assert [note.partition(":")[0] for note in notes[2:]] == [
        "cut off by --max-new-tokens",
        "cut off by --max-new-tokens",
        "there is no /none",
        "there is no system message now",
        "the turns are forgotten",
        "chat",
    ]
    assert len(figures) == 2
    assert all(figure.startswith("3 tokens, ") and " tokens/s; " in figure for figure in figures)
    assert written.count("\n") >= 2
    assert conversation.messages == []


def test_reading_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    read = lines_of(io.StringIO("a\r\n\nb"), notes.append)
    assert [read(), read(), read(), read()] == ["a", "", "b", None]
    read = lines_of(io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"), notes.append)
    with pytest.raises(UserError, match="the input is not text in UTF-8"):
        read()

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    said = iter([KeyboardInterrupt, "a line", EOFError])

    def typed(prompt: str) -> str:
        answer = next(said)
        if isinstance(answer, str):
            return answer
        raise answer

    monkeypatch.setattr("builtins.input", typed)
    read = lines_of(Terminal(), notes.append)
    assert [read(), read()] == ["a line", None]
    assert notes == ["\n(/exit or Ctrl-D ends the chat)", ""]
    screen, file = Terminal(), io.StringIO()
    for target in (screen, file):
        writer_to(target)("a\x1b[2Jb\n\tc\x9b")
    assert screen.getvalue() == "a[2Jb\n\tc"
    assert file.getvalue() == "a\x1b[2Jb\n\tc\x9b"


def run(*arguments: Any, said: str | None = None) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=said)


def test_chat_through_a_pipe(loaded: Any, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    options = ("embedded:pydoc", "--chat-template", path, "--max-new-tokens", 6)
    result = run("chat", *options, said="Return a\nOpen the file")
    _, answers = held(*loaded, ["Return a", "Open the file"], 6)
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{answer.text}\n" for answer in answers)
    assert result.stderr.count(" tokens/s; ") == 2
    drawn = [
        run("chat", *options, "--quiet", "--temperature", 1, "--seed", seed, said="Return a\n/exit\nx")
        for seed in (1, 1, 2)
    ]
    assert drawn[0].stdout == drawn[1].stdout != drawn[2].stdout
    assert "tokens/s" not in drawn[0].stderr
    assert isinstance(run("chat", "embedded:pydoc", said="").exception, UserError)


def test_generate_from_a_file(loaded: Any, tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "Return a", "id": 7}, {"messages": [{"role": "user", "content": "Open"}]}, {"prompt": "x"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    options = ("--file", file, "--chat-template", tmp_path / "template.jinja", "--max-new-tokens", 6)
    result = run("generate", "embedded:pydoc", *options, "--out", out, "--json")
    assert result.exit_code == 0
    figures = json.loads(result.stdout)
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [{key: row[key] for key in given} for given, row in zip(rows, written, strict=True)] == rows
    texts = complete(*loaded, ["Return a", "x"], 6)
    texts.insert(1, by_definition(*loaded, rows[1]["messages"], 6))
    assert [row["generated"] for row in written] == texts
    assert (figures["prompts"], figures["tokens"], figures["out"]) == (
        3,
        sum(r["generated_tokens"] for r in written),
        str(out),
    )
    assert figures["tokens_per_second"] == pytest.approx(figures["tokens"] / figures["seconds"])
    assert "3 prompts, " in result.stderr
    lines = run("generate", "embedded:pydoc", *options, "--batch-size", 1, "--json", "--quiet")
    assert [json.loads(line) for line in lines.stdout.splitlines()] == written
    assert "tokens/s" not in lines.stderr


def test_generate_refuses_before_it_writes(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Return a\n" + "word " * 600)
    for arguments, said in (
        ((), "give prompts, or a file of them by --file"),
        (("x", "--file", file), "give prompts, or a file of them by --file"),
        (("--file", file), rf"^{file}:2: \d+ tokens and 64 new ones \(--max-new-tokens\) are more than the 512 "),
        (("x", "--out", tmp_path), "this is a folder, a file is needed"),
        (("x", "--kv-bits", 5), "--kv-bits is 5"),
    ):
        with pytest.raises(UserError, match=said):
            CliRunner().invoke(cli.app, ["generate", "embedded:pydoc", *map(str, arguments)], catch_exceptions=False)
    assert os.listdir(tmp_path) == ["prompts.txt"]
