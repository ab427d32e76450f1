"""Recipes: what is read, what is refused, and where the refusal points."""

# ruff: noqa: E501 (refusals are quoted whole)

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hqqplus.errors import UserError
from hqqplus.integrations import sft_fields
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

SMALLEST = """\
model:
  name_or_path: some/model
data:
  path_or_name: some/data
output_dir: runs/x
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> list[str]:
    """The lines of the refusal, with the folder of the files left out."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def refused(folder: Path, text: str, *overrides: str) -> list[str]:
    return refusal(write(folder, text), *overrides)


def with_section(section: str, line: str) -> str:
    """The smallest recipe with one more line in a section; that line is line 7, or 3 and 5 in model and data."""
    if f"{section}:\n" in SMALLEST:
        return SMALLEST.replace(f"{section}:\n", f"{section}:\n  {line}\n")
    return f"{SMALLEST}{section}:\n  {line}\n"


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
            "group_size": 64,
            "axis": 1,
            "metadata_dtype": "float16",
            "overrides": {},
            "skip": [],
            "save_to": None,
        },
        "adapter": {
            "r": 16,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
            "init": "residual",
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
            "max_length": 1024,
            "packing": False,
            "eos": True,
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
  overrides:
    "*.down_proj": {nbits: 4, group_size: 32}
    model.embed_tokens: {nbits: 8}
    0: {axis: 1}
  skip: [lm_head, "*.layers.0.*"]
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
    assert plan.default == QuantSpec(nbits=1, group_size=-1, axis=0, metadata_dtype="bfloat16")
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


def test_bom_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALLEST.replace("\n", "\r\n").encode())
    assert load_recipe(path).output_dir == "runs/x"
    path.write_bytes(b"\xef\xbb\xbf" + (SMALLEST + "sed: 1\n").replace("\n", "\r\n").encode())
    assert refusal(path)[0].startswith("recipe.yaml:6: sed: unknown key; did you mean seed?")


def test_anchors_are_read(tmp_path: Path) -> None:
    text = SMALLEST + "quantization:\n  overrides: {lm_head: &eight {nbits: 8}, embed_tokens: *eight}\n"
    overrides = load_recipe(write(tmp_path, text)).quantization.overrides
    assert to_dict_of(overrides) == {"lm_head": {"nbits": 8}, "embed_tokens": {"nbits": 8}}


def to_dict_of(value: Any) -> Any:
    return {name: to_dict_of(inner) for name, inner in value.items()} if isinstance(value, Mapping) else value


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


# Scalars -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("1.5e3", 1500.0), ("5E+3", 5000.0), ("-1e-4", -1e-4), (".5", 0.5), ("1.", 1.0),
        ("1", 1), ("-1", -1), ("+3", 3), ("010", 10), ("0o10", 8), ("0x1F", 31),
        ("true", True), ("False", False), ("TRUE", True),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("Off", "Off"), ("y", "y"), ("tRue", "tRue"),
        ("1:30", "1:30"), ("1_000", "1_000"), ("2001-01-01", "2001-01-01"), ("1e", "1e"), ("e5", "e5"), ("0b1", "0b1"),
        ("'1e-4'", "1e-4"), ('"true"', "true"), ("!!str 12", "12"), ("!!float 12", 12.0), ("=", "="),
        ("null", None), ("~", None), ("", None), ("''", ""), ("nothing", "nothing"),
        (".inf", math.inf), ("-.INF", -math.inf), ("|\n  a\n  b", "a\nb\n"),
    ],
)  # fmt: skip
def test_scalars(tmp_path: Path, written: str, value: Any) -> None:
    from hqqplus.recipe_yaml import read

    document = read(write(tmp_path, f"key: {written}\n"))
    assert document.problems == []
    assert document.values == {"key": value}
    assert type(document.values["key"]) is type(value)


def test_nan(tmp_path: Path) -> None:
    from hqqplus.recipe_yaml import read

    assert math.isnan(read(write(tmp_path, "key: .nan\n")).values["key"])


