"""The page of a run: whole in itself, true to the run's files, and safe whatever is in them."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hqqplus.cli import app
from hqqplus.errors import UserError
from hqqplus.evaluation import charts
from hqqplus.evaluation.charts import Chart, Reference, Series, bars
from hqqplus.evaluation.markup import Html, element
from hqqplus.evaluation.page import report_on, run_page, stages, write_page
from hqqplus.evaluation.report import Report, visible
from hqqplus.evaluation.run_folder import open_run, run_of
from tests.pages import NASTY, layers, nasty_layers, nasty_report, not_finite, packed_folder, report, run_folder

# All that a page of ours is made of.
ELEMENTS = (
    "html head meta title style body main header footer section article h1 h2 h3 h4 p dl div dt dd figure figcaption "
    "ul li svg desc path circle rect text details summary table thead tbody tr th td pre code b span"
)
ATTRIBUTES = (
    "lang charset http-equiv content name class id viewbox role aria-labelledby aria-label tabindex scope data-label "
    "dir d x y cx cy r rx width height text-anchor"
)


class Parsed(HTMLParser):
    """The elements of a page, their attributes and its text, as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements are nested"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    def count(self, tag: str, class_: str = "") -> int:
        return sum(t == tag and class_ in [*(a.get("class") or "").split(), ""] for t, a in self.found)


def shown(made: Report, some: Any = None, folder: Path = Path("nowhere")) -> Parsed:
    return checked(run_page(run_of(made, some, folder)))


