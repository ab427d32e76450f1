"""Digests: the same for the same thing wherever it lies, another for any change that counts, and cheap."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, pre_tokenizers, processors

from hqqplus import digests, models
from hqqplus.digests import (
    SAMPLE_BYTES,
    checkpoint_digest,
    file_digest,
    template_digest,
    tokenizer_digest,
    weight_files,
)

IO = Path("/proc/self/io")


def bytes_read() -> int:
    """What this process has asked the system for in reads so far."""
    return int(dict(line.split(": ") for line in IO.read_text().splitlines())["rchar"])


@pytest.fixture
def parent(random_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of its own, to be changed."""
    return Path(shutil.copytree(random_model("llama"), tmp_path / "parent"))


# Tokenizers ----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_the_same_after_use_saving_and_loading(parent: Path, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(str(parent))
    before = tokenizer_digest(tokenizer)
    assert tokenizer_digest(models.load_tokenizer(str(parent))) == before
    tokenizer(["a", "much longer"], padding="max_length", truncation=True, max_length=3)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    assert tokenizer_digest(tokenizer) == before
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer_digest(tokenizer) == before, "what pads is masked"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_digest(models.load_tokenizer(str(tmp_path / "saved"))) == before


def test_real_tokenizers_are_the_same_after_saving(story_model: Path, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(str(story_model))
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(models.load_tokenizer(str(tmp_path))) == tokenizer_digest(tokenizer)


def edit_vocabulary(path: Path) -> None:
    values = json.loads((path / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (path / "tokenizer.json").write_text(json.dumps(values))


def add_a_merge(path: Path) -> None:
    values = json.loads((path / "tokenizer.json").read_text())
    values["model"]["vocab"]["th"] = 271
    values["model"]["merges"] = [["t", "h"]]
    (path / "tokenizer.json").write_text(json.dumps(values))


def change_the_end(path: Path) -> None:
    values = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**values, "eos_token": "<s>"}))


@pytest.mark.parametrize("edit", [edit_vocabulary, add_a_merge, change_the_end], ids=lambda edit: edit.__name__)
def test_an_edited_file_is_another_tokenizer(parent: Path, edit: Callable[[Path], None]) -> None:
    before = tokenizer_digest(models.load_tokenizer(str(parent)))
    edit(parent)
    assert tokenizer_digest(models.load_tokenizer(str(parent))) != before


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "post_processor", "added"])
def test_every_part_of_a_tokenizer_counts(parent: Path, part: str) -> None:
    tokenizer = models.load_tokenizer(str(parent))
    before, backend = tokenizer_digest(tokenizer), tokenizer.backend_tokenizer
    if part == "normalizer":
        backend.normalizer = normalizers.Lowercase()
    elif part == "pre_tokenizer":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif part == "post_processor":
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    else:
        tokenizer.add_tokens(["word"])
    assert tokenizer_digest(tokenizer) != before


class Spelled:
    """A tokenizer in Python alone."""

    special_tokens_map = {"eos_token": "</s>"}  # noqa: RUF012

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def get_vocab(self) -> dict[str, int]:
        return {"b": 1, "a": 0}

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": [self.first, *(ord(letter) % 2 for letter in text)]}


def test_a_tokenizer_in_python_is_told_by_what_it_does() -> None:
    assert tokenizer_digest(Spelled()) == tokenizer_digest(Spelled())
    assert tokenizer_digest(Spelled()) != tokenizer_digest(Spelled(first=1))


