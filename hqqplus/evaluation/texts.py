"""`hqqplus.evaluate`: a model on some text, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def read_documents(texts: str, split: str, text_field: str, where: str) -> Callable[[Any], list[str]]:
    """The rows of a file, folder or data set, checked; what is returned makes documents of them for a tokenizer.

    Raises:
        UserError: naming `where`, the option that the user set.
    """
    from hqqplus.data import RowForm, load_rows

    rows = load_rows(texts, split, where=where)
    form = RowForm(text_field=text_field)
    form.check(rows, where)
    return lambda tokenizer: form.documents(rows, tokenizer)


def measure(
    model: Any,
    tokenizer: Any,
    documents: list[str],
    name: str,
    *,
    max_length: int,
    max_tokens: int | None,
    batch_size: int,
    parent: Any = None,
) -> Evaluation:
    """`model` on `documents`, which errors call `name`; with its parent beside it, if that is given."""
    from hqqplus.evaluation.divergence import divergence
    from hqqplus.evaluation.perplexity import make_windows, perplexity

    windows = make_windows(documents, tokenizer, max_length, max_tokens, name)
    if parent is None:
        return Evaluation(perplexity(model, windows, batch_size).perplexity, windows.tokens, max_length)
    apart = divergence(parent, model, windows, batch_size)
    return Evaluation(
        apart.model.perplexity, windows.tokens, max_length, apart.parent.perplexity, apart.kl, apart.agreement
    )


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
    from hqqplus.models import check_parent, load, load_with_tokenizer

    read: Callable[[Any], list[str]] | None = None
    documents: list[str] = []
    if isinstance(texts, (str, Path)):
        read = read_documents(str(texts), split, text_field, "texts")
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
    if isinstance(against, (str, Path)):
        if name is not None:
            check_parent(name, adapter, str(against), allow_mismatch)
        known = {key: options[key] for key in ("dtype", "device", "trust_remote_code") if key in options}
        against = load(against, **known)
    return measure(
        model,
        tokenizer,
        documents if read is None else read(tokenizer),
        "texts" if read is None else str(texts),
        max_length=max_length,
        max_tokens=max_tokens,
        batch_size=batch_size,
        parent=against,
    )
