"""The models of the recipes: their configurations as published, and small ones with all that sets them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A conversation in the manner of ChatML; the templates of the real tokenizers are longer, and differ in the markers.
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A model on the hub.

    Attributes:
        kind: `model_type` of its configuration.
        sizes: what its `config.json` says, as far as the shapes of its tensors depend on it.
        small: what is smaller in the copy that tests train; the rest of `sizes` holds there too.
        traits: of both: what a tensor's shape does not show.
    """

    kind: str
    sizes: Mapping[str, Any]
    small: Mapping[str, Any]
    traits: Mapping[str, Any]

    def config(self, **changes: Any) -> Any:
        """Its configuration in full size."""
        return _config(self.kind, {**self.traits, **self.sizes, **changes})

    def small_config(self, **changes: Any) -> Any:
        """The configuration of its small copy."""
        return _config(self.kind, {**self.traits, **self.sizes, **self.small, **changes})


def _config(kind: str, values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if kind == "gemma3":  # composed of two models
        vision, tied = values.pop("vision"), values["tie_word_embeddings"]
        special = {key: values.pop(key) for key in list(values) if key.endswith("_token_id")}
        more = {"mm_tokens_per_image": 4, "image_token_index": 270, "tie_word_embeddings": tied}
        return AutoConfig.for_model(kind, text_config={**values, **special}, vision_config=vision, **more, **special)
    return AutoConfig.for_model(kind, **values)


def _sizes(width: int, mlp: int, layers: int, heads: int, pairs: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": pairs,
        "vocab_size": vocabulary,
        **more,
    }


def _small(width: int, mlp: int, heads: int, pairs: int, layers: int = 2, **more: Any) -> dict[str, Any]:
    return _sizes(width, mlp, layers, heads, pairs, 272, max_position_embeddings=256, **more)


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _long_rope(pairs: int) -> dict[str, Any]:
    """Phi-4-mini turns three quarters of each head; `pairs` is half of that."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0] * pairs,
        "long_factor": [1.0 + index / 4 for index in range(pairs)],
    }


_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
}
_SMALL_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_LLAMA3 = {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
_OLMO2 = {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
_SMOLLM2 = {"tie_word_embeddings": True}

FAMILIES: dict[str, Family] = {
    "meta-llama/Meta-Llama-3-8B": Family(
        "llama", _sizes(4096, 14336, 32, 32, 8, 128256), _small(32, 112, 4, 1), _LLAMA3
    ),
    "meta-llama/Meta-Llama-3-70B": Family(
        "llama", _sizes(8192, 28672, 80, 64, 8, 128256), _small(64, 112, 8, 1), _LLAMA3
    ),
    "meta-llama/Llama-3.2-1B": Family(
        "llama",
        _sizes(2048, 8192, 16, 32, 8, 128256, head_dim=64),
        _small(48, 80, 6, 2, head_dim=8),
        {"tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE},
    ),
    # Heads are wider than the width shared out between them, and queries and keys have norms.
    "Qwen/Qwen3-0.6B": Family(
        "qwen3",
        _sizes(1024, 3072, 28, 16, 8, 151936, head_dim=128),
        _small(32, 96, 4, 2, head_dim=16),
        {"tie_word_embeddings": True},
    ),
    "Qwen/Qwen3-8B": Family(
        "qwen3",
        _sizes(4096, 12288, 36, 32, 8, 151936, head_dim=128),
        _small(32, 96, 4, 1, head_dim=8),
        {"tie_word_embeddings": False},
    ),
    "mistralai/Mistral-7B-v0.3": Family(
        "mistral",
        _sizes(4096, 14336, 32, 32, 8, 32768),
        _small(48, 112, 6, 2),
        {"tie_word_embeddings": False, "sliding_window": None},
    ),
    # Mixtures: fused experts, and a router each.
    "Qwen/Qwen3-30B-A3B": Family(
        "qwen3_moe",
        _sizes(
            2048,
            6144,
            48,
            32,
            4,
            151936,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        _small(32, 96, 4, 1, head_dim=16, num_experts=12, num_experts_per_tok=2, moe_intermediate_size=40),
        {"tie_word_embeddings": False, "norm_topk_prob": True},
    ),
    "mistralai/Mixtral-8x7B-v0.1": Family(
        "mixtral",
        _sizes(4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2),
        _small(48, 112, 6, 2, num_local_experts=4),
        {"tie_word_embeddings": False, "sliding_window": None},
    ),
    # A scaled and tied embedding, four norms a block, layers that see a window only, a width that 64 does not divide.
    "google/gemma-3-1b-it": Family(
        "gemma3_text",
        _sizes(1152, 6912, 26, 4, 1, 262144, head_dim=256, query_pre_attn_scalar=256, sliding_window=512),
        _small(
            40,
            108,
            4,
            1,
            head_dim=12,
            query_pre_attn_scalar=12,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        {"tie_word_embeddings": True},
    ),
    # The same beside an encoder of images.
    "google/gemma-3-4b-it": Family(
        "gemma3",
        _sizes(2560, 10240, 34, 8, 4, 262208, head_dim=256, sliding_window=1024, vision=_VISION),
        _small(
            40,
            108,
            4,
            2,
            head_dim=12,
            query_pre_attn_scalar=12,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            vision=_SMALL_VISION,
        ),
        {"tie_word_embeddings": True},
    ),
    # Fused projections, a tied head, LongRoPE over a part of each head, a window.
    "microsoft/Phi-4-mini-instruct": Family(
        "phi3",
        _sizes(3072, 8192, 32, 24, 8, 200064, rope_parameters=_long_rope(48), max_position_embeddings=131072),
        _small(48, 80, 6, 2, rope_parameters=_long_rope(3), original_max_position_embeddings=64, sliding_window=192),
        {"tie_word_embeddings": True, "sliding_window": 262144},
    ),
    "HuggingFaceTB/SmolLM2-135M": Family("llama", _sizes(576, 1536, 30, 9, 3, 49152), _small(36, 80, 9, 3), _SMOLLM2),
    "HuggingFaceTB/SmolLM2-360M": Family(
        "llama", _sizes(960, 2560, 32, 15, 5, 49152), _small(60, 80, 15, 5), _SMOLLM2
    ),
    "HuggingFaceTB/SmolLM2-1.7B": Family(
        "llama", _sizes(2048, 8192, 24, 32, 32, 49152), _small(32, 80, 8, 8), _SMOLLM2
    ),
    # Norms behind attention and MLP, and over all heads' queries and keys at once.
    "allenai/OLMo-2-0425-1B": Family("olmo2", _sizes(2048, 8192, 16, 16, 16, 100352), _small(32, 96, 4, 4), _OLMO2),
    "allenai/OLMo-2-1124-7B": Family("olmo2", _sizes(4096, 11008, 32, 32, 32, 100352), _small(32, 86, 4, 4), _OLMO2),
}


def write_small(name: str, folder: Path, dtype: Any = None) -> Path:
    """A small copy of model `name` with random weights and a tokenizer of bytes, saved to `folder`, as the hub has it.

    Args:
        dtype: of its weights; bfloat16 by default, as nearly all of them are published.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from tests.conftest import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[name].small_config(**special), dtype=torch.float32)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                # Norms are made as ones, or zeros, and biases as zeros: as good as absent.
                if parameter.dim() == 1:
                    parameter += torch.randn_like(parameter) * 0.1
                elif key.endswith(("_proj.weight", "_proj")):
                    parameter *= 4  # of what 0.02 makes there is nothing to be seen in the logits
    model.to(dtype or torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
