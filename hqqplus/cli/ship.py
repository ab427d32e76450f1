"""Verbs that hand on what a run made: export."""

from __future__ import annotations

from typing import Annotated

import typer

from hqqplus.cli.options import Adapter, AllowMismatch, Model, Output, Revision, Trust
from hqqplus.errors import UserError


def export(
    model: Model,
    output: Output,
    adapter: Adapter = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16")] = "bfloat16",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Write dequantized weights + adapter as an ordinary 16-bit checkpoint."""
    import torch

    from hqqplus.models import export as write

    if output.exists():
        raise UserError(f"{output}: exists already: name another folder")
    if dtype not in ("bfloat16", "float16"):
        raise UserError(f"--dtype: {dtype!r} is not one of bfloat16, float16")
    write(
        model,
        adapter,
        output,
        getattr(torch, dtype),
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_mismatch=allow_mismatch,
    )
    typer.echo(f"{output}: an ordinary checkpoint in {dtype}")
