"""Before and after, on one page: `report.json` for programs, `report.md` and `report.png` for people."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqqplus.files import replacing, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

STAGES = ("parent", "quantized", "recovered")
_DISTRIBUTIONS = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "hqqplus")
_DASH = "–"
_HOW_TO_LOAD = """\
import hqqplus  # registers the quantizer: without it transformers fills the backbone with random weights
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

backbone = "..."  # the packed backbone's folder
adapter = "..."  # the adapter's folder
tokenizer = AutoTokenizer.from_pretrained(backbone)
model = AutoModelForCausalLM.from_pretrained(backbone, device_map="auto")
model = PeftModel.from_pretrained(model, adapter)
"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one run of quantize-and-recover gave. Not-a-number and infinity are welcome; None means not measured.

    Perplexities are per token, sizes in bytes, `tokens_per_second` is training's. `backbone_bytes` is the packed
    backbone as stored (everything, embedding and head included), `bits_per_weight` that of its linear layers,
    metadata included, `linear_weights` their number of weights; 0 in reports that were written before it was counted.
    """

    name: str
    ppl_parent: float | None
    ppl_quantized: float
    ppl_recovered: float
    recovery: float | None
    bits_per_weight: float
    backbone_bytes: int
    parent_bytes: int
    adapter_bytes: int
    adapter_parameters: int
    train_seconds: float
    tokens_per_second: float
    device: str
    # {"prompt", "parent", "quantized", "recovered"}; a stage that was not sampled is left out or None.
    samples: list[dict[str, Any]] = field(default_factory=list)
    # Further evaluation sets: name -> {"parent", "quantized", "recovered"}, perplexities.
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    loss_curve: list[list[float]] = field(default_factory=list)  # [step, loss]
    ppl_curve: list[list[float]] = field(default_factory=list)  # [step, perplexity]
    evaluation: dict[str, Any] = field(default_factory=dict)  # how the perplexities were measured
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    linear_weights: int = 0
    # {"memory": "gpu" or "process", "stages": {stage: {"seconds", "peak_bytes"}}}, as `recovery.costs` notes them.
    costs: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as values that JSON has: not-a-number and infinity become null, paths strings."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in dataclasses.fields(self)}


def environment() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, read from their metadata: none is imported."""
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def write_report(report: Report, folder: str | Path, how_to_load: str | None = None) -> None:
    """Write `report.png`, `report.json` and `report.md` to `folder` (made if needed), each whole or not at all.

    `how_to_load` is the Python snippet on the page; the default names no folders.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    _draw(report, folder / "report.png")
    write_text(folder / "report.md", _page(report, how_to_load or _HOW_TO_LOAD))
    # Last: where it is, the run is through.
    write_json(folder / "report.json", report.to_json())


def read_report(folder: str | Path) -> Report | None:
    """The report in `folder`, as `write_report` left it; None where there is none that can be read.

    What JSON has no number for comes back as None.
    """
    try:
        values = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        return Report(**values)
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def print_report(report: Report, console: Console | None = None) -> None:
    """The before-and-after table and the samples, on the terminal (or on `console`)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    table = Table(title=Text(visible(report.name), style="bold"), title_justify="left")
    header, *rows = _stage_rows(report)
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right")
    for row, style in zip(rows, ("", "red", "green"), strict=True):
        table.add_row(*row, style=style)
    console.print(table)
    console.print(Text(_recovery_sentence(report)))
    if report.texts:
        table = Table(title=Text("further sets, perplexity"), title_justify="left")
        header, *rows = _text_rows(report)
        for index, title in enumerate(header):
            table.add_column(title, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    for sample in report.samples:
        # Text objects: what a model writes is not rich markup.
        console.print()
        console.print(Text(visible(sample.get("prompt")), style="bold"))
        for stage, style in zip(STAGES, ("default", "red", "green"), strict=True):
            if sample.get(stage) is not None:
                console.print(Text.assemble((f"{stage:>9}  ", "dim"), (visible(sample[stage]), style)))


def number(value: float | None) -> str:
    """A perplexity or a loss as people read it: about three digits; a dash where it was not measured."""
    if value is None:
        return _DASH
    value = float(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    magnitude = abs(value)
    if magnitude >= 1e6:
        return f"{value:.2e}"
    if magnitude >= 999.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if magnitude >= 99.995 else f"{value:.2f}"


def _plain(value: Any) -> Any:
    """`value` as JSON has it; numbers of numpy and torch are recognised by their `item`."""
    if isinstance(value, bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


def visible(text: object) -> str:
    """`text` without what a terminal or a Markdown reader would act on: control characters become U+FFFD."""
    plain = str(text).encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "�", plain)


def _megabytes(size: float) -> str:
    # Of a parent that was never loaded no size is known.
    return f"{size / 1e6:,.1f}" if size else _DASH


def _stage_rows(report: Report) -> list[list[str]]:
    bits = number(report.bits_per_weight)
    return [
        ["", "perplexity", "bits per weight", "MB"],
        ["parent", number(report.ppl_parent), _DASH, _megabytes(report.parent_bytes)],
        ["quantized", number(report.ppl_quantized), bits, _megabytes(report.backbone_bytes)],
        [
            "recovered",
            number(report.ppl_recovered),
            f"{bits} + adapter",
            _megabytes(report.backbone_bytes + report.adapter_bytes),
        ],
    ]


def _text_rows(report: Report) -> list[list[str]]:
    # Here and not above: `environment` must not cost an import of torch.
    from hqqplus.evaluation.perplexity import recovery

    rows = [["", *STAGES, "recovery"]]
    for name, measured in report.texts.items():
        parent, quantized, recovered = (measured.get(stage) for stage in STAGES)
        rows.append(
            [
                visible(name),
                number(parent),
                number(quantized),
                number(recovered),
                _percent(recovery(parent, quantized, recovered)),
            ]
        )
    return rows


def _percent(share: float | None) -> str:
    return _DASH if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def _recovery_sentence(report: Report) -> str:
    size = f"The adapter has {report.adapter_parameters:,} parameters in {_megabytes(report.adapter_bytes)} MB."
    if report.recovery is None or not math.isfinite(report.recovery):
        return size
    return f"Recovery: {_percent(report.recovery)} of the log-perplexity that quantization had lost. {size}"


def _page(report: Report, how_to_load: str) -> str:
    parts = [
        f"# {_inline(report.name)}: before and after",
        markdown_table(_stage_rows(report)),
        _recovery_sentence(report) + " Recovery is 1 − ln(after / parent) / ln(before / parent); bits per weight are "
        "those of the linear layers, scales and zeros included; sizes are of everything stored.",
        "![Training loss, and perplexity over the training steps](report.png)",
    ]
    if report.texts:
        parts += ["## Further sets", "Perplexity:", markdown_table(_text_rows(report))]
    if report.samples:
        parts += ["## Samples", "Greedy completions of the same prompts."]
        for index, sample in enumerate(report.samples, start=1):
            parts += [f"### {index}", _fenced(visible(sample.get("prompt")))]
            for stage in STAGES:
                if sample.get(stage) is not None:
                    parts += [f"{stage}:", _fenced(visible(sample[stage]))]
    parts += ["## How to load", _fenced(how_to_load.rstrip("\n"), "python")]
    parts += ["## How this was made", markdown_table([["", ""], *_facts(report)])]
    if report.recipe:
        recipe = _fenced(json.dumps(_plain(report.recipe), indent=2, ensure_ascii=False), "json")
        parts.append(f"<details>\n<summary>Recipe</summary>\n\n{recipe}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def _facts(report: Report) -> list[list[str]]:
    facts = [["device", report.device], ["training", _training_time(report)]]
    facts += [[f"evaluation: {key}", _fact(value)] for key, value in report.evaluation.items()]
    facts += [[key, value] for key, value in report.versions.items()]
    return [[visible(cell) for cell in row] for row in facts]


def _training_time(report: Report) -> str:
    seconds, speed = report.train_seconds, report.tokens_per_second
    if not math.isfinite(seconds):
        return _DASH
    minutes, hours = seconds / 60, seconds / 3600
    time = f"{hours:.1f} h" if hours >= 2 else f"{minutes:.1f} min" if minutes >= 2 else f"{seconds:.1f} s"
    return f"{time}, {speed:,.0f} tokens/s" if math.isfinite(speed) else time


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _inline(text: str) -> str:
    return " ".join(visible(text).replace("|", "\\|").split())


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = [[_inline(cell) for cell in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *body])


def _fenced(text: str, language: str = "text") -> str:
    """`text` in a code fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


# --- the picture -----------------------------------------------------------------------------------------------------

_COLORS = {"parent": "#4a5568", "quantized": "#c2410c", "recovered": "#1d4ed8"}
_INK, _FAINT = "#1f2937", "#d1d5db"


def _draw(report: Report, path: Path) -> None:
    """Left: the training loss over steps. Right: perplexity over steps (log axis), parent and quantized as lines."""
    # The object API: no pyplot, hence no global figures and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1, wspace=0.08)
    figure = Figure(figsize=(11, 4.2), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    # A dollar sign would start a formula.
    title = _inline(report.name).replace("\\|", "|").replace("$", r"\$")
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=_INK)
    left, right = figure.subplots(1, 2)
    _draw_loss(left, report)
    _draw_perplexity(right, report)
    with replacing(path) as temporary:
        # Without the version of matplotlib in it, the same report gives the same file.
        figure.savefig(temporary, metadata={"Software": None})


def _points(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    pairs = [(step, value) for step, value in curve if value is not None]
    return [(float(step), float(value)) for step, value in pairs if math.isfinite(value)]


def _frame(axes: Any, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=10.5, color=_INK, pad=10)
    axes.set_xlabel("training step", fontsize=9.5, color=_INK)
    axes.grid(axis="y", color=_FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(color=_FAINT, labelcolor=_INK, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10], integer=True))


def _nothing(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_COLORS["parent"], fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_loss(axes: Any, report: Report) -> None:
    points = _points(report.loss_curve)
    noisy = len(points) >= 20
    _frame(axes, "Training loss (thin: as logged, bold: mean)" if noisy else "Training loss")
    if not points:
        _nothing(axes, "no loss was recorded")
        return
    steps, losses = zip(*points, strict=True)
    bold = _smoothed(losses) if noisy else list(losses)
    color = _COLORS["recovered"]
    axes.plot(
        steps,
        losses,
        color=color,
        linewidth=0.8 if noisy else 1.8,
        alpha=0.3 if noisy else 1,
        marker="" if len(points) > 1 else "o",
    )
    if noisy:
        axes.plot(steps, bold, color=color, linewidth=1.8)
    axes.annotate(
        number(bold[-1]),
        (steps[-1], bold[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=color,
        annotation_clip=False,
    )
    axes.margins(x=0.02)


def _smoothed(values: Sequence[float]) -> list[float]:
    """A centred mean over a twentieth of the run: unlike a trailing mean it does not lag behind a falling curve."""
    reach = max(1, len(values) // 40)
    smooth = []
    for index in range(len(values)):
        # Symmetric at the steep start, so that it is not pulled down; at the flat end the noise is worth averaging.
        ahead = min(reach, index)
        window = values[index - ahead : index + ahead + 1]
        smooth.append(sum(window) / len(window))
    return smooth


def _draw_perplexity(axes: Any, report: Report) -> None:
    _frame(axes, "Perplexity on the evaluation set (log scale)")
    points = [(step, value) for step, value in _points(report.ppl_curve) if value > 0]
    if not points:
        # Two measurements are always there: before the first step and after the last.
        last = max((step for step, _ in _points(report.loss_curve)), default=1.0)
        points = [(step, value) for step, value in _points([[0, report.ppl_quantized], [last, report.ppl_recovered]])]
    lines = [
        (stage, value)
        for stage, value in (("parent", report.ppl_parent), ("quantized", report.ppl_quantized))
        if value is not None and math.isfinite(value) and value > 0
    ]
    values = [value for _, value in points + lines]
    if not values:
        _nothing(axes, "no finite perplexity was measured")
        return
    axes.set_yscale("log")
    # Infinity has no line, but it has a label, at the top.
    labels = [("quantized", math.inf)] if report.ppl_quantized == math.inf else []
    for stage, value in lines:
        axes.axhline(value, color=_COLORS[stage], linewidth=1.2, linestyle=(0, (4, 3)))
        labels.append((stage, value))
    if points:
        steps, curve = zip(*points, strict=True)
        axes.plot(steps, curve, color=_COLORS["recovered"], linewidth=1.8, marker="o", markersize=3.5)
        labels.append(("recovered", curve[-1]))
    axes.margins(x=0.02)
    low, high = min(values), max(values)
    room = max((high / low) ** 0.06, 1.02)
    axes.set_ylim(low / room, high * room)
    _ticks(axes, low / room, high * room)
    _label_lines(axes, labels)


def _ticks(axes: Any, low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.yaxis.set_minor_locator(NullLocator())
    if high / low < 5:
        # Less than a decade: powers of ten would leave the axis bare.
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}" if value < 1e6 else f"{value:.0e}"))


def _label_lines(axes: Any, labels: list[tuple[str, float]]) -> None:
    """Names and values to the right of the lines, moved apart where they would overlap."""
    low, high = (math.log(bound) for bound in axes.get_ylim())
    labels = sorted(labels, key=lambda label: label[1])
    places = _apart([min((math.log(value) - low) / (high - low), 1.0) for _, value in labels], gap=0.075)
    for (stage, value), place in zip(labels, places, strict=True):
        axes.text(
            1.015,
            place,
            f"{stage}  {number(value)}",
            transform=axes.transAxes,
            va="center",
            fontsize=9.5,
            color=_COLORS[stage],
        )


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places with at least `gap` between neighbours, each group that had to move centred where it was."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        # A group's members sit `gap` apart around the mean of the places they wanted.
        while len(groups) > 1 and _span(groups[-1], gap)[0] - _span(groups[-2], gap)[1] < gap - 1e-12:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_span(group, gap)[0] + index * gap for group in groups for index in range(len(group))]


def _span(group: Sequence[float], gap: float) -> tuple[float, float]:
    middle, half = sum(group) / len(group), gap * (len(group) - 1) / 2
    return middle - half, middle + half
