"""Runs side by side: what a table line says is what the run's files say."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from hqqplus.errors import UserError
from hqqplus.evaluation.report import Report, write_report
from hqqplus.evaluation.table import Row, read_run, to_csv, to_json, to_markdown

SAMPLES = [
    {
        "prompt": "Once",
        "parent": " upon",
        "quantized": " the",
        "recovered": " upon a | time,\n  in a land far away,  ",
    },
    {"prompt": "Two", "recovered": " more"},
]


def finished(folder: Path, **changes: Any) -> Path:
    """A run with a report, as `train` leaves it."""
    quantization = {"nbits": 2, "group_size": 64, "overrides": {}, **changes.pop("quantization", {})}
    values: dict[str, Any] = {
        "name": folder.name,
        "ppl_parent": 4.16,
        "ppl_quantized": 33.0,
        "ppl_recovered": 5.142,
        "recovery": 0.9,
        "bits_per_weight": 2.2578,
        "backbone_bytes": 1,
        "parent_bytes": 2,
        "adapter_bytes": 500,
        "adapter_parameters": 250,
        "train_seconds": 1.0,
        "tokens_per_second": 1.0,
        "device": "cpu",
        "samples": SAMPLES,
        "recipe": {"model": {"name_or_path": "org/model"}, "quantization": quantization},
    }
    write_report(Report(**{**values, **changes}), folder)
    return folder


def with_fingerprint(folder: Path, text: str) -> Path:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "hqqplus.json").write_text(text)
    return folder


def test_a_run_as_markdown(tmp_path: Path) -> None:
    rows = [read_run(finished(tmp_path / "one")), read_run(finished(tmp_path / "two", ppl_parent=None, samples=[]))]
    assert to_markdown(rows).splitlines() == [
        "| run | model | bits | group | bits per weight | PPL parent | quantized | recovered | sample |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| one | org/model | 2 | 64 | 2.26 | 4.16 | 33.00 | 5.14 | Once → upon a \\| time, in a land far away, |",
        "| two | org/model | 2 | 64 | 2.26 | – | 33.00 | 5.14 |  |",
    ]


def test_a_long_completion_is_cut_in_the_table_only(tmp_path: Path) -> None:
    long = "word \x1b[31m " * 30
    row = read_run(finished(tmp_path / "one", samples=[{"prompt": "a", "recovered": long}]))
    (cell,) = [line.split(" | ")[-1].removesuffix(" |") for line in to_markdown([row]).splitlines()[2:]]
    assert len(cell) <= len("a → ") + 60
    assert cell.startswith("a → word �[31m word")
    assert cell.endswith("…")
    assert row.sample == json.loads(to_json([row]))[0]["sample"] == long


def test_json_and_csv_hold_everything(tmp_path: Path) -> None:
    row = read_run(finished(tmp_path / "one", ppl_quantized=math.inf))
    assert row == Row(
        "one", "org/model", (2,), (64,), 2.2578, 500, 4.16, None, 5.142, "Once", SAMPLES[0]["recovered"]
    )  # fmt: skip
    (read,) = json.loads(to_json([row]))
    assert read == {**vars(row), "nbits": [2], "group_size": [64]}
    (line,) = csv.DictReader(io.StringIO(to_csv([row])))
    assert line == {
        **{key: "" if value is None else str(value) for key, value in vars(row).items()},
        "nbits": "2",
        "group_size": "64",
    }


def test_other_widths_of_overrides_are_named(tmp_path: Path) -> None:
    overrides = {"lm_head": {"nbits": 8}, "*.down_proj": {"nbits": 4, "group_size": 32}, "*.up_proj": {"nbits": 2}}
    row = read_run(finished(tmp_path / "one", quantization={"group_size": -1, "overrides": overrides}))
    assert (row.nbits, row.group_size) == ((2, 4, 8), (-1, 32))
    assert "| 2/4/8 | row/32 |" in to_markdown([row])


def test_the_fingerprint_knows_better_than_the_recipe(tmp_path: Path) -> None:
    """Of a packed model that was named in the recipe, the recipe's quantization says nothing."""
    known = {
        "base": "packed/folder",
        "quantization": {"nbits": 1, "group_size": 32, "overrides": [["a", {"nbits": 8}]]},
    }
    row = read_run(with_fingerprint(finished(tmp_path / "one"), json.dumps(known)))
    assert (row.model, row.nbits, row.group_size) == ("packed/folder", (1, 8), (32,))
    for number, damaged in enumerate(["{", "[]", "{}"]):
        row = read_run(with_fingerprint(finished(tmp_path / f"damaged{number}"), damaged))
        assert (row.model, row.nbits, row.group_size) == ("org/model", (2,), (64,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"there is no report\.json: no run of hqqplus has ended there"),
        ("{", r"its report\.json cannot be read: Expecting"),
        ("[1]", r"its report\.json cannot be read: "),
        ("{}", r"its report\.json cannot be read: 'bits_per_weight' is missing"),
        ('"ppl_parent": "low"', r"its report\.json cannot be read: ppl_parent is 'low', no number"),
        ('"samples": 3', r"its report\.json cannot be read: "),
        ('"recipe": {"model": {}}', r"its report\.json cannot be read: 'name_or_path' is missing"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, text: str | None, said: str) -> None:
    run = tmp_path / "a run"
    if text is not None:
        path = finished(run) / "report.json"
        changed = {**json.loads(path.read_text()), **json.loads(f"{{{text}}}")} if text.startswith('"') else text
        path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(UserError, match=f"^{run}: {said}"):
        read_run(run)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"there is no report\.json"):
        read_run(tmp_path / "file")
