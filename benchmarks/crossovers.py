"""Where one kernel of the product ends and the next begins, measured: a row of `hqqplus/kernels/routes.py` CROSSOVERS.

Every kernel is timed at rows of x around the borders, over several layers and specs. A choice of borders costs, for
each layer, spec and number of rows, ln(time of the kernel that it takes / time of the fastest); the borders with the
smallest sum win, of equal ones the smallest borders. `loss` is what a choice costs on average, as a share of the time.
`tune` times other cuts of the kernels (tile, stages, warps, shares of K) than the shipped ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from gpu import (
    Timer,
    Work,
    as_packed,
    check_rows,
    copies_needed,
    first_line,
    product,
    random_packed,
    reference_product,
    tidy,
)
from torch import Tensor

from hqqplus.kernels.packed import Packed
from hqqplus.kernels.routes import Crossovers
from hqqplus.quantization import QuantSpec

MOST_FEW = 64  # rows up to which matmul is timed
MOST_SIMT = 8
SPECS = {
    "2-bit g64": QuantSpec(2, 64, metadata_bits=16),
    "1-bit g64": QuantSpec(1, 64, metadata_bits=16),
    "preset": QuantSpec(),
}
OTHERS = {
    "3-bit g64": QuantSpec(3, 64),
    "2-bit g64, axis 0": QuantSpec(2, 64, axis=0),
    "2-bit g8": QuantSpec(2, 8),
}


@dataclass(frozen=True)
class Plan:
    """What is timed.

    Attributes:
        specs: of layers that matmul, gemm and dense serve, at the rows of x in `grid`.
        others: of layers that these two do not serve, at those in `other_grid`.
        slices: MiB of a slice of dense, at those in `slice_rows`.
    """

    specs: Mapping[str, QuantSpec] = field(default_factory=lambda: SPECS)
    others: Mapping[str, QuantSpec] = field(default_factory=lambda: OTHERS)
    grid: Sequence[int] = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    other_grid: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    slices: Sequence[int] = (0, 2, 4, 8, 16, 32, 64)
    slice_rows: Sequence[int] = (1024, 2048, 4096, 8192)


# (layer, spec, rows of x) -> kernel -> seconds; one that is missing cannot be chosen there
Times = Mapping[tuple[str, str, int], Mapping[str, float]]


def loss(times: Times, kernel: Callable[[int], Iterable[str]]) -> float:
    """What it costs on average to take the first kernel of `kernel(rows)` that was timed there; 0: always the best."""
    logs = []
    for (_, _, rows), by_kernel in times.items():
        taken = next((by_kernel[name] for name in kernel(rows) if name in by_kernel), math.inf)
        logs.append(math.log(taken / min(by_kernel.values())))
    return math.exp(sum(logs) / len(logs)) - 1 if logs else 0.0


def by_borders(few: int, some: int) -> Callable[[int], tuple[str, ...]]:
    """The kernel that `routes.py` takes for a layer that all three serve."""
    return lambda rows: ("matmul",) if rows <= few else ("gemm",) if rows <= some else ("dense",)


def best_borders(times: Times) -> tuple[int, int]:
    """(few, some) of the smallest loss."""
    grid = sorted({rows for _, _, rows in times})
    pairs = [(few, some) for few in (0, *grid) for some in (0, *grid) if few <= some]
    return min(pairs, key=lambda pair: (round(loss(times, by_borders(*pair)), 6), pair))


def of_others(simt: int, general: int) -> Callable[[int], tuple[str, ...]]:
    """The kernels that `routes.py` takes, the first that there is, for a layer that matmul and gemm do not serve."""
    return lambda rows: (*["simt"] * (rows <= simt), *["general"] * (rows <= general), "dense")


def best_of_others(times: Times) -> tuple[int, int]:
    """(simt, general) of the smallest loss."""
    grid = sorted({rows for _, _, rows in times})
    pairs = itertools.product((0, *grid), repeat=2)
    return min(pairs, key=lambda pair: (round(loss(times, of_others(*pair)), 6), pair))


def best_slice(times: Times) -> int:
    """`slice_mib` of the smallest loss; the kernels of `times` are called by their MiB."""
    sizes = sorted({int(name) for by_kernel in times.values() for name in by_kernel})
    return min(sizes, key=lambda size: (round(loss(times, lambda _: (str(size),)), 6), size))


def paste(capability: int, row: Crossovers) -> str:
    """The row as it stands in `routes.py`."""
    return f"{capability}: Crossovers({row}),"


# --- measuring ------------------------------------------------------------------------------------------------------


def candidates(rows: int) -> tuple[str, ...]:
    """The kernels that are timed at so many rows, for a layer that all three serve."""
    return ("matmul", "gemm", "dense") if rows <= MOST_FEW else ("gemm", "dense")


def other_candidates(rows: int, spec: QuantSpec) -> tuple[str, ...]:
    """The same for a layer that matmul and gemm do not serve."""
    simt = spec.axis == 1 and spec.nbits != 3 and rows <= MOST_SIMT
    return ("simt", "general", "dense") if simt else ("general", "dense")


def works(layers: Mapping[str, tuple[int, int]], plan: Plan) -> list[Work]:
    """What `search` is going to run, to be compiled ahead."""
    made = []
    for shape, spec in itertools.product(layers.values(), plan.specs.values()):
        kernels = [(name, rows, ()) for rows in plan.grid for name in candidates(rows) if name != "dense"]
        dense = [("dense", 256, (("slice_bytes", size << 20),)) for size in plan.slices]
        backward = [("dx", 256, ())]
        made.append(Work(spec, shape, (*kernels, *dense, *backward)))
    for shape, spec in itertools.product(layers.values(), plan.others.values()):
        kernels = [(name, rows, ()) for rows in plan.other_grid for name in other_candidates(rows, spec)]
        made.append(Work(spec, shape, tuple(kernels)))
    return made


def search(
    timer: Timer, layers: Iterable[tuple[str, tuple[int, int]]], present: Crossovers, plan: Plan
) -> Iterator[dict[str, Any]]:
    """Measure, and yield after each layer what is known so far: the row, its loss, that of `present`, all times."""
    forward: dict[tuple[str, str, int], dict[str, float]] = {}
    others: dict[tuple[str, str, int], dict[str, float]] = {}
    sliced: dict[tuple[str, str, int], dict[str, float]] = {}
    failed: list[str] = []
    for layer, shape in layers:
        for name, spec in plan.specs.items():
            copies = _copies(spec, shape, timer)
            for rows in plan.grid:
                runs = {kernel: partial(_run, kernel) for kernel in candidates(rows)}
                forward[layer, name, rows] = _times(timer, runs, rows, copies, failed, f"{name} of {layer}")
            for rows in plan.slice_rows:
                runs = {str(size): partial(_both_ways, slice_bytes=size << 20) for size in plan.slices}
                sliced[layer, name, rows] = _times(timer, runs, rows, copies, failed, f"{name} of {layer}, slice_mib")
            del copies
            tidy(timer.device)
        for name, spec in plan.others.items():
            copies = _copies(spec, shape, timer)
            for rows in plan.other_grid:
                runs = {kernel: partial(_run, kernel) for kernel in other_candidates(rows, spec)}
                others[layer, name, rows] = _times(timer, runs, rows, copies, failed, f"{name} of {layer}")
            del copies
            tidy(timer.device)
        yield summary(forward, others, sliced, present, failed)


def summary(forward: Times, others: Times, sliced: Times, present: Crossovers, failed: list[str]) -> dict[str, Any]:
    """The best row for what was timed, and what it and the present one cost. Cases without any time do not count."""
    forward, others, sliced = ({key: t for key, t in times.items() if t} for times in (forward, others, sliced))
    changes: dict[str, int] = {}
    if forward:
        changes["few"], changes["some"] = best_borders(forward)
    if others:
        changes["simt"], changes["general"] = best_of_others(others)
    if sliced:
        changes["slice_mib"] = best_slice(sliced)
    row = dataclasses.replace(present, **changes)

    def costs(of: Crossovers) -> dict[str, float | None]:
        found = {
            "few, some": loss(forward, by_borders(of.few, of.some)),
            "simt, general": loss(others, of_others(of.simt, of.general)),
            # A size that was not timed counts as the next larger one.
            "slice_mib": loss(sliced, lambda _: _from(of.slice_mib, sliced)),
        }
        # Infinite where it takes a kernel that does not run; JSON has no word for that.
        return {what: cost if math.isfinite(cost) else None for what, cost in found.items()}

    return {
        "row": dataclasses.asdict(row),
        "loss": costs(row),
        "present": dataclasses.asdict(present),
        "present_loss": costs(present),
        "forward": _listed(forward),
        "others": _listed(others),
        "slices": _listed(sliced),
        "failed": list(failed),
    }


def _from(size: int, times: Times) -> list[str]:
    sizes = sorted({int(name) for by_kernel in times.values() for name in by_kernel})
    return [str(each) for each in sizes if each >= size] + [str(each) for each in reversed(sizes) if each < size]


def _listed(times: Times) -> list[dict[str, Any]]:
    keys = "layer", "spec", "rows"
    return [{**dict(zip(keys, key, strict=True)), "seconds": dict(by_kernel)} for key, by_kernel in times.items()]


def _copies(spec: QuantSpec, shape: tuple[int, int], timer: Timer) -> list[Packed]:
    size = int(spec.bits_per_weight(*shape) * shape[0] * shape[1] / 8)
    return [as_packed(random_packed(spec, shape, timer.device)) for _ in range(copies_needed(size, timer.device))]


def _run(kernel: str, x: Tensor, packed: Packed, **options: Any) -> Tensor:
    return product(kernel, x, packed, **options)


def _both_ways(x: Tensor, packed: Packed, slice_bytes: int) -> Tensor:
    """The dense product forward and, of a gradient of y's shape, backward; returns y."""
    from hqqplus.kernels.triton import dense

    y = dense.matmul(x, packed, None, slice_bytes)
    dense.matmul_dx(y, packed, slice_bytes)
    return y