@given(
    st.from_regex(r"[-+]?([0-9]{1,5}(\.[0-9]{0,5})?|\.[0-9]{1,5})[eE][-+]?[0-9]{1,2}", fullmatch=True).filter(
        str.isascii
    )
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_scientific_numbers_are_floats(tmp_path: Path, written: str) -> None:
    from hqqplus.recipe_yaml import read

    value = read(write(tmp_path, f"key: {written}\n")).values["key"]
    assert type(value) is float
    assert value == float(written)


# Files that are no recipes -------------------------------------------------------------------------------------------


def test_no_such_file(tmp_path: Path) -> None:
    write(tmp_path, SMALLEST, "llama_1bit.yaml")
    assert refusal(tmp_path / "llama_1bits.yaml") == ["llama_1bits.yaml: no such file; did you mean llama_1bit.yaml?"]
    assert refusal(tmp_path / "zzz.yaml") == ["zzz.yaml: no such file"]
    with pytest.raises(UserError, match=r"^/nowhere/at/all\.yaml: no such file$"):
        load_recipe("/nowhere/at/all.yaml")


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    assert refusal(tmp_path / "folder.yaml") == ["folder.yaml: a folder; a YAML file is needed"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"\xff\xfe\x00\x01", "recipe.yaml: not a YAML file: it is not text in UTF-8"),
        (b"a: 1\nb: \x00\n", r"recipe.yaml:2: not valid YAML: the character '\x00' is not allowed"),
        (b"", "recipe.yaml: empty; a recipe is a mapping of sections, and model, data and output_dir are required"),
        (b"# nothing\n", "recipe.yaml: empty; a recipe is a mapping of sections, and model, data and output_dir are required"),
        (b"\n- a\n- b\n", "recipe.yaml:2: ['a', 'b'] is a list; a mapping of sections is needed"),
        (b"hello\n", "recipe.yaml:1: 'hello' is a string; a mapping of sections is needed"),
        (b"~\n", "recipe.yaml:1: nothing is given; a mapping of sections is needed"),
        (b"model:\n  a: [1, 2\ndata: 3\n", "recipe.yaml:3: not valid YAML: expected ',' or ']', but got ':' while parsing a flow sequence"),
        (b"model:\n\ta: 1\n", "recipe.yaml:2: not valid YAML: found character '\\t' that cannot start any token while scanning for the next token"),
        (b"a: 1\n---\nb: 2\n", "recipe.yaml:2: not valid YAML: but found another document expected a single document in the stream"),
        (b"a: *b\n", "recipe.yaml:1: not valid YAML: found undefined alias 'b'"),
        (b"[" * 5000, "recipe.yaml: not a recipe: it is nested too deeply"),
    ],
)  # fmt: skip
def test_not_a_recipe(tmp_path: Path, content: bytes, line: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert refusal(path) == [line]


def test_an_unreadable_file_hides_no_mistake_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"a: [")
    lines = refusal(path, "adapter.r=0")
    assert lines[0].startswith("recipe.yaml:1: not valid YAML:")
    assert lines[1:] == ["command line: adapter.r: 0 is out of range: at least 1 is needed"]


def test_duplicate_keys(tmp_path: Path) -> None:
    text = SMALLEST + "seed: 1\nadapter:\n  r: 4\n  init: default\n  r: 8\nseed: 1\nmodel:\n  dtype: auto\n"
    assert refused(tmp_path, text) == [
        "recipe.yaml:10: adapter.r: given twice (first on line 8)",
        "recipe.yaml:11: seed: given twice (first on line 6)",
        "recipe.yaml:12: model: given twice (first on line 1)",
    ]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("output_dir: !!python/object/apply:os.system [ls]", "output_dir: the tag !!python/object/apply:os.system is not read"),
        ("output_dir: !secret x", "output_dir: 'x' cannot be read as !secret"),
        ("output_dir: !!bool yes", "output_dir: 'yes' cannot be read as !!bool"),
        ("output_dir: !!int 1.5", "output_dir: '1.5' cannot be read as !!int"),
        ("output_dir: &loop [*loop]", "output_dir[0]: an alias that contains itself"),
        ("output_dir: {? [a] : 1}", "output_dir: a key that is a list or a mapping; a name is needed"),
    ],
)  # fmt: skip
def test_yaml_that_is_not_read(tmp_path: Path, line: str, what: str) -> None:
    lines = refused(tmp_path, SMALLEST.replace("output_dir: runs/x", line))
    assert f"recipe.yaml:5: {what}" in lines
    assert len(lines) <= 2


