"""A report and a recipe of a run, as a card is made of them."""

from __future__ import annotations

from pathlib import Path
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


def ship_random_adapter(packed: Path, adapter: Path) -> Any:
    """Write an adapter with random weights on the model of folder `packed` to folder `adapter`, as a run ships it; the
    model with it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from hqqplus import models
    from hqqplus.adapters import Fingerprint, round_adapter, ship_adapter

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(models.load(packed).requires_grad_(False), config).eval()
    round_adapter(model)
    fingerprint = Fingerprint.read(packed)
    assert fingerprint is not None
    ship_adapter(model, models.load_tokenizer(str(packed)), adapter, fingerprint, "card")
    return model
