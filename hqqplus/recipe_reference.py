"""What every key of a recipe means, in a sentence; and the page of them: `python -m hqqplus.recipe_reference`.

Types, defaults and what is allowed are read from the schema, so that the page cannot say otherwise.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hqqplus.classify import ClassificationRecipe
from hqqplus.recipe import SECTIONS, Recipe, Section

MEANINGS: Mapping[str, str] = {
    "model": "The pretrained model to start from.",
    "model.name_or_path": "Folder, hub id, or `embedded:pydoc`, the small model in the package.",
    "model.revision": "Branch, tag or commit of a hub model.",
    "model.dtype": "What is not packed is computed in it; `auto`: bfloat16 on a GPU that has it, float32 on a CPU.",
    "model.attn_implementation": "As in transformers: `sdpa`, `eager`, `flash_attention_2`, ...",
    "model.trust_remote_code": "Run code that comes with the model.",
    "quantization": "How the backbone is packed.",
    "quantization.nbits": "Bits per code: 1, 2, 3, 4 or 8.",
    "quantization.group_size": "Weights that share a scale and an offset: 8 to 256, or -1 for a whole row.",
    "quantization.axis": "1: a group is consecutive weights of a row (fast kernels); 0: of a column.",
    "quantization.metadata_dtype": "Of 16-bit scales and offsets: `float16` or `bfloat16`.",
    "quantization.metadata_bits": "Bits of a group's scale and of its offset: 8 or 16.",
    "quantization.overrides": "Name pattern: the fields that differ there. The last pattern that matches a module wins; "
    "embeddings and the head are packed only where a pattern names them.",
    "quantization.skip": "Name patterns of modules that stay in 16 bits.",
    "quantization.lp_norm": "What the solver minimises: 2 is least squares, below 1 a robust norm.",
    "quantization.threshold": "Of the robust norm, in standard deviations of a group.",
    "quantization.gain": "Exponent of a row gain that undoes the shrinkage of least squares, 0 to 1; `auto` chooses it "
    "on training text.",
    "quantization.thorough": "Search several times as long.",
    "quantization.save_to": "Keep the packed model in this folder, and use it again where it is there.",
    "calibration": "Passes over training text before training, a decoder block at a time.",
    "calibration.method": "`importance` weights columns, `feedback` adds error feedback and descent over codes, `block` "
    "trains scales and rounding against the parent's block.",
    "calibration.samples": "Windows of training text.",
    "calibration.length": "Tokens of a window; not given: `data.max_length`.",
    "calibration.epochs": "Passes over the samples for each block (`block`).",
    "calibration.batch_size": "Windows at a time.",
    "calibration.scale_learning_rate": "Of scales and middles (`block`).",
    "calibration.weight_learning_rate": "Of the latent weights that decide the rounding (`block`).",
    "calibration.store": "Where activations between blocks are kept.",
    "adapter": "The LoRA adapter over the packed backbone, in PEFT's names.",
    "adapter.r": "Rank.",
    "adapter.lora_alpha": "What is added is alpha / r times B A; not given: 2 r.",
    "adapter.lora_dropout": "Dropout of the adapter's input.",
    "adapter.target_modules": "`all-linear`, a name, a pattern, or a list of names.",
    "adapter.init": "`residual` starts from the singular vectors of what quantization lost, `weighted` from those of its "
    "effect on calibration text, `default` as PEFT does.",
    "adapter.rank_pattern": "Name pattern: rank.",
    "adapter.budget_mb": "Share ranks out so that the adapter takes so many megabytes (10^6 bytes) in bf16.",
    "adapter.use_dora": "DoRA.",
    "adapter.use_rslora": "Divide alpha by the root of the rank.",
    "data": "What is trained on. Exactly one form: `text_field`, `prompt` + `completion`, `messages`, `alpaca`, `sharegpt`.",
    "data.path_or_name": "File (jsonl, json, csv, parquet, txt), folder, hub name, or `embedded:pydoc`.",
    "data.config_name": "Configuration of a hub data set.",
    "data.split": "Split, with slices as in `train[:1000]`.",
    "data.eval_path_or_name": "What perplexity is measured on; not given: `eval_split`, or rows that are held out.",
    "data.eval_split": "Split of the evaluation set.",
    "data.text_field": "Column of plain text; the form where none is named.",
    "data.prompt": "Column of the prompt, on which there is no loss.",
    "data.completion": "Column of the completion.",
    "data.messages": "Column of messages with `role` and `content`.",
    "data.alpaca": "Rows of `instruction`, `input` and `output`; the loss is on the output.",
    "data.alpaca_prompt": "Template of the prompt, with `{instruction}` and `{input}`; not given: the model's chat "
    "template, or a plain one.",
    "data.sharegpt": "Column of conversations: turns with `from` and `value`.",
    "data.max_length": "Tokens of a training row and of a window of the evaluation.",
    "data.packing": "Pack documents into full rows; `auto` where the model keeps them apart.",
    "data.eos": "End every row with the end-of-sequence token.",
    "data.streaming": "Read rows while they are trained on; needs `training.max_steps`.",
    "data.shuffle_buffer": "Rows of a stream that are shuffled together; 0 keeps their order.",
    "data.masked_rows": "What becomes of rows in which the loss sees no token.",
    "data.cache": "Where prepared rows are kept for the next start: beside the cache of datasets, a folder, or nowhere.",
    "recovery": "What is trained beside LoRA, and against what.",
    "recovery.loss": "`ce`: cross-entropy; `kd`: distillation from the parent.",
    "recovery.kl_weight": "Weight of KL(parent || student).",
    "recovery.ce_weight": "Weight of the cross-entropy beside it.",
    "recovery.hidden_weight": "Weight of the distance of the final hidden states.",
    "recovery.teacher": "The parent beside the student, in 16 or 8 bits, or a cache of its predictions on the disk.",
    "recovery.teacher_cache": "Folder of the cache.",
    "recovery.top_k": "Log-probabilities kept a position in the cache.",
    "recovery.scales": "`bake`: train the scale of every group and end with a packed model of its own; `gains`: train a gain "
    "of every row and column, which ships in the adapter.",
    "recovery.offsets": "Train offsets too (`bake`); `auto`: at 1 bit.",
    "recovery.scales_learning_rate": "Of scales or gains; not given: `training.learning_rate`.",
    "recovery.norms": "Train the norms' weights.",
    "recovery.biases": "Train the biases.",
    "training": "Fields of `trl.SFTConfig`, under their own names.",
    "evaluation": "What the before/after report measures.",
    "evaluation.texts": "Further evaluation sets: name: file or data set.",
    "evaluation.join": "Measure all documents as one stream.",
    "evaluation.max_tokens": "Measure on so many tokens of a set at most.",
    "evaluation.prompts": "Prompts to continue, before and after.",
    "evaluation.max_new_tokens": "Tokens of a sample.",
    "evaluation.parent": "Measure the parent too.",
    "evaluation.batch_size": "Windows at a time.",
    "tracking": "Where the run is reported to, beside `log.jsonl`.",
    "tracking.report_to": "Trackers of transformers.",
    "tracking.project": "Of Weights & Biases.",
    "tracking.run": "Name of the run.",
    "tracking.mode": "Of Weights & Biases; not given: online where there is a key.",
    "output_dir": "Folder of checkpoints, adapter and report.",
    "seed": "Of all that is random.",
}
"""Dotted key -> what it means."""

CLASSIFICATION: Mapping[str, str] = {
    "data.text_field": "Column of the text.",
    "data.label_field": "Column of the label: a string, a whole number, or a class of `datasets`.",
    "data.max_length": "Tokens of a text.",
    "data.max_rows": "Train on so many rows at most.",
    "data.eval_path_or_name": "What accuracy is measured on; not given: `eval_split`, or a twentieth of the rows.",
    "data": "Rows with a text and a label.",
    "training": "Fields of transformers' `TrainingArguments`.",
    "baseline": "Train the 16-bit model in the same way, to compare.",
    "baseline_learning_rate": "Its rate; not given: the same.",
    "output_dir": "Folder of backbone, adapter and report.",
}
"""What is another in a recipe of `hqqplus classify`."""


def keys(schema: type[Section] = Recipe) -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of everything that a recipe may say, in the order of the schema."""
    for name, field in schema.model_fields.items():
        yield name, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for inner, of_it in field.annotation.model_fields.items():
                yield f"{name}.{inner}", of_it


