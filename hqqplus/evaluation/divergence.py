"""How far a model's predictions are from its parent's, token by token: what perplexity alone can hide.

    KL = sum over windows w, positions t >= 1 of sum_v p(v) (ln p(v) - ln q(v))  /  number of such t

with p = parent(v | w[:t]) and q = model(v | w[:t]), in nats; and the agreement, the share of these positions at which
both find the same token the most likely. A model that was trained on text like that of the windows can have a better
perplexity than its parent and still be far from it.

Both are measured in one pass, at the positions of `perplexity`, whose two figures come out as well. Logits are turned
to float32 a few tokens at a time and summed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hqqplus.errors import UserError
from hqqplus.evaluation.mode import evaluating
from hqqplus.evaluation.perplexity import PerplexityResult, Windows, batches_of, device_of, finite_exp
from hqqplus.progress import WorkProgress

# Logits of each model that are held in float32 at a time: 32 MiB; a few copies of them are.
_CHUNK_ELEMENTS = 2**23


@dataclass(frozen=True)
class DivergenceResult:
    """`kl`: mean KL(parent || model) in nats; `agreement`: share of equal most likely tokens; `tokens`: of how many.

    `parent` and `model` are the perplexities of the two on the same tokens.
    """

    kl: float
    agreement: float
    tokens: int
    parent: PerplexityResult
    model: PerplexityResult


def divergence(parent: nn.Module, model: nn.Module, windows: Windows, batch_size: int = 8) -> DivergenceResult:
    """KL(parent || model) and next-token agreement of two causal language models on `windows`.

    Both are put in evaluation mode and then back as they were; nothing random is drawn. Windows are batched by length
    and padded on the right, where a causal model cannot look. The two may be on different devices.

    Raises:
        ValueError: no windows, or a batch size below 1.
        UserError: the two have vocabularies of different sizes.
    """
    if not windows.input_ids or batch_size < 1:
        raise ValueError(
            f"divergence: {len(windows.input_ids)} windows, batch_size={batch_size}: 1 or more are needed"
        )
    totals = torch.zeros(4, dtype=torch.float64)  # KL, agreement, negative log-likelihood of parent and of model
    work = sum(map(len, windows.input_ids))
    with (
        evaluating(parent),
        evaluating(model),
        torch.no_grad(),
        WorkProgress(work, unit="tokens", what="distance to the parent") as progress,
    ):
        for batch in batches_of(windows.input_ids, batch_size):
            input_ids = pad_sequence(batch, batch_first=True)  # [B, L]
            lengths = torch.tensor([len(window) for window in batch])
            predicted = torch.arange(1, input_ids.shape[1]) < lengths[:, None]  # [B, L - 1]
            logits = [one(input_ids=input_ids.to(device_of(one)), use_cache=False).logits for one in (parent, model)]
            totals += _sums(logits[0], logits[1], input_ids, predicted)
            progress.advance(sum(map(len, batch)))
    kl, agreement, *nll = (totals / windows.tokens).tolist()
    measured = [PerplexityResult(finite_exp(value), value, windows.tokens) for value in nll]
    return DivergenceResult(kl, agreement, windows.tokens, measured[0], measured[1])


def token_kl(parent: Tensor, model: Tensor) -> Tensor:
    """KL of each position: log-probabilities [..., V] of parent and model -> [...]. What the parent rules out counts
    as nothing, whatever the model says of it."""
    terms = parent.exp().mul_(parent - model)
    return terms.masked_fill_(parent == -torch.inf, 0.0).sum(-1)


def _sums(parent: Tensor, model: Tensor, input_ids: Tensor, predicted: Tensor) -> Tensor:
    """The four sums over the predicted positions of a batch, float64 [4] on the CPU.

    `parent` and `model` are logits [B, L, V], `input_ids` [B, L], `predicted` bool [B, L - 1].
    """
    if parent.shape != model.shape:
        raise UserError(
            f"the parent predicts {parent.shape[-1]} tokens, the model {model.shape[-1]}: they must share a vocabulary"
        )
    batch, length, vocabulary = model.shape
    step = max(1, _CHUNK_ELEMENTS // (batch * vocabulary))
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, length - 1, step):
        stop = min(start + step, length - 1)
        counts = predicted[:, start:stop]  # [B, step]
        p, q = (logits[:, start:stop].to(model.device).float().log_softmax(-1) for logits in (parent, model))
        targets = input_ids[:, start + 1 : stop + 1, None].to(model.device)  # [B, step, 1]
        values = torch.stack(
            [
                token_kl(p, q),
                (p.argmax(-1) == q.argmax(-1)).float(),
                -p.gather(-1, targets)[..., 0],
                -q.gather(-1, targets)[..., 0],
            ]
        )  # [4, B, step]
        # Added up on the CPU: not every device has float64.
        sums += values.cpu().double()[:, counts].sum(-1)
    return sums
