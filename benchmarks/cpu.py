"""Packed layers on a CPU beside the reference, `F.linear` and PyPI hqq 0.2.8.

    python benchmarks/cpu.py [--repeats 5] [--threads N] [--output benchmarks/results/cpu.json]

Layers of random codes, in the shapes of Llama-3-8B. All routes of a row are timed in turns in one process; figures are
medians, of which the ratios count: other work on the machine shifts them all. Between two calls of a route the others
have pushed its weights out of the caches. hqq gets random codes of the same shape in its own order (PYTORCH backend,
axis 1, scales in the dtype of the product).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import markdown, timed, write_result
from torch import Tensor, nn

from hqqplus.kernels import cpu, reference
from hqqplus.kernels.packed import Packed
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.packing import packed_width
from hqqplus.quantization.spec import block_count

LAYERS = [(4096, 4096), (14336, 4096), (4096, 14336)]  # out_features, in_features
SPECS = [
    QuantSpec(1, 64, metadata_bits=16),
    QuantSpec(2, 64, metadata_bits=16),
    QuantSpec(2, 32, metadata_bits=8),
    QuantSpec(4, 64, metadata_bits=16),
]
ROWS = (1, 4, 16, 64, 512)
SLOW = 0.1
"""Seconds from which a route is timed only once after the first call."""


def random_packed(spec: QuantSpec, out_features: int, in_features: int) -> Packed:
    layout = spec.layout(out_features, in_features)
    shape = layout.rows, layout.groups
    W_q = torch.randint(0, 256, (layout.rows, packed_width(layout.padded, spec.nbits)), dtype=torch.uint8)
    if spec.metadata_bits == 8:
        codes = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(2)]
        maps = torch.rand(block_count(shape[0] * shape[1]), 4).mul_(0.01).half()
        maps[:, 1], maps[:, 3] = 0, 128
        return Packed(W_q, *codes, maps, spec, (out_features, in_features))
    scale = torch.rand(shape).mul_(0.01)
    return Packed(W_q, scale.half(), (-scale * spec.qmax / 2).half(), None, spec, (out_features, in_features))


def hqq_layer(spec: QuantSpec, out_features: int, in_features: int, dtype: torch.dtype) -> Any:
    """A layer of PyPI hqq with random codes: its solver would take minutes."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    config = BaseQuantizeConfig(nbits=spec.nbits, group_size=spec.group_size, axis=1)
    layer = HQQLinear(nn.Linear(256, 256, bias=False), config, compute_dtype=dtype, device="cpu")
    HQQLinear.set_backend(HQQBackend.PYTORCH)
    groups, per = out_features * in_features // spec.group_size, 8 // spec.nbits
    W_q = torch.randint(0, 256, (groups // per, spec.group_size), dtype=torch.uint8)
    layer.W_q = nn.Parameter(W_q, requires_grad=False)
    layer.meta["shape"] = torch.Size([out_features, in_features])
    layer.meta["scale"], layer.meta["zero"] = (torch.rand(groups, 1).mul_(0.01).to(dtype) for _ in range(2))
    layer.in_features, layer.out_features = in_features, out_features
    return layer


def seconds(routes: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Medians of the calls after a first one. Slow routes are called less often, the fast ones in turns."""
    first = {name: result[1] for name, result in timed(routes, 1).items()}
    slow = {name: function for name, function in routes.items() if first[name] > SLOW}
    fast = {name: function for name, function in routes.items() if name not in slow}
    measured = {**timed(slow, 1), **timed(fast, repeats)}
    return {name: measured[name][1] for name in routes}


@torch.no_grad()
def measure(spec: QuantSpec, shape: tuple[int, int], dense: dict[str, Tensor], repeats: int) -> list[dict[str, Any]]:
    packed = random_packed(spec, *shape)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    hqq = {name: hqq_layer(spec, *shape, dtype) for name, dtype in dtypes.items()}
    rows = []
    for count in ROWS:
        routes: dict[str, Callable[[], Any]] = {}
        for name, dtype in dtypes.items():
            x = torch.randn(count, shape[1], dtype=dtype)
            routes[f"ours {name}"] = lambda x=x: cpu.matmul(x, packed)
            routes[f"F.linear {name}"] = lambda x=x, name=name: nn.functional.linear(x, dense[name])
            if count in (ROWS[0], ROWS[-1]):  # these dequantize the whole layer, whatever the number of rows
                routes[f"reference {name}"] = lambda x=x: reference.matmul(x, packed)
                routes[f"hqq {name}"] = lambda x=x, name=name: hqq[name](x)
            if count == ROWS[-1]:
                dy = torch.randn(count, shape[0], dtype=dtype)
                routes[f"ours dx {name}"] = lambda dy=dy: cpu.matmul_dx(dy, packed)
                routes[f"dense dx {name}"] = lambda dy=dy, name=name: dy @ dense[name]
        found = seconds(routes, repeats if count < ROWS[-1] else max(repeats // 2, 1))
        milliseconds = {name: 1000 * value for name, value in found.items()}
        row = {"spec": f"{spec.nbits}-bit g{spec.group_size}, {spec.metadata_bits}-bit metadata", "layer": list(shape)}
        rows.append({**row, "rows": count, "milliseconds": milliseconds})
        print(json.dumps(rows[-1], default=str)[:400], flush=True)
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """Milliseconds, and how many times those of the dense product they are."""
    header = [
        "bits / group",
        "layer",
        "M",
        "F.linear bf16",
        "fp32",
        "ours bf16",
        "ours fp32",
        "reference bf16",
        "hqq bf16",
    ]
    lines = []
    for row in rows:
        t = row["milliseconds"]

        def ratio(name: str, t: dict[str, float] = t) -> str:
            if name not in t:
                return ""
            return f"{t[name]:.1f} ({t[name] / t['F.linear ' + name.split()[-1]]:.2f})"

        layer = f"{row['layer'][0]} x {row['layer'][1]}"
        dense = [f"{t['F.linear bf16']:.1f}", f"{t['F.linear fp32']:.1f}"]
        ours = [ratio(name) for name in ("ours bf16", "ours fp32", "reference bf16", "hqq bf16")]
        lines.append([row["spec"].split(",")[0], layer, str(row["rows"]), *dense, *ours])
    backward = [
        [
            row["spec"].split(",")[0],
            f"{row['layer'][0]} x {row['layer'][1]}",
            *(f"{t[f'ours dx {d}']:.1f} ({t[f'ours dx {d}'] / t[f'dense dx {d}']:.2f})" for d in ("bf16", "fp32")),
        ]
        for row in rows
        if "ours dx bf16" in (t := row["milliseconds"])
    ]
    return "\n\n".join(
        [markdown(header, lines), markdown(["bits / group", "layer", "dx bf16, M = 512", "dx fp32"], backward)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(len(LAYERS))), help="0, 1, 2")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for shape in (LAYERS[i] for i in args.layers):
        weight = torch.randn(shape)
        dense = {"fp32": weight, "bf16": weight.bfloat16()}
        for spec in SPECS:
            rows += measure(spec, shape, dense, args.repeats)
    result = {"capability": torch.backends.cpu.get_cpu_capability(), "results": rows}
    write_result(args.output, result, "hqq")
    print(tables(rows))


if __name__ == "__main__":
    main()
