"""Quantizing on the disk: the same bytes as quantizing while loading."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hqqplus
from hqqplus import HqqPlusConfig, models
from hqqplus.adapters.fingerprint import Fingerprint, packed_sha256
from hqqplus.errors import UserError
from hqqplus.modules import bits_per_weight, packed_modules
from hqqplus.modules.replace import Solutions, packed_already
from hqqplus.quantization import PackedTensor, QuantSpec, SolverOptions, quantize
from hqqplus.shards import read_header
from hqqplus.streaming import Quantized, partial
from tests.streaming.checkpoints import FILES, IDS, MIXED, made, same_tensors, sharded, tensors, tree, while_loading

# The same as while loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", False), ("llama", True), ("qwen2", True), ("gemma2", True), ("phi", False)]
)
def test_the_files_are_those_of_the_other_route(
    random_model: Callable[..., Path], tmp_path: Path, kind: str, tied: bool
) -> None:
    parent = random_model(kind, tied)
    # Phi has other names: a pattern that fits none is no error.
    config = HqqPlusConfig(**MIXED)
    found = made(parent, tmp_path / "ours", config)
    model = while_loading(parent, tmp_path / "theirs", config)
    for name in ("model.safetensors", *FILES):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    assert found.streamed
    assert found.kept == ()
    assert found.fingerprint.packed_sha256 == packed_sha256(model)
    assert found.fingerprint == Fingerprint.read(tmp_path / "ours")
    assert found.layers.bits_per_weight == pytest.approx(bits_per_weight(model))
    stored = sum(tensor.nbytes for tensor in tensors(tmp_path / "ours").values())
    assert found.layers.total_bytes == stored
    names = list(packed_modules(model))
    if tied and "lm_head" in names:
        names.remove("lm_head")  # the embedding's own tensors
    assert [layer.name for layer in found.layers.layers] == names
    assert tree(tmp_path / "ours") == sorted(
        ["README.md", *FILES, "hqqplus.json", "layers.json", "layers.md", "model.safetensors", "nmse.png"]
        + [path.name for path in parent.glob("tokenizer*")]
    )


def test_a_real_model(shared: Path, tmp_path: Path) -> None:
    parent = shared / "models" / "tinystories-656K"
    found = made(parent, tmp_path / "ours", HqqPlusConfig(2, 64, metadata_bits=16))
    model = while_loading(parent, tmp_path / "theirs", HqqPlusConfig(2, 64, metadata_bits=16))
    for name in ("model.safetensors", *FILES):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    assert found.layers.bits_per_weight == 2.5
    assert 0.09 < found.layers.nmse < 0.12
    loaded = models.load(tmp_path / "ours", dtype="float32", device="cpu")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_several_files(parent: Path, whole: Quantized, tmp_path: Path) -> None:
    names = sorted(path.name for path in parent.glob("*.safetensors"))
    assert len(names) > 3
    assert sorted(path.name for path in whole.folder.glob("*.safetensors")) == names
    model = while_loading(parent, tmp_path / "theirs")
    same_tensors(whole.folder, tmp_path / "theirs")
    assert whole.fingerprint.packed_sha256 == packed_sha256(model)
    for name in names:
        # What came from a file is in the file of the same name.
        modules = {key.rpartition(".")[0] for key in read_header(whole.folder / name)}
        assert modules == {key.rpartition(".")[0] for key in read_header(parent / name)}
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    ours, theirs = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (whole.folder, tmp_path / "theirs")
    )
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"] == {key: name for name in names for key in read_header(whole.folder / name)}
    loaded = AutoModelForCausalLM.from_pretrained(whole.folder, output_loading_info=True)
    assert not any(loaded[1].values())
    assert torch.equal(loaded[0](IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", ["checkpoint", "bfloat16", "float16", "float32", "auto"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtypes(random_model: Callable[..., Path], tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    parent = sharded(random_model("qwen2", False), tmp_path / "parent", "1GB", stored)
    made(parent, tmp_path / "ours", dtype=dtype)
    while_loading(parent, tmp_path / "theirs", dtype=dtype)
    for name in ("model.safetensors", *FILES):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


@pytest.mark.parametrize("said", ["bfloat16", None])
def test_a_dtype_of_the_configuration_that_the_weights_do_not_have(
    random_model: Callable[..., Path], tmp_path: Path, said: str | None
) -> None:
    """Loading casts to what the configuration says; where it says nothing, to the weights' own. Then it quantizes."""
    parent = tmp_path / "parent"
    shutil.copytree(random_model("llama"), parent)
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**config, "dtype": said}))
    weights = load_file(parent / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float64)  # first in the file, not by name
    if said is None:
        weights = {name: t.half() if t.dtype == torch.float32 else t for name, t in weights.items()}
    save_file(weights, parent / "model.safetensors", metadata={"format": "pt"})
    made(parent, tmp_path / "ours")
    while_loading(parent, tmp_path / "theirs")
    same_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert tensors(tmp_path / "ours")["model.norm.weight"].dtype == (torch.bfloat16 if said else torch.float16)


