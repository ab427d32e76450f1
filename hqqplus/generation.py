"""Writing text with a model: where it stops, how much it can read, answers piece by piece, and prompts in batches.

Greedy batches are padded on the left and masked there, so that a prompt is continued as it would be alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hqqplus.errors import UserError
from hqqplus.evaluation.mode import evaluating

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# How many tokens before the new ones are decoded along: what a token looks like may depend on those in front of it.
_WINDOW = 6
# What a decoder puts where the bytes of a character are not all there yet.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after one prompt."""

    text: str
    tokens: int
    """The stop token counts."""
    finish_reason: str
    """`stop`: the model ended it; `length`: the limit did."""


def stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which an answer ends: those of the model's generation config, and the tokenizer's."""
    owns = [config.eos_token_id for _, config in _holders(model) if config is not None]
    found: list[int] = []
    for own in (*owns, tokenizer.eos_token_id):
        found += own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys(found))


def context_length(model: Any) -> int | None:
    """How many tokens the model reads and writes at most together, by its config; None where it does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _holders(model: Any) -> list[tuple[Any, Any]]:
    """The modules with a generation config. A PEFT model holds its own reference, and hands it to the model inside."""
    return [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]


@contextmanager
def in_place(model: Any, config: GenerationConfig) -> Iterator[GenerationConfig]:
    """`config` in the place of the model's own generation config inside the block.

    Passing it to `generate` alone would not do: what it leaves out, `generate` fills from the model's config, and then
    warns of a temperature that greedy search ignores, or of two limits on the length.
    """
    holders = _holders(model)
    for module, _ in holders:
        module.generation_config = config
    try:
        yield config
    finally:
        for module, own in holders:
            module.generation_config = own


def greedy_config(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy search. Of the model's own settings only the stop tokens are kept; without any, the tokenizer's."""
    from transformers import GenerationConfig

    owns = (config.eos_token_id for _, config in _holders(model) if config is not None)
    stops = next((own for own in owns if own is not None), tokenizer.eos_token_id)
    return GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=_padding(tokenizer, stops),
    )


def chat_config(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float | None = None,
) -> GenerationConfig:
    """How a chat is answered: as the model's own generation config says, else greedily.

    Args:
        temperature: instead of the model's own; 0 is greedy search.
        top_p: instead of the model's own; samples also where the model's own config would not.

    Raises:
        UserError: for a temperature below 0, or a `top_p` that is not above 0 and at most 1.
    """
    from transformers import GenerationConfig

    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature is {temperature}: it must be 0 (greedy) or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p}: it must be above 0 and at most 1")
    own = next((config for _, config in _holders(model) if config is not None), None) or GenerationConfig()
    samples = bool(own.do_sample)
    stops = stop_tokens(model, tokenizer)
    settings: dict[str, Any] = {
        "use_cache": True,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stops or None,
        "pad_token_id": _padding(tokenizer, stops),
        "repetition_penalty": own.repetition_penalty,
    }
    if temperature == 0 or (temperature is None and top_p is None and not samples):
        return GenerationConfig(do_sample=False, **settings)
    # Where the model's own config does not sample, what it holds of sampling was not chosen by anybody.
    return GenerationConfig(
        do_sample=True,
        temperature=temperature if temperature is not None else (own.temperature if samples else None) or 1.0,
        top_p=top_p if top_p is not None else (own.top_p if samples else None) or 1.0,
        top_k=(own.top_k if samples else None) or 0,
        min_p=own.min_p if samples else None,
        **settings,
    )


def _padding(tokenizer: PreTrainedTokenizerBase, stops: int | list[int] | None) -> int:
    first_stop = (stops[0] if stops else None) if isinstance(stops, list) else stops
    return next((token for token in (tokenizer.pad_token_id, first_stop) if token is not None), 0)


def new_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt_length: int) -> str:
    """The text of `ids` after the prompt. SentencePiece drops the space in front of what it decodes, so the prompt is
    decoded along and cut off where that is possible."""
    head = str(tokenizer.decode(ids[:prompt_length], skip_special_tokens=True))
    whole = str(tokenizer.decode(ids, skip_special_tokens=True))
    if whole.startswith(head):
        return whole[len(head) :]
    return str(tokenizer.decode(ids[prompt_length:], skip_special_tokens=True))


class TextPieces:
    """A streamer for `generate`: hands text on as soon as no later token can change it.

    Args:
        write: takes each piece; what it raises ends the generation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self.ids: list[int] = []
        """Prompt and answer."""
        self.prompt_length = 0
        self.first_at: float | None = None
        self.last_at: float | None = None
        self._from = self._shown = 0

    @property
    def tokens(self) -> int:
        """How many were written."""
        return len(self.ids) - self.prompt_length

    def put(self, value: torch.Tensor) -> None:
        """First the prompt `[1, L]`, then a token at a time."""
        new = value.reshape(-1).tolist()
        if not self.ids:
            self.ids, self.prompt_length = new, len(new)
            self._from, self._shown = max(0, len(new) - _WINDOW), len(new)
            return
        self.ids += new
        self.last_at = time.perf_counter()
        if self.first_at is None:
            self.first_at = self.last_at
        self._flush()

    def end(self) -> None:
        """What was held back comes out."""
        self._flush(whatever=True)

    def _flush(self, whatever: bool = False) -> None:
        before = str(self._tokenizer.decode(self.ids[self._from : self._shown], skip_special_tokens=True))
        text = str(self._tokenizer.decode(self.ids[self._from :], skip_special_tokens=True))
        if len(text) <= len(before) or (text.endswith(_INCOMPLETE) and not whatever):
            return
        self._from, self._shown = self._shown, len(self.ids)
        self._write(text[len(before) :])


def continue_batches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 1,
    cache: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] = lambda prompts: None,
) -> list[Continuation]:
    """The greedy continuation of each of the `prompts`, which are token ids, in their order.

    The longest prompts come first: where memory does not do, it does not do at once.

    Args:
        cache: further settings of the generation config, those of a quantized cache.
        advance: told how many prompts were continued, after each batch.

    Raises:
        UserError: a prompt without tokens.
    """
    if not all(prompts):
        raise UserError("generate: an empty prompt needs a tokenizer that puts BOS in front; write some text")
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found: dict[int, Continuation] = {}
    config = greedy_config(model, tokenizer, max_new_tokens)
    config.update(**(cache or {}))
    stops = config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [] if stops is None else [stops])
    with evaluating(model), torch.no_grad(), in_place(model, config):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = max(len(prompts[row]) for row in rows)
            ids = torch.full((len(rows), width), config.pad_token_id)
            mask = torch.zeros_like(ids)
            for line, row in enumerate(rows):
                length = len(prompts[row])
                ids[line, width - length :] = torch.tensor(list(prompts[row]))
                mask[line, width - length :] = 1
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
            )
            for row, written in zip(rows, output[:, width:].tolist(), strict=True):
                end = next((index for index, token in enumerate(written) if token in stops), None)
                written = written if end is None else written[: end + 1]
                text = new_text(tokenizer, [*prompts[row], *written], len(prompts[row]))
                found[row] = Continuation(text, len(written), "length" if end is None else "stop")
            advance(len(rows))
    return [found[index] for index in range(len(prompts))]
