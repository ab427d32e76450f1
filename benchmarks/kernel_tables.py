"""Tables of what `benchmarks/kernels.py` measured, and the targets beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import markdown


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line an entry and spec, a column a number of rows of x: microseconds and the share of the floor (or ratio)."""
    columns = sorted({row["rows"] for row in rows if "rows" in row})
    lines: dict[tuple[str, ...], dict[int | None, str]] = {}
    for row in rows:
        key = row["entry"], row.get("spec", ""), *([row["adapter"]] if "adapter" in row else [])
        lines.setdefault(key, {})[row.get("rows")] = cell(row)
    header = ["", *(f"M = {M}" for M in columns)] if columns else ["", "us, share of the floor"]
    body = []
    for key, cells in lines.items():
        # What failed before there were any rows fills the first column.
        values = [cells.get(M, "") for M in columns] if columns else [cells.get(None, "")]
        if columns and None in cells:
            values[0] = cells[None]
        body.append([" ".join(key), *values])
    return markdown(header, body)


def cell(row: dict[str, Any]) -> str:
    if "failed" in row:
        return row["failed"]
    mark = "" if row["graph"] else "*"
    text = f"{1e6 * row['seconds']:.4g}{mark}"
    if "ratio" in row:
        return f"{text} ({row['ratio']:.2f}x)"
    return f"{text} ({100 * row['share']:.0f} %)" if "share" in row else text


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What issue and design ask for, beside what was measured: the worst case of each. None: not measured."""

    def find(section: str, **wanted: Any) -> list[dict[str, Any]]:
        wanted["section"] = section
        return [r for r in rows if "seconds" in r and all(r.get(key) == value for key, value in wanted.items())]

    def worst(found: list[dict[str, Any]], key: str, largest: bool = False) -> tuple[float | None, str]:
        found = [row for row in found if key in row]
        if not found:
            return None, ""
        row = (max if largest else min)(found, key=lambda row: row[key])
        return row[key], f"{row['layer']}, {row['spec']}"

    large = {"8B gate,up", "8B down", "70B gate,up", "70B down"}
    checks = [("dequantize, share of the copy bandwidth", 0.9, *worst(find("dequantize"), "share"), False)]
    for M in (1, 4, 16):
        found = [row for row in find("matmul", rows=M, entry="hqqplus") if row["layer"] in large]
        checks.append((f"matmul, M = {M}, share of packed bytes / bandwidth", 0.8, *worst(found, "share"), False))
    for spec, wanted in (("2-bit g64", 5.0), ("1-bit g64", 7.0)):
        ours = find("matmul", layer="8B down", rows=1, entry="hqqplus", spec=spec)
        linear = find("matmul", layer="8B down", rows=1, entry="F.linear")
        measured = linear[0]["seconds"] / ours[0]["seconds"] if ours and linear else None
        checks.append((f"{spec} 4096 x 14336, M = 1, times as fast as F.linear", wanted, measured, "8B down", False))
    for M, wanted in ((8192, 1.10), (2048, 1.25)):
        found = find("lora", rows=M, entry="hqqplus", adapter="bf16")
        checks.append((f"LoRA layer, M = {M}, time of the bf16 one", wanted, *worst(found, "ratio", True), True))
    return [
        {
            "target": name,
            "wanted": wanted,
            "measured": measured,
            "where": where,
            "met": None if measured is None else (measured <= wanted if at_most else measured >= wanted),
        }
        for name, wanted, measured, where, at_most in checks
    ]


def target_table(found: Sequence[dict[str, Any]]) -> str:
    words = {True: "yes", False: "no", None: "not measured"}
    lines = [
        [
            row["target"],
            f"{row['wanted']:g}",
            "" if row["measured"] is None else f"{row['measured']:.3g}",
            words[row["met"]],
            row["where"],
        ]
        for row in found
    ]
    return markdown(["target", "wanted", "measured", "met", "worst at"], lines)
