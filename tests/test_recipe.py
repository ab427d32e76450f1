"""Recipes: what is read, what is refused by section, and how two are compared."""

# ruff: noqa: E501 (refusals are quoted whole)

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from hqqplus.errors import UserError
from hqqplus.recipe import (
    TRACKERS,
    Data,
    Quantization,
    Recipe,
    differences,
    identity,
    load_recipe,
    recipe_digest,
    to_dict,
)
from tests.recipes import SMALLEST, refused, with_section, write

# What is read --------------------------------------------------------------------------------------------------------


def test_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALLEST))
    assert to_dict(recipe) == {
        "model": {
            "name_or_path": "some/model",
            "revision": None,
            "dtype": "auto",
            "attn_implementation": None,
            "trust_remote_code": False,
        },
        "quantization": {
            "nbits": 2,
            "group_size": 32,
            "axis": 1,
            "metadata_dtype": "float16",
            "metadata_bits": 8,
            "overrides": {},
            "skip": [],
            "lp_norm": 2.0,
            "threshold": 0.5,
            "gain": 0.0,
            "thorough": False,
            "save_to": None,
        },
        "calibration": {
            "method": "none",
            "samples": 128,
            "length": None,
            "epochs": 4,
            "batch_size": 4,
            "scale_learning_rate": 5e-3,
            "weight_learning_rate": 3e-2,
            "store": "cpu",
        },
        "adapter": {
            "r": 16,
            "lora_alpha": None,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
            "init": "residual",
            "rank_pattern": {},
            "budget_mb": None,
            "use_dora": False,
            "use_rslora": False,
        },
        "data": {
            "path_or_name": "some/data",
            "config_name": None,
            "split": "train",
            "eval_path_or_name": None,
            "eval_split": None,
            "text_field": "text",
            "prompt": None,
            "completion": None,
            "messages": None,
            "alpaca": False,
            "alpaca_prompt": None,
            "sharegpt": None,
            "max_length": 1024,
            "packing": "auto",
            "eos": True,
            "streaming": False,
            "shuffle_buffer": 1000,
            "masked_rows": "refuse",
            "cache": True,
        },
        "recovery": {
            "loss": "ce",
            "kl_weight": 1.0,
            "ce_weight": 0.5,
            "hidden_weight": 0.5,
            "teacher": "auto",
            "teacher_cache": None,
            "top_k": 64,
            "scales": "frozen",
            "offsets": "auto",
            "scales_learning_rate": None,
            "norms": False,
            "biases": False,
        },
        "training": {},
        "evaluation": {
            "texts": {},
            "join": False,
            "max_tokens": 100000,
            "prompts": [],
            "max_new_tokens": 48,
            "parent": True,
            "batch_size": 8,
        },
        "tracking": {"report_to": "none", "project": None, "run": None, "mode": None},
        "output_dir": "runs/x",
        "seed": 0,
    }


FULL = """\
model: {name_or_path: m, revision: abc, dtype: bfloat16, attn_implementation: sdpa, trust_remote_code: true}
quantization:
  nbits: 1
  group_size: -1
  axis: 0
  metadata_dtype: bfloat16
  metadata_bits: 8
  overrides:
    "*.down_proj": {nbits: 4, group_size: 32}
    model.embed_tokens: {nbits: 8}
    0: {axis: 1}
  skip: [lm_head, "*.layers.0.*"]
  lp_norm: 0.7
  gain: 0.5
  save_to: packed
adapter: {r: 4, lora_alpha: 8.5, lora_dropout: 0, target_modules: [q_proj, v_proj], init: default, use_dora: true}
data: {path_or_name: d.jsonl, prompt: question, completion: answer, max_length: 8, packing: TRUE, eos: False}
training:
  learning_rate: 1e-4
  num_train_epochs: 3
  save_strategy: no
  eval_strategy: epoch
  lr_scheduler_type: cosine_with_min_lr
  lr_scheduler_kwargs: {min_lr: 1E-5}
  optim: paged_adamw_8bit
  bf16: null
  label_names: [labels]
evaluation:
  texts: {no: other.txt, wiki: some/wiki}
  max_tokens: null
  prompts: [yes, "a\\nb"]
tracking: {report_to: [wandb, tensorboard], project: p, run: r, mode: offline}
output_dir: 2024-01-01
seed: 0x10
"""


