"""safetensors files, a tensor at a time: read without mapping the file, written without holding it.

A file is 8 bytes (the header's length, little-endian), a header in JSON, and the tensors:

    {"__metadata__": {"format": "pt"}, "name": {"dtype": "U8", "shape": [2, 3], "data_offsets": [0, 6]}, ...}

with offsets from the end of the header. Shapes are known before anything is computed, so the header is written first
and each tensor goes to its place when it is there. A mapped file would do for reading, but its pages count as memory
of the process for as long as the file is open.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from hqqplus.errors import UserError

# In the order in which the safetensors library lays tensors out: the last come first, equals by name. Larger types
# first keeps everything aligned.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}
_HEADER_LENGTH = 8

Form = tuple[tuple[int, ...], torch.dtype]
"""What is known of a tensor before it is there: its shape and dtype."""


def byte_size(form: Form) -> int:
    """The bytes of a tensor of that form."""
    shape, dtype = form
    return prod(shape) * dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `start` in bytes from the beginning of file `path`."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return byte_size((self.shape, self.dtype))

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            UserError: if the file has become shorter.
        """
        return self._read(0, self.size).reshape(self.shape)

    def part(self, index: int) -> Tensor:
        """Entry `index` of the first dimension, in memory of its own."""
        size = byte_size((self.shape[1:], self.dtype))
        return self._read(index * size, size).reshape(self.shape[1:])

    def pieces(self, size: int = 2**26) -> Iterable[Tensor]:
        """The tensor flattened, in pieces of at most `size` bytes."""
        size -= size % self.dtype.itemsize
        for first in range(0, self.size, size):
            yield self._read(first, min(size, self.size - first))

    def _read(self, first: int, count: int) -> Tensor:
        buffer = torch.empty(count, dtype=torch.uint8)
        view, got = buffer.numpy().data, 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start + first)
            while got < count:
                read = file.readinto(view[got:])
                if not read:
                    raise UserError(f"{self.path.name}: the file has become shorter while it was read")
                got += read
        return buffer.view(self.dtype)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Name -> place of each tensor of a safetensors file, in the order of the file.

    Raises:
        safetensors.SafetensorError: if the file is truncated or damaged.
        UserError: if a tensor is of a type that torch does not have.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt"):
        pass  # the library checks that header and length agree
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UserError(f"{path.name}: {name} is of type {entry['dtype']}, which is not supported")
        start = _HEADER_LENGTH + length + entry["data_offsets"][0]
        found[name] = StoredTensor(path, name, tuple(entry["shape"]), dtype, start)
    return dict(sorted(found.items(), key=lambda item: item[1].start))


class SafetensorsWriter:
    """Writes a safetensors file, tensors in any order: `with SafetensorsWriter(path, forms) as writer: ...`.

    The file under `path` is not whole before `close`; to give it its final name is the caller's part. With `resume` a
    file that was begun with the same forms is continued: tensors written to it then need not be written again.

    Args:
        path: the file.
        forms: name -> (shape, dtype) of all tensors.
        resume: continue a file that is there.
    """

    def __init__(self, path: Path, forms: Mapping[str, Form], resume: bool = False) -> None:
        self._header, self._places = _layout(forms)
        self._forms = forms
        resume = resume and self.fits(path, forms)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | (0 if resume else os.O_TRUNC), 0o644)
        try:
            if not resume:
                self._put(memoryview(self._header), 0)
        except BaseException:
            os.close(self._handle)
            raise

    @staticmethod
    def fits(path: Path, forms: Mapping[str, Form]) -> bool:
        """Whether `path` is a file that was begun with these forms."""
        header, _ = _layout(forms)
        try:
            with open(path, "rb") as file:
                return file.read(len(header)) == header
        except OSError:
            return False

    @staticmethod
    def size(forms: Mapping[str, Form]) -> int:
        """Bytes of the whole file."""
        return len(_layout(forms)[0]) + sum(byte_size(form) for form in forms.values())

    def write(self, name: str, tensor: Tensor) -> None:
        """Put `tensor` in its place.

        Raises:
            ValueError: if its shape or dtype is another one than was announced.
            OSError: if the disk is full, for one.
        """
        if (tuple(tensor.shape), tensor.dtype) != self._forms[name]:
            raise ValueError(f"{name}: {tensor.dtype} of {tuple(tensor.shape)}, announced was {self._forms[name]}")
        self.write_pieces(name, [tensor])

    def write_pieces(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Put a tensor in its place that comes in pieces, which one after the other are its elements."""
        place = self._places[name]
        for piece in pieces:
            data = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            self._put(data, place)
            place += len(data)
        if place != self._places[name] + byte_size(self._forms[name]):
            raise ValueError(f"{name}: the pieces are not the whole tensor")

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(self._handle)

    def close(self) -> None:
        """Finish the file: all of it is on the disk afterwards."""
        self.sync()
        os.close(self._handle)
        self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._handle >= 0:
            os.close(self._handle)

    def _put(self, data: memoryview, place: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._handle, data[done:], place + done)


def _layout(forms: Mapping[str, Form]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and where in it each tensor begins."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, offsets = 0, {}
    for name in sorted(forms, key=lambda name: (-_RANK[forms[name][1]], name)):
        (shape, dtype), offsets[name] = forms[name], offset
        offset += byte_size(forms[name])
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offsets[name], offset]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    first = len(text).to_bytes(_HEADER_LENGTH, "little") + text
    return first, {name: len(first) + at for name, at in offsets.items()}
