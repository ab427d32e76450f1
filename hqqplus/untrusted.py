"""Files that came from somewhere else: read within limits, and never outside of the folder that they were given with.

A checkpoint is a folder of files that name one another, by whoever made it. What may lie in it, and what is asked of
it here before any library gets to see it:

    *.json             text in UTF-8, of a size that such files have, nested as they are, an object
    *.index.json       names of files beside it, and of no others
    *.safetensors      a header that agrees with the length of the file, and with itself
    config.json        no more layers than tensors; the model that it describes has the size of the checkpoint
    links              none that lead out of the folder, but those of the Hugging Face cache to its own files

Pickled weights are never read, neither a model's nor an adapter's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from hqqplus.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The largest JSON files in use are indices of mixtures of experts, of some 10 MB. Python makes ten times that of it.
MAX_JSON_BYTES = 2**26
_READ = (".json", ".safetensors", ".txt", ".model", ".jinja", ".tiktoken", ".py")
# How deep rows of data may be nested, and up to which size a file of them is looked at as a whole.
MAX_DEPTH, _SMALL_JSON_BYTES = 200, 2**20
# What a model has at least of layers, however few tensors it shares among them.
_FEW_LAYERS = 256
# How many times the bytes on the disk a model may take in memory: 16-bit floats become 32-bit ones.
_GROWTH, _SMALL_BYTES = 4, 2**26
# Settings that are numbers of modules, each of which is made one by one.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STRING, _BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL), re.compile(rb"[\[\]{}]")
# null, NaN, -Infinity: as a row, or as an item of a list.
_WORD, _WORD_ITEM = re.compile(rb"-?[A-Za-z]"), re.compile(rb"[\[,]\s*-?[A-Za-z]")
_BLANK = b"\xef\xbb\xbf \t\r\n"
_LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks)")


# Text ----------------------------------------------------------------------------------------------------------------


def read_json(path: str | Path) -> Any:
    """What JSON file `path` holds.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON in UTF-8, is larger than `MAX_JSON_BYTES`, or is nested too deeply; in words.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"it is larger than {MAX_JSON_BYTES // 2**20} MiB")
    try:
        values = json.loads(content.decode("utf-8"))
        if _SURROGATE.search(content):  # half a character, which no file can hold: what is read is written again
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        return values
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("it has half a character in it, of the kind of \\ud800") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def arrow_fault(path: str | Path, most: int | None = None) -> str | None:
    """What JSON file `path`, lines or a list, has in it that ends the process when Arrow reads it, in words.

    Nesting of some thousand levels runs off its stack, and a row that is `null` (as which `datasets` writes NaN and
    infinity) makes it follow a null pointer: seen with pyarrow 26. Reads the whole file, a line at a time, at 0.5 GB/s
    or more.

    Args:
        most: look at no more than about so many bytes of a file of lines.

    Raises:
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(64).lstrip(_BLANK)[:1] == b"[":
            return _list_fault(path)
        file.seek(0)
        seen, lines = 0, None
        for number, line in enumerate(file, start=1):
            text = line.lstrip(_BLANK)
            if lines is None and text:
                lines = text[:1] == b"{" and text.rstrip()[-1:] == b"}"  # or one object over many lines
                if _WORD.match(text):
                    return f"line {number}: expected one JSON object {{...}} a line, got {_word(text)}"
            if lines and _WORD.match(text):
                return f"line {number}: expected one JSON object {{...}} a line, got {_word(text)}"
            if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
                return f"line {number}: nested deeper than {MAX_DEPTH} levels: this is no row of text"
            seen += len(line)
            if most is not None and seen >= most:
                break
        if os.path.getsize(path) <= _SMALL_JSON_BYTES:
            file.seek(0)
            if _depth(file.read()) > MAX_DEPTH:
                return f"nested deeper than {MAX_DEPTH} levels: these are no rows of text"
    return None


def _list_fault(path: str | Path) -> str | None:
    """The same for a file that is a list, which is read as a whole in any case."""
    content = Path(path).read_bytes()
    if _depth(content) > MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH} levels: these are no rows of text"
    if _WORD_ITEM.search(_STRING.sub(b'""', content)) is None:
        return None
    try:
        items = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        return f"not valid JSON: {error}"
    number = next((number for number, item in enumerate(items, start=1) if not isinstance(item, dict | str)), None)
    return None if number is None else f"item {number}: expected an object {{...}}"


def _word(text: bytes) -> str:
    return text.split()[0][:20].decode("utf-8", "replace")


def _depth(text: bytes) -> int:
    depth = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", text)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in file `path`.

    Raises:
        UserError: if there is none: the name of the file, and what is wrong with it.
    """
    name = Path(path).name
    try:
        values = read_json(path)
    except ValueError as error:
        what = f"a JSON file of it is truncated or damaged: {name} is not a valid JSON file ({error})"
        raise UserError(what) from None
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{name} holds no JSON object")
    return values


# Paths ---------------------------------------------------------------------------------------------------------------


def inside(folder: str | Path, name: Any, named_by: str) -> Path:
    """The path of file `name` in `folder`, whatever file `named_by` there says that it is called.

    Raises:
        UserError: if it is no relative path that stays in the folder, or a link that leaves it.
    """
    refusal = f"{named_by}: {_quoted(name)} is not the name of a file in its folder"
    if not isinstance(name, str) or not name or not name.isprintable() or "\\" in name:
        raise UserError(refusal)
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or ".." in parts or not parts or ":" in parts[0]:
        raise UserError(refusal)
    path = Path(folder, *parts)
    check_link(folder, path)
    return path


