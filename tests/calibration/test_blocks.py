"""One block at a time is the whole model, and what is otherwise is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hqqplus import models
from hqqplus.calibration.blocks import Blocks, new_activations
from hqqplus.errors import UserError

# Families that hand their blocks different things: masks and rotations by kind of block (Gemma), positions (GPT-J).
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_inner": 96, "n_positions": 64},
}


def small(kind: str, **changes: Any) -> Any:
    sizes = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = AutoConfig.for_model(kind, **{**sizes, **FAMILIES.get(kind, {}), **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def through(blocks: Blocks, hidden: torch.Tensor, batch_size: int = 3) -> torch.Tensor:
    for index in range(len(blocks.names)):
        with blocks.placed(index):
            blocks.advance(index, hidden, batch_size)
    return hidden


def outputs_of_last(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the last block returns in an ordinary run."""
    seen: list[Any] = []
    last = model.get_submodule(Blocks(model).names[-1])
    handle = last.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("qwen2", "eager"),
        ("gemma3_text", "sdpa"),
        ("gemma3_text", "eager"),
        ("opt", "sdpa"),
        ("gptj", "eager"),  # its blocks return tuples
    ],
)
def test_block_by_block_is_the_whole_model(kind: str, attention: str) -> None:
    model = small(kind, attn_implementation=attention)
    ids = torch.randint(0, 100, (5, 20))
    blocks = Blocks(model)
    hidden = blocks.embed(ids, batch_size=3)
    torch.testing.assert_close(through(blocks, hidden), outputs_of_last(model, ids))


def test_a_real_model_too_and_it_is_left_as_it_was(story_model: Path) -> None:
    model = models.load_causal_lm(str(story_model), device="cpu", dtype=torch.float32)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    ids = torch.randint(0, 500, (3, 40))
    blocks = Blocks(model)
    hidden = through(blocks, blocks.embed(ids, batch_size=2))
    torch.testing.assert_close(hidden, outputs_of_last(model, ids), rtol=1e-4, atol=1e-4)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert [type(module) for module in model.modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_any_batch_can_be_run_afterwards() -> None:
    model = small("gemma3_text", attn_implementation="eager")  # a mask for each sample
    ids = torch.randint(0, 100, (4, 20))
    blocks = Blocks(model)
    hidden = blocks.embed(ids, batch_size=4)
    with blocks.placed(0), torch.no_grad():
        whole = blocks.run(0, hidden)
        torch.testing.assert_close(blocks.run(0, hidden[1:4]), whole[1:4])


def test_other_weights_take_the_place_of_a_blocks_own_and_gradients_reach_them() -> None:
    model = small("llama")
    blocks = Blocks(model)
    hidden = blocks.embed(torch.randint(0, 100, (2, 8)))
    with blocks.placed(0) as block:
        weight = block.get_submodule("mlp.up_proj").weight
        doubled = (2 * weight.detach()).requires_grad_()
        changed = blocks.run(0, hidden, {"mlp.up_proj.weight": doubled})
        changed.square().sum().backward()
        assert doubled.grad is not None
        assert doubled.grad.abs().sum() > 0
        assert weight.grad is None
        with torch.no_grad():
            plain = blocks.run(0, hidden)
            weight.mul_(2)
            torch.testing.assert_close(blocks.run(0, hidden), changed)
        assert not torch.allclose(plain, changed)


def test_activations_can_lie_in_a_file_of_which_nothing_is_left(tmp_path: Path) -> None:
    model, ids = small("llama").bfloat16(), torch.randint(0, 100, (5, 12))
    blocks = Blocks(model)
    in_memory, on_disk = blocks.embed(ids, batch_size=2), blocks.embed(ids, tmp_path / "store", batch_size=2)
    assert on_disk.dtype == torch.bfloat16
    assert torch.equal(through(blocks, in_memory), through(blocks, on_disk))
    assert list((tmp_path / "store").iterdir()) == []


def test_a_full_disk_is_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space|File too large|Invalid argument"):
        new_activations((2**50, 1), torch.bfloat16, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_more_than_a_chain_of_blocks_are_refused() -> None:
    ids = torch.randint(0, 100, (3, 8))
    model = small("llama")
    forward = model.model.forward

    def around(**changes: Callable[..., Any]) -> None:
        """The backbone with its blocks handed something else."""

        def run(input_ids: torch.Tensor, **kwargs: Any) -> Any:
            layers = model.model.layers
            hidden = model.model.embed_tokens(input_ids)
            for index, layer in enumerate(layers):
                hidden = changes["step"](layer, hidden, input_ids, index)
            return hidden

        model.model.forward = run

    cases: list[tuple[Callable[..., Any], str]] = [
        (lambda layer, x, ids, i: layer(x + 1), "does not take just what the one before it returned"),
        (lambda layer, x, ids, i: layer(x, bias=ids.float()), "depend on the tokens"),
        (lambda layer, x, ids, i: layer(x, shared={}), "takes a dict"),
        (lambda layer, x, ids, i: layer(x) if i == 0 else x, "order of their list"),
        (lambda layer, x, ids, i: layer(layer(x)), "does not take just|order of their list"),
    ]
    for step, message in cases:
        around(step=step)
        with pytest.raises(UserError, match=message):
            Blocks(model).embed(ids)
    model.model.forward = forward
    assert Blocks(model).embed(ids).shape == (3, 8, 64)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="no list of blocks"):
        Blocks(nn.Sequential(nn.Linear(8, 8)))


def test_weights_that_are_not_in_memory_are_refused(random_model: Callable[..., Path]) -> None:
    config = AutoConfig.from_pretrained(random_model("llama"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="load it on the CPU"):
        Blocks(model)
