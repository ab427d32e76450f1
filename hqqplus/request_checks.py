"""What is asked of a request to the server before the model gets to see it: errors that name the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Fields of which a server with one model and one answer takes no more than this.
_ONLY_ONE = ("n", "best_of")


class BadRequest(Exception):
    """A request that cannot be answered: its sentence, the status code of HTTP, and the field at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


def check_request(kind: str, body: Mapping[str, Any], name: str, has_template: bool) -> None:
    """Refuse `body`, a request of one `kind` (`chat`, `completions` or `responses`), to the server of model `name`.

    Raises:
        BadRequest: 404 for another model, else 400.
    """
    model = body.get("model", name)
    if model != name:
        raise BadRequest(
            f"there is no model {model!r} here: this server has {name!r}", "model", 404, "model_not_found"
        )
    if kind != "completions" and not has_template:
        raise BadRequest(
            "the tokenizer has no chat template: use /v1/completions, or start the server with --chat-template FILE",
            "messages",
        )
    if kind == "chat":
        _check_messages(body.get("messages"), "messages")
    elif kind == "completions":
        if not isinstance(body.get("prompt"), str):
            raise BadRequest("prompt must be a string", "prompt")
    elif isinstance(body.get("input"), list):
        _check_messages(body["input"], "input")
    elif not isinstance(body.get("input"), str) or not body["input"]:
        raise BadRequest("input must be a string, or a list of messages", "input")
    _check_numbers(body)
    stop = body.get("stop")
    stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if not all(isinstance(text, str) and text for text in stops):
        raise BadRequest("stop must be a string, or a list of strings", "stop")
    if not isinstance(body.get("stream"), bool | None):
        raise BadRequest("stream must be true or false", "stream")
    if not isinstance(body.get("chat_template_kwargs"), dict | None):
        raise BadRequest("chat_template_kwargs must be an object", "chat_template_kwargs")
    _check_config(body.get("generation_config"))


def _check_messages(messages: Any, field: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadRequest(f"{field} must be a list of messages", field)
    for number, message in enumerate(messages):
        where = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise BadRequest(f"{where} must be an object with role and content", field)
        if field == "input" and "role" not in message:
            continue  # the other items that an input may hold
        if not isinstance(message.get("role"), str):
            raise BadRequest(f"{where}.role must be a string", field)
        content = message.get("content")
        if content is None and ("tool_calls" in message or message["role"] == "assistant"):
            continue
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                    raise BadRequest(f"{where}.content: this model reads text only, in parts of type text", field)
        elif not isinstance(content, str):
            raise BadRequest(f"{where}.content must be a string", field)


def _check_numbers(body: Mapping[str, Any]) -> None:
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        value = body.get(field)
        if value is not None and (not _is_int(value) or value < 1):
            raise BadRequest(f"{field} is {_short(value)}: it must be a whole number above 0", field)
    for field, low, high in (("temperature", 0, 100), ("top_p", 0, 1), ("frequency_penalty", -0.99, 2)):
        value = body.get(field)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise BadRequest(f"{field} is {_short(value)}: it must be a number from {low} to {high}", field)
    seed = body.get("seed")
    if seed is not None and (not _is_int(seed) or not -(2**63) <= seed < 2**63):
        raise BadRequest(f"seed is {_short(seed)}: it must be a whole number of 64 bits", "seed")
    for field in _ONLY_ONE:
        if body.get(field) not in (None, 1):
            raise BadRequest(f"{field} is {_short(body[field])}: one answer a request is all there is", field)


def _check_config(config: Any) -> None:
    """The generation config that `transformers chat` sends: JSON in a string."""
    if config is None:
        return
    try:
        found = json.loads(config)
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadRequest("generation_config must be a string that holds a JSON object", "generation_config")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
