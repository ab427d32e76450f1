"""What the benchmarks on a GPU share: the card and its two ceilings, random packed weights, checks, and timing.

Ceilings. Bandwidth is that of `copy_` (bytes read and bytes written), the rate of products that of bf16 `x @ W^T` on
random numbers; both the best of a few sizes, measured in the same run as what is held against them. `launch` is the
time of a graph's node that does next to nothing: no kernel takes less.

Timing. Calls are captured in a CUDA graph, so that no launch from Python is timed. A call finds its weights in memory
and not in the L2 cache: it is captured over as many copies of the weights as are `FLUSH` times the L2 together, and
comes back to the first only after all others (of four times the L2 a cache that evicts at random still holds 2 %).
The graph is replayed once, and while the card is busy with that, once more between two events. What is compared is
replayed in turns, `rounds` times; the figure is the median of the rounds, beside their least and most. What cannot be
captured is timed without a graph, by events around a loop, and marked so.

On a CPU (`--device cpu --smoke`: does the logic run?) a loop and `perf_counter` stand in, and nothing is flushed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import itertools
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqplus.files import write_json
from hqqplus.kernels import reference, routes
from hqqplus.kernels.packed import Packed
from hqqplus.quantization import PackedTensor, QuantSpec
from hqqplus.quantization.metadata import metadata_dtype, metadata_views, to_storage
from hqqplus.quantization.tensor import state_shapes

# `benchmarks/kernels.py` must not be taken for the package of this name, which transformers and bitsandbytes look for.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

RESULTS = Path(__file__).resolve().parent / "results"
FLUSH = 4
TOLERANCE = 0.01  # relative error; bfloat16 weights and results, rounded once each, make 0.0025
_MOST_CALLS = 512  # of a graph
_MOST_COPIES = 512
SIGMA = 0.02  # standard deviation of random weights, about that of a trained model's


class WrongResult(Exception):
    """What was to be timed computes something else than the reference."""


# --- the command line -----------------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that both benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda", help="a CUDA device; cpu only with --smoke")
    made.add_argument("--smoke", action="store_true", help="tiny sizes: whether it runs, no figure means anything")
    made.add_argument("--quick", action="store_true", help="less of everything")
    made.add_argument("--output", type=Path, help="where to; default: benchmarks/results (with --smoke: nowhere)")
    made.add_argument("--seconds", type=float, help="begin nothing new after so long, and say what is left out")
    return made


def open_device(arguments: argparse.Namespace) -> torch.device:
    """The device of `--device`.

    Raises:
        SystemExit: if it is no CUDA device that is there, nor a CPU with `--smoke`.
    """
    device = torch.device(arguments.device)
    if device.type == "cpu" and arguments.smoke:
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise SystemExit(f"{Path(sys.argv[0]).name} needs a CUDA device (--smoke --device cpu tries its logic)")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    return device


def hardware(device: torch.device) -> dict[str, Any]:
    """The card as torch describes it."""
    if device.type != "cuda":
        return {"name": "cpu", "l2_bytes": 0}
    card = torch.cuda.get_device_properties(device)
    return {
        "name": card.name,
        "capability": 10 * card.major + card.minor,
        "processors": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "l2_bytes": getattr(card, "L2_cache_size", 64 << 20),
        "cuda": torch.version.cuda,
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of what a result depends on, `packages` among them."""
    from hqqplus.evaluation.report import environment

    found = environment()
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def output_path(arguments: argparse.Namespace, benchmark: str, card: str) -> Path | None:
    """Where results go: `--output`, else `benchmarks/results/BENCHMARK_CARD.json`; None for a smoke run."""
    if arguments.output is not None or arguments.smoke:
        return arguments.output
    return RESULTS / f"{benchmark}_{re.sub(r'[^a-z0-9]+', '_', card.lower()).strip('_')}.json"


