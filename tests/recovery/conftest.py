"""What the tests of rows share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hqqplus import models


@pytest.fixture
def tokenizer(random_model: Callable[..., Path]) -> Any:
    """A letter is a token; nothing is put in front."""
    return models.load_tokenizer(str(random_model("llama")))


@pytest.fixture
def said() -> list[str]:
    """What a run says, to be filled."""
    return []
