"""What a card holds while FSDP2 trains an adapter over a packed Llama: `python benchmarks/memory_70b.py [RECIPE] ...`.

A sum, not a measurement: sizes follow from the configuration of the model and the recipe (as `hqqplus estimate` has
them), and everything that exists at any time of a step is counted as if it existed at once. It prints the table that
stands in the comments of `recipes/llama3_70b_1bit.yaml` and `recipes/llama3_70b_2bit.yaml`; a test holds them to it.
In GB (10^9 bytes):

    packed    the linear layers of all blocks, a share of them on each card
    tables    embedding and head, packed; a share
    trained   adapter and gains in float32, with gradient and two moments: 16 bytes a parameter; a share
    gathered  the block that is computed and the one that comes next, whole: packed, and their adapters in float32
    head      the head whole: packed, and in 16 bits for the fused loss
    kept      with checkpointing the input of each block; beside them what one block makes, twice (its gradients)
    loss      logits of a slice of the vocabulary in float32, and their gradient
    reserve   assumed: CUDA, NCCL's buffers, kernels' workspaces, what the allocator cannot use
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from hqqplus.estimation.optimizers import state_bytes
from hqqplus.estimation.parts import backbone_parts, trained_bytes, trained_shapes
from hqqplus.integrations.bare import bare_model
from hqqplus.recipe import Recipe, load_recipe
from hqqplus.recovery.trainables import add_adapter

CARDS = (2, 4, 8)
# Of TRL's fused loss: this much of the vocabulary at a time.
LOSS_VOCABULARY = 32768
RESERVE = 2.0
_GB = 1e9
LLAMA3_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
)


class Estimate(NamedTuple):
    """GB on one card."""

    packed: float
    tables: float
    trained: float
    gathered: float
    head: float
    kept: float
    loss: float
    reserve: float = RESERVE

    @property
    def total(self) -> float:
        return sum(self)


class Block(NamedTuple):
    """Bytes of one block packed, of embedding and head, and of what is trained of a block, its gradients and moments
    included; and how many parameters that are."""

    packed: int
    embedding: int
    head: int
    trained: int
    parameters: int


def one_block(recipe: Recipe, config: Any) -> Block:
    """The sizes of `config` by a model of a single block.

    Raises:
        ValueError: if the recipe trains more than LoRA of one rank and gains, which is not counted here.
    """
    section = recipe.adapter
    if recipe.recovery.scales == "bake" or recipe.recovery.norms or section.budget_mb or section.rank_pattern:
        raise ValueError("counted are LoRA of one rank and gains")
    single = type(config).from_dict({**config.to_dict(), "num_hidden_layers": 1})
    model = bare_model(single, recipe.quantization.plan(), torch.bfloat16)
    parts = backbone_parts(model)
    with torch.device("meta"):
        adapted = add_adapter(model, recipe)
    shapes, weights = trained_shapes(adapted), trained_bytes(adapted)
    trained = 2 * weights + state_bytes(recipe.training["optim"], shapes)
    return Block(parts["linears"] + parts["metadata"], parts["embedding"], parts["head"], trained, weights // 4)


def estimate(recipe: Recipe, config: Any, cards: int) -> Estimate:
    """What one of `cards` cards holds at most.

    Raises:
        ValueError: if the recipe trains what is not counted here, or without checkpointing.
    """
    block, blocks = one_block(recipe, config), config.num_hidden_layers
    if not recipe.training["gradient_checkpointing"]:
        raise ValueError("counted is training with checkpointing")
    weights = 4 * block.parameters
    tokens = recipe.training["per_device_train_batch_size"] * recipe.data.max_length
    key_value = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    # Norm, q, attention, its projection, norm, the block's output; k and v; gate, its activation, up, their product.
    inside = 2 * tokens * (6 * config.hidden_size + 2 * key_value + 4 * config.intermediate_size)
    inputs = 2 * tokens * config.hidden_size
    return Estimate(
        packed=blocks * block.packed / cards / _GB,
        tables=(block.embedding + block.head) / cards / _GB,
        trained=blocks * block.trained / cards / _GB,
        # A gradient is whole too, before it is added up and shared out.
        gathered=(2 * (block.packed + weights) + weights) / _GB,
        head=(block.head + 2 * config.vocab_size * config.hidden_size) / _GB,
        kept=(blocks * inputs + 2 * inside) / _GB,
        loss=2 * 4 * tokens * LOSS_VOCABULARY / _GB,
    )


def table(recipe: Recipe, config: Any) -> list[str]:
    """The estimates as lines of text: a head, then a line for each number of cards."""
    lines = ["cards  " + "  ".join(f"{name:>8}" for name in (*Estimate._fields, "sum"))]
    for cards in CARDS:
        found = estimate(recipe, config, cards)
        lines.append(f"{cards:>5}  " + "  ".join(f"{value:8.2f}" for value in (*found, found.total)))
    return lines


def main() -> None:
    folder = Path(__file__).parents[1] / "recipes"
    given = sys.argv[1:] or [str(folder / f"llama3_70b_{bits}bit.yaml") for bits in (1, 2)]
    for path in given:
        recipe = load_recipe(path)
        block, whole = one_block(recipe, LLAMA3_70B), estimate(recipe, LLAMA3_70B, 1)
        parameters = LLAMA3_70B.num_hidden_layers * block.parameters
        print(f"{Path(path).name}: packed {whole.packed + whole.tables:.1f} GB, {parameters / 1e6:.1f} M trained")
        print("\n".join(table(recipe, LLAMA3_70B)))


if __name__ == "__main__":
    main()