def test_everything_set(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    assert recipe.model.trust_remote_code is True
    assert recipe.quantization.skip == ("lm_head", "*.layers.0.*")
    assert recipe.adapter.lora_alpha == 8.5
    assert isinstance(recipe.adapter.lora_dropout, float)
    assert recipe.adapter.target_modules == ("q_proj", "v_proj")
    assert (recipe.data.text_field, recipe.data.prompt, recipe.data.completion) == (None, "question", "answer")
    assert recipe.data.packing is True
    assert recipe.data.eos is False
    assert dict(recipe.training) == {
        "learning_rate": 1e-4,
        "num_train_epochs": 3,
        "save_strategy": "no",
        "eval_strategy": "epoch",
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-5},
        "optim": "paged_adamw_8bit",
        "bf16": None,
        "label_names": ["labels"],
    }
    assert recipe.evaluation.texts == {"no": "other.txt", "wiki": "some/wiki"}
    assert recipe.evaluation.max_tokens is None
    assert recipe.evaluation.prompts == ("yes", "a\nb")
    assert recipe.tracking.report_to == ("wandb", "tensorboard")
    assert recipe.output_dir == "2024-01-01"
    assert recipe.seed == 16


def test_plan(tmp_path: Path) -> None:
    from hqqplus.quantization.spec import QuantSpec

    plan = load_recipe(write(tmp_path, FULL)).quantization.plan()
    assert plan.default == QuantSpec(nbits=1, group_size=-1, axis=0, metadata_dtype="bfloat16", metadata_bits=8)
    assert plan.spec_for("model.layers.1.mlp.down_proj") == plan.default.replace(nbits=4, group_size=32)
    assert plan.override_for("model.embed_tokens") == plan.default.replace(nbits=8)
    assert list(plan.overrides) == ["*.down_proj", "model.embed_tokens", "0"]
    assert plan.spec_for("lm_head") is None
    assert json.loads(json.dumps(plan.overrides)) == plan.overrides


def test_defaults_are_those_of_quantspec() -> None:
    from hqqplus.quantization.spec import QuantPlan

    assert Quantization().plan() == QuantPlan()


@pytest.mark.parametrize(
    "text", ["training:\n", "training: {}\n", "training: null\n", "adapter:\n  # r: 8\n", "quantization: ~\n"]
)
def test_empty_sections(tmp_path: Path, text: str) -> None:
    assert load_recipe(write(tmp_path, SMALLEST + text)) == load_recipe(write(tmp_path, SMALLEST, "plain.yaml"))


@pytest.mark.parametrize(
    "key", ["quantization.overrides", "quantization.skip", "evaluation.texts", "evaluation.prompts"]
)
def test_null_unsets_a_collection(tmp_path: Path, key: str) -> None:
    section, name = key.split(".")
    assert len(getattr(getattr(load_recipe(write(tmp_path, SMALLEST), [f"{key}=null"]), section), name)) == 0


def test_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    with pytest.raises(ValidationError):
        recipe.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        recipe.adapter.r = 3  # type: ignore[misc]
    for mapping in (recipe.training, recipe.quantization.overrides, recipe.quantization.overrides["*.down_proj"]):
        with pytest.raises(TypeError):
            mapping["nbits"] = 3  # type: ignore[index]
    assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == recipe


def test_made_in_python() -> None:
    recipe = Recipe(model={"name_or_path": "m"}, data=Data(path_or_name="d"), output_dir="o", adapter={"r": 2})
    assert recipe.adapter.r == 2
    assert recipe.data.text_field == "text"
    with pytest.raises(ValidationError) as caught:
        Recipe(model={}, data={"path_or_name": 1}, output_dir="o")
    assert [(e["loc"], e["msg"]) for e in caught.value.errors()] == [
        (("model", "name_or_path"), "missing, and it is required"),
        (("data", "path_or_name"), "1 is an integer; a string is needed, so put it in quotes"),
    ]


