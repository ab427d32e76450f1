"""Perplexity over non-overlapping windows, the same tokens for parent, quantized and recovered model.

    PPL = exp( - sum over windows w, positions t >= 1 of ln p(w[t] | w[:t])  /  number of such t )

The first token of a window is context only. Sums are float64; the logits are turned to float32 a few tokens at a time,
because a float32 copy of all of them ([8, 2048, 128256]) would take 8.4 GB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hqqplus.errors import UserError
from hqqplus.evaluation.mode import evaluating
from hqqplus.progress import WorkProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Logits that are held in float32 at a time: 64 MiB.
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True, eq=False)
class Windows:
    """Token ids to measure on: 1-D int64 tensors of at least two tokens each, on the CPU."""

    input_ids: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """How many tokens are predicted: all but the first of each window."""
        return sum(len(window) - 1 for window in self.input_ids)


@dataclass(frozen=True)
class PerplexityResult:
    """`nll`: mean negative log-likelihood in nats; `perplexity` = exp(nll); `tokens`: how many were predicted."""

    perplexity: float
    nll: float
    tokens: int


def make_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_tokens: int | None = None,
    name: str = "the evaluation set",
    *,
    join: bool = False,
) -> Windows:
    """Each document, BOS in front of it, cut into windows of `max_length` tokens that do not overlap.

    BOS stands there once, also where the text brings its own (chat templates do); a tokenizer without BOS (Qwen) puts
    none. The last, shorter window of a document stays if it has two tokens or more. After `max_tokens` tokens the set
    ends, and later documents are not tokenized; the number of predicted tokens (`Windows.tokens`) is smaller by one
    for each window.

    With `join` the documents are cut as one stream, as the literature does with WikiText: windows then span documents
    (separated by BOS, or by EOS where there is no BOS). Not for models that have never seen one document after
    another: they are surprised at the seams (TinyStories-656K on 120 stories: 16.1 document by document, 35.6 on the
    stream).

    Raises:
        UserError: `max_length` is below 2, or fewer than two tokens are there.
    """
    if max_length < 2:
        raise UserError(f"{name}: max_length must be 2 or more to predict a token, got {max_length}")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    streams: list[list[int]] = [[]]
    count = 0
    for text in texts:
        if max_tokens is not None and count >= max_tokens:
            break
        # verbose=False: a document longer than the model's context is what the windows are for.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            continue
        if not join:
            streams.append([])
        if bos is not None:
            ids = ids if ids[0] == bos else [bos, *ids]
        elif eos is not None and streams[-1]:
            ids = [eos, *ids]
        if max_tokens is not None:
            ids = ids[: max_tokens - count]
        streams[-1] += ids
        count += len(ids)
    cuts = [window for stream in streams for window in torch.tensor(stream, dtype=torch.long).split(max_length)]
    windows = tuple(window for window in cuts if len(window) >= 2)
    if not windows:
        bound = f" within max_tokens={max_tokens}" if max_tokens is not None else ""
        raise UserError(
            f"{name}: nothing to measure: {len(texts)} documents hold {count} tokens{bound}, at least 2 are needed"
        )
    return Windows(windows)


def perplexity(
    model: nn.Module,
    windows: Windows,
    batch_size: int = 8,
    process_index: int = 0,
    num_processes: int = 1,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> PerplexityResult:
    """Perplexity of a causal language model (or a PEFT model around one) on `windows`.

    The model is put in evaluation mode and then back as it was; nothing random is drawn. Windows are batched by length
    and padded on the right, where a causal model cannot look.

    With `num_processes` > 1 each process takes every `num_processes`-th window, and `reduce` (float64 [2] on the
    model's device: summed negative log-likelihood and number of tokens -> their sums over the processes) joins them.
    Every process then calls the model equally often, as a sharded model's collectives need. Without `reduce` the
    result is that of this process's windows.

    Raises:
        ValueError: no windows, a batch size below 1, or a process index out of range.
    """
    if not windows.input_ids:
        raise ValueError("perplexity: there are no windows")
    if batch_size < 1 or not 0 <= process_index < num_processes:
        raise ValueError(
            f"perplexity: batch_size must be 1 or more and process_index in [0, num_processes), "
            f"got batch_size={batch_size}, process_index={process_index}, num_processes={num_processes}"
        )
    shards = [batches_of(windows.input_ids[rank::num_processes], batch_size) for rank in range(num_processes)]
    mine = shards[process_index]
    idle = max(len(shard) for shard in shards) - len(mine)
    device = device_of(model)
    total, count = 0.0, 0
    work = sum(len(window) for batch in mine for window in batch)
    with evaluating(model), torch.no_grad(), WorkProgress(work, unit="tokens", what="perplexity") as progress:
        for batch in mine:
            input_ids = pad_sequence(batch, batch_first=True).to(device)  # [B, L]
            logits = model(input_ids=input_ids, use_cache=False).logits
            # Added up on the CPU: not every device has float64.
            losses = _token_nll(logits, input_ids.to(logits.device)).cpu().double()  # [B, L - 1]
            total += sum(float(losses[row, : len(window) - 1].sum()) for row, window in enumerate(batch))
            count += sum(len(window) - 1 for window in batch)
            progress.advance(sum(map(len, batch)))
        for _ in range(idle):
            model(input_ids=windows.input_ids[0][None].to(device), use_cache=False)
    if reduce is not None:
        sums = reduce(torch.tensor([total, count], dtype=torch.float64, device=device))
        total, count = float(sums[0]), round(float(sums[1]))
    nll = total / count if count else math.nan
    return PerplexityResult(perplexity=finite_exp(nll), nll=nll, tokens=count)


def recovery(ppl_parent: float | None, ppl_before: float | None, ppl_after: float | None) -> float | None:
    """What training won back of the log-perplexity lost to quantization: 1 - ln(after / parent) / ln(before / parent).

    1: as good as the parent; 0: no better than before; above 1: better than the parent; below 0: worse than before.
    None where that says nothing: a value is missing, not finite or not positive, or quantization lost nothing
    (before <= parent).
    """
    if ppl_parent is None or ppl_before is None or ppl_after is None:
        return None
    if not all(math.isfinite(value) and value > 0 for value in (ppl_parent, ppl_before, ppl_after)):
        return None
    # Differences of logarithms: the quotients could overflow or underflow.
    lost = math.log(ppl_before) - math.log(ppl_parent)
    if lost <= 0:
        return None
    return 1 - (math.log(ppl_after) - math.log(ppl_parent)) / lost


def batches_of(windows: Sequence[Tensor], batch_size: int) -> list[list[Tensor]]:
    """The windows by falling length, at most `batch_size` together, so that little is padded."""
    ordered = sorted(windows, key=len, reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _token_nll(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Negative log-likelihood of tokens 1, 2, ...: logits [B, L, V], input_ids [B, L] -> float32 [B, L - 1]."""
    batch, length, vocabulary = logits.shape
    nll = torch.empty(batch, length - 1, dtype=torch.float32, device=logits.device)
    step = max(1, _CHUNK_ELEMENTS // (batch * vocabulary))
    for start in range(0, length - 1, step):
        stop = min(start + step, length - 1)
        rows = logits[:, start:stop].float()  # [B, step, V]
        targets = input_ids[:, start + 1 : stop + 1, None]  # [B, step, 1]
        nll[:, start:stop] = rows.logsumexp(-1) - rows.gather(-1, targets)[..., 0]
    return nll


def device_of(model: nn.Module) -> torch.device:
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device


def finite_exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
