"""`python -m hqqplus.classify RECIPE [key=value ...]`: a text classifier on a backbone of 1 or 2 bits.

Where a model's fluency is not needed, one bit a weight goes further: the backbone of an
`AutoModelForSequenceClassification` is packed, LoRA over it and the classification head are trained with transformers'
`Trainer`, and the accuracy is set beside that of the 16-bit model trained in the same way.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from hqqplus.errors import UserError
from hqqplus.integrations.noise import leave_out
from hqqplus.recipe import Adapter, Model, Quantization, Rate, Section, load_as, to_dict
from hqqplus.recipe_values import FrozenMapping, Name, Training
from hqqplus.recipe_yaml import Key

if TYPE_CHECKING:
    from datasets import Dataset

ADAPTER_FOLDER, BACKBONE_FOLDER, REPORT = "adapter", "backbone", "report.json"


class LabelledData(Section):
    """Rows with a text and a label; the label is a string, a whole number, or a class of `datasets`.

    Without an evaluation set of its own a twentieth of the rows (at most 2,000) is held out.
    """

    path_or_name: Name
    config_name: Name | None = None
    split: Name = "train"
    eval_path_or_name: Name | None = None
    eval_split: Name | None = None
    text_field: Name = "text"
    label_field: Name = "label"
    max_length: Annotated[int, Field(ge=8)] = 256
    max_rows: Annotated[int, Field(ge=2)] | None = None


class ClassificationRecipe(Section):
    """A classifier: what to load and how to pack it, what to train on it. `training` holds fields of transformers'
    `TrainingArguments`; with `baseline` the 16-bit model is trained too, at its own rate where one is given."""

    model: Model
    quantization: Quantization = Quantization()
    adapter: Adapter = Adapter()
    data: LabelledData
    training: Training = FrozenMapping()
    baseline: bool = True
    baseline_learning_rate: Rate | None = None
    output_dir: Name
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0

    @classmethod
    def _cross_checks(cls, values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
        adapter, quantization = (
            section if isinstance(section := values.get(name), Mapping) else {} for name in ("adapter", "quantization")
        )
        for name in ("rank_pattern", "budget_mb"):
            if adapter.get(name):
                yield ("adapter", name), "a classifier's adapter has one rank: give adapter.r"
        if adapter.get("init") == "weighted":
            yield ("adapter", "init"), "weighted needs a calibration, which classifiers have none of: use residual"
        if quantization.get("gain", 0) == "auto":
            yield ("quantization", "gain"), "auto compares predictions of the next token: give a number"
        if quantization.get("save_to") is not None:
            yield ("quantization", "save_to"), "a classifier's backbone is written to output_dir/backbone"


@dataclass(frozen=True)
class ClassificationReport:
    """Accuracies are shares of the evaluation rows, `majority` that of always saying the most frequent label of the
    training rows; sizes are in bytes, everything stored, the head included; None: not measured."""

    name: str
    labels: list[str]
    rows: int
    evaluation_rows: int
    majority: float
    accuracy_parent: float | None
    accuracy: float
    bits_per_weight: float
    parent_bytes: int
    backbone_bytes: int
    adapter_bytes: int
    recipe: dict[str, Any]
    versions: dict[str, str]


def run(recipe: ClassificationRecipe, say: Callable[[str], None] | None = None) -> ClassificationReport:
    """Train the 16-bit model (`baseline`), then the packed one; write both accuracies, backbone and adapter.

    Writes to `recipe.output_dir`: `backbone/` (packed), `adapter/` (LoRA and head, rounded to bf16 before they are
    measured), `report.json`.

    Raises:
        UserError: for everything that is the user's to mend; a finished classifier in `output_dir` is part of it.
    """
    from hqqplus.adapters import apply_residual_start, round_adapter
    from hqqplus.evaluation.report import environment
    from hqqplus.files import check_output, made_folder, write_json
    from hqqplus.models import load_tokenizer, pick_device
    from hqqplus.modules import bits_per_weight, model_bytes

    say = say or (lambda text: print(f"hqqplus: {text}", flush=True))
    output = Path(recipe.output_dir)
    if (output / REPORT).exists():
        raise UserError(f"output_dir: {output} holds a finished classifier: name another folder")
    check_output(output, "output_dir")
    _trainer_arguments(recipe, None)
    device = pick_device(None)
    section = recipe.model
    tokenizer = load_tokenizer(
        section.name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    rows, held_out, labels = load_labelled(recipe.data, recipe.seed)
    train, measured = (_tokenized(part, tokenizer, recipe.data, labels) for part in (rows, held_out))
    given = list(train["labels"])
    most = max(range(len(labels)), key=given.count)
    majority = list(measured["labels"]).count(most) / len(measured)
    say(
        f"{len(train):,} rows to train on, {len(measured):,} to measure on; always {labels[most]!r} is right in "
        f"{100 * majority:.1f} % of them"
    )

    accuracy_parent = None
    if recipe.baseline:
        model, heads = load_classifier(recipe, labels, device)
        adapted = _with_adapter(model, heads, recipe)
        trainer = _trainer(adapted, tokenizer, train, measured, recipe, recipe.baseline_learning_rate)
        trainer.train()
        round_adapter(adapted)
        accuracy_parent = _accuracy(trainer)
        say(f"16-bit model: accuracy {100 * accuracy_parent:.1f} %")
        del model, adapted, trainer
        gc.collect()

    model, heads = load_classifier(recipe, labels, device)
    parent_bytes = sum(2 * parameter.numel() for parameter in model.parameters())
    factors = quantize(model, heads, recipe)
    bpw, backbone_bytes = bits_per_weight(model), model_bytes(model)
    with made_folder(output):
        fingerprint = _write_backbone(model, tokenizer, output / BACKBONE_FOLDER, recipe, environment())
        adapted = _with_adapter(model, heads, recipe)
        if factors is not None:
            apply_residual_start(adapted, factors)
        trainer = _trainer(adapted, tokenizer, train, measured, recipe, None)
        trainer.train()
        round_adapter(adapted)
        accuracy = _accuracy(trainer)
        say(f"{bpw:.2f} bits per weight: accuracy {100 * accuracy:.1f} %")
        adapter_bytes = _write_adapter(adapted, tokenizer, output / ADAPTER_FOLDER, fingerprint)
        report = ClassificationReport(
            name=output.name,
            labels=labels,
            rows=len(train),
            evaluation_rows=len(measured),
            majority=majority,
            accuracy_parent=accuracy_parent,
            accuracy=accuracy,
            bits_per_weight=bpw,
            parent_bytes=parent_bytes,
            backbone_bytes=backbone_bytes,
            adapter_bytes=adapter_bytes,
            recipe=to_dict(recipe),
            versions=environment(),
        )
        # Last: where it is, the run is through.
        write_json(output / REPORT, asdict(report))
    say(f"backbone and adapter in {output}, figures in {output / REPORT}")
    return report


# Data ----------------------------------------------------------------------------------------------------------------


def load_labelled(section: LabelledData, seed: int) -> tuple[Dataset, Dataset, list[str]]:
    """(rows to train on, rows to measure on, names of the labels in the order of their numbers).

    Rows have the columns `text` and `label`, both strings.

    Raises:
        UserError: for what is missing or empty, for a label that only the evaluation rows have, or a single label.
    """
    train = _rows(section, section.path_or_name, section.split, section.config_name, "data.path_or_name")
    if section.eval_path_or_name or section.eval_split:
        named = section.eval_path_or_name or section.path_or_name
        config = None if section.eval_path_or_name else section.config_name
        measured = _rows(section, named, section.eval_split or "train", config, "data.eval_path_or_name")
    else:
        if len(train) < 2:
            raise UserError("data.path_or_name: one row is too few to train on and to hold out from")
        parts = train.train_test_split(test_size=min(max(1, len(train) // 20), 2000), seed=seed)
        train, measured = parts["train"], parts["test"]
    if section.max_rows is not None and len(train) > section.max_rows:
        train = train.shuffle(seed=seed).select(range(section.max_rows))
    labels = sorted(set(train["label"]), key=lambda label: (len(label), label) if label.isdigit() else (0, label))
    if len(labels) < 2:
        raise UserError(f"data.label_field: all rows have the label {labels[0]!r}: there is nothing to tell apart")
    if strange := sorted(set(measured["label"]) - set(labels)):
        raise UserError(f"data: no training row has the label {strange[0]!r}, which evaluation rows have")
    return train, measured, labels


def _rows(section: LabelledData, name: str, split: str, config: str | None, where: str) -> Dataset:
    from datasets import ClassLabel, Dataset

    from hqqplus.data import load_rows
    from hqqplus.embedded import kinds

    if name == kinds.DATA_NAME:
        splits = kinds.build()
        if split not in splits:
            raise UserError(f"{where}: {name} has no split {split!r}; it has {', '.join(splits)}")
        rows = Dataset.from_list(splits[split])
    else:
        rows = load_rows(name, split, config, where=where)
    for field, column in (("text_field", section.text_field), ("label_field", section.label_field)):
        if column not in rows.column_names:
            there = ", ".join(rows.column_names)
            raise UserError(f"data.{field}: {name} has no column {column!r}; it has {there}")
    feature = rows.features[section.label_field]
    names = feature.names if isinstance(feature, ClassLabel) else None
    texts, labels = list(rows[section.text_field]), list(rows[section.label_field])
    for index, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
        if not isinstance(text, str):
            raise UserError(f"{where}: {name}: row {index}: {section.text_field} is {text!r}, not a text")
        if not isinstance(label, (str, int)) or (names and int(label) < 0):
            what = f"row {index}: {section.label_field} is {label!r}"
            raise UserError(f"{where}: {name}: {what}: a label is a text or a whole number")
    return Dataset.from_dict({"text": texts, "label": [names[label] if names else str(label) for label in labels]})


def _tokenized(rows: Dataset, tokenizer: Any, section: LabelledData, labels: list[str]) -> Dataset:
    numbers = {label: index for index, label in enumerate(labels)}

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(batch["text"], truncation=True, max_length=section.max_length)
        return {**encoded, "labels": [numbers[label] for label in batch["label"]]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


# The model -----------------------------------------------------------------------------------------------------------


def load_classifier(recipe: ClassificationRecipe, labels: list[str], device: Any) -> tuple[Any, list[str]]:
    """(the 16-bit model in float32 on a CPU and bfloat16 on a GPU, names of its modules without pretrained weights).

    Those, the head first of all, stay as they are and are trained.

    Raises:
        UserError: naming the model.
    """
    from torch import nn
    from transformers import AutoModelForSequenceClassification, set_seed

    from hqqplus.model_names import check_folder, one_sentence, resolve_name
    from hqqplus.models import compute_dtype

    section = recipe.model
    where, name = "model.name_or_path", section.name_or_path
    check_folder(name, where)
    options: dict[str, Any] = {"revision": section.revision} if section.revision else {}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    set_seed(recipe.seed)  # a new head is random
    with one_sentence(name, where):
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            resolve_name(name),
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            dtype=compute_dtype(section.dtype, device, where),
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the head of another task
            **options,
        )
    model, info = loaded
    new = {key.rpartition(".")[0] for key in info["missing_keys"]}
    new |= {(key if isinstance(key, str) else key[0]).rpartition(".")[0] for key in info["mismatched_keys"]}
    if strange := sorted(module for module in new if not isinstance(model.get_submodule(module), nn.Linear)):
        raise UserError(f"{where}: {name}: the checkpoint lacks {strange[0]}")
    if not new:
        raise UserError(f"{where}: {name}: it has a head for {len(labels)} labels already; give a model without one")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
    return model.to(device), sorted(new)


def quantize(model: Any, heads: list[str], recipe: ClassificationRecipe) -> dict[str, Any] | None:
    """Pack the pretrained linear layers in place; the factors of a residual start, if the recipe asks for one."""
    from hqqplus.adapters import ResidualCollector
    from hqqplus.integrations.transformers import quantize_model
    from hqqplus.modules.replace import observe_packing

    plan = recipe.quantization.plan()
    plan = replace(plan, skip=(*plan.skip, *heads))
    if recipe.adapter.init != "residual":
        quantize_model(model, plan)
        return None
    collector = ResidualCollector(recipe.adapter.start_rank)
    with observe_packing(collector):
        quantize_model(model, plan)
    return collector.factors


def _with_adapter(model: Any, heads: list[str], recipe: ClassificationRecipe) -> Any:
    """LoRA on all linear layers but the heads, which are trained whole."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    section = recipe.adapter
    targets: Any = section.target_modules
    if targets == "all-linear":
        targets = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in heads
        ]
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,  # type: ignore[arg-type]
        lora_dropout=section.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(heads),
        use_dora=section.use_dora,
        use_rslora=section.use_rslora,
        task_type="SEQ_CLS",
    )
    try:
        return get_peft_model(model.requires_grad_(False), config)
    except ValueError as error:
        raise UserError(f"adapter.target_modules: {str(error).splitlines()[0]}") from None