def test_merge_keys_are_not_read(tmp_path: Path) -> None:
    text = SMALLEST + "adapter: &a\n  r: 4\nquantization:\n  overrides:\n    <<: *a\n"
    assert refused(tmp_path, text) == [
        "recipe.yaml:10: quantization.overrides: YAML's merge keys (<<) are not read; `extends` is"
    ]


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
        'recipe.yaml:10: quantization.overrides["model.embed_tokens"].group_sise: unknown key; did you mean group_size? (allowed: nbits, group_size, axis, metadata_dtype)',
        'recipe.yaml:12: quantization.overrides["*.down"].nbits: 4.0 is a float; an integer is needed',
        'recipe.yaml:13: quantization.overrides["*.down"].axis: 2 is not allowed: it must be 0 or 1',
        "recipe.yaml:14: quantization.skip: 'lm_head' is a string; a list is needed",
        "recipe.yaml:16: adapter.r: 0 is out of range: at least 1 is needed",
        "recipe.yaml:17: adapter.lora_dropout: 1 is out of range: less than 1 is needed",
        "recipe.yaml:18: adapter.target_modules[1]: 3 is an integer; a string is needed, so put it in quotes",
        "recipe.yaml:19: adapter.init: 'residul' is not one of default, residual; did you mean residual?",
        "recipe.yaml:22: data.max_length: 7 is out of range: at least 8 is needed",
        "recipe.yaml:25: training.max_steps: 1.5 is a float; an integer is needed",
        "recipe.yaml:30: evaluation.prompts[1]: 2 is an integer; a string is needed, so put it in quotes",
        "recipe.yaml:31: tracking: 'wandb' is a string; a mapping is needed",
        "recipe.yaml:32: outputdir: unknown key; did you mean output_dir? (allowed: model, quantization, adapter, data, training, evaluation, tracking, output_dir, seed, extends); fields of trl.SFTConfig go under training",
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
        ("quantization", "overrides: [lm_head]", "overrides: ['lm_head'] is a list; a mapping of name patterns to the fields that differ there is needed"),
        ("quantization", "overrides: {lm_head: 8}", "overrides.lm_head: 8 is an integer; a mapping of nbits, group_size, axis, metadata_dtype is needed"),
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
        ("adapter", "init: pissa", "init: 'pissa' is not one of default, residual"),
        ("adapter", "init: 1", "init: 1 is not one of default, residual"),
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
        f"recipe.yaml:3: {line}; exactly one of text_field, prompt + completion, and messages is needed "
        "(null unsets an inherited one)"
    ]


def test_form_conflicts_are_reported_with_other_errors(tmp_path: Path) -> None:
    text = SMALLEST.replace("  path_or_name: some/data\n", "  text_field: a\n  messages: b\n  packing: 1\n")
    lines = refused(tmp_path, text)
    assert [line.partition(": ")[0] for line in lines] == ["recipe.yaml:3", "recipe.yaml:5", "recipe.yaml:6"]


def test_misplaced_keys_at_the_top(tmp_path: Path) -> None:
    assert refused(tmp_path, SMALLEST + "nbits: 2\nlearning_rate: 1e-4\n") == [
        "recipe.yaml:6: nbits: unknown key here; did you mean quantization.nbits?",
        "recipe.yaml:7: learning_rate: unknown key (allowed: model, quantization, adapter, data, training, evaluation, "
        "tracking, output_dir, seed, extends); fields of trl.SFTConfig go under training",
    ]


def test_a_problem_is_one_line_whatever_the_keys_are(tmp_path: Path) -> None:
    text = (
        SMALLEST
        + r"""quantization:
  overrides:
    "a\nb\x85": {nbits: 9}
    "\u2028": 3
"\r": 1
"""
    )
    assert [line.split(": ")[:2] for line in refused(tmp_path, text)] == [
        ["recipe.yaml:8", r'quantization.overrides["a\nb\x85"].nbits'],
        ["recipe.yaml:9", r'quantization.overrides["\u2028"]'],
        ["recipe.yaml:10", r'["\r"]'],
    ]


def test_long_values_are_shortened(tmp_path: Path) -> None:
    [line] = refused(tmp_path, with_section("adapter", f"init: {'x' * 1000}"))
    assert len(line) < 150


# The training section ------------------------------------------------------------------------------------------------


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


# extends -------------------------------------------------------------------------------------------------------------


