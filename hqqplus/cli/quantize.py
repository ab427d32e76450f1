"""`hqqplus quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hqqplus.cli.options import Device, Model, Revision, Trust, checked_dtype, finite
from hqqplus.errors import UserError
from hqqplus.progress import output


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
    with output(quiet, as_json):
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
            chosen = _choose_gain(
                model, plan, text, revision=revision, device=device, trust_remote_code=trust_remote_code
            )
            plan = chosen.apply(plan)
            if not (quiet or as_json):
                typer.echo(
                    f"gain {chosen.gamma:g}: KL {', '.join(f'{kl:.4f} at {g:g}' for g, kl in chosen.kl.items())}"
                )
        config = HqqPlusConfig.from_plan(plan)
        made = quantize_checkpoint(
            model,
            out,
            config,
            revision=revision,
            dtype="checkpoint" if dtype == "auto" else checked_dtype(dtype),
            device=device,
            trust_remote_code=trust_remote_code,
            versions=environment(),
            quiet=quiet,
        )
    if as_json:
        gained = {} if chosen is None else {"gain": chosen.gamma, "gain_kl": finite(chosen.kl)}
        typer.echo(json.dumps({**made.to_json(), **gained}, indent=2))
        return
    if not quiet:
        print_layers(made.layers)
    typer.echo(f"{out}: {totals_sentence(made.layers)}")


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
