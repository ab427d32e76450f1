"""Recovery under one budget: every lever alone, all of them together, and the reference route, on three models.

    python benchmarks/recovery.py --tune    --output benchmarks/results/recovery_tuning.json
    python benchmarks/recovery.py           --output benchmarks/results/recovery.json

A budget is a number of tokens that a run may push through forward and backward passes; what a calibration sees counts
(each of its samples once for the moments and once an epoch), and the training gets the rest. Rank, data, batch, seeds
and evaluation are the same for all methods; adapters have the same size, but where a row says that it trains norms or
gains. Learning rates are tuned by `--tune` for each model, number of bits and method, on stories that neither trains
nor evaluates here.

The reference route: weights that PyPI hqq quantized (dequantized, in nn.Linear, which is the same product), PEFT's
default start, cross-entropy, TRL.

The output is a table of runs, written after each of them: what is in it already is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EMBEDDED = "embedded:pydoc"
MODELS = ("tinystories-656K", "stories260K", EMBEDDED)
# r / width as r 16 at 4,096 would be below 1: 1 is the least there is, 2 what the wider models get.
RANKS = {"tinystories-656K": 2, "stories260K": 1, EMBEDDED: 2}
FORMATS = ((2, 64), (2, 32), (1, 64), (1, 32))
BATCH, LENGTH = 8, 256

REFERENCE, TOGETHER = "reference", "all"
PLAIN: dict[str, Any] = {"adapter": {"init": "residual"}}
BLOCK = {"method": "block", "length": 128, "epochs": 4, "batch_size": 4}
KD = {"loss": "kd", "kl_weight": 1.0, "ce_weight": 0.5, "hidden_weight": 0.5}
BAKE = {"scales": "bake"}
# What each method changes in the recipe of the plain one, which has our solver, the residual start and cross-entropy.
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "+ importance": {"calibration": {"method": "importance", "length": 128}},
    "+ feedback": {"calibration": {"method": "feedback", "length": 128}},
    "+ weighted start": {"calibration": {"method": "importance", "length": 128}, "adapter": {"init": "weighted"}},
    "+ distillation": {"recovery": KD},
    "+ scales": {"recovery": BAKE},
    "+ gains": {"recovery": {"scales": "gains"}},
    "+ norms": {"recovery": {"norms": True}},
    "+ block": {"calibration": BLOCK, "adapter": {"init": "default"}},
    TOGETHER: {"calibration": BLOCK, "adapter": {"init": "default"}, "recovery": {**KD, **BAKE}},
}
# One setting of all levers together changed, at the same rates.
SWEEP: dict[str, dict[str, Any]] = {
    f"{TOGETHER}, {name}": {**METHODS[TOGETHER], **change}
    for name, change in {
        "dropout 0.05": {"adapter": {"init": "default", "lora_dropout": 0.05}},
        "alpha = r": {"alpha_over_rank": 1},
        "alpha = 4 r": {"alpha_over_rank": 4},
        "rank x 2": {"rank_times": 2},
        "half the tokens a step": {"batch": BATCH // 2},
        "twice the tokens a step": {"batch": BATCH * 2},
        "weighted start": {"adapter": {"init": "weighted"}},
        "residual start": {"adapter": {"init": "residual"}},
        "norms": {"recovery": {**KD, **BAKE, "norms": True}},
        "offsets": {"recovery": {**KD, **BAKE, "offsets": True}},
        "no offsets": {"recovery": {**KD, **BAKE, "offsets": False}},
        "no hidden states": {"recovery": {**KD, **BAKE, "hidden_weight": 0.0}},
        "no cross-entropy": {"recovery": {**KD, **BAKE, "ce_weight": 0.0}},
        "no distillation": {"recovery": BAKE},
        "no trained scales": {"recovery": KD},
        "gains for scales": {"recovery": {**KD, "scales": "gains"}},
        "feedback for block": {"calibration": METHODS["+ feedback"]["calibration"]},
    }.items()
}
CALIBRATION_SHARE = 0.5
"""Of a budget, what a block-wise reconstruction gets."""


def data_of(model: str, tuning: bool, folder: str | Path) -> dict[str, Any]:
    """The data section. Without packing: on a CPU attention over packed rows costs what it leaves out."""
    if model == EMBEDDED:
        rows = {"path_or_name": str(pydoc_rows(Path(folder), tuning))}
        held_out = {"eval_path_or_name": EMBEDDED, "eval_split": "train[500:]" if tuning else "validation"}
    else:
        stories = SHARED / "data" / "tinystories"
        rows = {"path_or_name": str(stories / "train_v2.jsonl")}
        held_out = {"eval_path_or_name": str(stories / ("train_v1.jsonl" if tuning else "validation.jsonl"))}
    return {**rows, **held_out, "max_length": LENGTH, "packing": False}


def pydoc_rows(folder: Path, tuning: bool) -> Path:
    """The embedded corpus in rows of `LENGTH` tokens, since most of it is in a few long documents."""
    from hqqplus import models
    from hqqplus.data import load_rows

    path, tokenizer = folder / "pydoc.jsonl", models.load_tokenizer(EMBEDDED)
    texts = load_rows(EMBEDDED, "train[:500]" if tuning else "train")["text"]
    lines = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        cuts = (ids[start : start + LENGTH - 2] for start in range(0, len(ids), LENGTH - 2))
        lines += [json.dumps({"text": tokenizer.decode(cut)}) for cut in cuts if len(cut) >= 32]
    path.write_text("\n".join(lines) + "\n")
    return path


def tokens_a_row(model: str, path: str) -> float:
    """Mean number of tokens of a training row as it is trained on: BOS, text and EOS, cut at `LENGTH`."""
    from hqqplus import models
    from hqqplus.data import load_rows

    tokenizer = models.load_tokenizer(model if model == EMBEDDED else str(SHARED / "models" / model))
    rows = load_rows(path)
    texts = rows["text" if "text" in rows.column_names else rows.column_names[0]]
    lengths = [len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) + 2 for text in texts]
    return sum(min(LENGTH, length) for length in lengths) / len(lengths)


def recipe_of(job: dict[str, Any], output_dir: str) -> dict[str, Any]:
    """The recipe of one run, as `to_dict` has it before defaults."""
    model, tuning = job["model"], job["tuning"]
    name = model if model == EMBEDDED else str(SHARED / "models" / model)
    change = {**METHODS, **SWEEP}.get(job["method"], {})
    batch = change.get("batch", BATCH)
    calibration = dict(change.get("calibration", {}))
    budget = job["tokens"]
    if calibration:
        passes = 1 + calibration.get("epochs", 0) * (calibration["method"] == "block")
        share = CALIBRATION_SHARE if calibration["method"] == "block" else 0.05
        calibration["samples"] = max(8, int(budget * share / passes / calibration["length"]))
        budget -= calibration["samples"] * calibration["length"] * passes
    rate = job["learning_rate"]
    rank = RANKS[model] * change.get("rank_times", 1)
    data = data_of(model, tuning, output_dir)
    steps = max(1, round(budget / (batch * tokens_a_row(model, data["path_or_name"]))))
    return {
        "model": {"name_or_path": name, "dtype": "float32"},
        "quantization": {
            "nbits": job["nbits"],
            "group_size": job["group_size"],
            "save_to": f"{output_dir}/run/base",
        },
        "calibration": calibration,
        "adapter": {
            "r": rank,
            "lora_alpha": rank * change.get("alpha_over_rank", 2),
            "target_modules": PROJECTIONS,
            **{**PLAIN["adapter"], **change.get("adapter", {})},
        },
        "recovery": {**change.get("recovery", {}), "scales_learning_rate": job["scales_learning_rate"]},
        "data": data,
        "training": {
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "logging_steps": 1000,
            "save_strategy": "no",
            "optim": "adamw_torch",
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        },
        "evaluation": {
            "max_tokens": job["eval_tokens"],
            "parent": False,
            "texts": {} if tuning else {"wikitext-2": str(SHARED / "data" / "wikitext-2" / "validation.txt")},
        },
        "output_dir": f"{output_dir}/run",
        "seed": job["seed"],
    }


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Train one method and measure it."""
    import torch
    import yaml

    torch.set_num_threads(1)
    from hqqplus import models
    from hqqplus.evaluation.divergence import divergence
    from hqqplus.evaluation.perplexity import make_windows, perplexity
    from hqqplus.recipe import load_recipe
    from hqqplus.recovery import setup

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_of(job, folder)))
        recipe = load_recipe(path)
        tokenizer = models.load_tokenizer(recipe.model.name_or_path)
        data = setup.load_data(recipe, tokenizer, lambda text: None)
        windows = {
            name: make_windows(texts, tokenizer, LENGTH, job["eval_tokens"], name)
            for name, texts in data.texts.items()
        }
        parent = models.load_causal_lm(recipe.model.name_or_path, dtype="float32", device="cpu")
        started = time.monotonic()
        found = reference(recipe, job, data.train, tokenizer) if job["method"] == REFERENCE else ours(recipe)
        seconds = time.monotonic() - started
        result: dict[str, Any] = {**job, "seconds": seconds, **found["sizes"], "sets": {}}
        for name, at in windows.items():
            result["sets"][name] = row = {
                "parent": perplexity(parent, at).perplexity,
                "quantized": found["quantized"].get(name),
            }
            row["recovered"] = perplexity(found["model"], at).perplexity
            row["gap"] = math.log(row["recovered"] / row["parent"])
            if not job["tuning"]:
                measured = divergence(parent, found["model"], at, 8)
                row["kl"], row["agreement"] = measured.kl, measured.agreement
    return result


