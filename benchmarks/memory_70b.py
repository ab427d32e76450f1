"""What a card holds while FSDP2 trains an adapter over a packed Llama: `python benchmarks/memory_70b.py [RECIPE] ...`.

A sum, not a measurement: sizes follow from the architecture and the recipe, and everything that exists at any time of
a step is counted as if it existed at once. It prints the table that stands in the comments of
`recipes/llama3_70b_1bit.yaml` and `recipes/llama3_70b_2bit.yaml`; a test holds them to it. In GB (10^9 bytes):

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
from typing import NamedTuple

from hqqplus.recipe import Recipe, load_recipe

CARDS = (2, 4, 8)
# Of TRL's fused loss: this much of the vocabulary at a time.
LOSS_VOCABULARY = 32768
RESERVE = 2.0
_GB = 1e9


class Architecture(NamedTuple):
    """A Llama: width, width of the MLP, blocks, heads, key-value heads, vocabulary."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    key_value_heads: int
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the linear layers of a block, by the names of transformers."""
        key_value = self.hidden // self.heads * self.key_value_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


LLAMA3_70B = Architecture(8192, 28672, 80, 64, 8, 128256)


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


def estimate(recipe: Recipe, model: Architecture, cards: int) -> Estimate:
    """What one of `cards` cards holds at most.

    Raises:
        ValueError: if the recipe trains more than LoRA of one rank and gains, which is not counted here.
    """
    section = recipe.adapter
    if recipe.recovery.scales == "bake" or recipe.recovery.norms or section.budget_mb or section.rank_pattern:
        raise ValueError("counted are LoRA of one rank and gains")
    block = sum(_packed_bytes(recipe, f"model.layers.0.{name}", shape) for name, shape in model.linears.items())
    table = model.vocabulary, model.hidden
    embedding, head = (_packed_bytes(recipe, name, table) for name in ("model.embed_tokens", "lm_head"))
    sides = sum(sum(shape) for shape in model.linears.values())
    trained = sides * (section.r + (recipe.recovery.scales == "gains"))  # parameters of a block
    training = recipe.training
    tokens = training["per_device_train_batch_size"] * recipe.data.max_length
    key_value = model.linears["self_attn.k_proj"][0]
    # Norm, q, attention, its projection, norm, the block's output; k and v; gate, its activation, up, their product.
    inside = 2 * tokens * (6 * model.hidden + 2 * key_value + 4 * model.intermediate)
    inputs = 2 * tokens * model.hidden
    if not training["gradient_checkpointing"]:
        raise ValueError("counted is training with checkpointing")
    return Estimate(
        packed=model.blocks * block / cards / _GB,
        tables=(embedding + head) / cards / _GB,
        trained=16 * model.blocks * trained / cards / _GB,
        # A gradient is whole too, before it is added up and shared out.
        gathered=(2 * (block + 4 * trained) + 4 * trained) / _GB,
        head=(head + 2 * model.vocabulary * model.hidden) / _GB,
        kept=(model.blocks * inputs + 2 * inside) / _GB,
        loss=2 * 4 * tokens * LOSS_VOCABULARY / _GB,
    )


def adapter_parameters(recipe: Recipe, model: Architecture) -> int:
    """LoRA and, where they are trained, gains."""
    sides = sum(sum(shape) for shape in model.linears.values())
    return model.blocks * sides * (recipe.adapter.r + (recipe.recovery.scales == "gains"))


def packed_gb(recipe: Recipe, model: Architecture) -> float:
    """The packed folder."""
    one = estimate(recipe, model, 1)
    return one.packed + one.tables


def table(recipe: Recipe, model: Architecture) -> list[str]:
    """The estimates as lines of text: a head, then a line for each number of cards."""
    lines = ["cards  " + "  ".join(f"{name:>8}" for name in (*Estimate._fields, "sum"))]
    for cards in CARDS:
        found = estimate(recipe, model, cards)
        lines.append(f"{cards:>5}  " + "  ".join(f"{value:8.2f}" for value in (*found, found.total)))
    return lines


def _packed_bytes(recipe: Recipe, name: str, shape: tuple[int, int]) -> float:
    plan = recipe.quantization.plan()
    spec = plan.override_for(name) or (None if name in ("model.embed_tokens", "lm_head") else plan.spec_for(name))
    bits = 16.0 if spec is None else spec.bits_per_weight(*shape)
    return bits / 8 * shape[0] * shape[1]


def main() -> None:
    folder = Path(__file__).parents[1] / "recipes"
    given = sys.argv[1:] or [str(folder / f"llama3_70b_{bits}bit.yaml") for bits in (1, 2)]
    for path in given:
        recipe = load_recipe(path)
        parameters = adapter_parameters(recipe, LLAMA3_70B)
        print(f"{Path(path).name}: packed {packed_gb(recipe, LLAMA3_70B):.1f} GB, {parameters / 1e6:.1f} M trained")
        print("\n".join(table(recipe, LLAMA3_70B)))


if __name__ == "__main__":
    main()