def markdown() -> str:
    """The page: a table a section."""
    parts = [_INTRODUCTION]
    sections = [name for name in Recipe.model_fields if name in SECTIONS or name == "training"]
    for section in sections:
        parts += [f"## {section}", MEANINGS[section]]
        rows = [(key, field) for key, field in keys() if key.startswith(f"{section}.")]
        parts.append(_table(rows, MEANINGS) if rows else _TRAINING)
    own = [(key, field) for key, field in keys() if "." not in key and key not in sections]
    parts += ["## The rest", _table(own, MEANINGS)]
    theirs = [(key, field) for key, field in keys(ClassificationRecipe) if _differs(key, field)]
    parts += ["## Recipes of classifiers", _CLASSIFIERS, _table(theirs, {**MEANINGS, **CLASSIFICATION})]
    return "\n\n".join(parts) + "\n"


def _differs(key: str, field: FieldInfo) -> bool:
    return key in CLASSIFICATION and key not in ("data", "training")


def _table(rows: list[tuple[str, FieldInfo]], meanings: Mapping[str, str]) -> str:
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for key, field in rows:
        cells = (f"`{key}`", _type(field.annotation, field.metadata), _default(field), meanings[key])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)  # type: ignore[call-arg]
    if field.default is PydanticUndefined and field.default_factory is None:
        return "required"
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return "none" if not value else f"`{dict(value)}`"
    if value == ():
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


