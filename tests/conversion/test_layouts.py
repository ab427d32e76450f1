"""Every layout against its own formula, in float64."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hqqplus.conversion.convert import _fitted, _plan
from hqqplus.conversion.exact import packed_tensor
from hqqplus.errors import UserError
from hqqplus.quantization import QuantSpec, quantize
from hqqplus.shards import read_header
from tests.conversion import published as make
from tests.conversion.published import Published, publish
from tests.conversion.test_exact import in_float64

OFFLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = OFFLINE | {"quantization_mode": "online"}

DIVIDED: Any = (make.bitnet(True), {"quant_method": "bitnet"})

# name -> (packer, quantization_config)
EXACT: dict[str, Any] = {
    "2 bits": (make.gptq(2, 32), make.gptq_config(2, 32)),
    "2 bits, v2": (make.gptq(2, 32, 2, lowest_zero=0), make.gptq_config(2, 32, 2)),
    "2 bits, a zero of 0 in v1": (make.gptq(2, 16, 1, lowest_zero=0), make.gptq_config(2, 16)),
    "2 bits, rows": (make.gptq(2, -1), make.gptq_config(2, -1)),
    "2 bits, a group over the edge": (make.gptq(2, 40), make.gptq_config(2, 40)),
    "2 bits, bfloat16": (make.gptq(2, 32, dtype=torch.bfloat16), make.gptq_config(2, 32)),
    "1 bit": (make.gptq(1, 32, 2, lowest_zero=0), make.gptq_config(1, 32, 2)),
    "3 bits, v2": (make.gptq(3, 32, 2, lowest_zero=0), make.gptq_config(3, 32, 2)),
    "4 bits, symmetric": (make.gptq(4, 32, symmetric=True), make.gptq_config(4, 32)),
    "8 bits, symmetric": (make.gptq(8, 32, symmetric=True), make.gptq_config(8, 32)),
    "ternary": (make.bitnet(False), OFFLINE),
    "MLX, binary": (make.mlx(1, 32, binary=True), {"group_size": 32, "bits": 1}),
    "MLX, 2 bits": (make.mlx(2, 32), {"group_size": 32, "bits": 2, "mode": "affine"}),
    "MLX, 3 bits": (make.mlx(3, 32), {"group_size": 32, "bits": 3}),
    "MLX, 4 bits": (make.mlx(4, 16), {"group_size": 16, "bits": 4}),
    "signs": (make.signs(32), {"quant_method": "binary", "group_size": 32}),
    "signs of rows": (make.signs(-1), {"quant_method": "binary", "group_size": -1}),
    "signs and zeros": (make.signs(32, zeros=True), {"quant_method": "binary", "bits": 2, "group_size": 32}),
    "bits of bytes": (make.signs(32, "uint8"), {"quant_method": "binary", "group_size": 32}),
    "bits of words": (make.signs(32, "int32"), {"quant_method": "binary", "group_size": 32}),
    "sign bits, big end first": (
        make.signs(32, "uint8", "big", 0),
        {"quant_method": "binary", "group_size": 32, "bit_order": "big", "positive_bit": 0},
    ),
}


def converted(source: Published) -> tuple[dict[str, Tensor], Any]:
    """Module name -> the matrix that our format stores, in float64; and the plan."""
    headers = {"model.safetensors": read_header(source.folder / "model.safetensors")}
    plan = _plan(source.folder, headers, False)
    layout = plan.layout
    found = {
        layer: in_float64(packed_tensor(layout.codes(layer), _fitted(layout, layer), spec))
        for layer, spec in layout.specs.items()
    }
    return found, plan


@pytest.fixture(scope="module")
def published(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Published]:
    """`published((pack, settings), folder)`: the checkpoint, made once a kind, again in a folder of its own."""
    kept: dict[int, Published] = {}

    def make_one(case: Any, folder: Path) -> Published:
        if id(case[0]) not in kept:
            kept[id(case[0])] = publish(random_model("llama"), tmp_path_factory.mktemp("source"), *case)
        one = kept[id(case[0])]
        shutil.copytree(one.folder, folder, dirs_exist_ok=True)
        return Published(folder, dict(one.weights), dict(one.tensors), copy.deepcopy(one.config))

    return make_one


@pytest.mark.parametrize("name", EXACT)
def test_exact(published: Callable[..., Published], tmp_path: Path, name: str) -> None:
    source = published(EXACT[name], tmp_path)
    found, plan = converted(source)
    assert found.keys() == source.weights.keys()
    for layer, weight in source.weights.items():
        assert torch.equal(found[layer], weight), layer
    assert set(plan.losses.values()) == {0.0}


@pytest.mark.parametrize(
    ("pack", "settings", "most"),
    [
        (make.gptq(4, 32), make.gptq_config(4, 32), 2**-11),
        (make.gptq(8, 32), make.gptq_config(8, 32), 2**-10),
        (*DIVIDED, 2**-11),
        (make.gptq(2, 32, dtype=torch.float32), make.gptq_config(2, 32), 2**-11),
    ],
    ids=["4 bits", "8 bits", "one over a ternary scale", "32-bit scales"],
)
def test_within_what_16_bits_hold(
    random_model: Callable[..., Path], tmp_path: Path, pack: Any, settings: dict[str, Any], most: float
) -> None:
    source = publish(random_model("llama"), tmp_path, pack, settings)
    found, plan = converted(source)
    for layer, weight in source.weights.items():
        error = (found[layer] - weight).abs().max()
        assert 0 < error <= plan.losses[layer] * weight.abs().max() * 1.001
    assert max(plan.losses.values()) <= most


def test_groups_that_are_too_large_are_cut(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """Our groups have 256 weights at most; one of 512 becomes two with the same scale."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(random_model("llama"))
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 1024, 1
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    source = publish(
        tmp_path / "wide",
        tmp_path / "source",
        make.gptq(2, 512),
        make.gptq_config(2, 512),
        only=lambda name: name.endswith("down_proj"),
    )
    found, plan = converted(source)
    (spec,) = plan.layout.specs.values()
    assert spec.group_size == 256
    for layer, weight in source.weights.items():
        assert torch.equal(found[layer], weight)