def test_chat_templates(parent: Path, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(str(parent))
    assert template_digest(tokenizer) == "none"
    found = []
    for template in ("{{ messages }}", "{{ messages }} ", {"default": "{{ messages }}", "tools": "x"}):
        tokenizer.chat_template = template
        found.append(template_digest(tokenizer))
        tokenizer.save_pretrained(tmp_path / "saved")
        assert template_digest(models.load_tokenizer(str(tmp_path / "saved"))) == found[-1]
        shutil.rmtree(tmp_path / "saved")
    assert len({*found, "none"}) == 4


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_a_copy_of_a_checkpoint_is_the_same_in_however_many_files(parent: Path, tmp_path: Path) -> None:
    before = checkpoint_digest(parent)
    tensors = sorted(load_file(parent / "model.safetensors").items())
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, part in zip(names, (tensors[7:], tensors[:7]), strict=True):
        save_file(dict(part), folder / name, metadata={"format": "pt"})
    places = {key: name for name, part in zip(names, (tensors[7:], tensors[:7]), strict=True) for key, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = json.loads((parent / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**dict(reversed(config.items())), "transformers_version": "9"}))
    assert checkpoint_digest(folder) == before
    # The same weights in another format, as some repositories have them besides.
    save_file(dict(tensors[:1]), folder / "consolidated.safetensors")
    assert checkpoint_digest(folder) == before
    (folder / names[0]).unlink()
    assert weight_files(folder) == []


@pytest.mark.parametrize("change", ["first", "last", "name", "dtype", "config"])
def test_what_makes_another_checkpoint(parent: Path, change: str) -> None:
    before = checkpoint_digest(parent)
    tensors = load_file(parent / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    assert tensors[key].nbytes > 2 * SAMPLE_BYTES
    if change == "name":
        tensors["model.layers.0.mlp.other_proj.weight"] = tensors.pop(key)
    elif change == "dtype":
        tensors[key] = tensors[key].view(torch.int32)
    elif change == "config":
        config = json.loads((parent / "config.json").read_text())
        (parent / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    else:
        tensors[key].view(-1)[0 if change == "first" else -1] += 1e-3
    save_file(tensors, parent / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_digest(parent) != before


@pytest.mark.skipif(not IO.exists(), reason="needs Linux's count of the bytes that a process reads")
def test_of_a_huge_checkpoint_a_few_megabytes_are_read(tmp_path: Path) -> None:
    """64 GiB that are all hole, in files as large ones come in: both ends of each of 320 tensors, and headers."""
    count, size, places = 20, 2**32 // 20 // 4 * 4, {}
    for number in range(16):
        names = [f"model.layers.{number}.{n}.weight" for n in range(count)]
        header = {
            name: {"dtype": "F32", "shape": [size // 4], "data_offsets": [n * size, (n + 1) * size]}
            for n, name in enumerate(names)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = tmp_path / f"model-{number:05}.safetensors"
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + count * size)
        places |= dict.fromkeys(names, path.name)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    before = bytes_read()
    digest = checkpoint_digest(tmp_path)
    assert bytes_read() - before < 10 * 2**20
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert checkpoint_digest(tmp_path) != digest


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_file_of_usual_size_is_read_whole(tmp_path: Path) -> None:
    path, seen = tmp_path / "rows.jsonl", set()
    content = bytearray(3 * 2**20)
    for place in (None, 0, 2**20 - 1, 2**20, 2**21 + 12345, len(content) - 1):
        changed = bytearray(content)
        if place is not None:
            changed[place] = 1
        path.write_bytes(changed)
        seen.add(file_digest(path))
    path.write_bytes(content + b"\0")
    assert len({*seen, file_digest(path)}) == 7
    digest = file_digest(path)
    assert file_digest(path.rename(tmp_path / "other.jsonl")) == digest


@pytest.mark.skipif(not IO.exists(), reason="needs Linux's count of the bytes that a process reads")
def test_of_a_huge_file_pieces_from_all_over_are_read(tmp_path: Path) -> None:
    path, size = tmp_path / "rows.jsonl", 64 * 2**30
    with open(path, "wb") as file:
        file.truncate(size)
    before = bytes_read()
    seen = {file_digest(path)}
    assert bytes_read() - before < 1.5 * digests.PIECES * digests.PIECE_BYTES
    piece = (size - digests.PIECE_BYTES) * 500 // (digests.PIECES - 1)
    for place in (0, size - 1, piece):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.add(file_digest(path))
    with open(path, "ab") as file:
        file.truncate(size + 1)
    assert len({*seen, file_digest(path)}) == 5