class Results:
    """A result file that is written again whenever there is more, each time whole: a time limit loses nothing.

    Attributes:
        data: what is written, and `complete`, whether the run came to its end.
    """

    def __init__(self, path: Path | None, data: dict[str, Any], limit: float | None) -> None:
        self.path, self.data, self.limit = path, {**data, "complete": False, "left_out": []}, limit
        self.started = time.monotonic()

    def save(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self.started, 1)
        if self.path is not None:
            write_json(self.path, self.data)

    def in_time(self, what: str) -> bool:
        """Whether there is time to begin `what`; it is noted where there is not."""
        if self.limit is None or time.monotonic() - self.started < self.limit:
            return True
        self.data["left_out"].append(what)
        return False

    def finish(self) -> None:
        self.data["complete"] = True
        self.save()


def first_line(error: BaseException) -> str:
    """An error as one line of a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200].rstrip(": ")


def alive(device: torch.device) -> bool:
    """Whether the device still answers. After an illegal access to memory none of this process' calls does."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True


def tidy(device: torch.device) -> None:
    """Give back memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- weights --------------------------------------------------------------------------------------------------------


def random_packed(spec: QuantSpec, shape: tuple[int, int], device: torch.device | str) -> PackedTensor:
    """A packed `shape` = [out, in] matrix of random codes and metadata; its weights have mean 0 and deviation SIGMA.

    Scales differ by a third and offsets by a tenth of the grid, so that a group that gets another's shows.
    """
    layout, levels = spec.layout(*shape), spec.qmax + 1
    scale = SIGMA * math.sqrt(12 / (levels**2 - 1))
    groups = layout.rows, layout.groups
    shapes = {name: size for name, (size, _) in state_shapes(spec, *shape).items()}

    def random_bytes(size: tuple[int, int], low: int = 0) -> Tensor:
        return torch.randint(low, 256, size, dtype=torch.uint8, device=device)

    codes = random_bytes(shapes["W_q"])
    dtype = metadata_dtype(spec.metadata_dtype)
    if spec.metadata_bits == 8:
        # Steps and zeros of the scales, then of the middles (`quantization/metadata.py`).
        maps = torch.tensor([256 * scale / 192, 0, 256 * 0.1 * scale * spec.qmax / 128, 128], device=device)
        blocks = to_storage(maps.repeat(shapes["blocks"][0], 1).to(dtype))
        return PackedTensor(codes, random_bytes(groups, 128), random_bytes(groups), spec, shape, blocks)
    scales = scale * torch.empty(groups, device=device).uniform_(2 / 3, 4 / 3)
    offsets = scales * -spec.qmax / 2 * torch.empty(groups, device=device).uniform_(0.9, 1.1)
    return PackedTensor(codes, to_storage(scales.to(dtype)), to_storage(offsets.to(dtype)), spec, shape)


def as_packed(tensor: PackedTensor) -> Packed:
    """The same tensors as the kernels take them."""
    metadata = metadata_views(tensor.scale, tensor.offset, tensor.blocks, tensor.spec.metadata_dtype)
    return Packed(tensor.W_q, *metadata, tensor.spec, tensor.shape)


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def packed_bytes(packed: Packed) -> int:
    """All that is stored for a packed matrix."""
    return nbytes((packed.W_q, packed.scale, packed.offset, packed.blocks))


def copies_needed(size: int, device: torch.device) -> int:
    """How many copies of weights of `size` bytes a graph goes through, so that none of them is still in the L2."""
    if device.type != "cuda":
        return 1
    return min(max(2, math.ceil(FLUSH * hardware(device)["l2_bytes"] / max(size, 1))), _MOST_COPIES)


# --- checks ---------------------------------------------------------------------------------------------------------


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def check(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> float:
    """The relative error of `actual`.

    Raises:
        WrongResult: if it is above `tolerance`, or no number, or the shapes differ.
    """
    if actual.shape != expected.shape:
        raise WrongResult(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    error = relative_error(actual, expected)
    if not error <= tolerance:
        raise WrongResult(f"relative error {error:.3g}")
    return error


def check_rows(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    expected: Callable[[Tensor], Tensor],
    tolerance: float = TOLERANCE,
    most: int = 64,
) -> float:
    """The relative error of `run(x)` against `expected`, of at most `most` rows of x, the last among them.

    `expected` takes some rows of x and gives what `run` should for them. Memory that `run` is likely to get for its
    result is filled with NaN before: what is not written shows, in all rows.

    Raises:
        WrongResult: as `check`; and for a result that is not finite.
    """
    rows = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], most), device=x.device).round().long()
    right = expected(x[rows])
    poison = torch.full((x.shape[0], right.shape[1]), torch.nan, dtype=x.dtype, device=x.device)
    del poison
    y = run(x)
    if not torch.isfinite(y).all():
        raise WrongResult("not all of the result is finite")
    return check(y[rows], right, tolerance)


def reference_product(x: Tensor, packed: Packed) -> Tensor:
    """x W^T in float64 with the reference's weights in float32, slice by slice: a head in float64 is 8 GB."""
    return torch.cat([x.double() @ weight.double().t() for _, weight in _slices(packed)], dim=1)


