"""Verbs that hand on what a run made: ship, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hqqplus.cli.options import Adapter, AllowMismatch, Model, Output, Quiet, Revision, Trust
from hqqplus.errors import UserError


def ship(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="output folder of a finished run")],
    out: Annotated[Path | None, typer.Option(help="folder to write; default: RUN/shipped")] = None,
    bits: Annotated[int, typer.Option(help="16 (bf16), or 8: half the size")] = 16,
    max_mb: Annotated[float, typer.Option(help="the most megabytes (10^6 bytes) the adapter's file may have")] = 60,
    base: Annotated[str | None, typer.Option(help="name of the base for others, such as its hub id")] = None,
    backbone: Annotated[bool, typer.Option("--backbone", help="the packed model of the adapter too")] = False,
    restore: Annotated[
        bool, typer.Option("--restore", help="RUN is an adapter in 8 bits: write it for PEFT alone, to --out")
    ] = False,
    push: Annotated[str | None, typer.Option(metavar="REPO_ID", help="upload it to this repository")] = None,
    private: Annotated[bool, typer.Option("--private", help="a new repository is private")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="upload without asking; without it nothing is")] = False,
    quiet: Quiet = False,
) -> None:
    """Write the adapter of a finished run as a folder to hand on, with a model card; upload it if asked to."""
    if restore:
        given = {"--push": push is not None, "--backbone": backbone, "--base": base is not None, "--bits": bits != 16}
        if wrong := next((name for name, there in given.items() if there), None):
            raise UserError(f"{wrong}: --restore takes none: it only writes an adapter in 8 bits as a standard one")
        if out is None:
            raise UserError("--restore: name the folder to write with --out")
        _restore(run, out)
        return
    if bits not in (8, 16):
        raise UserError(f"--bits: {bits} is not one of 16, 8")
    if not max_mb > 0:
        raise UserError(f"--max-mb: {max_mb:g} is no size: it must be above 0")
    if push is None and (private or yes):
        raise UserError(f"{'--private' if private else '--yes'}: there is nothing to upload without --push REPO_ID")
    from hqqplus.adapters import hub
    from hqqplus.adapters.ship import ship_run

    if push is not None:
        hub.check_repository(push)
    shipped = ship_run(
        run,
        out or run / "shipped",
        bits=bits,
        max_bytes=round(max_mb * 1e6),
        backbone=backbone,
        base=base,
        repository=push,
        quiet=quiet,
    )
    kind = "bf16" if bits == 16 else "8 bits"
    typer.echo(
        f"{shipped.folder}: an adapter of {shipped.adapter_bytes:,} bytes in {kind}, {len(shipped.files)} files"
    )
    for note in shipped.notes:
        typer.echo(f"note: {note}", err=True)
    if push is None:
        return
    planned = hub.plan_push(push, shipped.folder, private)
    typer.echo(planned.describe())
    if not yes and not (sys.stdin.isatty() and typer.confirm("Upload this?", default=False)):
        typer.echo("nothing was uploaded: add --yes to do it")
        return
    typer.echo(f"uploaded: {hub.push(planned)}")


def _restore(folder: Path, out: Path) -> None:
    from hqqplus.adapters import eight_bit
    from hqqplus.files import check_output

    if out.exists():
        raise UserError(f"{out}: exists already: name another folder")
    check_output(out, "--out")
    eight_bit.restore(folder, out)
    typer.echo(
        f"{out}: a standard PEFT folder in bf16, {(out / eight_bit.STANDARD).stat().st_size:,} bytes of weights"
    )


def export(
    model: Model,
    output: Output,
    adapter: Adapter = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16")] = "bfloat16",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="reload what was written and compare its logits")
    ] = True,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    allow_mismatch: AllowMismatch = False,
    quiet: Quiet = False,
) -> None:
    """Write dequantized weights + adapter as an ordinary 16-bit checkpoint, and check what it says."""
    import torch

    from hqqplus.merging import export as write

    if output.exists():
        raise UserError(f"{output}: exists already: name another folder")
    if dtype not in ("bfloat16", "float16"):
        raise UserError(f"--dtype: {dtype!r} is not one of bfloat16, float16")
    agreement = write(
        model,
        adapter,
        output,
        getattr(torch, dtype),
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_mismatch=allow_mismatch,
        verify=verify,
        quiet=quiet,
    )
    typer.echo(f"{output}: an ordinary checkpoint in {dtype}")
    if agreement is not None:
        typer.echo(f"verified: {agreement.describe()}")
