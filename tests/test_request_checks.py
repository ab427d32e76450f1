"""What requests to the server are refused, by status and field."""

from __future__ import annotations

from typing import Any

import pytest

from hqqplus.request_checks import BadRequest, check_request

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("chat", CHAT),
        ("chat", {"messages": CHAT["messages"]}),
        (
            "chat",
            {**CHAT, "temperature": 0, "top_p": 1, "seed": -1, "max_tokens": 1, "stop": ["a", "b"], "stream": None},
        ),
        ("chat", {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}),
        ("chat", {**CHAT, "messages": [{"role": "assistant", "tool_calls": []}], "n": 1}),
        ("chat", {**CHAT, "generation_config": '{"do_sample": true}'}),
        ("completions", {**TEXT, "prompt": ""}),
        ("responses", {"model": "m", "input": "hi", "max_output_tokens": 5}),
        ("responses", {"model": "m", "input": [*CHAT["messages"], {"type": "function_call_output"}]}),
    ],
)
def test_good_ones(kind: str, body: dict[str, Any]) -> None:
    check_request(kind, body, "m", True)


@pytest.mark.parametrize(
    ("kind", "change", "param"),
    [
        ("chat", {"model": "other"}, "model"),
        ("chat", {"model": None}, "model"),
        ("chat", {"messages": None}, "messages"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": "hi"}, "messages"),
        ("chat", {"messages": ["hi"]}, "messages"),
        ("chat", {"messages": [{"content": "hi"}]}, "messages"),
        ("chat", {"messages": [{"role": "user"}]}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ("completions", {"prompt": ["hi"]}, "prompt"),
        ("completions", {"prompt": None}, "prompt"),
        ("responses", {"input": None}, "input"),
        ("responses", {"input": [{"role": "user", "content": 1}]}, "input"),
        *(("chat", {"max_tokens": value}, "max_tokens") for value in (0, -1, 1.5, True, "5")),
        *(("chat", {"temperature": value}, "temperature") for value in (-1, "hot", float("nan"), True)),
        ("chat", {"top_p": 1.1}, "top_p"),
        ("chat", {"frequency_penalty": -1}, "frequency_penalty"),
        ("chat", {"seed": 2**63}, "seed"),
        ("chat", {"seed": 0.5}, "seed"),
        ("chat", {"n": 2}, "n"),
        ("chat", {"stop": 1}, "stop"),
        ("chat", {"stop": [""]}, "stop"),
        ("chat", {"stream": "yes"}, "stream"),
        ("chat", {"chat_template_kwargs": []}, "chat_template_kwargs"),
        ("chat", {"generation_config": "{"}, "generation_config"),
        ("chat", {"generation_config": "[]"}, "generation_config"),
        ("chat", {"generation_config": {}}, "generation_config"),
    ],
)
def test_bad_ones(kind: str, change: dict[str, Any], param: str) -> None:
    body = {**{"chat": CHAT, "completions": TEXT, "responses": {"input": "hi"}}[kind], **change}
    with pytest.raises(BadRequest) as refused:
        check_request(kind, body, "m", True)
    assert refused.value.param == param
    assert refused.value.status == (404 if param == "model" else 400)
    assert param in refused.value.message
    assert len(refused.value.message) < 200


def test_without_a_template_there_are_completions_only() -> None:
    check_request("completions", TEXT, "m", False)
    for kind, body in (("chat", CHAT), ("responses", {"input": "hi"})):
        with pytest.raises(BadRequest, match=r"--chat-template FILE"):
            check_request(kind, body, "m", False)
