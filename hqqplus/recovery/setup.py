"""What a run settles before it trains: the data, and the settings of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState

from hqqplus.data import load_rows
from hqqplus.errors import UserError
from hqqplus.evaluation.perplexity import Windows
from hqqplus.files import check_output
from hqqplus.integrations.chat_templates import settle_template
from hqqplus.integrations.trl import sft_config
from hqqplus.recipe import Recipe
from hqqplus.recovery.answers import answers_only
from hqqplus.recovery.packing import settle_packing
from hqqplus.recovery.prepare import Keeping, Preparation
from hqqplus.recovery.processes import default_optimizer
from hqqplus.recovery.row_cache import RowCache, contents_sha256, default_folder
from hqqplus.recovery.streamed import StreamedRows, stream_data
from hqqplus.recovery.supervision import Cut, MaskedRows
from hqqplus.recovery.tracking import reported_by_transformers
from hqqplus.row_forms import RowForm

Say = Callable[[str], None]

# With neither an evaluation file nor a split named, so many of the training rows are held out.
_HELD_OUT = (0.05, 500)


@dataclass(frozen=True)
class RunData:
    """Rows to train on, as TRL wants them; documents to measure on, set name -> texts; and the training rows as
    documents, for what looks at text before training: all of them, or of a stream those at its beginning."""

    train: Any
    texts: dict[str, list[str]]
    documents: Callable[[], list[str]]


class TrainingRows:
    """The rows to train on, tokenized and packed, once a model has shown whether packed documents stay apart.

    Args:
        train: as in `RunData`.
        settings: of the trainer, as `trainer_settings` has them.
        packing: as in the recipe.
        masked: what becomes of rows without a supervised token, as in the recipe.
        cache: where prepared rows are kept for the next start.

    Attributes:
        arguments: of the trainer; whether they pack is certain after `of`.
        rows: None before.
    """

    def __init__(
        self,
        train: Any,
        tokenizer: Any,
        settings: dict[str, Any],
        packing: Any,
        say: Say,
        masked: MaskedRows = "refuse",
        cache: RowCache | None = None,
    ) -> None:
        settle_template(tokenizer, settings.get("chat_template_path"))
        self._train, self._settings = answers_only(train, tokenizer, settings, masked, say)
        self.tokenizer, self.arguments, self.rows = tokenizer, sft_config(self._settings, "recipe"), None
        self._packing, self._say, self._cache = packing, say, cache
        self._masked: MaskedRows = masked
        self._tokenized: Any = None
        self._noted: list[str] = []
        self._keeping: Keeping | None = None

    def check(self) -> None:
        """Tokenize the rows, and say what is wrong with them before there is a model.

        Raises:
            UserError: for what `Preparation` refuses, as far as it does not depend on packing.
        """
        ways = [self._arguments(packing) for packing in (True, False) if self._packing in ("auto", packing)]
        if len({Cut.of(way) for way in ways}) > 1:
            return
        # With what was prepared already there was nothing wrong.
        if not any(self._preparation(way).is_kept(self._train) for way in ways):
            self._tokenized = self.tokenized()

    def tokenized(self) -> Any:
        """The rows with tokens and labels, not yet cut or packed; of a stream, its beginning.

        Raises:
            UserError: as `check`.
        """
        return self._preparation(self.arguments).tokenized(self._train)

    def of(self, model: Any) -> Any:
        """The rows; `model` is the one that will be trained, or its parent.

        Raises:
            UserError: if packing is asked for, and the model lets documents see each other; or for what
                `Preparation` refuses.
        """
        if self.rows is None:
            self.settle(self.packing_with(model))
        return self.rows

    def packing_with(self, model: Any) -> bool:
        """Whether the rows are packed, `model` being the one that is asked; refused as `of` says."""
        return settle_packing(self._packing, model, say=self._say)

    def settle(self, packing: bool) -> None:
        """Prepare the rows, packed or not. In every process at once: there are barriers in it."""
        self.arguments = self._arguments(packing)
        self.rows = self._preparation(self.arguments).of(self._train, self._tokenized)
        self._tokenized = None

    def _arguments(self, packing: bool) -> Any:
        return sft_config({**self._settings, "packing": packing}, "recipe")

    def _preparation(self, arguments: Any) -> Preparation:
        if self._cache is not None and self._keeping is None and not isinstance(self._train, StreamedRows):
            self._keeping = Keeping(self._cache, contents_sha256(self._train))
        return Preparation(self.tokenizer, arguments, self._masked, self._say, self._keeping, self._noted)


def row_cache(recipe: Recipe, say: Say) -> RowCache | None:
    """Where the recipe has prepared rows kept."""
    place = recipe.data.cache
    if place is False:
        return None
    return RowCache(default_folder() if place is True else place, say)


EVALUATION_SET = "evaluation"


def form_of(recipe: Recipe) -> RowForm:
    """The form of the recipe's rows."""
    section = recipe.data
    return RowForm(
        section.text_field,
        section.prompt,
        section.completion,
        section.messages,
        section.alpaca,
        section.alpaca_prompt,
        section.sharegpt,
    )


