"""Instructions a weight of the product kernels, without a GPU: `python benchmarks/sass.py [--capabilities 89 90]`.

Compiles every shipped configuration of `hqqplus/kernels/triton` for real GPUs and counts the SASS instructions of its
main loop, which is what a card has to issue while the packed bytes stream in: for one weight the instructions of one
lane, times the lanes of the program, over the weights of a pass through the loop. What stands before and behind the
loop (addresses, the middles of the groups, the sum of the shares) is not in it. At full bandwidth there is room for
11.6 instructions a weight on an L4 and for 1.9 on an H200 at 2 bits in groups of 64 (128 lanes an SM at 1.5 and 1.755
GHz, 300 and 4800 GB/s); both are computed limits, nothing here is a time.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import markdown, write_result
from sass_tools import CAPABILITIES, Code, compile_call, inspect

from hqqplus.kernels.packed import Packed
from hqqplus.kernels.triton import dequantize, gemm, general, matmul, simt
from hqqplus.kernels.triton.product import Launch
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.tensor import state_shapes

RESULT = Path(__file__).parent / "results" / "sass.json"
SHAPE = (4096, 4096)
SPECS = {
    "2-bit g64": QuantSpec(2, 64, metadata_bits=16),
    "2-bit g32, 8-bit metadata": QuantSpec(2, 32),
    "1-bit g64": QuantSpec(1, 64, metadata_bits=16),
    "1-bit g32, 8-bit metadata": QuantSpec(1, 32),
    "4-bit g64": QuantSpec(4, 64, metadata_bits=16),
    "8-bit g64": QuantSpec(8, 64, metadata_bits=16),
    "2-bit g128": QuantSpec(2, 128, metadata_bits=16),
}
# (kernel, rows of x)
PRODUCTS = [("matmul", 1), ("matmul", 16), ("gemm", 32), ("gemm", 64), ("simt", 1), ("simt", 4)]


class Count(NamedTuple):
    """What one compiled kernel takes. `a_weight` are instructions of a lane in the main loop, for each weight."""

    a_weight: float
    registers: int
    spills: int
    shared: int


def packed_on_meta(spec: QuantSpec, shape: tuple[int, int] = SHAPE) -> Packed:
    """A packed matrix without data: enough to compile for."""
    tensors = {
        name: torch.empty(size, dtype=dtype, device="meta")
        for name, (size, dtype) in state_shapes(spec, *shape).items()
    }
    if spec.metadata_bits == 16:
        layout = spec.layout(*shape)
        for name in ("scale", "offset"):
            tensors[name] = torch.empty(layout.rows, layout.groups, dtype=torch.float16, device="meta")
    blocks = (
        torch.empty(len(tensors["blocks"]), 4, dtype=torch.float16, device="meta") if "blocks" in tensors else None
    )
    return Packed(tensors["W_q"], tensors["scale"], tensors["offset"], blocks, spec, shape)


def launch_of(kernel: str, rows: int, packed: Packed, dtype: torch.dtype = torch.bfloat16) -> Launch:
    """The launch of the product itself for `rows` rows of x, with a bias, K split in four."""
    module: Any = {"matmul": matmul, "gemm": gemm, "simt": simt, "general": general}[kernel]
    x = torch.empty(rows, packed.shape[1], dtype=dtype, device="meta")
    y = torch.empty(rows, packed.shape[0], dtype=dtype, device="meta")
    bias = torch.empty(packed.shape[0], dtype=dtype, device="meta")
    return module.launches(x, packed, bias, y, processors=1, shares=4)[-1]


def main_loop(code: Code) -> list[str]:
    """The instructions of the loop with most products of 16-bit numbers (the middles' are products of TF32), or, where
    there are no tensor cores, of the longest one."""

    def products(loop: tuple[int, int]) -> tuple[int, int]:
        first, last = loop
        inside = code.instructions[first : last + 1]
        return sum("MMA" in line.split()[0] and "TF32" not in line for line in inside), first - last

    first, last = max(code.loops, key=products)
    if not products((first, last))[0]:
        first, last = max(code.loops, key=lambda loop: loop[1] - loop[0])
    return code.instructions[first : last + 1]


def count(kernel: str, rows: int, spec: QuantSpec, capability: int) -> Count:
    """Compile one kernel for sm_`capability` and count."""
    launch = launch_of(kernel, rows, packed_on_meta(spec), torch.bfloat16 if capability >= 80 else torch.float16)
    code = inspect(compile_call(launch.kernel, launch.arguments, launch.constants, launch.options, capability))
    planes = 8 // spec.nbits if kernel in ("matmul", "simt") else 1
    depth = launch.constants["BK"] if kernel == "general" else launch.constants["PLANE"] * planes
    weights = launch.constants["BN"] * depth / (32 * launch.options["num_warps"])
    return Count(round(len(main_loop(code)) / weights, 2), code.registers, code.spills, code.shared)


def count_dequantize(spec: QuantSpec, capability: int) -> Count:
    """The kernel of whole blocks, which has no loop: all its instructions over the weights of a program."""
    packed = packed_on_meta(spec)
    out = torch.empty(SHAPE, dtype=torch.bfloat16, device="meta")
    run = dequantize.block_runs(packed, 0, SHAPE[1])[0]
    call = dequantize.blocks_call(packed, out, (0, SHAPE[0]), run)
    code = inspect(
        compile_call(dequantize.blocks_kernel, call.arguments, call.constants, dequantize.OPTIONS, capability)
    )
    weights = SHAPE[0] * SHAPE[1] / call.grid[0] / (32 * dequantize.OPTIONS["num_warps"])
    return Count(round(code.executed / weights, 2), code.registers, code.spills, code.shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=list(CAPABILITIES), choices=CAPABILITIES)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    rows: list[dict[str, Any]] = []
    for name, spec in SPECS.items():
        # Triton has no tensor cores on sm_75, which therefore has other routes (hqqplus/kernels/routes.py).
        cases = [("dequantize", 0, [*arguments.capabilities])]
        for kernel, m in PRODUCTS:
            cases.append((kernel, m, [c for c in arguments.capabilities if (c < 80) == (kernel == "simt")]))
        for kernel, m, capabilities in cases:
            for capability in capabilities:
                found = count_dequantize(spec, capability) if m == 0 else count(kernel, m, spec, capability)
                rows.append({"spec": name, "kernel": kernel, "rows": m, "sm": capability, **found._asdict()})
                print(f"{name:26} {kernel:10} M {m:<3} sm_{capability:<4} {found}", flush=True)
    header = ["weights", "kernel", "M", *(f"sm_{c}" for c in arguments.capabilities)]
    table = []
    for name in SPECS:
        for kernel, m in [("dequantize", 0), *PRODUCTS]:
            cells = {r["sm"]: r for r in rows if (r["spec"], r["kernel"], r["rows"]) == (name, kernel, m)}
            shown = [f"{cells[c]['a_weight']:.2f}" if c in cells else "" for c in arguments.capabilities]
            table.append([name, kernel, str(m) if m else "", *shown])
    print(markdown(header, table))
    spilled = [row for row in rows if row["spills"]]
    print(f"{len(rows)} kernels, {len(spilled)} with spills", *spilled, sep="\n")
    write_result(arguments.output, {"shape": SHAPE, "kernels": rows}, "triton")


if __name__ == "__main__":
    main()