def check_link(folder: str | Path, path: Path) -> None:
    """Refuse `path` in `folder` if it is a link, or lies behind one, that leads out of the folder.

    Raises:
        UserError: naming the file and where it leads.
    """
    root = os.path.realpath(folder)
    found = os.path.realpath(path)
    if _within(root, found):
        return
    # models--OWNER--NAME/snapshots/COMMIT/FILE is a link to models--OWNER--NAME/blobs/HASH.
    snapshots = os.path.dirname(root)
    if os.path.basename(snapshots) == "snapshots" and _within(
        os.path.join(os.path.dirname(snapshots), "blobs"), found
    ):
        return
    where = os.path.relpath(path, folder)
    raise UserError(f"{where} is a link that leads out of its folder, to {found}: put the file itself there")


def check_links(folder: Path) -> None:
    """`check_link` for every file in `folder` that may be read as a part of a model.

    Raises:
        UserError: as said.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ:
            check_link(folder, path)


def _within(root: str, path: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Models --------------------------------------------------------------------------------------------------------------


def check_model_files(folder: str | Path) -> None:
    """Refuse the model in local folder `folder` where its files cannot be what they should be.

    Weights are not read, only their headers: some milliseconds a file.

    Raises:
        UserError: naming the file in the folder and what is wrong with it.
    """
    folder = Path(folder)
    check_links(folder)
    config = read_object(folder / "config.json")
    for name, value in _settings(config):
        if name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise UserError(f"config.json: {name} is {_quoted(value)}: code of others, which no file may ask for")
    # In files of other names transformers keeps what training in many processes writes.
    names = weight_files(folder, config) or sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise UserError(f"this folder holds no weights (no *.safetensors{_pickled(folder)})")
    _check_layers(config, sum(len(_header(folder, name)) for name in names))


def weight_files(folder: Path, config: Mapping[str, Any] | None = None) -> list[str]:
    """The names of the safetensors files of the model in `folder`, as transformers would take them; maybe none.

    Args:
        config: what `config.json` holds, which may name the file.

    Raises:
        UserError: if one is missing, or would lie somewhere else.
    """
    named = (config or {}).get("transformers_weights")
    if named is not None:
        inside(folder, named, "config.json: transformers_weights")
        names = indexed_files(folder, named) if named.endswith(".index.json") else [named]
    else:
        names = [SINGLE] if (folder / SINGLE).is_file() else indexed_files(folder)
    by = INDEX if named is None else f"config.json ({named})"
    for name in names:
        if not inside(folder, name, by).is_file():
            raise UserError(f"there is no {name}, which {by} names")
    return names


def indexed_files(folder: Path, index: str = INDEX) -> list[str]:
    """The files that the index in `folder` names, sorted; empty without an index.

    Raises:
        UserError: if it is damaged, or names anything but safetensors files beside it.
    """
    if not (folder / index).is_file():
        return []
    weight_map = read_object(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: there is no weight_map in it")
    for name in (names := list(weight_map.values())):
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {_quoted(name)} is not the name of a safetensors file beside it")
    return sorted(set(names))


def check_adapter_files(folder: str | Path) -> list[str]:
    """Refuse the adapter in local folder `folder` where its files cannot be what they should be.

    Returns:
        The names of its tensors.

    Raises:
        UserError: naming the file in the folder and what is wrong with it.
    """
    folder = Path(folder)
    check_links(folder)
    read_object(folder / "adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"this folder holds no weights (no adapter_model.safetensors{_pickled(folder)})")
    return list(_header(folder, "adapter_model.safetensors"))


def check_memory(needed: int, files: Iterable[str | Path]) -> None:
    """Refuse a `config.json` whose model would take far more than its checkpoint holds, before it takes it.

    Args:
        needed: bytes of all parameters and buffers of the model, before they are loaded.
        files: of the checkpoint.

    Raises:
        UserError: with both sizes.
    """
    stored = sum(os.path.getsize(file) for file in files)
    if needed > _GROWTH * stored + _SMALL_BYTES:
        raise UserError(f"config.json describes a model of {needed:,} bytes, and the checkpoint has {stored:,}")


def _header(folder: Path, name: str) -> Mapping[str, Any]:
    from safetensors import SafetensorError

    from hqqplus.shards import read_header

    try:
        return read_header(folder / name)
    except SafetensorError as error:
        said = " ".join(str(error).split())
        said = said if len(said) <= 300 else f"{said[:297]}..."  # it shows values, however long
        raise UserError(f"a weight file is truncated or damaged ({name}: {said})") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or error})") from None


def _pickled(folder: Path) -> str:
    """What to add where there are no weights but pickled ones."""
    found = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    return f"; {found[0]} is a pickle, which may run code, and is not read: convert it" if found else ""


def _check_layers(config: Mapping[str, Any], tensors: int) -> None:
    """A model is made layer by layer before its first tensor is looked for."""
    most = max(_FEW_LAYERS, tensors)
    for name, value in _settings(config):
        if _LAYERS.fullmatch(name) and isinstance(value, int) and value > most:
            raise UserError(f"config.json: {name} is {_quoted(value)}, and the checkpoint has {tensors} tensors")


def _settings(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a configuration, and of those within it."""
    for name, value in values.items():
        yield name, value
        if isinstance(value, dict):
            yield from _settings(value)
