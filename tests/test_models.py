"""Loading by name, saving: in this process, and in one that has nothing but the files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hqqplus
from hqqplus import HqqPlusConfig, merging, models
from hqqplus.adapters import Fingerprint, round_adapter, ship_adapter
from hqqplus.embedded import MODEL_DIR
from hqqplus.errors import UserError
from hqqplus.modules import packed_modules

IDS = torch.arange(3, 35).view(1, -1)
CONFIG = {"nbits": 2, "group_size": 32, "overrides": {"lm_head": {"nbits": 8}}}


@pytest.fixture(scope="module")
def made(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A parent, what it was packed to, an adapter on that, and the logits of both."""
    folder = tmp_path_factory.mktemp("made")
    parent = folder / "parent"
    shutil.copytree(random_model("qwen2"), parent)
    base = hqqplus.quantize_folder(str(parent), folder / "packed", HqqPlusConfig(**CONFIG))
    base_logits = base(IDS).logits
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base.requires_grad_(False), config).eval()
    round_adapter(model)
    fingerprint = Fingerprint.read(folder / "packed")
    assert fingerprint is not None
    ship_adapter(model, models.load_tokenizer(str(parent)), folder / "adapter", fingerprint, "card")
    logits = model(IDS).logits
    assert (logits - base_logits).abs().max() > 0.1
    return SimpleNamespace(
        parent=parent,
        packed=folder / "packed",
        adapter=folder / "adapter",
        logits=logits,
        base_logits=base_logits,
        fingerprint=fingerprint,
    )


# load ----------------------------------------------------------------------------------------------------------------


def test_a_packed_folder(made: SimpleNamespace) -> None:
    model = hqqplus.load(made.packed)
    assert not model.training
    assert len(packed_modules(model)) == 15
    assert torch.equal(model(IDS).logits, made.base_logits)


def test_a_parent_stays_in_full_precision(made: SimpleNamespace) -> None:
    model = hqqplus.load(str(made.parent))
    assert not model.training
    assert not packed_modules(model)
    assert torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(made.parent)(IDS).logits)


@pytest.mark.parametrize(
    "arguments",
    [("packed", "adapter"), ("parent", "adapter"), ("adapter",)],
    ids=["on the packed folder", "on the parent, which is then quantized", "alone"],
)
def test_an_adapter(made: SimpleNamespace, arguments: tuple[str, ...]) -> None:
    model = hqqplus.load(*(getattr(made, name) for name in arguments))
    assert isinstance(model, PeftModel)
    assert not model.training
    assert len(packed_modules(model)) == 15
    assert torch.equal(model(IDS).logits, made.logits)


def test_a_dtype_by_name_or_itself(made: SimpleNamespace) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        model = hqqplus.load(made.packed, made.adapter, dtype=dtype)
        assert model.dtype == torch.bfloat16
        assert packed_modules(model)["base_model.model.lm_head"].compute_dtype == torch.bfloat16
        assert (model(IDS).logits - made.logits).abs().max() < 0.1
    with pytest.raises(UserError, match="dtype is 'bf16'"):
        hqqplus.load(made.packed, dtype="bf16")


