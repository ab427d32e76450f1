"""What a run settles before it trains: the data, and the settings of the trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hqqplus.data import RowForm, load_rows
from hqqplus.errors import UserError
from hqqplus.evaluation.perplexity import Windows
from hqqplus.files import check_output
from hqqplus.integrations.trl import prepare_rows, sft_config
from hqqplus.recipe import Recipe
from hqqplus.recovery.packing import settle_packing

Say = Callable[[str], None]

# With neither an evaluation file nor a split named, so many of the training rows are held out.
_HELD_OUT_SHARE, _HELD_OUT_MOST = 0.05, 500


@dataclass(frozen=True)
class RunData:
    """Rows to train on, as TRL wants them; documents to measure on, set name -> texts; and the training rows as
    documents, for what looks at text before training."""

    train: Any
    texts: dict[str, list[str]]
    documents: Callable[[], list[str]]


class TrainingRows:
    """The rows to train on, tokenized and packed, once a model has shown whether packed documents stay apart.

    Args:
        train: as in `RunData`.
        settings: of the trainer, as `trainer_settings` has them.
        packing: as in the recipe.

    Attributes:
        arguments: of the trainer; whether they pack is certain after `of`.
        rows: None before.
    """

    def __init__(self, train: Any, tokenizer: Any, settings: dict[str, Any], packing: Any, say: Say) -> None:
        self.tokenizer, self.arguments, self.rows = tokenizer, sft_config(settings, "recipe"), None
        self._train, self._settings, self._packing, self._say = train, settings, packing, say

    def of(self, model: Any) -> Any:
        """The rows; `model` is the one that will be trained, or its parent.

        Raises:
            UserError: if packing is asked for, and the model lets documents see each other.
        """
        if self.rows is None:
            packing = settle_packing(self._packing, model, say=self._say)
            self.arguments = sft_config({**self._settings, "packing": packing}, "recipe")
            self.rows = prepare_rows(self._train, self.tokenizer, self.arguments)
        return self.rows


EVALUATION_SET = "evaluation"


def load_data(recipe: Recipe, tokenizer: Any, say: Say) -> RunData:
    """Read the training rows and every evaluation set that the recipe names.

    Raises:
        UserError: for a file, split, column or row that is missing or wrong.
    """
    section = recipe.data
    form = RowForm(section.text_field, section.prompt, section.completion, section.messages)
    rows = load_rows(section.path_or_name, section.split, section.config_name)
    form.check(rows, "data.path_or_name")
    if section.eval_path_or_name or section.eval_split:
        held_out = load_rows(
            section.eval_path_or_name or section.path_or_name,
            section.eval_split or "train",
            # A configuration belongs to the hub name that it was given with.
            None if section.eval_path_or_name else section.config_name,
            where="data.eval_path_or_name" if section.eval_path_or_name else "data.eval_split",
        )
        form.check(held_out, "data.eval_path_or_name")
    else:
        count = min(max(1, int(len(rows) * _HELD_OUT_SHARE)), _HELD_OUT_MOST)
        if len(rows) < 2:
            raise UserError("data.path_or_name: one row is too few to train on and to hold out from")
        parts = rows.train_test_split(test_size=count, seed=recipe.seed)
        rows, held_out = parts["train"], parts["test"]
        say(f"no evaluation set named: {count} training rows are held out (data.eval_path_or_name or data.eval_split)")
    texts = {EVALUATION_SET: form.documents(held_out, tokenizer)}
    for name, path in recipe.evaluation.texts.items():
        further = load_rows(path, where=f"evaluation.texts.{name}")
        column = "text" if "text" in further.column_names else further.column_names[0]
        texts[name] = RowForm(text_field=column).documents(further, tokenizer)
    sft = form.to_sft(rows, tokenizer.eos_token if section.eos else None, unwritten_bos(tokenizer))
    return RunData(sft if section.eos else without_eos(sft, tokenizer), texts, lambda: form.documents(rows, tokenizer))


def unwritten_bos(tokenizer: Any) -> str | None:
    """The BOS token of a tokenizer that has one and does not write it by itself, else None.

    Every document is measured with BOS in front, so it is trained on in the same way.
    """
    if tokenizer.bos_token is None or tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return None
    return str(tokenizer.bos_token)


def without_eos(rows: Any, tokenizer: Any) -> Any:
    """Rows of text, or of prompt and completion, as token ids.

    TRL appends EOS to every row of text whatever it is told; rows that are tokenized already it takes as they are.
    Rows of messages come back unchanged: there it appends nothing.
    """

    def text_ids(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer(row["text"])["input_ids"]}

    def completion_ids(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        start = min(len(tokenizer(row["prompt"])["input_ids"]), len(ids))
        # Labels, because TRL looks for a completion by its column, which is gone.
        return {"input_ids": ids, "labels": [-100] * start + ids[start:]}

    columns = rows.column_names
    if "text" in columns:
        return rows.map(text_ids, remove_columns=columns)
    if "prompt" in columns and isinstance(rows[0]["prompt"], str):
        return rows.map(completion_ids, remove_columns=columns)
    return rows


def trainer_settings(recipe: Recipe, device: torch.device, say: Say) -> dict[str, Any]:
    """The arguments of `SFTConfig`: what the recipe says, and what it leaves open settled for `device`.

    Raises:
        UserError: if `output_dir` cannot be written to.
    """
    check_output(recipe.output_dir, "output_dir")
    settings = dict(recipe.training)
    cuda = device.type == "cuda"
    if "optim" not in settings:
        settings["optim"] = "paged_adamw_8bit" if cuda else "adamw_torch"
        if not cuda:
            say("training.optim: adamw_torch, because paged_adamw_8bit (the default) pages between GPU and CPU memory")
    elif not cuda and str(settings["optim"]).startswith("paged_"):
        say(f"training.optim: {settings['optim']} runs unpaged on a CPU")
    if "bf16" not in settings and "fp16" not in settings:
        settings["bf16"] = cuda and torch.cuda.is_bf16_supported()
    if "eval_steps" in settings:
        settings.setdefault("eval_strategy", "steps")
    settings.setdefault("save_total_limit", 2)
    settings.setdefault("use_cpu", device.type == "cpu")
    # The frozen base never gets a gradient, and has no buffers worth sending every step.
    settings.setdefault("ddp_find_unused_parameters", False)
    settings.setdefault("ddp_broadcast_buffers", False)
    report_to = recipe.tracking.report_to
    return {
        **settings,
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "max_length": recipe.data.max_length,
        # "auto" until there is a model to ask.
        "packing": recipe.data.packing is not False,
        "eval_packing": False,
        "report_to": [report_to] if isinstance(report_to, str) else list(report_to),
        "run_name": recipe.tracking.run,
    }


def set_up_tracking(recipe: Recipe) -> None:
    """Hand the tracking section to wandb by its own environment variables; a variable set by the user wins."""
    for name, value in (("WANDB_PROJECT", recipe.tracking.project), ("WANDB_MODE", recipe.tracking.mode)):
        if value is not None:
            os.environ.setdefault(name, value)


def as_dataset(windows: Windows) -> Any:
    """The windows as a data set. The trainer wants one before it evaluates; ours measures the windows themselves."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [window.tolist() for window in windows.input_ids]})