def checked(page: str) -> Parsed:
    """The page, which must be one of ours: of known elements, and nothing that is fetched or run."""
    parsed = Parsed(page)
    assert parsed.open == []
    assert {tag for tag, _ in parsed.found} <= set(ELEMENTS.split())
    assert {name for _, attributes in parsed.found for name in attributes} <= set(ATTRIBUTES.split())
    ids = [attributes["id"] for _, attributes in parsed.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    (policy,) = [a["content"] for _, a in parsed.found if a.get("http-equiv") == "Content-Security-Policy"]
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert not re.search(r"url\(|@import|@font-face|https?:", style)
    return parsed


def test_what_a_run_gave_is_on_its_page(tmp_path: Path) -> None:
    made = shown(report(), layers())
    for said in (
        "org/model · 2 bits, groups of 64 · LoRA of rank 8 · 3,072 parameters in the adapter · cpu",
        "Parent 4.16 perplexity, 16 bits",
        "Quantized 33.00 perplexity",
        "Recovered 5.14 perplexity",
        "Recovery 89.8 % of the lost log-perplexity",
        # 2.25 + 8 * 6144 / 49152
        "Bits per weight 2.25 3.25 with the adapter",
        "2.5 MB 6.4 times smaller than the parent",
        "Once parent upon a time quantized the the recovered upon a day",
        "wiki 10.00 30.00 12.00",
        "Peak of memory: 1.23 GB, resident, of the whole process. Training: 12,346 tokens a second. Device: cpu.",
        "measure 5.0 s",
        "train 90.0 s",
        "evaluation: tokens 51,234",
        "recipe digest 0123456789ab",
        "torch 2.13",
        "learning_rate: 0.001",
        "mean NMSE 0.125",
        "model.layers.1.down_proj 64 × 128 2 64 2.250 0.15 0.4 0",
    ):
        assert said in made.text, said
    assert made.count("svg") == 6
    assert made.count("path", "curve") == 2 + 1 + 3  # loss and its mean, perplexity, three kinds of layers
    assert made.count("path", "reference") == 3
    assert all(a["role"] == "img" and a["aria-labelledby"] for tag, a in made.found if tag == "svg")


def test_the_verb_and_the_run_write_the_same(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a run", layers())
    write_page(report(name="a run"), layers(), folder)
    by_the_run = (folder / "report.html").read_bytes()
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.output == f"wrote {folder / 'report.html'}\n"
    assert (folder / "report.html").read_bytes() == by_the_run
    assert report_on(folder, tmp_path / "other.html") == tmp_path / "other.html"
    assert (tmp_path / "other.html").read_bytes() == by_the_run


@pytest.mark.parametrize("measure", [nasty_report, not_finite], ids=["nasty", "not finite"])
def test_nothing_that_others_wrote_is_markup(measure: Callable[[], Report]) -> None:
    made = shown(measure(), nasty_layers())
    as_shown = NASTY.replace("\x1b", "�")
    if measure is nasty_report:
        # Headline and title, prompt and three completions, ...: all of them as they were written.
        assert made.text.count(" ".join(as_shown.split())) >= 15
    assert not re.search("[\x00-\x08\x0b-\x1f]", made.text)


def test_what_is_not_finite_is_said_and_marked() -> None:
    made = shown(not_finite(), layers(nmse=math.nan))
    assert "Quantized not finite perplexity" in made.text
    assert "Recovered not finite perplexity" in made.text
    assert "Parent – perplexity" in made.text
    assert "Recovery – of the lost" in made.text
    assert "wiki – not finite 12.00" in made.text
    # Two of the loss and a layer have their crosses; the loss is no line across them.
    assert made.count("path", "lost") == 3
    assert "loss, 2: not finite" in made.text
    assert "No finite perplexity was measured." in made.text
    assert "model.layers.1.down_proj: NMSE not finite" in made.text


def test_an_older_report_without_the_newer_fields(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "old")
    values = json.loads((folder / "report.json").read_text())
    for name in ("linear_weights", "costs", "texts", "samples", "loss_curve", "ppl_curve", "evaluation", "versions"):
        del values[name]
    (folder / "report.json").write_text(json.dumps(values))
    made = checked(run_page(open_run(folder)))
    for said in (
        "Bits per weight 2.25 Size",
        "No loss was recorded.",
        "There is no layers.json: the model was packed elsewhere, or before runs kept one.",
        "The peak of memory was not noted.",
        "it is not known over how many weights it is",
        "train 90.0 s",
    ):
        assert said in made.text
    # Perplexity before and after are known in any case.
    assert made.count("path", "curve") == 1


def test_weights_are_counted_from_the_layers_where_a_report_does_not_know() -> None:
    assert run_of(report(linear_weights=0), layers(), "x").bits_with_adapter == pytest.approx(2.25 + 1.0)


def test_a_packed_folder_says_what_is_missing(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path / "packed")
    made = checked(report_on(folder).read_text())
    assert "org/model · 2 bits, groups of 64 · packed, and not trained on" in made.text
    assert "Perplexity, samples, curves, memory and time are missing here" in made.text
    assert "Largest NMSE 0.15 model.layers.1.down_proj" in made.text
    assert made.count("svg") == 1


def test_the_model_behind_a_packed_one_is_named(tmp_path: Path) -> None:
    # Its recipe has the defaults of a quantization that never was.
    recipe = {"model": {"name_or_path": "runs/packed"}, "quantization": {"nbits": 4, "group_size": 16}}
    folder = run_folder(tmp_path / "run", recipe=recipe)
    (folder / "adapter").mkdir()
    fingerprint = {"base": "org/model", "quantization": {"nbits": 2, "group_size": -1, "overrides": [["a", {}]]}}
    (folder / "adapter" / "hqqplus.json").write_text(json.dumps(fingerprint))
    about = "org/model · 2 bits, whole rows, some layers others"
    assert about in checked(run_page(open_run(folder))).text


def test_calibrated_weights_are_explained() -> None:
    recipe = {**report().recipe, "calibration": {"method": "block"}}
    assert "may rise by it" in shown(report(recipe=recipe), layers()).text
    assert "may rise by it" not in shown(report(), layers()).text


def test_stages_on_a_gpu_show_their_peaks() -> None:
    made = report(costs={**report().costs, "memory": "gpu"})
    assert "train 90.0 s, 1.23 GB" in shown(made).text
    assert "on the GPU, by PyTorch's count" in shown(made).text
    figures = run_of(made, None, "x").figures
    assert figures is not None
    assert stages(figures) == {
        "quantize": (4.0, 1_000_000_000),
        "train": (90.0, 1_234_000_000),
        "measure": (5.0, 900_000_000),
    }


# Folders that cannot be shown ----------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "report.json").read_text())
        del values[name]
        (folder / "report.json").write_text(json.dumps(values))

    return change


def with_value(name: str, value: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "report.json").read_text())
        (folder / "report.json").write_text(json.dumps({**values, name: value}))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "report.json").unlink(), "there is no report.json and no layers.json"),
        (lambda folder: (folder / "report.json").write_text('{"na'), "its report.json cannot be read: "),
        (lambda folder: (folder / "report.json").write_text("[]"), "its report.json cannot be read: "),
        (lambda folder: (folder / "report.json").write_bytes(b"\xff"), "it is not text in UTF-8"),
        (without("ppl_quantized"), "its report.json cannot be read: ppl_quantized: it is missing"),
        (with_value("samples", {"a": 1}), "its report.json cannot be read: samples"),
        (with_value("loss_curve", [[1]]), "its report.json cannot be read: loss_curve.0"),
        (with_value("recipe", {"model": 3}), "its report.json cannot be read: recipe: "),
        (with_value("backbone_bytes", -1), "its report.json cannot be read: backbone_bytes"),
    ],
)
def test_a_damaged_run_is_one_sentence(tmp_path: Path, change: Callable[[Path], Any], said: str) -> None:
    folder = run_folder(tmp_path / "run")
    change(folder)
    with pytest.raises(UserError) as raised:
        report_on(folder)
    message = str(raised.value)
    assert message.startswith(f"{folder}: ")
    assert said in message
    assert "\n" not in message
    assert not (folder / "report.html").exists()


def test_a_run_that_has_not_ended(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path / "run")
    (folder / "log.jsonl").touch()
    with pytest.raises(UserError, match=r"run: there is no report\.json: this run has not ended"):
        report_on(folder)
    with pytest.raises(UserError, match="there is no such folder"):
        report_on(tmp_path / "nowhere")


