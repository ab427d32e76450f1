"""A checkpoint in several files, and what it is quantized to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hqqplus.streaming import Quantized
from tests.streaming.checkpoints import made, sharded


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def parent(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model with biases, in several files."""
    return sharded(random_model("qwen2", True), tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def whole(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """It quantized without interruption."""
    return made(parent, tmp_path_factory.mktemp("whole") / "out")
