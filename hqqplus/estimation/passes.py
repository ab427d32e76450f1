"""What the passes of a recipe hold: training, measuring, generating, calibrating; each on tensors without data.

A model has as many blocks of each kind as it likes, but all that is counted here grows with their number evenly once
the kinds have come round, so it is counted for a few of them and drawn out to all.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hqqplus.calibration.blocks import Blocks
from hqqplus.calibration.reconstruct import TrainedLayer
from hqqplus.estimation.parts import byte_size
from hqqplus.estimation.simulation import LiveBytes, simulated, with_fake_tensors
from hqqplus.integrations.bare import checkpoint_blocks, repeats, use_fused_loss, without_masks
from hqqplus.integrations.distilling import Request, add_distillation
from hqqplus.modules import PackedLinear
from hqqplus.modules.trainable import DELTAS
from hqqplus.quantization import PackedTensor, QuantSpec
from hqqplus.quantization.tensor import state_shapes
from hqqplus.recovery.distillation import Distillation, FullTargets, Head, LossWeights, TopTargets


@dataclass(frozen=True)
class Shape:
    """What goes through a model: sequences, their length, whether they need a mask (some are padded, or documents are
    packed into them), and the dtype that is computed in where it is not the model's own."""

    batch: int
    length: int
    masked: bool = False
    autocast: torch.dtype | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """As this is computed: under autocast or not, with masks or without."""
        autocast = nullcontext() if self.autocast is None else torch.autocast("cpu", dtype=self.autocast)
        with autocast, nullcontext() if self.masked else without_masks():
            yield

    def inputs(self) -> dict[str, Tensor]:
        ids = torch.zeros(self.batch, self.length, dtype=torch.long)
        return {"input_ids": ids, **({"position_ids": torch.zeros_like(ids)} if self.masked else {})}


@dataclass(frozen=True)
class Step:
    """Bytes of a training step beside parameters, gradients of parameters and optimizer.

    Attributes:
        kept: what the blocks keep for the backward pass, once the forward pass is through them.
        blocks: the most at a time while the blocks compute, forward or backward, `kept` included.
        loss: the most that the loss takes beside `kept`.
    """

    kept: float
    blocks: float
    loss: float = 0.0

    @property
    def peak(self) -> float:
        return max(self.blocks, self.kept + self.loss)


@dataclass(frozen=True)
class Passes:
    """What `run_passes` counted, in bytes.

    Attributes:
        step, other_step: a training step as the recipe has it, and with checkpointing the other way.
        evaluation: the most of a pass of the evaluation's batch, without gradients.
        generation: the most while a prompt as long as the context is read, its cache included.
        cache: the keys and values of the context.
    """

    step: Step
    other_step: Step
    evaluation: float
    generation: float
    cache: float


@dataclass(frozen=True)
class Sizes:
    """What is asked of `run_passes`: the shapes of a training step, of the evaluation, of a generation."""

    training: Shape
    evaluation: Shape
    generation: Shape
    checkpointing: bool


def run_passes(adapted: Any, blocks: list[str], sizes: Sizes, loss: Any) -> Passes:
    """Count what the passes of PEFT model `adapted` hold, which is on the meta device and is used up.

    Args:
        blocks: its decoder blocks by their names without PEFT.
        loss: called with the model in training and the shape; returns the loss of some hidden states (`loss_of`).
    """
    model = adapted.get_base_model()
    kinds, period = repeats(model, blocks)
    total = len(blocks)
    counts = [min(2 * period, total), *([period] if 2 * period <= total else [])]
    kept: dict[bool, list[int]] = {True: [], False: []}
    beside: dict[bool, int] = {}
    with simulated() as live:
        with_fake_tensors(adapted)
        handles = [p.register_post_accumulate_grad_hook(_drop) for p in adapted.parameters() if p.requires_grad]
        lost = loss(model, sizes.training, live)
        for count in counts:
            _cut(model, blocks[0], count)
            adapted.train()
            for checkpointing in (True, False):
                checkpoint_blocks(model, checkpointing)
                held, peak = _training(model, sizes.training, live)
                kept[checkpointing].append(held)
                # The most is held where the backward pass begins, with what all blocks keep.
                beside.setdefault(checkpointing, peak - held)
            if count == counts[0]:
                adapted.eval()
                with torch.no_grad(), _baked(adapted):
                    evaluation = _evaluation(model, sizes.evaluation, live)
                    peak, caches = _generation(model, sizes.generation, live)
        for handle in handles:
            handle.remove()

    def step(checkpointing: bool) -> Step:
        held = kept[checkpointing]
        slope = (held[0] - held[-1]) / (counts[0] - counts[-1]) if len(counts) > 1 else 0.0
        whole = held[0] + slope * (total - counts[0])
        return Step(whole, whole + beside[checkpointing], lost)

    by_kind = dict(zip(kinds[: counts[0]], caches, strict=False))
    cache = float(sum(by_kind[kind] for kind in kinds))
    generation = cache + peak - sum(caches[: counts[0]])
    here, other = step(sizes.checkpointing), step(not sizes.checkpointing)
    return Passes(here, other, evaluation, generation, cache)