def reference_dx(dy: Tensor, packed: Packed) -> Tensor:
    """dy W likewise."""
    parts = (dy[:, rows].double() @ weight.double() for rows, weight in _slices(packed))
    return sum(parts, start=torch.zeros((), dtype=torch.float64, device=dy.device))


def _slices(packed: Packed, height: int = 8192) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight [out, in] in float32 by the reference, and which they are."""
    count = packed.shape[0]
    if packed.spec.axis == 0:
        yield slice(0, count), reference.dequantize(packed, torch.float32)
        return
    for first in range(0, count, height):
        rows = slice(first, min(first + height, count))
        ids = torch.arange(rows.start, rows.stop, device=packed.W_q.device)
        yield rows, reference.embedding(ids, packed, torch.float32)


# --- timing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the rounds, the least and the most; `failed` says why there are none."""

    seconds: float = math.nan
    least: float = math.nan
    most: float = math.nan
    graph: bool = False
    calls: int = 0
    failed: str | None = None

    def row(self) -> dict[str, Any]:
        if self.failed is not None:
            return {"failed": self.failed}
        return {"seconds": self.seconds, "least": self.least, "most": self.most, "graph": self.graph}


@dataclass
class _Prepared:
    """What is timed: `replay` does `calls` calls."""

    replay: Callable[[], Any]
    calls: int
    graph: bool


