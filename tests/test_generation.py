"""Text from a model: batches are what prompts are alone, pieces make up the whole, stops and settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hqqplus.errors import UserError
from hqqplus.evaluation.samples import complete
from hqqplus.generation import TextPieces, chat_config, continue_batches, new_text, stop_tokens
from hqqplus.integrations import kv_cache
from hqqplus.integrations.kv_cache import quantized_cache
from hqqplus.models import load_with_tokenizer

PROMPTS = ["Return a", "Open the file, read it, and", "x", "The following functions are defined by"]


@pytest.fixture(scope="module")
def embedded() -> Any:
    return load_with_tokenizer("embedded:pydoc")


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2"])
def tiny(request: pytest.FixtureRequest, random_model: Callable[..., Path]) -> Any:
    return load_with_tokenizer(random_model(request.param))


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_batches_are_what_prompts_are_alone(embedded: Any, size: int) -> None:
    model, tokenizer = embedded
    done: list[int] = []
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    found = continue_batches(model, tokenizer, ids, 12, size, advance=done.append)
    assert [continuation.text for continuation in found] == complete(model, tokenizer, PROMPTS, 12)
    assert sum(done) == len(PROMPTS)
    assert len(done) == -(-len(PROMPTS) // size)


def test_batches_of_other_architectures(tiny: Any) -> None:
    model, tokenizer = tiny
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    found = continue_batches(model, tokenizer, ids, 8, 4)
    assert [continuation.text for continuation in found] == complete(model, tokenizer, PROMPTS, 8)


def test_a_stop_ends_its_row_alone(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = embedded
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    free = [
        tokenizer(prompt + text)["input_ids"]
        for prompt, text in zip(PROMPTS, complete(model, tokenizer, PROMPTS, 9), strict=True)
    ]
    stop = free[0][len(ids[0]) + 3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, stop])
    assert stop_tokens(model, tokenizer) == [tokenizer.eos_token_id, stop]
    first, *rest = continue_batches(model, tokenizer, ids, 9, 4)
    assert (first.finish_reason, first.tokens) == ("stop", 1 + free[0][len(ids[0]) :].index(stop))
    assert first.text == new_text(tokenizer, free[0][: len(ids[0]) + first.tokens], len(ids[0]))
    assert {(row.finish_reason, row.tokens == 9) for row in rest} <= {("length", True), ("stop", False)}
    assert ("length", True) in {(row.finish_reason, row.tokens == 9) for row in rest}


def test_no_batch_has_an_empty_prompt(embedded: Any) -> None:
    with pytest.raises(UserError, match="an empty prompt"):
        continue_batches(*embedded, [[1, 2], []], 4)
    assert continue_batches(*embedded, [], 4) == []


# Pieces --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["A naïve café, 日本語 and 🎉🎉.", "  two  spaces\n\n\ttabs", "plain words and more"])
def test_pieces_make_up_the_whole(embedded: Any, tiny: Any, text: str) -> None:
    for _, tokenizer in (embedded, tiny):
        ids = tokenizer("Once: " + text)["input_ids"]
        for start in (1, 4):
            pieces: list[str] = []
            streamer = TextPieces(tokenizer, pieces.append)
            streamer.put(torch.tensor([ids[:start]]))
            for token in ids[start:]:
                streamer.put(torch.tensor([token]))
            streamer.end()
            assert "".join(pieces) == new_text(tokenizer, ids, start)
            assert len(pieces) > 3
            assert not any("\ufffd" in piece for piece in pieces)
            assert streamer.tokens == len(ids) - start


def test_pieces_of_sentencepiece_keep_their_spaces(story_model: Path) -> None:
    model, tokenizer = load_with_tokenizer(story_model)
    pieces: list[str] = []
    streamer = TextPieces(tokenizer, pieces.append)
    ids = torch.tensor([tokenizer("Once upon a")["input_ids"]])
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, streamer=streamer
    )
    assert "".join(pieces) == new_text(tokenizer, streamer.ids, ids.shape[1])
    whole = tokenizer.decode(streamer.ids, skip_special_tokens=True)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) + "".join(pieces) == whole


# Settings ------------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_the_model_says(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = embedded
    assert chat_config(model, tokenizer, 5).do_sample is False
    drawn = chat_config(model, tokenizer, 5, temperature=0.5)
    assert (drawn.do_sample, drawn.temperature, drawn.top_p, drawn.top_k) == (True, 0.5, 1.0, 0)
    assert chat_config(model, tokenizer, 5, top_p=0.5).do_sample is True
    for name, value in (("do_sample", True), ("temperature", 0.6), ("top_p", 0.9), ("top_k", 20)):
        monkeypatch.setattr(model.generation_config, name, value)
    own = chat_config(model, tokenizer, 5)
    assert (own.do_sample, own.temperature, own.top_p, own.top_k) == (True, 0.6, 0.9, 20)
    assert chat_config(model, tokenizer, 5, temperature=0).do_sample is False
    assert chat_config(model, tokenizer, 5, temperature=1.5).top_p == 0.9
    for wrong in ({"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(UserError, match=r"^--(temperature|top-p) is "):
            chat_config(model, tokenizer, 5, **wrong)


# Quantized caches ----------------------------------------------------------------------------------------------------


def test_a_quantized_cache(embedded: Any) -> None:
    pytest.importorskip("hqq")
    model, tokenizer = embedded
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    full = continue_batches(model, tokenizer, ids, 16, 4)
    assert continue_batches(model, tokenizer, ids, 16, 4, cache=quantized_cache(model, 8)) == full
    rough = continue_batches(model, tokenizer, ids, 16, 4, cache=quantized_cache(model, 2))
    assert rough != full  # else it was not quantized
    # Nor does it matter what stands beside a prompt.
    assert continue_batches(model, tokenizer, ids[1:3], 16, cache=quantized_cache(model, 2)) == rough[1:3]


def test_what_cannot_have_a_quantized_cache(
    embedded: Any, random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hqq")
    with pytest.raises(UserError, match=r"^--kv-bits is 3: it must be one of 8, 4, 2$"):
        quantized_cache(embedded[0], 3)
    model, _ = load_with_tokenizer(random_model("gemma2"))
    with pytest.raises(UserError, match=r"^--kv-bits: the cache of gemma2 cannot be quantized: .*sliding_attention"):
        quantized_cache(model, 4)
    monkeypatch.setattr(embedded[0].config, "head_dim", 33)
    with pytest.raises(UserError, match="no group of 8 to 64 values divides its 4 heads of 33"):
        quantized_cache(embedded[0], 4)
    monkeypatch.setattr("transformers.utils.is_hqq_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'hqqplus\[kv\]'"):
        kv_cache.check_kv_bits(4)
