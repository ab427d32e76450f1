"""`hqqplus VERB`: thin, one function a verb. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hqqplus.errors import UserError

app = typer.Typer(
    help="Language models in 1 or 2 bits, recovered with LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

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


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a YAML file")],
    overrides: Overrides = None,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Quantize, recover, measure and ship, as a recipe says; again to continue."""
    from hqqplus.recipe import load_recipe
    from hqqplus.recovery.stopping import Interrupted
    from hqqplus.train import run

    try:
        run(load_recipe(recipe, overrides or []), allow_mismatch)
    except Interrupted as error:
        # Typer would make an exit code of its own of it.
        typer.echo(f"hqqplus: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


@app.command()
def validate(recipe: Annotated[Path, typer.Argument(help="a YAML file")], overrides: Overrides = None) -> None:
    """Check a recipe: all its errors at once, each with its line."""
    from hqqplus.recipe import load_recipe, recipe_digest

    digest = recipe_digest(load_recipe(recipe, overrides or []))
    typer.echo(f"{recipe}: valid (digest {digest[:12]})")


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    nbits: Annotated[int, typer.Option(help="bits per weight: 1, 2, 3, 4 or 8")] = 2,
    group_size: Annotated[int, typer.Option(help="weights that share a scale: 8 to 256, or -1 for a whole row")] = 32,
    axis: Annotated[int, typer.Option(help="1: groups along the input; 0: along the output")] = 1,
    override: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=BITS or PATTERN=BITS:GROUP, e.g. lm_head=8 or '*.down_proj=4:32'"),
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="name pattern of modules to leave in full precision")] = None,
    metadata_bits: Annotated[int, typer.Option(help="bits of a group's scale and of its offset: 8 or 16")] = 8,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            help="bits per weight in all: share bits and group sizes out by layer; --nbits does not count then"
        ),
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="with --target-bpw: load the model and ask it")] = False,
    embeddings: Annotated[int | None, typer.Option(help="bits of embedding and head: 8 or 4")] = None,
    edge_blocks: Annotated[int | None, typer.Option(help="bits at least for the first and the last block")] = None,
    down_proj: Annotated[int | None, typer.Option(help="bits at least for the MLPs' down projections")] = None,
    gain: Annotated[str, typer.Option(help="exponent of the row gain, 0 to 1; auto: chosen on some text")] = "0",
    calibration_text: Annotated[str | None, typer.Option(help="with --gain auto: file or hub name, as TEXTS")] = None,
    lp_norm: Annotated[float, typer.Option(help="2: least squares; below 1: a robust norm")] = 2.0,
    thorough: Annotated[bool, typer.Option("--thorough", help="search several times as long")] = False,
    revision: Revision = None,
    dtype: Annotated[str, typer.Option(help="of what is not packed: auto (the checkpoint's), bfloat16, ...")] = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress and no table, only the last line")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="a summary in JSON on stdout, and nothing else")] = False,
) -> None:
    """Quantize a model, layer by layer, and write it packed; again to continue after an interruption."""
    from hqqplus.allocation import refine_plan
    from hqqplus.evaluation.layers import print_layers, totals_sentence
    from hqqplus.evaluation.report import environment
    from hqqplus.integrations.transformers import HqqPlusConfig
    from hqqplus.streaming import quantize_checkpoint

    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"{out}: exists already and is not empty: name another folder")
    changes = dict(_override(text) for text in override or [])
    text = _calibration_text(model, gain, calibration_text)
    try:
        config = HqqPlusConfig(
            nbits,
            group_size,
            axis,
            metadata_bits=metadata_bits,
            overrides=changes,
            modules_to_not_convert=skip or None,
            solver={"lp_norm": lp_norm, "gain": 0.0 if text else _number(gain, "--gain"), "thorough": thorough},
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"quantize: {error}") from None
    plan = refine_plan(
        model,
        config.plan(),
        target_bpw=target_bpw,
        ask=probe,
        embeddings=embeddings,
        edge_blocks=edge_blocks,
        down_proj=down_proj,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    chosen: Any = None
    if text is not None:
        chosen = _choose_gain(model, plan, text, revision=revision, device=device, trust_remote_code=trust_remote_code)
        plan = chosen.apply(plan)
        if not (quiet or as_json):
            typer.echo(f"gain {chosen.gamma:g}: KL {', '.join(f'{kl:.4f} at {g:g}' for g, kl in chosen.kl.items())}")
    config = HqqPlusConfig.from_plan(plan)
    made = quantize_checkpoint(
        model,
        out,
        config,
        revision=revision,
        dtype="checkpoint" if dtype == "auto" else _dtype(dtype),
        device=device,
        trust_remote_code=trust_remote_code,
        versions=environment(),
        quiet=quiet or as_json,
    )
    if as_json:
        gained = {} if chosen is None else {"gain": chosen.gamma, "gain_kl": _finite(chosen.kl)}
        typer.echo(json.dumps({**made.to_json(), **gained}, indent=2))
        return
    if not quiet:
        print_layers(made.layers)
    typer.echo(f"{out}: {totals_sentence(made.layers)}")


@app.command()
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
    as_json: Annotated[bool, typer.Option("--json", help="everything in JSON on stdout, and nothing else")] = False,
) -> None:
    """Perplexity on a text, distance to the parent, task scores: of a model, with or without an adapter."""
    if texts is None and tasks is None:
        raise UserError("evaluate: give TEXTS to measure on, --tasks, or both")
    if texts is None and against is not None:
        raise UserError("--against: it needs TEXTS to compare the two models on")
    if tasks is None and (limit, num_fewshot, include_path) != (None, None, None):
        raise UserError("--limit, --num-fewshot and --include-path go with --tasks")
    options: dict[str, Any] = {"dtype": _dtype(dtype), "device": device, "trust_remote_code": trust_remote_code}
    if texts is not None:
        from hqqplus.data import RowForm, load_rows
        from hqqplus.evaluation.perplexity import make_windows, perplexity

        rows = load_rows(texts, split, where="TEXTS")
        form = RowForm(text_field=text_field)
        form.check(rows, "TEXTS")
    from hqqplus.models import check_parent, load, load_with_tokenizer

    loaded, tokenizer = load_with_tokenizer(
        model, adapter, revision=revision, compute=compute, allow_mismatch=allow_mismatch, **options
    )
    found: dict[str, Any] = {}
    if texts is not None:
        windows = make_windows(form.documents(rows, tokenizer), tokenizer, max_length, max_tokens, texts)
        if against is None:
            found |= {"perplexity": perplexity(loaded, windows, batch_size).perplexity}
        else:
            from hqqplus.evaluation.divergence import divergence

            parent = load(against, **options)
            check_parent(model, adapter, against, allow_mismatch)
            apart = divergence(parent, loaded, windows, batch_size)
            found |= {"perplexity": apart.model.perplexity, "parent_perplexity": apart.parent.perplexity}
            found |= {"kl": apart.kl, "agreement": apart.agreement}
        found |= {"tokens": windows.tokens, "max_length": max_length}
        if not as_json:
            typer.echo(f"perplexity {found['perplexity']:.4f} ({windows.tokens:,} tokens, windows of {max_length})")
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
        typer.echo(json.dumps(_finite(found), indent=2))