@pytest.fixture(scope="module")
def one_bit(made: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 1 bit with an output head of 8."""
    folder = tmp_path_factory.mktemp("one_bit") / "packed"
    config = HqqPlusConfig(nbits=1, group_size=32, overrides={"lm_head": {"nbits": 8}})
    hqqplus.quantize_folder(str(made.parent), folder, config)
    return folder


def test_8_bit_activations_in_layers_of_1_bit(one_bit: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = hqqplus.load(one_bit)(IDS).logits
    assert not caplog.records
    model = hqqplus.load(one_bit, compute="int8")
    (record,) = caplog.records
    assert record.getMessage() == (
        "int8: 14 layers of 1 bit take 8-bit activations; the 16-bit route stays for lm_head (8-bit)"
    )
    taken: list[str] = []
    for name, layer in packed_modules(model).items():
        layer.register_forward_hook(lambda layer, *_, name=name: taken.append(name) if layer.takes_int8() else None)
    with torch.no_grad():
        logits = model(IDS).logits
    assert len(taken) == 14
    assert "lm_head" not in taken
    assert 0 < (logits - expected).abs().max() < 0.1 * expected.abs().max()
    taken.clear()
    assert torch.equal(model(IDS).logits, expected)  # with gradients on
    assert not taken


def test_8_bit_activations_below_an_adapter(one_bit: Path, made: SimpleNamespace) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(hqqplus.load(one_bit, compute="int8").requires_grad_(False), config).eval()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(3, layer.base_layer.in_features)
    with torch.no_grad():
        adapter = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        eight = layer.base_layer(x)
        assert layer.base_layer.takes_int8()
        torch.testing.assert_close(layer(x), eight + adapter)
    sixteen = layer.base_layer(x)
    assert (sixteen - eight).abs().max() > 1e-4
    torch.testing.assert_close(layer(x), sixteen + adapter)


def test_8_bit_activations_are_in_no_file(one_bit: Path, tmp_path: Path) -> None:
    hqqplus.load(one_bit, compute="int8").save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (one_bit / name).read_bytes()
    layers = packed_modules(hqqplus.load(tmp_path / "again"))
    assert {layer.compute for name, layer in layers.items() if "proj" in name} == {"auto"}


def test_8_bit_activations_need_a_layer_of_1_bit(made: SimpleNamespace) -> None:
    for name in (made.packed, made.parent):
        with pytest.raises(UserError, match=rf"^compute: int8 is for layers of 1 bit .*, and {name} has none$"):
            hqqplus.load(name, compute="int8")
    with pytest.raises(UserError, match=r"^compute is 'int4': it must be one of auto, int8$"):
        hqqplus.load(made.packed, compute="int4")


def test_the_revision_of_the_fingerprint_is_the_default_for_its_own_base(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(made.adapter, adapter)
    values = json.loads((adapter / "hqqplus.json").read_text())
    (adapter / "hqqplus.json").write_text(json.dumps({**values, "base": "some/model", "revision": "abc"}))
    asked: list[tuple[str, Any, Any]] = []

    def remember(name: str, **arguments: Any) -> Any:
        asked.append((name, arguments["revision"], arguments["quantization"].nbits))
        return AutoModelForCausalLM.from_pretrained(made.packed)

    monkeypatch.setattr(models, "load_causal_lm", remember)
    hqqplus.load(adapter)
    hqqplus.load("some/model", adapter)
    hqqplus.load("some/model", adapter, revision="main")
    hqqplus.load("a/fork", adapter)
    assert asked == [
        ("some/model", "abc", 2),
        ("some/model", "abc", 2),
        ("some/model", "main", 2),
        ("a/fork", None, 2),
    ]


def test_names(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.resolve_name("embedded:pydoc") == str(MODEL_DIR)
    assert models.resolve_name("some/model") == "some/model"
    monkeypatch.setenv("HOME", str(made.packed.parent))
    assert models.is_packed("~/packed")
    assert not models.is_packed("~/parent")
    assert torch.equal(hqqplus.load("~/packed")(IDS).logits, made.base_logits)
    assert models.load_tokenizer("~/packed").pad_token == "<pad>"


def test_a_tokenizer_without_padding_pads_with_eos(made: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made.parent)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "one")
    assert models.load_tokenizer(str(tmp_path / "one")).pad_token == "</s>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(UserError, match="neither a padding nor an end-of-sequence token"):
        models.load_tokenizer(str(tmp_path / "none"))


# What does not belong together ---------------------------------------------------------------------------------------


@pytest.fixture
def parent(made: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the parent, to be changed."""
    return Path(shutil.copytree(made.parent, tmp_path / "parent"))


def edit_weight(folder: Path, key: str = "model.norm.weight") -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[key].view(-1)[0] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_fingerprint(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "hqqplus.json").read_text())
    (folder / "hqqplus.json").write_text(json.dumps({**values, **changes}))


def edit_tokenizer(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(values))


