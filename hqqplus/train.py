"""Quantize, recover, measure, ship: the whole run, from one recipe.

    accelerate launch -m hqqplus.train recipes/llama3_8b_1bit.yaml [key=value ...]
    python -m hqqplus.train recipes/embedded_2bit.yaml [--allow-mismatch] [--quiet] [--json]

The same command again continues from the last complete checkpoint, or says that the run is finished. SIGTERM, SIGINT
and SIGUSR1 stop it at the next optimizer step with a checkpoint; it then exits with 128 + the signal's number.
--quiet shows no progress, only the report; --json writes the report as JSON on stdout, and nothing else there.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqqplus import progress
from hqqplus.errors import UserError
from hqqplus.integrations.noise import leave_out
from hqqplus.recipe import Recipe, load_recipe, recipe_digest, to_dict

if TYPE_CHECKING:
    from hqqplus.evaluation.report import Report
    from hqqplus.recovery.measure import Measurement
    from hqqplus.recovery.stopping import Stopper

ALLOW_MISMATCH, QUIET, JSON = "--allow-mismatch", "--quiet", "--json"


def run(recipe: Recipe, allow_mismatch: bool = False) -> Report:
    """Run `recipe` from start to end, or from where it was left, and return its report.

    Writes to `recipe.output_dir`: `adapter/` (weights in bf16, tokenizer, model card, `hqqplus.json`),
    `backbone/` (the packed model that the adapter belongs to, where its scales were trained), `report.json`,
    `report.md`, `report.png`, `report.html`, `layers.json` (where it is known how well each layer was quantized), and
    the checkpoints of the training.

    Args:
        allow_mismatch: go on where parent, tokenizer, data or packed model are not those of the checkpoint, or of the
            folder that is used again; what differs is said.

    Raises:
        UserError: for everything that is the user's to mend.
        Interrupted: if a signal stopped it; the same call continues.
    """
    from hqqplus.recovery import processes
    from hqqplus.recovery.stopping import Stopper

    state = processes.start(recipe)
    with Stopper(state.num_processes).listening() as stopper, progress.output(), ExitStack() as held:
        return _run(recipe, state, stopper, held, allow_mismatch)


def _run(recipe: Recipe, state: Any, stopper: Stopper, held: ExitStack, allow_mismatch: bool) -> Report:
    from dataclasses import replace

    import torch
    from transformers import set_seed

    from hqqplus import models
    from hqqplus.adapters import adapter_size, apply_residual_start, round_adapter, ship_adapter
    from hqqplus.adapters.bake import bake_backbone
    from hqqplus.adapters.card import model_card
    from hqqplus.adapters.fingerprint import DATA
    from hqqplus.adapters.licence import find_licence
    from hqqplus.adapters.scales import bake_scales
    from hqqplus.digests import text_digest
    from hqqplus.evaluation.layers import FILE_NAME as LAYERS
    from hqqplus.evaluation.page import write_page
    from hqqplus.evaluation.perplexity import make_windows, perplexity, recovery
    from hqqplus.evaluation.report import Report, environment, print_report, write_report
    from hqqplus.files import locked_folder, made_folder, write_json
    from hqqplus.integrations.fsdp import streamed
    from hqqplus.integrations.peft import without_adapters
    from hqqplus.integrations.trl import RecoveryTrainer, sft_config
    from hqqplus.modules import bits_per_weight, model_bytes
    from hqqplus.recovery import checkpoints, processes, setup, summary, teaching, trainables
    from hqqplus.recovery.agreement import from_main
    from hqqplus.recovery.backbone import base_folder, load_backbone, load_options, parent_of
    from hqqplus.recovery.calibrated import Text, calibration_folder
    from hqqplus.recovery.costs import Costs
    from hqqplus.recovery.measure import Meter, Notebook
    from hqqplus.recovery.rows import describe_rows
    from hqqplus.recovery.run_identity import changed_versions, check_identity, run_identity
    from hqqplus.recovery.stopping import Interrupted, how_to_go_on
    from hqqplus.recovery.summary import ADAPTER_FOLDER
    from hqqplus.recovery.tracking import Tracking

    # 1. Where: the settings of the trainer, a checkpoint to continue from.
    output_dir = Path(recipe.output_dir)

    say, warn = progress.say, progress.warn
    finished = from_main(state, lambda: summary.finished(output_dir, recipe))
    if finished is not None:
        warn(f"already finished: adapter in {output_dir / ADAPTER_FOLDER}, report in {output_dir / 'report.md'}")
        return finished

    def hold() -> None:
        """Two runs in one folder would take each other's checkpoints away."""
        held.enter_context(made_folder(output_dir))
        held.enter_context(locked_folder(output_dir, "output_dir"))

    if there := output_dir.is_dir():
        from_main(state, hold)
    found = from_main(state, lambda: checkpoints.find_checkpoint(output_dir, recipe))
    resume = found.manifest
    tracking = Tracking(recipe, found.folder, say, state.is_main_process)
    settings = setup.trainer_settings(recipe, state.device, say)
    processes.check_processes(settings, state, found.folder)
    sharded = processes.is_sharded(settings, state)
    sft_config(settings, "recipe")
    for broken, reason in found.skipped.items():
        warn(f"{broken} is skipped: {reason}; it is kept as {checkpoints.damaged_name(broken)}")
    if state.is_main_process:
        checkpoints.put_aside(output_dir, list(found.skipped))
    state.wait_for_everyone()

    # 2. Data: rows to train on, and windows to measure every model on.
    section = recipe.model
    tokenizer = models.load_tokenizer(
        section.name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    versions = environment()

    def identify(*known: Any) -> dict[str, str]:
        """What the run depends on, as far as it is known; refused where the checkpoint says otherwise."""

        def checked() -> tuple[dict[str, str], list[str]]:
            here = run_identity(recipe, tokenizer, *known)
            return here, check_identity(resume.identity, here, str(found.folder), allow_mismatch) if resume else []

        here, allowed = from_main(state, checked)
        if known:  # all of it, so that nothing is said twice
            for sentence in allowed:
                warn(sentence)
        return here

    known = identify()
    if resume:
        for sentence in changed_versions(resume.versions, versions, str(found.folder)):
            warn(sentence)
    data = setup.load_data(recipe, tokenizer, say)
    cache = setup.row_cache(recipe, say)
    rows = setup.TrainingRows(
        data.train, tokenizer, settings, recipe.data.packing, say, recipe.data.masked_rows, cache
    )
    rows.check()
    if not there:
        # Not before: what is refused leaves nothing behind.
        from_main(state, hold)
    windows = {
        name: make_windows(
            texts, tokenizer, recipe.data.max_length, recipe.evaluation.max_tokens, name, join=recipe.evaluation.join
        )
        for name, texts in data.texts.items()
    }
    meter = Meter(
        windows, tokenizer, recipe.evaluation.prompts, recipe.evaluation.max_new_tokens, recipe.evaluation.batch_size
    )
    notes = Notebook(output_dir, writes=state.is_main_process)
    costs = Costs(notes, recipe_digest(recipe), state.device, hold=resume is not None)
    described = to_dict(recipe)
    depends = {key: described[key] for key in ("model", "data", "evaluation", "seed")} | {
        "device": str(state.device.type),
        "identity": known,
        "texts": text_digest(data.texts),
    }

    # 3. The parent, in full precision: what the rest is measured against, and who teaches.
    parent: Measurement | None = None
    named = parent_of(recipe)
    if recipe.evaluation.parent and named is not None:
        name, revision = named

        def measure_parent() -> Measurement:
            say(f"measuring the parent {name}")
            with costs.stage("measure parent"):
                model = models.load_causal_lm(name, **{**load_options(recipe, state.device), "revision": revision})
                measured = meter.measure(model, model_bytes(model))
            del model
            _free(torch)
            return measured

        parent = notes.recall("parent", depends, measure_parent)
        say(f"parent: perplexity {parent.perplexities[setup.EVALUATION_SET]:.2f}")
    teacher = teaching.settle_teacher(recipe, named, state.device, say)
    if teacher == "cache" and named is not None:
        with costs.stage("teacher"):
            teaching.write_cache(recipe, named, rows, state.device, say)
        _free(torch)

    # 4. The backbone: calibrated where the recipe says so, quantized, then frozen.
    text = Text(data.documents, tokenizer)
    backbone = load_backbone(recipe, state.device, versions, text, resume is None, warn, allow_mismatch, costs.stage)
    model = backbone.model.requires_grad_(False)
    bpw, backbone_bytes = bits_per_weight(model), model_bytes(model)
    quantization = [depends, described["quantization"], described["calibration"], backbone.fingerprint.packed_sha256]
    quantized = from_main(state, lambda: notes.noted("quantized", quantization))

    def measure_quantized() -> None:
        # With FSDP once the model is sharded, and has its adapter: before that it is whole nowhere.
        nonlocal quantized
        if quantized is None:
            with without_adapters(model), costs.stage("measure quantized"):
                quantized = notes.note("quantized", quantization, meter.measure(model, backbone_bytes))
        perplexity_of = quantized.perplexities[setup.EVALUATION_SET]
        say(f"quantized to {bpw:.2f} bits per weight: perplexity {perplexity_of:.2f}")

    weights = summary.linear_weights(model)
    if not sharded:
        measure_quantized()

    # 5. The adapter: LoRA on the packed projections, from PEFT's start or from what quantization lost.
    with streamed(model, state.device):
        rows.of(model)
    identity = identify(rows.rows, backbone.fingerprint)
    costs.release()
    set_seed(recipe.seed)
    model = trainables.add_adapter(model, recipe)
    if backbone.factors is not None:
        apply_residual_start(model, backbone.factors)
    parameters, adapter_bytes = adapter_size(model)
    extras = trainables.train_scales(model, recipe)
    if backbone.layers is not None and state.is_main_process:
        # Not before: what is refused leaves nothing behind.
        write_json(output_dir / LAYERS, backbone.layers.to_json())
    say(f"adapter: {parameters:,} parameters, {adapter_bytes / 1e6:.1f} MB in bf16")

    # 6. Recovery: TRL's trainer, from the last complete checkpoint if there is one.
    arguments = rows.arguments
    distillation = None
    if teacher is not None and named is not None:
        distillation = teaching.distillation(recipe, teacher, named, rows, state.device)
    seconds = resume.train_seconds if resume else 0.0

    def on_checkpoint(written: Path, step: int, spent: float, tokens: int) -> None:
        tracking.save(written)
        checkpoints.write_manifest(written, recipe, step, seconds + spent, tokens, identity, versions)
        checkpoints.publish(written, checkpoints.checkpoint_folder(output_dir, step))
        checkpoints.rotate(output_dir, arguments.save_total_limit, trainer.state.best_model_checkpoint)

    def evaluate(model: Any, index: int, count: int, reduce: Any) -> Any:
        return perplexity(model, windows[setup.EVALUATION_SET], recipe.evaluation.batch_size, index, count, reduce)

    trainer = RecoveryTrainer(
        model=model,
        args=arguments,
        train_dataset=rows.rows,
        eval_dataset=setup.as_dataset(windows[setup.EVALUATION_SET]) if arguments.eval_strategy != "no" else None,
        processing_class=tokenizer,
        evaluator=evaluate,
        on_checkpoint=on_checkpoint,
        aside=checkpoints.ASIDE,
        stop_requested=lambda: stopper.requested,
        describe_rows=lambda ids: describe_rows(rows.rows, ids, tokenizer),
        resumed_from=found.folder,
        prepared=True,
        distillation=distillation,
        param_groups=lambda model: trainables.param_groups(recipe, model),
        extras=extras,
        callbacks=tracking.callbacks,
        on_sharded=measure_quantized,
    )
    if resume:
        say(f"continuing from {found.folder}")
    with stopper.at_whole_steps(), tracking, costs.stage("train"):
        trainer.train(resume_from_checkpoint=str(found.folder) if resume else None)
    if number := trainer.stopped or stopper.requested:
        raise Interrupted(number, how_to_go_on(number, trainer.last_checkpoint))
    seconds, tokens = seconds + trainer.seconds, trainer.tokens

    # 7. After: the adapter as it will be shipped, measured like the two before it.
    model = trainer.accelerator.unwrap_model(trainer.model)
    del distillation, trainer.distillation
    _free(torch)
    bake_scales(model)
    round_adapter(model)
    with costs.stage("measure recovered"):
        recovered = meter.measure(model, backbone_bytes + adapter_bytes)
    measured = {"parent": parent, "quantized": quantized, "recovered": recovered}
    perplexities: dict[str, Any] = {
        stage: m.perplexities[setup.EVALUATION_SET] if m else None for stage, m in measured.items()
    }
    report = Report(
        name=output_dir.name,
        **{f"ppl_{stage}": value for stage, value in perplexities.items()},
        recovery=recovery(*perplexities.values()),
        bits_per_weight=bpw,
        backbone_bytes=backbone_bytes,
        parent_bytes=parent.model_bytes if parent else 0,
        adapter_bytes=adapter_bytes,
        adapter_parameters=parameters,
        linear_weights=weights,
        train_seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        device=torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else state.device.type,
        samples=summary.side_by_side(recipe.evaluation.prompts, measured),
        texts=summary.further_sets(recipe.evaluation.texts, measured),
        loss_curve=summary.curve(trainer.state.log_history, "loss"),
        ppl_curve=summary.curve(trainer.state.log_history, "eval_perplexity"),
        evaluation={
            "tokens": windows[setup.EVALUATION_SET].tokens,
            "max_length": recipe.data.max_length,
            "dtype": str(backbone.model.dtype).removeprefix("torch."),
            "recipe_digest": recipe_digest(recipe),
        },
        recipe=described,
        versions=versions,
        costs=costs.to_dict(seconds),
    )

    # 8. Ship: the base, if its scales were trained; adapter, card, fingerprint and report. The main process writes;
    # all of them gather a sharded model.
    writes = state.is_main_process
    fingerprint = replace(backbone.fingerprint, data=identity[DATA])
    base = base_folder(recipe) or recipe.model.name_or_path
    if recipe.recovery.scales == "bake":
        base = str(output_dir / models.PACKED_FOLDERS[0])
        fingerprint = bake_backbone(model, base, tokenizer, fingerprint, writes=writes)
    card = model_card(
        title=f"{output_dir.name} adapter",
        recipe=described,
        report=report,
        fingerprint=fingerprint.with_tokenizer(tokenizer),
        licence=find_licence(fingerprint.base, fingerprint.revision),
    )
    ship_adapter(model, tokenizer, output_dir / ADAPTER_FOLDER, fingerprint, card, writes=writes)
    if writes:
        # Where there is a report nothing is left to do.
        if (saved := base_folder(recipe)) is not None:
            shutil.rmtree(calibration_folder(saved), ignore_errors=True)
        write_page(report, backbone.layers, output_dir)
        write_report(report, output_dir, summary.how_to_load(base, output_dir / ADAPTER_FOLDER))
        print_report(report)
        warn(f"adapter in {output_dir / ADAPTER_FOLDER}, report in {output_dir / 'report.md'}")
    state.wait_for_everyone()
    return report


def _free(torch: Any) -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_shown(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    allow_mismatch: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """`run` with the options of the command line: what it shows, and where.

    Raises:
        UserError, Interrupted: as `load_recipe` and `run`.
    """
    with progress.output(quiet, as_json):
        report = run(load_recipe(recipe, overrides), allow_mismatch)
    if as_json and progress.is_main_process():
        print(json.dumps(report.to_json(), indent=2))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m hqqplus.train RECIPE [key=value ...]` with its options; returns the exit code (2 for a user's
    mistake)."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [argument for argument in given if argument not in (ALLOW_MISMATCH, QUIET, JSON)]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    leave_out()
    try:
        run_shown(arguments[0], arguments[1:], ALLOW_MISMATCH in given, QUIET in given, JSON in given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"hqqplus: {error or 'stopped'}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
