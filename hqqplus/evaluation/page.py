"""A run on one page: `report.html`, which is whole in itself and needs no network and no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hqqplus.evaluation.charts import Chart, Reference, Series, bars
from hqqplus.evaluation.layers import Layer, Layers, totals_sentence
from hqqplus.evaluation.markup import Child, Html, document, element, section, table
from hqqplus.evaluation.report import STAGES, Report, _inline, _smoothed, number
from hqqplus.evaluation.run_folder import Figures, Run, open_run, run_of
from hqqplus.evaluation.style import SERIES_COLORS
from hqqplus.files import write_text

PAGE = "report.html"
DASH = "–"
# From so many values on, a curve is shown with its mean.
_NOISY = 20
# How a run's stages are called, and which of them are shown as one.
_STAGES = {
    "calibrate": "calibrate",
    "quantize": "quantize",
    "teacher": "teacher's targets",
    "train": "train",
    "measure parent": "measure",
    "measure quantized": "measure",
    "measure recovered": "measure",
}


def write_page(report: Report, layers: Layers | None, folder: str | Path) -> None:
    """Write `report.html` for a run that ends with `report` to `folder`, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    write_text(Path(folder) / PAGE, run_page(run_of(report, layers, folder)))


def report_on(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of the run in `folder` to `output`, by default its `report.html`. Returns where it is.

    Raises:
        UserError: naming the folder, if there is no finished run and no packed model with figures of its layers.
        OSError: `output` cannot be written.
    """
    path = Path(folder) / PAGE if output is None else Path(output)
    write_text(path, run_page(open_run(folder)))
    return path


def run_page(run: Run) -> str:
    """The page of a run, or of a packed model that was not trained on yet."""
    figures = run.figures
    parts: list[Child] = [element("header", element("h1", run.name), element("p", about(run), class_="about"))]
    if figures is None:
        parts += [_packed_headline(run), _not_measured()]
    else:
        parts += [_headline(run, figures), _curves(figures)]
    parts.append(_quantization(run))
    if figures is not None:
        parts += [_samples(figures), _texts(figures), _costs(figures), _made(figures)]
    parts.append(footer())
    return document(f"{run.name}: hqqplus", parts)


# --- words -----------------------------------------------------------------------------------------------------------


def percent(share: float | None) -> str:
    return DASH if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def size(count: float) -> str:
    """Bytes as people read them; a dash where nothing is known."""
    if not count:
        return DASH
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return DASH
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:,.1f} h" if hours >= 2 else f"{minutes:.1f} min" if minutes >= 2 else f"{seconds:.1f} s"


def bits(value: float | None) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{value:.2f}"


def error(value: float) -> str:
    """An NMSE."""
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def measured(value: float | None) -> str:
    """A perplexity that was measured in any case: a report has no other word for what was not finite."""
    return "not finite" if value is None else number(value)


def parents(figures: Figures) -> str:
    """The parent's perplexity, which a run need not measure. Its size is known only where it was loaded."""
    return measured(figures.ppl_parent) if figures.parent_bytes else number(figures.ppl_parent)


def groups(quantization: Mapping[str, Any]) -> str:
    """`2 bits, groups of 64`; a dash where it is not known."""
    count, group = quantization.get("nbits"), quantization.get("group_size")
    if not isinstance(count, int) or not isinstance(group, int):
        return DASH
    rest = ", some layers others" if quantization.get("overrides") else ""
    return f"{count} bit{'s' * (count != 1)}, " + ("whole rows" if group == -1 else f"groups of {group}") + rest


def about(run: Run) -> str:
    """One line on what was done."""
    said = [run.model, *([groups(run.quantization)] if run.quantization else [])]
    if run.figures is None:
        return " · ".join([*said, "packed, and not trained on"])
    recipe = run.figures.recipe
    adapter = recipe.get("adapter", {})
    method = recipe.get("calibration", {}).get("method", "none")
    if method != "none":
        said.append(f"calibrated ({method})")
    if "r" in adapter:
        said.append(f"LoRA of rank {adapter['r']}")
    if run.figures.adapter_parameters:
        said.append(f"{run.figures.adapter_parameters:,} parameters in the adapter")
    return " · ".join([*said, run.figures.device])


def footer() -> Html:
    return element(
        "footer",
        "Perplexity is per token, of the same text for all. Recovery is 1 − ln(recovered / parent) / "
        "ln(quantized / parent). Bits per weight are those of the linear layers, scales and zeros included; sizes are "
        "of everything stored. NMSE is ‖W − Q‖² / ‖W‖².",
    )


# --- parts -----------------------------------------------------------------------------------------------------------


def _figure(label: str, value: str, aside: str | None = None, color: str | None = None) -> Html:
    said = [element("span", value, class_="value"), element("span", aside, class_="aside") if aside else None]
    return element("div", element("dt", label), element("dd", said), class_=color)


def _headline(run: Run, figures: Figures) -> Html:
    whole = figures.backbone_bytes + figures.adapter_bytes
    smaller = f"{figures.parent_bytes / whole:.1f} times smaller than the parent" if figures.parent_bytes else None
    with_adapter = run.bits_with_adapter
    return element(
        "dl",
        _figure("Parent", parents(figures), "perplexity, 16 bits", "parent"),
        _figure("Quantized", measured(figures.ppl_quantized), "perplexity", "quantized"),
        _figure("Recovered", measured(figures.ppl_recovered), "perplexity", "recovered"),
        _figure("Recovery", percent(figures.recovery), "of the lost log-perplexity"),
        _figure(
            "Bits per weight",
            bits(figures.bits_per_weight),
            None if with_adapter is None else f"{bits(with_adapter)} with the adapter",
        ),
        _figure("Size, adapter included", size(whole), smaller),
        class_="figures",
    )


def _packed_headline(run: Run) -> Html:
    layers = run.layers
    assert layers is not None
    worst = layers.worst(1)
    return element(
        "dl",
        _figure("Bits per weight", bits(run.bits_per_weight), "linear layers"),
        _figure("Mean NMSE", error(layers.nmse), "over all packed weights"),
        _figure("Largest NMSE", error(worst[0].statistics.nmse) if worst else DASH, worst[0].name if worst else None),
        _figure("Packed layers", f"{len(layers.layers):,}"),
        _figure("Packed weights", f"{layers.weights:,}"),
        _figure("Size", size(layers.total_bytes), "of everything stored"),
        class_="figures",
    )


def _not_measured() -> Html:
    return element(
        "div",
        element(
            "p",
            "Perplexity, samples, curves, memory and time are missing here: no run has trained on this model. ",
            element("code", "hqqplus evaluate"),
            " measures it; a recipe that names this folder as its model trains on it.",
        ),
        class_="warning",
    )


def figure(chart: Chart, nothing: str, note: str | None = None, *more: Child) -> Html:
    """A chart under its title; `nothing` says why there is none."""
    picture = chart.svg()
    body: Child = element("p", nothing, class_="note") if picture is None else picture
    said = element("p", note, class_="note") if note and picture is not None else None
    return element("figure", element("figcaption", element("h3", chart.title), said), body, *more)


def _curves(figures: Figures) -> Html:
    return section("Training", element("div", _loss(figures), _perplexity(figures), class_="charts"))


def _loss(figures: Figures) -> Html:
    finite = [(x, y) for x, y in figures.loss_curve if y is not None]
    noisy = len(finite) >= _NOISY
    mean: list[tuple[float, float | None]] = []
    if noisy:
        smooth = _smoothed([y for _, y in finite])
        mean = [(x, y) for (x, _), y in zip(finite, smooth, strict=True)]
    last = mean[-1][1] if mean else finite[-1][1] if finite else None
    thin = Series("loss", figures.loss_curve, "recovered", line="curve thin", marks="none")
    whole = Series("loss", figures.loss_curve, "recovered", label=number(last))
    mean_line = Series("mean of the loss", mean, "recovered", label=number(last), marks="none")
    first = f"from {number(finite[0][1])} to {number(last)}" if finite else "not recorded"
    return figure(
        Chart(
            "loss",
            "Loss",
            f"The training loss over {len(figures.loss_curve)} logged steps: {first}.",
            [thin, mean_line] if noisy else [whole],
        ),
        "No loss was recorded.",
        "thin: as logged, bold: its mean" if noisy else "as logged",
    )


def perplexity_points(figures: Figures) -> list[tuple[float, float | None]]:
    """Perplexity over steps; of a run that measured none on its way, before the first step and after the last."""
    if figures.ppl_curve:
        return list(figures.ppl_curve)
    last = max((step for step, _ in figures.loss_curve if math.isfinite(step)), default=1.0)
    return [(0.0, figures.ppl_quantized), (last, figures.ppl_recovered)]


def _perplexity(figures: Figures) -> Html:
    references = [Reference(f"quantized {_short(figures.ppl_quantized)}", figures.ppl_quantized, "quantized")]
    if figures.ppl_parent is not None:
        references.insert(0, Reference(f"parent {number(figures.ppl_parent)}", figures.ppl_parent, "parent"))
    points = perplexity_points(figures)
    label = f"recovered {_short(figures.ppl_recovered)}"
    return figure(
        Chart(
            "perplexity",
            "Perplexity",
            f"Perplexity on held-out text over the training steps. Parent: {parents(figures)}; quantized: "
            f"{measured(figures.ppl_quantized)}; recovered: {measured(figures.ppl_recovered)}.",
            [Series("perplexity", points, "recovered", label=label)],
            references,
            log=True,
        ),
        "No finite perplexity was measured.",
        "held-out text, logarithmic",
    )


def _short(value: float | None) -> str:
    return "∞/NaN" if value is None else number(value)


def _quantization(run: Run) -> Html:
    left = None if run.figures is None else _against_bits(run, run.figures)
    if run.layers is None:
        lacking = run.lacks_layers[:1].upper() + run.lacks_layers[1:]
        right = element("figure", element("h3", "NMSE by layer"), element("p", f"{lacking}.", class_="note"))
        return section("Quantization", element("div", left, right, class_="charts"))
    moved = None
    method = run.figures.recipe.get("calibration", {}).get("method", "none") if run.figures is not None else "none"
    if method != "none":
        moved = (
            "Calibration lessens the error of what the layers put out; that of their weights, which is shown here, "
            "may rise by it."
        )
    return section(
        "Quantization",
        element("div", left, _layers(run.layers), class_="charts"),
        element("p", f"{totals_sentence(run.layers)}.", f" {moved}" if moved else None, class_="note"),
        element(
            "details",
            element("summary", "All layers"),
            table(
                ["layer", "shape", "bits", "group", "bits per weight", "NMSE", "kurtosis", "outliers"],
                [_layer_row(layer) for layer in run.layers.layers],
            ),
        ),
    )


def _against_bits(run: Run, figures: Figures) -> Html:
    before, after = run.bits_per_weight, run.bits_with_adapter
    note = "adapter counted, logarithmic"
    if after is None:
        after, note = before, "without the adapter: it is not known over how many weights it is; logarithmic"
    chart = Chart("bits", "Perplexity against bits per weight", "Nothing can be shown.", [])
    if before is not None and after is not None:
        ends = [(before, figures.ppl_quantized), (after, figures.ppl_recovered)]
        series = (
            [Series("", ends, "parent", line="link", marks="none")] if None not in (ends[0][1], ends[1][1]) else []
        )
        for (place, value), stage, hollow in zip(ends, STAGES[1:], (True, False), strict=True):
            said = f"{stage}: perplexity {measured(value)} at {bits(place)} bits per weight"
            label = f"{stage} {_short(value)}"
            one = Series(stage, [(place, value)], stage, label=label, line=None, hollow=hollow, notes=[said])
            series.append(one)
        chart = Chart(
            "bits",
            "Perplexity against bits per weight",
            "; ".join(note for one in series for note in one.notes) + f"; the parent: {parents(figures)} at 16 bits.",
            series,
            parent_line(figures),
            x_label="bits per weight",
            log=True,
            whole=False,
            pad=0.5,
        )
    return figure(chart, "No finite perplexity was measured, or it is not known at how many bits.", note)


def parent_line(figures: Figures) -> list[Reference]:
    if figures.ppl_parent is None:
        return []
    return [Reference(f"parent {number(figures.ppl_parent)}", figures.ppl_parent, "parent")]


def spread(errors: Sequence[float]) -> bool:
    """Whether NMSEs want a logarithmic axis: from zero, unless that presses many to the ground."""
    finite = [value for value in errors if math.isfinite(value) and value > 0]
    return bool(finite) and sum(value < max(finite) / 10 for value in finite) > len(finite) / 10


def _layers(layers: Layers) -> Html:
    places = {layer.name: place for place, layer in enumerate(layers.layers, start=1)}
    kinds = layers.by_kind()
    series = [
        Series(
            kind,
            [(places[layer.name], layer.statistics.nmse) for layer in members],
            f"c{index % SERIES_COLORS}",
            line="curve thin",
            shape=index // SERIES_COLORS,
            notes=[f"{layer.name}: NMSE {error(layer.statistics.nmse)}" for layer in members],
        )
        for index, (kind, members) in enumerate(kinds.items())
    ]
    legend = [element("li", _inline(kind), class_=f"c{index % SERIES_COLORS}") for index, kind in enumerate(kinds)]
    log = spread([layer.statistics.nmse for layer in layers.layers])
    worst = ", ".join(f"{layer.name} {error(layer.statistics.nmse)}" for layer in layers.worst(3))
    chart = Chart(
        "layers",
        "NMSE by layer",
        f"The error of {len(layers.layers)} layers in the order of the model. The largest: {worst}.",
        series,
        x_label="layer, in the order of the model",
        log=log,
        zero=not log,
    )
    return figure(
        chart,
        "No layer has an error.",
        "‖W − Q‖² / ‖W‖²" + (", logarithmic" if log else ""),
        element("ul", legend, class_="legend"),
    )


def _layer_row(layer: Layer) -> list[str]:
    s = layer.statistics
    return [
        layer.name,
        " × ".join(map(str, s.shape)),
        str(s.nbits),
        "row" if s.group_size == -1 else str(s.group_size),
        f"{s.bits_per_weight:.3f}",
        error(s.nmse),
        f"{s.kurtosis:.3g}" if math.isfinite(s.kurtosis) else DASH,
        f"{s.outlier_share:.3g}",
    ]


def completion(title: Child, text: str | None, color: str | None = None) -> Html:
    """What a model wrote, under its name. A paragraph of its own, so that no direction of writing leaks out of it."""
    said = element("pre", text, dir="auto") if text else element("p", "nothing", class_="note")
    return element("div", element("h4", title), said, class_=color)


def _samples(figures: Figures) -> Html | None:
    if not figures.samples:
        return None
    parts = []
    for sample in figures.samples:
        found = {stage: getattr(sample, stage) for stage in STAGES}
        columns = [completion(stage, text, stage) for stage, text in found.items() if text is not None]
        parts.append(
            element(
                "article",
                element("pre", sample.prompt, class_="prompt", dir="auto"),
                element("div", columns, class_="side-by-side"),
                class_="sample",
            )
        )
    note = element("p", "Greedy completions of the same prompts.", class_="note")
    return section("Samples", note, parts)


def _texts(figures: Figures) -> Html | None:
    if not figures.texts:
        return None
    rows = []
    for name, found in figures.texts.items():
        parent = found.get("parent")
        said = measured(parent) if figures.parent_bytes else number(parent)
        rows.append([name, said, *(measured(found.get(stage)) for stage in STAGES[1:])])
    return section("Further texts", table(["perplexity", *STAGES], rows))


def stages(figures: Figures) -> dict[str, tuple[float, int | None]]:
    """Stage as it is shown -> (seconds, peak bytes), in the order in which they are run."""
    found: dict[str, tuple[float, int | None]] = {}
    costs = figures.costs.stages
    for name in [*(name for name in _STAGES if name in costs), *(name for name in costs if name not in _STAGES)]:
        shown = _STAGES.get(name, name)
        seconds, peak = found.get(shown, (0.0, None))
        peaks = [one for one in (peak, costs[name].peak_bytes) if one is not None]
        found[shown] = seconds + costs[name].seconds, max(peaks, default=None)
    if not found and figures.train_seconds is not None:
        found["train"] = max(figures.train_seconds, 0.0), None
    return found


def peak(figures: Figures) -> int | None:
    """The most memory that was in use, in bytes; None where it was not noted."""
    return max((cost for _, cost in stages(figures).values() if cost is not None), default=None)


def peak_kind(figures: Figures) -> str:
    return "on the GPU, by PyTorch's count" if figures.costs.memory == "gpu" else "resident, of the whole process"


def _costs(figures: Figures) -> Html:
    on_gpu = figures.costs.memory == "gpu"
    times = []
    for name, (seconds, most) in stages(figures).items():
        said = duration(seconds) + (f", {size(most)}" if on_gpu and most is not None else "")
        times.append((name, seconds, said, None))
    whole = figures.backbone_bytes + figures.adapter_bytes
    sizes = [
        ("parent, 16 bits", float(figures.parent_bytes), size(figures.parent_bytes), "parent"),
        ("quantized", float(figures.backbone_bytes), size(figures.backbone_bytes), "quantized"),
        ("recovered: the same and the adapter", float(whole), size(whole), "recovered"),
    ]
    most = peak(figures)
    said = (
        "The peak of memory was not noted." if most is None else f"Peak of memory: {size(most)}, {peak_kind(figures)}."
    )
    speed = figures.tokens_per_second
    pace = f" Training: {speed:,.0f} tokens a second." if speed is not None and math.isfinite(speed) else ""
    return section(
        "Memory and time",
        element(
            "div",
            element(
                "figure",
                element("figcaption", element("h3", "Size on the disk")),
                bars("sizes", "Size on the disk", [row for row in sizes if row[1]]),
            ),
            element("figure", element("figcaption", element("h3", "Time")), bars("times", "Time by stage", times)),
            class_="charts",
        ),
        element("p", f"{said}{pace} Device: {figures.device}.", class_="note costs"),
    )


def facts(values: Mapping[str, str]) -> Html:
    """Names and values in columns."""
    return element(
        "dl",
        [element("div", element("dt", name), element("dd", value)) for name, value in values.items()],
        class_="facts",
    )


def fact(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def as_recipe(recipe: Mapping[str, Any]) -> str:
    """As it could be written to a file."""
    import yaml

    return str(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100))


def _made(figures: Figures) -> Html:
    recipe = None
    if figures.recipe:
        recipe = element(
            "details", element("summary", "Recipe"), element("pre", as_recipe(figures.recipe), class_="whole")
        )
    measured_how = {f"evaluation: {name}": fact(value) for name, value in figures.evaluation.items()}
    if digest := measured_how.pop("evaluation: recipe_digest", None):
        measured_how["recipe digest"] = digest[:12]
    return section("How this was made", facts({**measured_how, **figures.versions}), recipe)
