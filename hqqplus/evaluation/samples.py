"""What the model writes: greedy completions, to be read beside the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hqqplus.errors import UserError
from hqqplus.evaluation.mode import evaluating

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


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
    with evaluating(model), torch.no_grad(), _greedy(model, tokenizer, max_new_tokens) as config:
        for prompt in prompts:
            encoded = tokenizer(prompt, return_tensors="pt")
            input_ids = encoded["input_ids"].to(model.device)  # [1, L]
            if input_ids.shape[1] == 0:
                raise UserError("samples: an empty prompt needs a tokenizer that puts BOS in front; write some text")
            attention_mask = torch.ones_like(input_ids)
            output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
            completions.append(_new_text(tokenizer, output[0].tolist(), input_ids.shape[1]))
    return completions


def _new_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt_length: int) -> str:
    """The text of `ids` after the prompt. SentencePiece drops the space in front of what it decodes, so the prompt is
    decoded along and cut off where that is possible."""
    head = str(tokenizer.decode(ids[:prompt_length], skip_special_tokens=True))
    whole = str(tokenizer.decode(ids, skip_special_tokens=True))
    if whole.startswith(head):
        return whole[len(head) :]
    return str(tokenizer.decode(ids[prompt_length:], skip_special_tokens=True))


@contextmanager
def _greedy(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Iterator[GenerationConfig]:
    """A plain greedy generation config, in the place of the model's own inside the block.

    Passing it to `generate` alone would not do: what it leaves out, `generate` fills from the model's config, and then
    warns of a temperature that greedy search ignores, or of two limits on the length.
    """
    from transformers import GenerationConfig

    # A PEFT model holds its own reference, and hands it to the model inside.
    holders = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    stops = next((own.eos_token_id for _, own in holders if own is not None and own.eos_token_id is not None), None)
    stops = tokenizer.eos_token_id if stops is None else stops
    first_stop = stops[0] if isinstance(stops, list) else stops
    pad = next((token for token in (tokenizer.pad_token_id, first_stop) if token is not None), 0)
    config = GenerationConfig(
        do_sample=False, use_cache=True, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad
    )
    for module, _ in holders:
        module.generation_config = config
    try:
        yield config
    finally:
        for module, own in holders:
            module.generation_config = own
