"""`calibrate`: what the linear layers of a model's blocks are quantized to, found with a few hundred samples.

Block by block, each of them on the device alone:

1. the moments of what goes into each layer are summed up, on inputs that come through the quantized blocks before it;
2. each layer is solved: with them as weights of the columns ("importance"), or with the whole second moment and the
   errors of columns made up for in others ("feedback");
3. with "block", the best of these and of the solution without data, by the loss of the block's output, is where the
   reconstruction starts (`hqqplus/calibration/reconstruct.py`);
4. the block is run in full precision on full-precision inputs, and quantized on its quantized ones, for the next.

Two activations a sample and token are kept, on the CPU or the disk: 512 samples of 2,048 tokens at width 4,096 take
8.6 GB each in 16 bits. The model stays on the CPU and is left as it was. What is outside the blocks, the embedding and
the head, is not looked at: the quantizer solves it without data, and takes the rest as it is found here
(`hqqplus.modules.replace.packed_already`). So it is with the experts of a mixture, each of which sees few samples:
while a block is calibrated they compute in full precision.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hqqplus
from hqqplus.calibration.blocks import Blocks, new_activations
from hqqplus.calibration.moments import SecondMoment, observe_inputs
from hqqplus.calibration.reconstruct import Training, block_loss, reconstruct
from hqqplus.calibration.store import (
    BlockReport,
    SolutionFolder,
    SolvedBlock,
    StartFactors,
    describe_settings,
    solution_folder,
)
from hqqplus.errors import UserError
from hqqplus.files import check_space, full_disk
from hqqplus.integrations.transformers import plan_of
from hqqplus.kernels import quantize
from hqqplus.kernels.solve import solve
from hqqplus.models import pick_device
from hqqplus.modules.replace import Solutions, is_stack
from hqqplus.progress import WorkProgress
from hqqplus.quantization import PackedTensor, QuantPlan, QuantSpec, SolverOptions
from hqqplus.quantization.feedback import error_feedback
from hqqplus.quantization.statistics import layer_statistics

METHODS = ("importance", "feedback", "block")
STORES = ("cpu", "disk")

WeightedFactors = Callable[[Tensor, Tensor, int], StartFactors]
"""(W - Q, second moment of the inputs [in, in], rank) -> A [rank, in], B [out, rank], singular values [rank]."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Args:
        method: "importance", "feedback" or "block"; each costs more than the one before it and gives more.
        epochs, learning_rate, weight_learning_rate: of the reconstruction (`reconstruct.Training`). With a
            `weight_learning_rate` of 0 the codes stay as they were solved, and a `learning_rate` of 3e-2 is better.
            Of few samples more epochs are better, at one bit above all.
        batch_size: samples that are on the device together.
        held_out: share of the samples on which losses are measured and nothing is trained; at least one is.
        store: where activations are kept, "cpu" or "disk".
        seed: of the order of the samples.
        start_rank: rank up to which start factors of LoRA are computed from the same moments; 0 for none.

    Raises:
        UserError: for values out of range, with what is allowed.
    """

    method: str = "block"
    epochs: int = 4
    batch_size: int = 4
    learning_rate: float = 5e-3
    weight_learning_rate: float = 3e-2
    held_out: float = 0.125
    store: str = "cpu"
    seed: int = 0
    start_rank: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("store", STORES)):
            if getattr(self, name) not in allowed:
                raise UserError(f"calibration.{name} is {getattr(self, name)!r}: it must be {' or '.join(allowed)}")
        for name, least in (("epochs", 0), ("batch_size", 1), ("seed", 0), ("start_rank", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"calibration.{name} is {value!r}: it must be a whole number, {least} or more")
        for name in ("learning_rate", "weight_learning_rate"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(f"calibration.{name} is {value!r}: it must be a number, 0 or more")
        if not isinstance(self.held_out, int | float) or not 0 < self.held_out < 1:
            raise UserError(f"calibration.held_out is {self.held_out!r}: it must be a share between 0 and 1")

    def training(self) -> Training:
        return Training(self.epochs, self.batch_size, self.learning_rate, self.weight_learning_rate)

    def settings(self) -> dict[str, Any]:
        """What the outcome depends on."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "store"}


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        solutions: for `packed_already`.
        factors: module name -> start factors of LoRA; empty where none were asked for.
        blocks: a report on each block that has layers to quantize.
        kept: how many of these an earlier start had finished.
    """

    solutions: Solutions
    factors: dict[str, StartFactors]
    blocks: tuple[BlockReport, ...]
    kept: int


def calibrate(
    model: Any,
    plan: QuantPlan,
    input_ids: Tensor,
    options: CalibrationOptions | None = None,
    folder: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    factors: WeightedFactors | None = None,
    quiet: bool = False,
) -> Calibration:
    """Find what the linear layers of the blocks of `model` are quantized to.

    The same call with the same folder continues an interrupted one after its last finished block. On a CPU it then
    comes out bit by bit as it would have.

    Args:
        model: a full-precision transformers model on the CPU, in the dtype in which to compute.
        plan: how each layer is quantized.
        input_ids: int64 [samples, length], all of them full.
        folder: where solutions are kept, block by block; None for in memory alone.
        device: where a block computes; by default the GPU if there is one.
        factors: computes the start factors where `options.start_rank` asks for them.
        quiet: show no progress.

    Raises:
        UserError: if the model cannot be run block by block, has no layer to quantize there or holds NaN or infinite
            values, if the samples do not fit, or `folder` holds something else.
    """
    options = options or CalibrationOptions()
    if (options.start_rank > 0) != (factors is not None):
        raise ValueError("start_rank and factors go together")
    if options.store == "disk" and folder is None:
        raise UserError("calibration.store: disk needs a folder for the solutions, where activations are kept too")
    blocks = Blocks(model, pick_device(device))
    specs = plan_of(model, plan)
    planned = _by_block(blocks, specs)
    input_ids = _check_ids(model, input_ids, options)
    held_out = _held_out(len(input_ids), options)
    settings = describe_settings(model, plan, options.settings(), input_ids, hqqplus.__version__)
    sizes = {name: sum(_weights(model, layer) for layer in specs) for name, specs in planned.items()}
    with solution_folder(folder, settings) as kept:
        done = kept.finished([name for name, specs in planned.items() if specs])
        first = len(done)
        total = sum(sizes.values())
        with (
            full_disk(folder or ".", "calibration"),
            # Each block has a line of its own: none between.
            WorkProgress(total, sum(sizes[name] for name in done), quiet, line_seconds=math.inf) as progress,
        ):
            if stacks := [name for name in specs if is_stack(model, name)]:
                which = f"{len(stacks)} stacks of experts, such as {stacks[0]}"
                progress.say(f"{which}, are not calibrated: they are solved without data")
            if done:
                progress.say(f"{folder}: goes on where it was, {len(done)} blocks are finished")
            _Run(blocks, planned, plan.solver, options, held_out, factors, kept, progress).go(input_ids, done, folder)
        kept.complete()
        solved = [done[name] for name, specs in planned.items() if specs]
        packed = {layer: tensor for block in solved for layer, tensor in block.packed.items()}
        starts = {layer: found for block in solved for layer, found in block.factors.items()}
        reports = tuple(block.report for block in solved)
        return Calibration(Solutions(packed, kept.digest), starts, reports, first)


@dataclass(frozen=True)
class _Run:
    blocks: Blocks
    planned: dict[str, dict[str, QuantSpec]]
    solver: SolverOptions
    options: CalibrationOptions
    held_out: Tensor
    factors: WeightedFactors | None
    folder: SolutionFolder
    progress: WorkProgress

    def go(self, input_ids: Tensor, done: dict[str, SolvedBlock], folder: str | Path | None) -> None:
        """Solve the blocks that are not among `done`, and add them."""
        names, size = self.blocks.names, self.options.batch_size
        wanted = [name for name in names if self.planned[name] and name not in done]
        if not wanted:
            return
        store = Path(folder) if folder and self.options.store == "disk" else None
        if store is not None:
            width = self.blocks.model.get_input_embeddings().weight.shape[1]
            needed = 2 * input_ids.numel() * width * self.blocks.model.dtype.itemsize
            check_space(store, needed, "calibration.store")
        exact = self.blocks.embed(input_ids, store, size)  # [samples, length, width]
        inputs = new_activations(tuple(exact.shape), exact.dtype, store).copy_(exact)
        for index, name in enumerate(names):
            last = not any(self.planned[later] and later not in done for later in names[index + 1 :])
            with self.blocks.placed(index) as block:
                if self.planned[name] and name not in done:
                    self.progress.advance(0, name)
                    solved = self._solve(index, block, inputs, exact)
                    if not self.folder.add(solved):
                        for later in names[index + 1 :]:
                            done.pop(later, None)
                        last = index == len(names) - 1
                    done[name] = solved
                    self._report(solved, index)
                elif not last:
                    self.blocks.advance(index, exact, size)
                if last:
                    return
                packed = done[name].packed if name in done else {}
                self.blocks.advance(index, inputs, size, self._weights_of(name, packed, inputs.dtype))

    def _solve(self, index: int, block: nn.Module, inputs: Tensor, exact: Tensor) -> SolvedBlock:
        """Solve block `index`; `exact` are its full-precision inputs before, and outputs after."""
        started, options, name = time.monotonic(), self.options, self.blocks.names[index]
        specs = {layer[len(name) + 1 :]: spec for layer, spec in self.planned[name].items()}
        weights = {layer: _weight(block, layer) for layer in specs}
        moments = self._moments(index, block, list(specs), inputs)
        self.blocks.advance(index, exact, options.batch_size)
        if not all(torch.isfinite(sample).all() for sample in exact):
            raise UserError(f"calibration: the outputs of {name} are not finite in {exact.dtype}")

        def measured(packed: Mapping[str, PackedTensor]) -> float:
            return block_loss(self.blocks, index, inputs, exact, self.held_out, options.batch_size, packed)

        found = {start: self._start(name, start, weights, specs, moments) for start in self._starts(name)}
        losses = {start: measured(packed) for start, packed in found.items()}
        if not all(map(math.isfinite, losses.values())):
            raise UserError(f"calibration: quantized, the outputs of {name} are not finite in {exact.dtype}")
        start = min(losses, key=losses.__getitem__) if options.method == "block" else options.method
        packed, curve = found[start], [losses[start]]
        del found
        if options.method == "block" and options.epochs:
            generator = torch.Generator().manual_seed(options.seed * 100_003 + index)
            result = reconstruct(
                self.blocks,
                index,
                inputs,
                exact,
                weights,
                packed,
                options.training(),
                self.held_out,
                generator,
                lambda text: self.progress.advance(0, f"{name}: {text}"),
            )
            packed, curve = result.packed, list(result.curve)
        statistics = {f"{name}.{layer}": layer_statistics(weights[layer], p) for layer, p in packed.items()}
        factors = {
            f"{name}.{layer}": self._factors(weights[layer], p, moments[layer])
            for layer, p in packed.items()
            if self.factors is not None
        }
        report = BlockReport(name, losses, start, tuple(curve), min(curve), time.monotonic() - started, statistics)
        return SolvedBlock({f"{name}.{layer}": _on_cpu(p) for layer, p in packed.items()}, factors, report)

    def _starts(self, name: str) -> list[str]:
        """The ways of solving that are tried for block `name`, the one without data first."""
        if self.options.method != "block":
            return ["data-free", self.options.method]
        possible = self.solver.lp_norm == 2 and not self.solver.gain
        possible = possible and all(spec.axis == 1 for spec in self.planned[name].values())
        return ["data-free", "importance", *(["feedback"] if possible else [])]

    def _start(
        self,
        name: str,
        start: str,
        weights: Mapping[str, Tensor],
        specs: Mapping[str, QuantSpec],
        moments: Mapping[str, SecondMoment],
    ) -> dict[str, PackedTensor]:
        packed = {}
        for layer, weight in weights.items():
            try:
                if start == "feedback":
                    packed[layer] = error_feedback(
                        weight, specs[layer], moments[layer].matrix, self.solver, solver=solve
                    )
                else:
                    importance = moments[layer].diagonal if start == "importance" else None
                    packed[layer] = quantize(weight, specs[layer], self.solver, importance)
            except ValueError as error:
                raise UserError(f"calibration: {name}.{layer}: {error}") from None
        return packed

    def _moments(self, index: int, block: nn.Module, layers: list[str], inputs: Tensor) -> dict[str, SecondMoment]:
        """Of what goes into each of `layers` of block `index` on `inputs`."""
        options = self.options
        full = options.method != "importance" or options.start_rank > 0
        size = options.batch_size
        with observe_inputs(block, layers, full) as moments, torch.no_grad():
            for batch in inputs.split(size):
                self.blocks.run(index, batch.to(self.blocks.device))
        if unused := next((layer for layer, moment in moments.items() if moment.count == 0), None):
            raise UserError(f"calibration: {self.blocks.names[index]}.{unused} is never called: skip it")
        return moments

    def _factors(self, weight: Tensor, packed: PackedTensor, moment: SecondMoment) -> StartFactors:
        assert self.factors is not None
        residual = weight.float() - packed.dequantize(torch.float32).to(weight.device)
        a, b, singular = self.factors(residual, moment.matrix, self.options.start_rank)
        return a.cpu(), b.cpu(), singular.cpu()

    def _weights_of(self, name: str, packed: Mapping[str, PackedTensor], dtype: torch.dtype) -> dict[str, Tensor]:
        device = self.blocks.device
        return {f"{n[len(name) + 1 :]}.weight": p.dequantize(dtype).to(device) for n, p in packed.items()}

    def _report(self, solved: SolvedBlock, index: int) -> None:
        report = solved.report
        weights = sum(math.prod(packed.shape) for packed in solved.packed.values())
        self.progress.advance(weights, report.name)
        which = f"{report.name} ({index + 1} of {len(self.blocks.names)})"
        self.progress.say(f"{which}: loss {report.before:.4g} -> {report.loss:.4g}, {self.progress.pace()}")


def _by_block(blocks: Blocks, specs: Mapping[str, QuantSpec]) -> dict[str, dict[str, QuantSpec]]:
    """Block -> its linear layers that are quantized, by their full names."""
    found: dict[str, dict[str, QuantSpec]] = {name: {} for name in blocks.names}
    for layer, spec in specs.items():
        block = next((name for name in found if layer.startswith(f"{name}.")), None)
        if is_stack(blocks.model, layer):
            continue  # experts are solved without data
        if block is not None and isinstance(blocks.model.get_submodule(layer), nn.Linear):
            found[block][layer] = spec
    if not any(found.values()):
        raise UserError(f"calibration: no block of {type(blocks.model).__name__} has a layer to quantize")
    return found


def _check_ids(model: Any, input_ids: Tensor, options: CalibrationOptions) -> Tensor:
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32) or input_ids.numel() == 0:
        form = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
        raise UserError(f"calibration: the samples are {form}: they must be token ids [samples, length]")
    if options.method == "block" and options.epochs and len(input_ids) < 2:
        raise UserError("calibration: there is one sample; two are needed, one to train on and one to measure on")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(input_ids.min()) < 0 or int(input_ids.max()) >= vocabulary:
        raise UserError(f"calibration: there are token ids outside 0 ... {vocabulary - 1}")
    return input_ids.cpu().long()


def _held_out(samples: int, options: CalibrationOptions) -> Tensor:
    """Which samples losses are measured on; at least one, and at least one other is left."""
    count = min(max(1, round(samples * options.held_out)), max(1, samples - 1))
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(options.seed))
    return order[:count].sort().values


def _weight(block: nn.Module, layer: str) -> Tensor:
    module = block.get_submodule(layer)
    assert isinstance(module, nn.Linear)
    return module.weight.detach()


def _weights(model: nn.Module, layer: str) -> int:
    return _weight(model, layer).numel()


def _on_cpu(packed: PackedTensor) -> PackedTensor:
    tensors = {name: tensor.cpu() for name, tensor in packed.state().items()}
    return PackedTensor(**tensors, spec=packed.spec, shape=packed.shape)
