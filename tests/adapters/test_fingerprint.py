"""An adapter goes on the base that it was trained on, and on no other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hqqplus
from hqqplus import HqqPlusConfig, models
from hqqplus.adapters import Fingerprint, check_base, packed_sha256
from hqqplus.adapters.fingerprint import check_packed, check_tokenizer, differences, settle
from hqqplus.errors import UserError
from hqqplus.modules import packed_modules

FINGERPRINT = Fingerprint(
    base="some/model",
    revision="abc",
    packed_sha256="0123456789abcdef",
    quantization={"nbits": 2, "group_size": 32, "metadata_bits": 16, "overrides": {"lm_head": {"nbits": 8}}},
    versions={"torch": "2.13.0"},
    parent_digest="0a" * 16,
    solver=1,
    tokenizer="0b" * 16,
    template="none",
    data="0c" * 16,
)
NEW = ("parent_digest", "solver", "tokenizer", "template", "data")


@pytest.fixture(scope="module")
def packed(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder with a packed embedding and head besides the layers."""
    folder = tmp_path_factory.mktemp("base") / "packed"
    overrides = {"lm_head": {"nbits": 8}, "model.embed_tokens": {"nbits": 4}, "*.mlp.*": {"metadata_bits": 8}}
    config = HqqPlusConfig(nbits=2, group_size=32, overrides=overrides)
    hqqplus.quantize_folder(str(random_model("llama")), folder, config)
    return folder


# The file ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"revision": None, "versions": {}}])
def test_written_and_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    fingerprint = dataclasses.replace(FINGERPRINT, **changes)
    fingerprint.write(tmp_path)
    assert Fingerprint.read(tmp_path) == fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["hqqplus.json"]
    assert json.loads((tmp_path / "hqqplus.json").read_text())["packed_sha256"] == "0123456789abcdef"


def test_a_file_from_before_metadata_bits_means_16(tmp_path: Path) -> None:
    fields = dataclasses.asdict(FINGERPRINT)
    del fields["quantization"]["metadata_bits"]
    (tmp_path / "hqqplus.json").write_text(json.dumps(fields))
    assert Fingerprint.read(tmp_path) == FINGERPRINT


def test_a_file_from_before_the_digests_is_read_and_knows_none(tmp_path: Path) -> None:
    fields = dataclasses.asdict(FINGERPRINT)
    old = {name: value for name, value in fields.items() if name not in (*NEW, "baked", "calibration")}
    (tmp_path / "hqqplus.json").write_text(json.dumps(old))
    found = Fingerprint.read(tmp_path)
    assert found == dataclasses.replace(FINGERPRINT, **dict.fromkeys(NEW))
    assert differences(found.identity(), FINGERPRINT.identity(), "adapter") == []


def test_none_where_there_is_none(tmp_path: Path) -> None:
    assert Fingerprint.read(tmp_path) is None
    assert Fingerprint.read(tmp_path / "missing") is None


@pytest.mark.parametrize(
    "text", [b"", b"{", b"null", b"3", b"[]", b'["base"]', b"{}", b'{"base": "some/model"}', b"\xff\xfe{}"]
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "hqqplus.json").write_bytes(text)
    with pytest.raises(UserError, match=r"hqqplus\.json: not a fingerprint of hqqplus"):
        Fingerprint.read(tmp_path)


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    FINGERPRINT.write(tmp_path)
    text = (tmp_path / "hqqplus.json").read_text()
    (tmp_path / "hqqplus.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="not a fingerprint"):
        Fingerprint.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("base", None), ("packed_sha256", 7), ("quantization", "2-bit"), ("versions", None), ("revision", 1)],
        *[("solver", "1"), ("parent_digest", 1), ("tokenizer", {}), ("template", 0), ("data", [])],
    ],
)
def test_a_field_of_another_type_is_named(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "hqqplus.json").write_text(json.dumps({**dataclasses.asdict(FINGERPRINT), name: value}))
    with pytest.raises(UserError, match=rf"not a fingerprint of hqqplus \({name}: missing or of another type\)"):
        Fingerprint.read(tmp_path)


