"""Recipes: YAML files made into typed, frozen objects, or refused with everything that is wrong at once.

    recipe = load_recipe("recipes/llama3_8b_1bit.yaml", ["training.max_steps=10"])

Importing this module imports neither torch nor transformers; a recipe with a `training` section imports trl when it is
validated, because the fields of that section are those of the installed `trl.SFTConfig`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from hqqplus.errors import UserError
from hqqplus.foreign_forms import prompt_problem
from hqqplus.recipe_values import (
    EMPTY,
    IN_WORDS,
    MISSING,
    REQUIRED,
    SOLVER_FIELDS,
    SPEC_FIELDS,
    TRACKERS,
    Alpha,
    FrozenMapping,
    Gain,
    Name,
    NameOrNames,
    Names,
    PatternFields,
    Place,
    Ranks,
    Switch,
    Texts,
    Trackers,
    Training,
    refusal,
    spec_value,
)
from hqqplus.recipe_yaml import Key, Problem, did_you_mean, dotted, not_one_of, read, shown, unknown, wrong_type

if TYPE_CHECKING:
    from hqqplus.quantization.spec import QuantPlan

__all__ = ["TRACKERS", "Recipe", "differences", "identity", "load_recipe", "recipe_digest", "to_dict"]

FORMS = "exactly one of text_field, prompt + completion, messages, alpaca, and sharegpt"
_FORM_KEYS = ("text_field", "prompt", "completion", "messages", "alpaca", "sharegpt")

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
            raise refusal([((), wrong_type(values, "a mapping"))], values)
        problems = list(cls._cross_checks(values))
        try:
            section = handler(dict(values))
        except ValidationError as error:
            problems += [(details["loc"], _in_words(cls, details)) for details in error.errors(include_url=False)]
        if problems:
            raise refusal(problems, values)
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

    nbits: Annotated[int, BeforeValidator(spec_value)] = 2
    group_size: Annotated[int, BeforeValidator(spec_value)] = 32
    axis: Annotated[int, BeforeValidator(spec_value)] = 1
    metadata_dtype: Annotated[str, BeforeValidator(spec_value)] = "float16"
    metadata_bits: Annotated[int, BeforeValidator(spec_value)] = 8
    overrides: PatternFields = FrozenMapping()
    skip: Names = ()
    lp_norm: Annotated[float, BeforeValidator(spec_value)] = 2.0
    threshold: Annotated[float, BeforeValidator(spec_value)] = 0.5
    gain: Gain = 0.0
    thorough: Annotated[bool, BeforeValidator(spec_value)] = False
    save_to: Name | None = None

    def plan(self, gain: float = 0.0) -> QuantPlan:
        """The plan that the quantizer takes. Imports torch.

        Args:
            gain: what stands for a gain that is `auto`.
        """
        from hqqplus.quantization.spec import QuantPlan, QuantSpec, SolverOptions

        overrides = {pattern: dict(changes) for pattern, changes in self.overrides.items()}
        spec = QuantSpec(**{name: getattr(self, name) for name in SPEC_FIELDS})
        options = {name: getattr(self, name) for name in SOLVER_FIELDS}
        solver = SolverOptions(**{**options, "gain": gain if self.gain == "auto" else self.gain})
        return QuantPlan(default=spec, overrides=overrides, skip=self.skip, solver=solver)


Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class Calibration(Section):
    """Forward passes over training text before training, a decoder block at a time; `calibration/` says what each
    method does."""

    method: Literal["none", "importance", "feedback", "block"] = "none"
    samples: Annotated[int, Field(ge=2)] = 128
    length: Annotated[int, Field(ge=8)] | None = None
    epochs: Annotated[int, Field(ge=1)] = 4
    batch_size: Annotated[int, Field(ge=1)] = 4
    scale_learning_rate: Rate = 5e-3
    weight_learning_rate: Weight = 3e-2
    store: Literal["cpu", "disk"] = "cpu"


class Adapter(Section):
    """The LoRA adapter that is trained over the packed backbone; PEFT's own names.

    `lora_alpha` is 2 r where it is not given. `budget_mb` shares ranks out by layer so that the shipped adapter's LoRA
    takes that many megabytes (10^6 bytes); `rank_pattern` names them.
    """

    r: Annotated[int, Field(ge=1)] = 16
    lora_alpha: Alpha = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: NameOrNames = "all-linear"
    init: Literal["default", "residual", "weighted"] = "residual"
    rank_pattern: Ranks = FrozenMapping()
    budget_mb: Rate | None = None
    use_dora: bool = False
    use_rslora: bool = False

    @classmethod
    def _cross_checks(cls, values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
        if values.get("rank_pattern") and values.get("budget_mb") is not None:
            yield (
                ("budget_mb",),
                "budget_mb and rank_pattern exclude each other: one chooses the ranks, one gives them",
            )

    @property
    def alpha(self) -> float:
        """LoRA's alpha: what is added is alpha / r times B A."""
        return 2 * self.r if self.lora_alpha is None else self.lora_alpha

    @property
    def start_rank(self) -> int:
        """The rank of the factors that LoRA starts from: the largest that is named."""
        return max([self.r, *self.rank_pattern.values()])


