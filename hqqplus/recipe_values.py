"""The values of a recipe: their types, what is refused about them, and in which words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, ValidationError, ValidationInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from hqqplus.recipe_yaml import Key, did_you_mean, not_one_of, shown, unknown, wrong_type

TRACKERS = (
    "none", "wandb", "tensorboard", "trackio", "mlflow", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub",
    "dvclive", "flyte", "kubeflow", "neptune", "swanlab",
)  # fmt: skip
"""What transformers can report to."""

SPEC_FIELDS = ("nbits", "group_size", "axis", "metadata_dtype", "metadata_bits")
SOLVER_FIELDS = ("lp_norm", "threshold", "gain", "thorough")
REQUIRED = "missing, and it is required"
EMPTY = "empty; a name is needed"

# The types of the errors that already carry their final words.
IN_WORDS, MISSING = "recipe", "recipe_missing"


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


def refusal(problems: Iterable[tuple[Key, str]], value: Any) -> ValidationError:
    """Problems of one value, each with its place inside it, in the form that pydantic hands on."""
    lines = [
        InitErrorDetails(
            type=PydanticCustomError(MISSING if what == REQUIRED else IN_WORDS, "{what}", {"what": what}),
            loc=key,
            input=value,
        )
        for key, what in problems
    ]
    return ValidationError.from_exception_data("recipe", lines)


def checked(problems: Callable[[Any], Iterable[tuple[Key, str]]], make: Callable[[Any], Any]) -> PlainValidator:
    """A validator that refuses a value with all `problems` that it has, and otherwise makes it into the field's."""

    def validate(value: Any) -> Any:
        found = list(problems(value))
        if found:
            raise refusal(found, value)
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


def spec_value(value: Any, info: ValidationInfo) -> Any:
    what = _spec_problem(str(info.field_name), value)
    if what:
        raise refusal([((), what)], value)
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


def frozen(value: Any) -> Any:
    """Mappings that cannot be changed, tuples for lists; all the way down."""
    if isinstance(value, Mapping):
        return FrozenMapping({name: frozen(inner) for name, inner in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(frozen(inner) for inner in value)
    return value


def alpha_problems(value: Any) -> Iterator[tuple[Key, str]]:
    if value is None:
        return
    # Written out, since a union of int and float would report each wrong value twice.
    infinite = isinstance(value, float) and not math.isfinite(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or infinite:
        yield (), wrong_type(value, "a number")
    elif value <= 0:
        yield (), f"{shown(value)} is out of range: more than 0 is needed"


def _switch_problems(value: Any) -> Iterator[tuple[Key, str]]:
    if not isinstance(value, bool) and value != "auto":
        yield (), wrong_type(value, "true, false or auto")


def _place_problems(value: Any) -> Iterator[tuple[Key, str]]:
    if not isinstance(value, bool | str) or value == "":
        yield (), wrong_type(value, "true, false or the path of a folder")


def _rank_problems(ranks: Any) -> Iterator[tuple[Key, str]]:
    if not isinstance(ranks, Mapping):
        yield (), wrong_type(ranks, "a mapping of name patterns to ranks")
        return
    for pattern, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool):
            yield (pattern,), wrong_type(rank, "an integer")
        elif rank < 1:
            yield (pattern,), f"{shown(rank)} is out of range: at least 1 is needed"


# Null unsets what an extended recipe gives, and a heading with nothing under it is null too.
null_is_empty = BeforeValidator(lambda value: {} if value is None else value)
to_tuple = BeforeValidator(lambda value: tuple(value or ()) if value is None or isinstance(value, list) else value)
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], to_tuple]
Alpha = Annotated[int | float | None, checked(alpha_problems, lambda value: value)]
Switch = Annotated[bool | Literal["auto"], checked(_switch_problems, lambda value: value)]
Place = Annotated[bool | str, checked(_place_problems, lambda value: value)]
Gain = Annotated[float | Literal["auto"], BeforeValidator(lambda v, info: v if v == "auto" else spec_value(v, info))]
Ranks = Annotated[Mapping[str, int], checked(_rank_problems, FrozenMapping), null_is_empty]
Trackers = Annotated[str | tuple[str, ...], checked(_tracker_problems, frozen)]
NameOrNames = Annotated[str | tuple[str, ...], checked(_names_problems, frozen)]
Texts = Annotated[Mapping[str, str], checked(_text_problems, FrozenMapping), null_is_empty]
Training = Annotated[Mapping[str, Any], checked(_training_problems, FrozenMapping), null_is_empty]
PatternFields = Annotated[Mapping[str, Mapping[str, Any]], checked(_override_problems, frozen), null_is_empty]
