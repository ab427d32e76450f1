"""Recipes: YAML files made into typed, frozen objects, or refused with everything that is wrong at once.

    recipe = load_recipe("recipes/llama3_8b_1bit.yaml", ["training.max_steps=10"])

Importing this module imports neither torch nor transformers; a recipe with a `training` section imports trl when it is
validated, because the fields of that section are those of the installed `trl.SFTConfig`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from hqqplus.errors import UserError
from hqqplus.recipe_yaml import Key, Problem, did_you_mean, dotted, not_one_of, read, shown, unknown, wrong_type

if TYPE_CHECKING:
    from hqqplus.quantization.spec import QuantPlan

__all__ = ["Recipe", "differences", "identity", "load_recipe", "recipe_digest", "to_dict"]

TRACKERS = (
    "none", "wandb", "tensorboard", "trackio", "mlflow", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub",
    "dvclive", "flyte", "kubeflow", "neptune", "swanlab",
)  # fmt: skip
"""What transformers can report to."""

SPEC_FIELDS = ("nbits", "group_size", "axis", "metadata_dtype", "metadata_bits")
SOLVER_FIELDS = ("lp_norm", "threshold", "gain", "thorough")
REQUIRED = "missing, and it is required"
EMPTY = "empty; a name is needed"
FORMS = "exactly one of text_field, prompt + completion, and messages"

# The types of the errors that already carry their final words.
_IN_WORDS, _MISSING = "recipe", "recipe_missing"


class FrozenMapping(Mapping[str, Any]):
    """A mapping that nobody can change, in the order in which it was written."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self._values = dict(values or {})

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


# Values --------------------------------------------------------------------------------------------------------------


def _refusal(problems: Iterable[tuple[Key, str]], value: Any) -> ValidationError:
    """Problems of one value, each with its place inside it, in the form that pydantic hands on."""
    lines = [
        InitErrorDetails(
            type=PydanticCustomError(_MISSING if what == REQUIRED else _IN_WORDS, "{what}", {"what": what}),
            loc=key,
            input=value,
        )
        for key, what in problems
    ]
    return ValidationError.from_exception_data("recipe", lines)


def _checked(problems: Callable[[Any], Iterable[tuple[Key, str]]], make: Callable[[Any], Any]) -> PlainValidator:
    """A validator that refuses a value with all `problems` that it has, and otherwise makes it into the field's."""

    def validate(value: Any) -> Any:
        found = list(problems(value))
        if found:
            raise _refusal(found, value)
        return make(value)

    return PlainValidator(validate)


def _spec_problem(name: str, value: Any) -> str | None:
    """Why `value` cannot be field `name` of a QuantSpec, or of SolverOptions."""
    needed: tuple[str, Any] = ("an integer", int)
    if name == "metadata_dtype":
        needed = ("a string", str)
    elif name == "thorough":
        return None if isinstance(value, bool) else wrong_type(value, "true or false")
    elif name in SOLVER_FIELDS:
        needed = ("a number", int | float)
    if not isinstance(value, needed[1]) or isinstance(value, bool):
        return wrong_type(value, needed[0])
    # Importing the spec imports torch, so only once there is something to check. It owns the rules.
    from hqqplus.quantization.spec import METADATA_DTYPES, QuantSpec, SolverOptions

    field: dict[str, Any] = {name: value}
    try:
        SolverOptions(**field) if name in SOLVER_FIELDS else QuantSpec(**field)
    except (ValueError, TypeError) as error:
        rule = str(error).removeprefix(f"{name} is {value!r}: ")
        return f"{shown(value)} is not allowed: {rule}{did_you_mean(value, METADATA_DTYPES)}"
    return None


def _spec_value(value: Any, info: ValidationInfo) -> Any:
    what = _spec_problem(str(info.field_name), value)
    if what:
        raise _refusal([((), what)], value)
    return value


def _override_problems(overrides: Any) -> Iterator[tuple[Key, str]]:
    if not isinstance(overrides, Mapping):
        yield (), wrong_type(overrides, "a mapping of name patterns to the fields that differ there")
        return
    for pattern, changes in overrides.items():
        if not isinstance(changes, Mapping):
            yield (pattern,), wrong_type(changes, f"a mapping of {', '.join(SPEC_FIELDS)}")
            continue
        for name, value in changes.items():
            what = _spec_problem(name, value) if name in SPEC_FIELDS else unknown(str(name), SPEC_FIELDS)
            if what:
                yield (pattern, name), what


def _training_problems(training: Any) -> Iterator[tuple[Key, str]]:
    if not isinstance(training, Mapping):
        yield (), wrong_type(training, "a mapping of fields of trl.SFTConfig")
    elif training:
        from hqqplus.integrations import sft_fields

        for name, value in training.items():
            what = sft_fields.problem(name, value)
            if what:
                yield (name,), what


