"""Runs as folders, made by hand, for the tests of the pages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hqqplus.evaluation.layers import Layer, Layers
from hqqplus.evaluation.report import Report
from hqqplus.files import write_json
from hqqplus.quantization.statistics import LayerStatistics

KINDS = ("q_proj", "o_proj", "down_proj")
NASTY = '</script></style></pre><img src=x onerror=alert(1)><svg onload=alert(1)>"\' onclick="x" &lt; \x1b[31m \u202e|'


def layers(count: int = 2, title: str = "org/model, 2-bit g64", **changes: Any) -> Layers:
    """`count` blocks; `changes` are of the statistics of the last layer."""
    values: dict[str, Any] = {"shape": (64, 128), "nbits": 2, "group_size": 64, "axis": 1, "metadata_bits": 8}
    values |= {"bits_per_weight": 2.25, "kurtosis": 0.4, "outlier_share": 0.0}
    names = [f"model.layers.{block}.{kind}" for block in range(count) for kind in KINDS]
    made = [Layer(name, False, LayerStatistics(**values, nmse=0.1 + place / 100)) for place, name in enumerate(names)]
    if changes:
        made[-1] = Layer(names[-1], False, LayerStatistics(**{**values, "nmse": 0.1, **changes}))
    return Layers(title, tuple(made), 54_321_000)


def report(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "name": "a run",
        "ppl_parent": 4.16,
        "ppl_quantized": 33.0,
        "ppl_recovered": 5.14,
        "recovery": 0.8979,
        "bits_per_weight": 2.25,
        "backbone_bytes": 2_500_000,
        "parent_bytes": 16_000_000,
        "adapter_bytes": 6144,
        "adapter_parameters": 3072,
        "linear_weights": 49_152,
        "train_seconds": 90.0,
        "tokens_per_second": 12_345.6,
        "device": "cpu",
        "samples": [{"prompt": "Once", "parent": " upon a time", "quantized": " the the", "recovered": " upon a day"}],
        "texts": {"wiki": {"parent": 10.0, "quantized": 30.0, "recovered": 12.0}},
        "loss_curve": [[step, 3.0 - step / 100] for step in range(1, 61)],
        "ppl_curve": [[20, 8.0], [40, 6.0], [60, 5.14]],
        "evaluation": {"tokens": 51_234, "max_length": 512, "recipe_digest": "0123456789abcdef"},
        "recipe": {
            "model": {"name_or_path": "org/model"},
            "quantization": {"nbits": 2, "group_size": 64, "overrides": {}},
            "calibration": {"method": "none"},
            "adapter": {"r": 8},
            "data": {"path_or_name": "stories", "max_length": 512},
            "training": {"learning_rate": 1e-3},
        },
        "versions": {"python": "3.11", "torch": "2.13"},
        "costs": {
            "memory": "process",
            "stages": {
                "measure parent": {"seconds": 2.0, "peak_bytes": 900_000_000},
                "quantize": {"seconds": 4.0, "peak_bytes": 1_000_000_000},
                "train": {"seconds": 90.0, "peak_bytes": 1_234_000_000},
                "measure recovered": {"seconds": 3.0, "peak_bytes": None},
            },
        },
    }
    return Report(**{**values, **changes})


def run_folder(folder: Path, some: Layers | None = None, **changes: Any) -> Path:
    """A finished run, without the pictures and the adapter. `some`: its layers, else it has none."""
    folder.mkdir(parents=True)
    write_json(folder / "report.json", report(**{"name": folder.name, **changes}).to_json())
    if some is not None:
        write_json(folder / "layers.json", some.to_json())
    return folder


def packed_folder(folder: Path) -> Path:
    """What `hqqplus quantize` leaves beside the weights."""
    folder.mkdir(parents=True)
    write_json(folder / "layers.json", layers().to_json())
    fingerprint = {"base": "org/model", "quantization": {"nbits": 2, "group_size": 64, "overrides": []}}
    (folder / "hqqplus.json").write_text(json.dumps(fingerprint))
    return folder


def nasty_report() -> Report:
    """Everything that somebody else may have written is meant to break the page."""
    return report(
        name=NASTY,
        device=NASTY,
        samples=[{"prompt": NASTY, "parent": NASTY, "quantized": NASTY, "recovered": NASTY}],
        texts={NASTY: {"parent": 1.0, "quantized": 2.0, "recovered": 1.5}},
        evaluation={NASTY: NASTY, "recipe_digest": NASTY},
        recipe={"model": {"name_or_path": NASTY}, NASTY: {NASTY: [NASTY]}, "data": {"path_or_name": NASTY}},
        versions={NASTY: NASTY},
        costs={"memory": NASTY, "stages": {NASTY: {"seconds": 1.0, "peak_bytes": 1}}},
    )


def nasty_layers() -> Layers:
    made = layers()
    statistics = made.layers[0].statistics
    return Layers(NASTY, (Layer(NASTY, False, statistics), *made.layers), 1)


def not_finite() -> Report:
    nan = math.nan
    return report(
        ppl_parent=None,
        parent_bytes=0,
        ppl_quantized=math.inf,
        ppl_recovered=nan,
        recovery=None,
        loss_curve=[[1, 3.0], [2, nan], [3, math.inf], [4, 2.0]],
        ppl_curve=[[10, math.inf], [20, nan]],
        texts={"wiki": {"parent": None, "quantized": math.inf, "recovered": 12.0}},
    )