def test_extends(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    write(tmp_path / "bases", "seed: 1\nadapter: {r: 4, lora_alpha: 8}\noutput_dir: base\n", "far.yaml")
    middle = "extends: far.yaml\nmodel: {name_or_path: m}\nadapter: {r: 8}\nevaluation: {prompts: [a, b]}\n"
    write(tmp_path / "bases", middle, "middle.yaml")
    child = "data: {path_or_name: d}\nevaluation: {prompts: [c]}\noutput_dir: child\nextends: bases/middle.yaml\nadapter:\n"
    recipe = load_recipe(write(tmp_path, child))
    assert (recipe.seed, recipe.adapter.r, recipe.adapter.lora_alpha) == (1, 8, 8)
    assert recipe.output_dir == "child"
    assert recipe.evaluation.prompts == ("c",)


def test_extends_merges_overrides_and_the_childs_patterns_win(tmp_path: Path) -> None:
    base = SMALLEST + "quantization: {overrides: {a: {nbits: 8, group_size: 32}, '*': {nbits: 4}}}\n"
    write(tmp_path, base, "base.yaml")
    recipe = load_recipe(write(tmp_path, "extends: base.yaml\nquantization: {overrides: {a: {nbits: 1}}}\n"))
    assert list(recipe.quantization.overrides) == ["*", "a"]
    assert to_dict(recipe)["quantization"]["overrides"]["a"] == {"nbits": 1, "group_size": 32}


def test_extends_null_unsets_what_is_inherited(tmp_path: Path) -> None:
    write(
        tmp_path, SMALLEST.replace("data:\n", "data:\n  text_field: t\n") + "evaluation: {prompts: [a]}\n", "base.yaml"
    )
    text = "extends: base.yaml\ndata: {text_field: null, messages: m}\nevaluation: {prompts: null}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.data.text_field, recipe.data.messages) == (None, "m")
    assert recipe.evaluation.prompts == ()


def test_errors_point_to_the_file_that_set_the_value(tmp_path: Path) -> None:
    base = "model:\n  name_or_path: 1\nadapter:\n  r: 0\n  lora_dropout: 2\nevaluation:\n  texts: {a: 1}\nsed: 1\n"
    write(tmp_path, base, "base.yaml")
    child = "extends: base.yaml\nadapter:\n  r: -1\n\ndata: {}\nevaluation:\n  texts:\n    b: 2\n"
    lines = refused(tmp_path, child, "data.path_or_name=[a]")
    assert [line.partition(": ")[0] + " " + line.split(": ")[1] for line in lines] == [
        "base.yaml:2 model.name_or_path",
        "base.yaml:5 adapter.lora_dropout",
        "base.yaml:7 evaluation.texts.a",
        "base.yaml:8 sed",
        "recipe.yaml:1 output_dir",
        "recipe.yaml:3 adapter.r",
        "recipe.yaml:8 evaluation.texts.b",
        "command line data.path_or_name",
    ]


def test_errors_inside_a_base_are_reported(tmp_path: Path) -> None:
    write(tmp_path, "a: [1\n", "broken.yaml")
    lines = refused(tmp_path, "extends: broken.yaml\nseed: -1\n")
    assert lines[0].startswith("broken.yaml:2: not valid YAML:")
    # What the broken file may have said is not called missing.
    assert lines[1:] == ["recipe.yaml:2: seed: -1 is out of range: at least 0 is needed"]


def test_extends_refusals(tmp_path: Path) -> None:
    write(tmp_path, SMALLEST, "llama.yaml")
    [line] = refused(tmp_path, SMALLEST + "extends: lama.yaml\n")
    assert line == "recipe.yaml:6: extends: lama.yaml: no such file; did you mean llama.yaml?"
    [line] = refused(tmp_path, "extends: [llama.yaml]\n")
    assert line.startswith("recipe.yaml:1: extends: ['llama.yaml'] is a list; the path of another recipe")
    [line] = refused(tmp_path, "\nextends:\n")
    assert line.startswith("recipe.yaml:2: extends: nothing is given; the path of another recipe")


def test_extends_cycles(tmp_path: Path) -> None:
    [line] = refused(tmp_path, "extends: recipe.yaml\n")
    assert line == "recipe.yaml:1: extends: a recipe cannot extend itself: recipe.yaml -> recipe.yaml"
    write(tmp_path, "\nextends: ./b.yaml\n", "a.yaml")
    write(tmp_path, "extends: recipe.yaml\n", "b.yaml")
    [line] = refused(tmp_path, "extends: a.yaml\n")
    assert line == "b.yaml:1: extends: a recipe cannot extend itself: recipe.yaml -> a.yaml -> b.yaml -> recipe.yaml"


# The command line ----------------------------------------------------------------------------------------------------


def test_overrides(tmp_path: Path) -> None:
    overrides = [
        "adapter.init=default",
        "adapter.r = 4",
        "training.learning_rate=1e-4",
        "training.save_strategy=no",
        "quantization.overrides={model.embed_tokens: {nbits: 8}}",
        "evaluation.prompts=[a, 'b=c']",
        "evaluation.prompts=[d]",
        "tracking.project=",
        "model.name_or_path=embedded:pydoc",
        "quantization.overrides.lm_head.nbits=4",
    ]
    recipe = load_recipe(write(tmp_path, SMALLEST + "tracking: {project: p}\nadapter:\n"), overrides)
    assert (recipe.adapter.init, recipe.adapter.r) == ("default", 4)
    assert dict(recipe.training) == {"learning_rate": 1e-4, "save_strategy": "no"}
    assert to_dict(recipe)["quantization"]["overrides"] == {
        "model.embed_tokens": {"nbits": 8},
        "lm_head": {"nbits": 4},
    }
    assert recipe.evaluation.prompts == ("d",)
    assert recipe.tracking.project is None
    assert recipe.model.name_or_path == "embedded:pydoc"


def test_an_override_replaces_a_mapping(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "quantization: {overrides: {a: {nbits: 77}}}\n")
    assert load_recipe(path, ["quantization.overrides={}"]).quantization.overrides == {}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.max_step=10", "training.max_step: unknown key; did you mean max_steps? (allowed: the fields of trl.SFTConfig)"),
        ("training.max_steps=1.5", "training.max_steps: 1.5 is a float; an integer is needed"),
        ("quantization.overrides={a.b: {nbits: 7}}", 'quantization.overrides["a.b"].nbits: 7 is not allowed: it must be one of 1, 2, 3, 4, 8'),
        ("adapter.r={a", "adapter.r: not valid YAML: expected ',' or '}', but got '<stream end>' while parsing a flow mapping"),
        ("adapter.r=\x00", r"adapter.r: not valid YAML: the character '\x00' is not allowed"),
        ("seed=!!int x", "seed: 'x' cannot be read as !!int"),
        ("training.max_steps", "'training.max_steps' is not of the form key=value (training.max_steps=10)"),
        ("=1", "'=1' is not of the form key=value (training.max_steps=10)"),
        ("training.=1", "'training.=1' is not of the form key=value (training.max_steps=10)"),
        ("model.name_or_path.x=1", "model.name_or_path.x: model.name_or_path is 'some/model', not a mapping"),
        ("extends=x.yaml", "extends: belongs in a recipe file"),
        ("evaluation.texts={a: b, a: c}", "evaluation.texts: a: given twice"),
        ("nonsense.x=1", "nonsense: unknown key (allowed: model, quantization, adapter, data, training, evaluation, tracking, output_dir, seed, extends); fields of trl.SFTConfig go under training"),
        ("seed=", "seed: nothing is given; an integer is needed"),
    ],
)  # fmt: skip
def test_refused_overrides(tmp_path: Path, override: str, line: str) -> None:
    assert refused(tmp_path, SMALLEST, override) == [f"command line: {line}"]


