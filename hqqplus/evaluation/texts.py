"""`hqqplus.evaluate`: a model on some text, in one call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqplus.errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text: `perplexity` a token, over `tokens` predicted tokens in windows of `max_length`.

    With a parent, its own perplexity on the same windows, the `kl` to its predictions (nats a token) and the share of
    positions in which both models expect the same next token most (`agreement`, 0 to 1); without one None.
    """

    perplexity: float
    tokens: int
    max_length: int
    parent_perplexity: float | None = None
    kl: float | None = None
    agreement: float | None = None


def evaluate(
    model: Any,
    texts: str | Path | Iterable[str],
    *,
    adapter: str | Path | None = None,
    tokenizer: Any = None,
    against: Any = None,
    split: str = "train",
    text_field: str = "text",
    max_length: int = 1024,
    max_tokens: int | None = None,
    batch_size: int = 8,
    allow_mismatch: bool = False,
    **options: Any,
) -> Evaluation:
    """Measure `model` on `texts`: perplexity over non-overlapping windows, BOS in front of each document.

    Args:
        model: a folder or hub id, as `hqqplus.load` takes it, or a model that is loaded already.
        texts: documents; or the name of a file, folder or data set that holds them, as `hqqplus evaluate` takes it.
        adapter: with a name: an adapter to put on it.
        tokenizer: with a loaded model: its tokenizer.
        against: the parent, by name or loaded, to measure the distance to.
        split, text_field: of a named data set: its split, its column of text.
        max_length: tokens of a window.
        max_tokens: measure on so many tokens at most.
        batch_size: windows at a time.
        allow_mismatch: go on with a warning where fingerprints differ.
        options: further arguments of `hqqplus.load`, such as `device`, `dtype` and `compute`.

    Raises:
        UserError: if anything is missing, damaged, or does not belong together.
    """
    from hqqplus.data import RowForm, load_rows
    from hqqplus.evaluation.divergence import divergence
    from hqqplus.evaluation.perplexity import make_windows, perplexity
    from hqqplus.models import check_parent, load, load_with_tokenizer

    where = "texts"
    rows: Any = None
    documents: list[str] = []
    form = RowForm(text_field=text_field)
    if isinstance(texts, (str, Path)):
        rows = load_rows(str(texts), split, where=where)
        form.check(rows, where)
        where = str(texts)
    else:
        documents = list(texts)
    name = model if isinstance(model, (str, Path)) else None
    if name is not None:
        if tokenizer is not None:
            raise UserError("evaluate: a tokenizer goes with a model that is loaded; a named one has its own")
        model, tokenizer = load_with_tokenizer(name, adapter, allow_mismatch=allow_mismatch, **options)
    elif tokenizer is None:
        raise UserError("evaluate: a model that is loaded needs its tokenizer beside it: give tokenizer=...")
    elif adapter is not None or options:
        given = ", ".join([*(["adapter"] if adapter is not None else []), *options])
        raise UserError(f"evaluate: {given} goes with the name of a model; this one is loaded")
    if rows is not None:
        documents = form.documents(rows, tokenizer)
    windows = make_windows(documents, tokenizer, max_length, max_tokens, where)
    if against is None:
        return Evaluation(perplexity(model, windows, batch_size).perplexity, windows.tokens, max_length)
    if isinstance(against, (str, Path)):
        if name is not None:
            check_parent(name, adapter, str(against), allow_mismatch)
        known = {key: options[key] for key in ("dtype", "device", "trust_remote_code") if key in options}
        against = load(against, **known)
    apart = divergence(against, model, windows, batch_size)
    return Evaluation(
        apart.model.perplexity, windows.tokens, max_length, apart.parent.perplexity, apart.kl, apart.agreement
    )
