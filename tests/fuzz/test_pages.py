"""Pages of runs whose files were damaged: a page, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from hqqplus.evaluation.compare import comparison_page
from hqqplus.evaluation.page import run_page
from hqqplus.evaluation.run_folder import open_run
from tests.fuzz.mutate import mutated, mutated_json
from tests.fuzz.oracle import judged, run
from tests.pages import layers, report, run_folder

LONG = pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.long])


@pytest.mark.parametrize("examples", [25, LONG])
def test_damaged_runs(tmp_path: Path, examples: int) -> None:
    whole = open_run(run_folder(tmp_path / "whole", layers()))
    folder = run_folder(tmp_path / "damaged")
    (folder / "adapter").mkdir()
    fingerprint = {"base": "org/model", "quantization": {"nbits": 2, "group_size": 64, "overrides": []}}
    contents = {
        "report.json": report().to_json(),
        "layers.json": layers().to_json(),
        "adapter/hqqplus.json": fingerprint,
    }
    damaged = [
        st.tuples(st.just(name), mutated_json((values,)) | mutated((json.dumps(values).encode(),)))
        for name, values in contents.items()
    ]

    def check(example: tuple[str, bytes]) -> None:
        for name, values in contents.items():
            (folder / name).write_text(json.dumps(values))
        (folder / example[0]).write_bytes(example[1])

        def show() -> None:
            found = open_run(folder)
            run_page(found).encode()
            comparison_page([whole, found]).encode()
            comparison_page([found, whole]).encode()

        judged(show)

    run(examples, st.one_of(damaged), check)
