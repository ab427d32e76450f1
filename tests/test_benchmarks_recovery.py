"""The benchmark of recovery: its recipes are valid and keep to the budget, its tables are made of its runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from hqqplus.recipe import Recipe
from tests.conftest import ROOT, load_benchmark

recovery = load_benchmark("recovery")
tables = load_benchmark("recovery_tables")
TOKENS = 200_000


@pytest.fixture
def every_job() -> list[dict[str, Any]]:
    args = argparse.Namespace(
        tokens=TOKENS,
        eval_tokens=100,
        models=list(recovery.MODELS),
        more=[],
        alone=["stories260K"],
        seeds=[0],
        sweep=True,
    )
    return list(recovery.jobs(args, {("stories260K", 2, "all"): 7e-3}))


def test_recipes_are_valid_and_keep_to_the_budget(
    every_job: list[dict[str, Any]], shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "tokens_a_row", lambda model, path: 200.0)
    monkeypatch.setattr(recovery, "pydoc_rows", lambda folder, tuning: folder / "pydoc.jsonl")
    seen = set()
    for job in every_job:
        recipe = Recipe.model_validate(recovery.recipe_of(job, str(tmp_path)))
        calibration, training = recipe.calibration, recipe.training
        used = training["max_steps"] * training["per_device_train_batch_size"] * 200
        if calibration.method != "none":
            assert calibration.length is not None
            passes = 1 + calibration.epochs * (calibration.method == "block")
            used += calibration.samples * calibration.length * passes
        assert used == pytest.approx(job["tokens"], rel=0.02)
        assert recipe.recovery.scales_learning_rate == pytest.approx(5 * training["learning_rate"])
        seen.add(job["method"])
    assert seen == {recovery.REFERENCE, *recovery.METHODS, *recovery.SWEEP}
    rates = {job["learning_rate"] for job in every_job if job["model"] == "stories260K" and job["nbits"] == 2}
    assert rates == {7e-3, 2e-3}  # tuned for all levers, not for the reference


def test_the_best_rate_is_taken(tmp_path: Path) -> None:
    rows = [
        {"model": "m", "nbits": 2, "method": "all", "learning_rate": rate, "sets": {"evaluation": {"gap": gap}}}
        for rate, gap in ((1e-3, 0.4), (2e-3, 0.3), (5e-3, 0.35))
    ]
    (tmp_path / "tuning.json").write_text(json.dumps({"rows": rows}))
    assert recovery.tuned(tmp_path / "tuning.json") == {("m", 2, "all"): 2e-3}
    assert recovery.tuned(tmp_path / "none.json") == {}


def run(method: str, gap: float, seed: int = 0, tokens: int = TOKENS, nbits: int = 2) -> dict[str, Any]:
    figures = {"parent": 10.0, "recovered": 20.0, "gap": gap, "kl": gap, "agreement": 0.5}
    cell = {"model": "stories260K", "nbits": nbits, "group_size": 64, "method": method, "seed": seed, "tokens": tokens}
    sizes = {"strict_bits_per_weight": 2.5, "seconds": 30.0}
    return {**cell, **sizes, "sets": {"evaluation": figures, "wikitext-2": figures}}


def test_tables(tmp_path: Path) -> None:
    rows = [
        run("reference", 0.8),
        run("reference", 1.2, seed=1),
        run("all", 0.25),
        run("plain", 0.6),
        run("+ scales", 0.4),
    ]
    rows += [run("reference", 0.7, tokens=2 * TOKENS), run("all", 0.21, tokens=2 * TOKENS)]
    result = {"settings": {"tokens": TOKENS}, "rows": rows}
    together = tables.together(result)
    assert "| 2 / 64 | stories260K | hqq + LoRA | 2.50 | 20.00 | 1.000 ± 0.200 | 1.000 | 50 % | 1.000 |" in together
    assert together.endswith("mean over the models: 0.25 at 2 / 64.")
    assert "| + trained group scales | 0.400 | 30 |" in tables.alone(result)
    assert "| 400,000 | 0.700 | 0.210 | 0.30 |" in tables.budgets(result)
    tables.picture(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_the_results_are_of_this_script() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "recovery.json").read_text())["rows"]
    keys = {tuple(row[key] for key in recovery.KEY) for row in rows}
    assert len(keys) == len(rows)
    assert {row["method"] for row in rows} <= {recovery.REFERENCE, *recovery.METHODS, *recovery.SWEEP}
