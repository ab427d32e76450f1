"""The whole run, small: every form of data, every way to name a model, and what it leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import hqqplus
from hqqplus.evaluation.page import report_on
from hqqplus.evaluation.report import number
from hqqplus.modules import packed_modules
from hqqplus.recipe import load_recipe
from hqqplus.train import main, run

pytestmark = pytest.mark.slow

KEYS = {
    "ppl_parent",
    "ppl_quantized",
    "ppl_recovered",
    "recovery",
    "bits_per_weight",
    "backbone_bytes",
    "adapter_bytes",
    "adapter_parameters",
    "train_seconds",
    "tokens_per_second",
    "samples",
}
IDS = torch.arange(3, 35).view(1, -1)


@pytest.fixture
def make(random_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe of two steps; keyword arguments `section__key` replace values."""

    def write(**changes: Any) -> Path:
        rows = [{"text": f"number {i} comes before {i + 1}", "q": f"after {i}?", "a": f"{i + 1}"} for i in range(40)]
        for row in rows:
            row |= {"instruction": row["q"], "output": row["a"]}
            row["chat"] = [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]  # type: ignore[assignment]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        values: dict[str, Any] = {
            "model": {"name_or_path": str(random_model("llama"))},
            "quantization": {"nbits": 2, "group_size": 32},
            "adapter": {"r": 4},
            "data": {"path_or_name": str(tmp_path / "rows.jsonl"), "max_length": 64},
            "training": {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1},
            "evaluation": {"max_tokens": 400, "prompts": ["number"], "max_new_tokens": 3},
            "output_dir": str(tmp_path / "out"),
        }
        for name, value in changes.items():
            section, _, key = name.partition("__")
            values.setdefault(section, {})[key] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_what_a_run_leaves_behind(make: Callable[..., Path], tmp_path: Path, run_python: Callable[..., Any]) -> None:
    recipe = make(training__eval_steps=1)
    done = run_python("-m", "accelerate.commands.launch", "--cpu", "-m", "hqqplus.train", str(recipe), "seed=3")
    out = tmp_path / "out"
    assert "paged_adamw_8bit (the default)" in done.stdout  # the fall-back is said aloud
    assert "step 2 of 2: loss " in done.stdout
    assert "the first row, masked text in brackets: " in done.stdout
    for stream in (done.stdout, done.stderr):  # sensible in a file
        assert "\r" not in stream
        assert "\x1b" not in stream
    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= KEYS
    assert all(math.isfinite(report[k]) for k in KEYS - {"samples", "recovery"})
    assert report["recipe"]["seed"] == 3
    assert report["bits_per_weight"] == pytest.approx(2 + 16.5 / 32, abs=0.01)  # some blocks are not full
    assert len(report["ppl_curve"]) == 2
    assert {p.name for p in out.iterdir()} >= {"report.md", "report.png", "adapter", "checkpoint-2"}
    page = (out / "report.html").read_text()
    assert f'<span class="value">{number(report["ppl_recovered"])}</span>' in page
    assert len(json.loads((out / "layers.json").read_text())["layers"]) == 14
    assert report["costs"]["stages"].keys() == {
        *("measure parent", "quantize", "measure quantized", "train", "measure recovered")
    }
    assert report["costs"]["stages"]["train"]["seconds"] == report["train_seconds"]
    assert report_on(out, tmp_path / "again.html").read_text() == page
    assert not (out / "README.md").exists()

    adapter = out / "adapter"
    names = {p.name for p in adapter.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "hqqplus.json", "README.md", "tokenizer.json"}
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert sum(t.numel() for t in tensors.values()) == report["adapter_parameters"]
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == report["adapter_bytes"]
    card = (adapter / "README.md").read_text()
    assert "import hqqplus" in card
    assert f"{report['ppl_recovered']:.2f}" in card

    model = hqqplus.load(adapter)
    size = sum(
        p.numel() * (2 if p.is_floating_point() else p.element_size()) for p in model.get_base_model().parameters()
    )
    assert size - report["adapter_bytes"] == report["backbone_bytes"]


