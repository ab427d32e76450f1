"""The same recovery twice: the reference route (PyPI hqq + PEFT + TRL) and ours, at equal bits, rank, data, steps and
seed.

    python benchmarks/recovery_vs_reference.py [--rank 2] [--steps 400] [--output benchmarks/results/...]

Needs `../shared` (tinystories-656K and its text). Both routes are measured by `hqqplus.evaluation.perplexity` on the
same windows, in domain (TinyStories validation) and out of domain (WikiText-2 validation).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def recipe_dict(args: argparse.Namespace, output_dir: str) -> dict[str, Any]:
    """What both routes are given; the reference route takes what it knows of."""
    stories = SHARED / "data" / "tinystories"
    return {
        "model": {"name_or_path": str(SHARED / "models" / args.model)},
        "quantization": {"nbits": args.nbits, "group_size": args.group_size, "metadata_bits": 16},  # as hqq has
        "adapter": {
            "r": args.rank,
            "lora_alpha": 2 * args.rank,
            "target_modules": PROJECTIONS,
            "init": args.init,
            "use_dora": args.dora,
        },
        "data": {
            "path_or_name": str(stories / "train_v2.jsonl"),
            "eval_path_or_name": str(stories / "validation.jsonl"),
            "max_length": 256,
        },
        "training": {
            "max_steps": args.steps,
            "per_device_train_batch_size": 8,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "logging_steps": 50,
            "save_strategy": "no",
            "optim": "adamw_torch",
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        },
        "evaluation": {
            "max_tokens": 40000,
            "texts": {"wikitext-2": str(SHARED / "data" / "wikitext-2" / "validation.txt")},
        },
        "output_dir": output_dir,
        "seed": args.seed,
    }


def reference_route(recipe: Any, axis: int) -> dict[str, Any]:
    """hqq's layers, PEFT's default start, TRL's trainer: nothing of ours but the data reading and the measuring."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed
    from trl import SFTTrainer

    from hqqplus import models
    from hqqplus.evaluation.perplexity import make_windows
    from hqqplus.integrations.trl import sft_config
    from hqqplus.recovery import setup
    from hqqplus.recovery.measure import Meter

    tokenizer = models.load_tokenizer(recipe.model.name_or_path)
    model = models.load_causal_lm(recipe.model.name_or_path, dtype="float32", device="cpu")
    data = setup.load_data(recipe, tokenizer, print)
    windows = {
        name: make_windows(texts, tokenizer, recipe.data.max_length, recipe.evaluation.max_tokens, name)
        for name, texts in data.texts.items()
    }
    meter = Meter(windows, tokenizer, (), 1, 8)
    config = BaseQuantizeConfig(nbits=recipe.quantization.nbits, group_size=recipe.quantization.group_size, axis=axis)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.set_submodule(name, packed)
    quantized = meter.measure(model, 0).perplexities
    model.requires_grad_(False)
    set_seed(recipe.seed)
    section = recipe.adapter
    adapter = LoraConfig(
        r=section.r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=list(section.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, adapter)
    with tempfile.TemporaryDirectory() as folder:
        settings = {**setup.trainer_settings(recipe, torch.device("cpu"), print), "output_dir": folder}
        trainer = SFTTrainer(
            model=model, args=sft_config(settings, "benchmark"), train_dataset=data.train, processing_class=tokenizer
        )
        trainer.train()
    recovered = meter.measure(trainer.model, 0).perplexities
    return {"quantized": quantized, "recovered": recovered}


def our_route(recipe: Any) -> dict[str, Any]:
    from hqqplus.recovery.setup import EVALUATION_SET
    from hqqplus.train import run

    report = run(recipe)
    sets = {EVALUATION_SET: {stage: getattr(report, f"ppl_{stage}") for stage in ("parent", "quantized", "recovered")}}
    sets |= report.texts
    return {
        stage: {name: values[stage] for name, values in sets.items()} for stage in ("parent", "quantized", "recovered")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinystories-656K")
    parser.add_argument("--nbits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", default="residual", help="our LoRA start: residual or default")
    parser.add_argument("--dora", action="store_true", help="ours with DoRA")
    parser.add_argument("--axis", type=int, nargs="*", default=[0, 1], help="axes of the reference route")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    import yaml

    from hqqplus.evaluation.report import environment
    from hqqplus.recipe import load_recipe

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_dict(args, f"{folder}/ours")))
        recipe = load_recipe(path)
        started = time.monotonic()
        ours = our_route(recipe)
        seconds = {"ours": time.monotonic() - started}
        routes = {"ours": ours}
        for axis in args.axis:
            started = time.monotonic()
            routes[f"hqq axis {axis}"] = reference_route(recipe, axis)
            seconds[f"hqq axis {axis}"] = time.monotonic() - started
    rows = []
    for route, stages in routes.items():
        for name, parent in ours["parent"].items():
            quantized, recovered = stages["quantized"][name], stages["recovered"][name]
            gap = math.log(recovered / parent)
            rows.append(
                {
                    "route": route,
                    "set": name,
                    "parent": parent,
                    "quantized": quantized,
                    "recovered": recovered,
                    "ln_gap": gap,
                }
            )
            print(f"{route:12} {name:12} {parent:9.2f} -> {quantized:9.2f} -> {recovered:9.2f}   ln gap {gap:.4f}")
    result = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "rows": rows,
        "seconds": seconds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {**environment(), "hqq": __import__("importlib.metadata").metadata.version("hqq")},
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
