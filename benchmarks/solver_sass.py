"""How much work the fused solver is: `python benchmarks/solver_sass.py [--run]`.

Compiles `hqqplus/kernels/triton_solver.py` for real GPUs (no GPU is needed for that), counts the SASS instructions of
its whole search, and estimates the seconds for the linear layers of Llama-3-8B (6.98 G weights). The estimate:

    instructions   of each loop body, times the trips of the loop. Trips are those of the table of grids; the count is
                   checked by the saturating FFMAs in it, of which each rounding of a group has one a weight.
    slots          an instruction takes 1 of the 128 lanes of an SM for a cycle; 2 where the SM has 64 such units
                   (compare, select, min, max, integers), 4 where it has 32 (shuffles, memory), 8 where it has 16
                   (MUFU, conversions). A load whose lanes hit different lines takes a cycle for each line.
    seconds        weights x slots / (SMs x 128 x clock x EFFICIENCY)

Slots of different units overlap on a GPU and are added up here. Memory is no limit: 3 bytes a weight are 5 ms of an
H200's bandwidth and 70 ms of an L4's. EFFICIENCY is an assumption and so are the clocks: only `--run`, which needs
CUDA, measures, and only it writes `benchmarks/results/solver_gpu.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from hqqplus.kernels import triton_solver
from hqqplus.quantization import grids

# Tests load this file by its path.
sys.path.append(str(Path(__file__).parent))
from sass_tools import disassemble, spills

# (rows, width) -> how many there are in Llama-3-8B
SHAPES = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
WEIGHTS = sum(rows * width * count for (rows, width), count in SHAPES.items())
# SMs and GHz under load
GPUS = {"H200": (90, 132, 1.75), "L4": (89, 58, 1.5)}
EFFICIENCY = 0.6
CASES = [(1, 32), (1, 64), (1, 128), (2, 32), (2, 64), (2, 128), (3, 64), (4, 64), (4, 128), (8, 64)]
RESULT = Path(__file__).parent / "results" / "solver_gpu.json"

_HALF_RATE = (
    "FMNMX",
    "FSEL",
    "FSET",
    "ISETP",
    "SEL",
    "IADD",
    "LOP",
    "SHF",
    "PRMT",
    "LEA",
    "IMAD",
    "PLOP",
    "VIM",
    "IMN",
)
_QUARTER_RATE = ("SHFL", "LDG", "STG", "LDS", "STS", "LDC")
_EIGHTH_RATE = ("MUFU", "F2I", "I2F", "F2F")


class Work(NamedTuple):
    """What one lane of a kernel does: instructions and slots of it by part of the search, and what it holds."""

    instructions: dict[str, float]
    slots: dict[str, float]
    weights: float
    registers: int
    spills: int


def compile_solver(nbits: int, size: int, capability: int, importance: bool = False, dtype: str = "bf16") -> Any:
    """The kernel for groups of `size` weights as Triton compiles it for sm_`capability`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = triton_solver.split_kernel if nbits == 1 else triton_solver.search_kernel
    constants = {**triton_solver.tile(size, importance), "stride_column": 1}
    if nbits > 1:
        constants |= {"QMAX": 2**nbits - 1, "ITERATIONS": grids._ITERATIONS}
    pointers = {"codes": "*u8", "scales": "*fp16", "offsets": "*fp16", "first_places": "*i32"}
    pointers |= {"weight": f"*{dtype}", "importance": "*fp32" if importance else f"*{dtype}"}
    pointers |= {"widths": "*fp32", "shifts": "*fp32"}
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
    aligned = {*pointers, "stride_row", "codes_stride"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(triton_solver._OPTIONS))


def work(nbits: int, size: int, capability: int) -> Work:
    """Count the kernel for `nbits` and groups of `size` weights.

    Raises:
        RuntimeError: if the compiled kernel has not the loops that are counted on.
    """
    instructions, loops, registers = disassemble(compile_solver(nbits, size, capability).asm["cubin"])
    tile = triton_solver.tile(size, False)
    repeats, parts = _trips(instructions, loops, nbits, size)
    lines = tile["BLOCK"]
    counted, slots = Counter(), Counter()
    for instruction, times, part in zip(instructions, repeats, parts, strict=True):
        counted[part] += times
        slots[part] += times * _slots(instruction, lines)
    return Work(dict(counted), dict(slots), lines * size / 32, registers, spills(instructions))


