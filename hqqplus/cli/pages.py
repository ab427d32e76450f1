"""`hqqplus report` and `hqqplus compare`: runs as pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from hqqplus.errors import UserError

_SUFFIXES = (".html", ".htm")


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a finished run, or of `hqqplus quantize`")],
    out: Annotated[Path | None, typer.Option("--out", help="the page to write; default: RUN/report.html")] = None,
) -> None:
    """One page of a run, for a browser: curves, error by layer, samples, memory and time. Needs no network."""
    from hqqplus.evaluation.page import report_on

    _check(out)
    typer.echo(_written(lambda: report_on(run, out), out or run))


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs, or of `hqqplus quantize`")],
    out: Annotated[Path, typer.Option("--out", help="the page to write")] = Path("compare.html"),
) -> None:
    """One page of several runs: what they gave, at how many bits, and where their recipes differ."""
    from hqqplus.evaluation.compare import compare_runs

    _check(out)
    typer.echo(_written(lambda: compare_runs(runs, out), out))


def _check(out: Path | None) -> None:
    if out is None:
        return
    if out.suffix.lower() not in _SUFFIXES:
        raise UserError(f"--out: {out}: the name of a page ends in .html")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder, a file is needed")


def _written(write: Callable[[], Path], where: Path) -> str:
    try:
        return f"wrote {write()}"
    except OSError as error:
        raise UserError(f"--out: {where} cannot be written: {error.strerror or error}") from None
