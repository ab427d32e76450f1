"""Several runs on one page: what each gave, at how many bits, and where their recipes differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hqqplus.errors import UserError
from hqqplus.evaluation.charts import Chart, Reference, Series
from hqqplus.evaluation.markup import Child, Html, document, element, section, table
from hqqplus.evaluation.page import (
    DASH,
    bits,
    completion,
    duration,
    error,
    fact,
    facts,
    figure,
    footer,
    groups,
    measured,
    parents,
    peak,
    peak_kind,
    percent,
    perplexity_points,
    size,
    spread,
    stages,
)
from hqqplus.evaluation.report import number
from hqqplus.evaluation.run_folder import Figures, Run, open_run
from hqqplus.evaluation.style import SERIES_COLORS
from hqqplus.files import write_text

# What perplexities depend on beside the model.
_OF_THE_TEXT = {
    "data": (
        "path_or_name",
        "split",
        "eval_path_or_name",
        "eval_split",
        "text_field",
        "prompt",
        "completion",
        "messages",
        "max_length",
    ),
    "evaluation": ("max_tokens", "join"),
}


@dataclass(frozen=True)
class _Entry:
    """A run among others: the letter and the colour by which all parts of the page call it."""

    run: Run
    letter: str
    color: str
    shape: int

    @property
    def figures(self) -> Figures | None:
        return self.run.figures

    def key(self) -> Html:
        return element("span", self.letter, class_=f"key {self.color}")

    def title(self) -> list[Child]:
        return [self.key(), self.run.name]


def compare_runs(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write the page of the runs in `folders` to `output`, whole or not at all. Returns where it is.

    Raises:
        UserError: if they are fewer than two, one is named twice, or one is no finished run and no packed model with
            figures of its layers.
        OSError: `output` cannot be written.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise UserError("compare: name two runs or more; hqqplus report shows a single one")
    places = [path.resolve() for path in paths]
    if twice := next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None):
        raise UserError(f"compare: {twice} is named twice")
    names = _names(places)
    runs = [replace(open_run(path), name=name) for path, name in zip(paths, names, strict=True)]
    write_text(output, comparison_page(runs))
    return Path(output)


def comparison_page(runs: Sequence[Run]) -> str:
    """The page of several runs, which have names that differ."""
    entries = [
        _Entry(run, _letter(index), f"c{index % SERIES_COLORS}", index // SERIES_COLORS)
        for index, run in enumerate(runs)
    ]
    models = list(dict.fromkeys(run.model for run in runs))
    header = element(
        "header",
        element("h1", f"{len(runs)} runs compared"),
        element("p", " · ".join(models), class_="about"),
    )
    return document(
        f"{len(runs)} runs compared: hqqplus",
        header,
        _notices(entries),
        _overview(entries),
        _quantization(entries),
        _curves(entries),
        _samples(entries),
        _costs(entries),
        _recipes(entries),
        _versions(entries),
        footer(),
    )


def _letter(index: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    more, last = divmod(index, 26)
    return ("" if more == 0 else _letter(more - 1)) + chr(ord("A") + last)


def _names(places: Sequence[Path]) -> list[str]:
    """The names of folders, with as much of their paths as tells them apart."""
    names = []
    for place in places:
        for count in range(1, len(place.parts) + 1):
            end = place.parts[-count:]
            if sum(other.parts[-count:] == end for other in places) == 1:
                break
        names.append("/".join(end) if count < len(place.parts) else str(place))
    return names


# --- what cannot be compared -----------------------------------------------------------------------------------------


def _notices(entries: Sequence[_Entry]) -> Html | None:
    """Where perplexities are not of one text: nothing on the page would show it."""
    measured_runs = [entry for entry in entries if entry.figures is not None]
    found = []
    for entry in measured_runs[1:]:
        first = measured_runs[0]
        assert first.figures is not None
        assert entry.figures is not None
        if changes := _changed(_text_of(first.figures), _text_of(entry.figures)):
            found.append(
                element("li", entry.key(), f"{entry.run.name} against {first.run.name}: ", "; ".join(changes))
            )
    rest = [entry.run.name for entry in entries if entry.figures is None]
    parts: list[Child] = []
    if found:
        said = "The perplexities of these runs are not of the same text, and say nothing about one another:"
        parts += [element("p", said), element("ul", found)]
    elif len({entry.run.model for entry in measured_runs}) > 1:
        # One model may have two names, that of its parent and that of its packed folder.
        said = "These runs name different models: perplexities per token compare where the tokenizer is the same."
        parts.append(element("p", said))
    if rest:
        parts.append(
            element("p", f"Not measured, because no run has trained on it: {', '.join(rest)} (hqqplus evaluate).")
        )
    return element("div", parts, class_="warning") if parts else None


def _text_of(figures: Figures) -> dict[str, Any]:
    """What the perplexities of a run were measured on."""
    found = {
        f"{name}.{key}": figures.recipe[name][key]
        for name, keys in _OF_THE_TEXT.items()
        for key in keys
        if key in figures.recipe.get(name, {})
    }
    return {**found, "tokens": figures.evaluation.get("tokens")}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys([*old, *new])
    return [f"{name} {old.get(name)} → {new.get(name)}" for name in names if old.get(name) != new.get(name)]


# --- parts -----------------------------------------------------------------------------------------------------------


def _overview(entries: Sequence[_Entry]) -> Html:
    header = ["run", "quantization", "bits per weight", "with adapter"]
    header += ["quantized", "recovered", "recovery", "size", "parent"]
    rows: list[list[Child]] = []
    for entry in entries:
        figures, run = entry.figures, entry.run
        if figures is None:
            layers = run.layers
            total = size(layers.total_bytes) if layers is not None else DASH
            rows.append(
                [
                    entry.title(),
                    groups(run.quantization),
                    bits(run.bits_per_weight),
                    DASH,
                    DASH,
                    DASH,
                    DASH,
                    total,
                    DASH,
                ]
            )
            continue
        rows.append(
            [
                entry.title(),
                groups(run.quantization),
                bits(run.bits_per_weight),
                bits(run.bits_with_adapter),
                measured(figures.ppl_quantized),
                element("b", measured(figures.ppl_recovered)),
                percent(figures.recovery),
                size(figures.backbone_bytes + figures.adapter_bytes),
                parents(figures),
            ]
        )
    note = "Parent, quantized and recovered are perplexities; the size is that of backbone and adapter."
    return element("section", table(header, rows, "runs"), element("p", note, class_="note"))


def _parent_lines(entries: Sequence[_Entry]) -> list[Reference]:
    """A line for each perplexity that parents have, and whose it is where they differ."""
    found: dict[float, list[str]] = {}
    for entry in entries:
        if entry.figures is not None and entry.figures.ppl_parent is not None:
            found.setdefault(entry.figures.ppl_parent, []).append(entry.letter)
    return [
        Reference(f"parent {number(value)}" if len(found) == 1 else f"parent of {', '.join(whose)}", value, "parent")
        for value, whose in found.items()
    ]


def _legend(entries: Sequence[_Entry]) -> Html:
    return element("ul", [element("li", f"{e.letter} {e.run.name}", class_=e.color) for e in entries], class_="legend")


def _quantization(entries: Sequence[_Entry]) -> Html:
    charts = element("div", _bits(entries), _layers(entries), class_="charts")
    return section("Quantization", charts, _kinds(entries))


def _bits(entries: Sequence[_Entry]) -> Html:
    series, left_out = [], []
    for entry in entries:
        figures, run = entry.figures, entry.run
        if figures is None or run.bits_per_weight is None:
            continue
        after = run.bits_with_adapter
        if after is None:
            left_out.append(entry.letter)
        ends = [(run.bits_per_weight, figures.ppl_quantized), (after or run.bits_per_weight, figures.ppl_recovered)]
        notes = [
            f"{run.name}, {stage}: perplexity {measured(value)} at {bits(place)} bits per weight"
            for stage, (place, value) in zip(("quantized", "recovered"), ends, strict=True)
        ]
        one = Series(run.name, ends, entry.color, line=None, shape=entry.shape)
        if None not in (ends[0][1], ends[1][1]):
            series.append(Series(run.name, ends, entry.color, line="link", marks="none"))
        series.append(replace(one, points=ends[:1], hollow=True, notes=notes[:1]))
        series.append(replace(one, points=ends[1:], label=entry.letter, notes=notes[1:]))
    note = "filled: recovered, the adapter counted; rings: before training; logarithmic"
    if left_out:
        note += f"; of {', '.join(left_out)} it is not known over how many weights the adapter counts"
    best = [note for one in series if one.label for note in one.notes]
    chart = Chart(
        "bits",
        "Perplexity against bits per weight",
        "; ".join(best) or "Nothing can be shown.",
        series,
        _parent_lines(entries),
        x_label="bits per weight",
        log=True,
        whole=False,
        pad=0.06,
    )
    return figure(chart, "No finite perplexity was measured.", note, _legend(entries))


def _layers(entries: Sequence[_Entry]) -> Html:
    series = []
    for entry in entries:
        if entry.run.layers is None:
            continue
        layers = entry.run.layers.layers
        series.append(
            Series(
                entry.run.name,
                [(float(place), layer.statistics.nmse) for place, layer in enumerate(layers, start=1)],
                entry.color,
                label=entry.letter,
                shape=entry.shape,
                marks="all" if len(layers) <= 60 else "last",
                notes=[f"{entry.run.name}, {layer.name}: NMSE {error(layer.statistics.nmse)}" for layer in layers],
            )
        )
    lacking = [entry.letter for entry in entries if entry.run.layers is None]
    log = spread([y for one in series for _, y in one.points if y is not None])
    means = [f"{entry.run.name} {error(entry.run.layers.nmse)}" for entry in entries if entry.run.layers is not None]
    notes = ["‖W − Q‖² / ‖W‖²" + (", logarithmic" if log else "")]
    if lacking:
        notes.append(f"not known of {', '.join(lacking)}")
    chart = Chart(
        "layers",
        "NMSE by layer",
        f"The error of each layer in the order of the model. Means over all weights: {', '.join(means)}.",
        series,
        x_label="layer, in the order of the model",
        log=log,
        zero=not log,
    )
    return figure(chart, "Of no run is it known how well its layers were quantized.", "; ".join(notes))


def _curves(entries: Sequence[_Entry]) -> Html | None:
    loss, perplexity = [], []
    for entry in entries:
        if entry.figures is None:
            continue
        points = entry.figures.loss_curve
        last = next((y for _, y in reversed(points) if y is not None), None)
        loss.append(Series(entry.run.name, points, entry.color, label=f"{entry.letter} {number(last)}", marks="none"))
        value = entry.figures.ppl_recovered
        label = f"{entry.letter} {'∞/NaN' if value is None else number(value)}"
        found = perplexity_points(entry.figures)
        perplexity.append(Series(entry.run.name, found, entry.color, label=label, shape=entry.shape))
    if not loss:
        return None
    ends = "; ".join(
        f"{entry.run.name} {measured(entry.figures.ppl_recovered)}" for entry in entries if entry.figures is not None
    )
    return section(
        "Training",
        element(
            "div",
            figure(
                Chart("loss", "Loss", f"The training loss of {len(loss)} runs over their steps.", loss),
                "No loss was recorded.",
                "as logged; losses of different kinds cannot be compared",
            ),
            figure(
                Chart(
                    "perplexity",
                    "Perplexity",
                    f"Perplexity on held-out text over the training steps. In the end: {ends}.",
                    perplexity,
                    _parent_lines(entries),
                    log=True,
                ),
                "No finite perplexity was measured.",
                "held-out text, logarithmic; behind the lines: recovered",
            ),
            class_="charts",
        ),
    )


def _header(first: str, entries: Sequence[_Entry]) -> list[Child]:
    return [first, *(element("span", entry.title()) for entry in entries)]


def _kinds(entries: Sequence[_Entry]) -> Html | None:
    """Mean NMSE of each kind of layer, weighted by the weights of its layers."""
    known = [entry for entry in entries if entry.run.layers is not None]
    if not known:
        return None
    means = []
    for entry in known:
        assert entry.run.layers is not None
        kinds = entry.run.layers.by_kind()
        found = {}
        for kind, members in kinds.items():
            weights = sum(layer.statistics.weights for layer in members)
            lost = math.fsum(layer.statistics.nmse * layer.statistics.weights for layer in members)
            found[kind] = error(lost / weights) if weights else DASH
        means.append({"all": error(entry.run.layers.nmse), **found})
    names = dict.fromkeys(name for found in means for name in found)
    rows: list[list[Child]] = [[name, *(found.get(name, DASH) for found in means)] for name in names]
    return element(
        "details",
        element("summary", "Mean NMSE by kind of layer"),
        table(_header("kind", known), rows),
    )


def _samples(entries: Sequence[_Entry]) -> Html | None:
    prompts = dict.fromkeys(
        sample.prompt for entry in entries if entry.figures is not None for sample in entry.figures.samples
    )
    if not prompts:
        return None
    return section(
        "Samples",
        element("p", "Greedy completions of the same prompts by the recovered models.", class_="note"),
        [_sample(prompt, entries) for prompt in prompts],
    )


def _sample(prompt: str, entries: Sequence[_Entry]) -> Html:
    of_parents: dict[str, list[str]] = {}
    before, after = [], []
    for entry in entries:
        found = entry.figures.samples if entry.figures is not None else []
        sample = next((sample for sample in found if sample.prompt == prompt), None)
        if sample is None:
            continue
        if sample.parent is not None:
            of_parents.setdefault(sample.parent, []).append(entry.letter)
        if sample.quantized is not None:
            before.append(completion(entry.title(), sample.quantized, entry.color))
        if sample.recovered is not None:
            after.append(completion(entry.title(), sample.recovered, entry.color))
    whose = (lambda letters: "parent") if len(of_parents) < 2 else (lambda letters: f"parent of {', '.join(letters)}")
    first = [completion(whose(letters), text, "parent") for text, letters in of_parents.items()]
    folded = element(
        "details", element("summary", "Before training"), element("div", before, class_="side-by-side")
    )  # fmt: skip
    return element(
        "article",
        element("pre", prompt, class_="prompt", dir="auto"),
        element("div", first, after, class_="side-by-side"),
        folded if before else None,
        class_="sample",
    )


def _costs(entries: Sequence[_Entry]) -> Html | None:
    known = [(entry, entry.figures) for entry in entries if entry.figures is not None]
    if not known:
        return None
    times = [stages(figures) for _, figures in known]
    names = dict.fromkeys(name for found in times for name in found)
    rows: list[list[Child]] = [
        [name, *(duration(found[name][0]) if name in found else DASH for found in times)] for name in names
    ]
    rows.append(["all stages", *(duration(math.fsum(seconds for seconds, _ in found.values())) for found in times)])
    rows.append(
        [
            "training, tokens/s",
            *(DASH if f.tokens_per_second is None else number(f.tokens_per_second) for _, f in known),
        ]
    )
    rows.append(["peak of memory", *(DASH if peak(f) is None else size(peak(f) or 0) for _, f in known)])
    rows.append(["that is", *(DASH if peak(f) is None else peak_kind(f) for _, f in known)])
    rows.append(["device", *(f.device for _, f in known)])
    rows.append(["backbone", *(size(f.backbone_bytes) for _, f in known)])
    rows.append(["adapter", *(size(f.adapter_bytes) for _, f in known)])
    return section("Memory and time", table(_header("", [entry for entry, _ in known]), rows))


def _recipes(entries: Sequence[_Entry]) -> Html | None:
    from hqqplus.recipe import differences

    known = [(entry, entry.figures.recipe) for entry in entries if entry.figures is not None and entry.figures.recipe]
    if len(known) < 2:
        return None
    first, base = known[0]
    parts: list[Child] = []
    for entry, recipe in known[1:]:
        changes = differences(base, recipe)
        parts.append(element("h3", entry.title(), " against ", first.title()))
        items = [element("li", element("code", change)) for change in changes]
        parts.append(
            element("ul", items, class_="changes")
            if items
            else element(
                "p", "The recipes are the same, but for where they write and how they measure.", class_="note"
            )
        )
    return section("Differences of the recipes", parts)


def _versions(entries: Sequence[_Entry]) -> Html | None:
    """Versions once, where all runs had the same; else as a table of those that differ."""
    known = [(entry, entry.figures.versions) for entry in entries if entry.figures is not None]
    if not any(versions for _, versions in known):
        return None
    names = dict.fromkeys(name for _, versions in known for name in versions)
    same = {name: fact(known[0][1].get(name)) for name in names if len({v.get(name) for _, v in known}) == 1}
    rows: list[list[Child]] = [
        [name, *(versions.get(name, DASH) for _, versions in known)] for name in names if name not in same
    ]
    different = table(_header("package", [entry for entry, _ in known]), rows) if rows else None
    return section("Versions", different, facts(same))
