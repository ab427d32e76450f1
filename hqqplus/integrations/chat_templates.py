"""TRL's chat templates: those that mark what the assistant says."""

from __future__ import annotations

from typing import Any

from trl.chat_template_utils import get_training_chat_template, has_generation_markers


def training_template(tokenizer: Any) -> str | None:
    """The template with which TRL finds the assistant's tokens; None for the tokenizer's own, which marks them."""
    if has_generation_markers(tokenizer.chat_template):
        return None
    found: str | None = get_training_chat_template(tokenizer)
    return found
