"""Whether documents that are packed into one sequence see each other: asked of the model itself.

TRL packs documents end to end, without padding and without a mask; position ids that start again are all that tells
one from the next. Most decoders of transformers build their masks from them, under `sdpa` and `eager` as well as under
flash attention. Some do not look at them (ALiBi, state spaces), and would be trained on text that runs through.

The probe needs no list of families:

- another first document must not change the predictions on the second one. How much rounding may change is measured
  as what another second document changes on the first, which a causal model cannot see: mostly nothing at all;
- the second document must be predicted as it is alone, as far as its dtype can tell: else its positions do not start
  again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from hqqplus.errors import UserError
from hqqplus.evaluation.mode import evaluating

# Tokens of the two documents. Different, so that positions that are only shifted are found out.
_FIRST, _SECOND = 24, 17
# So many times what rounding changes is no influence yet. Of the norm of the logits so much may differ from those of
# the document alone, or so many steps of the dtype (a deep model in bfloat16 differs by 1 or 2 % in another shape).
_NOISE, _ALONE, _ALONE_STEPS = 8, 1e-3, 8


def keeps_documents_apart(model: Any, vocabulary: int | None = None) -> bool:
    """Whether packed documents, as TRL hands them over, stay apart in this causal language model (PEFT or not).

    A few forward passes of 41 random tokens, the same each time. The model is put in evaluation mode and then back as
    it was, and no random generator of torch's is touched. False too where the model refuses the input.

    Args:
        vocabulary: token ids are drawn below it; by default the rows of the input embedding.
    """
    if vocabulary is None:
        embedding = model.get_input_embeddings()
        vocabulary = int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    first, other_first, second, other_second = (
        torch.randint(vocabulary, (length,), generator=generator) for length in (_FIRST, _FIRST, _SECOND, _SECOND)
    )
    end = _FIRST
    with evaluating(model), torch.no_grad():
        try:
            packed = _packed_logits(model, first, second)
            seen = _packed_logits(model, other_first, second)[end:] - packed[end:]
            noise = _packed_logits(model, first, other_second)[:end] - packed[:end]
        except (TypeError, ValueError, NotImplementedError, IndexError):
            return False  # no position ids, or no kernel for them: the training would stop in the same way
        alone = model(input_ids=second[None].to(model.device), use_cache=False).logits[0].float()  # [17, V]
    tolerance = max(_ALONE, _ALONE_STEPS * torch.finfo(model.dtype).eps)
    unseen = seen.abs().max() <= _NOISE * noise.abs().max()
    return bool(unseen and (packed[end:] - alone).norm() <= tolerance * alone.norm())


def settle_packing(
    wanted: bool | Literal["auto"],
    model: Any,
    vocabulary: int | None = None,
    say: Callable[[str], None] | None = None,
    where: str = "data.packing",
) -> bool:
    """Whether to pack: as `wanted`, or with "auto" wherever the documents stay apart.

    Args:
        vocabulary: as for `keeps_documents_apart`.
        say: is told why "auto" does not pack.
        where: the option that the user set.

    Raises:
        UserError: if packing is asked for and the model lets documents see each other.
    """
    if wanted is False:
        return False
    if keeps_documents_apart(model, vocabulary):
        return True
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    implementation = getattr(base.config, "_attn_implementation", None) or "none"
    fault = (
        f"documents packed together see each other in {type(base).__name__} (attn_implementation: {implementation})"
    )
    if wanted == "auto":
        if say is not None:
            say(f"{where}: off, because {fault}")
        return False
    raise UserError(
        f"{where}: {fault}: set it to false; sdpa, eager and flash_attention_2 keep them apart, but only in models "
        "that build their masks from position_ids, such as Llama, Mistral, Qwen, Gemma or Phi"
    )


def _packed_logits(model: Any, *documents: Tensor) -> Tensor:
    """Logits [total, V] in float32 of documents [n] in one sequence, with the inputs that TRL's collator makes."""
    lengths = torch.tensor([len(document) for document in documents])
    ends = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).to(torch.int32)]).to(model.device)
    order = torch.arange(len(documents), dtype=torch.int32)
    longest = int(lengths.max())
    output = model(
        input_ids=torch.cat(documents)[None].to(model.device),
        position_ids=torch.cat([torch.arange(len(document)) for document in documents])[None].to(model.device),
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=longest,
        max_length_k=longest,
        seq_idx=torch.repeat_interleave(order, lengths)[None].to(model.device),
        use_cache=False,
    )
    return output.logits[0].float()
