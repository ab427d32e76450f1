"""The before/after report: valid JSON whatever the numbers, a readable page, a picture, a table."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from hqqplus.evaluation import report as module
from hqqplus.evaluation.report import Report, environment, number, print_report, write_report

SOME: dict[str, Any] = {
    "name": "a model | 2 bit",
    "ppl_parent": 4.16,
    "ppl_quantized": 33.0,
    "ppl_recovered": 5.14,
    "recovery": 0.8979,
    "bits_per_weight": 2.5,
    "backbone_bytes": 2_500_000,
    "parent_bytes": 16_000_000,
    "adapter_bytes": 500_000,
    "adapter_parameters": 250_000,
    "train_seconds": 90.0,
    "tokens_per_second": 12_345.6,
    "device": "CPU",
    "samples": [{"prompt": "Once", "parent": " upon a time", "quantized": " the the", "recovered": " upon a day"}],
    "texts": {"wiki": {"parent": 10.0, "quantized": math.inf, "recovered": 12.0}},
    "loss_curve": [[10, 3.0], [20, 2.5]],
    "ppl_curve": [[0, 33.0], [20, 5.14]],
    "evaluation": {"tokens": 51_234, "max_length": 512},
    "recipe": {"seed": 0},
    "versions": {"python": "3.11"},
    "linear_weights": 8_000_000,
    "costs": {"memory": "process", "stages": {"train": {"seconds": 90.0, "peak_bytes": 10**9}}},
}


def report(**changes: Any) -> Report:
    return Report(**{**SOME, **changes})


def page(folder: Path, **changes: Any) -> str:
    write_report(report(**changes), folder)
    return (folder / "report.md").read_text(encoding="utf-8")


def strict(text: str) -> Any:
    """JSON as the standard has it: Python's own NaN and Infinity are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_three_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    text = page(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.md", "report.png"]
    assert strict((folder / "report.json").read_text(encoding="utf-8")) == {
        **SOME,
        "texts": {"wiki": {"parent": 10.0, "quantized": None, "recovered": 12.0}},
    }
    for line in (
        "# a model \\| 2 bit: before and after",
        "| parent | 4.16 | – | 16.0 |",
        "| quantized | 33.00 | 2.50 | 2.5 |",
        "| recovered | 5.14 | 2.50 + adapter | 3.0 |",
        "| wiki | 10.00 | ∞ | 12.00 | – |",
        "| evaluation: tokens | 51,234 |",
        "| training | 90.0 s, 12,346 tokens/s |",
    ):
        assert line in text.splitlines()
    assert "Recovery: 89.8 % of the log-perplexity" in text
    assert "](report.png)" in text
    assert "```text\n upon a day\n```" in text
    assert "import hqqplus" in text


def test_how_to_load_is_the_callers(tmp_path: Path) -> None:
    write_report(report(), tmp_path, how_to_load="import this\n")
    assert "## How to load\n\n```python\nimport this\n```" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_picture_is_a_picture_and_always_the_same(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "a")
    write_report(report(), tmp_path / "b")
    first, second = ((tmp_path / name / "report.png").read_bytes() for name in "ab")
    assert first.startswith(b"\x89PNG")
    assert len(first) > 10_000
    assert first == second