class Timer:
    """Times functions on a device.

    Args:
        rounds: how often each of what is compared is timed.
        least: seconds that a graph has to last, by as many calls as that takes.
    """

    def __init__(self, device: torch.device, rounds: int = 7, least: float = 1e-3) -> None:
        self.device, self.rounds, self.least = device, rounds, least
        self.cuda = device.type == "cuda"
        if self.cuda:
            self._new_pool()

    def measure(
        self, entries: Mapping[Any, Sequence[Callable[[], Any]]], ungraphed: Iterable[Any] = ()
    ) -> dict[Any, Timing]:
        """The time of one call of each entry, which is a list of calls alike on different copies of the weights.

        Args:
            ungraphed: entries that are not to be captured.
        """
        if self.cuda:
            self._new_pool()
        timings: dict[Any, Timing] = {}
        prepared: dict[Any, _Prepared] = {}
        seconds: dict[Any, list[float]] = {}
        for name, calls in entries.items():
            try:
                prepared[name] = self._prepare(calls, name not in set(ungraphed))
                seconds[name] = []
            except Exception as error:  # one that cannot run does not take the others along
                timings[name] = Timing(failed=first_line(error))
        for _, name in itertools.product(range(self.rounds), list(prepared)):
            if name in timings:
                continue
            try:
                seconds[name].append(self._once(prepared[name]))
            except Exception as error:
                timings[name] = Timing(failed=first_line(error))
        for name, ready in prepared.items():
            if name not in timings:
                times = seconds[name]
                timings[name] = Timing(statistics.median(times), min(times), max(times), ready.graph, ready.calls)
        return {name: timings[name] for name in entries}

    def _prepare(self, calls: Sequence[Callable[[], Any]], graph: bool) -> _Prepared:
        if not self.cuda:
            return _Prepared(lambda: [call() for call in calls], len(calls), False)
        # On the stream of the capture, because libraries keep their workspaces by stream.
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.stream):
            for call in (calls[0], *calls):
                call()
        torch.cuda.synchronize(self.device)
        if graph:
            try:
                return self._graph(calls)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                # Something in it cannot be captured; what is broken for good is broken in the loop as well.
                torch.cuda.synchronize(self.device)
                self._new_pool()
        return _Prepared(lambda: [call() for call in calls], len(calls), False)

    def _graph(self, calls: Sequence[Callable[[], Any]]) -> _Prepared:
        """A graph of all calls, as often as it takes to last `least`."""
        ready = _Prepared(self._capture(calls, 1).replay, len(calls), True)
        seconds = self._once(ready) * len(calls)
        passes = min(math.ceil(self.least / max(seconds, 1e-7)), _MOST_CALLS // len(calls))
        if passes > 1:
            ready = _Prepared(self._capture(calls, passes).replay, passes * len(calls), True)
        return ready

    def _new_pool(self) -> None:
        """Memory that all graphs of one `measure` share: they run in turns, and nobody reads what they leave.

        A pool cannot be used again once all its graphs are gone, nor after a capture that failed: a graph of nothing
        much keeps it.
        """
        self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        one = torch.zeros(1, device=self.device)
        torch.cuda.synchronize(self.device)
        self._keeper = one, self._capture([one.zero_], 1)

    def _capture(self, calls: Sequence[Callable[[], Any]], passes: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # what it frees may be what must not be touched during a capture
        # Not `torch.cuda.graph`, which collects garbage and empties the cache of the allocator each time.
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                for _ in range(passes):
                    for call in calls:
                        call()
            finally:
                if collects:
                    gc.enable()
                graph.capture_end()
        torch.cuda.synchronize(self.device)
        return graph

    def _once(self, ready: _Prepared) -> float:
        """Seconds of one call."""
        if not self.cuda:
            started = time.perf_counter()
            ready.replay()
            return (time.perf_counter() - started) / ready.calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            ready.replay()
            start.record()
            ready.replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / ready.calls


# --- ceilings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Bytes and floating-point operations a second, and seconds of a launch: the best that was measured."""

    bandwidth: float
    flops: float
    launch: float
    details: dict[str, Any]

    def decode(self, size: int) -> float:
        """The floor of what reads `size` bytes."""
        return size / self.bandwidth

    def product(self, size: int, M: int, N: int, K: int) -> float:
        """The floor of x [M, K] times a weight [N, K] stored in `size` bytes: to read it; for M above 16 also the
        operations, where they take longer."""
        return self.decode(size) if M <= 16 else max(self.decode(size), 2 * M * N * K / self.flops)

    def row(self) -> dict[str, Any]:
        best = {"bytes_per_second": self.bandwidth, "flops": self.flops, "launch_seconds": self.launch}
        return {**best, **self.details}


def measure_ceilings(timer: Timer, smoke: bool) -> Ceilings:
    device = timer.device
    copies, products = {}, {}
    for size in (1 << 16, 1 << 18) if smoke else (1 << 28, 1 << 30, 1 << 31):
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        timing = timer.measure({"copy": [lambda t=target, s=source: t.copy_(s)]})["copy"]
        if timing.failed is None:
            copies[size] = 2 * size / timing.seconds
        del source, target
    for M, N, K in [(64, 64, 64)] if smoke else [(4096, 4096, 4096), (8192, 4096, 14336), (8192, 8192, 8192)]:
        x = torch.randn(M, K, dtype=torch.bfloat16, device=device)
        weight = torch.randn(N, K, dtype=torch.bfloat16, device=device)
        timing = timer.measure({"product": [lambda x=x, w=weight: torch.nn.functional.linear(x, w)]})["product"]
        if timing.failed is None:
            products[f"{M}x{N}x{K}"] = 2 * M * N * K / timing.seconds
        del x, weight
    if not copies or not products:
        raise RuntimeError("neither a copy nor a product runs on this device")
    one = torch.zeros(1, device=device)
    launch = timer.measure({"launch": [lambda: one.add_(1)] * 64})["launch"].seconds
    tidy(device)
    return Ceilings(max(copies.values()), max(products.values()), launch, {"copies": copies, "products": products})


# --- kernels by name ------------------------------------------------------------------------------------------------


def product(kernel: str, x: Tensor, packed: Packed, **options: Any) -> Tensor:
    """x [M, in] W^T by the named kernel: `route` (what a layer would take), `int8`, or one of `triton/`."""
    if kernel == "route":
        return routes.matmul(x, packed, None)
    if kernel == "int8":
        from hqqplus.kernels import int8  # noqa: F401  # registers the op

        spec = packed.spec
        sizes = spec.nbits, spec.group_size, spec.axis, *packed.shape
        return torch.ops.hqqplus.matmul_int8(x, packed.W_q, packed.scale, packed.offset, packed.blocks, *sizes, None)
    module = importlib.import_module(f"hqqplus.kernels.triton.{kernel}")
    if kernel == "dense":
        return module.matmul(x, packed, None, options.get("slice_bytes", 0))
    return module.matmul(x, packed, None, routes.processors(x.device), **options)


@dataclass(frozen=True)
class Work:
    """Something to compile ahead: kernels for one layer, `(kernel, rows of x, options)` each."""

    spec: QuantSpec
    shape: tuple[int, int]
    kernels: tuple[tuple[str, int, tuple[tuple[str, Any], ...]], ...]


def compile_work(work: Work, device: str) -> list[str]:
    """Run each kernel of `work` once, so that Triton's cache on disk has it. Returns what failed."""
    packed = as_packed(random_packed(work.spec, work.shape, device))
    failed = []
    for kernel, rows, options in work.kernels:
        try:
            x = torch.zeros(rows, work.shape[0 if kernel == "dx" else 1], dtype=torch.bfloat16, device=device)
            if kernel == "dequantize":
                routes.dequantize(packed, torch.bfloat16)
            elif kernel == "dx":
                routes.matmul_dx(x, packed)
            else:
                product(kernel, x, packed, **dict(options))
            if x.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:  # the main process will meet it again, and report it
            failed.append(f"{kernel} of {rows} rows: {first_line(error)}")
    return failed


def compile_ahead(works: Sequence[Work], device: torch.device, workers: int, limit: float) -> list[str]:
    """`compile_work` of all works in `workers` processes at once, for at most `limit` seconds. Returns what failed.

    Compiling a kernel takes a core a second or more, and there are some hundred.
    """
    import multiprocessing

    if device.type != "cuda" or not works:
        return []
    failed: list[str] = []
    # Forked, a process could not use CUDA.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        jobs = [pool.apply_async(compile_work, (work, str(device))) for work in works]
        deadline = time.monotonic() + limit
        for work, job in zip(works, jobs, strict=True):
            try:
                failed += job.get(max(deadline - time.monotonic(), 0.1))
            except multiprocessing.TimeoutError:
                failed.append(f"not compiled ahead in time: {work.spec} of {work.shape}")
            except Exception as error:
                failed.append(first_line(error))
    return failed


def workers_for(device: torch.device) -> int:
    """Processes that may compile at once: each takes a core and, with its CUDA context, 3 GB of the card."""
    import os

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(cores, int(free // 3e9)))