# Training ------------------------------------------------------------------------------------------------------------


def _trainer_arguments(recipe: ClassificationRecipe, learning_rate: float | None) -> Any:
    import torch
    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    for name in recipe.training:
        if name not in known:
            raise UserError(f"training.{name}: a field of trl.SFTConfig, and none of TrainingArguments: leave it out")
    settings = {"save_strategy": "no", "eval_strategy": "no", "report_to": "none", **recipe.training}
    if learning_rate is not None:
        settings["learning_rate"] = learning_rate
    settings.setdefault("use_cpu", not torch.cuda.is_available())
    settings.setdefault("disable_tqdm", not sys.stderr.isatty())  # a bar is no text for a file
    try:
        return TrainingArguments(output_dir=str(Path(recipe.output_dir) / "trainer"), seed=recipe.seed, **settings)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: {str(error).splitlines()[0]}") from None


def _trainer(
    model: Any, tokenizer: Any, train: Any, measured: Any, recipe: ClassificationRecipe, rate: float | None
) -> Any:
    from transformers import DataCollatorWithPadding, Trainer, set_seed

    set_seed(recipe.seed)
    return Trainer(
        model=model,
        args=_trainer_arguments(recipe, rate),
        train_dataset=train,
        eval_dataset=measured,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=_metrics,
    )


