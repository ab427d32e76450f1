"""`hqqplus estimate`: published sizes, every recipe, every card, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from hqqplus.cli import app
from hqqplus.errors import UserError
from hqqplus.estimation.cards import CARDS, find_card
from hqqplus.estimation.estimate import estimate
from hqqplus.estimation.optimizers import is_known, state_bytes
from hqqplus.estimation.parts import backbone_parts
from hqqplus.estimation.simulation import simulated
from hqqplus.integrations.bare import bare_model, repeats
from hqqplus.recipe import load_recipe
from tests.conftest import ROOT
from tests.families import FAMILIES
from tests.recipes import SMALLEST, write

EMBEDDED = ROOT / "recipes" / "embedded_2bit.yaml"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def _config(folder: Path, kind: str, **settings: Any) -> Path:
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "pad_token_id": 0,
    }
    AutoConfig.for_model(kind, **{**small, **settings}).save_pretrained(folder)
    return folder / "config.json"


def test_llama3_8b_has_its_published_sizes() -> None:
    recipe = load_recipe(ROOT / "recipes" / "llama3_8b_1bit.yaml")
    config = FAMILIES[recipe.model.name_or_path].config()
    parent = bare_model(config, None, torch.bfloat16)
    assert sum(p.numel() for p in parent.parameters()) == 8_030_261_248
    parts = backbone_parts(bare_model(config, recipe.quantization.plan(), torch.bfloat16))
    # 6.98 G weights in linears: a bit each, and two bytes for 32 of them with 8 bytes for 128 groups.
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    assert parts["linears"] == linears / 8
    assert parts["metadata"] == linears / 32 * (2 + 8 / 128)
    assert parts["embedding"] == parts["head"] == 128256 * 4096 * (1 + 4 / 64)
    assert parts["16 bits"] == 2 * 65 * 4096


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    name = recipe.model.name_or_path
    config: Path | None = None
    if not name.startswith("embedded:"):
        FAMILIES[name].small_config(pad_token_id=0).save_pretrained(tmp_path)
        config = tmp_path / "config.json"
    found = estimate(recipe, config=config)
    assert len(found.fits) == len(CARDS)
    json.dumps(found.to_json(), allow_nan=False)
    assert found.cache > 0
    assert found.training.activations > found.training.kept > 0
    assert found.distils == (recipe.recovery.loss == "kd")


@pytest.mark.slow
def test_verb() -> None:
    runner = CliRunner()
    changes = ["data.max_length=64", "training.gradient_checkpointing=true"]
    done = runner.invoke(app, ["estimate", str(EMBEDDED), *changes, "--context", "100", "--gpu", "l4", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["unit"] == "bytes"
    assert found["context"] == 100
    assert found["training"]["checkpointing"] is True
    assert found["training"]["activations"] < found["training"]["activations_other"]
    assert [fit["card"]["name"] for fit in found["fits"]] == ["L4"]
    (fit,) = found["fits"]
    assert fit["fits"] == {"quantize": True, "train": True, "infer": True}
    assert fit["card"]["usable"] == pytest.approx(22.05e9, rel=1e-3)
    step, backbone = found["training"], sum(found["backbone"].values())
    static = backbone + step["trained"] + step["gradients"] + step["optimizer_state"] + found["teachers"]["online"]
    assert fit["train"] == pytest.approx(max(static + step["activations"] + step["workspace"], found["measure"]))
    # Embedding and head are one tensor, 1 byte a weight and its metadata; it is stored once.
    assert found["backbone"]["head"] == 0
    assert found["disk"]["packed"] == found["disk"]["backbone"] > 0


@pytest.mark.slow
def test_page(tmp_path: Path) -> None:
    """What does not fit is said, in a text without anything that only a terminal understands."""
    config = _config(tmp_path, "llama", vocab_size=2000, max_position_embeddings=2**17)
    recipe = write(tmp_path, SMALLEST)
    arguments = [
        "estimate",
        str(recipe),
        "--config",
        str(config),
        "--context",
        str(2**17),
        "training.optim=galore_adamw",
    ]
    done = CliRunner().invoke(app, [*arguments, "training.per_device_train_batch_size=8192"])
    assert done.exit_code == 0, done.output
    assert "some/model: LlamaForCausalLM" in done.stdout
    assert "8192 x 1024 tokens" in done.stdout
    assert "galore_adamw, its state not known" in done.stdout
    assert "cache of 131,072 tokens" in done.stdout
    assert "quantizing weights does not shrink it" in done.stdout
    assert "no training.max_steps" in done.stdout
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "NO" in rows["T4"]
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu", "voodoo"], "--gpu: 'voodoo' is none of T4, L4, A10, 4090, A100-40, A100-80, H100, H200"),
        (["--config", "no/such.json"], "--config: no/such.json: no such file"),
        (["model.name_or_path=./nowhere"], "model.name_or_path: ./nowhere: no such folder"),
        (["model.name_or_path=some/model"], "give the model's config.json with --config FILE"),
    ],
)
def test_refused(arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(app, ["estimate", str(EMBEDDED), *arguments])
    assert isinstance(done.exception, UserError)
    assert sentence in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(UserError, match=r"--config: .*nonsense"):
        estimate(load_recipe(EMBEDDED), config=tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(UserError, match="another method"):
        bare_model(AutoConfig.from_pretrained(tmp_path), None, torch.bfloat16)


def test_cards() -> None:
    for name, found in (("NVIDIA L4", "L4"), ("rtx 4090", "4090"), ("a100 80GB", "A100-80"), ("H200-SXM", "H200")):
        assert find_card(name).name == found
    for card in CARDS:
        assert find_card(card.name) is card
        assert 0 < card.usable < card.total


def test_optimizers() -> None:
    from transformers.training_args import OptimizerNames

    shapes = [(64, 128), (100,)]
    assert state_bytes("adamw_torch", shapes) == 8 * (64 * 128 + 100)
    assert state_bytes("sgd", shapes) == 0
    assert state_bytes("adafactor", shapes) == 4 * (64 + 128 + 100)
    names = {name.value for name in OptimizerNames}
    assert is_known("paged_adamw_8bit")
    assert not is_known("galore_adamw")
    assert {name for name in names if name.startswith(("adamw_torch", "paged_", "lion"))} - {
        name for name in names if is_known(name)
    } <= {"adamw_torch_4bit", "adamw_torch_8bit"}


def test_blocks_that_repeat() -> None:
    def of(kind: str, **settings: Any) -> tuple[int, int]:
        from hqqplus.allocation import decoder_blocks

        config = AutoConfig.for_model(
            kind, hidden_size=32, vocab_size=64, intermediate_size=64, pad_token_id=0, **settings
        )
        model = bare_model(config, None, torch.float32)
        kinds, period = repeats(model, decoder_blocks(model))
        return len(set(kinds)), period

    assert of("llama", num_hidden_layers=5) == (1, 1)
    assert of("gemma3_text", num_hidden_layers=13) == (2, 6)  # five local ones, then a global one


def test_simulation_counts_what_lives() -> None:
    with simulated() as live:
        before = torch.empty(1000)
        live.start()
        assert before[1:].sum().item() == 0  # a view of what was there, and no data
        a = torch.empty(10, 10) + 1
        assert live.now >= 400
        b = a.t()[2:]  # the same storage
        now = live.now
        assert b.untyped_storage()._cdata == a.untyped_storage()._cdata
        c = a @ a
        assert live.now == now + 400
        del a, b
        assert live.now == now
        del c
        assert live.now == now - 400
        assert live.peak >= now + 400
        mask = torch.empty(10, 10) > 0
        assert torch.empty(10, 10, 3)[mask].shape == (100, 3)
    assert math.isfinite(live.peak)
