"""`hqqplus env`."""

from __future__ import annotations

import typer

from hqqplus.errors import UserError


def env() -> None:
    """Versions of all that matters here, and the devices."""
    from hqqplus.evaluation.report import environment

    for name, version in environment().items():
        typer.echo(f"{name:16} {version}")
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        typer.echo(
            f"{f'cuda:{index}':16} {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
        )
    if not torch.cuda.is_available():
        typer.echo(f"{'device':16} cpu, {torch.get_num_threads()} threads")
    from hqqplus.kernels.routes import describe

    try:
        lines = describe()
    except ValueError as error:
        raise UserError(str(error)) from None
    for name, text in lines.items():
        typer.echo(f"{name:16} {text}")
