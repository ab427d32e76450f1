"""What a recipe trains on, looked at without a model: rows, lengths, the share that is supervised, an example."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hqqplus import models
from hqqplus.recipe import Recipe
from hqqplus.recovery.row_cache import READ_SETTINGS
from hqqplus.recovery.setup import Say, TrainingRows, load_data
from hqqplus.recovery.streamed import StreamedRows
from hqqplus.recovery.supervision import Cut, example, supervised_tokens


@dataclass(frozen=True)
class Preview:
    """Of the training rows, or of the beginning of a stream.

    Attributes:
        rows: how many there are. whole: those are all.
        tokens: in them, as far as they are trained on; supervised: those that the loss sees.
        median, most, longest: tokens to a row before it is cut: the median, what 95 % of the rows do not exceed, all.
        max_length: to what they are cut, or packed. cut: the share of the rows that lose something by it.
        documents: to measure on, set name -> how many.
        example: the first row in a line, masked text in brackets.
    """

    rows: int
    whole: bool
    tokens: int
    supervised: int
    median: int
    most: int
    longest: int
    max_length: int
    cut: float
    documents: dict[str, int]
    example: str

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same in words."""
        which = "" if self.whole else "the first "
        share = self.supervised / self.tokens if self.tokens else 0.0
        measured = ", ".join(f"{name} {count:,} documents" for name, count in self.documents.items())
        return [
            f"{which}{self.rows:,} training rows, {self.tokens:,} tokens, {self.supervised:,} of them ({share:.1%}) "
            "supervised",
            f"tokens to a row: median {self.median:,}, 95 % have at most {self.most:,}, the longest {self.longest:,}; "
            f"{self.cut:.1%} are longer than data.max_length ({self.max_length:,}) and lose the rest",
            f"measured on: {measured}",
            self.example,
        ]


def preview(recipe: Recipe, say: Say) -> Preview:
    """Read and tokenize what `recipe` trains on, and check it as a run does. No weights are read.

    Whether `packing: auto` packs is for a model to say; figures are of the rows before that.

    Raises:
        UserError: as `load_data` and `TrainingRows.check`.
    """
    section = recipe.model
    tokenizer = models.load_tokenizer(
        section.name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    data = load_data(recipe, tokenizer, say)
    settings = {name: value for name, value in recipe.training.items() if name in (*READ_SETTINGS, "dataset_num_proc")}
    settings |= {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "max_length": recipe.data.max_length,
        "packing": recipe.data.packing is not False,
        # Nothing is computed.
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    rows = TrainingRows(data.train, tokenizer, settings, recipe.data.packing, say, recipe.data.masked_rows)
    found = rows.tokenized()
    whole = not isinstance(found, StreamedRows)
    if isinstance(found, StreamedRows):
        found = found.head
    cut = Cut.of(rows.arguments)
    counts, tokens = supervised_tokens(found, cut)
    batches = found.select_columns(["input_ids"]).iter(batch_size=1000)
    lengths = np.array([len(ids) for batch in batches for ids in batch["input_ids"]])
    return Preview(
        rows=len(found),
        whole=whole,
        tokens=tokens,
        supervised=int(counts.sum()),
        median=int(np.median(lengths)),
        most=int(np.percentile(lengths, 95, method="inverted_cdf")),
        longest=int(lengths.max()),
        max_length=recipe.data.max_length,
        cut=float(np.mean(lengths > cut.length)) if cut.length is not None else 0.0,
        documents={name: len(texts) for name, texts in data.texts.items()},
        example=example(found, tokenizer, cut),
    )
