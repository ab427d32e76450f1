"""Finished runs side by side, in the columns in which 1- and 2-bit models are usually shown: a line a run.

Read from what a run leaves: `report.json`, and the fingerprint of its adapter, which knows the quantization of the
backbone also where the recipe named a packed one.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqplus.errors import UserError
from hqqplus.evaluation.report import markdown_table, number, visible
from hqqplus.untrusted import read_json

_REPORT, _FINGERPRINT = "report.json", "adapter/hqqplus.json"
_HEADER = ["run", "model", "bits", "group", "bits per weight", "PPL parent", "quantized", "recovered", "sample"]
_NUMBERS = ("bits_per_weight", "adapter_bytes", "ppl_parent", "ppl_quantized", "ppl_recovered")
# Characters of a prompt and of its completion that fit into a table.
_PROMPT_LENGTH, _SAMPLE_LENGTH = 24, 60


@dataclass(frozen=True)
class Row:
    """One run: `nbits` and `group_size` are the default's, followed by those of overrides where they differ.

    Perplexities are those of the evaluation set, None where one was not measured or not finite; `bits_per_weight` is
    of the packed linear layers, metadata included, and the adapter's bytes come on top. `prompt` and `sample` are the
    first prompt and its completion by the recovered model, in full; None where nothing was sampled.
    """

    run: str
    model: str
    nbits: tuple[int, ...]
    group_size: tuple[int, ...]
    bits_per_weight: float | None
    adapter_bytes: int | None
    ppl_parent: float | None
    ppl_quantized: float | None
    ppl_recovered: float | None
    prompt: str | None
    sample: str | None


def read_run(folder: str | Path) -> Row:
    """The row of the run in `folder`.

    Raises:
        UserError: naming the folder, if its report is missing or damaged.
    """
    folder = Path(folder)
    try:
        report = read_json(folder / _REPORT)
        return _row(folder, report)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: there is no {_REPORT}: no run of hqqplus has ended there") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{folder}: its {_REPORT} cannot be read: {reason}") from None


def _row(folder: Path, report: Any) -> Row:
    numbers = {name: report[name] for name in _NUMBERS}
    for name, value in numbers.items():
        if not isinstance(value, int | float | None):
            raise TypeError(f"{name} is {value!r}, no number")
    recipe = report["recipe"]
    model, quantization = recipe["model"]["name_or_path"], recipe["quantization"]
    try:
        fingerprint = read_json(folder / _FINGERPRINT)
        model, quantization = fingerprint["base"], fingerprint["quantization"]
    except (OSError, ValueError, TypeError, LookupError):
        pass  # the report was moved away from its adapter
    first: dict[str, Any] = next(iter(report["samples"]), {})
    return Row(
        folder.resolve().name,
        str(model),
        _values(quantization, "nbits"),
        _values(quantization, "group_size"),
        **numbers,
        prompt=first.get("prompt"),
        sample=first.get("recovered"),
    )


def _values(quantization: Mapping[str, Any], field: str) -> tuple[int, ...]:
    """The default's value of a field, then the others that overrides give it, each once."""
    overrides = quantization["overrides"]
    # A mapping in a recipe, pairs of pattern and changes in a fingerprint.
    changes = [pair[1] for pair in (overrides.items() if isinstance(overrides, dict) else overrides)]
    values = [quantization[field], *sorted(int(change[field]) for change in changes if field in change)]
    return tuple(dict.fromkeys(int(value) for value in values))


def to_markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, prompts and completions cut to one short line."""
    cells = [
        [
            row.run,
            row.model,
            _joined(row.nbits),
            _joined(row.group_size),
            number(row.bits_per_weight),
            *(number(value) for value in (row.ppl_parent, row.ppl_quantized, row.ppl_recovered)),
            ""
            if row.sample is None
            else f"{_short(row.prompt, _PROMPT_LENGTH)} → {_short(row.sample, _SAMPLE_LENGTH)}",
        ]
        for row in rows
    ]
    return markdown_table([_HEADER, *cells])


def to_json(rows: Sequence[Row]) -> str:
    """The rows as a JSON list of objects, nothing cut."""
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=2, ensure_ascii=False)


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with a header, nothing cut; an empty field is what is None."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(Row)])
    for row in rows:
        values = dataclasses.asdict(row).values()
        writer.writerow([_joined(value) if isinstance(value, tuple) else value for value in values])
    return text.getvalue()


def _joined(values: Sequence[int]) -> str:
    """`2`, `2/8`; a group that is the whole row is called so."""
    return "/".join("row" if value == -1 else str(value) for value in values)


def _short(text: str | None, length: int) -> str:
    """`text` on one line of at most `length` characters."""
    line = " ".join(visible(text or "").split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"
