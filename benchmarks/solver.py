"""The solver beside PyPI hqq 0.2.8: error, speed, distance to the optimum, perplexity without recovery.

    python benchmarks/solver.py [--parts nmse speed metadata optimum perplexity] [--output FILE]

Both quantize the same matrices in the same run, in groups along the input (axis 1; for perplexity also hqq's axis 0).
Seconds are medians taken in turns: read their ratio, not their values. Perplexity is that of real small models in
`../shared` with no training of any kind; the gap is ln(perplexity / parent's perplexity).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    MODELS,
    ROOT,
    hqq_dequantized,
    layers,
    load_parent,
    markdown,
    perplexity,
    timed,
    windows,
    write_result,
)
from torch import Tensor

from hqqplus.quantization import QuantSpec, quantize, solver

sys.path.insert(0, str(ROOT))
from tests.quantization.exhaustive import best_error

BITS, GROUPS = (1, 2, 3, 4), (16, 32, 64, 128)


def weights() -> dict[str, Tensor]:
    """Matrices of 8 M weights, and all linear layers of a real model one under the other."""
    torch.manual_seed(0)
    shape = (2048, 4096)
    student = torch.distributions.StudentT(5.0)
    rows = [module.weight.data for module in layers(load_parent(MODELS[0])[0]).values()]
    return {
        "Gaussian": 0.02 * torch.randn(shape),
        "Student-t (5)": 0.02 * student.sample(shape),
        MODELS[0]: torch.cat([row.reshape(-1, 128) for row in rows]),
    }


def nmse(weight: Tensor, approximation: Tensor) -> float:
    return ((weight - approximation).square().sum() / weight.square().sum()).item()


def part_nmse(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, weight in weights().items():
        for nbits in BITS:
            for group in GROUPS:
                spec = QuantSpec(nbits, group, metadata_bits=16)
                measured = timed(
                    {
                        "hqq": lambda w=weight, b=nbits, g=group: hqq_dequantized(w, b, g),
                        "ours": lambda w=weight, s=spec: quantize(w, s),
                    },
                    1 if weight.numel() > 2**20 else repeats,
                )
                packed = measured["ours"][0]
                row = {
                    "weights": name,
                    "nbits": nbits,
                    "group_size": group,
                    "bits_per_weight": packed.bits_per_weight,
                    "nmse_hqq": nmse(weight, measured["hqq"][0]),
                    "nmse": packed.nmse(weight),
                    "seconds_hqq": measured["hqq"][1],
                    "seconds": measured["ours"][1],
                }
                rows.append(row)
                print(
                    f"{name:16} {nbits} / {group:3}   NMSE {row['nmse_hqq']:.5f} -> {row['nmse']:.5f}   "
                    f"{row['seconds_hqq'] / row['seconds']:.1f} times as fast",
                    flush=True,
                )
    return rows


def part_speed(repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(4096, 4096)
    rows = []
    for nbits, group in ((1, 64), (2, 64), (2, 32)):
        spec = QuantSpec(nbits, group, metadata_bits=16)
        measured = timed(
            {
                "hqq": lambda b=nbits, g=group: hqq_dequantized(weight, b, g),
                "ours": lambda s=spec: quantize(weight, s),
            },
            repeats,
        )
        seconds = {name: value for name, (_, value) in measured.items()}
        rows.append({"nbits": nbits, "group_size": group, "seconds_hqq": seconds["hqq"], "seconds": seconds["ours"]})
        print(
            f"4096 x 4096, {nbits} / {group}: {seconds['hqq']:.2f} s -> {seconds['ours']:.2f} s, "
            f"{seconds['hqq'] / seconds['ours']:.1f} times as fast",
            flush=True,
        )
    return rows


def part_metadata() -> list[dict[str, Any]]:
    """What 8-bit scales and offsets cost, and what smaller groups make of the room."""
    rows = []
    for name, weight in weights().items():
        for nbits in BITS:
            for group in (32, 64):
                row: dict[str, Any] = {"weights": name, "nbits": nbits, "group_size": group}
                for bits in (8, 16):
                    packed = quantize(weight, QuantSpec(nbits, group, metadata_bits=bits))
                    row |= {f"nmse_{bits}": packed.nmse(weight), f"bits_per_weight_{bits}": packed.bits_per_weight}
                rows.append(row)
                print(
                    f"{name:16} {nbits} / {group}: 16-bit metadata {row['nmse_16']:.5f} "
                    f"({row['bits_per_weight_16']:.3f} bpw), 8-bit {row['nmse_8']:.5f} "
                    f"({row['bits_per_weight_8']:.3f} bpw), {100 * (row['nmse_8'] / row['nmse_16'] - 1):+.3f} %",
                    flush=True,
                )
    return rows


def part_optimum(scale: float, thorough: bool) -> list[dict[str, Any]]:
    """How far the search ends from the best grid there is, before anything is rounded for storage."""
    rng = np.random.default_rng(0)
    real = np.concatenate(
        [m.weight.data.reshape(-1).numpy() for name in MODELS for m in layers(load_parent(name)[0]).values()]
    )
    rows = []
    for nbits in (2, 3, 4):
        for group in (8, *GROUPS):
            count = int(scale * {2: 300, 3: 100, 4: 40}[nbits] * (1 if group < 128 else 0.4))
            kinds = {
                "Gaussian": rng.standard_normal((count, group)),
                "uniform": rng.random((count, group)),
                "Laplace": rng.laplace(size=(count, group)),
                "Student-t (5)": rng.standard_t(5, (count, group)),
                "Student-t (3)": rng.standard_t(3, (count, group)),
                "real": real[: len(real) // group * group].reshape(-1, group)[
                    rng.permutation(len(real) // group)[:count]
                ],
            }
            for kind, groups in kinds.items():
                x = torch.tensor(groups, dtype=torch.float32)
                middle, half = (x.amin(1) + x.amax(1)) / 2, (x.amax(1) - x.amin(1)) / 2
                s, o = solver.fit(((x - middle[:, None]) / half[:, None]).t().contiguous(), None, nbits, thorough)
                s, o = (s.squeeze(0) * half).double(), (o.squeeze(0) * half + middle).double()
                codes = ((x - o[:, None]) / s[:, None]).round().clamp(0, 2**nbits - 1)
                found = (x - s[:, None] * codes - o[:, None]).square().sum(1).numpy()
                least = np.array([best_error(row, 2**nbits - 1) for row in x.numpy()])
                gap = found / least - 1
                rows.append(
                    {
                        "weights": kind,
                        "nbits": nbits,
                        "group_size": group,
                        "groups": count,
                        "mean": float(gap.mean()),
                        "worst": float(gap.max()),
                        "above_1_percent": float((gap > 0.01).mean()),
                    }
                )
            last = rows[-len(kinds) :]
            print(
                f"{nbits} / {group:3}: above the optimum by "
                f"{100 * max(r['mean'] for r in last):.3f} % on average at most, "
                f"{100 * max(r['worst'] for r in last):.1f} % at worst; more than 1 %: "
                f"{100 * float(np.mean([r['above_1_percent'] for r in last])):.1f} % of groups",
                flush=True,
            )
    return rows


def part_perplexity() -> list[dict[str, Any]]:
    routes = {
        "hqq axis 1": lambda w, b, g: hqq_dequantized(w, b, g, axis=1),
        "hqq axis 0": lambda w, b, g: hqq_dequantized(w, b, g, axis=0),
        "hqqplus": lambda w, b, g: quantize(w, QuantSpec(b, g, metadata_bits=16)).dequantize(),
        "hqqplus, 8-bit metadata": lambda w, b, g: quantize(w, QuantSpec(b, g, metadata_bits=8)).dequantize(),
    }
    rows = []
    for name in MODELS:
        model, tokenizer = load_parent(name)
        at = windows(tokenizer)
        parent = perplexity(model, at)
        originals = {key: module.weight.data.clone() for key, module in layers(model).items()}
        for nbits in BITS:
            for group in (32, 64):
                row: dict[str, Any] = {"model": name, "nbits": nbits, "group_size": group, "parent": parent}
                for route, quantized in routes.items():
                    for key, module in layers(model).items():
                        module.weight.data = quantized(originals[key], nbits, group)
                    row[route] = perplexity(model, at)
                rows.append(row)
                best = min(row["hqq axis 1"], row["hqq axis 0"])
                ratio = math.log(row["hqqplus"] / parent) / math.log(row["hqq axis 1"] / parent)
                against_best = math.log(row["hqqplus"] / parent) / math.log(best / parent)
                figures = ", ".join(f"{route} {row[route]:.2f}" for route in routes)
                print(
                    f"{name} {nbits} / {group}: parent {parent:.2f}, {figures}; gap {ratio:.2f} of hqq's (axis 1), "
                    f"{against_best:.2f} of its better axis",
                    flush=True,
                )
    return rows


def tables(result: dict[str, Any]) -> str:
    """The figures as markdown."""
    parts = []
    if "nmse" in result:
        rows = [
            [
                r["weights"],
                f"{r['nbits']} / {r['group_size']}",
                f"{r['bits_per_weight']:.2f}",
                f"{r['nmse_hqq']:.4g}",
                f"{r['nmse']:.4g}",
                f"{r['seconds_hqq'] / r['seconds']:.1f}",
            ]
            for r in result["nmse"]
        ]
        header = ["weights", "bits / group", "bits per weight", "NMSE hqq 0.2.8", "NMSE hqqplus", "times as fast"]
        parts.append(markdown(header, rows))
    if "perplexity" in result:
        routes = ["parent", "hqq axis 1", "hqq axis 0", "hqqplus", "hqqplus, 8-bit metadata"]
        rows = [
            [r["model"], f"{r['nbits']} / {r['group_size']}", *(f"{r[k]:.2f}" for k in routes)]
            for r in result["perplexity"]
        ]
        parts.append(markdown(["model", "bits / group", *routes], rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["nmse", "speed", "metadata", "optimum", "optimum_thorough", "perplexity"]
    parser.add_argument("--parts", nargs="+", choices=choices, default=choices)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--groups-share", type=float, default=1.0, help="of the groups of part optimum (slow)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {}
    if args.output and args.output.exists():
        result = json.loads(args.output.read_text(encoding="utf-8"))  # parts that are not measured now stay
    parts = {
        "speed": lambda: part_speed(args.repeats),
        "nmse": lambda: part_nmse(args.repeats),
        "metadata": part_metadata,
        "optimum": lambda: part_optimum(args.groups_share, thorough=False),
        "optimum_thorough": lambda: part_optimum(args.groups_share, thorough=True),
        "perplexity": part_perplexity,
    }
    for name, measure in parts.items():
        if name in args.parts:
            result[name] = measure()
            write_result(args.output, result, "hqq")
    print(tables(result))


if __name__ == "__main__":
    main()
