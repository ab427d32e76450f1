"""Verbs that use a model: generate, chat, serve."""

from __future__ import annotations

import json
import sys
import time
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
)
from hqqplus.errors import UserError
from hqqplus.progress import WorkProgress, output

ChatTemplate = Annotated[Path | None, typer.Option(help="file with a chat template, in the place of the model's own")]
KvBits = Annotated[int | None, typer.Option(help="keep the keys and values of what was read in 8, 4 or 2 bits")]


def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="texts to continue")] = None,
    file: Annotated[
        Path | None, typer.Option(help="prompts: .txt (a line each), or .jsonl (prompt or messages)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="file to write the results to, as lines of JSON")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="prompts at a time; default: 8 of a file, else 1", min=1)
    ] = None,
    adapter: Adapter = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to add", min=1)] = 64,
    chat_template: ChatTemplate = None,
    kv_bits: KvBits = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
    compute: Compute = "auto",
    allow_mismatch: AllowMismatch = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="lines of JSON on stdout; with --out: the figures")] = False,
) -> None:
    """Continue prompts, greedily."""
    from hqqplus.prompts import Prompt, check_results, read_prompts, use_template, write_results

    if bool(prompts) == (file is not None):
        raise UserError("generate: give prompts, or a file of them by --file")
    asked = read_prompts(file) if file is not None else []
    asked += [Prompt({"prompt": text}, f"prompt {number}") for number, text in enumerate(prompts or [], start=1)]
    if out is not None:
        check_results(out)
    options: dict[str, Any] = {"dtype": checked_dtype(dtype), "device": device, "trust_remote_code": trust_remote_code}
    with output(quiet, as_json):
        from hqqplus.generation import continue_batches
        from hqqplus.integrations.kv_cache import check_kv_bits
        from hqqplus.models import load_with_tokenizer

        if kv_bits is not None:
            check_kv_bits(kv_bits)
        loaded, tokenizer = load_with_tokenizer(
            model, adapter, revision=revision, compute=compute, allow_mismatch=allow_mismatch, **options
        )
        use_template(tokenizer, chat_template)
        ids = [prompt.encode(tokenizer) for prompt in asked]
        _check_lengths(loaded, ids, [prompt.where for prompt in asked], max_new_tokens)
        cache = _kv_cache(loaded, kv_bits)
        started = time.perf_counter()
        with WorkProgress(len(asked), unit="prompts", what="generating") as progress:
            size = batch_size or (1 if file is None else 8)
            found = continue_batches(loaded, tokenizer, ids, max_new_tokens, size, cache, progress.advance)
        seconds = time.perf_counter() - started
    rows = [
        {
            **prompt.row,
            "generated": continuation.text,
            "finish_reason": continuation.finish_reason,
            "generated_tokens": continuation.tokens,
        }
        for prompt, continuation in zip(asked, found, strict=True)
    ]
    tokens = sum(continuation.tokens for continuation in found)
    if out is not None:
        write_results(out, rows)
    if out is not None and as_json:
        figures = {"prompts": len(rows), "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        typer.echo(json.dumps({**figures, "out": str(out)}))
    elif as_json:
        for row in rows:
            typer.echo(json.dumps(row, ensure_ascii=False))
    elif out is None:
        for row in rows:
            typer.echo(row.get("prompt", "") + row["generated"])
    if not quiet:
        typer.echo(
            f"{len(rows)} prompts, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s", err=True
        )


def chat(
    model: Model,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="what the model is told beforehand")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="no chat template: continue what is written")] = False,
    chat_template: ChatTemplate = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: as the model says")] = None,
    top_p: Annotated[float | None, typer.Option(help="default: as the model says")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to an answer", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="of what is drawn", min=0)] = 0,
    kv_bits: KvBits = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
    compute: Compute = "auto",
    allow_mismatch: AllowMismatch = False,
    quiet: Quiet = False,
) -> None:
    """Chat with a model in the terminal."""
    options: dict[str, Any] = {"dtype": checked_dtype(dtype), "device": device, "trust_remote_code": trust_remote_code}
    with output(quiet):
        import torch

        from hqqplus.conversation import HELP, Conversation, converse, lines_of, writer_to
        from hqqplus.generation import chat_config
        from hqqplus.integrations.kv_cache import check_kv_bits
        from hqqplus.models import load_with_tokenizer
        from hqqplus.prompts import use_template

        if kv_bits is not None:
            check_kv_bits(kv_bits)
        loaded, tokenizer = load_with_tokenizer(
            model, adapter, revision=revision, compute=compute, allow_mismatch=allow_mismatch, **options
        )
        use_template(tokenizer, chat_template)
        config = chat_config(loaded, tokenizer, max_new_tokens, temperature, top_p)
        config.update(**_kv_cache(loaded, kv_bits))
        conversation = Conversation(loaded, tokenizer, config, plain, system)
        torch.manual_seed(seed)

        def note(text: str) -> None:
            typer.echo(text, err=True)

        if sys.stdin.isatty() and not quiet:
            note(HELP)
        figures = (lambda text: None) if quiet else note
        converse(conversation, lines_of(sys.stdin, note), writer_to(sys.stdout), note, figures)


def serve(
    model: Model,
    adapter: Adapter = None,
    host: Annotated[str, typer.Option(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at; 0: any that is free", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="what requests call the model; default: MODEL")] = None,
    chat_template: ChatTemplate = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
    compute: Compute = "auto",
    allow_mismatch: AllowMismatch = False,
    quiet: Quiet = False,
) -> None:
    """Serve a model by OpenAI's protocol, until Ctrl-C."""
    from hqqplus.integrations import serving

    options: dict[str, Any] = {"dtype": checked_dtype(dtype), "device": device, "trust_remote_code": trust_remote_code}
    with output(quiet):
        serving.check_available()
        from hqqplus.models import load_with_tokenizer
        from hqqplus.prompts import use_template

        with serving.bound(host, port) as sock:
            loaded, tokenizer = load_with_tokenizer(
                model, adapter, revision=revision, compute=compute, allow_mismatch=allow_mismatch, **options
            )
            use_template(tokenizer, chat_template)
            app = serving.build_app(loaded, tokenizer, name or model, quiet)
            sock.listen()
            if not quiet:
                typer.echo(f"{name or model} is served at {serving.address(sock)}/v1 (Ctrl-C ends it)", err=True)
                if not serving.is_local(sock):
                    typer.echo("anybody who can reach this address may use it: there is no password", err=True)
            serving.run(app, sock)


def _kv_cache(model: Any, bits: int | None) -> dict[str, Any]:
    from hqqplus.integrations.kv_cache import quantized_cache

    return {} if bits is None else quantized_cache(model, bits)


def _check_lengths(model: Any, ids: list[list[int]], names: list[str], max_new_tokens: int) -> None:
    """Refuse, before the work, what goes beyond the model's context."""
    from hqqplus.generation import context_length

    context = context_length(model)
    for prompt, where in zip(ids, names, strict=True):
        if context is not None and len(prompt) + max_new_tokens > context:
            raise UserError(
                f"{where}: {len(prompt)} tokens and {max_new_tokens} new ones (--max-new-tokens) are more than the "
                f"{context} that the model reads and writes"
            )