def test_a_file_and_the_command_line_are_refused_together(tmp_path: Path) -> None:
    assert refused(tmp_path, SMALLEST + "seed: -1\nadapter: {r: 0}\n", "adapter.r=-3", "adapter.s=1") == [
        "recipe.yaml:6: seed: -1 is out of range: at least 0 is needed",
        "command line: adapter.r: -3 is out of range: at least 1 is needed",
        "command line: adapter.s: unknown key (allowed: r, lora_alpha, lora_dropout, target_modules, init, use_dora, "
        "use_rslora)",
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
    assert recipe_digest(recipe)[:10] == "15ac5fcc39"
    assert len(identity(to_dict(recipe))) == 6


# Properties ----------------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
specs = st.fixed_dictionaries(
    {},
    optional={
        "nbits": st.sampled_from([1, 2, 3, 4, 8]),
        "group_size": st.one_of(st.just(-1), st.integers(1, 32).map(lambda n: 8 * n)),
        "axis": st.sampled_from([0, 1]),
        "metadata_dtype": st.sampled_from(["float16", "bfloat16"]),
    },
)
numbers = st.floats(1e-9, 1e9)
forms = st.one_of(
    st.just({}),
    words.map(lambda name: {"text_field": name}),
    st.tuples(words, words).map(lambda names: {"prompt": names[0], "completion": names[1]}),
    words.map(lambda name: {"messages": name}),
)


def section(required: dict[str, Any] | None = None, **optional: Any) -> Any:
    return st.fixed_dictionaries(required or {}, optional=optional)


recipes = section(
    {
        "model": section(
            {"name_or_path": words},
            revision=st.none() | words,
            dtype=st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
            trust_remote_code=st.booleans(),
        ),
        "data": st.builds(
            lambda fields, form: {**fields, **form},
            section(
                {"path_or_name": words}, split=words, eval_split=words, max_length=st.integers(8), eos=st.booleans()
            ),
            forms,
        ),
        "output_dir": words,
    },
    quantization=st.builds(
        lambda fields, spec: {**fields, **spec},
        section(overrides=st.dictionaries(words.filter(lambda name: name != "<<"), specs), skip=st.lists(words)),
        specs,
    ),
    adapter=section(
        r=st.integers(1, 512),
        lora_alpha=st.integers(1, 512) | numbers,
        lora_dropout=st.floats(0, 0.99),
        target_modules=words | st.lists(words, min_size=1),
        init=st.sampled_from(["default", "residual"]),
        use_dora=st.booleans(),
    ),
    training=section(
        learning_rate=numbers,
        max_steps=st.integers(1),
        warmup_steps=st.floats(0, 1) | st.integers(0, 100),
        optim=st.sampled_from(["paged_adamw_8bit", "adamw_torch", "sgd"]),
        save_strategy=st.sampled_from(["no", "steps", "epoch"]),
        bf16=st.none() | st.booleans(),
        lr_scheduler_kwargs=st.none() | st.dictionaries(words, numbers),
        label_names=st.none() | st.lists(words),
    ),
    evaluation=section(
        texts=st.dictionaries(words, words),
        max_tokens=st.none() | st.integers(2),
        prompts=st.lists(words),
        parent=st.booleans(),
    ),
    tracking=section(
        report_to=st.sampled_from(TRACKERS) | st.lists(st.sampled_from(TRACKERS[1:]), min_size=1),
        project=st.none() | words,
        mode=st.sampled_from(["online", "offline", "disabled", None]),
    ),
    seed=st.integers(0),
)


class _Dumper(yaml.SafeDumper):
    """Quotes every string, since PyYAML takes `1e-4` for a word, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def dumped(values: dict[str, Any]) -> str:
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, width=10**9, default_flow_style=False, allow_unicode=True
    )


def contains(whole: Any, part: Any) -> bool:
    if isinstance(part, dict):
        return part.keys() <= whole.keys() and all(contains(whole[name], value) for name, value in part.items())
    return bool(whole == part) and isinstance(whole, bool) == isinstance(part, bool)


in_a_folder = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@given(values=recipes)
@in_a_folder
def test_round_trip_through_yaml(tmp_path: Path, values: dict[str, Any]) -> None:
    recipe = load_recipe(write(tmp_path, dumped(values)))
    assert contains(to_dict(recipe), values)
    again = load_recipe(write(tmp_path, dumped(to_dict(recipe))))
    assert again == recipe == Recipe.model_validate(json.loads(json.dumps(to_dict(recipe))))
    assert recipe_digest(again) == recipe_digest(recipe)
    assert list(again.quantization.overrides) == list(recipe.quantization.overrides)


@given(values=recipes, data=st.data())
@in_a_folder
def test_unknown_keys_are_reported_with_their_line(tmp_path: Path, values: dict[str, Any], data: Any) -> None:
    places: list[tuple[str, ...]] = [(), *((name,) for name, value in values.items() if isinstance(value, dict))]
    for pattern in values.get("quantization", {}).get("overrides", {}):
        places.append(("quantization", "overrides", pattern))
    place = data.draw(st.sampled_from(places))
    inside: Any = values
    for name in place:
        inside = inside[name]
    at = data.draw(st.integers(0, len(inside)))
    items = list(inside.items())
    inside.clear()
    inside.update([*items[:at], ("unheard_of", data.draw(st.none() | st.integers() | words)), *items[at:]])
    text = dumped(values)
    # `splitlines` would also split at characters that end no line of a YAML file.
    [number] = [i for i, line in enumerate(text.split("\n"), start=1) if '"unheard_of":' in line]
    lines = refused(tmp_path, text)
    assert len(lines) == 1
    assert lines[0].startswith(f"recipe.yaml:{number}: ")
    assert "unheard_of: unknown key" in lines[0]
