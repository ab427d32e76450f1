"""What the model writes: greedy completions, to be read beside the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hqqplus.errors import UserError
from hqqplus.evaluation.mode import evaluating
from hqqplus.generation import greedy_config, in_place, new_text
from hqqplus.progress import WorkProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def complete(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The greedy continuation of each prompt, without the prompt and without special tokens.

    One prompt at a time (no padding), tokenized as the tokenizer does by default (BOS included where it adds it).
    Whatever the model's own generation config says of sampling, beams and penalties is set aside, so that parent,
    quantized and recovered model are compared on the same terms; its stop tokens are kept. The model's training flags
    are restored, and nothing random is drawn.

    Raises:
        UserError: a prompt without tokens (empty, and the tokenizer adds no BOS), or `max_new_tokens` below 1.
    """
    if max_new_tokens < 1:
        raise UserError(f"samples: max_new_tokens must be 1 or more, got {max_new_tokens}")
    completions = []
    with (
        evaluating(model),
        torch.no_grad(),
        in_place(model, greedy_config(model, tokenizer, max_new_tokens)) as config,
        WorkProgress(len(prompts), unit="prompts", what="samples") as progress,
    ):
        for prompt in prompts:
            encoded = tokenizer(prompt, return_tensors="pt")
            input_ids = encoded["input_ids"].to(model.device)  # [1, L]
            if input_ids.shape[1] == 0:
                raise UserError("samples: an empty prompt needs a tokenizer that puts BOS in front; write some text")
            attention_mask = torch.ones_like(input_ids)
            output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
            completions.append(new_text(tokenizer, output[0].tolist(), input_ids.shape[1]))
            progress.advance(1)
    return completions
