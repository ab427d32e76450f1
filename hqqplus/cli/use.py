"""Verbs that use a model: generate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hqqplus.cli.options import Adapter, AllowMismatch, Compute, Device, Dtype, Model, Revision, Trust, checked_dtype


def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="texts to continue")],
    adapter: Adapter = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to add", min=1)] = 64,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
    compute: Compute = "auto",
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Continue prompts, greedily."""
    from hqqplus.evaluation.samples import complete
    from hqqplus.models import load_with_tokenizer

    options: dict[str, Any] = {"dtype": checked_dtype(dtype), "device": device, "trust_remote_code": trust_remote_code}
    loaded, tokenizer = load_with_tokenizer(
        model, adapter, revision=revision, compute=compute, allow_mismatch=allow_mismatch, **options
    )
    for prompt, completion in zip(prompts, complete(loaded, tokenizer, prompts, max_new_tokens), strict=True):
        typer.echo(prompt + completion)
