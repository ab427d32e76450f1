"""`hqqplus classify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hqqplus.cli.options import Overrides


def classify(
    recipe: Annotated[Path, typer.Argument(help="a YAML file")],
    overrides: Overrides = None,
) -> None:
    """Train a text classifier on a backbone of 1 or 2 bits, and its 16-bit twin to compare."""
    from hqqplus.classify import ClassificationRecipe, run
    from hqqplus.recipe import load_as

    run(load_as(ClassificationRecipe, recipe, overrides or []), typer.echo)
