"""Tables and the picture of `benchmarks/results/recovery.json`: `python benchmarks/recovery_tables.py` draws the
picture, `tables.py` puts the tables into the README."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "recovery.json"
PICTURE = RESULT.with_suffix(".png")
REFERENCE, TOGETHER, PLAIN = "reference", "all", "plain"
IN_DOMAIN, OUT_OF_DOMAIN = "evaluation", "wikitext-2"
Row = dict[str, Any]


def of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def mean(rows: list[Row], name: str, figure: str) -> float:
    return statistics.mean(row["sets"][name][figure] for row in rows)


def spread(rows: list[Row]) -> str:
    """Mean of the gap in domain, and how far seeds are from one another."""
    gaps = [row["sets"][IN_DOMAIN]["gap"] for row in rows]
    return f"{statistics.mean(gaps):.3f}" + (f" ± {(max(gaps) - min(gaps)) / 2:.3f}" if len(gaps) > 1 else "")


def of_record(result: dict[str, Any]) -> list[Row]:
    """The runs with the budget that the tables are of."""
    return of(result["rows"], tokens=result["settings"]["tokens"])


def cells(rows: list[Row]) -> list[tuple[str, int, int]]:
    """(model, bits, group size), in the order of the first seed's runs."""
    order = {"tinystories-656K": 0, "stories260K": 1, "embedded:pydoc": 2}
    found = {(row["model"], row["nbits"], row["group_size"]) for row in of(rows, method=REFERENCE)}
    return sorted(found, key=lambda cell: (-cell[1], -cell[2], order[cell[0]]))


def ratios(rows: list[Row]) -> dict[tuple[int, int], float]:
    """(bits, group size) -> mean over the models of our gap over the reference's, each a mean over the same seeds."""
    found: dict[tuple[int, int], list[float]] = {}
    for model, nbits, group in cells(rows):
        here = of(rows, model=model, nbits=nbits, group_size=group)
        ours, reference = of(here, method=TOGETHER), of(here, method=REFERENCE)
        if ours and reference:
            ratio = mean(ours, IN_DOMAIN, "gap") / mean(reference, IN_DOMAIN, "gap")
            found.setdefault((nbits, group), []).append(ratio)
    return {cell: statistics.mean(values) for cell, values in found.items()}


def together(result: dict[str, Any]) -> str:
    """The reference route and all levers, on every model and format."""
    rows = of_record(result)
    lines = [
        "| bits / group | model | route | bits per weight | perplexity | gap | KL | agreement | gap, WikiText |",
        "|---" * 9 + "|",
    ]
    for model, nbits, group in cells(rows):
        for method, name in ((REFERENCE, "hqq + LoRA"), (TOGETHER, "**hqqplus**")):
            found = of(rows, model=model, nbits=nbits, group_size=group, method=method)
            if not found:
                continue
            figures = (
                f"{mean(found, IN_DOMAIN, 'recovered'):.2f} | {spread(found)} | {mean(found, IN_DOMAIN, 'kl'):.3f}"
            )
            agreement = f"{100 * mean(found, IN_DOMAIN, 'agreement'):.0f} %"
            bits = f"{found[0]['strict_bits_per_weight']:.2f}"
            outside = f"{mean(found, OUT_OF_DOMAIN, 'gap'):.3f}"
            lines.append(f"| {nbits} / {group} | {model} | {name} | {bits} | {figures} | {agreement} | {outside} |")
    summary = ", ".join(f"{ratio:.2f} at {bits} / {group}" for (bits, group), ratio in ratios(rows).items())
    lines.append("")
    lines.append(f"Our gap over the reference's, mean over the models: {summary}.")
    return "\n".join(lines)


def alone(result: dict[str, Any]) -> str:
    """Gap in domain with each lever by itself, on the models on which they were run."""
    rows = of_record(result)
    singles = of(rows, seed=0)
    columns = [cell for cell in cells(rows) if of(singles, method=PLAIN, **_key(cell))]
    heads = [f"{model}, {nbits} / {group}" for model, nbits, group in columns]
    lines = [f"| | {' | '.join(heads)} | seconds |", "|---" * (len(heads) + 2) + "|"]
    for method in NAMES:
        found = [of(singles, method=method, **_key(cell)) for cell in columns]
        if any(found):
            gaps = " | ".join(f"{mean(here, IN_DOMAIN, 'gap'):.3f}" if here else "-" for here in found)
            seconds = statistics.mean(here[0]["seconds"] for here in found if here)
            lines.append(f"| {NAMES[method]} | {gaps} | {seconds:.0f} |")
    return "\n".join(lines)


