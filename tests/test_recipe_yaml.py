"""Recipes as YAML: what is read from files and the command line, and the lines that refusals point to."""

# ruff: noqa: E501 (refusals are quoted whole)

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hqqplus.errors import UserError
from hqqplus.recipe import TRACKERS, Recipe, load_recipe, recipe_digest, to_dict
from tests.recipes import SMALLEST, refusal, refused, with_section, write

# What is read --------------------------------------------------------------------------------------------------------


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
        (b"[" * 5000, "recipe.yaml:1: too much for a recipe: it is nested deeper than 32 levels"),
        (b"a: 1\nb: " + b"[[" * 16 + b"]]" * 16, "recipe.yaml:2: too much for a recipe: it is nested deeper than 32 levels"),
        (b"a:\n" + b"- 1\n" * 50_000, "recipe.yaml:49999: too much for a recipe: it has more than 50,000 values"),
        (b"#" * (2**20 + 1), "recipe.yaml: not a recipe: it is larger than 1 MiB"),
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


# How refusals are written --------------------------------------------------------------------------------------------


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
        ("seed=4294967296", "seed: 4294967296 is out of range: at most 4294967295 is needed"),
        ("a." * 32 + "a=1", "a." * 32 + "a: nested deeper than 32 levels"),
        ("training.max_steps", "'training.max_steps' is not of the form key=value (training.max_steps=10)"),
        ("=1", "'=1' is not of the form key=value (training.max_steps=10)"),
        ("training.=1", "'training.=1' is not of the form key=value (training.max_steps=10)"),
        ("model.name_or_path.x=1", "model.name_or_path.x: model.name_or_path is 'some/model', not a mapping"),
        ("extends=x.yaml", "extends: belongs in a recipe file"),
        ("evaluation.texts={a: b, a: c}", "evaluation.texts: a: given twice"),
        ("nonsense.x=1", "nonsense: unknown key (allowed: model, quantization, calibration, adapter, data, recovery, training, evaluation, tracking, output_dir, seed, extends); fields of trl.SFTConfig go under training"),
        ("seed=", "seed: nothing is given; an integer is needed"),
    ],
)  # fmt: skip
def test_refused_overrides(tmp_path: Path, override: str, line: str) -> None:
    assert refused(tmp_path, SMALLEST, override) == [f"command line: {line}"]


def test_a_file_and_the_command_line_are_refused_together(tmp_path: Path) -> None:
    assert refused(tmp_path, SMALLEST + "seed: -1\nadapter: {r: 0}\n", "adapter.r=-3", "adapter.s=1") == [
        "recipe.yaml:6: seed: -1 is out of range: at least 0 is needed",
        "command line: adapter.r: -3 is out of range: at least 1 is needed",
        "command line: adapter.s: unknown key (allowed: r, lora_alpha, lora_dropout, target_modules, init, "
        "rank_pattern, budget_mb, use_dora, use_rslora)",
    ]


# Properties ----------------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
specs = st.fixed_dictionaries(
    {},
    optional={
        "nbits": st.sampled_from([1, 2, 3, 4, 8]),
        "group_size": st.one_of(st.just(-1), st.integers(1, 32).map(lambda n: 8 * n)),
        "axis": st.sampled_from([0, 1]),
        "metadata_dtype": st.sampled_from(["float16", "bfloat16"]),
        "metadata_bits": st.sampled_from([8, 16]),
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
    seed=st.integers(0, 2**32 - 1),
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