# Imports -------------------------------------------------------------------------------------------------------------


def loaded_modules(code: str) -> set[str]:
    names = "torch", "transformers", "trl", "peft", "datasets"
    code += f"\nimport sys; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(yaml.safe_load(done.stdout.splitlines()[-1]))


def test_importing_is_light(tmp_path: Path) -> None:
    assert loaded_modules("import hqqplus.recipe") == set()


def test_trl_is_imported_for_the_training_section_only(tmp_path: Path) -> None:
    text = SMALLEST + "adapter: {r: 4}\nquantization: {}\ntraining: {}\n"
    path = write(tmp_path, text)
    assert loaded_modules(f"from hqqplus.recipe import load_recipe; load_recipe({str(path)!r})") == set()


# Refusals by section -------------------------------------------------------------------------------------------------


def test_all_errors_at_once(tmp_path: Path) -> None:
    text = """\
# A comment, so that lines are not what a counter of keys would say.
model:
  name_or_pth: x
  dtype: fp16

quantization:
  nbits: 5
  group_size: 12
  overrides:
    model.embed_tokens: {nbits: 8, group_sise: 3}
    "*.down":
      nbits: 4.0
      axis: 2
  skip: lm_head
adapter:
  r: 0
  lora_dropout: 1
  target_modules: [q, 3]
  init: residul
data:
  path_or_name: x
  max_length: 7
training:
  optim: paged_adamw8bit
  max_steps: 1.5
  learning_rate: 1e-4
evaluation:
  prompts:
    - a
    - 2
tracking: wandb
outputdir: x
seed: true
"""
    lines = refused(tmp_path, text)
    # All optimizers are listed, and they differ from version to version.
    optim = lines.pop(15)
    assert lines == [
        "recipe.yaml:1: output_dir: missing, and it is required",
        "recipe.yaml:2: model.name_or_path: missing, and it is required",
        "recipe.yaml:3: model.name_or_pth: unknown key; did you mean name_or_path? (allowed: name_or_path, revision, dtype, attn_implementation, trust_remote_code)",
        "recipe.yaml:4: model.dtype: 'fp16' is not one of auto, bfloat16, float16, float32; did you mean float16?",
        "recipe.yaml:7: quantization.nbits: 5 is not allowed: it must be one of 1, 2, 3, 4, 8",
        "recipe.yaml:8: quantization.group_size: 12 is not allowed: it must be a multiple of 8 from 8 to 256, or -1 for the whole row",
        'recipe.yaml:10: quantization.overrides["model.embed_tokens"].group_sise: unknown key; did you mean group_size? (allowed: nbits, group_size, axis, metadata_dtype, metadata_bits)',
        'recipe.yaml:12: quantization.overrides["*.down"].nbits: 4.0 is a float; an integer is needed',
        'recipe.yaml:13: quantization.overrides["*.down"].axis: 2 is not allowed: it must be 0 or 1',
        "recipe.yaml:14: quantization.skip: 'lm_head' is a string; a list is needed",
        "recipe.yaml:16: adapter.r: 0 is out of range: at least 1 is needed",
        "recipe.yaml:17: adapter.lora_dropout: 1 is out of range: less than 1 is needed",
        "recipe.yaml:18: adapter.target_modules[1]: 3 is an integer; a string is needed, so put it in quotes",
        "recipe.yaml:19: adapter.init: 'residul' is not one of default, residual, weighted; did you mean residual?",
        "recipe.yaml:22: data.max_length: 7 is out of range: at least 8 is needed",
        "recipe.yaml:25: training.max_steps: 1.5 is a float; an integer is needed",
        "recipe.yaml:30: evaluation.prompts[1]: 2 is an integer; a string is needed, so put it in quotes",
        "recipe.yaml:31: tracking: 'wandb' is a string; a mapping is needed",
        "recipe.yaml:32: outputdir: unknown key; did you mean output_dir? (allowed: model, quantization, calibration, adapter, data, recovery, training, evaluation, tracking, output_dir, seed, extends); fields of trl.SFTConfig go under training",
        "recipe.yaml:33: seed: true is a boolean; an integer is needed",
    ]
    assert optim.startswith("recipe.yaml:24: training.optim: 'paged_adamw8bit' is not one of adamw_torch, ")
    assert optim.endswith("; did you mean paged_adamw_8bit?")