NAMES = {
    REFERENCE: "reference: hqq, PEFT's start, cross-entropy",
    PLAIN: "our solver, residual start, cross-entropy",
    "+ importance": "+ columns weighted by their activations",
    "+ feedback": "+ error feedback over columns",
    "+ weighted start": "+ weighted columns, activation-weighted start",
    "+ distillation": "+ distillation",
    "+ scales": "+ trained group scales",
    "+ gains": "+ trained gains (in the adapter)",
    "+ norms": "+ trained norms (in the adapter)",
    "+ block": "+ reconstruction block by block",
    TOGETHER: "**block, distillation and scales together**",
}


def sweep(result: dict[str, Any]) -> str:
    """Gap in domain with one setting of all levers together changed."""
    singles = of(of_record(result), seed=0)  # `recovery.py --sweep`
    changed = [row for row in singles if row["method"].startswith(f"{TOGETHER}, ")]
    columns = list(dict.fromkeys((row["model"], row["nbits"], row["group_size"]) for row in changed))
    if not columns:
        return ""
    lines = [f"| | {' | '.join(f'{m}, {b} / {g}' for m, b, g in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method in dict.fromkeys([TOGETHER, *(row["method"] for row in changed)]):
        found = [of(singles, method=method, **_key(cell)) for cell in columns]
        gaps = " | ".join(f"{mean(here, IN_DOMAIN, 'gap'):.3f}" if here else "-" for here in found)
        lines.append(f"| {method} | {gaps} |")
    return "\n".join(lines)


def budgets(result: dict[str, Any]) -> str:
    """Gap in domain over the number of tokens, at 2-bit g64, and ours over the reference's."""
    rows = of(result["rows"], nbits=2, group_size=64, seed=0)
    models = [model for model in dict.fromkeys(row["model"] for row in rows) if model != "embedded:pydoc"]
    lines = ["| tokens | " + " | ".join(f"{m}: hqq + LoRA | hqqplus | ratio" for m in models) + " |"]
    lines.append("|---" * (3 * len(models) + 1) + "|")
    for tokens in sorted({row["tokens"] for row in rows}):
        cells = []
        for model in models:
            here = of(rows, tokens=tokens, model=model)
            pair = [of(here, method=method) for method in (REFERENCE, TOGETHER)]
            if not all(pair):
                cells += ["-"] * 3
                continue
            gaps = [mean(found, IN_DOMAIN, "gap") for found in pair]
            cells += [f"{gaps[0]:.3f}", f"{gaps[1]:.3f}", f"{gaps[1] / gaps[0]:.2f}"]
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _key(cell: tuple[str, int, int]) -> dict[str, Any]:
    return dict(zip(("model", "nbits", "group_size"), cell, strict=True))


def picture(result: dict[str, Any], path: Path) -> None:
    """What is left of the gap against strict bits per weight: a panel for each model, a curve for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = of_record(result)
    models = list(dict.fromkeys(cell[0] for cell in cells(rows)))
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.6), squeeze=False)
    styles = {REFERENCE: ("hqq + LoRA", "C3", "o"), TOGETHER: ("hqqplus", "C0", "s")}
    for axis, model in zip(axes[0], models, strict=True):
        for method, (label, colour, marker) in styles.items():
            points = []
            for cell in cells(rows):
                found = of(rows, method=method, **_key(cell)) if cell[0] == model else []
                if found:
                    points.append((found[0]["strict_bits_per_weight"], mean(found, IN_DOMAIN, "recovered"), cell))
            points.sort()
            axis.plot([p[0] for p in points], [p[1] for p in points], color=colour, marker=marker, label=label)
            for bits, value, (_, nbits, group) in points:
                axis.annotate(
                    f"{nbits} / {group}", (bits, value), xytext=(4, 4), textcoords="offset points", fontsize=7
                )
        axis.axhline(mean(of(rows, model=model), IN_DOMAIN, "parent"), color="grey", linestyle=":", label="parent")
        axis.set(title=model, xlabel="bits per weight, adapter included", yscale="log")
    axes[0][0].set_ylabel("perplexity after training")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    picture(result, PICTURE)
    print(together(result), "", alone(result), "", sweep(result), "", budgets(result), sep="\n")


if __name__ == "__main__":
    main()
