"""An adapter in 8 bits: what it takes, what it loses, what is restored, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

import hqqplus
from hqqplus import HqqPlusConfig, models
from hqqplus.adapters import eight_bit
from hqqplus.errors import UserError
from hqqplus.recipe import load_recipe
from tests.conftest import ROOT, load_benchmark
from tests.fuzz.mutate import mutated, mutated_json, mutated_safetensors
from tests.fuzz.oracle import judged
from tests.fuzz.oracle import run as run_examples
from tests.shipping import ship_random_adapter

IDS = torch.arange(3, 35).view(1, -1)


def packed_and_back(state: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    eight_bit.write_packed(state, folder)
    return eight_bit.unpack_state(folder)


@given(rows=st.integers(1, 70), columns=st.integers(1, 300), power=st.integers(-30, 20), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_what_is_restored_is_near(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, power: int, seed: int
) -> None:
    """Whatever the shape, and however small the values."""
    torch.manual_seed(seed)
    matrix = (torch.randn(rows, columns) * 2.0**power).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("packed")
    restored = packed_and_back({"a": matrix}, folder)["a"]
    assert (restored.dtype, restored.shape) == (torch.bfloat16, matrix.shape)
    along = 1 if columns >= rows else 0
    groups = matrix.float().abs() if along else matrix.float().abs().t()
    bound = torch.stack([piece.amax(1) for piece in groups.split(64, 1)], 1).repeat_interleave(64, 1)
    bound = bound[:, : groups.shape[1]] if along else bound[:, : groups.shape[1]].t()
    # A step of the group's grid is at most 2 max / 255; half of it, the rounding of its metadata, and that to bf16.
    assert ((restored.float() - matrix.float()).abs() <= bound * (1 / 255 + 2**-10 + 2**-8)).all()
    shapes = {name: tuple(tensor.shape) for name, tensor in {"a": matrix}.items()}
    stored = sum(tensor.numel() * tensor.element_size() for tensor in load_file(folder / eight_bit.WEIGHTS).values())
    assert stored == eight_bit.stored_bytes(shapes) <= 2 * matrix.numel()


def test_what_is_no_matrix_stays(tmp_path: Path) -> None:
    state = {"gain": torch.randn(100), "zero": torch.zeros(4, 64), "small": torch.randn(3, 2), "a": torch.randn(4, 64)}
    restored = packed_and_back(state, tmp_path / "one")
    assert restored.keys() == state.keys()
    assert torch.equal(restored["gain"], state["gain"].to(torch.bfloat16))
    assert torch.equal(restored["small"], state["small"].to(torch.bfloat16))
    assert torch.equal(restored["zero"], state["zero"].to(torch.bfloat16))
    index = json.loads((tmp_path / "one" / eight_bit.INDEX).read_text())
    assert sorted(index["matrices"]) == ["a", "zero"]
    # 8 bits a code, 16 for the scale and 16 for the offset of 64 of them.
    assert eight_bit.stored_bytes({"a": (4, 64)}) == 4 * 64 + 4 * 4
    assert eight_bit.stored_bytes({"a": (64, 4), "b": (10,)}) == 4 * 64 + 4 * 4 + 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    matrix = torch.randn(4, 64)
    matrix[1, 2] = bad
    with pytest.raises(UserError, match=r"^lora_A: .*NaN or infinite"):
        eight_bit.pack_state({"lora_A": matrix})


@pytest.mark.slow
def test_an_8b_at_the_shipped_recipes_is_below_60_mb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = load_benchmark("adapter_bits")
    shapes = benchmark.eight_b_shapes(load_recipe(str(ROOT / "recipes" / "llama3_8b_2bit.yaml")))
    assert len(shapes) == 2 * 7 * 32
    assert 2 * sum(rows * columns for rows, columns in shapes.values()) == 56_098_816 < 60_000_000
    assert eight_bit.stored_bytes(shapes) == 29_802_496


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A packed model, an adapter in bf16 and the same in 8 bits."""
    folder = tmp_path_factory.mktemp("made")
    hqqplus.quantize_folder(str(random_model("llama")), folder / "packed", HqqPlusConfig(nbits=2, group_size=32))
    model = ship_random_adapter(folder / "packed", folder / "adapter")
    eight = folder / "eight"
    shutil.copytree(folder / "adapter", eight)
    (eight / eight_bit.STANDARD).unlink()
    eight_bit.write_packed(load_file(folder / "adapter" / eight_bit.STANDARD), eight)
    return SimpleNamespace(packed=folder / "packed", adapter=folder / "adapter", eight=eight, logits=model(IDS).logits)


