"""safetensors files in pieces: read as the library would, written byte for byte as it would."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hqqplus.errors import UserError
from hqqplus.shards import _DTYPES, SafetensorsWriter, byte_size, read_header


def form(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.rand(shape, generator=generator) * 100).to(dtype)


def all_kinds() -> dict[str, torch.Tensor]:
    """Tensors of every type that the format and torch share, of odd sizes, a scalar and an empty one."""
    tensors = {f"{side}.{code}": some(dtype, *size) for code, dtype in _DTYPES.items() for side, size in SIDES.items()}
    return {**tensors, "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "ä.ö": some(torch.uint8, 7)}


SIDES = {"a": (3, 5), "b": (1,), "z": (2, 3, 1)}


def write(path: Path, tensors: dict[str, torch.Tensor], order: list[str] | None = None) -> None:
    with SafetensorsWriter(path, {name: form(tensor) for name, tensor in tensors.items()}) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])


def test_a_file_is_the_one_that_the_library_writes(tmp_path: Path) -> None:
    tensors = all_kinds()
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    for order in (list(tensors), sorted(tensors, reverse=True)):
        write(tmp_path / "ours.safetensors", tensors, order)
        content = (tmp_path / "ours.safetensors").read_bytes()
        assert content == (tmp_path / "theirs.safetensors").read_bytes()
    assert SafetensorsWriter.size({name: form(tensor) for name, tensor in tensors.items()}) == len(content)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda n: n != "__metadata__"
        ),
        st.tuples(st.sampled_from(list(_DTYPES.values())), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=8,
    )
)
def test_any_names_and_shapes(tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("any")
    tensors = {name: some(dtype, *shape) for name, (dtype, shape) in kinds.items()}
    write(folder / "a.safetensors", tensors)
    for found in (load_file(folder / "a.safetensors"), read_back(folder / "a.safetensors")):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert form(found[name]) == form(tensor)
            assert bytes_of(found[name]) == bytes_of(tensor)


def read_back(path: Path) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in read_header(path).items()}


def test_a_tensor_is_read_and_written_in_pieces(tmp_path: Path) -> None:
    tensors = {"w": some(torch.bfloat16, 13, 7), "q": some(torch.uint8, 9)}
    save_file(tensors, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert {name: (stored.shape, stored.dtype, stored.size) for name, stored in header.items()} == {
        name: (*form(tensor), byte_size(form(tensor))) for name, tensor in tensors.items()
    }
    pieces = list(header["w"].pieces(size=33))  # not a multiple of an element
    assert [piece.numel() for piece in pieces] == [16, 16, 16, 16, 16, 11]
    with SafetensorsWriter(tmp_path / "b.safetensors", {name: form(t) for name, t in tensors.items()}) as writer:
        writer.write_pieces("w", iter(pieces))
        writer.write("q", tensors["q"].clone().view(3, 3).t().t().view(9))
    for name, tensor in load_file(tmp_path / "b.safetensors").items():
        assert torch.equal(tensor, tensors[name])


def test_the_order_is_that_of_the_file(tmp_path: Path) -> None:
    save_file({"a": some(torch.uint8, 3), "b": some(torch.float32, 3), "c": some(torch.int64, 1)}, tmp_path / "f")
    assert list(read_header(tmp_path / "f")) == ["c", "b", "a"]


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "f", {"a": ((2, 3), torch.uint8)}) as writer:
        with pytest.raises(ValueError, match=r"a: torch.uint8 of \(3, 2\), announced was"):
            writer.write("a", some(torch.uint8, 3, 2))
        with pytest.raises(ValueError, match=r"a: torch.int8 of \(2, 3\), announced was"):
            writer.write("a", some(torch.int8, 2, 3))
        with pytest.raises(ValueError, match="a: the pieces are not the whole tensor"):
            writer.write_pieces("a", [some(torch.uint8, 5)])
        writer.write("a", some(torch.uint8, 2, 3))


def test_a_file_in_work_is_continued(tmp_path: Path) -> None:
    tensors = {"a": some(torch.float32, 3), "b": some(torch.uint8, 5), "c": some(torch.uint8, 6)}
    forms = {name: form(tensor) for name, tensor in tensors.items()}
    for first in ("a", "c"):
        writer = SafetensorsWriter(tmp_path / "f", forms)
        writer.write(first, tensors[first])
        del writer
        assert SafetensorsWriter.fits(tmp_path / "f", forms)
        with SafetensorsWriter(tmp_path / "f", forms, resume=True) as writer:
            for name in forms:
                if name != first:
                    writer.write(name, tensors[name])
        write(tmp_path / "at once", tensors)
        assert (tmp_path / "f").read_bytes() == (tmp_path / "at once").read_bytes()
    # Of other tensors it is begun anew.
    other = {**forms, "b": ((4,), torch.uint8)}
    assert not SafetensorsWriter.fits(tmp_path / "f", other)
    assert not SafetensorsWriter.fits(tmp_path / "none", forms)
    with SafetensorsWriter(tmp_path / "f", other, resume=True) as writer:
        assert (tmp_path / "f").stat().st_size < SafetensorsWriter.size(forms)
        for name, (shape, dtype) in other.items():
            writer.write(name, some(dtype, *shape))


def test_a_disk_that_takes_part_of_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, place: real(handle, data[:5], place))
    tensors = {"a": some(torch.float32, 17), "b": some(torch.uint8, 31)}
    write(tmp_path / "f", tensors)
    for name, tensor in load_file(tmp_path / "f").items():
        assert torch.equal(tensor, tensors[name])


def test_an_error_is_passed_on_and_the_file_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(3):
        with pytest.raises(OSError, match="no space left"):
            write(tmp_path / "f", {"a": some(torch.float32, 17)})
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("cut", [3, 30, -1])
def test_a_damaged_file_is_refused(tmp_path: Path, cut: int) -> None:
    save_file({"a": some(torch.float32, 17)}, tmp_path / "f")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:cut])
    with pytest.raises(SafetensorError):
        read_header(tmp_path / "f")


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    save_file({"a": some(torch.float32, 17)}, tmp_path / "f.safetensors")
    stored = read_header(tmp_path / "f.safetensors")["a"]
    (tmp_path / "f.safetensors").write_bytes((tmp_path / "f.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"^f\.safetensors: the file has become shorter"):
        stored.read()


def test_a_type_that_torch_lacks_is_named(tmp_path: Path) -> None:
    save_file({"a": some(torch.uint8, 4)}, tmp_path / "f.safetensors")
    content = (tmp_path / "f.safetensors").read_bytes()
    # Exponents alone, 8 bits: the header keeps its length.
    changed = content.replace(b'"dtype":"U8","shape":[4],', b'"dtype":"F8_E8M0","shape":[4],')
    length = int.from_bytes(content[:8], "little") + len(changed) - len(content)
    (tmp_path / "f.safetensors").write_bytes(length.to_bytes(8, "little") + changed[8:])
    with pytest.raises(UserError, match=r"^f\.safetensors: a is of type F8_E8M0, which is not supported"):
        read_header(tmp_path / "f.safetensors")
