"""KL to the parent and next-token agreement against their definitions, window by window in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqqplus import HqqPlusConfig
from hqqplus.errors import UserError
from hqqplus.evaluation import divergence as module
from hqqplus.evaluation.divergence import divergence, token_kl
from hqqplus.evaluation.perplexity import Windows, make_windows, perplexity


class Table(nn.Module):
    """A causal model without any network: the logits of a token are a row of a table."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows, self.dropout = nn.Parameter(rows), nn.Dropout(0.5)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.dropout(self.rows[input_ids]))


def by_definition(parent: Any, model: Any, windows: Windows) -> tuple[float, float]:
    """(KL, agreement): one window at a time, softmax in float64."""
    total, same, count = 0.0, 0, 0
    for window in windows.input_ids:
        with torch.no_grad():
            p, q = (one(input_ids=window[None], use_cache=False).logits[0, :-1].double() for one in (parent, model))
        for a, b in zip(p.softmax(-1), q.softmax(-1), strict=True):
            total += sum(x * math.log(x / y) for x, y in zip(a.tolist(), b.tolist(), strict=True) if x > 0)
            same += int(a.argmax() == b.argmax())
            count += 1
    return total / count, same / count


@pytest.fixture(scope="module")
def pair(random_model: Callable[..., Path]) -> tuple[Any, Any, Any]:
    folder = random_model("llama")
    options = HqqPlusConfig(nbits=2, group_size=32)
    return (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=options),
        AutoTokenizer.from_pretrained(folder),
    )


def some_windows(*lengths: int) -> Windows:
    generator = torch.Generator().manual_seed(0)
    return Windows(tuple(torch.randint(3, 250, (length,), generator=generator) for length in lengths))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("elements", [1, 2000, 2**23], ids=["a_token", "some_tokens", "all"])
def test_against_the_definition(
    pair: tuple[Any, Any, Any], batch_size: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
    parent, packed, _ = pair
    windows = some_windows(2, 9, 30, 17, 9)
    found = divergence(parent, packed, windows, batch_size)
    kl, agreement = by_definition(parent.eval(), packed.eval(), windows)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert kl > 1e-4
    assert found.agreement == agreement
    assert 0 < agreement < 1
    assert found.tokens == windows.tokens == 62


def test_the_perplexities_are_those_of_perplexity(pair: tuple[Any, Any, Any]) -> None:
    parent, packed, tokenizer = pair
    windows = make_windows(["once upon a time", "there was a model of very few bits"], tokenizer, 12)
    found = divergence(parent, packed, windows, 2)
    for mine, one in ((found.parent, parent), (found.model, packed)):
        assert mine.perplexity == pytest.approx(perplexity(one, windows, 2).perplexity, rel=1e-6)
        assert mine.tokens == windows.tokens
    assert found.parent.perplexity != found.model.perplexity


def test_a_model_is_not_far_from_itself(pair: tuple[Any, Any, Any]) -> None:
    found = divergence(pair[1], pair[1], some_windows(12, 5))
    assert (found.kl, found.agreement) == (0.0, 1.0)


def test_known_values_in_both_directions() -> None:
    """p = (3/4, 1/4), q = (1/4, 3/4) after token 0, equal after token 1."""
    rows = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
    parent, model = Table(rows), Table(torch.stack([rows[0].flip(0), rows[1]]))
    windows = Windows((torch.tensor([0, 0, 1]), torch.tensor([1, 0])))
    found = divergence(parent, model, windows)
    assert found.kl == pytest.approx(2 * 0.5 * math.log(3) / 3, rel=1e-6)
    assert found.agreement == pytest.approx(1 / 3)
    # What the model rules out costs infinitely much, what the parent rules out nothing.
    without = Table(torch.tensor([[3.0, 0.0], [1.0, 1.0]]).log())
    assert divergence(parent, without, windows).kl == math.inf
    assert divergence(without, parent, windows).kl == pytest.approx(2 * math.log(4 / 3) / 3, rel=1e-6)
    assert divergence(without, without, windows).kl == 0


def test_float16_and_large_logits_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    rows = (30 * torch.randn(50, 50)).half()
    parent, model = Table(rows), Table((rows + torch.randn(50, 50)).half())
    windows = Windows((torch.arange(50),))
    kl, _ = by_definition(parent.eval(), model.eval(), windows)
    assert divergence(parent, model, windows).kl == pytest.approx(kl, rel=1e-4)


def test_it_leaves_no_trace(pair: tuple[Any, Any, Any]) -> None:
    parent, packed, _ = pair
    for one in (parent, packed):
        one.train()
        one.model.layers[1].eval()
    flags = [[part.training for part in one.modules()] for one in (parent, packed)]
    state = torch.get_rng_state()
    divergence(parent, packed, some_windows(8))
    assert [[part.training for part in one.modules()] for one in (parent, packed)] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_compared(pair: tuple[Any, Any, Any]) -> None:
    with pytest.raises(UserError, match="the parent predicts 9 tokens, the model 272: they must share a vocabulary"):
        divergence(Table(torch.randn(272, 9)), pair[1], some_windows(8))
    with pytest.raises(ValueError, match="0 windows"):
        divergence(pair[0], pair[1], Windows(()))
    with pytest.raises(ValueError, match="batch_size=0"):
        divergence(pair[0], pair[1], some_windows(8), 0)


def test_kl_of_a_position() -> None:
    p, q = torch.rand(4, 3, 9).log_softmax(-1), torch.rand(4, 3, 9).log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(token_kl(p, q), expected)
    assert (token_kl(p, q) > 0).all()


def test_fewer_bits_are_further_away(story_model: Path, tinystories: Path) -> None:
    """A real model: KL falls and agreement grows with the bits."""
    with open(tinystories / "validation.jsonl", encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"] for _ in range(8)]
    parent, tokenizer = AutoModelForCausalLM.from_pretrained(story_model), AutoTokenizer.from_pretrained(story_model)
    windows = make_windows(texts, tokenizer, 256)
    found = []
    for nbits in (1, 2, 4, 8):
        options = HqqPlusConfig(nbits=nbits, group_size=32)
        packed = AutoModelForCausalLM.from_pretrained(story_model, quantization_config=options)
        found.append(divergence(parent, packed, windows))
    assert [one.kl for one in found] == sorted((one.kl for one in found), reverse=True)
    assert [one.agreement for one in found] == sorted(one.agreement for one in found)
    assert found[0].kl > 2
    assert found[-1].kl < 0.01
    assert found[-1].agreement > 0.95