def test_every_reader_restores_it(made: SimpleNamespace, tmp_path: Path) -> None:
    base = hqqplus.load(made.packed)(IDS).logits
    logits = hqqplus.load(made.packed, made.eight)(IDS).logits
    change, error = made.logits - base, logits - made.logits
    assert 0 < error.norm() < 0.03 * change.norm()
    assert torch.equal(hqqplus.load(made.eight)(IDS).logits, logits)
    model, _ = models.load_with_tokenizer(made.packed, made.eight)
    assert torch.equal(model(IDS).logits, logits)
    # For PEFT alone: a standard folder that says the same, to the bit.
    eight_bit.restore(made.eight, tmp_path / "standard")
    names = sorted(path.name for path in made.adapter.iterdir())
    assert sorted(path.name for path in (tmp_path / "standard").iterdir()) == names
    peft = PeftModel.from_pretrained(hqqplus.load(made.packed), tmp_path / "standard").eval()
    assert torch.equal(peft(IDS).logits, logits)
    tensors = load_file(tmp_path / "standard" / eight_bit.STANDARD)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors.keys() == load_file(made.adapter / eight_bit.STANDARD).keys()


def test_peft_alone_refuses_it(made: SimpleNamespace) -> None:
    with pytest.raises(Exception, match=r"Repo id|adapter_model|find"):
        PeftModel.from_pretrained(hqqplus.load(made.packed), str(made.eight))


def lose_the_index(folder: Path) -> None:
    (folder / eight_bit.INDEX).unlink()


def truncate(folder: Path) -> None:
    path = folder / eight_bit.WEIGHTS
    path.write_bytes(path.read_bytes()[:-40])


def edit(folder: Path, change: Callable[[dict[str, Any], str], Any]) -> None:
    values = json.loads((folder / eight_bit.INDEX).read_text())
    change(values, next(iter(values["matrices"])))
    (folder / eight_bit.INDEX).write_text(json.dumps(values))


def ask_for_another_shape(folder: Path) -> None:
    edit(folder, lambda values, name: values["matrices"][name].update(shape=[4, 160]))


def ask_for_a_gigantic_shape(folder: Path) -> None:
    edit(folder, lambda values, name: values["matrices"][name].update(shape=[2**40, 2**40]))


def ask_for_more(folder: Path) -> None:
    edit(folder, lambda values, name: values["matrices"].update(other=values["matrices"][name]))


def forget_one(folder: Path) -> None:
    edit(folder, lambda values, name: values["matrices"].pop(name))


def be_of_a_later_format(folder: Path) -> None:
    edit(folder, lambda values, name: values.update(format=2))


def no_exponent(folder: Path) -> None:
    edit(folder, lambda values, name: values["matrices"][name].update(exponent=5000))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_the_index, "no adapter_8bit.json, which says what is in it"),
        (truncate, "a weight file is truncated or damaged"),
        (ask_for_another_shape, r"W_q is uint8 \(4, 128\), and adapter_8bit.json asks for uint8 \(4, 192\)"),
        (ask_for_a_gigantic_shape, "asks for uint8"),
        (ask_for_more, "adapter_8bit.safetensors lacks other.W_q"),
        (forget_one, "W_q is a part of a packed tensor, and adapter_8bit.json does not speak of it"),
        (be_of_a_later_format, "its format is 2, this hqqplus reads 1"),
        (no_exponent, "expected a shape of two sizes, an axis and an exponent"),
    ],
)
def test_what_is_damaged_is_named(
    made: SimpleNamespace, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = Path(shutil.copytree(made.eight, tmp_path / "eight"))
    damage(folder)
    base = models.load(made.packed)
    with pytest.raises(UserError, match=rf"^adapter: {folder}: .*{message}") as caught:
        models.put_adapter(base, folder, check=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=rf"^adapter: {folder}: .*{message}"):
        eight_bit.restore(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["eight"]


def test_a_standard_adapter_is_not_restored(made: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this folder holds no adapter in 8 bits"):
        eight_bit.restore(made.adapter, tmp_path / "out")
    with eight_bit.standard(made.adapter) as folder:
        assert folder == made.adapter
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("examples", [60, pytest.param(1200, marks=[pytest.mark.slow, pytest.mark.long])])
def test_files_of_somebody_else(tmp_path: Path, examples: int) -> None:
    eight_bit.write_packed({"x.lora_A.weight": torch.randn(4, 64), "x.lora_gain_in": torch.randn(8)}, tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in (eight_bit.WEIGHTS, eight_bit.INDEX)}
    files = st.one_of(
        st.tuples(st.just(eight_bit.WEIGHTS), mutated_safetensors(whole[eight_bit.WEIGHTS])),
        st.tuples(st.just(eight_bit.INDEX), mutated_json([json.loads(whole[eight_bit.INDEX])])),
        st.tuples(st.just(eight_bit.INDEX), mutated((whole[eight_bit.INDEX],))),
    )

    def check(example: tuple[str, bytes]) -> None:
        name, content = example
        (tmp_path / name).write_bytes(content)
        try:
            judged(lambda: eight_bit.unpack_state(tmp_path))
        finally:
            (tmp_path / name).write_bytes(whole[name])

    run_examples(examples, files, check)


def test_twice_the_same_tensor(tmp_path: Path) -> None:
    eight_bit.write_packed({"a": torch.randn(4, 64)}, tmp_path)
    tensors = load_file(tmp_path / eight_bit.WEIGHTS)
    save_file({**tensors, "a": torch.zeros(4, 64)}, tmp_path / eight_bit.WEIGHTS)
    with pytest.raises(UserError, match="a is there twice"):
        eight_bit.unpack_state(tmp_path)
