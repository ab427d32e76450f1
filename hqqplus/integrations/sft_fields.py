"""Which fields `trl.SFTConfig` has, and which values each of them takes, read off the installed version.

The `training` section of a recipe is made of these fields by their own names. Importing trl takes seconds, so nothing
here does before it is asked.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Literal

from hqqplus.recipe_yaml import did_you_mean, not_one_of, wrong_type

ELSEWHERE = {
    "output_dir": "belongs at the top of the recipe: output_dir",
    "seed": "belongs at the top of the recipe: seed",
    "max_length": "belongs in data.max_length",
    "packing": "belongs in data.packing",
    "eval_packing": "not settable: evaluation measures windows of data.max_length tokens, never packed rows",
    "dataset_text_field": "belongs in data.text_field",
    "eos_token": "belongs in data.eos: whether the tokenizer's own is put at the end of a text",
    "report_to": "belongs in tracking.report_to",
    "run_name": "belongs in tracking.run",
    "project": "belongs in tracking.project",
    "model_init_kwargs": "belongs in the section model (dtype, attn_implementation, revision)",
    "trust_remote_code": "belongs in model.trust_remote_code",
    "resume_from_checkpoint": "not settable: a run always continues from its last complete checkpoint",
    "local_rank": "not settable: the launcher sets it",
    "hub_token": "a secret, and recipes are shared: log in with `hf auth login` or set HF_TOKEN",
}
"""Fields of SFTConfig that another section owns, or nobody may set, and what to say of them."""

GONE = {
    "max_seq_length": "belongs in data.max_length",
    "warmup_ratio": "gone from transformers 5: warmup_steps below 1 is a ratio",
    "group_by_length": "gone from transformers 5: train_sampling_strategy: group_by_length",
    "logging_dir": "gone from transformers 5: set TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": "gone from transformers 5: a run continues from its last complete checkpoint",
    "no_cuda": "gone from transformers 5: use_cpu",
}
"""Names that old recipes have and the installed SFTConfig lacks, and what took their place."""

SMALLEST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "dataloader_num_workers": 0,
    "dataset_num_proc": 1,
}
"""The smallest value of the numbers that would otherwise fail, or be silently ignored, deep inside a run."""


@dataclass(frozen=True)
class FieldType:
    """What one field takes: values of `alternatives` (plain types), or one of `choices` where it has any."""

    alternatives: tuple[Any, ...]
    choices: tuple[Any, ...] = ()


@cache
def field_types() -> Mapping[str, FieldType]:
    """Every field that SFTConfig can be made with, by name. The first call imports trl."""
    # Read when huggingface_hub is imported, which this may be the first to do; see hqqplus.integrations.trl.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    from trl import SFTConfig

    hints = typing.get_type_hints(SFTConfig)
    return {
        field.name: _field_type(hints[field.name], field.metadata.get("choices"))
        for field in dataclasses.fields(SFTConfig)
        if field.init
    }


def problem(name: str, value: Any) -> str | None:
    """Why `name: value` cannot stand in a recipe's `training` section; None where it can.

    Args:
        name: a field of `trl.SFTConfig`.
        value: what YAML has for it. Enums are given by value, integers stand where floats belong.
    """
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    if name not in field_types():
        if name in GONE:
            return GONE[name]
        allowed = [field for field in field_types() if field not in ELSEWHERE]
        return f"unknown key{did_you_mean(name, allowed)} (allowed: the fields of trl.SFTConfig)"
    return _type_problem(field_types()[name], value) or _range_problem(name, value)


def _field_type(hint: Any, choices: Any) -> FieldType:
    alternatives = _alternatives(hint)
    fixed = [a for a in alternatives if isinstance(a, type) and issubclass(a, Enum)]
    if fixed:
        # `OptimizerNames | str` means the enum's values: any other string fails once the trainer is built.
        choices = [member.value for enum in fixed for member in enum]
    if choices:
        # The strings are the choices; what else is allowed (None, a list) stays.
        alternatives = tuple(a for a in alternatives if a is not str and a not in fixed)
    return FieldType(alternatives, tuple(choices or ()))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(flat for part in typing.get_args(hint) for flat in _alternatives(part))
    if typing.get_origin(hint) is typing.Annotated:
        return _alternatives(typing.get_args(hint)[0])
    return (hint,)


def _type_problem(field: FieldType, value: Any) -> str | None:
    if any(_is(value, choice) for choice in field.choices) or any(_accepts(a, value) for a in field.alternatives):
        return None
    if field.choices and not isinstance(value, (dict, list)):
        return not_one_of(value, field.choices)
    words = [*(["a string"] if field.choices else []), *map(_in_words, field.alternatives)]
    known = list(dict.fromkeys(word for word in words if word))
    if not known or known == ["null"]:
        return "cannot be set in a recipe"
    known.sort(key=lambda word: word == "null")
    needed = ", ".join(known[:-1]).replace("true or false", "true, false") + " or " * (len(known) > 1) + known[-1]
    inner = _element_problem(field.alternatives, value)
    return inner or wrong_type(value, needed)


def _element_problem(alternatives: tuple[Any, ...], value: Any) -> str | None:
    """What is wrong inside a list or a mapping of the right kind."""
    for alternative in alternatives:
        origin, args = typing.get_origin(alternative) or alternative, typing.get_args(alternative)
        if origin is list and isinstance(value, list) and args:
            wrong = (_type_problem(_field_type(args[0], None), item) for item in value)
            return next((f"item {i + 1}: {what}" for i, what in enumerate(wrong) if what), None)
        if origin is dict and isinstance(value, dict) and len(args) == 2:
            named = ((name, _type_problem(_field_type(args[1], None), item)) for name, item in value.items())
            return next((f"{name}: {what}" for name, what in named if what), None)
    return None


def _accepts(hint: Any, value: Any) -> bool:
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Any:
        return True
    if origin in (None, types.NoneType):
        return value is None
    if origin is Literal:
        return any(_is(value, choice) for choice in args)
    if origin is float:
        return _accepts(int, value) or (isinstance(value, float) and math.isfinite(value))
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (bool, str):
        return isinstance(value, origin)
    if origin is list:
        return isinstance(value, list) and (
            not args or all(not _type_problem(_field_type(args[0], None), v) for v in value)
        )
    if origin is dict:
        inner = _field_type(args[1], None) if len(args) == 2 else None
        return isinstance(value, dict) and (inner is None or all(not _type_problem(inner, v) for v in value.values()))
    return False


def _is(value: Any, choice: Any) -> bool:
    """Equality that tells False from 0 and 1 from 1.0."""
    return type(value) is type(choice) and value == choice


def _in_words(hint: Any) -> str:
    """What a value of this type is called; empty for a type that YAML cannot write."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return " or ".join(str(choice).lower() if isinstance(choice, bool) else repr(choice) for choice in args)
    if origin in (None, types.NoneType):
        return "null"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return {**words, list: "a list", dict: "a mapping", Any: "anything"}.get(origin, "")


def _range_problem(name: str, value: Any) -> str | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "save_total_limit" and number and value < 2:
        return f"{value} is too small: at least 2, or a crash while saving would leave no complete checkpoint"
    if name == "max_steps" and number and value != -1 and value < 1:
        return f"{value} is out of range: at least 1, or -1 for no limit"
    if name in SMALLEST and number and value < SMALLEST[name]:
        return f"{value} is out of range: at least {SMALLEST[name]} is needed"
    if name in ("logging_steps", "eval_steps", "save_steps") and number and (value <= 0 or value > max(1, int(value))):
        return f"{value} is out of range: a number of steps, or a ratio of all steps between 0 and 1, is needed"
    return None
