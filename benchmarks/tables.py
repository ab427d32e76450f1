"""The README's tables, made from `benchmarks/results/`: `python benchmarks/tables.py [--check]`.

Between `<!-- table: FILE -->` and `<!-- end -->` stands what `render` makes of FILE. `--check` changes nothing and
exits with 1 where the README says something else.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import recovery_tables

ROOT = Path(__file__).resolve().parent.parent
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def solver(result: dict[str, Any]) -> str:
    """Gaussian weights: errors and how many times as fast, on the same matrix in the same run. The most used cases."""
    shown = {(1, 32), (1, 64), (2, 16), (2, 32), (2, 64), (2, 128), (3, 64), (4, 64)}
    lines = ["| bits / group | bits per weight | hqq 0.2.8 | hqqplus | times as fast |", "|---|---|---|---|---|"]
    for row in result["nmse"]:
        if row["weights"] == "Gaussian" and (row["nbits"], row["group_size"]) in shown:
            name, ratio = f"{row['nbits']} / {row['group_size']}", row["seconds_hqq"] / row["seconds"]
            errors = f"{row['nmse_hqq']:.3g} | **{row['nmse']:.3g}**"
            lines.append(f"| {name} | {row['bits_per_weight']:.2f} | {errors} | {ratio:.1f} |")
    return "\n".join(lines)


def methods(result: dict[str, Any]) -> str:
    lines = [
        "| method | bits per weight | bytes on disk | load, s | perplexity | ln drop |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        figures = f"{row['perplexity']:.2f} | {row['drop']:.3f}"
        size = f"{row['bits_per_weight']:.2f} | {row['bytes']:,} | {row['seconds_load']:.2f}"
        lines.append(f"| {row['method']} | {size} | {figures} |")
    return "\n".join(lines)


def embedded_2bit(result: dict[str, Any]) -> str:
    mb = {
        "parent": result["parent_bytes"],
        "quantized": result["backbone_bytes"],
        "recovered": result["backbone_bytes"] + result["adapter_bytes"],
    }
    bits = {"parent": "16", "quantized": f"{result['bits_per_weight']:.2f}", "recovered": "the same + adapter"}
    lines = ["| | perplexity | bits per weight | MB |", "|---|---|---|---|"]
    for stage, size in mb.items():
        lines.append(f"| {stage} | {result[f'ppl_{stage}']:.2f} | {bits[stage]} | {size / 1e6:.1f} |")
    return "\n".join(lines)


def sass(result: dict[str, Any]) -> str:
    """Instructions a weight of the kernel for few rows, on every architecture with tensor cores."""
    rows = [row for row in result["kernels"] if row["kernel"] == "matmul"]
    architectures = sorted({row["sm"] for row in rows})
    lines = [f"| weights | rows of x | {' | '.join(f'sm_{sm}' for sm in architectures)} |"]
    lines.append("|---" * (2 + len(architectures)) + "|")
    counts = {(row["spec"], row["rows"], row["sm"]): row["a_weight"] for row in rows}
    for spec in ("2-bit g64", "1-bit g64", "2-bit g32, 8-bit metadata"):
        for few in (1, 16):
            cells = " | ".join(f"{counts[spec, few, sm]:.2f}" for sm in architectures)
            lines.append(f"| {spec} | {few} | {cells} |")
    return "\n".join(lines)


def cpu(result: dict[str, Any]) -> str:
    """How many times the time of a bf16 `F.linear` the routes in bf16 take, on a layer of 4096 x 4096."""
    routes = {"hqqplus": "ours bf16", "reference": "reference bf16", "hqq 0.2.8": "hqq bf16"}
    lines = [f"| weights | rows of x | {' | '.join(routes)} |", "|---" * (2 + len(routes)) + "|"]
    for row in result["results"]:
        if row["layer"] == [4096, 4096] and row["rows"] in (1, 512):
            times = row["milliseconds"]
            cells = " | ".join(f"{times[route] / times['F.linear bf16']:.1f}" for route in routes.values())
            lines.append(f"| {row['spec']} | {row['rows']} | {cells} |")
    return "\n".join(lines)


def classification(result: dict[str, Any]) -> str:
    """Accuracy of each model, at the best of the rates for each kind of weights."""
    groups = sorted({run["group_size"] for run in result["runs"]})
    lines = [f"| model | most frequent label | 16 bits | {' | '.join(f'1-bit g{group}' for group in groups)} |"]
    lines.append("|---" * (3 + len(groups)) + "|")
    for model in dict.fromkeys(run["model"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["model"] == model]
        parent = max(run["accuracy_parent"] for run in runs if run["accuracy_parent"] is not None)
        best = [max(run["accuracy"] for run in runs if run["group_size"] == group) for group in groups]
        cells = " | ".join(f"{100 * share:.1f} %" for share in (runs[0]["majority"], parent, *best))
        lines.append(f"| {model} | {cells} |")
    return "\n".join(lines)


def render(file: str) -> str:
    name, _, part = file.partition("#")
    path = ROOT / name
    makers = {
        "solver": solver,
        "methods": methods,
        "recovery": recovery_tables.together,
        "recovery#levers": recovery_tables.alone,
        "recovery#budgets": recovery_tables.budgets,
        "embedded_2bit": embedded_2bit,
        "sass": sass,
        "cpu": cpu,
        "classification": classification,
    }
    return makers[path.stem + (f"#{part}" if part else "")](json.loads(path.read_text(encoding="utf-8")))


def filled(text: str) -> str:
    """The README `text` with every table as the results have it."""
    return _TABLE.sub(lambda match: f"{match[1]}\n{render(match[2])}\n\n{match[3]}", text)


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        return int(filled(text) != text)
    readme.write_text(filled(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
