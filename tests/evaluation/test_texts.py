"""`hqqplus.evaluate`: the same figures as its parts give, by name and of a loaded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import hqqplus
from hqqplus.errors import UserError
from hqqplus.evaluation.perplexity import make_windows, perplexity

TEXTS = ["Once upon a time there was a small model.", "It had few bits, and it was happy with them."]


def test_by_name_and_loaded_agree(random_model: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = random_model()
    model, tokenizer = hqqplus.load(folder), AutoTokenizer.from_pretrained(folder)
    windows = make_windows(TEXTS, tokenizer, 16)
    expected = perplexity(model, windows).perplexity
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"body": "{text}"}}\n' for text in TEXTS))
    named = hqqplus.evaluate(folder, tmp_path / "texts.jsonl", text_field="body", max_length=16)
    loaded = hqqplus.evaluate(model, TEXTS, tokenizer=tokenizer, max_length=16)
    assert named.perplexity == loaded.perplexity == expected
    assert (
        named.tokens
        == sum(len(text.encode()) for text in TEXTS) - len(make_windows(TEXTS, tokenizer, 16).input_ids) + 2
    )
    assert (named.kl, named.parent_perplexity, named.agreement) == (None, None, None)


def test_distance_to_the_parent(random_model: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    folder = random_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    same = hqqplus.evaluate(folder, TEXTS, against=folder)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert (same.agreement, same.parent_perplexity) == (1.0, same.perplexity)
    packed = hqqplus.quantize_model(hqqplus.load(folder), hqqplus.QuantSpec(nbits=1, group_size=32))
    apart = hqqplus.evaluate(packed, TEXTS, tokenizer=tokenizer, against=hqqplus.load(folder))
    assert apart.kl is not None
    assert apart.kl > 1e-4
    assert apart.parent_perplexity == same.perplexity


def test_what_does_not_go_together(random_model: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    folder = random_model()
    model, tokenizer = hqqplus.load(folder), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UserError, match="needs its tokenizer"):
        hqqplus.evaluate(model, TEXTS)
    with pytest.raises(UserError, match="a named one has its own"):
        hqqplus.evaluate(folder, TEXTS, tokenizer=tokenizer)
    with pytest.raises(UserError, match="adapter, device goes with the name"):
        hqqplus.evaluate(model, TEXTS, tokenizer=tokenizer, adapter="x", device="cpu")
    with pytest.raises(UserError, match="no file or folder"):
        hqqplus.evaluate(folder, "./nothing.jsonl")
