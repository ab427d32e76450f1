"""Calibration of whole models: interrupted, damaged, refused, and what it does for a real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hqqplus
from hqqplus import HqqPlusConfig, models
from hqqplus.calibration import store
from hqqplus.calibration.calibrate import Calibration, CalibrationOptions, calibrate
from hqqplus.calibration.store import MANIFEST, SolutionFolder, read_solutions
from hqqplus.data import load_rows
from hqqplus.errors import UserError
from hqqplus.evaluation.perplexity import make_windows, perplexity
from hqqplus.integrations.transformers import quantize_model
from hqqplus.modules import packed_modules
from hqqplus.modules.replace import packed_already
from hqqplus.quantization import PackedTensor, QuantPlan, QuantSpec, quantize
from hqqplus.streaming import quantize_checkpoint

PLAN = QuantPlan(QuantSpec(2, 32), {"*.down_proj": {"nbits": 1}, "v_proj": {"metadata_bits": 16}})
QUICK = CalibrationOptions(epochs=1, batch_size=3)
# Two layers a block, where it is not about the layers.
FEW = QuantPlan(QuantSpec(2, 32), skip=("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"))


@pytest.fixture(scope="module")
def parent(random_model: Callable[..., Path]) -> Path:
    return random_model("llama")


def load(parent: Path, dtype: torch.dtype = torch.float32) -> Any:
    return models.load_causal_lm(str(parent), device="cpu", dtype=dtype)


def ids(count: int = 8, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


def made(
    parent: Path, folder: Path | None = None, options: CalibrationOptions = QUICK, plan: QuantPlan = FEW, **rest: Any
) -> Calibration:
    arguments = {"device": "cpu", "quiet": True, **rest}
    tokens = arguments.pop("input_ids", ids())
    return calibrate(load(parent), plan, tokens, options, folder, **arguments)


def same(one: PackedTensor, other: PackedTensor) -> bool:
    assert (one.spec, one.shape) == (other.spec, other.shape)
    return all(torch.equal(tensor, other.state()[key]) for key, tensor in one.state().items())


def all_same(one: Calibration, other: Calibration) -> bool:
    found, expected = one.solutions.tensors, other.solutions.tensors
    assert list(found) == list(expected)
    return all(same(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("method", ["importance", "feedback", "block"])
def test_every_layer_of_every_block_is_solved_as_the_plan_says(parent: Path, method: str) -> None:
    model = load(parent)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = calibrate(model, PLAN, ids(), CalibrationOptions(method, 1), device="cpu", quiet=True)
    assert len(found.solutions.tensors) == 14
    for name, packed in found.solutions.tensors.items():
        assert packed.spec == PLAN.spec_for(name)
        assert packed.shape == tuple(before[f"{name}.weight"].shape)
        report = next(block for block in found.blocks if name.startswith(block.name))
        assert report.layers[name].nmse == pytest.approx(packed.nmse(before[f"{name}.weight"]), rel=1e-5)
    assert [block.name for block in found.blocks] == ["model.layers.0", "model.layers.1"]
    for block in found.blocks:
        assert block.before == block.losses["data-free"]
        assert block.loss == min(block.curve)
        assert method == "block" or block.start == method
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_importance_is_the_mean_square_of_what_comes_through_the_quantized_blocks(parent: Path) -> None:
    model, tokens = load(parent), ids()
    found = made(parent, options=CalibrationOptions("importance"), plan=PLAN).solutions.tensors
    seen: dict[str, Tensor] = {}
    watched = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    # The second block gets what the first gives once it is quantized; a block's own layers are in full precision.
    for name in watched:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].double().square().mean((0, 1))})
        )
    model(tokens)
    first = seen[watched[0]]
    with torch.no_grad():
        for name, packed in found.items():
            if name.startswith("model.layers.0."):
                model.get_submodule(name).weight.copy_(packed.dequantize())
    model(tokens)
    for name, importance in ((watched[0], first), (watched[1], seen[watched[1]])):
        weight = load(parent).get_submodule(name).weight.detach()
        assert same(found[name], quantize(weight, found[name].spec, None, importance.float()))


def test_block_reconstruction_is_never_worse_than_what_it_began_with(parent: Path) -> None:
    found = made(parent, options=CalibrationOptions(epochs=3, batch_size=2))
    for block in found.blocks:
        assert block.loss <= block.curve[0] == min(block.losses.values())
        assert len(block.curve) == 4


@pytest.mark.slow
def test_a_real_model_is_better_for_it(shared: Path) -> None:
    folder, tokens = shared / "models" / "stories260K", []
    tokenizer = models.load_tokenizer(str(folder))
    for row in load_rows(str(shared / "data" / "tinystories" / "train_v2.jsonl"))["text"]:
        found = tokenizer(row)["input_ids"][:64]
        tokens += [found] if len(found) == 64 else []
        if len(tokens) == 16:
            break
    rows = load_rows(str(shared / "data" / "tinystories" / "validation.jsonl"))["text"]
    windows, plan = make_windows(rows, tokenizer, 256, 4000), QuantPlan(QuantSpec(2, 64))

    def measured(found: Calibration | None) -> float:
        model = load(folder)
        if found is None:
            quantize_model(model, plan)
        else:
            with packed_already(found.solutions):
                quantize_model(model, plan)
            assert all(same(m.packed(), found.solutions.tensors[n]) for n, m in packed_modules(model).items())
        return perplexity(model, windows).perplexity

    input_ids = torch.tensor(tokens)
    feedback, block = (
        calibrate(load(folder), plan, input_ids, CalibrationOptions(method, 2), device="cpu", quiet=True)
        for method in ("feedback", "block")
    )
    without, with_feedback, with_block = measured(None), measured(feedback), measured(block)
    # 41.2, 20.9 and 16.7 when this was written.
    assert with_feedback < 0.75 * without
    assert with_block < 0.9 * with_feedback


# --- on the disk -----------------------------------------------------------------------------------------------------


def test_a_folder_holds_just_what_memory_does_and_is_read_lazily(parent: Path, tmp_path: Path) -> None:
    in_memory, on_disk = made(parent), made(parent, tmp_path / "solutions")
    assert all_same(in_memory, on_disk)
    assert in_memory.solutions.digest == on_disk.solutions.digest
    solutions, blocks = read_solutions(tmp_path / "solutions")
    assert solutions.digest == on_disk.solutions.digest
    assert list(solutions.tensors) == list(on_disk.solutions.tensors)
    assert all(same(solutions.tensors[name], packed) for name, packed in on_disk.solutions.tensors.items())
    assert tuple(blocks) == on_disk.blocks


def test_activations_on_the_disk_change_nothing(parent: Path, tmp_path: Path) -> None:
    one = made(parent)
    options = CalibrationOptions(epochs=1, batch_size=3, store="disk")
    other = made(parent, tmp_path, options)
    assert all_same(one, other)
    assert one.solutions.digest == other.solutions.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "block-0000.safetensors",
        "block-0001.safetensors",
        MANIFEST,
    ]


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let a calibration die once `after` blocks are finished."""
    add, count = SolutionFolder.add, 0

    def dying(self: SolutionFolder, solved: store.SolvedBlock) -> bool:
        nonlocal count
        stands = add(self, solved)
        count += 1
        if count == after:
            raise KeyboardInterrupt
        return stands

    monkeypatch.setattr(SolutionFolder, "add", dying)