def test_damaged_layers_leave_the_rest(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "layers.json").write_text('{"title": "x", "layers": [{}], "total_bytes": 1}')
    assert "Layers.json cannot be read" in checked(run_page(open_run(folder))).text
    (folder / "report.json").unlink()
    with pytest.raises(UserError, match=r"run: its layers\.json cannot be read: "):
        report_on(folder)


@pytest.mark.parametrize(
    ("out", "said"),
    [("report.json", "the name of a page ends in .html"), ("x.html", "is a folder"), ("file/x.html", "cannot be")],
)
def test_where_no_page_can_be_written(tmp_path: Path, out: str, said: str) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "x.html").mkdir()
    (folder / "file").touch()
    before = (folder / "report.json").read_bytes()
    result = CliRunner().invoke(app, ["report", str(folder), "--out", str(folder / out)])
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)
    assert (folder / "report.json").read_bytes() == before


# Markup and charts ---------------------------------------------------------------------------------------------------


@given(text=st.text())
def test_text_comes_back_from_markup_as_it_was(text: str) -> None:
    parsed = Parsed(element("p", text, class_=text))
    ((tag, attributes),) = parsed.found
    # What no page may hold is replaced.
    assert (tag, "".join(parsed.texts), attributes["class"]) == ("p", visible(text), visible(text))


def test_markup_is_escaped_once() -> None:
    assert element("p", "<", Html("<b></b>"), ["&", None]) == "<p>&lt;<b></b>&amp;</p>"
    assert element("meta", charset="utf-8", content=None) == '<meta charset="utf-8">'


numbers = st.none() | st.floats()


@given(
    points=st.lists(st.tuples(st.floats(), numbers), max_size=30),
    value=numbers,
    log=st.booleans(),
    zero=st.booleans(),
    whole=st.booleans(),
)
@example(points=[(0.0, 0.0), (1e100, 0.0)], value=None, log=False, zero=False, whole=False)
def test_a_chart_keeps_within_its_picture(
    points: Any, value: float | None, log: bool, zero: bool, whole: bool
) -> None:
    series = Series("a", points, "parent", label="a label")
    chart = Chart("k", "t", "d", [series], [Reference("r", value, "parent")], log=log, zero=zero, whole=whole)
    picture = chart.svg()
    if picture is None:
        assert charts._drawable(points, log) == []
        return
    assert "nan" not in picture
    assert "inf" not in picture
    for cx, cy in re.findall(r'cx="([^"]+)" cy="([^"]+)"', picture):
        assert 0 <= float(cx) <= charts.WIDTH
        assert 0 <= float(cy) <= charts.HEIGHT
    assert picture.count("<circle") == len(charts._drawable(points, log))


def test_a_long_curve_keeps_its_extremes() -> None:
    points = [(float(step), math.sin(step) + (9.0 if step == 7777 else 0.0)) for step in range(10_000)]
    kept = charts._thinned(points)
    assert len(kept) <= charts._MOST_POINTS
    assert kept == sorted(kept)
    assert points[7777] in kept
    assert (kept[0], kept[-1]) == (points[0], points[-1])


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 10.0, False, [0, 2, 4, 6, 8, 10]),
        (1.23, 1.31, False, [1.24, 1.26, 1.28, 1.3]),
        (math.log10(38), math.log10(45), True, [38, 40, 42, 44]),
        (math.log10(4), math.log10(90), True, [5, 10, 20, 50]),
        (0.0, 12.0, True, [1, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, expected: list[float]) -> None:
    found = charts._log_ticks(low, high) if log else charts._ticks(low, high, 5)
    assert found == pytest.approx(expected)


def test_bars_without_any_length() -> None:
    assert "none" in bars("k", "t", [("none", 0.0, "0 s", None)])
    assert bars("k", "t", [])


# The three are drawn where their numbers are.
def test_perplexities_are_where_they_belong() -> None:
    made = shown(report(ppl_parent=1.0, ppl_quantized=100.0, ppl_curve=[[0, 10.0], [10, 10.0]], ppl_recovered=10.0))
    page = run_page(run_of(report(ppl_parent=1.0, ppl_quantized=100.0, ppl_curve=[[0, 10.0], [10, 10.0]]), None, "x"))
    part = page[page.index('id="perplexity-title"') :]
    lines = {name: float(y) for y, name in re.findall(r'd="M52 ([\d.]+)H[\d.]+" class="reference (\w+)"', part)}
    (curve,) = re.findall(r'd="M[\d.]+ ([\d.]+)L[\d.]+ ([\d.]+)" class="curve recovered"', part)
    # On a logarithmic axis 10 is in the middle of 1 and 100.
    middle = (lines["parent"] + lines["quantized"]) / 2
    assert [float(y) for y in curve] == pytest.approx([middle, middle], abs=0.11)
    assert made.count("svg") > 0
