"""The OpenAI-compatible server of transformers, with one model that was loaded here and no way to load another.

Its handlers, its streaming and its application are used as they are. What is put around them:

    the model manager       holds the one model; its name is the only one that is answered to
    the generation manager  ends an answer where the context does, sets a seed right before its request is answered,
                            and stops at once when the server goes
    the handlers            refuse a bad request by a status of 4xx and a sentence that names the field
    the application         has no route that loads, unloads or listens; errors have OpenAI's form
"""

from __future__ import annotations

import importlib.util
import inspect
import ipaddress
import logging
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError

from hqqplus.errors import UserError
from hqqplus.generation import context_length
from hqqplus.request_checks import BadRequest, check_request

NEEDED = ("fastapi", "uvicorn", "openai")
# The routes that are kept: (path, kind of request, module and class of the handler).
_HANDLERS = {
    "chat_handler": ("chat", "chat_completion", "ChatCompletionHandler"),
    "completion_handler": ("completions", "completion", "CompletionHandler"),
    "response_handler": ("responses", "response", "ResponseHandler"),
}
_ROUTES = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health"}
# How long answers may go on once the server is told to stop.
_GRACE_SECONDS = 5
_log = logging.getLogger(__name__)


def check_available() -> None:
    """Refuse, before a model is loaded, where packages are missing or transformers has no server to build on.

    Raises:
        UserError: with what to install.
    """
    import transformers

    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"serve needs the package{'s' * bool(missing[1:])} {', '.join(missing)}: pip install 'hqqplus[serve]'"
        )
    try:
        server = importlib.import_module("transformers.cli.serving.server")
        wanted = set(inspect.signature(server.build_server).parameters)
        found = all(hasattr(_module(module), name) for _, module, name in _HANDLERS.values())
    except (ImportError, AttributeError):
        wanted, found = set(), False
    if not found or not wanted >= {"model_manager", *_HANDLERS}:
        raise UserError(
            f"serve needs the server of transformers 5.6 or newer, and this is {transformers.__version__}: "
            "pip install --upgrade transformers"
        )


def _module(name: str) -> Any:
    return importlib.import_module(f"transformers.cli.serving.{name}")


def build_app(model: Any, tokenizer: Any, name: str, quiet: bool = False) -> Any:
    """The application (FastAPI) that serves `model` under `name`. `quiet`: no line for every request.

    Raises:
        UserError: for a tokenizer that cannot be streamed from.
    """
    if not hasattr(tokenizer, "_tokenizer"):
        raise UserError(
            f"serve: {name}: its tokenizer is a slow one, and the server needs a fast one (tokenizer.json)"
        )
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    if quiet:
        logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
    generations = _generations(context_length(model))
    manager = _manager(model, tokenizer, name, generations)
    state = _state(generations)
    build_server = _module("server").build_server
    arguments: dict[str, Any] = {"model_manager": manager, "generation_state": state}
    for parameter, (kind, module, class_name) in _HANDLERS.items():
        handler = _checked(getattr(_module(module), class_name), kind, name, bool(tokenizer.chat_template))
        arguments[parameter] = handler(model_manager=manager, generation_state=state)
    # Handlers of sound and the like, for routes that are taken out below.
    parameters = inspect.signature(build_server).parameters
    app = build_server(
        **{parameter: arguments.get(parameter) for parameter in parameters if parameter != "enable_cors"}
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in _ROUTES]

    @app.exception_handler(HTTPException)
    async def refused(_: Any, error: HTTPException) -> Any:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def unreadable(_: Any, error: RequestValidationError) -> Any:
        said = "; ".join(str(fault.get("msg")) for fault in error.errors())
        return _error(400, f"the request is no JSON object: {said}")

    @app.exception_handler(BadRequest)
    async def bad(_: Any, error: BadRequest) -> Any:
        return _error(error.status, error.message, error.param, error.code)

    return app


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> Any:
    from fastapi.responses import JSONResponse

    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status)


