"""`hqqplus evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hqqplus.cli.options import (
    Adapter,
    AllowMismatch,
    Compute,
    Device,
    Dtype,
    Model,
    Quiet,
    Revision,
    Trust,
    checked_dtype,
    finite,
)
from hqqplus.errors import UserError
from hqqplus.progress import output


def evaluate(
    model: Model,
    texts: Annotated[
        str | None, typer.Argument(metavar="TEXTS", help="jsonl, json, csv, parquet or txt file, or hub name")
    ] = None,
    adapter: Adapter = None,
    against: Annotated[str | None, typer.Option(help="its parent: also the KL to it and the agreement")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="of lm-eval, e.g. hellaswag,arc_easy; with TEXTS or without")
    ] = None,
    limit: Annotated[float | None, typer.Option(help="so many examples of a task; below 1: that share")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="examples in a task's prompt")] = None,
    include_path: Annotated[Path | None, typer.Option(help="folder with task files of your own")] = None,
    split: Annotated[str, typer.Option(help="split of a hub data set or folder")] = "train",
    text_field: Annotated[str, typer.Option(help="column that holds the text")] = "text",
    max_length: Annotated[int, typer.Option(help="tokens to a window", min=2)] = 1024,
    max_tokens: Annotated[int | None, typer.Option(help="measure on so many tokens at most", min=2)] = None,
    batch_size: Annotated[int, typer.Option(help="windows at a time", min=1)] = 8,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
    compute: Compute = "auto",
    allow_mismatch: AllowMismatch = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="everything in JSON on stdout, and nothing else")] = False,
) -> None:
    """Perplexity on a text, distance to the parent, task scores: of a model, with or without an adapter."""
    if texts is None and tasks is None:
        raise UserError("evaluate: give TEXTS to measure on, --tasks, or both")
    if texts is None and against is not None:
        raise UserError("--against: it needs TEXTS to compare the two models on")
    if tasks is None and (limit, num_fewshot, include_path) != (None, None, None):
        raise UserError("--limit, --num-fewshot and --include-path go with --tasks")
    options: dict[str, Any] = {"dtype": checked_dtype(dtype), "device": device, "trust_remote_code": trust_remote_code}
    found: dict[str, Any] = {}
    with output(quiet, as_json):
        from hqqplus.evaluation.texts import measure, read_documents

        read = None if texts is None else read_documents(texts, split, text_field, "TEXTS")
        from hqqplus.models import check_parent, load, load_with_tokenizer

        loaded, tokenizer = load_with_tokenizer(
            model, adapter, revision=revision, compute=compute, allow_mismatch=allow_mismatch, **options
        )
        if texts is not None and read is not None:
            documents, parent = read(tokenizer), None
            if against is not None:
                check_parent(model, adapter, against, allow_mismatch)
                parent = load(against, **options)
            sizes: dict[str, Any] = {"max_length": max_length, "max_tokens": max_tokens, "batch_size": batch_size}
            measured = asdict(measure(loaded, tokenizer, documents, texts, parent=parent, **sizes))
            found |= {key: value for key, value in measured.items() if value is not None}
            if not as_json:
                typer.echo(
                    f"perplexity {found['perplexity']:.4f} ({found['tokens']:,} tokens, windows of {max_length})"
                )
            if against is not None and not as_json:
                typer.echo(
                    f"KL to the parent {found['kl']:.4f} nats a token, agreement {100 * found['agreement']:.2f} %, "
                    f"the parent's perplexity {found['parent_perplexity']:.4f}"
                )
        if tasks is not None:
            from hqqplus.evaluation.tasks import print_tasks, run_tasks

            names = [name.strip() for name in tasks.split(",") if name.strip()]
            scores = run_tasks(loaded, tokenizer, names, limit, num_fewshot, include_path, batch_size)
            found |= scores
            if not as_json:
                print_tasks(scores)
    if as_json:
        typer.echo(json.dumps(finite(found), indent=2))