@pytest.mark.parametrize("cast", ["checkpoint", "float16"])
def test_modules_that_are_kept_in_float32(
    random_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cast: str
) -> None:
    from transformers import Qwen2ForCausalLM

    monkeypatch.setattr(Qwen2ForCausalLM, "_keep_in_fp32_modules", ["input_layernorm", "layers.1.mlp.up_proj"])
    monkeypatch.setattr(Qwen2ForCausalLM, "_keep_in_fp32_modules_strict", ["k_proj"])
    parent = sharded(random_model("qwen2", False), tmp_path / "parent", "1GB", torch.float16)
    made(parent, tmp_path / "ours", dtype=cast)
    while_loading(parent, tmp_path / "theirs", dtype=cast)
    same_tensors(tmp_path / "ours", tmp_path / "theirs")
    found = tensors(tmp_path / "ours")
    assert found["model.layers.0.input_layernorm.weight"].dtype == torch.float32
    assert "model.layers.1.mlp.up_proj.weight" in found
    assert found["model.layers.0.self_attn.k_proj.bias"].dtype == torch.float32


@pytest.mark.parametrize("head", ["also", "only"])
@pytest.mark.parametrize("overrides", [{}, {"lm_head": {"nbits": 8}}], ids=["kept", "packed"])
def test_a_tied_head_that_is_in_the_checkpoint(
    random_model: Callable[..., Path], tmp_path: Path, head: str, overrides: dict[str, Any]
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(random_model("llama", True), parent)
    weights = load_file(parent / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if head == "only":
        del weights["model.embed_tokens.weight"]
    save_file(weights, parent / "model.safetensors", metadata={"format": "pt"})
    config = HqqPlusConfig(2, 32, overrides=overrides)
    found = made(parent, tmp_path / "ours", config)
    while_loading(parent, tmp_path / "theirs", config)
    assert found.streamed
    same_tensors(tmp_path / "ours", tmp_path / "theirs")


# What cannot be done so ----------------------------------------------------------------------------------------------


def test_experts_that_are_not_packed_are_loaded_as_a_whole(
    random_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent = random_model("mixtral")
    config = HqqPlusConfig(**{**MIXED, "modules_to_not_convert": ["*.experts"]})
    with caplog.at_level(logging.WARNING, "hqqplus"):
        found = made(parent, tmp_path / "ours", config)
    assert not found.streamed
    (record,) = caplog.records
    assert (
        "has model.layers.0.block_sparse_moe.experts.0.w1.weight in its checkpoint, which is loaded as a part of"
        in (record.getMessage())
    )
    model = while_loading(parent, tmp_path / "theirs", config)
    same_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert found.fingerprint.packed_sha256 == packed_sha256(model)
    assert [layer.name for layer in found.layers.layers] == list(packed_modules(model))
    assert found.layers.bits_per_weight == pytest.approx(bits_per_weight(model))
    assert found.layers.total_bytes == sum(tensor.nbytes for tensor in tensors(tmp_path / "ours").values())
    assert {"layers.json", "layers.md", "nmse.png", "hqqplus.json", "README.md"} <= set(tree(tmp_path / "ours"))


def test_the_other_reasons(
    random_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.removeprefix("model."): tensor for name, tensor in weights.items()}

    def untied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}

    for number, (change, reason) in enumerate(
        [
            (renamed, "has embed_tokens.weight in its checkpoint, which is loaded as model.embed_tokens.weight"),
            (untied, "ties lm_head.weight to model.embed_tokens.weight, but has different ones"),
        ]
    ):
        parent = tmp_path / str(number) / "parent"
        shutil.copytree(random_model("llama", True), parent)
        changed = change(load_file(parent / "model.safetensors"))
        save_file(changed, parent / "model.safetensors", metadata={"format": "pt"})
        caplog.clear()
        config = HqqPlusConfig(2, 32)
        found = made(parent, tmp_path / str(number) / "ours", config)
        assert not found.streamed
        assert reason in caplog.text
        while_loading(parent, tmp_path / str(number) / "theirs", config)
        same_tensors(tmp_path / str(number) / "ours", tmp_path / str(number) / "theirs")


# Layers that are solved already -------------------------------------------------------------------------------------


class Dying(dict[str, PackedTensor]):
    """Solutions whose reader is interrupted at one of them."""

    def get(self, name: str, default: Any = None) -> Any:
        if name == "model.layers.1.mlp.up_proj":
            raise KeyboardInterrupt
        return super().get(name, default)


def others(parent: Path, config: HqqPlusConfig) -> dict[str, PackedTensor]:
    """Something else for two layers: what their weights are quantized to with a gain."""
    model, plan = AutoModelForCausalLM.from_pretrained(parent), config.plan()
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj")
    options = SolverOptions(gain=1.0)
    return {n: quantize(model.get_submodule(n).weight.detach(), plan.spec_for(n), options) for n in names}


def test_solutions_are_written_and_a_job_begun_with_others_is_not_continued(
    parent: Path, whole: Quantized, tmp_path: Path
) -> None:
    found = others(parent, HqqPlusConfig(**MIXED))
    with packed_already(Solutions(Dying(found), "one")), pytest.raises(KeyboardInterrupt):
        made(parent, tmp_path / "out")
    for solutions, says in ((Solutions(found, "two"), "one -> two"), (None, "one -> None")):
        with (
            packed_already(solutions) if solutions else nullcontext(),
            pytest.raises(UserError, match=rf"with other settings \(solutions: {says}\)"),
        ):
            made(parent, tmp_path / "out")
    with packed_already(Solutions(found, "one")):
        result = made(parent, tmp_path / "out")
        while_loading(parent, tmp_path / "loaded")
    assert result.kept
    same_tensors(tmp_path / "out", tmp_path / "loaded")
    written, plain = tensors(tmp_path / "out"), tensors(whole.folder)
    for name, packed in found.items():
        for key, tensor in packed.state().items():
            assert torch.equal(written.pop(f"{name}.{key}"), tensor)
            plain.pop(f"{name}.{key}")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in written.items())
    nmse = {layer.name: layer.statistics.nmse for layer in result.layers.layers}
    before = {layer.name: layer.statistics.nmse for layer in whole.layers.layers}
    assert {name for name, value in nmse.items() if value != before[name]} == set(found)


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_solutions_of_another_model_are_refused_on_both_routes(
    random_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    stranger = Solutions({"model.layers.7.self_attn.q_proj": quantize(torch.randn(64, 64), QuantSpec())}, "")
    with packed_already(stranger), pytest.raises(UserError, match=r"a solution for model.layers.7.self_attn.q_proj"):
        made(random_model(kind), tmp_path / "out", HqqPlusConfig())
    assert not (tmp_path / "out").exists()


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_what_is_not_finite_is_named_and_nothing_left(
    random_model: Callable[..., Path], tmp_path: Path, name: str, value: float
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(random_model("llama"), parent)
    weights = load_file(parent / "model.safetensors")
    weights[name].view(-1)[5] = value
    save_file(weights, parent / "model.safetensors", metadata={"format": "pt"})
    for note_seconds in (1e9, 0.0):  # also if something was noted as finished
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(partial, "_NOTE_SECONDS", note_seconds)
            with pytest.raises(UserError, match=rf"^model: {parent}: {name}: .*NaN or infinite"):
                made(parent, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_what_does_not_fit_the_asked_dtype_is_named(random_model: Callable[..., Path], tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(random_model("llama"), parent)
    weights = load_file(parent / "model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, parent / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight: .* NaN or infinite values in torch\.float16"):
        made(parent, tmp_path / "out", dtype="float16")
    made(parent, tmp_path / "out")


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("cut o", "a JSON file of it is truncated or damaged"),
        ("[]", "model.safetensors.index.json holds no JSON object"),
        ('{"weight_map": {}}', "there is no weight_map in it"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "is not the name of a safetensors file beside it"),
        ('{"weight_map": {"a": "weights.bin"}}', "is not the name of a safetensors file beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "there is no gone.safetensors, which"),
    ],
)
def test_an_index_that_is_of_no_use(parent: Path, tmp_path: Path, index: str, says: str) -> None:
    copy = tmp_path / "parent"
    shutil.copytree(parent, copy)
    (copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=rf"^model: {copy}: .*{says}"):
        made(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_weights_in_pickles_are_refused(random_model: Callable[..., Path], tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(random_model("llama"), parent)
    torch.save(load_file(parent / "model.safetensors"), parent / "pytorch_model.bin")
    (parent / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"^model: {parent}: .*pytorch_model\.bin is a pickle, which may run code"):
        made(parent, tmp_path / "out")


def test_a_shape_that_the_configuration_does_not_ask_for(random_model: Callable[..., Path], tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(random_model("llama"), parent)
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(UserError, match=r"mlp\.\w+_proj\.weight has not the shape that config\.json asks for"):
        made(parent, tmp_path / "out")


def test_tensors_that_are_none_of_the_models_are_left_out(
    random_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(random_model("llama"), parent)
    more = {**load_file(parent / "model.safetensors"), "extra.weight": torch.ones(2)}
    save_file(more, parent / "model.safetensors", metadata={"format": "pt"})
    made(parent, tmp_path / "ours")
    assert "1 tensors of the checkpoint are none of the model's, such as extra.weight" in caplog.text
    while_loading(parent, tmp_path / "theirs")
    same_tensors(tmp_path / "ours", tmp_path / "theirs")


# A hub model ---------------------------------------------------------------------------------------------------------


def test_a_hub_model_is_fetched_by_its_index(
    parent: Path, whole: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--some--model" / "snapshots" / commit
    calls: list[tuple[str | None, list[str]]] = []

    def download(name: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        assert name == "some/model"
        calls.append((revision, allow_patterns))
        cache.mkdir(parents=True, exist_ok=True)
        for path in parent.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_tokenizer = models.load_tokenizer
    monkeypatch.setattr(models, "load_tokenizer", lambda name, **options: load_tokenizer(str(parent)))
    (parent / "consolidated.safetensors").write_bytes(b"the same weights in another format")
    try:
        found = made(Path("some/model"), tmp_path / "out", revision="main")
        again = made(Path("some/model"), tmp_path / "again")
    finally:
        (parent / "consolidated.safetensors").unlink()
    assert calls[0][0] == "main"
    assert "*.safetensors" not in calls[0][1]
    assert calls[1][0] == commit
    assert not (cache / "consolidated.safetensors").exists()
    assert (found.fingerprint.base, found.fingerprint.revision) == ("some/model", "main")
    assert again.fingerprint.revision == commit
    same_tensors(tmp_path / "out", whole.folder)


# From above ----------------------------------------------------------------------------------------------------------


def test_quantize_folder_returns_what_it_wrote(parent: Path, whole: Quantized, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    model = hqqplus.quantize_folder(str(parent), tmp_path / "out", HqqPlusConfig(**MIXED), device="cpu")
    assert packed_sha256(model) == whole.fingerprint.packed_sha256
    assert not (tmp_path / "out" / "old.txt").exists()
    same_tensors(tmp_path / "out", whole.folder)


def test_the_summary_is_json(whole: Quantized) -> None:
    values = json.loads(json.dumps(whole.to_json()))
    assert values["packed_sha256"] == whole.fingerprint.packed_sha256
    assert values["streamed"] is True
    assert values["kept_files"] == []
    assert values["bits_per_weight"] == whole.layers.bits_per_weight
    assert "layers" not in values
