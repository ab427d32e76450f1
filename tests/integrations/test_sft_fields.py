"""The fields of the training section: what is accepted, and what is refused."""

# ruff: noqa: E501 (refusals are quoted whole)

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml

from hqqplus.integrations import sft_fields
from hqqplus.recipe import load_recipe
from tests.recipes import SMALLEST, refused, with_section, write


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("max_steps: 1.0", "max_steps: 1.0 is a float; an integer is needed"),
        ("max_steps: '1'", "max_steps: '1' is a string; an integer is needed, so leave the quotes away"),
        ("max_steps: true", "max_steps: true is a boolean; an integer is needed"),
        ("max_steps: 0", "max_steps: 0 is out of range: at least 1, or -1 for no limit"),
        ("learning_rate: '1e-4'", "learning_rate: '1e-4' is a string; a number is needed, so leave the quotes away"),
        ("learning_rate: fast", "learning_rate: 'fast' is a string; a number is needed"),
        ("learning_rate: .inf", "learning_rate: inf is not finite; a number is needed"),
        ("learning_rate: null", "learning_rate: nothing is given; a number is needed"),
        ("learning_rate: -1e-4", "learning_rate: -0.0001 is out of range: at least 0 is needed"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size: 0 is out of range: at least 1 is needed"),
        ("gradient_accumulation_steps: 0", "gradient_accumulation_steps: 0 is out of range: at least 1 is needed"),
        ("logging_steps: 1.5", "logging_steps: 1.5 is out of range: a number of steps, or a ratio of all steps between 0 and 1, is needed"),
        ("save_steps: 0", "save_steps: 0 is out of range: a number of steps, or a ratio of all steps between 0 and 1, is needed"),
        ("save_total_limit: 1", "save_total_limit: 1 is too small: at least 2, or a crash while saving would leave no complete checkpoint"),
        ("bf16: yes", "bf16: 'yes' is a string; true, false or null is needed"),
        ("eval_steps: often", "eval_steps: 'often' is a string; a number or null is needed"),
        ("optim_target_modules: 3", "optim_target_modules: 3 is an integer; a string, a list or null is needed, so put it in quotes"),
        ("label_names: [a, 1]", "label_names: item 2: 1 is an integer; a string is needed, so put it in quotes"),
        ("liger_kernel_config: {rope: 1}", "liger_kernel_config: rope: 1 is an integer; true or false is needed"),
        ("save_strategy: false", "save_strategy: false is not one of no, steps, epoch, best"),
        ("eval_strategy: step", "eval_strategy: 'step' is not one of no, steps, epoch; did you mean steps?"),
        ("logging_strategy: best", "logging_strategy: 'best' is not one of no, steps, epoch"),
        ("packing_strategy: bdf", "packing_strategy: 'bdf' is not one of bfd, bfd_split, wrapped; did you mean bfd?"),
        ("hub_strategy: [end]", "hub_strategy: ['end'] is a list; a string is needed"),
        ("trackio_static_space_id: true", "trackio_static_space_id: true is a boolean; a string, false or null is needed, so put it in quotes"),
        ("parallelism_config: {a: 1}", "parallelism_config: cannot be set in a recipe"),
        ("learning_rte: 1", "learning_rte: unknown key; did you mean learning_rate? (allowed: the fields of trl.SFTConfig)"),
        ("zzzzz: 1", "zzzzz: unknown key (allowed: the fields of trl.SFTConfig)"),
        ("evaluation_strategy: steps", "evaluation_strategy: unknown key; did you mean eval_strategy? (allowed: the fields of trl.SFTConfig)"),
        ("max_seq_length: 1", "max_seq_length: belongs in data.max_length"),
        ("max_length: 512", "max_length: belongs in data.max_length"),
        ("packing: true", "packing: belongs in data.packing"),
        ("dataset_text_field: text", "dataset_text_field: belongs in data.text_field"),
        ("report_to: wandb", "report_to: belongs in tracking.report_to"),
        ("run_name: x", "run_name: belongs in tracking.run"),
        ("output_dir: x", "output_dir: belongs at the top of the recipe: output_dir"),
        ("seed: 1", "seed: belongs at the top of the recipe: seed"),
        ("model_init_kwargs: {}", "model_init_kwargs: belongs in the section model (dtype, attn_implementation, revision)"),
        ("resume_from_checkpoint: x", "resume_from_checkpoint: not settable: a run always continues from its last complete checkpoint"),
    ],
)  # fmt: skip
def test_refused_training_values(tmp_path: Path, line: str, what: str) -> None:
    if line.startswith("trackio_static") and "trackio_static_space_id" not in sft_fields.field_types():
        pytest.skip("this transformers has no such field")
    assert refused(tmp_path, with_section("training", line)) == [f"recipe.yaml:7: training.{what}"]


