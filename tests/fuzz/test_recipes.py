"""Damaged recipes: `load_recipe` with overrides and `extends`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from hqqplus.recipe import load_recipe, recipe_digest, to_dict
from tests.conftest import ROOT
from tests.fuzz.mutate import TOKENS, mutated
from tests.fuzz.oracle import judged, run, tree

EVERY_SECTION = b"""\
# All sections, each with what it can hold.
extends: base.yaml
model: {name_or_path: some/model, revision: main, dtype: bfloat16, trust_remote_code: false}
quantization:
  nbits: 2
  group_size: 32
  overrides:
    "*.down_proj": {nbits: 4, group_size: 64}
    lm_head: {nbits: 8}
  lp_norm: 0.7
calibration: {method: block, samples: 16, epochs: 2}
adapter:
  r: 8
  lora_alpha: 1.6e+1
  target_modules: [q_proj, v_proj]
  rank_pattern: {"*.q_proj": 4}
data: {path_or_name: some/data, prompt: question, completion: "answer", max_length: 128}
recovery: {loss: kd, kl_weight: 1, scales: bake}
training:
  max_steps: 10
  learning_rate: 1e-4
  optim: adamw_torch_fused
evaluation:
  texts: {wiki: texts.txt}
  prompts:
    - Once upon a time
    - |
      Zwei Zeilen:
      \xc3\xbcber alles
tracking: {report_to: none}
output_dir: runs/x
seed: 7
"""
BASE = b"data: {path_or_name: other}\nquantization: {nbits: 1}\n"
SEEDS = (EVERY_SECTION, BASE, *(path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))))

_PARTS = st.sampled_from(
    (
        "training",
        "max_steps",
        "quantization",
        "overrides",
        "nbits",
        "adapter",
        "r",
        "extends",
        "seed",
        "data",
        "",
        "0",
        "x",
    )
)
_KEYS = st.lists(_PARTS, min_size=1, max_size=5).map(".".join)
_VALUES = st.one_of(
    st.sampled_from(TOKENS).map(lambda token: token.decode("utf-8", "surrogateescape")),
    st.text(max_size=20),
    st.integers().map(str),
    st.sampled_from(("{nbits: 4}", "[1, 2]", "null", "1e-4", "{a: {b: c}}", "&a [*a]")),
)
OVERRIDES = st.lists(st.one_of(st.builds("{}={}".format, _KEYS, _VALUES), st.text(max_size=30), _KEYS), max_size=3)


@pytest.mark.parametrize("examples", [150, pytest.param(4000, marks=[pytest.mark.slow, pytest.mark.long])])
def test_recipes(tmp_path: Path, examples: int) -> None:
    def check(example: tuple[bytes, bytes, list[str]]) -> None:
        content, base, overrides = example
        (tmp_path / "recipe.yaml").write_bytes(content)
        (tmp_path / "base.yaml").write_bytes(base)
        before = tree(tmp_path)
        recipe = judged(lambda: load_recipe(tmp_path / "recipe.yaml", overrides))
        if recipe is not None:
            recipe_digest(recipe)
            to_dict(recipe)
        assert tree(tmp_path) == before

    bases = st.one_of(st.just(BASE), st.just(b"extends: recipe.yaml\n"), mutated((BASE, EVERY_SECTION)))
    run(examples, st.tuples(mutated(SEEDS), bases, st.one_of(st.just([]), OVERRIDES)), check)


@pytest.mark.parametrize(
    "content",
    [
        b"a: " + b"[" * 200_000,
        b"- " * 200_000,
        b"? " * 200_000,
        b"{a: " * 100_000,
        b"[a," * 100_000,
        b"a:\n" * 60_000,
        b"x" * 400_000 + b": 1",
        b"!" * 500_000,
        b"&a " * 150_000,
        b"'" * 1_000_000,
        b"a: |\n" + b"  x\n" * 60_000,
        b"\n" * 300_000,
        b"".join(b"k%d: 1\n" % n for n in range(3000)),
    ],
    ids=lambda content: repr(content[:8]),
)
def test_large_ones(tmp_path: Path, content: bytes) -> None:
    """Hundreds of kilobytes of one and the same: none of it takes memory, or time, that grows faster than the file."""
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert judged(lambda: load_recipe(tmp_path / "recipe.yaml")) is None


def test_an_endless_file() -> None:
    assert judged(lambda: load_recipe("/dev/zero")) is None


def aliases(levels: int, width: int) -> bytes:
    lines = [b"model: {name_or_path: x}\ndata: {path_or_name: y}\noutput_dir: z\n", b"a0: &a0 [x]\n"]
    lines += [b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * width)) for n in range(1, levels)]
    return b"".join(lines)


@pytest.mark.parametrize(("levels", "width"), [(9, 9), (30, 2), (3, 9000)])
def test_aliases_that_multiply(tmp_path: Path, levels: int, width: int) -> None:
    (tmp_path / "recipe.yaml").write_bytes(aliases(levels, width))
    with pytest.raises(Exception, match=r"recipe\.yaml:\d+: too much for a recipe: ") as refused:
        load_recipe(tmp_path / "recipe.yaml")
    assert str(refused.value).count("\n") == 0


def test_aliases_of_a_reasonable_size(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(
        b"model: {name_or_path: &name x}\ndata: {path_or_name: *name}\noutput_dir: *name\n"
        b"quantization: {overrides: {a: &four {nbits: 4}, b: *four}}\n"
    )
    recipe: Any = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.output_dir == "x"
    assert {name: dict(changes) for name, changes in recipe.quantization.overrides.items()} == {
        "a": {"nbits": 4},
        "b": {"nbits": 4},
    }
