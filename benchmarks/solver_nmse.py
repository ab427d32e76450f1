"""NMSE and time of the solver beside PyPI hqq 0.2.8, on Gaussian weights.

    python benchmarks/solver_nmse.py [--output benchmarks/results/solver_nmse.json]

Both quantize the same matrix in the same run, along the input (axis 1). Times are medians; read their ratio, not their
values.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import Quantizer

from hqqplus.evaluation.report import environment
from hqqplus.quantization import QuantSpec, quantize

CASES = [(1, 8), (1, 32), (1, 64), (2, 16), (2, 32), (2, 64), (2, 128), (3, 64), (4, 64), (8, 64)]
SHAPE, REPEATS = (1024, 2048), 3


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - started)
    return result, statistics.median(seconds)


def case(weight: torch.Tensor, nbits: int, group_size: int) -> dict[str, Any]:
    settings = {"nbits": nbits, "group_size": group_size, "axis": 1}

    def theirs() -> torch.Tensor:
        # hqq works in place on what it is given
        packed, meta = Quantizer.quantize(
            weight.clone(), **settings, device="cpu", compute_dtype=torch.float32, bitpack=True
        )
        return Quantizer.dequantize(packed, meta).float()

    reference, reference_seconds = timed(theirs)
    packed, seconds = timed(lambda: quantize(weight, QuantSpec(**settings)))
    reference_nmse = ((weight - reference).square().sum() / weight.square().sum()).item()
    return {
        "nbits": nbits,
        "group_size": group_size,
        "bits_per_weight": packed.bits_per_weight,
        "nmse_hqq": reference_nmse,
        "nmse": packed.nmse(weight),
        "seconds_hqq": reference_seconds,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(SHAPE)
    rows = [case(weight, *settings) for settings in CASES]
    for row in rows:
        ratio = row["seconds_hqq"] / row["seconds"]
        name = f"{row['nbits']} / {row['group_size']:3}"
        print(f"{name}   NMSE {row['nmse_hqq']:.5f} -> {row['nmse']:.5f}   {ratio:.1f} times as fast")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "shape": SHAPE,
            "rows": rows,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, no GPU",
            "versions": {**environment(), "hqq": __import__("importlib.metadata").metadata.version("hqq")},
        }
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
