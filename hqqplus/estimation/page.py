"""An estimate as text for a terminal or a file. A GB is 10^9 bytes."""

from __future__ import annotations

from collections.abc import Sequence

from hqqplus.estimation.cards import RESERVE
from hqqplus.estimation.estimate import Estimate

_NAMES = {
    "linears": "linear layers, codes",
    "metadata": "their scales and zeros",
    "embedding": "embedding",
    "head": "output head",
    "16 bits": "not packed",
}
_DISK = {
    "download": "download",
    "model": "the model, which is there",
    "packed": "packed model",
    "calibration": "calibration, until it is done",
    "checkpoints": "checkpoints, the one that is being written too",
    "adapter": "adapter",
    "backbone": "packed model with trained scales",
}


def as_text(found: Estimate) -> str:
    """The whole of it, some 60 lines."""
    return "\n".join([*_head(found), *_memory(found), *_disk(found), *_cards(found)])


def _head(found: Estimate) -> list[str]:
    packed = sum(found.backbone.values())
    return [
        f"{found.model}: {found.architecture}, {found.parameters / 1e6:,.1f} M parameters, "
        f"{_gb(found.parent).strip()} in {found.dtype}",
        "An estimate from the configuration alone; nothing was run on a GPU for it. A GB is 10^9 bytes.",
        "",
        f"backbone                 {_gb(packed)}   {found.bits_per_weight:.2f} bits per weight in the blocks, "
        f"{found.bits_per_parameter:.2f} in all",
        *(f"  {_NAMES[part]:23}{_gb(size)}" for part, size in found.backbone.items() if size),
    ]


def _memory(found: Estimate) -> list[str]:
    step = found.training
    other = "without" if step.checkpointing else "with"
    lines = [
        "",
        f"training, {step.batch} x {step.length} tokens at a time",
        f"  {'adapter':23}{_gb(4 * step.adapter_parameters)}   {step.adapter_parameters:,} parameters, "
        f"{step.adapter_shipped / 1e6:.1f} MB as shipped in bfloat16",
    ]
    if step.scale_parameters:
        lines.append(f"  {'trained scales':23}{_gb(4 * step.scale_parameters)}   {step.scale_parameters:,} parameters")
    guess = "" if step.optimizer_known else ", its state not known: taken for that of AdamW"
    lines += [
        f"  {'gradients':23}{_gb(step.gradients)}",
        f"  {'optimizer':23}{_gb(step.optimizer_state)}   {step.optimizer}{guess}",
        f"  {'activations and loss':23}{_gb(step.activations)}   at most, "
        f"{'with' if step.checkpointing else 'without'} gradient checkpointing "
        f"({_gb(step.activations_other).strip()} {other})",
        f"    {'kept by the blocks':21}{_gb(step.kept)}",
        f"    {'the loss, beside that':21}{_gb(step.loss)}",
        f"  {'a weight dequantized':23}{_gb(step.workspace)}",
    ]
    if found.distils:
        lines += [
            "  teacher beside it, one of",
            f"    {'online':21}{_gb(found.teachers['online'])}   the parent as it is",
            f"    {'8bit':21}{_gb(found.teachers['8bit'])}   packed to 8 bits",
            f"    {'cache':21}{_gb(found.teachers['cache'])}   and on the disk, for a million tokens, "
            f"{_gb(found.teachers['cache_disk']).strip()}",
        ]
    lines += [
        "",
        f"cache of {found.context:,} tokens   {_gb(found.cache)}   keys and values in {found.dtype}: quantizing "
        "weights does not shrink it",
        f"  {'reading such a prompt':23}{_gb(found.prefill)}   at most, the cache included",
    ]
    return lines


def _disk(found: Estimate) -> list[str]:
    lines = ["", f"disk                     {_gb(sum(found.disk.values()) - found.disk.get('model', 0.0))}"]
    lines += [f"  {_gb(size)}   {_DISK[name]}" for name, size in found.disk.items() if size]
    if found.host:
        lines += ["", f"CPU memory               {_gb(found.host)}   while it is quantized"]
    return lines


def _cards(found: Estimate) -> list[str]:
    rows = [["", "usable", "quantize", "train", "infer", "teacher", "tokens/s", "training", "calibration"]]
    for fit in found.fits:
        needs = [f"{getattr(fit, job) / 1e9:.1f} {'fits' if fits else 'NO'}" for job, fits in fit.fits.items()]
        times = [_hours(fit.train_hours), _hours(fit.calibrate_hours)]
        rows.append(
            [
                fit.card.name,
                f"{fit.card.usable / 1e9:.1f}",
                *needs,
                fit.teacher or "-",
                f"{fit.tokens_per_second:,.0f}",
                *times,
            ]
        )
    return ["", "the most at a time on one card, in GB", *_columns(rows), *_notes(found)]


def _notes(found: Estimate) -> list[str]:
    notes = [
        "",
        f"Usable is what torch sees, less {RESERVE / 1e9:.1f} GB for CUDA, libraries and the allocator (assumed).",
        "Times are rough: no run is faster, and a real one takes a multiple. Tokens/s of one sequence is what the",
        "card's bandwidth allows for reading weights and cache; training and calibration are what its 16-bit products",
        "allow.",
    ]
    if found.measure is not None:
        notes.append(
            f"Training begins by measuring the parent, {_gb(found.measure).strip()}; evaluation.parent=false "
            "leaves that out."
        )
    if found.steps is None:
        notes.append(
            f"How long training takes is up to the number of rows: no training.max_steps. A step is "
            f"{found.tokens_a_step:,} tokens."
        )
    if any(not fit.card.bfloat16 for fit in found.fits) and found.dtype == "bfloat16":
        notes.append("A T4 has no bfloat16: model.dtype=float16 training.bf16=false training.fp16=true there.")
    return notes


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:8.2f} GB" if size >= 1e7 else f"{size / 1e6:8.2f} MB"


def _hours(hours: float | None) -> str:
    if hours is None:
        return "-"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"