@pytest.mark.parametrize(
    ("section", "line", "what"),
    [
        ("model", "revision: 1234567", "revision: 1234567 is an integer; a string is needed, so put it in quotes"),
        ("model", "trust_remote_code: yes", "trust_remote_code: 'yes' is a string; true or false is needed"),
        ("model", "trust_remote_code: 'true'", "trust_remote_code: 'true' is a string; true or false is needed, so leave the quotes away"),
        ("model", "dtype: bf16", "dtype: 'bf16' is not one of auto, bfloat16, float16, float32; did you mean bfloat16?"),
        ("model", "nbits: 2", "nbits: unknown key here; did you mean quantization.nbits?"),
        ("quantization", "nbits: '2'", "nbits: '2' is a string; an integer is needed, so leave the quotes away"),
        ("quantization", "nbits: 2.0", "nbits: 2.0 is a float; an integer is needed"),
        ("quantization", "nbits: true", "nbits: true is a boolean; an integer is needed"),
        ("quantization", "nbits: null", "nbits: nothing is given; an integer is needed"),
        ("quantization", "nbits: [2]", "nbits: [2] is a list; an integer is needed"),
        ("quantization", "nbits: {a: 1}", "nbits: a mapping is given; an integer is needed"),
        ("quantization", "group_size: 264", "group_size: 264 is not allowed: it must be a multiple of 8 from 8 to 256, or -1 for the whole row"),
        ("quantization", "axis: -1", "axis: -1 is not allowed: it must be 0 or 1"),
        ("quantization", "metadata_dtype: float_16", "metadata_dtype: 'float_16' is not allowed: it must be one of float16, bfloat16; did you mean float16?"),
        ("quantization", "metadata_dtype: 16", "metadata_dtype: 16 is an integer; a string is needed, so put it in quotes"),
        ("quantization", "metadata_bits: 4", "metadata_bits: 4 is not allowed: it must be 8 or 16"),
        ("quantization", "metadata_bits: '8'", "metadata_bits: '8' is a string; an integer is needed, so leave the quotes away"),
        ("quantization", "overrides: [lm_head]", "overrides: ['lm_head'] is a list; a mapping of name patterns to the fields that differ there is needed"),
        ("quantization", "overrides: {lm_head: 8}", "overrides.lm_head: 8 is an integer; a mapping of nbits, group_size, axis, metadata_dtype, metadata_bits is needed"),
        ("quantization", "overrides: {lm_head: {nbits: 6}}", "overrides.lm_head.nbits: 6 is not allowed: it must be one of 1, 2, 3, 4, 8"),
        ("quantization", "skip: [1]", "skip[0]: 1 is an integer; a string is needed, so put it in quotes"),
        ("quantization", "skip: ['']", "skip[0]: empty; a name is needed"),
        ("adapter", "r: 1.0", "r: 1.0 is a float; an integer is needed"),
        ("adapter", "lora_alpha: 0", "lora_alpha: 0 is out of range: more than 0 is needed"),
        ("adapter", "lora_alpha: '16'", "lora_alpha: '16' is a string; a number is needed, so leave the quotes away"),
        ("adapter", "lora_alpha: true", "lora_alpha: true is a boolean; a number is needed"),
        ("adapter", "lora_alpha: .nan", "lora_alpha: nan is not finite; a number is needed"),
        ("adapter", "lora_dropout: -0.1", "lora_dropout: -0.1 is out of range: at least 0 is needed"),
        ("adapter", "lora_dropout: .nan", "lora_dropout: nan is not finite; a number is needed"),
        ("adapter", "lora_dropout: low", "lora_dropout: 'low' is a string; a number is needed"),
        ("adapter", "target_modules: 3", "target_modules: 3 is an integer; a string or a list of strings is needed, so put it in quotes"),
        ("adapter", "target_modules: []", "target_modules: empty; at least one name is needed"),
        ("adapter", "target_modules: ['']", "target_modules[0]: empty; a name is needed"),
        ("adapter", "init: pissa", "init: 'pissa' is not one of default, residual, weighted"),
        ("adapter", "init: 1", "init: 1 is not one of default, residual, weighted"),
        ("adapter", "text_field: x", "text_field: unknown key here; did you mean data.text_field?"),
        ("data", "split: ''", "split: empty; a name is needed"),
        ("data", "max_length: 512.0", "max_length: 512.0 is a float; an integer is needed"),
        ("data", "prompt: q", "prompt: needs completion too: prompt and completion are the two columns of one form"),
        ("data", "completion: a", "completion: needs prompt too: prompt and completion are the two columns of one form"),
        ("evaluation", "max_tokens: 1", "max_tokens: 1 is out of range: at least 2 is needed"),
        ("evaluation", "max_new_tokens: 0", "max_new_tokens: 0 is out of range: at least 1 is needed"),
        ("evaluation", "batch_size: 0", "batch_size: 0 is out of range: at least 1 is needed"),
        ("evaluation", "texts: [a]", "texts: ['a'] is a list; a mapping of names to files or data sets is needed"),
        ("evaluation", "texts: {wiki: 3}", "texts.wiki: 3 is an integer; a string, a file or the name of a data set, is needed, so put it in quotes"),
        ("evaluation", "texts: {wiki: ''}", "texts.wiki: empty; a name is needed"),
        ("adapter", f"lora_alpha: -1{'0' * 400}", f"lora_alpha: -1{'0' * 55}... is out of range: more than 0 is needed"),
        ("evaluation", "prompts: hello", "prompts: 'hello' is a string; a list is needed"),
        ("adapter", "rank_pattern: {q_proj: 0}", "rank_pattern.q_proj: 0 is out of range: at least 1 is needed"),
        ("adapter", "rank_pattern: 4", "rank_pattern: 4 is an integer; a mapping of name patterns to ranks is needed"),
        ("calibration", "method: gptq", "method: 'gptq' is not one of none, importance, feedback, block"),
        ("calibration", "weight_learning_rate: -1", "weight_learning_rate: -1 is out of range: at least 0 is needed"),
        ("recovery", "loss: sft", "loss: 'sft' is not one of ce, kd"),
        ("recovery", "offsets: maybe", "offsets: 'maybe' is a string; true, false or auto is needed"),
        ("tracking", "report_to: wandbb", f"report_to: 'wandbb' is not one of {', '.join(TRACKERS)}; did you mean wandb?"),
        ("tracking", "report_to: [wandb, x]", f"report_to[1]: 'x' is not one of {', '.join(TRACKERS)}"),
        ("tracking", "report_to: [none, wandb]", "report_to: ['none', 'wandb'] is contradictory: none stands alone"),
        ("tracking", "report_to: false", "report_to: false is a boolean; a string or a list of strings is needed, so put it in quotes"),
        ("tracking", "mode: on", "mode: 'on' is not one of online, offline, disabled"),
    ],
)  # fmt: skip
def test_refused_values(tmp_path: Path, section: str, line: str, what: str) -> None:
    text = with_section(section, line)
    number = text.splitlines().index(f"  {line}") + 1
    assert refused(tmp_path, text) == [f"recipe.yaml:{number}: {section}.{what}"]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ("text_field: a, messages: b", "data.messages: text_field, messages are given"),
        ("text_field: a, prompt: b, completion: c", "data.completion: text_field, prompt, completion are given"),
        ("messages: a, prompt: b, completion: c", "data.messages: prompt, completion, messages are given"),
    ],
)
def test_one_form_of_data(tmp_path: Path, fields: str, line: str) -> None:
    text = SMALLEST.replace("data:\n  path_or_name: some/data\n", f"data: {{path_or_name: x, {fields}}}\n")
    assert refused(tmp_path, text) == [
        f"recipe.yaml:3: {line}; exactly one of text_field, prompt + completion, messages, alpaca, and sharegpt is needed "
        "(null unsets an inherited one)"
    ]