def test_ternary_as_transformers_unpacks_it(published: Callable[..., Published], tmp_path: Path) -> None:
    from transformers.integrations.bitnet import unpack_weights

    unpack = getattr(unpack_weights, "_torchdynamo_orig_callable", unpack_weights)  # without its compiler
    source = published(EXACT["ternary"], tmp_path)
    found, _ = converted(source)
    for layer in source.weights:
        weight = unpack(source.tensors[f"{layer}.weight"], torch.float64)
        assert torch.equal(found[layer], weight * source.tensors[f"{layer}.weight_scale"].double())


def test_ternary_as_transformers_multiplies_it(published: Callable[..., Published], tmp_path: Path) -> None:
    """Its default layers divide by their scale, which is the inverse of a weight's size."""
    from transformers.integrations.bitnet import ActQuant, BitLinear

    source = published(DIVIDED, tmp_path)
    found, _ = converted(source)
    layer: Any = BitLinear(64, 96, bias=False, dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj"
    layer.weight, layer.weight_scale = (source.tensors[f"{name}.{key}"] for key in ("weight", "weight_scale"))
    x = torch.randn(5, 64)
    with torch.compiler.set_stance("force_eager"):
        theirs, rounded = layer(x), ActQuant.apply(x)
    torch.testing.assert_close(rounded @ found[name].float().t(), theirs, rtol=1e-3, atol=1e-4)


def test_a_binary_model_in_16_bits_needs_no_converter() -> None:
    """Two values a group are what the solver finds at 1 bit: such models, published unpacked, go to `quantize`."""
    scale = make.scales((24, 2), torch.Generator().manual_seed(0))
    weight = torch.randn(24, 256).sign() * scale.repeat_interleave(128, 1)
    packed = quantize(weight, QuantSpec(1, 128, 1, "float16", 16))
    assert torch.equal(in_float64(packed), weight.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ternary_that_is_rounded_while_it_runs(
    random_model: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    from transformers.integrations.bitnet import WeightQuant

    rounded = getattr(WeightQuant.forward, "_torchdynamo_orig_callable", WeightQuant.forward)
    source = publish(random_model("llama"), tmp_path, make.gptq(2, 32), ONLINE, dtype, only=lambda name: False)
    found, _ = converted(source)
    assert len(found) == 14
    for layer, weight in found.items():
        assert torch.equal(weight, rounded(None, source.tensors[f"{layer}.weight"]).double()), layer


def test_ternary_one_number_each(random_model: Callable[..., Path], tmp_path: Path) -> None:
    source = publish(random_model("llama"), tmp_path, make.signs(-1, zeros=True), OFFLINE)
    for layer in source.weights:
        scale = source.tensors[f"{layer}.weight_scale"][:1, 0]
        source.tensors[f"{layer}.weight_scale"] = scale
        source.weights[layer] = source.tensors[f"{layer}.weight"].double() * scale.double()
    found, _ = converted(source.write())
    for layer, weight in source.weights.items():
        assert torch.equal(found[layer], weight)


def test_layers_may_differ_where_it_is_said(random_model: Callable[..., Path], tmp_path: Path) -> None:
    packers = {"down_proj": make.gptq(4, 32, symmetric=True), "up_proj": make.gptq(2, 16)}
    usual = make.gptq(2, 32)

    def pack(name: str, shape: tuple[int, int]) -> Any:
        return packers.get(name.rpartition(".")[2], usual)(name, shape)

    settings = make.gptq_config(2, 32)
    parent = random_model("llama")
    said = settings | {"dynamic": {"whatever": {}}}
    source = publish(parent, tmp_path, pack, said, only=lambda name: "q_proj" not in name and "proj" in name)
    found, plan = converted(source)
    for layer, weight in source.weights.items():
        assert torch.equal(found[layer], weight)
    specs = plan.skeleton.specs
    assert {spec.nbits for name, spec in specs.items() if "down_proj" in name} == {4}
    assert {spec.group_size for name, spec in specs.items() if "up_proj" in name} == {16}
    assert not any("q_proj" in name for name in specs)
    source.config["quantization_config"] = settings
    source.write()
    with pytest.raises(UserError, match=r"model.safetensors: .*up_proj.scales: \d+ groups for 64 inputs|for 2 bits"):
        converted(source)


# What is refused -----------------------------------------------------------------------------------------------------

FIRST = "model.layers.0.self_attn.q_proj"


def damaged(name: str, tensor: Callable[[Tensor], Tensor] | None) -> Callable[[Published], None]:
    """The tensor of the first layer changed, or gone."""

    def damage(source: Published) -> None:
        key = f"{FIRST}.{name}"
        if tensor is None:
            del source.tensors[key]
        else:
            source.tensors[key] = tensor(source.tensors[key])

    return damage


def settings(**changes: Any) -> Callable[[Published], None]:
    return lambda source: source.config["quantization_config"].update(changes)


GPTQ, TERNARY, SIGNS, MLX = EXACT["2 bits"], EXACT["ternary"], EXACT["signs"], EXACT["MLX, binary"]
REFUSED: dict[str, Any] = {
    "truncated qweight": (
        GPTQ,
        damaged("qweight", lambda t: t[:-1]),
        r"q_proj\.qweight: it is int32 \[3, 64\].*\[4, 64\] is needed for 2 bits",
    ),
    "wrong bits": (
        GPTQ,
        settings(bits=4),
        r"down_proj\.qweight: it is int32 \[6, 64\], int32 \[12, 64\] is needed for 4 bits",
    ),
    "bits that nobody has": (GPTQ, settings(bits=5), "bits is 5: 1, 2, 3, 4, 8 can be read"),
    "bits that are none": (GPTQ, settings(bits="2"), "bits is '2': a whole number is needed"),
    "another group size": (
        GPTQ,
        settings(group_size=16),
        r"down_proj\.scales: 3 groups for 96 inputs, and .* group_size 16",
    ),
    "a group of none": (GPTQ, settings(group_size=0), r"down_proj\.scales: 3 groups for 96 inputs"),
    "mixed group sizes": (
        GPTQ,
        damaged("scales", lambda t: t.repeat(2, 1)),
        r"q_proj\.scales: 4 groups for 64 inputs",
    ),
    "no scales": (GPTQ, damaged("scales", None), r"q_proj\.qweight: there is no .*q_proj\.scales with it"),
    "no zeros": (GPTQ, damaged("qzeros", None), r"there is no .*q_proj\.qzeros"),
    "short zeros": (GPTQ, damaged("qzeros", lambda t: t[:, :2]), r"q_proj\.qzeros: it is int32 \[2, 2\]"),
    "scales of no number": (GPTQ, damaged("scales", lambda t: t * float("nan")), r"q_proj\.\w+: it holds NaN"),
    "desc_act": (GPTQ, damaged("g_idx", lambda t: t.flip(0)), r"q_proj\.g_idx: .*desc_act.*consecutive inputs"),
    "a short order": (GPTQ, damaged("g_idx", lambda t: t[:9]), r"q_proj\.g_idx: it is int32 \[9\]"),
    "another format of theirs": (
        GPTQ,
        settings(checkpoint_format="marlin"),
        "checkpoint_format is 'marlin': .* gptq_v2 can be read",
    ),
    "a method that is not known": (
        GPTQ,
        settings(quant_method="awq"),
        r"quant_method is 'awq': what can be read is GPTQ .*BitNet .*MLX",
    ),
    "nothing packed": (
        GPTQ,
        lambda s: s.config.pop("quantization_config"),
        r"has .*qweight, but no quantization_config",
    ),
    "3 bits in version 1": (
        (make.gptq(3, 32), make.gptq_config(3, 32)),
        lambda s: None,
        r"qzeros: zero points of 3 bits in version 1",
    ),
    "a bias that counts": (
        GPTQ,
        lambda s: s.tensors.update({f"{FIRST}.bias": torch.ones(64)}),
        r"q_proj\.bias: .*no such tensor|loaded as",
    ),
    "a layer that the model has not": (
        GPTQ,
        lambda s: s.tensors.update({"model.layers.7.up.qweight": torch.zeros(4, 8, dtype=torch.int32)}),
        r"up\.qweight: .*has no layer",
    ),
    "a missing norm": (GPTQ, lambda s: s.tensors.pop("model.norm.weight"), r"lacks model\.norm\.weight"),
    "an infinite scale": (
        TERNARY,
        damaged("weight_scale", lambda t: t / 0),
        r"weight_scale: it is inf: a positive number",
    ),
    "short ternary": (
        TERNARY,
        damaged("weight", lambda t: t[:-1]),
        r"q_proj\.weight: it is uint8 \[15, 64\], uint8 \[16, 64\]",
    ),
    "a norm in each layer": (TERNARY, settings(use_rms_norm=True), "use_rms_norm is true"),
    "a linear class": (TERNARY, settings(linear_class="x"), "linear_class is 'x': bitlinear or autobitlinear"),
    "another mode": (MLX, settings(mode="mxfp4"), "mode is 'mxfp4': affine can be read"),
    "no biases": (MLX, damaged("biases", None), r"q_proj\.scales: there is no .*biases"),
    "OneBit": (
        SIGNS,
        lambda s: s.tensors.update({f"{FIRST}.input_factor": torch.ones(64)}),
        r"input_factor: .*OneBit",
    ),
    "no scale of signs": (
        SIGNS,
        damaged("weight_scale", lambda t: t[:, :1]),
        r"weight_scale: it is float16 \[64, 1\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(published: Callable[..., Published], tmp_path: Path, name: str) -> None:
    case, damage, message = REFUSED[name]
    source = published(case, tmp_path)
    damage(source)
    source.write()
    with pytest.raises(UserError, match=message) as caught:
        converted(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "value", "message"),
    [
        (TERNARY, 255, r"model\.safetensors: .*q_proj\.weight: it holds the code 3"),
        (SIGNS, 2, r"model\.safetensors: .*q_proj\.weight: it holds other numbers than -1 and 1"),
    ],
    ids=["ternary", "signs"],
)
def test_codes_that_stand_for_nothing(
    published: Callable[..., Published], tmp_path: Path, case: Any, value: int, message: str
) -> None:
    source = published(case, tmp_path)
    source.tensors[f"{FIRST}.weight"] = source.tensors[f"{FIRST}.weight"].clone()
    source.tensors[f"{FIRST}.weight"][3, 5] = value
    with pytest.raises(UserError, match=message):
        converted(source.write())


def test_settings_beside_the_configuration(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """AutoGPTQ's older checkpoints, with biases of zeros."""
    source = publish(random_model("llama"), tmp_path, make.gptq(2, 32), None)
    source.tensors.update({f"{layer}.bias": torch.zeros(w.shape[0]) for layer, w in source.weights.items()})
    source.write()
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 2, "group_size": 32, "desc_act": False}))
    found, _ = converted(source)
    assert all(torch.equal(found[layer], weight) for layer, weight in source.weights.items())


def test_two_tensors_of_one_name(published: Callable[..., Published], tmp_path: Path) -> None:
    source = published(GPTQ, tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "again.safetensors")
    headers = {name: read_header(tmp_path / name) for name in ("model.safetensors", "again.safetensors")}
    with pytest.raises(UserError, match=r"again\.safetensors: .*: it is in model\.safetensors as well"):
        _plan(source.folder, headers, False)
