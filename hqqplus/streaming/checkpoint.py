"""Checkpoints as they lie on the disk or on the hub: which files, of what type, and whether they are still those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqplus import models
from hqqplus.errors import NotStreamable, UserError
from hqqplus.shards import StoredTensor
from hqqplus.untrusted import INDEX, SINGLE, indexed_files, weight_files

# What a checkpoint has beside its weights.
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def fetch(name: str, revision: str | None, trust_remote_code: bool, where: str) -> tuple[Path, list[str], str | None]:
    """Find checkpoint `name`, a folder or a hub id; of a hub model no more is downloaded than is needed.

    Returns:
        The folder, the names of its safetensors files as transformers would take them, and the commit of a hub model.

    Raises:
        UserError: if there are none, or the index is of no use.
        NotStreamable: if there is more to the model than its weights.
    """
    if models.is_local(name, where):
        folder = Path(models.resolve_name(name))
        return folder, _weight_files(folder), None
    from huggingface_hub import snapshot_download

    small = [*_SMALL_FILES, *(["*.py"] if trust_remote_code else [])]
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=small))
    commit = folder.name if folder.parent.name == "snapshots" else None
    # The index says which files are the model's: a repository may hold the weights in other formats besides.
    wanted = indexed_files(folder) or [SINGLE]
    folder = Path(snapshot_download(name, revision=commit or revision, allow_patterns=[*small, *wanted]))
    return folder, _weight_files(folder), commit


def _weight_files(folder: Path) -> list[str]:

    if (folder / "adapter_config.json").is_file():
        raise NotStreamable("comes with an adapter")
    names = weight_files(folder)
    if not names:
        raise UserError(f"there is neither {SINGLE} nor {INDEX}")
    return names


def identity(folder: Path, files: list[str], commit: str | None) -> dict[str, Any]:
    """What tells this checkpoint from another: the commit, and size and time of the files that matter."""
    stats = {name: (folder / name).stat() for name in ("config.json", *files)}
    # Of a hub model the commit says it all, and times are those of the download.
    return {
        "commit": commit,
        "files": {name: [s.st_size, *([] if commit else [s.st_mtime_ns])] for name, s in stats.items()},
    }


@dataclass(frozen=True)
class FusedTensor:
    """A tensor [experts, rows, columns] of the model that a checkpoint holds in pieces, maybe in several files.

    Attributes:
        name: in the model.
        experts: of each expert the parts of its matrix, which stand one under the other.
    """

    name: str
    experts: tuple[tuple[StoredTensor, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """As the first expert's parts give it; `is_even` says whether the others agree."""
        rows, columns = sum(part.shape[0] for part in self.experts[0]), self.experts[0][0].shape[1:]
        return (len(self.experts), rows, *columns)

    @property
    def is_even(self) -> bool:
        """Whether all experts are of the same matrices."""
        shapes = {tuple(part.shape for part in parts) for parts in self.experts}
        (first, *others) = shapes
        return not others and all(len(shape) == 2 and shape[1] == first[0][1] for shape in first)

    def matrix(self, index: int, dtype: torch.dtype) -> Tensor:
        """The matrix of an expert, in `dtype`."""
        return torch.cat([part.read().to(dtype) for part in self.experts[index]])

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The experts' matrices one after the other, in `dtype`."""
        return (self.matrix(index, dtype) for index in range(len(self.experts)))


@dataclass(frozen=True)
class WholeTensor:
    """A tensor of the model that a checkpoint holds as it is, maybe under another name."""

    name: str
    stored: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def matrix(self, index: int, dtype: torch.dtype) -> Tensor:
        """Of a tensor [experts, rows, columns] the matrix of an expert, in `dtype`."""
        return self.stored.part(index).to(dtype)

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The tensor flattened, in pieces and in `dtype`."""
        return (piece.to(dtype) for piece in self.stored.pieces())


def dtype_of(header: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype of a checkpoint by its first floating tensor, as transformers finds it."""
    tensors = (tensor.dtype for _, tensor in sorted(header.items()))
    return next((dtype for dtype in tensors if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)