def test_an_interrupted_calibration_goes_on_and_comes_out_the_same(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(parent, tmp_path / "whole")
    interrupt(monkeypatch, after=1)
    with pytest.raises(KeyboardInterrupt):
        made(parent, tmp_path / "half")
    with pytest.raises(UserError, match="unfinished"):
        read_solutions(tmp_path / "half")
    monkeypatch.undo()
    continued = made(parent, tmp_path / "half")
    assert (whole.kept, continued.kept) == (0, 1)
    assert all_same(whole, continued)
    assert whole.solutions.digest == continued.solutions.digest
    assert made(parent, tmp_path / "half").kept == 2


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_damaged_block_is_done_again(parent: Path, tmp_path: Path, damage: str, index: int) -> None:
    whole = made(parent, tmp_path)
    path = tmp_path / f"block-{index:04}.safetensors"
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-100] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    again = made(parent, tmp_path)
    assert again.kept == 1
    assert all_same(whole, again)
    assert path.read_bytes() == content
    assert whole.solutions.digest == again.solutions.digest


def test_what_was_built_on_a_block_that_comes_out_otherwise_is_done_again(parent: Path, tmp_path: Path) -> None:
    made(parent, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    first, second = manifest["blocks"].values()
    # As if another device had solved the first block: its file is damaged and was another one.
    (tmp_path / first["file"]).write_bytes(b"")
    first["sha256"] = "0" * 64
    (tmp_path / second["file"]).write_bytes((tmp_path / second["file"]).read_bytes())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    again = made(parent, tmp_path)
    fresh = made(parent)
    assert all_same(again, fresh)
    assert again.solutions.digest == fresh.solutions.digest
    times = [block.seconds for block in read_solutions(tmp_path)[1]]
    assert times[1] != second["report"]["seconds"]


def test_other_settings_are_refused_with_what_differs(parent: Path, tmp_path: Path) -> None:
    made(parent, tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"options": CalibrationOptions(epochs=2, batch_size=3)}, r"options.epochs: 1 -> 2\)"),
        ({"plan": QuantPlan(QuantSpec(2, 64), skip=FEW.skip)}, r"\(plan.group_size: 32 -> 64\)"),
        ({"input_ids": ids(seed=1)}, r"\(input_ids.sha256\)"),
        ({"input_ids": ids(7)}, r"input_ids.shape: \[8, 12\] -> \[7, 12\]"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=rf"{tmp_path}: this folder holds solutions with other.*{message}"):
            made(parent, tmp_path, **changes)
    model = load(parent)
    with torch.no_grad():
        model.model.norm.weight += 1
    with pytest.raises(UserError, match=r"\(weights\)"):
        calibrate(model, FEW, ids(), QUICK, tmp_path, device="cpu", quiet=True)


