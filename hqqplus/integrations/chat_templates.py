"""TRL's chat templates: those that mark what the assistant says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from hqqplus.errors import UserError


def training_template(tokenizer: Any) -> str | None:
    """The template with which TRL finds the assistant's tokens; None for the tokenizer's own, which marks them."""
    if has_generation_markers(tokenizer.chat_template):
        return None
    found: str | None = get_training_chat_template(tokenizer)
    return found


def marks_assistant(tokenizer: Any) -> bool:
    """Whether the assistant's tokens can be told: by the tokenizer's own chat template, or by one that TRL knows."""
    try:
        training_template(tokenizer)
    except ValueError:
        return False
    return True


def settle_template(tokenizer: Any, path: str | None) -> None:
    """Give `tokenizer` the chat template of a file, where one is named.

    Raises:
        UserError: if the template is to be taken from another model, which TRL can do with a model alone; or if the
            file cannot be read.
    """
    if path is None:
        return
    if not (os.path.isfile(path) and path.endswith((".jinja", ".j2"))):
        raise UserError(f"training.chat_template_path: {path}: give a file that ends in .jinja or .j2")
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"training.chat_template_path: {path}: cannot be read as UTF-8 text: {error}") from None
