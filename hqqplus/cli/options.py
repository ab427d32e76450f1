"""The options that several verbs share, and what is checked of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hqqplus.errors import UserError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="model folder, hub id, or embedded:pydoc")]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="folder to write")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub model")]
Adapter = Annotated[Path | None, typer.Option(help="folder of an adapter to put on the model")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default: the GPU if there is one")]
Compute = Annotated[str, typer.Option(help="auto, or int8: 8-bit activations in the layers of 1 bit")]
AllowMismatch = Annotated[bool, typer.Option("--allow-mismatch", help="warn where fingerprints differ, and go on")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. training.max_steps=10")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress, only what was asked for")]


def checked_dtype(name: str) -> str:
    """`name`, one of those that `--dtype` takes."""
    if name not in ("auto", "bfloat16", "float16", "float32"):
        raise UserError(f"--dtype: {name!r} is not one of auto, bfloat16, float16, float32")
    return name


def finite(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """`values` with None for the infinity and the not-a-number that JSON lacks."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