def test_form_conflicts_are_reported_with_other_errors(tmp_path: Path) -> None:
    text = SMALLEST.replace("  path_or_name: some/data\n", "  text_field: a\n  messages: b\n  packing: 1\n")
    lines = refused(tmp_path, text)
    assert [line.partition(": ")[0] for line in lines] == ["recipe.yaml:3", "recipe.yaml:5", "recipe.yaml:6"]


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ("adapter: {init: weighted}", "adapter.init: weighted needs the activations that a calibration sees: give calibration.method"),
        ("adapter: {budget_mb: 5, rank_pattern: {q_proj: 2}}", "adapter.budget_mb: budget_mb and rank_pattern exclude each other: one chooses the ranks, one gives them"),
        ("calibration: {method: block}\nquantization: {gain: auto}", "quantization.gain: a calibration fits the scales to activations: a gain goes with method none"),
        ("calibration: {method: block}\nquantization: {axis: 0}", "calibration.method: needs groups along the input: quantization.axis must be 1"),
        ("recovery: {scales: bake}\nquantization: {axis: 0}", "recovery.scales: needs groups along the input: quantization.axis must be 1"),
        ("recovery: {scales: bake}\nadapter: {use_dora: true}", "adapter.use_dora: DoRA takes its magnitudes from frozen scales: recovery.scales must not be bake"),
        ("recovery: {loss: kd, teacher: cache}", "recovery.teacher: a teacher's cache holds no hidden states: hidden_weight must be 0"),
    ],
)  # fmt: skip
def test_levers_that_exclude_each_other(tmp_path: Path, sections: str, line: str) -> None:
    (found,) = refused(tmp_path, f"{SMALLEST}{sections}\n")
    assert found.split(": ", 1)[1] == line


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "data.streaming: a stream has no length to count epochs by: give training.max_steps"),
        (["training={max_steps: -1}"], "data.streaming: a stream has no length to count epochs by: give training.max_steps"),
        (["training={max_steps: 9, save_strategy: epoch}"], "training.save_strategy: a stream (data.streaming) has no epochs: use steps"),
        (["training={max_steps: 9}", "recovery={loss: kd, teacher: cache, hidden_weight: 0}"], "recovery.teacher: a cache keeps the targets of every row, and a stream (data.streaming) has no set of rows: use online or 8bit"),
    ],
)  # fmt: skip
def test_what_a_stream_cannot(tmp_path: Path, overrides: list[str], line: str) -> None:
    path = write(tmp_path, SMALLEST)
    with pytest.raises(UserError) as caught:
        load_recipe(path, ["data.streaming=true", *overrides])
    assert str(caught.value).split(": ", 1)[1] == line
    assert load_recipe(path, ["data.streaming=true", "training={max_steps: 9}"]).data.streaming