def test_quiet_and_for_programs(make: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = str(make(evaluation__parent=False, evaluation__prompts=[]))
    capfd.readouterr()
    assert main([recipe, "--json"]) == 0
    out, err = capfd.readouterr()
    values = json.loads(out)
    assert values == json.loads((tmp_path / "out" / "report.json").read_text())
    assert "hqqplus: step 2 of 2: loss " in err
    assert "\r" not in err
    # A run that is finished says so, and gives the same.
    assert main([recipe, "--json", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == values
    assert err.startswith("hqqplus: already finished: ")

    assert main([recipe, "--quiet", f"output_dir={tmp_path / 'quiet'}"]) == 0
    out, err = capfd.readouterr()
    assert "step" not in out
    assert "hqqplus: data" not in out
    assert "recovered" in out
    assert out.splitlines()[-1].startswith("hqqplus: adapter in ")
    assert "\r" not in err


@pytest.mark.parametrize(
    "form",
    [
        {"data__prompt": "q", "data__completion": "a"},
        {"data__messages": "chat"},
        {"data__alpaca": True},
        {"data__text_field": "text", "data__packing": True},
        {"data__text_field": "text", "data__eos": False},
    ],
    ids=["prompt-completion", "messages", "alpaca", "packing", "no-eos"],
)
def test_forms_of_data(
    make: Callable[..., Path], random_model: Callable[..., Path], tmp_path: Path, form: dict[str, Any]
) -> None:
    changes = dict(form)
    if "data__messages" in form:
        # a copy of the model whose tokenizer knows how to write a conversation
        import shutil

        shutil.copytree(random_model("llama"), tmp_path / "chatty")
        template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        (tmp_path / "chatty" / "chat_template.jinja").write_text(template)
        changes["model__name_or_path"] = str(tmp_path / "chatty")
    report = run(load_recipe(make(**changes)))
    assert math.isfinite(report.ppl_recovered)
    assert report.tokens_per_second > 0


@pytest.mark.parametrize(
    "adapter",
    [{"adapter__use_dora": True}, {"adapter__use_rslora": True, "adapter__init": "default"}],
    ids=["dora", "rslora-default-start"],
)
def test_kinds_of_adapter_reload_as_measured(
    make: Callable[..., Path], tmp_path: Path, adapter: dict[str, Any]
) -> None:
    report = run(load_recipe(make(**adapter)))
    model = hqqplus.load(tmp_path / "out" / "adapter")
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == report.adapter_parameters
    assert torch.isfinite(model(IDS).logits).all()


def test_a_saved_backbone_is_used_again(make: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(make(quantization__save_to=str(tmp_path / "base"), adapter__init="default"))
    first = run(recipe)
    written = (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns
    other = load_recipe(tmp_path / "recipe.yaml", [f"output_dir={tmp_path / 'second'}"])
    second = run(other)
    assert (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns == written
    assert second.ppl_quantized == first.ppl_quantized
    assert second.ppl_recovered == first.ppl_recovered


def test_a_packed_model_is_trained_as_it_is(make: Callable[..., Path], tmp_path: Path) -> None:
    run(load_recipe(make(quantization__save_to=str(tmp_path / "base"))))
    path = make(model__name_or_path=str(tmp_path / "base"), output__dir="")
    values = yaml.safe_load(path.read_text())
    values.pop("quantization")
    values.pop("output")
    values["output_dir"] = str(tmp_path / "from_packed")
    path.write_text(yaml.safe_dump(values))
    report = run(load_recipe(path))
    assert report.bits_per_weight == pytest.approx(2 + 16.5 / 32, abs=0.01)
    original = json.loads((tmp_path / "out" / "report.json").read_text())
    # parent, quantized model and the residual start are found through the packed folder's fingerprint
    for key in ("ppl_parent", "ppl_quantized", "ppl_recovered"):
        assert getattr(report, key) == original[key]
    assert packed_modules(hqqplus.load(tmp_path / "base", tmp_path / "from_packed" / "adapter"))
    assert main([str(path), "quantization.nbits=4", f"output_dir={tmp_path / 'third'}"]) == 2


def test_recovers_a_real_model(shared: Path, tinystories: Path, make: Callable[..., Path]) -> None:
    changes: dict[str, Any] = {
        "model__name_or_path": str(shared / "models" / "stories260K"),
        "data__path_or_name": str(tinystories / "train_v1.jsonl"),
        "data__eval_path_or_name": str(tinystories / "validation.jsonl"),
        "data__max_length": 256,
        "training__max_steps": 40,
        "training__per_device_train_batch_size": 8,
        "training__learning_rate": 3e-3,
        "training__gradient_checkpointing": False,
        "evaluation__max_tokens": 8000,
    }
    report = run(load_recipe(make(**changes)))
    assert report.ppl_parent is not None
    assert report.recovery is not None
    assert report.ppl_parent < report.ppl_recovered < report.ppl_quantized
    assert report.recovery > 0.4
