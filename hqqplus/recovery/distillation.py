"""Distillation: how far the student's next-token distribution is from its parent's, and the gradient of that.

    loss = (kl_weight * sum KL(p || q) + ce_weight * sum -ln q(label) + hidden_weight * sum |h - g|^2 / |g|^2) / N

over the supervised positions; p is the parent's distribution, q the student's (temperature 1), g and h their final
hidden states, N the number of positions in the whole optimizer step (all processes and accumulated batches). The
hidden states are compared position by position, relative to the parent's, so that the loss of a batch does not depend
on how it was cut into smaller ones.

Gradients with respect to the student's logits z, where q = softmax(z):

    full KL             q - p
    top k and the rest  q_j - p_j for the k listed outcomes,  q_j - p_rest q_j / q_rest for the others

The second is the KL over k + 1 outcomes, the last of which is "none of the k". It is 0 where the student's rest is the
parent's; a KL over the k alone is not, and takes all mass away from the rest (arXiv 2503.16870).

A vocabulary of 128,256 makes 0.5 GB of float32 logits out of 1,000 tokens. So the gradient to the hidden states is
worked out a few tokens at a time already in the forward pass, and nothing of the vocabulary's size is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hqqplus.errors import UserError

# Logits of one chunk: 64 MiB in float32.
_CHUNK_ELEMENTS = 2**24
# Weights of the head that are turned to float32 at a time, where the device cannot multiply halves to float32.
_BLOCK_ELEMENTS = 2**22
IGNORED = -100


@dataclass(frozen=True)
class LossWeights:
    """What each part of the loss counts. `hidden` needs the parent at hand: a cache holds no hidden states.

    Raises:
        UserError: if one is negative, or all are zero.
    """

    kl: float = 1.0
    ce: float = 0.5
    hidden: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise UserError(f"distillation: the weight of {name} is {value}: it must be 0 or more")
        if not any(vars(self).values()):
            raise UserError("distillation: the weights of kl, ce and hidden are all 0: nothing would be trained")


@dataclass(frozen=True)
class Head:
    """The output head: logits = cap(scale * (h W' + b)), cap(x) = softcap * tanh(x / softcap).

    Attributes:
        weight: [V, d]. bias: [V].
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a transformers causal model; of a sharded one (FSDP2) the whole of it, gathered."""
        config = model.config.get_text_config()
        layer = model.get_output_embeddings()
        # Each family has its own name for it; Granite and MiniCPM3 divide by theirs, HyperCLOVA X multiplies.
        names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
        scale = next((s for name in names if (s := getattr(config, name, None)) is not None), None)
        if scale is None and (scaling := getattr(config, "logits_scaling", None)) is not None:
            scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
        softcap = getattr(config, "final_logit_softcapping", None)
        # A packed head makes its weight anew each time that it is asked for it.
        weight, bias = _whole(layer.weight), _whole(getattr(layer, "bias", None))
        return cls(weight, bias, 1.0 if scale is None else float(scale), softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, d] -> logits [n, V] in float32 (float64 where `hidden` is)."""
        logits = _project(hidden, self.weight)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of the logits by h W' + b, at each of them."""
        if self.softcap is None:
            return self.scale
        return logits.div(self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@dataclass(frozen=True)
class FullTargets:
    """The parent's final hidden states [n, d] at the supervised positions, and its head."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class TopTargets:
    """The parent's k likeliest tokens, ids [n, k], and their log-probabilities [n, k]; the others have the rest."""

    ids: Tensor
    log_probs: Tensor


Targets = FullTargets | TopTargets


@dataclass(frozen=True)
class DistillationLoss:
    """`loss`, to be differentiated, and what it is made of, for the log: sums over the `positions`, detached.

    `correct` counts the positions where the student's likeliest token is the label.
    """

    loss: Tensor
    kl: Tensor
    ce: Tensor
    hidden: Tensor
    correct: Tensor
    positions: int


class TargetSource(Protocol):
    """Where the targets come from: `OnlineTeacher` or `TeacherCache`."""

    has_hidden: bool

    def collator(self, collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]: ...

    def targets(self, inputs: dict[str, Any]) -> Targets: ...


class Distillation:
    """The loss of a training run: its weights and the source of its targets. What `RecoveryTrainer` is given.

    Raises:
        UserError: if hidden states are to be compared and the source has none.
    """

    def __init__(self, weights: LossWeights, source: TargetSource, chunk_tokens: int | None = None) -> None:
        if weights.hidden and not source.has_hidden:
            raise UserError("distillation: hidden states are not cached: set their weight to 0, or keep the parent")
        self.weights, self.source, self.chunk_tokens = weights, source, chunk_tokens

    def collator(self, collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
        """`collate` with what the source adds to a batch."""
        return self.source.collator(collate)

    def targets(self, inputs: dict[str, Any]) -> Targets:
        """The targets of the supervised positions of a batch; takes out of `inputs` what the collator put there."""
        return self.source.targets(inputs)

    def loss(
        self, model: Any, hidden: Tensor, labels: Tensor, targets: Targets, num_items: Tensor | int | None
    ) -> DistillationLoss:
        """`distillation_loss` with the head of the causal model `model`."""
        head = Head.of(model)
        return distillation_loss(hidden, head, labels, targets, self.weights, num_items, self.chunk_tokens)


def supervised(labels: Tensor) -> Tensor:
    """Which positions predict a token that counts: labels [B, L] -> [B, L - 1], True at t where labels[t + 1] does."""
    return labels[:, 1:] != IGNORED


@torch.compiler.disable
def distillation_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    targets: Targets | None,
    weights: LossWeights,
    num_items: Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> DistillationLoss:
    """The loss of the student at n supervised positions, as the top of this module says.

    Args:
        hidden: its final hidden states, [n, d].
        labels: the token that follows each of them, [n].
        targets: of the same positions; None only where the weights of `kl` and `hidden` are 0.
        num_items: N; n where it is None.
        chunk_tokens: positions whose logits are held at a time; by default as many as make 64 MiB in float32.

    Raises:
        ValueError: if the shapes disagree, or targets are missing that the weights ask for.
    """
    _check(hidden, head, labels, targets, weights)
    count = hidden.shape[0]
    step = chunk_tokens or max(1, _CHUNK_ELEMENTS // head.weight.shape[0])
    job = _Job(head, labels, targets, weights, step, torch.is_grad_enabled())
    with torch.autocast(hidden.device.type, enabled=False):
        total, parts = _ChunkedLoss.apply(hidden, head.weight, head.bias, job)
    divisor = torch.as_tensor(count if num_items is None else num_items, device=total.device).clamp(min=1)
    kl, ce, relative, correct = parts.unbind()
    return DistillationLoss(total / divisor, kl, ce, relative, correct, count)


def _check(hidden: Tensor, head: Head, labels: Tensor, targets: Targets | None, weights: LossWeights) -> None:
    count, vocabulary = hidden.shape[0], head.weight.shape[0]
    if labels.shape != (count,):
        raise ValueError(f"distillation: {count} hidden states and labels of shape {tuple(labels.shape)}")
    if targets is None:
        if weights.kl or weights.hidden:
            raise ValueError("distillation: there are no targets")
        return
    found = (targets.hidden if isinstance(targets, FullTargets) else targets.ids).shape[0]
    if found != count:
        raise ValueError(f"distillation: targets of {found} positions for {count} supervised ones")
    if isinstance(targets, TopTargets):
        if weights.hidden:
            raise ValueError("distillation: the targets hold no hidden states to compare with")
        if targets.ids.shape != targets.log_probs.shape or not 1 <= targets.ids.shape[1] <= vocabulary:
            raise ValueError(f"distillation: ids {tuple(targets.ids.shape)} of {vocabulary} tokens")
    elif weights.kl and targets.head.weight.shape[0] != vocabulary:
        raise ValueError(
            f"distillation: the parent has {targets.head.weight.shape[0]} tokens, the student {vocabulary}"
        )
    elif weights.hidden and targets.hidden.shape != hidden.shape:
        raise ValueError(
            f"distillation: hidden states {tuple(hidden.shape)} and the parent's {tuple(targets.hidden.shape)}"
        )


@dataclass(frozen=True)
class _Job:
    """What `_ChunkedLoss` does not differentiate by."""

    head: Head
    labels: Tensor
    targets: Targets | None
    weights: LossWeights
    step: int
    grad: bool


class _ChunkedLoss(torch.autograd.Function):
    """(hidden [n, d], weight [V, d], bias [V], job) -> (loss summed over n, [4]: kl, ce, hidden, correct, summed)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, Tensor]:
        dtype = _dtype(hidden)
        to_hidden, to_weight, to_bias = (job.grad and needed for needed in ctx.needs_input_grad[:3])
        d_hidden = torch.zeros_like(hidden) if to_hidden else None
        # A trainable head is the exception. Its gradient is summed over all chunks: in full precision.
        d_weight = torch.zeros_like(weight, dtype=dtype) if to_weight else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and to_bias else None
        sums = torch.zeros(4, dtype=dtype, device=hidden.device)
        for start in range(0, hidden.shape[0], job.step):
            part = slice(start, start + job.step)
            d_logits, found = _logit_part(hidden, part, job, to_hidden or to_weight or to_bias)
            sums += found
            if d_logits is not None:
                if d_hidden is not None:
                    d_hidden[part] += d_logits.to(weight.dtype) @ weight
                if d_weight is not None:
                    d_weight.addmm_(d_logits.t(), hidden[part].to(dtype))
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
            if job.weights.hidden and isinstance(job.targets, FullTargets):
                sums[2] += _hidden_part(hidden[part], job.targets.hidden[part], job.weights.hidden, d_hidden, part)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.mark_non_differentiable(sums)
        weights = job.weights
        return weights.kl * sums[0] + weights.ce * sums[1] + weights.hidden * sums[2], sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        return *(None if saved is None else saved * grad for saved in ctx.saved_tensors), None


def _logit_part(hidden: Tensor, part: slice, job: _Job, grad: bool) -> tuple[Tensor | None, Tensor]:
    """One chunk: the gradient with respect to h W' + b [c, V] (None without `grad`), and (kl, ce, 0, correct) [4]."""
    weights, labels = job.weights, job.labels[part, None]  # [c, 1]
    logits = job.head.logits(hidden[part])  # [c, V]
    correct = (logits.argmax(-1, keepdim=True) == labels).sum()
    slope = job.head.slope(logits) if grad else 1.0
    kl, parent = torch.zeros_like(correct, dtype=logits.dtype), None
    if weights.kl and isinstance(job.targets, TopTargets):
        kl, parent, log_sum = _top_kl(logits, job.targets.ids[part].long(), job.targets.log_probs[part], grad)
        log_q = logits.sub_(log_sum)
    else:
        log_q = logits.sub_(logits.logsumexp(-1, keepdim=True))
        if weights.kl and isinstance(job.targets, FullTargets):
            kl, parent = _full_kl(log_q, job.targets.head.logits(job.targets.hidden[part]).to(log_q.dtype))
    ce = -log_q.gather(-1, labels).sum()
    found = torch.stack([kl, ce, torch.zeros_like(ce), correct.to(ce.dtype)])
    if not grad:
        return None, found
    d_logits = log_q.exp_().mul_(weights.kl + weights.ce)
    if parent is not None:
        d_logits.add_(parent, alpha=-weights.kl)
    if weights.ce:
        d_logits.scatter_add_(-1, labels, torch.full_like(labels, -weights.ce, dtype=d_logits.dtype))
    return d_logits.mul_(slope), found


def _full_kl(log_q: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of KL(p || q), p [c, V]) of the parent's `logits` [c, V], which are overwritten."""
    log_p = logits.sub_(logits.logsumexp(-1, keepdim=True))
    p = log_p.exp()
    # The difference is taken before the sum: of two nearly equal distributions little else would be left.
    return torch.linalg.vecdot(p, log_p.sub_(log_q)).sum(), p


def _top_kl(logits: Tensor, ids: Tensor, log_probs: Tensor, grad: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """KL over the k outcomes `ids` [c, k] and their complement.

    Returns:
        Its sum; [c, V]: the parent's probabilities, with the rest's shared out as the student does it, so that
        q minus this is the gradient (None without `grad`); the log of the sum of exp(logits) [c, 1].
    """
    log_p, log_p_rest = _with_rest(log_probs.to(logits.dtype), log_probs.shape[1] == logits.shape[1])
    top = logits.gather(-1, ids)  # [c, k]
    log_sum = top.logsumexp(-1, keepdim=True)
    rest = None
    if log_p_rest is not None:
        # The student's rest is summed up itself: 1 - (sum of the top) would cancel where the rest is small.
        rest = logits.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        logits.scatter_(-1, ids, top)
        log_sum = torch.logaddexp(log_sum, rest)
    p = log_p.exp()
    kl = torch.linalg.vecdot(p, log_p - (top - log_sum)).sum()
    p_rest = None
    if rest is not None and log_p_rest is not None:
        p_rest = log_p_rest.exp()
        kl = kl + (torch.special.xlogy(p_rest, p_rest) - p_rest * (rest - log_sum)).sum()
    if not grad:
        return kl, None, log_sum
    # Of the listed tokens the exponential may overflow: what is there is replaced.
    parent = torch.zeros_like(logits) if rest is None or p_rest is None else logits.sub(rest).exp_().mul_(p_rest)
    return kl, parent.scatter_(-1, ids, p), log_sum


def _with_rest(log_p: Tensor, everything: bool) -> tuple[Tensor, Tensor | None]:
    """log-probabilities [c, k] as a distribution over k + 1 outcomes: they, and the rest's log-probability [c, 1].

    Rounding (float16 in a cache) can make them add up to more than 1: then they are scaled down to it, and the rest
    gets nothing. Where they are of all tokens there is no rest.
    """
    total = log_p.logsumexp(-1, keepdim=True)
    if everything:
        return log_p - total, None
    return log_p - total.clamp(min=0), log1mexp(total.clamp(max=0))


def log1mexp(x: Tensor) -> Tensor:
    """ln(1 - e^x) for x <= 0, to full precision at both ends (Maechler, "Accurately computing log(1 - exp(-|a|))")."""
    return torch.where(x > -0.6931471805599453, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _hidden_part(h: Tensor, g: Tensor, weight: float, d_hidden: Tensor | None, part: slice) -> Tensor:
    """The sum of |h - g|^2 / |g|^2 over a chunk [c, d]; its gradient, times `weight`, is added to `d_hidden[part]`."""
    dtype = _dtype(h)
    g = g.to(dtype)
    square = g.square().sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)  # [c, 1]
    difference = h.to(dtype) - g
    found = (difference.square().sum(-1, keepdim=True) / square).sum()
    if d_hidden is not None:
        d_hidden[part] += difference.mul_(2 * weight / square).to(d_hidden.dtype)
    return found


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _project(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [n, d] times weight [V, d] transposed, in float32 (or float64), without a float32 copy of the weight."""
    dtype = _dtype(hidden)
    if weight.dtype in (torch.float32, torch.float64):
        return hidden.to(weight.dtype).mm(weight.t()).to(dtype)
    if hidden.is_cuda:
        return torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32).to(dtype)
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=dtype)
    size = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], size):
        block = weight[start : start + size].to(dtype)
        torch.mm(hidden.to(dtype), block.t(), out=logits[:, start : start + size])
    return logits