@app.command()
def table(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders that runs have written")],
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, completions in full")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="as CSV, completions in full")] = False,
) -> None:
    """Runs side by side: model, bits, group, perplexities, a completion; in Markdown."""
    from hqqplus.evaluation.table import read_run, to_csv, to_json, to_markdown

    if as_json and as_csv:
        raise UserError("table: --json and --csv exclude each other")
    rows = [read_run(run) for run in runs]
    typer.echo((to_json if as_json else to_csv if as_csv else to_markdown)(rows).rstrip("\n"))


@app.command()
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

    options: dict[str, Any] = {"dtype": _dtype(dtype), "device": device, "trust_remote_code": trust_remote_code}
    loaded, tokenizer = load_with_tokenizer(
        model, adapter, revision=revision, compute=compute, allow_mismatch=allow_mismatch, **options
    )
    for prompt, completion in zip(prompts, complete(loaded, tokenizer, prompts, max_new_tokens), strict=True):
        typer.echo(prompt + completion)


@app.command()
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


@app.command()
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


def _override(text: str) -> tuple[str, dict[str, int]]:
    """`PATTERN=BITS[:GROUP]` -> (pattern, changes)."""
    pattern, _, value = text.rpartition("=")
    bits, colon, group = value.partition(":")
    try:
        return _named(pattern), {"nbits": int(bits), **({"group_size": int(group)} if colon else {})}
    except ValueError:
        raise UserError(f"--override: {text!r} is not PATTERN=BITS or PATTERN=BITS:GROUP, e.g. lm_head=8") from None


def _named(pattern: str) -> str:
    if not pattern:
        raise ValueError("empty pattern")
    return pattern


def _finite(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """`values` with None for the infinity and the not-a-number that JSON lacks."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option}: {text!r} is neither a number nor auto") from None


def _calibration_text(model: str, gain: str, text: str | None) -> str | None:
    """The text to choose the gain on; None where a gain is given."""
    from hqqplus.embedded import DATA_NAME, MODEL_NAME

    if gain != "auto":
        if text is not None:
            raise UserError("--calibration-text: it goes with --gain auto")
        return None
    text = text or (DATA_NAME if model == MODEL_NAME else None)
    if text is None:
        raise UserError("--gain auto: it needs --calibration-text, some text to compare the predictions on")
    return text


def _choose_gain(model: str, plan: Any, text: str, **options: Any) -> Any:
    from hqqplus.calibration.gain import choose_gain, sample_windows
    from hqqplus.data import RowForm, load_rows
    from hqqplus.models import load_tokenizer

    where = "--calibration-text"
    rows = load_rows(text, where=where)
    RowForm(text_field="text").check(rows, where)
    known = {name: options[name] for name in ("revision", "trust_remote_code")}
    return choose_gain(
        model, plan, sample_windows(rows, load_tokenizer(model, where="model", **known), name=where), **options
    )


def _dtype(name: str) -> str:
    if name not in ("auto", "bfloat16", "float16", "float32"):
        raise UserError(f"--dtype: {name!r} is not one of auto, bfloat16, float16, float32")
    return name


def main() -> None:
    """The console script: a user's mistake is one sentence on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