def _times(
    timer: Timer,
    runs: Mapping[Any, Callable[[Tensor, Packed], Any]],
    rows: int,
    copies: Sequence[Packed],
    failed: list[str],
    where: str,
) -> dict[Any, float]:
    """Kernel -> seconds of those that run with so many rows of x and are right."""
    x = torch.randn(rows, copies[0].shape[1], device=timer.device).to(torch.bfloat16)
    right = {}
    for name, run in runs.items():
        try:
            check_rows(lambda x, run=run: run(x, copies[0]), x, lambda x: reference_product(x, copies[0]))
            right[name] = [partial(run, x, packed) for packed in copies]
        except Exception as error:  # one kernel that does not run leaves the choice to the others
            failed.append(f"{name}, {where}, {rows} rows: {first_line(error)}")
    timings = timer.measure(right)
    failed += [f"{name}, {where}, {rows} rows: {timing.failed}" for name, timing in timings.items() if timing.failed]
    return {name: timing.seconds for name, timing in timings.items() if timing.failed is None}


# --- other cuts -----------------------------------------------------------------------------------------------------


def cuts(kernel: str, rows: int, smoke: bool) -> list[tuple[Any, int]]:
    """(cut, shares) to be tried for so many rows of x; shares 0 as shipped."""
    from hqqplus.kernels.triton.product import Cut

    heights = (8 if rows <= 8 else 16,) if kernel == "matmul" else ((32,) if rows <= 32 else (32, 64, 128))
    if smoke:
        return [(Cut(heights[0], width, 2, 4), shares) for width, shares in ((32, 0), (64, 1))]
    shapes = itertools.product(heights, (32, 64, 128), (2, 3, 4), (2, 4, 8))
    shares = (0, 1, 4) if kernel == "matmul" else (0,)
    return [(Cut(*shape), each) for shape, each in itertools.product(shapes, shares)]