def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(report(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(self: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(report(name="other"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"ppl_parent": None, "parent_bytes": 0, "recovery": None},
        {"ppl_quantized": math.inf, "ppl_curve": [[0, math.inf], [5, 1e9]]},
        {"ppl_parent": math.nan, "ppl_quantized": math.nan, "ppl_recovered": math.nan, "ppl_curve": []},
        {"loss_curve": [[1, math.nan]], "ppl_curve": [[1, None]]},
        {"loss_curve": [[step, 1 / step] for step in range(1, 50)], "ppl_curve": []},
        {"loss_curve": [[1, 2.0]], "ppl_curve": [[0, 5.0]], "ppl_parent": 5.0, "ppl_quantized": 5.0},
        {"train_seconds": math.nan, "tokens_per_second": math.inf, "recovery": math.nan, "bits_per_weight": math.nan},
        {"samples": [], "texts": {}, "loss_curve": [], "ppl_curve": [], "recipe": {}, "versions": {}},
        {"name": "$x^{ $ % \\ \n | _y_"},
    ],
)
def test_odd_numbers_make_a_valid_report(tmp_path: Path, changes: dict[str, Any], recwarn: Any) -> None:
    text = page(tmp_path, **changes)
    strict((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (tmp_path / "report.png").stat().st_size > 5_000
    assert "nan" not in text
    assert "None" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tables[:5]}) == 1
    print_report(report(**changes), Console(file=io.StringIO()))
    assert [str(warning.message) for warning in recwarn if "matplotlib" in str(warning.filename)] == []


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(Path("a/b")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(recipe=st.dictionaries(st.text(max_size=3), json_like, max_size=3), value=st.floats())
def test_any_value_becomes_json(recipe: dict[str, Any], value: float) -> None:
    plain = report(recipe=recipe, ppl_quantized=value).to_json()
    assert strict(json.dumps(plain, ensure_ascii=False).encode("utf-8").decode("utf-8")) == plain
    assert plain["ppl_quantized"] == (value if math.isfinite(value) else None)


def test_numbers_of_torch_and_lone_surrogates_become_json() -> None:
    import torch

    plain = report(recipe={"a": torch.tensor(2.5), "b": torch.tensor([1, 2]), "c": (1, math.nan), "d": "\ud800"})
    assert plain.to_json()["recipe"] == {"a": 2.5, "b": [1, 2], "c": [1, None], "d": "?"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
        (1.0, "1.00"),
        (99.99, "99.99"),
        (99.996, "100.0"),
        (942.34, "942.3"),
        (999.96, "1,000"),
        (20580, "20,580"),
        (1.234e9, "1.23e+09"),
    ],
)
def test_numbers_read_well(value: float | None, text: str) -> None:
    assert number(value) == text


def test_text_of_a_model_cannot_break_the_page_or_the_terminal(tmp_path: Path) -> None:
    nasty = "a ``` b ```` [bold red]c[/nothing] \x1b[31m\r\x00 | <b>"
    samples = [{"prompt": nasty, "parent": None, "quantized": nasty, "recovered": nasty}]
    text = page(tmp_path, samples=samples)
    fenced = "`````text\na ``` b ```` [bold red]c[/nothing] �[31m�� | <b>\n`````"
    assert text.count(fenced) == 3
    assert "\x1b" not in text
    assert "parent:" not in text

    out = io.StringIO()
    print_report(report(samples=samples, name="[red]x"), Console(file=out, width=100))
    assert "\x1b" not in out.getvalue()
    assert "[bold red]c[/nothing]" in out.getvalue()
    assert "[red]x" in out.getvalue()


def test_the_table_on_the_terminal() -> None:
    out = io.StringIO()
    print_report(report(), Console(file=out, width=100))
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in out.getvalue().splitlines()]
    for row in (
        ["", "perplexity", "bits per weight", "MB"],
        ["parent", "4.16", "–", "16.0"],
        ["quantized", "33.00", "2.50", "2.5"],
        ["recovered", "5.14", "2.50 + adapter", "3.0"],
        ["wiki", "10.00", "∞", "12.00", "–"],
    ):
        assert row in cells
    assert "recovered   upon a day" in out.getvalue()


def test_print_report_finds_its_console(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report())
    assert "quantized" in capsys.readouterr().out


@given(places=st.lists(st.floats(0, 1), max_size=6).map(sorted), gap=st.floats(0.01, 0.3))
def test_labels_are_moved_apart_and_only_as_far_as_needed(places: list[float], gap: float) -> None:
    moved = module._apart(places, gap)
    assert len(moved) == len(places)
    assert all(after - before >= gap - 1e-9 for before, after in pairwise(moved))
    assert sum(moved) == pytest.approx(sum(places))
    if all(after - before >= gap for before, after in pairwise(places)):
        assert moved == pytest.approx(places)


def test_the_mean_of_a_straight_line_is_the_line() -> None:
    line = [100.0 - step for step in range(100)]
    assert module._smoothed(line)[:90] == pytest.approx(line[:90])


def test_environment_imports_nothing(run_python: Callable[..., Any]) -> None:
    versions = environment()
    assert list(versions) == [
        *("python", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "hqqplus")
    ]
    code = (
        "import sys; from hqqplus.evaluation.report import environment; environment(); "
        "assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    )
    run_python("-c", code)


def test_a_package_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DISTRIBUTIONS", ("no-such-package-here",))
    assert environment()["no-such-package-here"] == "not installed"