@contextmanager
def _baked(model: nn.Module) -> Iterator[None]:
    """Within the block trained scales are part of their layers, as after a training."""
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    deltas = [(layer, name, getattr(layer, name)) for layer in layers for name in DELTAS]
    for layer, name, _ in deltas:
        setattr(layer, name, None)
    try:
        yield
    finally:
        for layer, name, delta in deltas:
            setattr(layer, name, delta)


def _drop(parameter: Tensor) -> None:
    """Gradients stay from step to step, and are counted with the parameters: here they are what is added to them."""
    parameter.grad = None


def _cut(model: Any, first: str, count: int) -> None:
    parent, _, name = first.rpartition(".")[0].rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, name, getattr(owner, name)[:count])


@contextmanager
def _counting(live: LiveBytes) -> Iterator[None]:
    gc.collect()
    live.start()
    yield
    gc.collect()


def _training(model: Any, shape: Shape, live: LiveBytes) -> tuple[int, int]:
    """(kept, the most) of a forward and backward pass through the blocks."""
    with _counting(live):
        with shape.computing():
            hidden = model.base_model(**shape.inputs(), use_cache=False).last_hidden_state
        gc.collect()
        kept = live.now
        hidden.backward(torch.empty_like(hidden))
        return kept, live.peak


def _evaluation(model: Any, shape: Shape, live: LiveBytes) -> int:
    with _counting(live), shape.computing():
        model.base_model(**shape.inputs(), use_cache=False)
        return live.peak


def _generation(model: Any, shape: Shape, live: LiveBytes) -> tuple[int, list[int]]:
    """The most, and the bytes of each block's cache."""
    with _counting(live), shape.computing():
        outputs = model(**shape.inputs(), use_cache=True, logits_to_keep=1)
        return live.peak, cache_bytes(outputs.past_key_values)


def cache_bytes(cache: Any) -> list[int]:
    """The bytes of a cache of transformers, layer by layer: keys and values, or whatever else a layer remembers."""
    sizes = []
    for layer in cache.layers:
        tensors = {t.untyped_storage()._cdata: t for t in vars(layer).values() if isinstance(t, Tensor)}
        sizes.append(sum(map(byte_size, tensors.values())))
    return sizes


# Losses --------------------------------------------------------------------------------------------------------------


# TRL's loss takes 4096 tokens at a time.
_TOKENS = 2 * 4096


class _Teacher:
    has_hidden = True


def cross_entropy(model: Any, shape: Shape, live: LiveBytes) -> float:
    """The most that TRL's loss takes of the hidden states of a batch."""
    use_fused_loss(model)

    def run(inputs: dict[str, Any]) -> Tensor:
        return -model(**inputs, fused_lm_head=True).log_probs.sum()

    return _drawn_out(model, shape, live, run, _TOKENS)


