"""What a run trains on beside its recipe: parent, packed model, tokenizer, chat template, rows; and whether a
checkpoint was made with the same.

A recipe names things; this is what they are. A file of rows that was edited, a branch that has moved on, a tokenizer
that was mended: a run that continues over such a change is none that anybody could repeat, so it is refused, with both
values. Versions of libraries are no part of it: what changes with them is said, not refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hqqplus import models
from hqqplus.adapters.fingerprint import (
    CONTENTS,
    DATA,
    PARENT,
    REVISION,
    TEMPLATE,
    TOKENIZER,
    Fingerprint,
    differences,
    settle,
)
from hqqplus.digests import KEY_BYTES, digest_of, file_digest, template_digest, text_digest, tokenizer_digest
from hqqplus.recipe import Recipe

DATA_COMMIT = "commit of the training data"
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "hqqplus")
"""Those whose version may change a training step."""

# What a collator reads of a row; whatever else is in it is not trained on.
_COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths")
_SECONDS = 10.0


def run_identity(
    recipe: Recipe, tokenizer: Any, rows: Any = None, fingerprint: Fingerprint | None = None
) -> dict[str, str]:
    """What the run of `recipe` depends on, name -> value; what is not known (yet) is left out.

    Args:
        rows: the prepared training rows, a `datasets.Dataset` or a stream; without them neither data nor chat template
            (which preparing may settle) are in it.
        fingerprint: of the backbone; without it the parent stands for it.

    Raises:
        UserError: if the files of the parent, or of a stream, are there and cannot be read.
    """
    base = fingerprint if fingerprint is not None else _noted(recipe)
    found = base.identity() if base is not None else _parent(recipe)
    for name in (TEMPLATE, DATA):
        found.pop(name, None)
    found[TOKENIZER] = tokenizer_digest(tokenizer)
    if rows is not None:
        found |= {TEMPLATE: template_digest(tokenizer), **data_identity(rows, recipe)}
    return found


def check_identity(stored: Mapping[str, Any], here: Mapping[str, str], where: str | Path, allow: bool) -> list[str]:
    """Refuse to continue the checkpoint `where` with something else than it was made with.

    Args:
        stored: what it noted, `here` what there is; only what both know is compared.
        allow: continue all the same.

    Returns:
        What was allowed, a sentence each.

    Raises:
        UserError: naming the checkpoint, and of all that differs both values.
    """
    noted = {str(name): str(value) for name, value in stored.items()}
    head = f"{where}: this checkpoint was made with something else"
    way_out = "put it back as it was, give this run its own output_dir"
    return settle(head, differences(noted, here, "checkpoint"), way_out, allow)


def changed_versions(stored: Mapping[str, Any], here: Mapping[str, str], where: str | Path) -> list[str]:
    """The sentence that names the libraries that are not those of the checkpoint `where`; none where all are."""
    changed = [
        f"{name} {stored[name]} (checkpoint), {here[name]} (here)"
        for name in LIBRARIES
        if name in stored and name in here and stored[name] != here[name]
    ]
    if not changed:
        return []
    return [
        f"{where}: written with other library versions: {'; '.join(changed)}: the run goes on, but need not end with "
        "the weights of an uninterrupted one"
    ]


# What there is -------------------------------------------------------------------------------------------------------


def _noted(recipe: Recipe) -> Fingerprint | None:
    """What the packed folder that the recipe starts from says of itself."""
    name = recipe.model.name_or_path
    return Fingerprint.read(models.resolve_name(name)) if models.is_packed(name) else None


def _parent(recipe: Recipe) -> dict[str, str]:
    name, revision = recipe.model.name_or_path, recipe.model.revision
    known = {PARENT: name, REVISION: revision, CONTENTS: models.content_digest(name, revision, "model.name_or_path")}
    return {key: value for key, value in known.items() if value is not None}


def data_identity(rows: Any, recipe: Recipe) -> dict[str, str]:
    """Of rows in memory a digest of all their tokens and labels, in their order; of a stream one of its source."""
    from datasets import Dataset

    if isinstance(rows, Dataset):
        return {DATA: rows_digest(rows)}
    return _source(recipe)


def rows_digest(rows: Any) -> str:
    """A digest of the tokens, labels and document lengths of a `datasets.Dataset`, row by row in their order.

    A few seconds for 100 million tokens.
    """
    names = [name for name in _COLUMNS if name in rows.column_names]

    def parts() -> Iterator[bytes]:
        for name in names:
            yield f"{name} {len(rows)}:".encode()
            lengths, values = _digests_of_column(rows.select_columns([name]), name)
            yield lengths + values

    return digest_of(parts())


def _digests_of_column(rows: Any, name: str) -> tuple[bytes, bytes]:
    """Digests of the lengths of a column of lists and of their numbers, in batches whose borders leave no trace."""
    lengths, values = hashlib.blake2b(digest_size=KEY_BYTES), hashlib.blake2b(digest_size=KEY_BYTES)
    for table in rows.with_format("arrow").iter(batch_size=1000):
        column = table.column(name)
        lengths.update(_little(chunk.value_lengths() for chunk in column.chunks))
        values.update(_little(chunk.flatten() for chunk in column.chunks))
    return lengths.digest(), values.digest()


def _little(arrays: Iterable[Any]) -> bytes:
    """Arrow arrays of integers as little-endian 64-bit ones."""
    return b"".join(np.asarray(array.to_numpy(zero_copy_only=False)).astype("<i8").tobytes() for array in arrays)


def _source(recipe: Recipe) -> dict[str, str]:
    """What is known of a stream before it is read: its files, or its name on the hub and the commit, where the hub can
    be asked."""
    section = recipe.data
    what: dict[str, Any] = {"split": section.split, "config_name": section.config_name}
    path = Path(section.path_or_name).expanduser()
    if path.exists():
        files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if _counts(one, path))
        what["files"] = [[one.relative_to(path).as_posix(), one.stat().st_size, file_digest(one)] for one in files]
        return {DATA: text_digest(what)}
    commit = None if section.path_or_name.startswith("embedded:") else _commit(section.path_or_name)
    return {DATA: text_digest({**what, "name": section.path_or_name}), **({DATA_COMMIT: commit} if commit else {})}


def _counts(path: Path, root: Path) -> bool:
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)


def _commit(name: str) -> str | None:
    """The commit of a data set on the hub; None where it cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=_SECONDS).sha
    except Exception:  # no network, not public, no such name: what is read says it better
        return None