def test_folders_of_something_else_are_refused(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="holds no calibration"):
        made(parent, tmp_path)
    with pytest.raises(UserError, match="this file is in the way"):
        made(parent, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="it is damaged"):
        made(parent, tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99"):
        read_solutions(tmp_path)


# --- the edges of what it takes --------------------------------------------------------------------------------------


def test_start_factors_come_from_the_same_pass_and_are_kept(parent: Path, tmp_path: Path) -> None:
    calls: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []

    def factors(residual: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        calls.append((tuple(residual.shape), tuple(moment.shape), rank))
        u, s, vt = torch.linalg.svd(residual)
        return vt[:rank], u[:, :rank] * s[:rank], s[:rank]

    options = CalibrationOptions("importance", start_rank=3)
    found = made(parent, tmp_path, options, factors=factors)
    assert len(calls) == 4
    model = load(parent)
    for (residual, moment, rank), (name, (a, b, singular)) in zip(calls, found.factors.items(), strict=True):
        weight = model.get_submodule(name).weight.detach()
        assert residual == tuple(weight.shape)
        assert moment == (weight.shape[1], weight.shape[1])
        assert (rank, singular.shape) == (3, (3,))
        expected = torch.linalg.svdvals(weight - found.solutions.tensors[name].dequantize())[:3]
        torch.testing.assert_close(singular, expected)
        assert (a.shape, b.shape) == ((3, weight.shape[1]), (weight.shape[0], 3))
    again = made(parent, tmp_path, options, factors=factors)
    assert len(calls) == 4
    for name, kept in again.factors.items():
        assert all(torch.equal(one, other) for one, other in zip(kept, found.factors[name], strict=True))
    with pytest.raises(ValueError, match="go together"):
        made(parent, options=options)


def test_layers_along_the_other_axis_and_blocks_left_alone(parent: Path) -> None:
    plan = QuantPlan(QuantSpec(2, 32, axis=0), skip=("*.layers.0.*",))
    found = made(parent, plan=plan)
    assert [block.name for block in found.blocks] == ["model.layers.1"]
    assert set(found.blocks[0].losses) == {"data-free", "importance"}
    with pytest.raises(UserError, match=r"model.layers.1.self_attn.q_proj: error feedback needs axis 1"):
        made(parent, options=CalibrationOptions("feedback"), plan=plan)


def test_a_parent_in_16_bits(parent: Path) -> None:
    found = calibrate(load(parent, torch.bfloat16), FEW, ids(), QUICK, device="cpu", quiet=True)
    assert all(0 < block.loss <= block.curve[0] for block in found.blocks)


def test_options_and_samples_out_of_range_are_refused(parent: Path) -> None:
    for changes, message in [
        ({"method": "gptq"}, "method is 'gptq': it must be importance or feedback or block"),
        ({"store": "gpu"}, "store is 'gpu'"),
        ({"epochs": -1}, "epochs is -1: it must be a whole number, 0 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0: it must be a number"),
        ({"held_out": 1.0}, "held_out is 1.0: it must be a share"),
    ]:
        with pytest.raises(UserError, match=message):
            CalibrationOptions(**changes)  # type: ignore[arg-type]
    for tokens, message in [
        (ids()[0], r"int64 of shape \(12,\)"),
        (ids().float(), "float32"),
        (ids(1), "there is one sample"),
        (ids() + 1000, "outside 0 ... 271"),
    ]:
        with pytest.raises(UserError, match=message):
            made(parent, input_ids=tokens)
    with pytest.raises(UserError, match="disk needs a folder"):
        made(parent, options=CalibrationOptions(store="disk"))
    with pytest.raises(UserError, match="no block of LlamaForCausalLM has a layer to quantize"):
        made(parent, plan=QuantPlan(QuantSpec(), {"lm_head": {"nbits": 8}}, ("*.layers.*",)))


def test_weights_and_activations_that_are_not_finite_are_named(parent: Path) -> None:
    for name, value, message in [
        ("model.layers.1.mlp.up_proj", float("nan"), "model.layers.1"),
        ("model.layers.0.input_layernorm", float("inf"), "outputs of model.layers.0 are not finite"),
    ]:
        model = load(parent)
        with torch.no_grad():
            model.get_submodule(name).weight.fill_(value)
        with pytest.raises(UserError, match=message):
            calibrate(model, FEW, ids(), QUICK, device="cpu", quiet=True)


def test_a_line_for_each_block_where_there_is_no_terminal(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = made(parent, quiet=False)
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.startswith("model.layers")]
    assert len(lines) == 2
    report = found.blocks[1]
    assert lines[1].startswith(f"model.layers.1 (2 of 2): loss {report.before:.4g} -> {report.loss:.4g}, ")


# --- the hook --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_with_these_tensors(parent: Path, tmp_path: Path) -> None:
    found = made(parent, tmp_path / "solutions", CalibrationOptions("importance"), PLAN)
    solutions, _ = read_solutions(tmp_path / "solutions")
    config = HqqPlusConfig.from_plan(PLAN)
    with packed_already(solutions):
        result = quantize_checkpoint(str(parent), tmp_path / "packed", config, device="cpu", quiet=True)
        loaded_so = models.load_causal_lm(str(parent), quantization=config, device="cpu")
    assert result.streamed
    packed = packed_modules(hqqplus.load(str(tmp_path / "packed"), device="cpu"))
    assert set(packed) == set(found.solutions.tensors)
    for name, module in packed.items():
        assert same(module.packed(), found.solutions.tensors[name])
        assert same(packed_modules(loaded_so)[name].packed(), found.solutions.tensors[name])
    statistics = {name: entry for block in found.blocks for name, entry in block.layers.items()}
    assert {layer.name: layer.statistics for layer in result.layers.layers} == statistics
    plain = quantize_checkpoint(str(parent), tmp_path / "plain", config, device="cpu", quiet=True)
    assert plain.fingerprint.packed_sha256 != result.fingerprint.packed_sha256