def load_data(recipe: Recipe, tokenizer: Any, say: Say) -> RunData:
    """Read the training rows and every evaluation set that the recipe names.

    Raises:
        UserError: for a file, split, column or row that is missing or wrong.
    """
    section = recipe.data
    form = form_of(recipe)
    # What documents look like is for it to say too.
    settle_template(tokenizer, recipe.training.get("chat_template_path"))
    eos, bos = tokenizer.eos_token if section.eos else None, unwritten_bos(tokenizer)
    if section.streaming:
        train, measured, beginning = stream_data(recipe, tokenizer, form, eos, bos, _HELD_OUT, say)
        if not section.eos:
            train = replace(train, rows=without_eos(train.rows, tokenizer), head=without_eos(train.head, tokenizer))
        return RunData(train, _texts(recipe, tokenizer, form, measured), beginning)
    where = "data.path_or_name"
    rows, plain = form.plain(load_rows(section.path_or_name, section.split, section.config_name), tokenizer, where)
    measured = None
    if not section.eval_path_or_name and section.eval_split:
        held_out = load_rows(section.path_or_name, section.eval_split, section.config_name, where="data.eval_split")
        held_out, _ = form.plain(held_out, tokenizer, "data.eval_split")
        measured = plain.documents(held_out, tokenizer)
    elif not section.eval_path_or_name:
        count = min(max(1, int(len(rows) * _HELD_OUT[0])), _HELD_OUT[1])
        if len(rows) < 2:
            raise UserError("data.path_or_name: one row is too few to train on and to hold out from")
        parts = rows.train_test_split(test_size=count, seed=recipe.seed)
        rows, measured = parts["train"], plain.documents(parts["test"], tokenizer)
        say(f"no evaluation set named: {count} training rows are held out (data.eval_path_or_name or data.eval_split)")
    sft = plain.to_sft(rows, eos, bos)
    texts = _texts(recipe, tokenizer, form, measured)
    return RunData(
        sft if section.eos else without_eos(sft, tokenizer), texts, lambda: plain.documents(rows, tokenizer)
    )


def _texts(recipe: Recipe, tokenizer: Any, form: RowForm, measured: list[str] | None) -> dict[str, list[str]]:
    """Evaluation set -> documents; `measured` are those of the first, where no data set of its own is named for it."""
    section = recipe.data
    if measured is None:
        # Without `config_name`: a configuration belongs to the hub name that it was given with.
        named, where = str(section.eval_path_or_name), "data.eval_path_or_name"
        held_out = load_rows(named, section.eval_split or "train", where=where)
        held_out, plain = form.plain(held_out, tokenizer, where)
        measured = plain.documents(held_out, tokenizer)
    texts = {EVALUATION_SET: measured}
    for name, path in recipe.evaluation.texts.items():
        further = load_rows(path, where=f"evaluation.texts.{name}")
        column = "text" if "text" in further.column_names else further.column_names[0]
        texts[name] = RowForm(text_field=column).documents(further, tokenizer)
    return texts


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
    Rows of messages come back unchanged: there it appends nothing. `rows` may be a stream.
    """

    def text_ids(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer(row["text"])["input_ids"]}

    def completion_ids(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        start = min(len(tokenizer(row["prompt"])["input_ids"]), len(ids))
        # Labels, because TRL looks for a completion by its column, which is gone.
        return {"input_ids": ids, "labels": [-100] * start + ids[start:]}

    first = next(iter(rows))
    if "text" in first:
        return rows.map(text_ids, remove_columns=["text"])
    if isinstance(first.get("prompt"), str):
        return rows.map(completion_ids, remove_columns=["prompt", "completion"])
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
        sharded = default_optimizer(settings, PartialState())
        settings["optim"] = sharded or ("paged_adamw_8bit" if cuda else "adamw_torch")
        if sharded:
            say(f"training.optim: {sharded}, because paged_adamw_8bit (the default) cannot compute with shards")
        elif not cuda:
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
    return {
        **settings,
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "max_length": recipe.data.max_length,
        # "auto" until there is a model to ask.
        "packing": recipe.data.packing is not False,
        "eval_packing": False,
        "report_to": reported_by_transformers(recipe),
        "run_name": recipe.tracking.run,
    }


def as_dataset(windows: Windows) -> Any:
    """The windows as a data set. The trainer wants one before it evaluates; ours measures the windows themselves."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [window.tolist() for window in windows.input_ids]})
