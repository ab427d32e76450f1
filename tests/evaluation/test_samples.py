"""Greedy completions: what is returned, and what is left as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hqqplus.errors import UserError
from hqqplus.evaluation.samples import complete


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Path]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(random_model("llama"))


@pytest.fixture(scope="module")
def tokenizer(random_model: Callable[..., Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(random_model("llama"))


def by_definition(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """Greedy search without a cache."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], 1)
            if following.item() == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True)


def test_completions_are_greedy_and_without_the_prompt(model: Any, tokenizer: Any) -> None:
    prompts = ["abc", "a longer prompt, of another length"]
    expected = [by_definition(model.eval(), tokenizer, prompt, 9) for prompt in prompts]
    assert complete(model, tokenizer, prompts, 9) == expected
    assert complete(model, tokenizer, [], 9) == []


def test_the_models_own_generation_config_is_set_aside_and_kept(model: Any, tokenizer: Any) -> None:
    """As Llama-3 and Qwen ship it: sampling, penalties, a maximum length."""
    from transformers import GenerationConfig

    expected = complete(model, tokenizer, ["abc"], 9)
    before = model.generation_config
    own = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=2,
        max_length=4096,
        num_beams=3,
        eos_token_id=[tokenizer.eos_token_id],
    )
    model.generation_config = own
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        assert complete(model, tokenizer, ["abc"], 9) == expected
        assert model.generation_config is own
        assert own.temperature == 0.6
    finally:
        logging.getLogger("transformers").removeHandler(handler)
        model.generation_config = before
    assert heard == []


def test_the_models_stop_tokens_are_kept(model: Any, tokenizer: Any) -> None:
    """A token that the greedy search meets, declared a stop: the completion ends before it."""
    prompt = tokenizer("abc", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        first = model(input_ids=prompt).logits[0, -1].argmax().item()
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [first, 2]
    try:
        assert len(complete(model, tokenizer, ["abc"], 9)[0]) <= 1
    finally:
        model.generation_config.eos_token_id = before


def test_it_leaves_no_trace(model: Any, tokenizer: Any) -> None:
    model.train()
    model.model.layers[1].eval()
    flags = {name: part.training for name, part in model.named_modules()}
    state = torch.get_rng_state()
    own = model.generation_config
    complete(model, tokenizer, ["abc"], 3)
    assert {name: part.training for name, part in model.named_modules()} == flags
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError):
        complete(model, tokenizer, ["abc", ""], 3)
    assert {name: part.training for name, part in model.named_modules()} == flags
    assert model.generation_config is own
    model.eval()


def test_an_adapted_model_completes(model: Any, tokenizer: Any) -> None:
    import copy

    peft = pytest.importorskip("peft", exc_type=ImportError)
    expected = complete(model, tokenizer, ["abc"], 5)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    own, inner = adapted.generation_config, adapted.base_model.model.generation_config
    assert complete(adapted, tokenizer, ["abc"], 5) == expected
    assert adapted.generation_config is own
    assert adapted.base_model.model.generation_config is inner


def test_what_cannot_be_completed(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="max_new_tokens must be 1 or more"):
        complete(model, tokenizer, ["abc"], 0)
    with pytest.raises(UserError, match="an empty prompt needs a tokenizer that puts BOS in front"):
        complete(model, tokenizer, [""], 3)


def test_a_space_after_the_prompt_is_kept(shared: Path) -> None:
    """SentencePiece drops a leading space when it decodes; real weights, because random ones write no words."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260K"
    tokenizer, llama = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert complete(llama, tokenizer, ["Lily and", "Once upon a time"], 12) == [
        " Tom were playing in the park.",
        ", there was a little girl named Lily. She",
    ]