def tune_cases(smoke: bool) -> list[tuple[str, int]]:
    """(kernel, rows of x)."""
    return [("matmul", 1), ("gemm", 12)] if smoke else [("matmul", 1), ("matmul", 16), ("gemm", 32), ("gemm", 64)]


def tune_works(layers: Mapping[str, tuple[int, int]], specs: Mapping[str, QuantSpec], smoke: bool) -> list[Work]:
    """What `tune` is going to run."""
    made = []
    for shape, spec, (kernel, rows) in itertools.product(layers.values(), specs.values(), tune_cases(smoke)):
        options = [(("cut", cut), ("shares", shares)) for cut, shares in cuts(kernel, rows, smoke)]
        # Some twenty kernels to a process at once.
        made += [
            Work(spec, shape, tuple((kernel, rows, each) for each in options[first : first + 20]))
            for first in range(0, len(options), 20)
        ]
    return made


def tune(
    timer: Timer, layers: Mapping[str, tuple[int, int]], specs: Mapping[str, QuantSpec], smoke: bool
) -> Iterator[dict[str, Any]]:
    """Of each layer, spec, kernel and number of rows the fastest of all cuts that run, beside the shipped one."""
    for (layer, shape), (name, spec) in itertools.product(layers.items(), specs.items()):
        copies = _copies(spec, shape, timer)
        for kernel, rows in tune_cases(smoke):
            choices = cuts(kernel, rows, smoke)
            # One that needs more than the card has, or that Triton does not compile, is left out.
            failed: list[str] = []
            times, shipped = {}, []
            # The shipped cut in each dozen: the clock may drift from one to the next.
            for first in range(0, len(choices), 12):
                part = choices[first : first + 12]
                runs: dict[Any, Any] = {(cut, each): partial(_run, kernel, cut=cut, shares=each) for cut, each in part}
                measured = _times(timer, {None: partial(_run, kernel), **runs}, rows, copies, failed, layer)
                if None in measured:
                    shipped.append(measured.pop(None))
                    times.update({choice: seconds / shipped[-1] for choice, seconds in measured.items()})
            best = sorted(times, key=lambda choice: times[choice])[:8]
            yield {
                "layer": layer,
                "spec": name,
                "kernel": kernel,
                "rows": rows,
                "shipped_seconds": shipped,
                "tried": len(choices),
                "failed": len(failed),
                "best": [{**cut._asdict(), "shares": each, "ratio": times[cut, each]} for cut, each in best],
            }
        del copies
        tidy(timer.device)
