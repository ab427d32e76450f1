"""from_pretrained, save_pretrained and generate with packed layers, on random models of several families and real
ones."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.xglm.modeling_xglm import XGLMScaledWordEmbedding

import hqqplus
from hqqplus import HqqPlusConfig, PackedEmbedding, PackedLinear, QuantSpec, models
from hqqplus.errors import UserError
from hqqplus.modules import bits_per_weight, packed_modules
from tests.families import write_small

IDS = torch.arange(3, 35).view(1, -1)
FAMILIES = [("llama", False), ("llama", True), ("qwen2", True), ("qwen2", False), ("qwen3", True)]
OVERRIDES: list[dict[str, dict[str, Any]]] = [
    {},
    {"lm_head": {"nbits": 8}, "*.down_proj": {"nbits": 4}},
    {"model.embed_tokens": {"nbits": 4, "group_size": 64}},
]


def quantized(folder: Path, **arguments: Any) -> Any:
    config = HqqPlusConfig(**{"nbits": 2, "group_size": 32, **arguments})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


# Fused projections, and norms in other places, once each; tests/test_model_families.py has all that recipes have.
MORE_FAMILIES = [("phi3", True, 8, OVERRIDES[2]), ("olmo2", False, 8, OVERRIDES[1]), ("mistral", False, 16, {})]


@pytest.mark.parametrize(
    ("kind", "tied", "metadata_bits", "overrides"),
    [
        *(
            pytest.param(*family, bits, change, id=f"{family[0]}-{family[1]}-{bits}-{name}")
            for family in FAMILIES
            for bits in (16, 8)
            for name, change in zip(("plain", "head", "embedding"), OVERRIDES, strict=True)
        ),
        *(pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in MORE_FAMILIES),
    ],
)
def test_load_save_reload(
    random_model: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    tied: bool,
    metadata_bits: int,
    overrides: dict[str, Any],
) -> None:
    model = quantized(random_model(kind, tied), overrides=overrides, metadata_bits=metadata_bits)
    assert {m.spec.metadata_bits for m in packed_modules(model).values()} == {metadata_bits}
    assert type(model.model.layers[0].mlp.down_proj) is PackedLinear
    assert model.is_quantized
    head_packed = "lm_head" in overrides or (tied and bool(overrides))
    embedding_packed = "model.embed_tokens" in overrides or (tied and bool(overrides))
    assert isinstance(model.lm_head, PackedLinear) == head_packed
    assert isinstance(model.model.embed_tokens, PackedEmbedding) == embedding_packed
    if "*.down_proj" in overrides:
        assert model.model.layers[1].mlp.down_proj.spec.nbits == 4

    logits = model(IDS).logits
    model.save_pretrained(tmp_path / "packed")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(IDS).logits, logits)
    if tied and head_packed:
        shared = again.model.embed_tokens.packed_parameters()
        assert len(shared) == (4 if metadata_bits == 8 else 3)
        assert all(getattr(again.lm_head, name) is parameter for name, parameter in shared.items())
    again.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("packed", "second"))
    assert first == second


MIXED: dict[str, dict[str, Any]] = {"*.mlp.*": {"metadata_bits": 16}, "lm_head": {"nbits": 8, "metadata_bits": 16}}


@pytest.mark.parametrize("tied", [True, False])
def test_metadata_bits_may_differ_by_module(random_model: Callable[..., Path], tmp_path: Path, tied: bool) -> None:
    model = quantized(random_model("llama", tied), overrides=MIXED)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.blocks is not None
    assert layer.mlp.up_proj.blocks is None
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(IDS).logits, logits)
    assert again.config.quantization_config.plan() == model.config.quantization_config.plan()


@pytest.mark.parametrize("overrides", [*OVERRIDES, MIXED], ids=["plain", "head", "embedding", "mixed"])
def test_in_memory_equals_while_loading(story_model: Path, overrides: dict[str, Any]) -> None:
    model = quantized(story_model, overrides=overrides)
    config = HqqPlusConfig(nbits=2, group_size=32, overrides=overrides)
    other = hqqplus.quantize_model(AutoModelForCausalLM.from_pretrained(story_model), config)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_quantize_model_takes_a_spec_and_any_module() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    hqqplus.quantize_model(model, QuantSpec(4, 8))
    assert [type(m) for m in model] == [PackedLinear, torch.nn.ReLU, PackedLinear]
    assert model(torch.randn(2, 24)).shape == (2, 8)


@pytest.mark.parametrize("metadata_bits", [16, 8])
def test_shards_and_dtype(random_model: Callable[..., Path], tmp_path: Path, metadata_bits: int) -> None:
    model = quantized(random_model("llama"), metadata_bits=metadata_bits)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, module in packed_modules(model).items():
        for key, tensor in module.packed().state().items():
            assert torch.equal(getattr(half.get_submodule(name), key), tensor)
    assert half.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


def test_a_sharded_parent_is_quantized_like_a_whole_one(random_model: Callable[..., Path], tmp_path: Path) -> None:
    whole = random_model("llama")
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(quantized(tmp_path)(IDS).logits, quantized(whole)(IDS).logits)


def test_skips_and_overrides_by_pattern(random_model: Callable[..., Path]) -> None:
    model = quantized(random_model("llama"), modules_to_not_convert=["*.layers.0.*", "o_proj"])
    assert set(packed_modules(model)) == {
        f"model.layers.1.{name}"
        for name in [f"self_attn.{p}_proj" for p in "qkv"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nbits": 5}, "nbits is 5: it must be one of 1, 2, 3, 4, 8"),
        ({"group_size": 12}, "group_size is 12"),
        ({"metadata_bits": 4}, "metadata_bits is 4: it must be 8 or 16"),
        ({"overrides": {"lm_head": {"bits": 8}}}, "override 'lm_head': 'bits' is not one of"),
        ({"overrides": {"lm_head": {"nbits": 7}}}, "override 'lm_head': nbits is 7"),
        ({"group": 64}, "no argument 'group'"),
        ({"modules_to_not_convert": ["*"]}, "no linear layer to quantize"),
        ({"overrides": {"lm_head": {"nbits": 8}, "model.embed_tokens": {"nbits": 4}}}, "share one weight"),
    ],
)
def test_bad_configs_say_what_is_allowed(
    random_model: Callable[..., Path], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message.replace("*", r"\*")):
        quantized(random_model("llama", True), **arguments)


def test_generate_uses_the_packed_layers(story_model: Path) -> None:
    model = quantized(story_model, nbits=8)
    parent = AutoModelForCausalLM.from_pretrained(story_model)
    ids = torch.tensor([[1, 5, 9, 12]])
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert tokens.shape == (1, 12) or tokens[0, -1] == parent.config.eos_token_id
    assert torch.equal(tokens, parent.generate(ids, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("metadata_bits", [16, 8])
def test_dequantize_gives_an_ordinary_model(
    random_model: Callable[..., Path], tmp_path: Path, metadata_bits: int
) -> None:
    model = quantized(random_model("qwen2", True), overrides=OVERRIDES[2], metadata_bits=metadata_bits)
    logits = model(IDS).logits
    plain = model.dequantize()
    assert not packed_modules(plain)
    torch.testing.assert_close(plain(IDS).logits, logits)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(again(IDS).logits, logits)


@pytest.mark.parametrize("lost", ["scale", "W_q", "offset", "blocks"])
def test_a_checkpoint_that_lacks_a_packed_tensor_is_refused(
    random_model: Callable[..., Path], tmp_path: Path, lost: str
) -> None:
    quantized(random_model("llama"), metadata_bits=8).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{lost}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 tensors .* model\.layers\.1\.mlp\.up_proj\.{lost}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_parent_that_lacks_a_weight_is_refused(random_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(random_model("llama"), tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj \(not quantized\)"):
        quantized(tmp_path / "broken")


def test_a_nan_weight_is_named(random_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(random_model("llama"), tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"up_proj|conversion"):
        quantized(tmp_path / "broken")


@pytest.mark.parametrize("metadata_bits", [16, 8])
def test_files_hold_integers_only_for_packed_layers(
    random_model: Callable[..., Path], tmp_path: Path, metadata_bits: int
) -> None:
    model = quantized(random_model("llama"), metadata_bits=metadata_bits)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        packed = {k: tensors.get_tensor(k) for k in tensors.keys() if "_proj" in k}  # noqa: SIM118
    blocks = {"blocks"} if metadata_bits == 8 else set()
    assert {k.rsplit(".", 1)[1] for k in packed} == {"W_q", "scale", "offset"} | blocks
    assert {tensor.dtype for tensor in packed.values()} == {torch.uint8}
    weights = sum(m.in_features * m.out_features for m in packed_modules(model).values())
    assert 8 * sum(tensor.numel() for tensor in packed.values()) / weights == bits_per_weight(model)


@pytest.mark.parametrize("first", ["hqqplus", "transformers"])
def test_import_alone_is_enough_and_light(
    random_model: Callable[..., Path], tmp_path: Path, run_python: Callable[..., Any], first: str
) -> None:
    quantized(random_model("llama")).save_pretrained(tmp_path)
    second = {"hqqplus": "transformers", "transformers": "hqqplus"}[first]
    light = "assert not {'torch', 'transformers', 'peft'} & set(sys.modules);" if first == "hqqplus" else ""
    code = (
        f"import sys, {first}; {light} import {second}; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(tmp_path)!r}); print(type(m.model.layers[0].mlp.up_proj).__name__)"
    )
    assert run_python("-c", code).stdout.strip() == "PackedLinear"


def test_the_order_of_overrides_survives_saving(random_model: Callable[..., Path], tmp_path: Path) -> None:
    # The last pattern that matches wins, and transformers sorts the keys of config.json.
    overrides = {"*.mlp.*": {"nbits": 3}, "*.down_proj": {"nbits": 4}}
    model = quantized(random_model("llama"), overrides=overrides)
    assert model.model.layers[0].mlp.down_proj.spec.nbits == 4
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[0].mlp.down_proj.spec.nbits == 4
    assert again.model.layers[0].mlp.up_proj.spec.nbits == 3
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_embedding_may_scale_its_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    """The head, which shares its table, does not; and what is packed and loaded again scales as the parent does."""
    parent = AutoModelForCausalLM.from_pretrained(write_small("google/gemma-3-1b-it", tmp_path / "16"), dtype=dtype)
    table, rows = parent.lm_head.weight, parent.model.embed_tokens(IDS)
    factor = parent.model.embed_tokens.embed_scale
    assert factor > 1
    parent.save_pretrained(tmp_path / "parent")
    model = quantized(tmp_path / "parent", overrides={"lm_head": {"nbits": 8, "metadata_bits": 16}})
    embedding = model.model.embed_tokens
    assert torch.equal(embedding(IDS), embedding.dequantize()[IDS] * factor.to(dtype))
    assert (embedding(IDS) - rows).norm() < 0.02 * rows.norm()
    assert (model.lm_head.weight - table).norm() < 0.02 * table.norm()
    logits = model(IDS).logits
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(IDS).logits, logits)
    plain = again.dequantize()
    assert type(plain.model.embed_tokens) is type(parent.model.embed_tokens)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(plain(IDS).logits, logits)


def test_a_model_in_16_bits_computes_in_32_as_it_would_if_loaded_so(tmp_path: Path) -> None:
    """The factor of Gemma's embedding is a buffer, rounded where the model is made in 16 bits."""
    parent = write_small("google/gemma-3-1b-it", tmp_path / "parent")
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    while_loading = models.load_causal_lm(str(parent), quantization=HqqPlusConfig(2, 32), **options)
    while_loading.save_pretrained(tmp_path / "packed")
    again = models.load_causal_lm(str(tmp_path / "packed"), **options)
    assert torch.equal(again(IDS).logits, while_loading(IDS).logits)
    factor = again.model.embed_tokens.embed_scale
    assert factor.to(torch.bfloat16) != factor


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_each_gemma_has_a_class_of_its_own(family: str) -> None:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = getattr(module, f"{family.capitalize()}TextScaledWordEmbedding", None)
    if kind is None:
        pytest.skip("this transformers scales outside of the embedding")
    embedding = kind(12, 32, 0, embed_scale=5.7).to(torch.bfloat16)
    packed = PackedEmbedding.from_embedding(embedding, QuantSpec(8, 32))
    difference = packed(IDS % 12) - embedding(IDS % 12)
    assert difference.norm() < 0.02 * embedding(IDS % 12).norm()
    assert type(packed.unpacked(torch.float32)) is kind


def test_an_embedding_that_is_more_than_a_table_is_refused(tmp_path: Path) -> None:
    class Shifted(Gemma3TextScaledWordEmbedding):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids) + 1

    model = AutoModelForCausalLM.from_pretrained(write_small("google/gemma-3-1b-it", tmp_path))
    model.model.embed_tokens.__class__ = Shifted
    with pytest.raises(UserError, match=r"embed_tokens is a Shifted: what it does beside the look-up would be lost"):
        hqqplus.quantize_model(model, HqqPlusConfig(2, 32, overrides={"lm_head": {"nbits": 8}}))
    # Rounded otherwise, and so not the same to the bit.
    with pytest.raises(ValueError, match="XGLMScaledWordEmbedding does more than a packed embedding can"):
        PackedEmbedding.from_embedding(XGLMScaledWordEmbedding(12, 32, 0, embed_scale=5.7), QuantSpec(8, 32))
