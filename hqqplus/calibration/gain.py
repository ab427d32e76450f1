"""The gain exponent of a model: how much of the shrinkage of least squares is undone by row, chosen on a little text.

Least squares shrinks a row w to a q of less energy, <w, q> = (1 - NMSE) |w|^2. The row gain (<w, w> / <w, q>)^gamma,
folded into the scales (`SolverOptions.gain`), undoes that for gamma = 1. It helps some models greatly and hurts
others, so gamma is chosen by KL(parent || quantized) on a few thousand tokens.

One quantization serves for all candidates: a gain of the rows is a factor of the outputs,

    y = gain^gamma (y_0 - bias) + bias

which a hook on each layer applies, while the weights in place are those of gamma = 0. A run with the gamma that was
chosen differs by the rounding of the gained scales to their stored form, no more.

Memory: beside the weights the parent's log-probabilities are kept on the CPU in float16 (2 bytes for each token and
entry of the vocabulary: 1 GB for 4,096 tokens of a Llama 3), normalised again when they are read. A model that was
handed over loaded also keeps its own weights, to get them back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hqqplus.errors import UserError
from hqqplus.evaluation.divergence import token_kl
from hqqplus.evaluation.mode import evaluating
from hqqplus.evaluation.perplexity import make_windows
from hqqplus.integrations.transformers import plan_of
from hqqplus.kernels import quantize
from hqqplus.modules import PackedState
from hqqplus.modules.replace import is_stack
from hqqplus.progress import WorkProgress
from hqqplus.quantization import QuantPlan

CANDIDATES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Log-probabilities that are held in float32 at a time: 32 MiB.
_CHUNK_ELEMENTS = 2**23
# Rows of a data set that calibration windows are taken from.
_ROWS = 64


@dataclass(frozen=True)
class GainChoice:
    """`gamma`: the best candidate; `kl`: candidate -> mean KL(parent || quantized) per token in nats, infinite where
    the predictions are not finite; `tokens`: on how many."""

    gamma: float
    kl: dict[float, float]
    tokens: int

    def apply(self, plan: QuantPlan) -> QuantPlan:
        """`plan` with the chosen gain."""
        return dataclasses.replace(plan, solver=dataclasses.replace(plan.solver, gain=self.gamma))


def choose_gain(
    model: Any,
    plan: QuantPlan,
    input_ids: Tensor | Iterable[Tensor],
    candidates: Sequence[float] = CANDIDATES,
    batch_size: int = 4,
    **load: Any,
) -> GainChoice:
    """Choose the gain exponent for quantizing `model` by `plan`, whose own gain does not count.

    The KL is over every position of every sequence. Of equal candidates the smallest wins. A loaded model is put back
    as it was, weights and training flags; nothing random is drawn.

    Args:
        model: a full-precision transformers model, or the name of one (hub id or folder), which is then loaded.
        input_ids: int64 [sequences, length], or sequences [length] of different lengths. A few thousand tokens do.
        candidates: exponents from 0 to 1.
        batch_size: sequences that go through the model at a time.
        load: further arguments of `models.load_causal_lm`, for a name.

    Raises:
        UserError: for a plan with axis 0 (whose groups run over several rows), a model that is packed already, a
            weight that cannot be quantized, or predictions that are not finite.
        ValueError: no candidates or one out of range, no sequences, a batch size below 1.
    """
    sequences = sorted((one.cpu() for one in input_ids), key=len, reverse=True)
    if not sequences or not len(sequences[-1]) or batch_size < 1:
        raise ValueError(f"choose_gain: {len(sequences)} sequences in batches of {batch_size}: tokens are needed")
    if not candidates or not all(0 <= gamma <= 1 for gamma in candidates):
        raise ValueError(f"choose_gain: candidates are {list(candidates)}: numbers from 0 to 1 are needed")
    batches = [sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size)]
    given = isinstance(model, nn.Module)
    if not given:
        from hqqplus.models import load_causal_lm

        model = load_causal_lm(model, **{"where": "model", **load})
    if any(isinstance(module, PackedState) for module in model.modules()):
        raise UserError(f"gain: this {type(model).__name__} is packed already; give its parent")
    specs = plan_of(model, plan)
    if experts := next((name for name in specs if is_stack(model, name)), None):
        raise UserError(
            f"gain: {experts} holds the matrices of experts, on which gains are not tried out: give the gain as a "
            "number, or skip the experts"
        )
    if turned := next((name for name, spec in specs.items() if spec.axis == 0), None):
        raise UserError(f"gain: {turned} has axis 0: a row gain needs axis 1, where a group lies in one row")
    tokens = sum(map(len, sequences))
    tried = sorted(set(candidates))
    work = tokens * (1 + len(tried))
    with evaluating(model), torch.no_grad(), WorkProgress(work, unit="tokens", what="choosing the gain") as progress:

        def done(batch: Sequence[Tensor], gamma: float | None = None) -> None:
            progress.advance(sum(map(len, batch)), "the parent" if gamma is None else f"gain {gamma:g}")

        parents = []
        for batch in batches:
            parents.append(_log_probabilities(model, batch))
            done(batch)
        if any(piece.isnan().any() for pieces in parents for piece in pieces):
            raise UserError(f"gain: the predictions of {type(model).__name__} on the calibration text are not finite")
        with _quantized(model, plan, put_back=given) as gains:
            kl = {}
            for gamma in tried:
                with _gained(gains, gamma):
                    sums = []
                    for parent, batch in zip(parents, batches, strict=True):
                        sums.append(_kl(parent, _logits(model, batch)))
                        done(batch, gamma)
                kl[float(gamma)] = sum(sums) / tokens if math.isfinite(sum(sums)) else math.inf
    best = min(kl, key=kl.__getitem__)
    if not math.isfinite(kl[best]):
        raise UserError("gain: the quantized model's predictions on the calibration text are not finite")
    return GainChoice(best, kl, tokens)


@contextmanager
def _quantized(model: Any, plan: QuantPlan, put_back: bool) -> Iterator[dict[nn.Module, Tensor]]:
    """`model` with the weights that `plan` packs replaced by their dequantized values; gives module -> row gain [out].

    Two modules that share a weight have one gain. With `put_back` the weights are kept and come back at the end.
    """
    options = dataclasses.replace(plan.solver, gain=0.0)
    gains: dict[nn.Module, Tensor] = {}
    done: dict[int, Tensor] = {}
    whole: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name, spec in plan_of(model, plan).items():
            module = model.get_submodule(name)
            weight = module.weight
            if id(weight) not in done:
                try:
                    packed = quantize(weight.data, spec, options)
                except ValueError as error:
                    raise UserError(f"{name}.weight: {error}") from None
                approximation = packed.dequantize(torch.float32)
                done[id(weight)] = row_gain(weight.data, approximation)
                if put_back:
                    whole.append((weight, weight.data))
                weight.data = approximation.to(weight.dtype)
            gains[module] = done[id(weight)]
        yield gains
    finally:
        for weight, values in whole:
            weight.data = values


def row_gain(weight: Tensor, approximation: Tensor) -> Tensor:
    """<w, w> / <w, q> for the rows of two matrices [out, in] -> float32 [out]; 1 where that is no positive number."""
    unit = weight.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    values, approximation = weight.float() / unit, approximation.float() / unit
    energy, overlap = (values * values).sum(1), (values * approximation).sum(1)
    usable = (energy > 0) & (overlap > 0)
    return torch.where(usable, energy / torch.where(usable, overlap, 1.0), 1.0)


@contextmanager
def _gained(gains: dict[nn.Module, Tensor], gamma: float) -> Iterator[None]:
    """Within the block each layer computes as if its weight's rows were multiplied by gain^gamma."""
    handles = []
    for module, gain in gains.items():
        factor = gain.pow(gamma)

        def scaled(module: Any, inputs: Any, output: Tensor, factor: Tensor = factor) -> Tensor:
            if isinstance(module, nn.Embedding):
                return output * factor[inputs[0]].to(output.dtype).unsqueeze(-1)
            scale = factor.to(output.dtype)
            return output * scale if module.bias is None else (output - module.bias) * scale + module.bias

        handles.append(module.register_forward_hook(scaled))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sample_windows(rows: Any, tokenizer: Any, tokens: int = 4096, length: int = 256, name: str = "") -> list[Tensor]:
    """About `tokens` tokens of a data set with column "text", in windows of `length`, from all over it.

    64 rows, evenly spaced, are tokenized, and of their windows so many are taken, evenly spaced again: a file may be
    sorted, or be one long document.

    Raises:
        UserError: if there are not two tokens; the message starts with `name`.
    """
    count = len(rows)
    texts = rows.select(sorted({index * count // _ROWS for index in range(_ROWS)}))["text"]
    windows = make_windows(texts, tokenizer, length, name=name).input_ids
    wanted = max(1, min(len(windows), tokens * len(windows) // sum(map(len, windows))))
    return [windows[index * len(windows) // wanted] for index in range(wanted)]


def _logits(model: Any, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The logits of all positions of a batch of sequences, one sequence after the other: pieces [some tokens, V]."""
    input_ids = pad_sequence(list(batch), batch_first=True)  # [B, L]
    logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits
    flat = torch.cat([logits[row, : len(sequence)] for row, sequence in enumerate(batch)])
    return flat.split(max(1, _CHUNK_ELEMENTS // flat.shape[1]))


def _log_probabilities(model: Any, batch: Sequence[Tensor]) -> list[Tensor]:
    """As `_logits`, normalised, in float16 on the CPU."""
    return [piece.float().log_softmax(-1).half().cpu() for piece in _logits(model, batch)]


def _kl(parent: Sequence[Tensor], logits: Sequence[Tensor]) -> float:
    """Sum over the tokens of KL(parent || changed), from the parent's log-probabilities and the changed logits."""
    sums = [
        token_kl(p.to(q.device).float().log_softmax(-1), q.float().log_softmax(-1)).cpu().double().sum()
        for p, q in zip(parent, logits, strict=True)
    ]
    return float(sum(sums))