def test_only_a_stream_depends_on_its_buffer_and_its_workers(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST)

    def digest(*overrides: str) -> str:
        return recipe_digest(load_recipe(path, ["training={max_steps: 9}", *overrides]))

    workers, buffer = "training.dataloader_num_workers=2", "data.shuffle_buffer=5"
    streaming = "data.streaming=true"
    assert digest() == digest(workers) == digest(buffer) == digest("data.masked_rows=drop")
    assert len({digest(), digest(streaming), digest(streaming, buffer), digest(streaming, workers)}) == 4
    assert digest(streaming) == digest(streaming, "data.masked_rows=drop")


def test_alpha_is_twice_the_rank(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, f"{SMALLEST}adapter: {{r: 6}}\n")).adapter.alpha == 12
    assert load_recipe(write(tmp_path, f"{SMALLEST}adapter: {{r: 6, lora_alpha: 3}}\n")).adapter.alpha == 3


def test_gain_auto(tmp_path: Path) -> None:
    quantization = load_recipe(write(tmp_path, f"{SMALLEST}quantization: {{gain: auto}}\n")).quantization
    assert quantization.gain == "auto"
    assert quantization.plan(0.25).solver.gain == 0.25


def test_misplaced_keys_at_the_top(tmp_path: Path) -> None:
    assert refused(tmp_path, SMALLEST + "nbits: 2\nlearning_rate: 1e-4\n") == [
        "recipe.yaml:6: nbits: unknown key here; did you mean quantization.nbits?",
        "recipe.yaml:7: learning_rate: unknown key (allowed: model, quantization, calibration, adapter, data, recovery, training, evaluation, "
        "tracking, output_dir, seed, extends); fields of trl.SFTConfig go under training",
    ]


