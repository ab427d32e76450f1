"""A packed folder with one bit flipped, in every region of its weights: refused, and said where."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import hqqplus
from hqqplus import models
from hqqplus.adapters import Fingerprint, ship_adapter
from hqqplus.errors import UserError
from hqqplus.integrations.transformers import HqqPlusConfig
from hqqplus.shards import read_header
from hqqplus.untrusted import SINGLE
from tests.fuzz.oracle import check_sentence


@pytest.fixture(scope="module")
def made(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model with all but its norms packed, and an adapter on it."""
    folder = tmp_path_factory.mktemp("made")
    config = HqqPlusConfig(2, 32, overrides={"lm_head": {"nbits": 8}, "*.embed_tokens": {"nbits": 8}})
    hqqplus.quantize_folder(str(random_model("llama")), folder / "base", config)
    model = models.load(folder / "base").requires_grad_(False)
    tokenizer = models.load_tokenizer(str(folder / "base"))
    fingerprint = Fingerprint.read(folder / "base")
    assert fingerprint is not None
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ship_adapter(get_peft_model(model, lora), tokenizer, folder / "adapter", fingerprint, "card")
    return SimpleNamespace(base=folder / "base", adapter=folder / "adapter")


thorough = pytest.mark.parametrize("every", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.long])])


@pytest.fixture
def work(made: SimpleNamespace, tmp_path: Path) -> Path:
    for folder in (made.base, made.adapter):
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path


def flip(path: Path, place: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def refusal(name: Path, adapter: Path | None = None) -> str | None:
    """The message of the refusal; None where the model is loaded."""
    try:
        hqqplus.load(name, adapter, device="cpu")
    except UserError as error:
        check_sentence(str(error))
        return str(error)
    return None


def header_length(path: Path) -> int:
    return int(struct.unpack("<Q", path.read_bytes()[:8])[0])


def test_every_byte_of_the_length_of_the_header(work: Path) -> None:
    path = work / "base" / SINGLE
    for place in range(8):
        for bit in (0, 4, 7):
            flip(path, place, bit)
            assert "a weight file is truncated or damaged" in (refusal(work / "base") or ""), (place, bit)
            flip(path, place, bit)


@thorough
def test_the_header(work: Path, every: bool) -> None:
    """Each byte of the first entries, then one here and there. A flipped bit in a name is another name."""
    path = work / "base" / SINGLE
    length = header_length(path)
    for place in [*range(8, 208, 1 if every else 7), *range(208, 8 + length, 47 if every else 499), 8 + length - 1]:
        flip(path, place, place % 8)
        message = refusal(work / "base")
        flip(path, place, place % 8)
        if message is None:
            # What it says of itself ("format": "pt"), or blanks at its end, are all that may change unnoticed.
            text = path.read_bytes()[8 : 8 + length]
            metadata = text.index(b"}") + 1
            assert place - 8 < metadata or not text[place - 8 :].strip(), place
    assert refusal(work / "base") is None


@thorough
def test_every_tensor(work: Path, every: bool) -> None:
    """The first byte, one in the middle and the last of each; in the fast tests one of the three."""
    path = work / "base" / SINGLE
    quiet = []
    for number, (name, tensor) in enumerate(read_header(path).items()):
        places = [tensor.start, tensor.start + tensor.size // 2, tensor.start + tensor.size - 1]
        for place in places if every else places[number % 3 : number % 3 + 1]:
            flip(path, place)
            message = refusal(work / "base")
            flip(path, place)
            if message is None:
                quiet.append(name)
            else:
                assert "this packed model is not the one that it was written as" in message
                assert "packed weights: " in message
    # Only what is packed has a hash: what is left in floats are the norms.
    assert {name.split(".")[-2] for name in quiet} == {"norm", "input_layernorm", "post_attention_layernorm"}


def test_an_adapter_notices_it_too(work: Path) -> None:
    path = work / "base" / SINGLE
    place = next(tensor.start for name, tensor in read_header(path).items() if name.endswith("q_proj.W_q"))
    flip(path, place)
    message = refusal(work / "base", work / "adapter")
    assert message is not None
    assert message.startswith(f"{work / 'adapter'}: ")
    assert "sha256" in message


def test_a_damaged_folder_can_be_read_on_purpose(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = work / "base" / SINGLE
    flip(path, path.stat().st_size - 1)
    model = hqqplus.load(work / "base", device="cpu", allow_mismatch=True)
    assert torch.isfinite(model(torch.arange(3, 9)[None]).logits).all()
    assert "is not the one that it was written as" in caplog.text


def test_what_is_cut_off_or_added(work: Path) -> None:
    path = work / "base" / SINGLE
    content = path.read_bytes()
    for changed in (content[:-1], content + b"\0", content[:8], content[:4], b"", content[: len(content) // 2]):
        path.write_bytes(changed)
        assert "a weight file is truncated or damaged" in (refusal(work / "base") or "")


def test_offsets_of_the_header(work: Path) -> None:
    """Tensors that overlap, leave a gap, or end behind the file."""
    path = work / "base" / SINGLE
    content = path.read_bytes()
    length = header_length(path)
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    for name in (names[0], names[len(names) // 2], names[-1]):
        for change in ((0, 1), (1, 0), (-1, 0), (2**40, 2**40), (2**63, 2**63)):
            changed = json.loads(json.dumps(header))
            changed[name]["data_offsets"] = [
                at + by for at, by in zip(header[name]["data_offsets"], change, strict=True)
            ]
            text = json.dumps(changed).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
            assert "a weight file is truncated or damaged" in (refusal(work / "base") or ""), (name, change)


@thorough
def test_the_adapter(work: Path, every: bool) -> None:
    """The length of the header and the names, types and shapes in it; its tensors have no hash of their own."""
    path = work / "adapter" / "adapter_model.safetensors"
    length = header_length(path)
    content = path.read_bytes()
    metadata = content.index(b"}") + 1
    names = range(metadata, metadata + 200, 3 if every else 23)
    for place in (*range(8), *names, *range(metadata, 8 + length, 61 if every else 499)):
        if content[place : place + 1].isspace():
            continue
        flip(path, place, 1)
        assert refusal(work / "base", work / "adapter") is not None, (place, content[place - 20 : place + 20])
        flip(path, place, 1)
    assert refusal(work / "base", work / "adapter") is None
    path.write_bytes(content[: 8 + length + 10])
    assert "a weight file is truncated or damaged" in (refusal(work / "base", work / "adapter") or "")


def test_an_adapter_that_lacks_a_tensor(work: Path) -> None:
    path = work / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[3]
    kept = {other: tensor for other, tensor in tensors.items() if other != name}
    save_file(kept, path, metadata={"format": "pt"})
    assert f"the adapter lacks {name}" in (refusal(work / "base", work / "adapter") or "")
    save_file({**kept, f"{name}x": tensors[name].clone(), name: tensors[name]}, path, metadata={"format": "pt"})
    assert f"the adapter has {name}x, which has no place in the model" in (
        refusal(work / "base", work / "adapter") or ""
    )
