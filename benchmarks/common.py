"""What the benchmarks share: the real models and texts, PyPI hqq's quantizer, and how results are written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# `kernels.py` beside this file is not the package of that name, which transformers would take it for.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
MODELS = ("tinystories-656K", "stories260K")


def hqq_dequantized(weight: Tensor, nbits: int, group_size: int, axis: int = 1) -> Tensor:
    """`weight` [out, in] after PyPI hqq with its default settings. It pads nothing: a width that `group_size` does not
    divide is padded with zeros here, as a user would have to."""
    from hqq.core.quantize import Quantizer

    rows, width = weight.shape
    size = weight.shape[axis]
    padding = -size % group_size
    pad = (0, padding) if axis == 1 else (0, 0, 0, padding)
    settings: dict[str, Any] = {"nbits": nbits, "group_size": group_size, "axis": axis}
    packed, meta = Quantizer.quantize(  # works in place on what it is given; its 3-bit packing fails for some shapes
        nn.functional.pad(weight.float(), pad).clone(),
        **settings,
        device="cpu",
        compute_dtype=torch.float32,
        bitpack=False,
    )
    return Quantizer.dequantize(packed, meta).float()[:rows, :width]


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> linear layer of a model, without the output head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}


def load_parent(name: str) -> tuple[Any, Any]:
    """(model in float32, tokenizer) of a model in `../shared/models`."""
    from hqqplus import models

    folder = str(SHARED / "models" / name)
    return models.load_causal_lm(folder, dtype="float32", device="cpu"), models.load_tokenizer(folder)


def windows(tokenizer: Any, max_tokens: int = 40_000, max_length: int = 256) -> Any:
    """The validation stories, each by itself, in windows of `max_length` tokens."""
    from hqqplus.data import RowForm, load_rows
    from hqqplus.evaluation.perplexity import make_windows

    rows = load_rows(str(SHARED / "data" / "tinystories" / "validation.jsonl"), "train", where="text")
    documents = RowForm(text_field="text").documents(rows, tokenizer)
    return make_windows(documents, tokenizer, max_length, max_tokens, "text")


def perplexity(model: Any, at: Any) -> float:
    from hqqplus.evaluation.perplexity import perplexity as measure

    return measure(model, at, 8).perplexity


def timed(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[Any, float]]:
    """(last result, median seconds) of each function, in turns: where speed drifts only ratios mean much."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            results[name] = function()
            seconds[name].append(time.perf_counter() - started)
    return {name: (results[name], statistics.median(values)) for name, values in seconds.items()}


def write_result(path: Path | None, result: dict[str, Any], *packages: str) -> None:
    """Write `result` with hardware and versions (of `packages`, beside those that hqqplus reports)."""
    if path is None:
        return
    from hqqplus.evaluation.report import environment

    result = {
        **result,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, no GPU",
        "versions": {**environment(), **{name: importlib.metadata.version(name) for name in packages}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