_NAMES = {int: "integer", float: "number", bool: "true, false", str: "text", type(None): ""}


def _type(annotation: Any, metadata: Any = ()) -> str:
    """An annotation in a reader's words, with its limits."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        return _type(inner, extra)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        parts = [_type(part) for part in get_args(annotation)]
        words = ", ".join(dict.fromkeys(part for part in parts if part))
    elif origin is tuple:
        words = "list"
    elif origin is not None and issubclass(origin, Mapping):
        words = "mapping"
    else:
        words = _NAMES.get(annotation, "mapping")
    limits = [
        f"{sign} {value:g}"
        for part in metadata
        for sign, name in ((">=", "ge"), (">", "gt"), ("<=", "le"), ("<", "lt"))
        for value in _bounds(part, name)
    ]
    return " ".join([words, ", ".join(limits)]).strip()


def _bounds(part: Any, name: str) -> list[float]:
    found = [part, *getattr(part, "metadata", ())]
    values = [getattr(bound, name, None) for bound in found]
    return [value for value in values if isinstance(value, (int, float)) and abs(value) < 2**31]


_INTRODUCTION = """\
# Recipes

<!-- Made by `python -m hqqplus.recipe_reference`, from the schema: not to be edited. -->

A recipe is a YAML file. `extends: other.yaml` lays it over another one, relative to the file: mappings merge, anything else is
replaced, null unsets. `key=value` on the command line lays one more over it. Unknown keys, wrong types and contradictions are
refused, all at once, each with its line: `hqqplus validate RECIPE`. Numbers such as `1e-4` are numbers."""

_TRAINING = """\
Such as `learning_rate`, `max_steps`, `per_device_train_batch_size`, `gradient_accumulation_steps`, `gradient_checkpointing`,
`lr_scheduler_type`, `warmup_steps`, `weight_decay`, `optim`, `save_steps`, `eval_steps`, `logging_steps`. What a recipe says elsewhere
(`output_dir`, `seed`, `max_length`, `packing`, `report_to`) is refused here with the key that says it. Not given, `optim` is
`paged_adamw_8bit` on a GPU, `adamw_torch` on a CPU and `adamw_torch_fused` with shards."""

_CLASSIFIERS = """\
`hqqplus classify RECIPE` takes the sections `model`, `quantization`, `adapter` and `training` (fields of transformers'
`TrainingArguments` here) as above, without `quantization.save_to`, `gain: auto`, `adapter.budget_mb`, `adapter.rank_pattern` and
`init: weighted`; and these:"""


def main() -> None:
    print(markdown(), end="")


if __name__ == "__main__":
    main()