def test_contents_are_known_of_what_is_on_this_machine(
    made: SimpleNamespace, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = models.content_digest(str(made.parent))
    assert known == models.content_digest(str(parent)) is not None
    for name in ("some/model", str(tmp_path / "gone"), "no//name", "embedded:none"):
        assert models.content_digest(name) is None
    assert models.content_digest("embedded:pydoc") is not None
    # As the hub's cache has it: one file is enough to find the others.
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(parent, cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert models.content_digest("some/model") == models.content_digest("some/model", "0" * 40) == known
    assert models.content_digest("some/model", "1" * 40) is None
    (cached / "snapshots" / ("0" * 40) / "model.safetensors").unlink()
    assert models.content_digest("some/model") is None
    (parent / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=rf"^the parent: {parent}: a weight file is truncated or damaged"):
        models.content_digest(str(parent))


def test_another_parent_is_refused_before_it_is_quantized(
    made: SimpleNamespace, parent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert torch.equal(hqqplus.load(parent, made.adapter)(IDS).logits, made.logits), "a copy is the same parent"
    edit_weight(parent)  # no packed tensor depends on it
    with monkeypatch.context() as patch:
        patch.setattr(models, "load_causal_lm", None)
        with pytest.raises(UserError) as caught:
            hqqplus.load(parent, made.adapter)
    digests = made.fingerprint.parent_digest[:12], str(models.content_digest(str(parent)))[:12]
    assert str(caught.value).startswith(
        f"adapter: {made.adapter}: what it was trained on cannot be quantized from {parent} here: "
        f"parent: {made.parent} with contents {digests[0]} (adapter), "
        f"{parent} with contents {digests[1]} (here): name the packed folder"
    )
    caplog.clear()
    model = hqqplus.load(parent, made.adapter, allow_mismatch=True)
    assert not torch.equal(model(IDS).logits, made.logits)
    (record,) = caplog.records
    assert record.getMessage().endswith(" (allowed)")


def test_another_solver_is_refused_where_it_would_have_to_work(made: SimpleNamespace, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(made.adapter, tmp_path / "adapter"))
    edit_fingerprint(adapter, solver=0)
    with pytest.raises(
        UserError, match=r"cannot be quantized from .* here: solver version: 0 \(adapter\), 1 \(here\)"
    ):
        hqqplus.load(made.parent, adapter)
    for base, allow in ((made.parent, True), (made.packed, False)):
        assert torch.equal(hqqplus.load(base, adapter, allow_mismatch=allow)(IDS).logits, made.logits)


def test_an_adapter_on_another_base_if_one_insists(
    made: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hqqplus.quantize_folder(str(made.parent), tmp_path / "other", HqqPlusConfig(nbits=4, group_size=32))
    caplog.clear()
    with pytest.raises(UserError, match=r"quantization\.nbits: 2 \(adapter\), 4 \(here\)"):
        hqqplus.load(tmp_path / "other", made.adapter)
    with pytest.raises(UserError, match=r"quantization\.nbits: 2 \(adapter\), 4 \(here\)"):
        merging.export(str(tmp_path / "other"), made.adapter, tmp_path / "plain")
    assert not caplog.records
    assert isinstance(hqqplus.load(tmp_path / "other", made.adapter, allow_mismatch=True), PeftModel)
    merging.export(str(tmp_path / "other"), made.adapter, tmp_path / "plain", allow_mismatch=True)
    assert (tmp_path / "plain" / "config.json").is_file()
    assert ["quantization.nbits: 2 (adapter), 4 (here)" in record.getMessage() for record in caplog.records] == [
        True
    ] * 2


def test_trained_scales_that_are_gone_if_one_insists(made: SimpleNamespace, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(made.adapter, tmp_path / "adapter"))
    edit_fingerprint(adapter, baked=True, packed_sha256="ff" * 32)
    with pytest.raises(UserError, match=r"no quantizing of .* brings back"):
        hqqplus.load(made.parent, adapter)
    assert isinstance(hqqplus.load(made.parent, adapter, allow_mismatch=True), PeftModel)


@pytest.mark.parametrize("arguments", [("packed", None), ("packed", "adapter"), ("adapter", None)], ids=str)
def test_an_edited_tokenizer_is_refused(
    made: SimpleNamespace, tmp_path: Path, arguments: tuple[str, str | None], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(made.packed, tmp_path / "packed")
    shutil.copytree(made.adapter, tmp_path / "adapter")
    edit_fingerprint(tmp_path / "adapter", base=str(tmp_path / "packed"))
    name, adapter = (None if one is None else tmp_path / one for one in arguments)
    assert name is not None
    _, tokenizer = models.load_with_tokenizer(name, adapter)
    folder = adapter or name
    edit_tokenizer(folder)
    said = rf"^{folder}: this tokenizer is not the one that it was made with: tokenizer: \w+ \(hqqplus\.json\), \w+ \("
    with pytest.raises(UserError, match=said):
        models.load_with_tokenizer(name, adapter)
    with pytest.raises(UserError, match=said):
        merging.export(str(name), adapter, tmp_path / "plain")
    caplog.clear()
    _, edited = models.load_with_tokenizer(name, adapter, allow_mismatch=True)
    assert edited("a")["input_ids"] == tokenizer("b")["input_ids"]
    assert [record.getMessage().endswith(" (allowed)") for record in caplog.records] == [True]


def test_the_tokenizer_of_the_base_has_to_be_that_of_an_adapter_without_one(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(made.packed, tmp_path / "packed")
    adapter = tmp_path / "adapter"
    shutil.copytree(made.adapter, adapter, ignore=shutil.ignore_patterns("tokenizer*"))
    models.load_with_tokenizer(tmp_path / "packed", adapter)
    edit_tokenizer(tmp_path / "packed")
    with pytest.raises(UserError, match=rf"^{adapter}: this tokenizer is not the one"):
        models.load_with_tokenizer(tmp_path / "packed", adapter)


def test_a_packed_folder_with_other_tensors_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.packed, tmp_path / "packed"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.W_q"].view(-1)[0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=rf"^{folder}: this packed model is not the one that it was written as: packed w"
    ):
        models.load_with_tokenizer(folder)
    assert packed_modules(models.load_with_tokenizer(folder, allow_mismatch=True)[0])


def test_the_parent_to_compare_with(made: SimpleNamespace, parent: Path, tmp_path: Path) -> None:
    for name, adapter in ((made.packed, None), (made.packed, made.adapter), (made.adapter, None), (made.parent, None)):
        for right in (str(made.parent), str(parent), str(made.packed), "some/model"):
            models.check_parent(name, adapter, right)
    edit_weight(parent, "lm_head.weight")
    models.check_parent(made.parent, None, str(parent))  # nothing says what it was made from
    for name, adapter in ((made.packed, None), (made.packed, made.adapter), (made.adapter, None)):
        with pytest.raises(
            UserError, match=rf"{parent} is not its parent: parent: {made.parent} with contents \w+ \("
        ):
            models.check_parent(name, adapter, str(parent))
        models.check_parent(name, adapter, str(parent), allow_mismatch=True)


# What is damaged -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parent", "packed"])
@pytest.mark.parametrize("lost", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named_and_not_made_up(
    made: SimpleNamespace, tmp_path: Path, name: str, lost: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(getattr(made, name), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"the checkpoint lacks {lost}$"):
        hqqplus.load(folder)


@pytest.mark.parametrize("problem", ["shape", "nan"])
def test_a_bad_weight_of_the_parent_is_named(
    made: SimpleNamespace, tmp_path: Path, problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(made.parent, folder)
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[key] = tensors[key][:-1].clone() if problem == "shape" else tensors[key] / 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if problem == "shape":
        with pytest.raises(UserError, match=rf"{key} has not the shape that config.json asks for"):
            hqqplus.load(folder)
    else:
        with pytest.raises(UserError, match=rf"^model: {folder}: {key}: .*NaN or infinite") as caught:
            hqqplus.quantize_folder(str(folder), tmp_path / "out", HqqPlusConfig(**CONFIG))
        assert "\n" not in str(caught.value)
    # transformers explains it on the terminal with a traceback in a table
    assert "Traceback" not in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_config_that_does_not_fit_the_packed_tensors_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(made.packed, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["nbits"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"W_q has not the shape that config.json asks for|must match the size"):
        hqqplus.load(folder)


def test_tensors_that_the_model_has_no_use_for_are_reported_and_no_error(
    made: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "more"
    shutil.copytree(made.parent, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    log = models.logging.getLogger("transformers")
    propagate, log.propagate = log.propagate, True
    try:
        model = hqqplus.load(folder)
    finally:
        log.propagate = propagate
    assert torch.equal(model(IDS).logits, hqqplus.load(made.parent)(IDS).logits)
    assert "extra.weight" in caplog.text


@pytest.mark.parametrize("device", ["nope", "cuda:99"])
def test_a_device_that_is_not_there(made: SimpleNamespace, device: str) -> None:
    with pytest.raises(UserError, match=rf"^device: '?{device}"):
        hqqplus.load(made.packed, device=device)


# A new process -------------------------------------------------------------------------------------------------------

_SAVE_LOGITS = """
import sys, torch, hqqplus
from safetensors.torch import save_file
base, adapter, output = sys.argv[1:]
ids = torch.arange(3, 35).view(1, -1)
model = hqqplus.load(base)
logits = {"base": model(ids).logits.detach()}
logits["adapted"] = hqqplus.load(base, adapter)(ids).logits.detach()
save_file(logits, output)
"""


@pytest.mark.slow
def test_a_new_process_without_the_parent_gives_the_same_logits(
    random_model: Callable[..., Path], run_python: Callable[..., Any], tmp_path: Path
) -> None:
    """Through the code that a user runs: quantized, adapted, shipped; moved; the parent gone."""
    parent = tmp_path / "parent"
    shutil.copytree(random_model("qwen3", True), parent)
    hqqplus.quantize_folder(str(parent), tmp_path / "here" / "packed", HqqPlusConfig(nbits=1, group_size=32))
    model = models.load(tmp_path / "here" / "packed")
    expected = {"base": model(IDS).logits}
    torch.manual_seed(3)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model.requires_grad_(False), config).eval()
    fingerprint = Fingerprint.read(tmp_path / "here" / "packed")
    assert fingerprint is not None
    round_adapter(model)
    ship_adapter(model, models.load_tokenizer(str(parent)), tmp_path / "here" / "adapter", fingerprint, "card")
    expected["adapted"] = model(IDS).logits
    assert (expected["adapted"] - expected["base"]).abs().max() > 0.1

    shutil.move(tmp_path / "here", tmp_path / "elsewhere")
    shutil.rmtree(parent)
    output = tmp_path / "logits.safetensors"
    moved = tmp_path / "elsewhere"
    run_python("-c", _SAVE_LOGITS, str(moved / "packed"), str(moved / "adapter"), str(output))
    found = load_file(output)
    assert torch.equal(found["base"], expected["base"])
    assert torch.equal(found["adapted"], expected["adapted"])


# quantize ------------------------------------------------------------------------------------------------------------


def test_a_packed_folder_says_where_it_comes_from(made: SimpleNamespace) -> None:
    assert made.fingerprint.base == str(made.parent)
    assert {"nbits", "group_size", "overrides"} <= made.fingerprint.quantization.keys()
    assert HqqPlusConfig(**made.fingerprint.quantization).plan() == HqqPlusConfig(**CONFIG).plan()
    assert models.is_packed(str(made.packed))
    assert not models.is_packed(str(made.parent))
    card = (made.packed / "README.md").read_text()
    assert made.fingerprint.describe() in card
    assert "Import `hqqplus` before" in card
    assert AutoTokenizer.from_pretrained(made.packed)("ab") == AutoTokenizer.from_pretrained(made.parent)("ab")


def test_packing_twice_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="packed already; quantize its parent"):
        hqqplus.quantize_folder(str(made.packed), tmp_path / "out", HqqPlusConfig(**CONFIG))
    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file_is_refused_before_the_work(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(models, "load_causal_lm", None)
    with pytest.raises(UserError, match="is a file, a folder is needed"):
        hqqplus.quantize_folder(str(made.parent), tmp_path / "file" / "out", HqqPlusConfig(**CONFIG))
    with pytest.raises(UserError, match="is a file, a folder is needed"):
        merging.export(str(made.packed), None, tmp_path / "file" / "out")


# The weights of the parent -------------------------------------------------------------------------------------------


def test_single_weights_of_the_parent(made: SimpleNamespace, tmp_path: Path) -> None:
    model = hqqplus.load(made.parent)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    for folder in (made.parent, tmp_path / "shards"):
        read = models.parent_weights(str(folder))
        for name in ("model.layers.1.mlp.down_proj", "lm_head"):
            assert torch.equal(read(name), model.get_submodule(name).weight)
    with pytest.raises(UserError, match=r"no tensor 'model\.nothing\.weight'"):
        read("model.nothing")


def test_a_parent_that_is_gone_or_damaged_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path / 'gone'}: no such folder"):
        models.parent_weights(str(tmp_path / "gone"))
    shutil.copytree(made.parent, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        models.parent_weights(str(tmp_path / "broken"))
