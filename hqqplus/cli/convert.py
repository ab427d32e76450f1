"""`hqqplus convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hqqplus.cli.options import Revision, Trust
from hqqplus.errors import UserError


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="packed model of another kind: folder or hub id")],
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    revision: Revision = None,
    trust_remote_code: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress, only the last line")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="a summary in JSON on stdout, and nothing else")] = False,
) -> None:
    """Take over a model in GPTQ, BitNet, MLX or binary format, without quantizing it again; again to continue."""
    from hqqplus.conversion import convert_checkpoint
    from hqqplus.evaluation.report import environment

    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"{out}: exists already and is not empty: name another folder")
    made = convert_checkpoint(
        source,
        out,
        revision=revision,
        trust_remote_code=trust_remote_code,
        versions=environment(),
        quiet=quiet or as_json,
    )
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=2))
        return
    if not quiet:
        for remark in made.remarks:
            typer.echo(remark)
    typer.echo(f"{out}: {made.describe()}")