def distillation(weights: LossWeights, top_k: int | None) -> Any:
    """The same of a distillation, in which all positions are supervised.

    Args:
        top_k: of a teacher's cache; None for a teacher beside the student.
    """

    def count(model: Any, shape: Shape, live: LiveBytes) -> float:
        add_distillation(model)
        config = model.config.get_text_config()
        vocabulary, width = config.vocab_size, config.hidden_size
        # In float32, and counted with the teacher: on a CPU 16 bits would be turned to it piece by piece.
        head = Head(torch.empty(vocabulary, width))

        def run(inputs: dict[str, Any]) -> Tensor:
            positions = inputs["labels"].shape[1] - 1
            if top_k is None:
                targets: Any = FullTargets(torch.empty(positions, width, dtype=model.dtype), head)
            else:
                ids = torch.empty(positions, top_k, dtype=torch.int32)
                targets = TopTargets(ids, torch.empty(positions, top_k, dtype=torch.float16))
            request = Request(Distillation(weights, _Teacher()), targets, None)  # type: ignore[arg-type]
            return model(**inputs, distillation=request).loss

        return _drawn_out(model, shape, live, run, 2 * 2**24 // vocabulary)

    return count


def _drawn_out(model: Any, shape: Shape, live: LiveBytes, run: Any, chunks: int) -> float:
    """The most of a loss that takes `chunks` tokens in two chunks or so: past those each further one adds the same."""
    tokens = shape.batch * (shape.length - 1) + 1
    counts = sorted({min(tokens, max(2, chunks) + 1), min(tokens, 2 * max(2, chunks) + 1)})
    peaks = [_loss(model, replace(shape, batch=1, length=count), live, run) for count in counts]
    slope = (peaks[-1] - peaks[0]) / (counts[-1] - counts[0]) if len(counts) > 1 else 0.0
    return peaks[-1] + slope * (tokens - counts[-1])


def _loss(model: Any, shape: Shape, live: LiveBytes, run: Any) -> float:
    """The most of a loss, forward and backward, with hidden states in the place of those that blocks would make."""
    width = model.config.get_text_config().hidden_size
    dtype = shape.autocast or model.dtype
    hidden = torch.empty(shape.batch, shape.length, width, dtype=dtype, requires_grad=True)
    inputs = {**shape.inputs(), "labels": torch.zeros(shape.batch, shape.length, dtype=torch.long)}

    inner = model.base_model
    blocks = inner.__dict__.get("forward")
    inner.forward = lambda *args, **kwargs: _Output(hidden)
    try:
        with _counting(live):
            with shape.computing():
                value = run({**inputs, "use_cache": False})
            value.backward()
            return live.peak
    finally:
        hidden.grad = None
        if blocks is None:
            del inner.forward
        else:
            inner.forward = blocks


class _Output:
    """What the blocks return."""

    past_key_values = hidden_states = attentions = router_logits = None

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state


# Calibration ---------------------------------------------------------------------------------------------------------


def reconstruction_bytes(
    parent: Any, blocks: list[str], specs: dict[str, QuantSpec], shape: Shape, codes: bool
) -> float:
    """The most on the device while a block of the largest kind is calibrated, the block itself included.

    Args:
        parent: the full-precision model on the meta device; it is used up.
        specs: module -> how it is packed.
        shape: of a batch of samples.
        codes: whether the weights are trained beside scales and offsets.
    """
    largest = max(blocks, key=lambda path: sum(map(byte_size, parent.get_submodule(path).parameters())))
    layers = {name: spec for name, spec in specs.items() if name.startswith(f"{largest}.")}
    with simulated() as live:
        with_fake_tensors(parent)
        index = blocks.index(largest)
        runner = Blocks(parent, "cpu")
        with torch.no_grad(), shape.computing():
            hidden = runner.embed(shape.inputs()["input_ids"], batch_size=shape.batch)
        block = parent.get_submodule(largest)
        with _counting(live):
            linears = {name: block.get_submodule(name[len(largest) + 1 :]) for name in layers}
            weights = {name: linear.weight for name, linear in linears.items() if isinstance(linear, nn.Linear)}
            # Second moments of what goes into each layer stay until the block is done.
            moments = sum(4 * weight.shape[1] ** 2 for weight in weights.values())
            trained = {n: TrainedLayer(w.detach(), _empty(layers[n], w), codes) for n, w in weights.items()}
            given = {f"{n[len(largest) + 1 :]}.weight": t.weight().to(hidden.dtype) for n, t in trained.items()}
            output = runner.run(index, hidden, given)
            loss = (output.float() - hidden.float()).square().sum()
            loss.backward()
            parameters = [p for t in trained.values() for p in (t.log_scale, t.shift, t.latent) if p is not None]
            adam = 2 * sum(map(byte_size, parameters))
            return float(live.peak + adam + moments + sum(map(byte_size, block.parameters())))


def _empty(spec: QuantSpec, weight: Tensor) -> PackedTensor:
    rows, columns = weight.shape
    forms = state_shapes(spec, rows, columns)
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in forms.items()}
    return PackedTensor(**tensors, spec=spec, shape=(rows, columns))  # type: ignore[arg-type]