def ours(recipe: Any) -> dict[str, Any]:
    import hqqplus
    from hqqplus.modules import packed_modules
    from hqqplus.recovery.summary import ADAPTER_FOLDER
    from hqqplus.train import run

    report = run(recipe)
    output = Path(recipe.output_dir)
    # With the packed folder that the run left beside it.
    model = hqqplus.load(str(output / ADAPTER_FOLDER), dtype="float32", device="cpu")
    layers = packed_modules(model).values()
    weights = sum(layer.matrix_shape[0] * layer.matrix_shape[1] for layer in layers)
    sizes = {
        "bits_per_weight": report.bits_per_weight,
        "strict_bits_per_weight": report.bits_per_weight + 8 * report.adapter_bytes / weights,
        "adapter_bytes": report.adapter_bytes,
        "steps": recipe.training["max_steps"],
    }
    quantized = {setup_name(): report.ppl_quantized}
    quantized |= {name: stages["quantized"] for name, stages in report.texts.items()}
    return {"model": model, "sizes": sizes, "quantized": quantized}


def setup_name() -> str:
    from hqqplus.recovery.setup import EVALUATION_SET

    return EVALUATION_SET


def reference(recipe: Any, job: dict[str, Any], train: Any, tokenizer: Any) -> dict[str, Any]:
    """hqq's weights, PEFT's default LoRA, TRL's trainer; nothing of ours but the reading of the data."""
    import torch
    from common import hqq_dequantized, layers
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed
    from trl import SFTTrainer

    from hqqplus import models
    from hqqplus.integrations.trl import sft_config
    from hqqplus.recovery import setup

    model = models.load_causal_lm(recipe.model.name_or_path, dtype="float32", device="cpu")
    weights = bits = 0
    for layer in layers(model).values():
        group = job["group_size"]
        layer.weight.data = hqq_dequantized(layer.weight.data, job["nbits"], group)
        padded = -(-layer.in_features // group) * group
        weights += layer.weight.numel()
        bits += layer.out_features * (padded * job["nbits"] + padded // group * 32)
    model.requires_grad_(False)
    set_seed(recipe.seed)
    section = recipe.adapter
    config = LoraConfig(
        r=section.r, lora_alpha=section.alpha, target_modules=list(section.target_modules), task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        settings = {**setup.trainer_settings(recipe, torch.device("cpu"), lambda text: None), "output_dir": folder}
        trainer = SFTTrainer(
            model=model, args=sft_config(settings, "benchmark"), train_dataset=train, processing_class=tokenizer
        )
        trainer.train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = {
        "bits_per_weight": bits / weights,
        "strict_bits_per_weight": (bits + 16 * trained) / weights,
        "adapter_bytes": 2 * trained,
        "steps": recipe.training["max_steps"],
    }
    return {"model": trainer.model, "sizes": sizes, "quantized": {}}


# Which runs ----------------------------------------------------------------------------------------------------------

KEY = ("model", "nbits", "group_size", "method", "seed", "tokens", "learning_rate", "scales_learning_rate", "tuning")
RATES = {REFERENCE: (5e-3, 1e-2, 2e-2, 5e-2), TOGETHER: (2e-3, 5e-3, 1e-2)}
SCALES_TIMES = 5.0
"""The learning rate of group scales (in units of themselves), and of gains, over that of LoRA."""
BUDGETS = (0.5, 2, 4)
"""Times the budget, for the curve of what is left over the number of tokens."""
TARGETS = ((2, 64), (1, 32))
"""The formats that all seeds are run at; the others are run with the first one."""


def tuning_jobs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for model in args.models:
        for nbits, group_size in TARGETS:
            for method, rates in RATES.items():
                for rate in rates:
                    yield job_of(args, model, nbits, group_size, method, 0, rate, True)


def jobs(args: argparse.Namespace, rates: dict[tuple[str, int, str], float]) -> Iterator[dict[str, Any]]:
    """The reference and all levers together, seed by seed; with more and fewer tokens; then each
    lever alone, and settings changed, where `--alone` and `--sweep` say."""

    def job(model: str, cell: tuple[int, int], method: str, seed: int) -> dict[str, Any]:
        tuned_as = REFERENCE if method == REFERENCE else TOGETHER
        return job_of(args, model, *cell, method, seed, rates.get((model, cell[0], tuned_as), 2e-3), False)

    for seed in args.seeds:
        first = seed == args.seeds[0]
        for model in args.models if first else args.more:
            for cell in FORMATS if first else TARGETS:
                for method in (REFERENCE, TOGETHER):
                    yield job(model, cell, method, seed)
    for times in BUDGETS:
        for model in args.more if times < max(BUDGETS) else args.alone:
            for method in (REFERENCE, TOGETHER):
                once = job(model, TARGETS[0], method, args.seeds[0])
                yield {**once, "tokens": round(args.tokens * times)}
    for model in args.alone:
        for cell in TARGETS:
            for method in METHODS:
                if method != TOGETHER:
                    yield job(model, cell, method, args.seeds[0])
        for method in SWEEP if args.sweep else ():
            yield job(model, TARGETS[0], method, args.seeds[0])


def job_of(
    args: argparse.Namespace,
    model: str,
    nbits: int,
    group_size: int,
    method: str,
    seed: int,
    rate: float,
    tuning: bool,
) -> dict[str, Any]:
    return {
        "model": model,
        "nbits": nbits,
        "group_size": group_size,
        "method": method,
        "seed": seed,
        "tokens": args.tokens // 2 if tuning else args.tokens,
        "learning_rate": rate,
        "scales_learning_rate": SCALES_TIMES * rate,
        "tuning": tuning,
        "eval_tokens": 4000 if tuning else args.eval_tokens,
    }


def tuned(path: Path) -> dict[tuple[str, int, str], float]:
    """(model, bits, method) -> the learning rate of the least gap."""
    if not path.is_file():
        return {}
    best: dict[tuple[str, int, str], tuple[float, float]] = {}
    for row in json.loads(path.read_text())["rows"]:
        key = row["model"], row["nbits"], row["method"]
        found = row["sets"]["evaluation"]["gap"], row["learning_rate"]
        best[key] = min(best.get(key, found), found)
    return {key: rate for key, (_, rate) in best.items()}


def one_line(row: dict[str, Any]) -> str:
    at = row["sets"]["evaluation"]
    head = f"{row['model']:17} {row['nbits']}-bit g{row['group_size']:<3} {row['method']:17} seed {row['seed']}"
    kl = f" KL {at['kl']:.3f} agree {at['agreement']:.3f}" if "kl" in at else ""
    return (
        f"{head} lr {row['learning_rate']:g} {row['strict_bits_per_weight']:.2f} bpw  {at['recovered']:8.2f} gap "
        f"{at['gap']:.4f}{kl}  {row['seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000, help="budget of a run")
    parser.add_argument("--eval-tokens", type=int, default=16_000)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--more", nargs="*", default=list(MODELS[:2]), help="models that get all seeds and budgets")
    parser.add_argument("--alone", nargs="*", default=list(MODELS[:1]), help="models that get each lever alone")
    parser.add_argument("--sweep", action="store_true", help="and one setting after another changed")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--tune", action="store_true", help="learning rates, with half the budget")
    parser.add_argument("--tuning", type=Path, default=ROOT / "benchmarks" / "results" / "recovery_tuning.json")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    from common import write_result

    wanted = list(tuning_jobs(args)) if args.tune else list(jobs(args, tuned(args.tuning)))
    rows = json.loads(args.output.read_text())["rows"] if args.output.is_file() else []
    there = {tuple(row[key] for key in KEY) for row in rows}
    left = [job for job in wanted if tuple(job[key] for key in KEY) not in there]
    print(f"{len(wanted)} runs, {len(left)} to do", flush=True)
    settings = {"tokens": args.tokens, "batch": BATCH, "length": LENGTH, "ranks": RANKS}
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for row in pool.imap_unordered(run_job, left):
            rows.append(row)
            write_result(args.output, {"settings": settings, "rows": rows}, "hqq", "peft", "trl")
            print(one_line(row), flush=True)


if __name__ == "__main__":
    main()
