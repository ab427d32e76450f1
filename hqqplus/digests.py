"""What tells one checkpoint, one tokenizer, one chat template or one file from another, in 32 hexadecimal digits.

All of them are cheap beside loading a model: of a tensor both ends are read, of a large file pieces from all over it.
None depends on where a thing lies, so a copy of it has the same digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hqqplus.untrusted import read_json

KEY_BYTES = 16
SAMPLE_BYTES = 4096
"""Of the beginning and of the end of each tensor of a checkpoint, what is read to tell it from another."""
WHOLE_FILE_BYTES, PIECE_BYTES, PIECES = 2**28, 2**16, 1024
"""Up to which size a file is read whole, and the pieces that are read of a larger one."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What writing a configuration anew changes by itself.
_NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path")
# Of a tokenizer's description, what its last call has set.
_OF_THE_CALL = ("padding", "truncation", "version")
_PROBES = ("Hello, world!", " two  spaces\n\tand a tab", "naïve café – Straße 42 日本語 🙂", "<s>[INST] x </s>")


def digest_of(parts: Iterable[bytes]) -> str:
    """A digest of byte strings, one after the other."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def text_digest(value: Any) -> str:
    """A digest of what JSON makes of `value`, whatever the order of its keys."""
    return digest_of([json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()])


# Checkpoints ---------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model is loaded from in `folder`; empty if one of them is missing.

    A repository may hold the same weights in other files besides: those count only where there are no others.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    try:
        index = read_json(folder / _INDEX)
        names = sorted(set(index["weight_map"].values()))
        named = [folder / name for name in names if Path(name).name == name]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        named = sorted(folder.glob("*.safetensors"))
    return named if all(path.is_file() for path in named) else []


def checkpoint_digest(folder: Path) -> str:
    """A digest of a checkpoint: its config; name, type, shape and both ends of each tensor, in whichever file it lies.

    No training leaves the ends of every tensor as they were; reading a whole checkpoint at each start would take
    minutes.

    Raises:
        OSError: if there is no config.json.
        safetensors.SafetensorError, UserError: if a file is damaged.
    """
    from hqqplus.shards import read_header

    def parts() -> Iterator[bytes]:
        yield _config(folder / "config.json")
        found = [tensor for path in weight_files(folder) for tensor in read_header(path).values()]
        for tensor in sorted(found, key=lambda tensor: tensor.name):
            yield f"{tensor.name} {tensor.dtype} {tensor.shape}".encode()
            with open(tensor.path, "rb") as file:
                for start in (0, max(0, tensor.size - SAMPLE_BYTES)):
                    file.seek(tensor.start + start)
                    yield file.read(min(SAMPLE_BYTES, tensor.size))

    return digest_of(parts())


def _config(path: Path) -> bytes:
    content = path.read_bytes()
    try:
        values = json.loads(content)
        for name in _NOT_OF_THE_MODEL:
            values.pop(name, None)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return content
    return json.dumps(values, sort_keys=True).encode()


# Tokenizers ----------------------------------------------------------------------------------------------------------


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of what `tokenizer` makes of a text: vocabulary, merges, normalisation, splitting, special tokens.

    Not of the padding token, which is masked wherever it stands, nor of what the last call asked for (truncation,
    the length to pad to). A tokenizer in Python is told by its class, its vocabulary and what it makes of a few texts.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        kind, vocabulary = type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())
        return text_digest([kind, vocabulary, special, [tokenizer(text)["input_ids"] for text in _PROBES]])
    described = {name: part for name, part in json.loads(backend.to_str()).items() if name not in _OF_THE_CALL}
    return text_digest([_without_nothing(described), special])


def _without_nothing(value: Any) -> Any:
    """`value` without keys that hold None: what a later version of a library may say of an old thing."""
    if isinstance(value, dict):
        return {name: _without_nothing(part) for name, part in value.items() if part is not None}
    return [_without_nothing(part) for part in value] if isinstance(value, list) else value


def template_digest(tokenizer: Any) -> str:
    """A digest of the chat template of `tokenizer`, or of all where it has several; "none" where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return text_digest(template) if template else "none"


# Files ---------------------------------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """A digest of the contents of file `path`: of all of it up to 256 MiB, of size and 64 MiB spread evenly above.

    Raises:
        OSError: if it cannot be read.
    """
    size = path.stat().st_size

    def parts() -> Iterator[bytes]:
        yield f"{size}:".encode()
        with open(path, "rb") as file:
            if size <= WHOLE_FILE_BYTES:
                while piece := file.read(2**20):
                    yield piece
                return
            for number in range(PIECES):
                file.seek((size - PIECE_BYTES) * number // (PIECES - 1))
                yield file.read(PIECE_BYTES)

    return digest_of(parts())
