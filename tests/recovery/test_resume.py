"""A run that is killed and started again ends where an uninterrupted one does, to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import ROOT

WORDS = [
    "the",
    "of",
    "a",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
]


@pytest.fixture(scope="module")
def recipe(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a recipe whose output goes to a folder of the given name; everything that can be random is on."""
    folder = tmp_path_factory.mktemp("resume")
    rows = [{"text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 16))} for i in range(1, 60)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def write(name: str) -> Path:
        values: dict[str, Any] = {
            "model": {"name_or_path": str(random_model("llama"))},
            "quantization": {"nbits": 2, "group_size": 32},
            "adapter": {"r": 4, "lora_dropout": 0.1},
            "data": {"path_or_name": str(folder / "train.jsonl"), "max_length": 64},
            "training": {
                "max_steps": 24,
                "save_steps": 4,
                "eval_steps": 8,
                "logging_steps": 1,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2,
                "optim": "paged_adamw_8bit",
                "warmup_steps": 2,
            },
            "evaluation": {"max_tokens": 500, "prompts": ["the"], "max_new_tokens": 4},
            "output_dir": str(folder / name),
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def start(recipe: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hqqplus.train", str(recipe)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(recipe: Path) -> str:
    process = start(recipe)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_killed_and_continued_equals_uninterrupted(recipe: Callable[[str], Path]) -> None:
    whole, killed = recipe("whole"), recipe("killed")
    finish(whole)

    folder = killed.parent / "killed"
    process = start(killed)
    while not (folder / "checkpoint-8" / "hqqplus_checkpoint.json").is_file():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (folder / "adapter").exists()
    # What a process killed in the middle of a save leaves behind: a newer checkpoint that is none.
    (folder / "checkpoint-1000").mkdir()
    (folder / "checkpoint-1000" / "adapter_config.json").write_text("{")

    output = finish(killed)
    assert "checkpoint-1000 is incomplete" in output
    assert "continuing from" in output
    ours, theirs = (load_file(whole.parent / n / "adapter" / "adapter_model.safetensors") for n in ("killed", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    reports = [json.loads((whole.parent / n / "report.json").read_text()) for n in ("killed", "whole")]
    for key in ("ppl_parent", "ppl_quantized", "ppl_recovered", "loss_curve", "ppl_curve", "samples"):
        assert reports[0][key] == reports[1][key], key

    # Once more on a finished run: nothing is left to train, and the result stands.
    again = finish(killed)
    assert "continuing from" in again
    assert load_file(folder / "adapter" / "adapter_model.safetensors").keys() == ours.keys()
    repeated = json.loads((folder / "report.json").read_text())
    assert repeated["ppl_recovered"] == reports[0]["ppl_recovered"]
    assert repeated["tokens_per_second"] > 0


@pytest.mark.slow
def test_another_recipe_is_not_continued(recipe: Callable[[str], Path]) -> None:
    path = recipe("other")
    short = ["training.max_steps=4", "training.eval_steps=4"]
    command = [sys.executable, "-m", "hqqplus.train", str(path), *short]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    changed = subprocess.run([*command, "training.learning_rate=0.5"], cwd=ROOT, capture_output=True, text=True)
    assert changed.returncode == 2
    assert "training.learning_rate: 0.01 -> 0.5" in changed.stderr
    assert "Traceback" not in changed.stderr
