"""The page of several runs: each found again by its letter, and a warning where numbers are not of one text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hqqplus.cli import app
from hqqplus.errors import UserError
from hqqplus.evaluation.compare import _letter, _names, compare_runs, comparison_page
from hqqplus.evaluation.run_folder import Run, run_of
from tests.evaluation.test_page import checked
from tests.pages import NASTY, layers, nasty_layers, nasty_report, not_finite, packed_folder, report, run_folder


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe with `section__key` replaced."""
    made = {name: dict(section) for name, section in report().recipe.items()}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        made.setdefault(section, {})[key] = value
    return made


def run(name: str, some: Any = None, **changes: Any) -> Run:
    return run_of(report(name=name, **changes), some, "nowhere")


def test_runs_side_by_side(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "one", layers())
    changed = recipe(quantization__nbits=1, training__learning_rate=2e-3)
    two = run_folder(
        tmp_path / "two", layers(3), recipe=changed, bits_per_weight=1.25, ppl_quantized=90.0, ppl_recovered=9.5,
        samples=[{"prompt": "Once", "parent": " upon a time", "quantized": " a a", "recovered": " more"}],
        versions={"python": "3.11", "torch": "2.14"},
    )  # fmt: skip
    three = packed_folder(tmp_path / "three")
    result = CliRunner().invoke(app, ["compare", *map(str, (one, two, three)), "--out", str(tmp_path / "c.html")])
    assert result.output == f"wrote {tmp_path / 'c.html'}\n"
    made = checked((tmp_path / "c.html").read_text(encoding="utf-8"))
    for said in (
        "3 runs compared org/model",
        "A one 2 bits, groups of 64 2.25 3.25 33.00 5.14 89.8 % 2.5 MB 4.16",
        "B two 1 bit, groups of 64 1.25 2.25 90.00 9.50",
        "C three 2 bits, groups of 64 2.25 – – – – 54.3 MB –",
        "Not measured, because no run has trained on it: three",
        "two, recovered: perplexity 9.50 at 2.25 bits per weight",
        "Once parent upon a time A one upon a day B two more Before training A one the the B two a a",
        "B two against A one quantization.nbits: 2 -> 1 training.learning_rate: 0.001 -> 0.002",
        "package A one B two torch 2.13 2.14 python 3.11",
        "kind A one B two C three all 0.125 0.14 0.125 q_proj 0.115 0.13 0.115",
        "all stages 99.0 s 99.0 s",
        "peak of memory 1.23 GB 1.23 GB",
    ):
        assert said in made.text, said
    assert "not of the same text" not in made.text
    assert made.count("path", "reference") == 2  # the parent's, once in each of two charts
    assert made.count("circle", "hollow") == 2
    assert made.count("svg") == 4


def test_equal_recipes_are_said_to_be_equal() -> None:
    made = checked(comparison_page([run("a"), run("b")]))
    assert "The recipes are the same" in made.text
    assert "Of no run is it known how well its layers were quantized." in made.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe": recipe(data__path_or_name="other")}, "data.path_or_name stories → other"),
        ({"recipe": recipe(data__max_length=256)}, "data.max_length 512 → 256"),
        ({"evaluation": {"tokens": 99}}, "tokens 51234 → 99"),
    ],
)
def test_perplexities_of_different_texts_are_warned_of(changes: dict[str, Any], said: str) -> None:
    made = checked(comparison_page([run("a"), run("b", **changes)]))
    assert "not of the same text" in made.text
    assert f"B b against a: {said}" in made.text


def test_other_models_and_other_parents() -> None:
    changed = recipe(model__name_or_path="org/other")
    made = checked(comparison_page([run("a"), run("b", recipe=changed, ppl_parent=7.0)]))
    assert "perplexities per token compare where the tokenizer is the same" in made.text
    assert "parent of A" in made.text
    assert "parent of B" in made.text
    assert made.count("path", "reference") == 4


def test_what_is_missing_or_not_finite_is_said() -> None:
    left = run_of(not_finite(), None, "nowhere")
    lacking = run("b", linear_weights=0, samples=[], costs={})
    made = checked(comparison_page([left, lacking]))
    assert "A a run 2 bits, groups of 64 2.25 3.25 not finite not finite – 2.5 MB –" in made.text
    assert "of B it is not known over how many weights the adapter counts" in made.text
    assert made.count("path", "lost") > 0


def test_nothing_that_others_wrote_is_markup() -> None:
    nasty = run_of(nasty_report(), nasty_layers(), "nowhere")
    made = checked(comparison_page([nasty, Run(NASTY + "2", nasty.figures, nasty.layers)]))
    assert made.text.count(" ".join(NASTY.replace("\x1b", "�").split())) >= 15


def test_many_runs_keep_letters_colours_and_shapes() -> None:
    runs = [run(f"run {index}", layers(), ppl_recovered=5.0 + index) for index in range(30)]
    made = checked(comparison_page(runs))
    assert "AD run 29" in made.text
    assert made.count("path", "c9") > 0
    assert [_letter(index) for index in (0, 25, 26, 27, 51, 52, 701, 702)] == [
        *("A", "Z", "AA", "AB", "AZ", "BA", "ZZ", "AAA")
    ]


def test_names_tell_folders_apart() -> None:
    places = [Path("/a/x/run"), Path("/b/x/run"), Path("/b/x/other")]
    assert _names(places) == ["a/x/run", "b/x/run", "other"]


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "one")
    with pytest.raises(UserError, match="name two runs or more"):
        compare_runs([one], tmp_path / "c.html")
    with pytest.raises(UserError, match="one is named twice"):
        compare_runs([one, tmp_path / "one" / ".." / "one"], tmp_path / "c.html")
    (tmp_path / "two").mkdir()
    with pytest.raises(UserError, match=r"two: there is no report\.json and no layers\.json"):
        compare_runs([one, tmp_path / "two"], tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()
