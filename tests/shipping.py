"""A report and a recipe of a run, as a card is made of them."""

from __future__ import annotations

from typing import Any

from hqqplus.evaluation.report import Report
from hqqplus.recipe import load_recipe, to_dict
from tests.conftest import ROOT

PROMPT = "a <b> | `c`\n\n# no heading"


def report(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "name": "run",
        "ppl_parent": 6.14,
        "ppl_quantized": 1234.5,
        "ppl_recovered": 9.1234567,
        "recovery": 0.925,
        "bits_per_weight": 2.26,
        "backbone_bytes": 2_400_000_000,
        "parent_bytes": 16_000_000_000,
        "adapter_bytes": 56_098_816,
        "adapter_parameters": 28_049_408,
        "train_seconds": 10.0,
        "tokens_per_second": 100.0,
        "device": "cpu",
        "samples": [{"prompt": PROMPT, "parent": "p\n\np", "quantized": "</pre>", "recovered": "r"}],
        "texts": {"/home/somebody/c4": {"parent": 8.0, "quantized": None, "recovered": 12.0}},
        "evaluation": {"tokens": 16000, "max_length": 2048},
    }
    return Report(**{**values, **changes})


def recipe(**changes: Any) -> dict[str, Any]:
    values = to_dict(load_recipe(str(ROOT / "recipes" / "embedded_2bit.yaml")))
    return {**values, **changes}
