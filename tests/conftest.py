"""What the tests share: real models and texts where they are present, a tiny random model where they are not
needed."""

from __future__ import annotations

import os

# Before any Hugging Face import: no network, no telemetry, no tokenizer threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# No example has a time limit: machines differ. In CI the examples are the same each time, so that a change is judged
# by what it changed; everywhere else they are new ones.
settings.register_profile("hqqplus", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("hqqplus")

ROOT = Path(__file__).resolve().parent.parent
LONGEST = ("test_readme.py", "test_notebooks.py", "test_docs.py", "test_kills.py", "test_exact_resume.py")
SHARED = ROOT.parent / "shared"


def load_benchmark(name: str) -> Any:
    """The module `benchmarks/NAME.py`, which is a script beside the package and not importable by name."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    # The longest files first: the processes that share the files out then end together.
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts that lies beside the repository."""
    if not (SHARED / "models").is_dir():
        pytest.skip("no ../shared with real models beside the repository")
    return SHARED


@pytest.fixture(scope="session", params=["stories260K", "tinystories-656K"])
def story_model(request: pytest.FixtureRequest, shared: Path) -> Path:
    """A real small Llama with a tied head (one of width 172, which no group size divides)."""
    return shared / "models" / request.param


@pytest.fixture(scope="session")
def tinystories(shared: Path) -> Path:
    return shared / "data" / "tinystories"


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make (once per kind) a tiny random model with a byte-level tokenizer: `random_model("qwen2", tied=True)`."""
    made: dict[tuple[str, bool], Path] = {}

    def make(kind: str = "llama", tied: bool = False) -> Path:
        if (kind, tied) not in made:
            made[kind, tied] = _write_random_model(tmp_path_factory.mktemp(kind), kind, tied)
        return made[kind, tied]

    return make


def byte_tokenizer() -> Any:
    """A tokenizer of 259 tokens: the bytes, begin, end and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _write_random_model(folder: Path, kind: str, tied: bool) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        kind,
        vocab_size=272,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python ARGS` in a new process at the root of the repository."""

    def run(*args: str, check: bool = True, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **kwargs.pop("env", {})}
        result = subprocess.run(
            [sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True, **kwargs
        )
        if check and result.returncode != 0:
            raise AssertionError(f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result

    return run