def _text_problems(texts: Any) -> Iterator[tuple[Key, str]]:
    if not isinstance(texts, Mapping):
        yield (), wrong_type(texts, "a mapping of names to files or data sets")
        return
    for name, path in texts.items():
        if not isinstance(path, str):
            yield (name,), wrong_type(path, "a string, a file or the name of a data set,")
        elif not path:
            yield (name,), EMPTY


def _names_problems(value: Any) -> Iterator[tuple[Key, str]]:
    """For one name or a list of names."""
    needed = "a string" if isinstance(value, (list, tuple)) else "a string or a list of strings"
    names = list(_numbered(value))
    if not names:
        yield (), "empty; at least one name is needed"
    for place, name in names:
        if not isinstance(name, str):
            yield place, wrong_type(name, needed)
        elif not name:
            yield place, EMPTY


def _tracker_problems(value: Any) -> Iterator[tuple[Key, str]]:
    names = list(_numbered(value))
    wrong = list(_names_problems(value))
    wrong = wrong or [(place, not_one_of(name, TRACKERS)) for place, name in names if name not in TRACKERS]
    yield from wrong
    if not wrong and len(names) > 1 and "none" in value:
        yield (), f"{shown(value)} is contradictory: none stands alone"


def _numbered(value: Any) -> Iterator[tuple[Key, Any]]:
    """Each item of a list with its place, or the one value that stands where a list could."""
    if isinstance(value, (list, tuple)):
        yield from (((index,), item) for index, item in enumerate(value))
    else:
        yield (), value


def _frozen(value: Any) -> Any:
    """Mappings that cannot be changed, tuples for lists; all the way down."""
    if isinstance(value, Mapping):
        return FrozenMapping({name: _frozen(inner) for name, inner in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(inner) for inner in value)
    return value


def _alpha_problems(value: Any) -> Iterator[tuple[Key, str]]:
    # Written out, since a union of int and float would report each wrong value twice.
    infinite = isinstance(value, float) and not math.isfinite(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or infinite:
        yield (), wrong_type(value, "a number")
    elif value <= 0:
        yield (), f"{shown(value)} is out of range: more than 0 is needed"


# Null unsets what an extended recipe gives, and a heading with nothing under it is null too.
_null_is_empty = BeforeValidator(lambda value: {} if value is None else value)
_to_tuple = BeforeValidator(lambda value: tuple(value or ()) if value is None or isinstance(value, list) else value)
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], _to_tuple]
NameOrNames = Annotated[str | tuple[str, ...], _checked(_names_problems, _frozen)]
Texts = Annotated[Mapping[str, str], _checked(_text_problems, FrozenMapping), _null_is_empty]
Training = Annotated[Mapping[str, Any], _checked(_training_problems, FrozenMapping), _null_is_empty]
PatternFields = Annotated[Mapping[str, Mapping[str, Any]], _checked(_override_problems, _frozen), _null_is_empty]


# Sections ------------------------------------------------------------------------------------------------------------


class Section(BaseModel):
    """A part of a recipe: frozen, typed strictly, refusing what it does not know, and all of it at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def _cross_checks(cls, values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
        """What is wrong between fields. The fields themselves may be wrong too: expect anything in `values`."""
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(values, cls):
            return values
        if values is None:
            values = {}  # A heading with nothing under it.
        if not isinstance(values, Mapping):
            raise _refusal([((), wrong_type(values, "a mapping"))], values)
        problems = list(cls._cross_checks(values))
        try:
            section = handler(dict(values))
        except ValidationError as error:
            problems += [(details["loc"], _in_words(cls, details)) for details in error.errors(include_url=False)]
        if problems:
            raise _refusal(problems, values)
        return section


class Model(Section):
    """The pretrained model to start from."""

    name_or_path: Name
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False


class Quantization(Section):
    """How the backbone is packed; `QuantSpec`, `QuantPlan`, `SolverOptions` say what the fields mean and allow."""

    nbits: Annotated[int, BeforeValidator(_spec_value)] = 2
    group_size: Annotated[int, BeforeValidator(_spec_value)] = 32
    axis: Annotated[int, BeforeValidator(_spec_value)] = 1
    metadata_dtype: Annotated[str, BeforeValidator(_spec_value)] = "float16"
    metadata_bits: Annotated[int, BeforeValidator(_spec_value)] = 8
    overrides: PatternFields = FrozenMapping()
    skip: Names = ()
    lp_norm: Annotated[float, BeforeValidator(_spec_value)] = 2.0
    threshold: Annotated[float, BeforeValidator(_spec_value)] = 0.5
    gain: Annotated[float, BeforeValidator(_spec_value)] = 0.0
    thorough: Annotated[bool, BeforeValidator(_spec_value)] = False
    save_to: Name | None = None

    def plan(self) -> QuantPlan:
        """The plan that the quantizer takes. Imports torch."""
        from hqqplus.quantization.spec import QuantPlan, QuantSpec, SolverOptions

        overrides = {pattern: dict(changes) for pattern, changes in self.overrides.items()}
        spec = QuantSpec(**{name: getattr(self, name) for name in SPEC_FIELDS})
        solver = SolverOptions(**{name: getattr(self, name) for name in SOLVER_FIELDS})
        return QuantPlan(default=spec, overrides=overrides, skip=self.skip, solver=solver)


class Adapter(Section):
    """The LoRA adapter that is trained over the packed backbone; PEFT's own names."""

    r: Annotated[int, Field(ge=1)] = 16
    lora_alpha: Annotated[int | float, _checked(_alpha_problems, lambda value: value)] = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: NameOrNames = "all-linear"
    init: Literal["default", "residual"] = "residual"
    use_dora: bool = False
    use_rslora: bool = False


