"""The only files that touch the internals of transformers, PEFT and TRL."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import wrapt


def _importer(name: str) -> Callable[[Any], None]:
    def import_integration(_: Any) -> None:
        importlib.import_module(name)

    return import_integration


def register_when_imported() -> None:
    """Register with transformers and PEFT once they are imported, or now where they already are.

    The modules waited for are those that hold the registries, the last ones that our own imports need.
    """
    wrapt.register_post_import_hook(_importer("hqqplus.integrations.transformers"), "transformers.quantizers.auto")
    wrapt.register_post_import_hook(_importer("hqqplus.integrations.peft"), "peft.tuners.lora.model")