def test_a_format_of_the_future_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hqqplus.json").write_text(json.dumps({**dataclasses.asdict(FINGERPRINT), "format": 2}))
    with pytest.raises(UserError, match="its format is 2, this hqqplus reads 1"):
        Fingerprint.read(tmp_path)


def test_described_in_short() -> None:
    assert FINGERPRINT.describe() == "2-bit g32 of some/model (sha256 0123456789ab)"
    rows = dataclasses.replace(FINGERPRINT, quantization={"nbits": 4, "group_size": -1})
    assert rows.describe().startswith("4-bit grow of ")
    eight = dataclasses.replace(FINGERPRINT, quantization={**FINGERPRINT.quantization, "metadata_bits": 8})
    assert eight.describe().startswith("2-bit g32 with 8-bit metadata of ")


# Comparing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"parent_digest": "ff" * 16},
            "parent: some/model at abc with contents 0a0a0a0a0a0a (adapter), "
            "some/model at abc with contents ffffffffffff (here)",
        ),
        ({"quantization": {**FINGERPRINT.quantization, "nbits": 4}}, "quantization.nbits: 2 (adapter), 4 (here)"),
        (
            {"quantization": {**FINGERPRINT.quantization, "overrides": {"lm_head": {"nbits": 4}}}},
            "quantization.overrides.lm_head.nbits: 8 (adapter), 4 (here)",
        ),
        ({"solver": 2}, "solver version: 1 (adapter), 2 (here)"),
        ({"packed_sha256": "ff" * 32}, "packed weights: 0123456789abcdef (adapter), ffffffffffff (here)"),
        ({"baked": True}, "trained scales: no (adapter), yes (here)"),
        ({"tokenizer": "ff" * 16}, "tokenizer: 0b0b0b0b0b0b (adapter), ffffffffffff (here)"),
        ({"template": "ff" * 16}, "chat template: none (adapter), ffffffffffff (here)"),
        ({"data": "ff" * 16}, "training data: 0c0c0c0c0c0c (adapter), ffffffffffff (here)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_differs_is_named_with_both_values(changes: dict[str, Any], said: str) -> None:
    other = dataclasses.replace(FINGERPRINT, **changes)
    found = differences(FINGERPRINT.identity(), other.identity(), "adapter")
    assert found == [said]
    with pytest.raises(UserError) as caught:
        settle("a/b: another base", found, "take the right one", allow=False)
    assert str(caught.value).startswith(f"a/b: another base: {said}: take the right one, or say --allow-mismatch (in ")
    assert settle("a/b: another base", found, "take the right one", allow=True) == [
        f"a/b: another base: {said} (allowed)"
    ]
    unknown = dataclasses.replace(other, **dict.fromkeys([name for name in changes if name in NEW]))
    if unknown != other:
        assert differences(FINGERPRINT.identity(), unknown.identity(), "adapter") == []
        assert differences(unknown.identity(), FINGERPRINT.identity(), "adapter") == []


def test_all_that_differs_is_said_at_once() -> None:
    other = dataclasses.replace(FINGERPRINT, solver=2, tokenizer="ff", data="ff")
    names = [text.partition(":")[0] for text in differences(FINGERPRINT.identity(), other.identity(), "there")]
    assert names == ["solver version", "tokenizer", "training data"]
    assert settle("here", [], "", allow=False) == settle("here", [], "", allow=True) == []


def test_a_parent_is_its_contents_or_its_revision() -> None:
    moved = dataclasses.replace(FINGERPRINT, base="/elsewhere", revision="main")
    assert differences(FINGERPRINT.identity(), moved.identity(), "adapter") == []
    unknown = dataclasses.replace(FINGERPRINT, parent_digest=None)
    later = dataclasses.replace(unknown, revision="def")
    assert differences(unknown.identity(), later.identity(), "adapter") == ["revision: abc (adapter), def (here)"]
    assert differences(unknown.identity(), dataclasses.replace(later, revision=None).identity(), "adapter") == []


def test_long_values_are_cut_and_still_differ() -> None:
    patterns = [[f"*.layers.{n}.*", {"nbits": 4}] for n in range(80)]
    here = dataclasses.replace(FINGERPRINT, quantization={"overrides": patterns})
    there = dataclasses.replace(FINGERPRINT, quantization={"overrides": [*patterns[:-1], ["*.layers.79.*", {}]]})
    (said,) = differences(there.identity(), here.identity(), "adapter")
    assert len(said) < 250
    one, other = said.removeprefix("quantization.overrides: ").split(" (adapter), ")
    assert one != other.removesuffix(" (here)")


# The hash ------------------------------------------------------------------------------------------------------------


def test_the_hash_does_not_depend_on_the_dtype_of_the_rest(packed: Path) -> None:
    loaded = {dtype: models.load(packed, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")}
    assert {str(model.dtype) for model in loaded.values()} == {"torch.float32", "torch.bfloat16", "torch.float16"}
    recorded = Fingerprint.read(packed)
    assert recorded is not None
    assert {packed_sha256(model) for model in loaded.values()} == {recorded.packed_sha256}


def test_a_cast_of_the_whole_model_leaves_the_hash(packed: Path) -> None:
    model = models.load(packed)
    before = packed_sha256(model)
    assert packed_sha256(model.to(torch.float64)) == before


def test_any_flipped_bit_changes_the_hash(packed: Path) -> None:
    model = models.load(packed)
    before = packed_sha256(model)
    modules = packed_modules(model)
    chosen = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head", "model.embed_tokens"]
    parameters = [p for name in chosen for p in modules[name].packed_parameters().values()]
    assert len(parameters) == 4 * 4
    seen = {before}
    for tensor in (parameter.data.view(-1) for parameter in parameters):
        tensor[-1] ^= 1
        seen.add(packed_sha256(model))
        tensor[-1] ^= 1
    assert len(seen) == 1 + len(parameters)
    assert packed_sha256(model) == before


def test_swapped_layers_change_the_hash(packed: Path) -> None:
    model = models.load(packed)
    before = packed_sha256(model)
    mlp = model.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    assert packed_sha256(model) != before


def test_the_names_of_the_layers_count(packed: Path) -> None:
    model = models.load(packed)
    assert packed_sha256(torch.nn.ModuleDict({"inner": model})) != packed_sha256(model)


def test_what_is_not_packed_does_not_count(packed: Path) -> None:
    model = models.load(packed)
    before = packed_sha256(model)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    assert packed_sha256(model) == before


# The check -----------------------------------------------------------------------------------------------------------


def test_the_right_base_passes_and_another_is_named(
    packed: Path, random_model: Callable[..., Path], tmp_path: Path
) -> None:
    fingerprint = Fingerprint.read(packed)
    assert fingerprint is not None
    fingerprint.write(tmp_path)
    check_base(models.load(packed), tmp_path)

    parent = str(random_model("llama"))
    with pytest.raises(UserError) as caught:
        check_base(models.load(parent), tmp_path)
    assert fingerprint.describe() in str(caught.value)
    assert "the base is not quantized by hqqplus" in str(caught.value)

    with pytest.raises(UserError) as caught:
        check_base(models.load_causal_lm(parent, quantization=HqqPlusConfig(4, 64)), tmp_path)
    assert fingerprint.describe() in str(caught.value)
    assert "the base is 4-bit g64 with 8-bit metadata (sha256 " in str(caught.value)
    assert "quantization.nbits: 2 (adapter), 4 (here)" in str(caught.value)
    assert ": load it on the base it belongs to, or say --allow-mismatch" in str(caught.value)


def test_the_same_bits_with_other_codes_are_another_base(packed: Path, tmp_path: Path) -> None:
    fingerprint = Fingerprint.read(packed)
    assert fingerprint is not None
    fingerprint.write(tmp_path)
    model = models.load(packed)
    model.model.layers[0].mlp.up_proj.W_q.data.view(-1)[0] ^= 1
    with pytest.raises(UserError, match="load it on the packed folder that it was trained on"):
        check_base(model, tmp_path)


def test_an_adapter_of_unknown_origin_passes(packed: Path, tmp_path: Path) -> None:
    check_base(models.load(packed), tmp_path)


def test_an_allowed_base_is_said_and_passes(packed: Path, tmp_path: Path) -> None:
    fingerprint = Fingerprint.read(packed)
    assert fingerprint is not None
    dataclasses.replace(fingerprint, packed_sha256="ff" * 32, solver=7).write(tmp_path)
    model = models.load(packed)
    with pytest.raises(UserError, match=r"solver version: 7 \(adapter\), 1 \(here\): load it on"):
        check_base(model, tmp_path, fingerprint)
    (said,) = check_base(model, tmp_path, fingerprint, allow=True)
    assert said.startswith(f"{tmp_path}: this adapter was trained on 2-bit g32 ")
    assert said.endswith("(allowed)")
    # Nothing but the tensors is known to differ.
    (said,) = check_base(model, tmp_path, dataclasses.replace(fingerprint, solver=7), allow=True)
    assert f"packed weights: ffffffffffff (adapter), {fingerprint.packed_sha256[:12]} (here)" in said


def test_the_same_packed_weights_of_another_parent(packed: Path, tmp_path: Path) -> None:
    """Its embedding and norms are not packed, and may be others."""
    fingerprint = Fingerprint.read(packed)
    assert fingerprint is not None
    dataclasses.replace(fingerprint, parent_digest="ff" * 16).write(tmp_path)
    model = models.load(packed)
    assert check_base(model, tmp_path) == []
    with pytest.raises(UserError, match=r"contents ffffffffffff \(adapter\), .* \(here\): load it on the base"):
        check_base(model, tmp_path, fingerprint)
    assert len(check_base(model, tmp_path, fingerprint, allow=True)) == 1
    assert check_base(model, tmp_path, dataclasses.replace(fingerprint, parent_digest=None)) == []


def test_a_packed_folder_knows_its_parent_solver_and_tokenizer(packed: Path) -> None:
    fingerprint = Fingerprint.read(packed)
    assert fingerprint is not None
    assert fingerprint.parent_digest == models.content_digest(fingerprint.base)
    assert (fingerprint.solver, fingerprint.template, fingerprint.data) == (1, "none", None)
    tokenizer = models.load_tokenizer(str(packed))
    assert check_tokenizer(tokenizer, packed) == []
    assert fingerprint.with_tokenizer(models.load_tokenizer(fingerprint.base)) == fingerprint


@pytest.mark.parametrize("what", ["tokenizer", "chat template"])
def test_another_tokenizer_or_template_is_refused(packed: Path, tmp_path: Path, what: str) -> None:
    tokenizer = models.load_tokenizer(str(packed))
    if what == "tokenizer":
        tokenizer.add_tokens(["word"])
    else:
        tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(UserError) as caught:
        check_tokenizer(tokenizer, packed)
    assert str(caught.value).startswith(f"{packed}: this tokenizer is not the one that it was made with: {what}: ")
    assert str(caught.value).count(" (hqqplus.json), ") == 1
    (said,) = check_tokenizer(tokenizer, packed, allow=True)
    assert said.endswith(" (allowed)")
    fingerprint = Fingerprint.read(packed)
    assert fingerprint is not None
    dataclasses.replace(fingerprint, tokenizer=None, template=None).write(tmp_path)
    assert check_tokenizer(tokenizer, tmp_path) == check_tokenizer(tokenizer, tmp_path / "none") == []


def test_packed_tensors_that_were_changed_are_refused(packed: Path, tmp_path: Path) -> None:
    model = models.load(packed)
    assert check_packed(model, packed) == check_packed(model, tmp_path) == []
    model.model.layers[0].mlp.up_proj.W_q.data.view(-1)[0] ^= 1
    with pytest.raises(
        UserError, match=r"packed weights: [0-9a-f]{12} \(hqqplus\.json\), [0-9a-f]{12} \(here\): fetch"
    ):
        check_packed(model, packed)
    assert len(check_packed(model, packed, allow=True)) == 1
