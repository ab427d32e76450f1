"""Verbs of a run: train, validate, table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hqqplus.cli.options import AllowMismatch, Overrides
from hqqplus.errors import UserError


def train(
    recipe: Annotated[Path, typer.Argument(help="a YAML file")],
    overrides: Overrides = None,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Quantize, recover, measure and ship, as a recipe says; again to continue."""
    from hqqplus.recipe import load_recipe
    from hqqplus.recovery.stopping import Interrupted
    from hqqplus.train import run

    try:
        run(load_recipe(recipe, overrides or []), allow_mismatch)
    except Interrupted as error:
        # Typer would make an exit code of its own of it.
        typer.echo(f"hqqplus: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


def validate(recipe: Annotated[Path, typer.Argument(help="a YAML file")], overrides: Overrides = None) -> None:
    """Check a recipe: all its errors at once, each with its line."""
    from hqqplus.recipe import load_recipe, recipe_digest

    digest = recipe_digest(load_recipe(recipe, overrides or []))
    typer.echo(f"{recipe}: valid (digest {digest[:12]})")


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
