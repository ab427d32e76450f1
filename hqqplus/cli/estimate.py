"""`hqqplus estimate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hqqplus.cli.options import Overrides


def estimate(
    recipe: Annotated[Path, typer.Argument(help="a YAML file")],
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option(help="one card alone: T4, L4, A10, 4090, A100-40, A100-80, H100, H200")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="tokens of a generation; default: 8192, or what the model was made for", min=1)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="a config.json to take instead of the model's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, in bytes")] = False,
) -> None:
    """What a recipe will take: memory by part, on which cards it fits, disk, rough times; before any download."""
    from hqqplus.estimation.cards import CARDS, find_card
    from hqqplus.estimation.estimate import estimate as estimated
    from hqqplus.estimation.page import as_text
    from hqqplus.recipe import load_recipe

    cards = CARDS if gpu is None else (find_card(gpu),)
    found = estimated(load_recipe(recipe, overrides or []), config=config, context=context, cards=cards)
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else as_text(found))