# Comparing -----------------------------------------------------------------------------------------------------------


def loaded(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(write(folder, FULL), overrides)


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=elsewhere", "tracking.report_to=none", "evaluation.parent=false", "evaluation.prompts=[]",
        "quantization.save_to=null", "training.logging_steps=7", "training.save_steps=7", "training.save_strategy=best",
        "training.eval_strategy=no", "training.eval_steps=7", "training.disable_tqdm=true",
        "training.dataloader_num_workers=2", "training.gradient_checkpointing=true", "training.num_train_epochs=3.0",
        "adapter.lora_dropout=0.0",
    ],
)  # fmt: skip
def test_digest_ignores_what_changes_no_weight(tmp_path: Path, override: str) -> None:
    old, new = loaded(tmp_path), loaded(tmp_path, override)
    assert recipe_digest(old) == recipe_digest(new)
    assert differences(to_dict(old), to_dict(new)) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.learning_rate=2e-4", "training.learning_rate: 0.0001 -> 0.0002"),
        ("training.max_steps=10", "training.max_steps: not set -> 10"),
        ("training.lr_scheduler_kwargs={min_lr: 1}", "training.lr_scheduler_kwargs.min_lr: 1e-05 -> 1"),
        ("training.bf16=true", "training.bf16: null -> true"),
        ("model.name_or_path=n", "model.name_or_path: 'm' -> 'n'"),
        ("adapter.target_modules=[q_proj]", "adapter.target_modules: ['q_proj', 'v_proj'] -> ['q_proj']"),
        ("data.max_length=9", "data.max_length: 8 -> 9"),
        ("seed=1", "seed: 16 -> 1"),
        ("quantization.nbits=2", "quantization.nbits: 1 -> 2"),
        ("quantization.metadata_bits=16", "quantization.metadata_bits: 8 -> 16"),
        ("quantization.overrides.new.nbits=2", "quantization.overrides.new: not set -> {'nbits': 2}"),
        (
            "quantization.overrides={0: {axis: 1}, '*.down_proj': {nbits: 4, group_size: 32}, model.embed_tokens: {nbits: 8}}",
            "quantization.overrides: the order ['*.down_proj', 'model.embed_tokens', '0'] -> ['0', '*.down_proj', 'model.embed_tokens']",
        ),
    ],
)  # fmt: skip
def test_digest_tells_runs_apart(tmp_path: Path, override: str, line: str) -> None:
    old, new = loaded(tmp_path), loaded(tmp_path, override)
    assert recipe_digest(old) != recipe_digest(new)
    # As it is compared in practice: the old one was kept in a JSON file.
    assert differences(json.loads(json.dumps(to_dict(old))), to_dict(new)) == [line]


def test_digest_is_the_same_everywhere(tmp_path: Path) -> None:
    # Checkpoints of earlier runs carry it: a change here makes them all belong to another recipe.
    recipe = load_recipe(write(tmp_path, SMALLEST))
    assert recipe_digest(recipe)[:10] == "ac8770789d"
    assert len(identity(to_dict(recipe))) == 8