def _checked(handler: type, kind: str, name: str, has_template: bool) -> type:
    """`handler`, a handler class of transformers, behind checks."""

    class Checked(handler):  # type: ignore[misc]
        async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
            check_request(kind, body, name, has_template)
            body["model"] = name
            if kind == "responses":  # theirs streams unless told otherwise, OpenAI's does not
                body["stream"] = bool(body.get("stream"))
            try:
                return await super().handle_request(body, request_id)
            except (BadRequest, _http_exception()):
                raise
            except (ValueError, TypeError, KeyError, _template_error()) as error:
                if isinstance(error, ValidationError):  # of the answer, by openai's classes
                    _log.exception("%s", request_id)
                    raise BadRequest(f"the answer could not be put into words: {error}", status=500) from error
                said = " ".join(str(error).split()) or type(error).__name__
                raise BadRequest(f"the request cannot be answered: {said}") from error
            except Exception as error:
                _log.exception("%s", request_id)
                raise BadRequest(f"{type(error).__name__}: {error}", status=500) from error

        def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            # Theirs sets the seed here, in the middle of other answers.
            config = super()._build_generation_config({**body, "seed": None}, *args, **kwargs)
            config.hqqplus_seed = body.get("seed")
            if body.get("temperature"):  # as OpenAI's: a temperature asks for sampling
                config.do_sample = True
            return config

    return Checked


def _http_exception() -> type[Exception]:
    from starlette.exceptions import HTTPException

    return HTTPException


def _template_error() -> type[Exception]:
    from jinja2 import TemplateError

    return TemplateError


def _manager(model: Any, tokenizer: Any, name: str, generations: Any) -> Any:
    """The model manager of transformers with one model in it, which stays."""

    class OneModel(_module("model_manager").ModelManager):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:  # theirs prepares to load models
            self.force_model = name

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if model_id_and_revision != name:
                raise BadRequest(f"there is no model {model_id_and_revision!r} here", "model", 404, "model_not_found")
            return model, tokenizer

        def load_model_streaming(self, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
            raise BadRequest("this server loads no models", "model", 404)

        def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "created": 0, "owned_by": "hqqplus"}]

        def shutdown(self) -> None:
            generations.end()

    return OneModel()


def _generations(context: int | None) -> Any:
    """The generation manager of transformers: answers one after the other, in a thread of its own."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    ended = threading.Event()

    class Ended(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
            return torch.full((input_ids.shape[0],), ended.is_set(), dtype=torch.bool, device=input_ids.device)

    class Generations(_module("utils").GenerateManager):  # type: ignore[misc, name-defined]
        def generate_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, *a: Any, **k: Any
        ) -> Any:
            return super().generate_streaming(
                model, processor, self._prepared(inputs, gen_config), gen_config, *a, **k
            )

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, *a: Any, **k: Any
        ) -> Any:
            inputs = self._prepared(inputs, gen_config)
            return await super().generate_non_streaming(model, processor, inputs, gen_config, *a, **k)

        def _prepared(self, inputs: Any, gen_config: Any) -> dict[str, Any]:
            """What `generate` takes of the inputs. The seed is set right before: jobs are done in their order, and
            nothing else is handed in between here and there."""
            length = inputs["input_ids"].shape[-1]
            if length == 0:
                raise BadRequest("the prompt is empty")
            if context is not None:
                if length >= context:
                    said = f"the prompt has {length} tokens, and the model's context is {context}"
                    raise BadRequest(said, code="context_length_exceeded")
                gen_config.max_new_tokens = min(gen_config.max_new_tokens or context, context - length)
            seed = vars(gen_config).pop("hqqplus_seed", None)
            if seed is not None:
                self.submit(torch.manual_seed, seed)
            # Not the token types that some tokenizers add.
            taken = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
            return {**taken, "stopping_criteria": StoppingCriteriaList([Ended()])}

        def end(self) -> None:
            """End all answers, and wait until they have."""
            ended.set()
            self.submit(lambda: None).result(timeout=60)

    return Generations()


def _state(generations: Any) -> Any:
    """The generation state of transformers, which hands the one manager to all handlers."""

    class OneManager(_module("utils").GenerationState):  # type: ignore[misc, name-defined]
        def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
            return generations

    return OneManager()


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at `host` and `port` (0: one that is free), taken before a model is loaded in vain.

    Raises:
        UserError: if the host is unknown, or the port taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host: {host}: {error.strerror or error}") from None
    with socket.socket(family, kind, protocol) as sock:
        if sys.platform != "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError as error:
            said = (error.strerror or str(error)).lower()
            raise UserError(
                f"--port: {port} on {host}: {said}: choose another one, or 0 for any that is free"
            ) from None
        yield sock


def address(sock: socket.socket) -> str:
    """`http://127.0.0.1:8000`."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(sock: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback


def run(app: Any, sock: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM. Answers may then go on for some seconds; a second SIGINT ends them at once."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS, lifespan="on")
    server = uvicorn.Server(config)
    with _no_end_by_signals(server):
        server.run(sockets=[sock])


@contextmanager
def _no_end_by_signals(server: Any) -> Iterator[None]:
    """uvicorn stops in order, and then raises the signal again for whoever handled it before: that is this here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
