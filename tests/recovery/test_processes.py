"""Two processes on the CPU (gloo) train one adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.mark.slow
def test_two_processes_run_to_the_end(
    random_model: Callable[..., Path], tmp_path: Path, run_python: Callable[..., Any]
) -> None:
    rows = [{"text": f"number {i} comes before {i + 1}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "model": {"name_or_path": str(random_model("llama"))},
        "quantization": {"nbits": 2, "group_size": 32, "save_to": str(tmp_path / "base")},
        "adapter": {"r": 4},
        "data": {"path_or_name": str(tmp_path / "rows.jsonl"), "max_length": 64},
        "training": {"max_steps": 4, "per_device_train_batch_size": 2, "eval_steps": 2, "save_steps": 2},
        "evaluation": {"max_tokens": 400, "prompts": ["number"], "max_new_tokens": 3},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hqqplus.train")
    done = run_python(*launch, str(tmp_path / "recipe.yaml"), env=environment)
    assert done.stdout.count("hqqplus: adapter in") == 1, "only one process speaks"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    # The evaluation while training is shared out between the processes, the one at the end is not; they agree on the
    # adapter up to its rounding to bf16.
    assert report["ppl_curve"][-1][1] == pytest.approx(report["ppl_recovered"], rel=1e-2)
    checkpoint = json.loads((tmp_path / "out" / "checkpoint-4" / "hqqplus_checkpoint.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= set(checkpoint["files"])