@pytest.mark.parametrize(
    "name", ["eos_token", "eval_packing", "project", "trust_remote_code", "local_rank", "hub_token", "warmup_ratio"]
)
def test_fields_that_are_refused_whatever_they_say(tmp_path: Path, name: str) -> None:
    if name in sft_fields.GONE and name in sft_fields.field_types():
        pytest.skip(f"this transformers still has {name}")
    [line] = refused(tmp_path, with_section("training", f"{name}: 1"))
    said = {**sft_fields.GONE, **sft_fields.ELSEWHERE}[name]
    assert line == f"recipe.yaml:7: training.{name}: {said}"


def test_training_is_a_mapping(tmp_path: Path) -> None:
    assert refused(tmp_path, SMALLEST + "training: 3\n") == [
        "recipe.yaml:6: training: 3 is an integer; a mapping of fields of trl.SFTConfig is needed"
    ]


def test_fp16_and_bf16_exclude_each_other(tmp_path: Path) -> None:
    assert refused(tmp_path, SMALLEST + "training:\n  bf16: true\n  fp16: true\n  max_steps: x\n") == [
        "recipe.yaml:8: training.fp16: fp16 and bf16 exclude each other",
        "recipe.yaml:9: training.max_steps: 'x' is a string; an integer is needed",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "learning_rate: 1", "max_steps: -1", "warmup_steps: 0.03", "warmup_steps: 100", "eval_steps: 0.1",
        "eval_steps: null", "save_total_limit: 2", "save_total_limit: null", "save_strategy: no", "save_strategy: best",
        "data_seed: 3", "optim_target_modules: all-linear", "optim_target_modules: [a]", "lr_scheduler_kwargs: {a: [1]}",
        "dataset_kwargs: {skip_prepare_dataset: true}", "debug: underflow_overflow", "debug: [underflow_overflow]",
        "pad_to_multiple_of: 8", "pad_to_multiple_of: auto", "ddp_backend: gloo",
        "include_num_input_tokens_seen: true", "logging_steps: 1", "logging_steps: 1.0",
    ],
)  # fmt: skip
def test_accepted_training_values(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, with_section("training", line))
    assert dict(load_recipe(path).training) == {line.partition(":")[0]: value_of(line)}


def value_of(line: str) -> Any:
    value = yaml.safe_load(line.partition(": ")[2])
    return "no" if value is False else value


def test_every_default_of_sftconfig_is_accepted() -> None:
    from trl import SFTConfig

    for field in dataclasses.fields(SFTConfig):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        default = default.value if isinstance(default, Enum) else default
        if field.name not in sft_fields.ELSEWHERE and (field.name, default) != ("eval_steps", 0):
            assert sft_fields.problem(field.name, default) is None, field.name


def test_every_field_refuses_an_object_of_no_type_of_its_own() -> None:
    for name in sft_fields.field_types().keys() - sft_fields.ELSEWHERE.keys():
        assert sft_fields.problem(name, object()), name


def test_every_optimizer_and_schedule_is_accepted() -> None:
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    assert [sft_fields.problem("optim", one.value) for one in OptimizerNames] == [None] * len(OptimizerNames)
    assert [sft_fields.problem("lr_scheduler_type", one.value) for one in SchedulerType] == [None] * len(SchedulerType)


def test_what_is_refused_by_name_is_known_to_sftconfig() -> None:
    # A name that trl drops should leave the table too, or the refusal would point to a ghost.
    assert set(sft_fields.ELSEWHERE) - {"project", "trust_remote_code"} <= set(sft_fields.field_types())
    assert set(sft_fields.SMALLEST) <= set(sft_fields.field_types())