def _metrics(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def _accuracy(trainer: Any) -> float:
    return float(trainer.evaluate()["eval_accuracy"])


# Files ---------------------------------------------------------------------------------------------------------------


def _write_backbone(
    model: Any, tokenizer: Any, folder: Path, recipe: ClassificationRecipe, versions: dict[str, str]
) -> Any:
    from hqqplus.files import replacing_folder
    from hqqplus.models import fingerprint_of, write_companions

    fingerprint = fingerprint_of(
        model, recipe.model.name_or_path, recipe.model.revision, versions, tokenizer=tokenizer
    )
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        write_companions(temporary, tokenizer, fingerprint)
    return fingerprint


def _write_adapter(model: Any, tokenizer: Any, folder: Path, fingerprint: Any) -> int:
    """Write LoRA and head in bf16; the bytes of the tensors' file."""
    import torch

    from hqqplus.files import replacing_folder

    model.peft_config["default"].base_model_name_or_path = str(folder.parent / BACKBONE_FOLDER)
    kept = {
        name: tensor for name, tensor in model.state_dict().items() if "lora_" in name or "modules_to_save" in name
    }
    state = {name: tensor.to(torch.bfloat16) for name, tensor in kept.items()}
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state, save_embedding_layers=False)
        tokenizer.save_pretrained(temporary)
        fingerprint.write(temporary)
    return (folder / "adapter_model.safetensors").stat().st_size


def load_trained(folder: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder that `run` has written, in evaluation mode.

    Raises:
        UserError: if it is not whole, or its adapter belongs to another backbone.
    """
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from hqqplus.adapters import check_base
    from hqqplus.model_names import check_folder, one_sentence
    from hqqplus.models import load_tokenizer

    backbone, adapter = Path(folder) / BACKBONE_FOLDER, Path(folder) / ADAPTER_FOLDER
    for part in (backbone, adapter):
        if not part.is_dir():
            raise UserError(f"{folder}: no classifier of hqqplus (no {part.name}/)")
    check_folder(str(backbone), "classifier")
    with one_sentence(str(backbone), "classifier"):
        model = AutoModelForSequenceClassification.from_pretrained(backbone, use_safetensors=True)
    check_base(model, adapter)
    with one_sentence(str(adapter), "classifier"):
        adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    return adapted, load_tokenizer(str(adapter), where="classifier")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m hqqplus.classify RECIPE [key=value ...]`; returns the exit code (2 for a user's mistake)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    leave_out()
    try:
        run(load_as(ClassificationRecipe, arguments[0], arguments[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
