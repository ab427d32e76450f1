"""The keys and values that transformers keeps of the tokens read: in few bits, or kept from one answer to the next."""

from __future__ import annotations

import math
from typing import Any

from hqqplus.errors import UserError

KV_BITS = (8, 4, 2)
_GROUPS = (64, 32, 16, 8)


def check_kv_bits(bits: int) -> None:
    """Refuse, before a model is loaded, what no model can have.

    Raises:
        UserError: for other numbers of bits than 8, 4 and 2, or if hqq is not installed.
    """
    from transformers.utils import is_hqq_available

    if bits not in KV_BITS:
        raise UserError(f"--kv-bits is {bits}: it must be one of {', '.join(map(str, KV_BITS))}")
    if not is_hqq_available():
        raise UserError("--kv-bits needs the package hqq: pip install 'hqqplus[kv]'")


def quantized_cache(model: Any, bits: int) -> dict[str, Any]:
    """Settings of the generation config for a cache of `bits` bits: transformers' own, with hqq's quantizer.

    Groups lie within the head of one token (axis 1), so that what is kept of a prompt does not depend on the others in
    its batch, nor on its padding. The last 128 tokens stay in full precision. It works on a GPU and on a CPU.

    Raises:
        UserError: if hqq is not installed, or transformers cannot quantize the cache of this model.
    """
    from transformers.cache_utils import QuantizedCache

    check_kv_bits(bits)
    config = model.config.get_text_config()
    name = config.model_type
    # A state that is no list of keys and values: recurrent and convolutional models.
    plain = getattr(_inner(model), "_supports_default_dynamic_cache", None)
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if others or (plain is not None and not plain()):
        kinds = f"layers of {', '.join(others)}" if others else "a state of its own kind"
        raise UserError(f"--kv-bits: the cache of {name} cannot be quantized: it has {kinds}, not just full attention")
    options = {"nbits": bits, "axis_key": 1, "axis_value": 1, "q_group_size": _group_size(config, bits)}
    try:
        QuantizedCache(backend="hqq", config=config, **options)
    except (ValueError, ImportError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"--kv-bits: the cache of {name} cannot be quantized: {said}") from error
    return {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", **options}}


def _group_size(config: Any, bits: int) -> int:
    """The largest group that divides a head, and leaves a whole number of bytes for every token."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Some models have keys and values of different widths.
    widths = [width, *(getattr(config, name, None) or 0 for name in ("qk_head_dim", "v_head_dim"))]
    width = math.gcd(*widths)
    heads = getattr(config, "num_key_value_heads", None) or heads
    for group in _GROUPS:
        if width % group == 0 and (heads * width // group) % (8 // bits) == 0:
            return group
    raise UserError(
        f"--kv-bits: the cache of {config.model_type} cannot be quantized: no group of 8 to 64 values divides its "
        f"{heads} heads of {width}"
    )


def _inner(model: Any) -> Any:
    """The transformers model within a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def can_be_cut(cache: Any) -> bool:
    """Whether `cut` leaves what reading fewer tokens would have left: full attention in full precision, all of it."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def cut(cache: Any, length: int) -> None:
    """Forget all tokens but the first `length` of a cache that can be cut."""
    surplus = cache.get_seq_length() - length
    if surplus > 0:
        cache.crop(-surplus)
