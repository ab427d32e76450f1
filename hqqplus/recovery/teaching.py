"""The teacher of a run that distils: which kind fits, and how it is brought up."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import PartialState

from hqqplus.errors import UserError
from hqqplus.models import one_sentence
from hqqplus.recipe import Recipe
from hqqplus.recovery.agreement import from_main
from hqqplus.recovery.backbone import load_options
from hqqplus.recovery.distillation import Distillation, LossWeights
from hqqplus.recovery.identity import Identity
from hqqplus.recovery.setup import Say, TrainingRows
from hqqplus.recovery.teacher import OnlineTeacher, TeacherKind, pick_teacher
from hqqplus.recovery.teacher_cache import TeacherCache, build_cache, is_made
from hqqplus.shards import read_header
from hqqplus.streaming.checkpoint import fetch

CACHE_FOLDER = "teacher"
# Of a parent in 16 bits, what its packed student takes at most: 2 bits a weight, embedding and head as they were.
STUDENT_SHARE = 0.35
_WHERE = "recovery.teacher_cache"

Parent = tuple[str, str | None]
"""Name and revision."""


def settle_teacher(recipe: Recipe, parent: Parent | None, device: torch.device, say: Say) -> TeacherKind | None:
    """Where the teacher's targets come from: as the recipe says, or the best that fits. None where nobody teaches.

    Raises:
        UserError: if the recipe distils and the parent is not known, or no part of the loss is left.
    """
    section = recipe.recovery
    if section.loss != "kd":
        return None
    if parent is None:
        raise UserError(
            f"recovery.loss: {recipe.model.name_or_path} does not say what it was quantized from, so there is nobody "
            "to learn from: name the parent model, or use loss: ce"
        )
    kind: TeacherKind
    if section.teacher != "auto":
        kind = section.teacher
    elif device.type != "cuda":
        kind = "online"
    else:
        size, free = _bytes_in_16_bits(parent, recipe), torch.cuda.mem_get_info(device)[0]
        kind = pick_teacher(size, free, student_bytes=int(size * STUDENT_SHARE))
        if kind == "cache" and recipe.data.streaming:
            # A stream has no set of rows whose targets could be kept: the least memory must do.
            kind = "8bit"
        say(f"recovery.teacher: {kind}")
    if kind == "cache" and section.hidden_weight:
        say("recovery.hidden_weight: left out, because a teacher's cache holds no hidden states")
    return kind


def write_cache(recipe: Recipe, parent: Parent, rows: TrainingRows, device: torch.device, say: Say) -> None:
    """Compute the teacher's targets for `rows` with the parent alone in memory, where they are not there yet."""
    state, folder = PartialState(), _folder(recipe)
    if from_main(state, lambda: is_made(folder)):
        return
    say(f"computing the teacher's targets, into {folder}")
    # One parent, in the main process; the rows in all of them, which wait for one another in there.
    teacher = _load(recipe, parent, "online", device) if state.is_main_process else None
    rows.settle(from_main(state, lambda: rows.packing_with(teacher.model if teacher is not None else None)))

    def build() -> None:
        assert teacher is not None
        build_cache(folder, rows.rows, teacher, _identity(recipe, parent, rows), k=recipe.recovery.top_k, where=_WHERE)

    from_main(state, build)


def distillation(
    recipe: Recipe, kind: TeacherKind, parent: Parent, rows: TrainingRows, device: torch.device
) -> Distillation:
    """The loss with its teacher: the parent loaded beside the student, or the targets that `write_cache` wrote.

    Raises:
        UserError: if the cache is damaged, or holds the targets of something else.
    """
    section = recipe.recovery
    hidden = 0.0 if kind == "cache" else section.hidden_weight
    weights = LossWeights(section.kl_weight, section.ce_weight, hidden)
    source: OnlineTeacher | TeacherCache
    if kind == "cache":
        source = TeacherCache.open(_folder(recipe), _identity(recipe, parent, rows), where=_WHERE)
    else:
        source = _load(recipe, parent, kind, device)
    return Distillation(weights, source)


def _folder(recipe: Recipe) -> Path:
    return Path(recipe.recovery.teacher_cache or Path(recipe.output_dir) / CACHE_FOLDER)


def _load(recipe: Recipe, parent: Parent, kind: TeacherKind, device: torch.device) -> OnlineTeacher:
    name, revision = parent
    options = {**load_options(recipe, device), "revision": revision}
    return OnlineTeacher.load(name, eight_bit=kind == "8bit", **options)


def _identity(recipe: Recipe, parent: Parent, rows: TrainingRows) -> Identity:
    name, revision = parent
    return Identity.of(
        rows.rows,
        rows.tokenizer,
        name,
        precision=recipe.model.dtype,
        revision=revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def _bytes_in_16_bits(parent: Parent, recipe: Recipe) -> int:
    name, revision = parent
    with one_sentence(name, "model.name_or_path"):
        folder, files, _ = fetch(name, revision, recipe.model.trust_remote_code, "model.name_or_path")
        shapes = [tensor.shape for file in files for tensor in read_header(folder / file).values()]
    return 2 * sum(torch.Size(shape).numel() for shape in shapes)
