"""The server, by a real client on localhost: a packed model with an adapter."""

from __future__ import annotations

import asyncio
import importlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from packaging.version import Version
from typer.testing import CliRunner

import hqqplus
from hqqplus import HqqPlusConfig, cli, models
from hqqplus.errors import UserError
from hqqplus.generation import continue_batches
from hqqplus.integrations import serving
from hqqplus.prompts import encode_messages
from tests.shipping import ship_random_adapter

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
if importlib.util.find_spec("transformers.cli.serving") is None:
    pytest.skip("this transformers has no server to build on", allow_module_level=True)

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
)
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def made(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A packed model, an adapter on it, and a chat template."""
    folder, parent = tmp_path_factory.mktemp("serving"), random_model("llama")
    hqqplus.quantize_folder(str(parent), folder / "packed", HqqPlusConfig(2, 32, metadata_bits=16))
    ship_random_adapter(folder / "packed", folder / "adapter")
    (folder / "template.jinja").write_text(TEMPLATE)
    loaded, tokenizer = models.load_with_tokenizer(folder / "packed", folder / "adapter")
    tokenizer.chat_template = TEMPLATE
    return SimpleNamespace(folder=folder, model=loaded, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def served(made: SimpleNamespace) -> Iterator[str]:
    """The address of a server in this process."""
    serving.check_available()
    with serving.bound("127.0.0.1", 0) as sock:
        config = uvicorn.Config(serving.build_app(made.model, made.tokenizer, "packed"), log_level="warning")
        server = uvicorn.Server(config)
        sock.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield serving.address(sock)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(served: str) -> Iterator[Any]:
    # Without what the environment may say of proxies.
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(made: SimpleNamespace, messages: list[dict[str, str]], count: int) -> str:
    ids = encode_messages(made.tokenizer, messages, "test")
    return continue_batches(made.model, made.tokenizer, [ids], count)[0].text


def test_a_plain_answer(made: SimpleNamespace, client: Any) -> None:
    messages = [{"role": "system", "content": "Write."}, *HI]
    answer = client.chat.completions.create(model="packed", messages=messages, max_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content == alone(made, messages, 12)
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.model == "packed"
    prompt = len(encode_messages(made.tokenizer, messages, "test"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 12)
    # The adapter is what makes it.
    with made.model.disable_adapter():
        assert alone(made, messages, 12) != choice.message.content


def test_streams(made: SimpleNamespace, client: Any) -> None:
    chunks = list(client.chat.completions.create(model="packed", messages=HI, max_tokens=12, stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(pieces) > 3
    # What bytes the answer ends with may be no whole character.
    assert "".join(pieces) == alone(made, HI, 12).rstrip("\ufffd")
    assert chunks[-1].choices[0].finish_reason == "length"


def test_texts(made: SimpleNamespace, client: Any) -> None:
    ids = made.tokenizer("once")["input_ids"]
    expected = continue_batches(made.model, made.tokenizer, [ids], 9)[0].text
    assert client.completions.create(model="packed", prompt="once", max_tokens=9).choices[0].text == expected
    assert [model.id for model in client.models.list()] == ["packed"]


@pytest.mark.xfail(
    Version(transformers.__version__) < Version("5.11"),
    reason="the responses of transformers 5.10 lack a field that openai 3 asks for",
    strict=True,
)
def test_responses(made: SimpleNamespace, client: Any) -> None:
    assert client.responses.create(model="packed", input="hi", max_output_tokens=9).output_text == alone(made, HI, 9)


def test_two_at_once_are_answered_as_alone(made: SimpleNamespace, client: Any) -> None:
    prompts = ["hi", "a longer one", "and a third", "x"]

    def plain(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return str(
            client.chat.completions.create(model="packed", messages=messages, max_tokens=16).choices[0].message.content
        )

    def drawn(seed: int) -> str:
        answer = client.chat.completions.create(model="packed", messages=HI, max_tokens=16, temperature=1, seed=seed)
        return str(answer.choices[0].message.content)

    expected = [alone(made, [{"role": "user", "content": prompt}], 16) for prompt in prompts]
    seeded = [drawn(seed) for seed in (1, 2)]
    assert seeded[0] != seeded[1]
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(plain, prompt) for prompt in prompts]
        sampled = [pool.submit(drawn, seed) for seed in (1, 2)]
        assert [future.result() for future in found] == expected
        assert [future.result() for future in sampled] == seeded


def test_bad_requests(made: SimpleNamespace, client: Any, served: str) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="meta-llama/Llama-3-8B", messages=HI)
    assert unknown.value.code == "model_not_found"
    assert "this server has 'packed'" in unknown.value.message
    for arguments, said in (
        ({"messages": []}, "messages must be a list of messages"),
        ({"temperature": -1}, "temperature is -1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "no tools"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "and the model's context is 256"),
        ({"extra_body": {"generation_config": '{"num_beams": "many"}'}}, "the request cannot be answered"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            create(**{"model": "packed", "messages": HI, "max_tokens": 4, **arguments})
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        client.completions.create(model="packed", prompt="")
    post = f"{served}/v1/chat/completions"
    for content in ("{", "[]", '"x"'):
        answer = httpx.post(post, content=content, headers={"content-type": "application/json"}, trust_env=False)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("the request is no JSON object")
    assert httpx.post(post, json={"messages": HI, "colour": 1}, trust_env=False).status_code == 422
    for path in ("/load_model", "/reset", "/v1/audio/transcriptions", "/docs", "/nothing"):
        answer = httpx.post(f"{served}{path}", json={"model": "packed"}, trust_env=False)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{served}/health", trust_env=False).json() == {"status": "ok"}
    answer = create(model="packed", messages=HI, max_tokens=4)
    assert answer.choices[0].message.content == alone(made, HI, 4)


def test_an_answer_ends_with_the_context(made: SimpleNamespace, client: Any) -> None:
    ids = made.tokenizer("x" * 250)["input_ids"]
    answer = client.completions.create(model="packed", prompt="x" * 250)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens <= 256 - len(ids)
    assert answer.choices[0].finish_reason == "length"


# Before and after ----------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken() -> None:
    with serving.bound("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"^--port: {port} on 127\.0\.0\.1: address already in use: choose another"
        ):
            CliRunner().invoke(cli.app, ["serve", "no/model", "--port", str(port)], catch_exceptions=False)
    with pytest.raises(UserError, match=r"^--host: 300\.0\.0\.1: "), serving.bound("300.0.0.1", 0):
        pass
    with serving.bound("0.0.0.0", 0) as sock:
        assert not serving.is_local(sock)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "NEEDED", ("torch", "no_such_package", "nor_this"))
    with pytest.raises(
        UserError, match=r"^serve needs the packages no_such_package, nor_this: pip install 'hqqplus\["
    ):
        serving.check_available()
    monkeypatch.setattr(serving, "NEEDED", ())
    monkeypatch.setitem(sys.modules, "transformers.cli.serving.server", None)  # as if there were none
    with pytest.raises(UserError, match=r"^serve needs the server of transformers 5\.6 or newer, and this is 5\."):
        serving.check_available()


def test_a_slow_tokenizer_is_refused(made: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="its tokenizer is a slow one"):
        serving.build_app(made.model, object(), "packed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_it(number: signal.Signals) -> None:
    """Answers that are being given get their time; then `run` returns, and signals mean what they did before."""
    seen: queue.Queue[str] = queue.Queue()

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            seen.put("shutdown")
            await send({"type": "lifespan.shutdown.complete"})
            return
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.2)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    before = signal.getsignal(number)
    with serving.bound("127.0.0.1", 0) as sock, ThreadPoolExecutor(1) as pool:
        sock.listen()
        answer = pool.submit(httpx.get, serving.address(sock), trust_env=False)
        serving.run(app, sock)
        assert answer.result().text == "ok"
    assert seen.get_nowait() == "shutdown"
    assert signal.getsignal(number) is before


@pytest.mark.slow
def test_the_command(made: SimpleNamespace) -> None:
    """In a process of its own: the line with the address, an answer, an end in the middle of another one."""
    command = [sys.executable, "-m", "hqqplus.cli", "serve", str(made.folder / "packed")]
    command += ["--adapter", str(made.folder / "adapter"), "--port", "0", "--name", "mine", "--device", "cpu"]
    command += ["--chat-template", str(made.folder / "template.jinja")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if " is served at " in line:
                    break
            else:
                raise AssertionError("".join(said))
            address = said[-1].partition(" is served at ")[2].split()[0]
            assert said[-1].startswith("mine is served at http://127.0.0.1:")
            with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
                answer = client.chat.completions.create(model="mine", messages=HI, max_tokens=8)
                assert answer.choices[0].message.content == alone(made, HI, 8)
                with client.chat.completions.create(model="mine", messages=HI, stream=True) as stream:
                    next(iter(stream))
                    process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            assert process.wait(60) == 0
            assert "Traceback" not in rest
        finally:
            process.kill()


def test_a_fingerprint_is_checked(made: SimpleNamespace, random_model: Callable[..., Path]) -> None:
    other = made.folder / "other"
    hqqplus.quantize_folder(str(random_model("llama")), other, HqqPlusConfig(4, 32, metadata_bits=16))
    line = ["serve", str(other), "--adapter", str(made.folder / "adapter"), "--port", "0"]
    with pytest.raises(UserError, match="this adapter was trained on 2-bit g32 of"):
        CliRunner().invoke(cli.app, line, catch_exceptions=False)


def test_the_socket_is_closed() -> None:
    with serving.bound("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
