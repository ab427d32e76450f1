"""Verbs of a run: train, validate, table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hqqplus.cli.options import AllowMismatch, Overrides, Quiet
from hqqplus.errors import UserError


def train(
    recipe: Annotated[Path, typer.Argument(help="a YAML file")],
    overrides: Overrides = None,
    allow_mismatch: AllowMismatch = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="the report in JSON on stdout, and nothing else")] = False,
) -> None:
    """Quantize, recover, measure and ship, as a recipe says; again to continue."""
    from hqqplus.recovery.stopping import Interrupted
    from hqqplus.train import run_shown

    try:
        run_shown(recipe, overrides or [], allow_mismatch, quiet, as_json)
    except Interrupted as error:
        # Typer would make an exit code of its own of it.
        typer.echo(f"hqqplus: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


def validate(
    recipe: Annotated[Path, typer.Argument(help="a YAML file")],
    overrides: Overrides = None,
    data: Annotated[bool, typer.Option("--data", help="also read and tokenize the data; loads no model")] = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="in JSON on stdout, and nothing else")] = False,
) -> None:
    """Check a recipe: all its errors at once, each with its line; with --data what it trains on, too."""
    from hqqplus.progress import output, say
    from hqqplus.recipe import load_recipe, recipe_digest

    found = load_recipe(recipe, overrides or [])
    digest = recipe_digest(found)
    values: dict[str, Any] = {"recipe": str(recipe), "digest": digest}
    lines = [f"{recipe}: valid (digest {digest[:12]})"]
    if data:
        with output(quiet, as_json):
            from hqqplus.recovery.preview import preview

            seen = preview(found, say)
        values["data"] = seen.to_json()
        lines += seen.lines()
    typer.echo(json.dumps(values, indent=2) if as_json else "\n".join(lines))


def table(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders that runs have written")],
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, completions in full")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="as CSV, completions in full")] = False,
) -> None:
    """Runs side by side: model, bits, group, perplexities, a completion; in Markdown."""
    from hqqplus.evaluation.table import read_run, to_csv, to_json, to_markdown

    if as_json and as_csv:
        raise UserError("table: --json and --csv exclude each other")
    rows = [read_run(run) for run in runs]
    typer.echo((to_json if as_json else to_csv if as_csv else to_markdown)(rows).rstrip("\n"))