class Data(Section):
    """What is trained on. Exactly one form: a column of text, prompt and completion, or messages."""

    path_or_name: Name
    config_name: Name | None = None
    split: Name = "train"
    eval_path_or_name: Name | None = None
    eval_split: Name | None = None
    text_field: Name | None = None
    prompt: Name | None = None
    completion: Name | None = None
    messages: Name | None = None
    max_length: Annotated[int, Field(ge=8)] = 1024
    packing: bool = False
    eos: bool = True

    @classmethod
    def _cross_checks(cls, values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
        given = [name for name in ("text_field", "prompt", "completion", "messages") if values.get(name) is not None]
        pair = [name for name in given if name in ("prompt", "completion")]
        if len(pair) == 1:
            other = "completion" if pair == ["prompt"] else "prompt"
            yield tuple(pair), f"needs {other} too: prompt and completion are the two columns of one form"
        if len(given) - max(len(pair) - 1, 0) > 1:
            clash = f"{', '.join(given)} are given; {FORMS} is needed (null unsets an inherited one)"
            yield (given[-1],), clash

    @model_validator(mode="before")
    @classmethod
    def _text_is_the_default_form(cls, values: Any) -> Any:
        if all(values.get(name) is None for name in ("text_field", "prompt", "completion", "messages")):
            return {**values, "text_field": "text"}
        return values


class Evaluation(Section):
    """What the before/after report measures, besides the evaluation split of `data`."""

    texts: Texts = FrozenMapping()
    join: bool = False
    max_tokens: Annotated[int, Field(ge=2)] | None = 100_000
    prompts: Names = ()
    max_new_tokens: Annotated[int, Field(ge=1)] = 48
    parent: bool = True
    batch_size: Annotated[int, Field(ge=1)] = 8


class Tracking(Section):
    """Where the run is reported to."""

    report_to: Annotated[str | tuple[str, ...], _checked(_tracker_problems, _frozen)] = "none"
    project: str | None = None
    run: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None


class Recipe(Section):
    """A whole run: what to load, how to pack it, what to train on it, and where everything goes."""

    model: Model
    quantization: Quantization = Quantization()
    adapter: Adapter = Adapter()
    data: Data
    training: Training = FrozenMapping()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    output_dir: Name
    seed: Annotated[int, Field(ge=0)] = 0

    @classmethod
    def _cross_checks(cls, values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
        training = values.get("training")
        if not isinstance(training, Mapping):
            return
        if training.get("fp16") is True and training.get("bf16") is True:
            yield ("training", "fp16"), "fp16 and bf16 exclude each other"


SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "quantization": Quantization,
    "adapter": Adapter,
    "data": Data,
    "evaluation": Evaluation,
    "tracking": Tracking,
}


def _in_words(section: type[Section], error: ErrorDetails) -> str:
    """What pydantic found, in the words of a recipe's reader."""
    kind, value, limits = error["type"], error["input"], error.get("ctx", {})
    needed = {
        "int_type": "an integer",
        "int_from_float": "an integer",
        "float_type": "a number",
        "finite_number": "a number",
        "bool_type": "true or false",
        "string_type": "a string",
        "tuple_type": "a list",
    }
    if kind in (_IN_WORDS, _MISSING):
        return error["msg"]
    if kind == "missing":
        return REQUIRED
    if kind == "extra_forbidden":
        return _unknown(section, str(error["loc"][-1]))
    if kind == "literal_error":
        return not_one_of(value, _literals(section.model_fields[str(error["loc"][0])].annotation))
    if kind == "string_too_short":
        return EMPTY
    if kind in needed:
        return wrong_type(value, needed[kind])
    for limit, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        if limit in limits:
            return f"{shown(value)} is out of range: {words} {limits[limit]:g} is needed"
    return error["msg"]


def _literals(annotation: Any) -> list[Any]:
    args = get_args(annotation)
    return list(args) if get_origin(annotation) is Literal else [value for arg in args for value in _literals(arg)]


def _unknown(section: type[Section], name: str) -> str:
    owners = [title for title, other in SECTIONS.items() if other is not section and name in other.model_fields]
    fields = list(section.model_fields)
    if section is Recipe:
        fields.append("extends")
    if owners and not did_you_mean(name, fields):
        return f"unknown key here; did you mean {' or '.join(f'{owner}.{name}' for owner in owners)}?"
    # People bring flat files from TRL.
    return unknown(name, fields) + ("; fields of trl.SFTConfig go under training" if section is Recipe else "")


# Loading -------------------------------------------------------------------------------------------------------------


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a YAML file. `extends: other.yaml` at its top lays it over another one (relative to the file): mappings
            merge, anything else is replaced.
        overrides: `key=value` strings laid over the file, e.g. `training.max_steps=10`; the value is YAML. They
            replace what stands there, mappings too.

    Raises:
        UserError: with everything that is wrong, a line each: `recipe.yaml:14: training.optim: ...`.
    """
    document = read(path, overrides)
    problems = list(document.problems)
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            key = details["loc"]
            # No second complaint about what could not even be read.
            if key not in document.unread and not (details["type"] == _MISSING and () in document.unread):
                problems.append(Problem(document.position(key), dotted(key), details["msg"]))
    if problems:
        raise UserError("\n".join(dict.fromkeys(str(problem) for problem in sorted(problems))))
    return recipe


# Comparing -----------------------------------------------------------------------------------------------------------

WITHOUT_EFFECT = (
    "logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "disable_tqdm", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataset_num_proc",
    "per_device_eval_batch_size", "skip_memory_metrics", "include_num_input_tokens_seen", "trackio_",
    "gradient_checkpointing", "activation_checkpointing", "activation_offloading",
)  # fmt: skip
"""How the names of those training fields begin that leave the trained weights as they are."""


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as JSON has it, defaults included; `Recipe.model_validate` makes an equal one of it."""
    return _thawed(recipe)


def identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a `to_dict` that decides which weights a run ends with."""
    kept = {name: value for name, value in values.items() if name not in ("output_dir", "tracking", "evaluation")}
    quantization = kept.get("quantization", {}).items()
    kept["quantization"] = {name: value for name, value in quantization if name != "save_to"}
    training = kept.get("training", {}).items()
    kept["training"] = {name: value for name, value in training if not name.startswith(WITHOUT_EFFECT)}
    return kept


def recipe_digest(recipe: Recipe) -> str:
    """The SHA-256 of what decides the weights: equal for runs that differ only in where they write and report."""
    values = identity(to_dict(recipe))
    # JSON's objects are sorted here, but of two patterns that name a module the later one wins.
    values["quantization"]["overrides"] = list(values["quantization"]["overrides"].items())
    text = json.dumps(_plain_numbers(values), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why two runs have different digests: `training.learning_rate: 0.0001 -> 0.0002`, a line for each setting.

    Args:
        old, new: dicts that `to_dict` made. What the digest leaves out is left out here too.
    """
    return list(_differences(identity(old), identity(new), ()))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], key: Key) -> Iterator[str]:
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name, _NOT_SET), new.get(name, _NOT_SET)
        here = (*key, name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, here)
        elif not _same(before, after):
            yield f"{dotted(here)}: {_shown(before)} -> {_shown(after)}"
    if key == ("quantization", "overrides"):
        orders = [[name for name in one if name in other] for one, other in ((old, new), (new, old))]
        if orders[0] != orders[1]:
            yield f"{dotted(key)}: the order {shown(orders[0])} -> {shown(orders[1])}"


_NOT_SET = object()


def _same(before: Any, after: Any) -> bool:
    # `True == 1`, but they say different things.
    return isinstance(before, bool) == isinstance(after, bool) and bool(before == after)


def _shown(value: Any) -> str:
    return "not set" if value is _NOT_SET else shown(value)


def _thawed(value: Any) -> Any:
    if isinstance(value, (Mapping, BaseModel)):
        return {name: _thawed(inner) for name, inner in dict(value).items()}
    if isinstance(value, (list, tuple)):
        return [_thawed(inner) for inner in value]
    return value


def _plain_numbers(value: Any) -> Any:
    """1.0 as 1: both are the same setting."""
    if isinstance(value, dict):
        return {name: _plain_numbers(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