class Recovery(Section):
    """What is trained beside LoRA, and against what.

    `scales: bake` trains the scale of every group (and at 1 bit its offset) and ends with a packed model of its own;
    `gains` trains a gain for every row and column instead, which ship in the adapter. Rates that are not given are
    those of `training.learning_rate`.
    """

    loss: Literal["ce", "kd"] = "ce"
    kl_weight: Rate = 1.0
    ce_weight: Weight = 0.5
    hidden_weight: Weight = 0.5
    teacher: Literal["auto", "online", "8bit", "cache"] = "auto"
    teacher_cache: Name | None = None
    top_k: Annotated[int, Field(ge=1)] = 64
    scales: Literal["frozen", "bake", "gains"] = "frozen"
    offsets: Switch = "auto"
    scales_learning_rate: Rate | None = None
    norms: bool = False
    biases: bool = False

    @classmethod
    def _cross_checks(cls, values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
        if values.get("teacher") == "cache" and values.get("hidden_weight", 0.5) != 0:
            yield ("teacher",), "a teacher's cache holds no hidden states: hidden_weight must be 0"


class Data(Section):
    """What is trained on. Exactly one form: a column of text, prompt and completion, messages, rows of alpaca
    (instruction, input and output; `alpaca_prompt` makes a prompt of the first two), or a column of conversations as
    sharegpt has them.

    `streaming` reads rows while they are trained on, through a buffer of `shuffle_buffer` rows (0: in their order).
    `masked_rows` says what becomes of rows without a token that the loss sees. `cache` is where prepared rows are kept
    for the next start: true for beside the cache of datasets, a folder, or false for nowhere.
    """

    path_or_name: Name
    config_name: Name | None = None
    split: Name = "train"
    eval_path_or_name: Name | None = None
    eval_split: Name | None = None
    text_field: Name | None = None
    prompt: Name | None = None
    completion: Name | None = None
    messages: Name | None = None
    alpaca: bool = False
    alpaca_prompt: Name | None = None
    sharegpt: Name | None = None
    max_length: Annotated[int, Field(ge=8)] = 1024
    packing: Switch = "auto"
    eos: bool = True
    streaming: bool = False
    shuffle_buffer: Annotated[int, Field(ge=0)] = 1000
    masked_rows: Literal["refuse", "drop"] = "refuse"
    cache: Place = True

    @classmethod
    def _cross_checks(cls, values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
        given = [name for name in _FORM_KEYS if _is_given(values, name)]
        pair = [name for name in given if name in ("prompt", "completion")]
        if len(pair) == 1:
            other = "completion" if pair == ["prompt"] else "prompt"
            yield tuple(pair), f"needs {other} too: prompt and completion are the two columns of one form"
        if len(given) - max(len(pair) - 1, 0) > 1:
            clash = f"{', '.join(given)} are given; {FORMS} is needed (null unsets an inherited one)"
            yield (given[-1],), clash
        template = values.get("alpaca_prompt")
        if isinstance(template, str) and template:
            problem = prompt_problem(template) if values.get("alpaca") is True else "goes with alpaca: true"
            if problem:
                yield ("alpaca_prompt",), problem

    @model_validator(mode="before")
    @classmethod
    def _text_is_the_default_form(cls, values: Any) -> Any:
        if not any(_is_given(values, name) for name in _FORM_KEYS):
            return {**values, "text_field": "text"}
        return values


def _is_given(values: Mapping[str, Any], form: str) -> bool:
    """Whether a form of rows is given; `alpaca: false` gives none."""
    return values.get(form) is not None and values[form] is not False


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

    report_to: Trackers = "none"
    project: str | None = None
    run: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None


class Recipe(Section):
    """A whole run: what to load, how to pack it, what to train on it, and where everything goes."""

    model: Model
    quantization: Quantization = Quantization()
    calibration: Calibration = Calibration()
    adapter: Adapter = Adapter()
    data: Data
    recovery: Recovery = Recovery()
    training: Training = FrozenMapping()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    output_dir: Name
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0  # numpy takes no larger one

    @classmethod
    def _cross_checks(cls, values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
        training, adapter, quantization, calibration, recovery, data = (
            section if isinstance(section := values.get(name), Mapping) else {}
            for name in ("training", "adapter", "quantization", "calibration", "recovery", "data")
        )
        if data.get("streaming") is True:
            yield from _stream_problems(training, recovery)
        if training.get("fp16") is True and training.get("bf16") is True:
            yield ("training", "fp16"), "fp16 and bf16 exclude each other"
        calibrated = calibration.get("method", "none") != "none"
        if adapter.get("init") == "weighted" and not calibrated:
            yield (
                ("adapter", "init"),
                "weighted needs the activations that a calibration sees: give calibration.method",
            )
        gain = quantization.get("gain", 0)
        if calibrated and gain not in (0, 0.0):
            yield (
                ("quantization", "gain"),
                "a calibration fits the scales to activations: a gain goes with method none",
            )
        if quantization.get("axis") == 0:
            for name, key in (
                (calibrated, ("calibration", "method")),
                (recovery.get("scales") == "bake", ("recovery", "scales")),
            ):
                if name:
                    yield key, "needs groups along the input: quantization.axis must be 1"
        if recovery.get("scales") == "bake" and adapter.get("use_dora"):
            yield (
                ("adapter", "use_dora"),
                "DoRA takes its magnitudes from frozen scales: recovery.scales must not be bake",
            )


def _stream_problems(training: Mapping[str, Any], recovery: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """What cannot be had with rows whose number nobody knows."""
    steps = training.get("max_steps")
    if steps is None or (isinstance(steps, int) and steps <= 0):
        yield ("data", "streaming"), "a stream has no length to count epochs by: give training.max_steps"
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if training.get(name) == "epoch":
            yield ("training", name), "a stream (data.streaming) has no epochs: use steps"
    if recovery.get("teacher") == "cache":
        yield (
            ("recovery", "teacher"),
            "a cache keeps the targets of every row, and a stream (data.streaming) has no set of rows: use online "
            "or 8bit",
        )


SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "quantization": Quantization,
    "calibration": Calibration,
    "adapter": Adapter,
    "data": Data,
    "recovery": Recovery,
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
    if kind in (IN_WORDS, MISSING):
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
            return f"{shown(value)} is out of range: {words} {limits[limit]:.10g} is needed"
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
    return load_as(Recipe, path, overrides)


Schema = TypeVar("Schema", bound=Section)


def load_as(schema: type[Schema], path: str | Path, overrides: Sequence[str] = ()) -> Schema:
    """`load_recipe` for a recipe of another shape."""
    document = read(path, overrides)
    problems = list(document.problems)
    try:
        recipe = schema.model_validate(document.values)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            key = details["loc"]
            # No second complaint about what could not even be read.
            if key not in document.unread and not (details["type"] == MISSING and () in document.unread):
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


def to_dict(recipe: Section) -> dict[str, Any]:
    """The whole recipe as JSON has it, defaults included; `Recipe.model_validate` makes an equal one of it."""
    return _thawed(recipe)


def identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a `to_dict` that decides which weights a run ends with."""
    kept = {name: value for name, value in values.items() if name not in ("output_dir", "tracking", "evaluation")}
    quantization = kept.get("quantization", {}).items()
    kept["quantization"] = {name: value for name, value in quantization if name != "save_to"}
    # Where activations and the teacher's targets lie.
    for name, place in (("calibration", "store"), ("recovery", "teacher_cache")):
        kept[name] = {key: value for key, value in kept.get(name, {}).items() if key != place}
    data = kept.get("data", {})
    # Rows without a loss train nothing, whatever becomes of them.
    left_out = {"masked_rows", "cache"} if data.get("streaming") else {
        "masked_rows", "cache", "streaming", "shuffle_buffer"
    }  # fmt: skip
    # Not given they say nothing, and recipes from before there were such forms keep their digest.
    left_out |= {name for name in ("alpaca", "alpaca_prompt", "sharegpt") if not data.get(name)}
    kept["data"] = {name: value for name, value in data.items() if name not in left_out}
    # The workers of a loader share out the files of a stream, which decides the order of its rows.
    matters = ("dataloader_num_workers",) if data.get("streaming") else ()
    training = kept.get("training", {}).items()
    kept["training"] = {
        name: value for name, value in training if name in matters or not name.startswith(WITHOUT_EFFECT)
    }
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