def _trips(
    instructions: list[str], loops: list[tuple[int, int]], nbits: int, size: int
) -> tuple[list[float], list[str]]:
    """How often each instruction runs, and to which part of the search it belongs."""
    repeats, parts = [1.0] * len(instructions), ["once"] * len(instructions)

    def assign(loop: tuple[int, int], times: float, part: str) -> None:
        repeats[loop[0] : loop[1] + 1] = [times] * (loop[1] + 1 - loop[0])
        parts[loop[0] : loop[1] + 1] = [part] * (loop[1] + 1 - loop[0])

    outer = [a for a in loops if not any(b[0] <= a[0] and a[1] <= b[1] and a != b for b in loops)]
    if nbits == 1:
        if len(loops) != 1:
            raise RuntimeError(f"{len(loops)} loops at 1 bit: they must be counted anew")
        assign(outer[0], size, "thresholds")
        return repeats, parts
    table = triton_solver.grid_table(size, 2**nbits - 1)
    places, descents = sum(len(offsets) for _, _, offsets in table), grids._ITERATIONS - 1
    near, near_places = triton_solver.NEAR_WIDTHS, triton_solver.NEAR_PLACES
    # Short loops of known length may come unrolled: all but those over the table.
    inner = [[a for a in loops if b[0] <= a[0] and a[1] <= b[1] and a != b] for b in outer]
    if len(outer) not in (2, 3) or len(inner[0]) != 2:
        raise RuntimeError(f"loops {loops}: they must be counted anew")
    in_round = _saturating(instructions, inner[0][0])
    assign(outer[0], len(table), "errors")
    assign(inner[0][0], places, "places")
    assign(inner[0][1], len(table) * descents * in_round / _saturating(instructions, inner[0][1]), "descents")
    assign(outer[1], near, "around the best")
    for loop, trips in zip(inner[1][::-1], (descents, near_places), strict=False):
        assign(loop, near * trips * in_round / _saturating(instructions, loop), "around the best")
    if len(outer) == 3:
        assign(outer[2], 3, "storing")
    roundings = places + len(table) * (descents + 1) + near * (near_places + descents + 1) + (1 if nbits == 2 else 9)
    counted = sum(t for t, instruction in zip(repeats, instructions, strict=True) if ".SAT" in instruction) / in_round
    if abs(counted / roundings - 1) > 0.05:
        raise RuntimeError(f"{counted} roundings counted for {roundings}: the loops must be counted anew")
    return repeats, parts


def _saturating(instructions: list[str], loop: tuple[int, int]) -> int:
    return sum(".SAT" in instruction for instruction in instructions[loop[0] : loop[1] + 1])


def _slots(instruction: str, lines: int) -> int:
    if instruction.startswith("LDG.E.U16"):  # a weight: each group in another line
        return 4 * lines
    for slots, names in ((2, _HALF_RATE), (4, _QUARTER_RATE), (8, _EIGHTH_RATE)):
        if instruction.startswith(names):
            return slots
    return 1


def estimate() -> None:
    print(f"ESTIMATES for {WEIGHTS / 1e9:.2f} G weights, from instructions counted and an efficiency of {EFFICIENCY}")
    print("assumed; nothing here was timed\n")
    print("bits / group   GPU    instructions   slots   seconds   registers  spills   share of slots")
    for nbits, size in CASES:
        for name, (capability, units, clock) in GPUS.items():
            counted = work(nbits, size, capability)
            per_weight = sum(counted.instructions.values()) / counted.weights
            slots = sum(counted.slots.values()) / counted.weights
            seconds = WEIGHTS * slots / (units * 128 * clock * 1e9 * EFFICIENCY)
            total = sum(counted.slots.values())
            shares = ", ".join(
                f"{part} {100 * value / total:.0f} %"
                for part, value in sorted(counted.slots.items(), key=lambda item: -item[1])
                if value > 0.02 * total
            )
            print(
                f"{nbits} / {size:3}        {name:5} {per_weight:9.0f} a weight {slots:5.0f} {seconds:8.2f} s"
                f" {counted.registers:8} {counted.spills:8}     {shares}"
            )


def run(repeats: int) -> dict[str, Any]:
    """Seconds that the solver takes for the shapes of Llama-3-8B on this GPU, codes and metadata included."""
    import torch

    from hqqplus.evaluation.report import environment
    from hqqplus.quantization import QuantSpec

    rows = []
    for nbits, size in CASES:
        spec, seconds = QuantSpec(nbits, size), 0.0
        for (height, width), count in SHAPES.items():
            torch.manual_seed(0)
            weight = (0.02 * torch.randn(height, width, device="cuda")).to(torch.bfloat16)
            triton_solver.solve(weight, spec)  # compiles
            times = []
            for _ in range(repeats):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                triton_solver.solve(weight, spec)
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end) / 1000)
            seconds += count * statistics.median(times)
        rows.append({"nbits": nbits, "group_size": size, "seconds": seconds})
        print(f"{nbits} / {size:3}   {seconds:.2f} s measured for {WEIGHTS / 1e9:.2f} G weights")
    return {
        "weights": WEIGHTS,
        "shapes": [[*shape, count] for shape, count in SHAPES.items()],
        "repeats": repeats,
        "rows": rows,
        "hardware": torch.cuda.get_device_name(),
        "versions": {**environment(), "triton": triton_solver.triton.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help=f"measure on this machine's GPU, into {RESULT.name}")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    estimate()
    if args.run:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("--run measures on a CUDA device, and there is none here")
        RESULT.write_text(json.dumps(run(args.repeats), indent=2) + "\n")


if __name__ == "__main__":
    main()
