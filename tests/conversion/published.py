"""Checkpoints as others publish them, written from the definition of their formats: number by number, as text says it.

Nothing of `hqqplus.conversion` is used here. A checkpoint comes with the weights that its format says it has, in
float64.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DTYPE = torch.float16


@dataclass
class Published:
    """A checkpoint in `folder`, and `weights`: module name -> its matrix in float64."""

    folder: Path
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)

    def write(self) -> Published:
        save_file({name: t.contiguous() for name, t in self.tensors.items()}, self.folder / "model.safetensors")
        (self.folder / "config.json").write_text(json.dumps(self.config))
        return self


def words(codes: list[int], bits: int, word_bits: int = 32) -> list[int]:
    """Codes as one long number, the first at the low end, cut into words."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    count = -(-len(codes) * bits // word_bits)
    return [number >> (word_bits * n) & (1 << word_bits) - 1 for n in range(count)]


def int32(values: list[list[int]]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.int32).copy())


def publish(
    parent: Path,
    folder: Path,
    pack: Callable[[str, tuple[int, int]], tuple[dict[str, Tensor], Tensor]],
    quantization: dict[str, Any] | None,
    dtype: torch.dtype = DTYPE,
    only: Callable[[str], bool] = lambda name: name.endswith("_proj"),
) -> Published:
    """`parent` with the layers that `only` picks packed by `pack`: (name, shape) -> (tensors, float64 matrix)."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in parent.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith("index.json"):
            shutil.copy(path, folder)
    config = json.loads((parent / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    if quantization is not None:
        config["quantization_config"] = quantization
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in load_file(parent / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if tensor.dim() == 2 and only(layer):
            made, weights[layer] = pack(layer, (tensor.shape[0], tensor.shape[1]))
            tensors |= {f"{layer}.{key}": value for key, value in made.items()}
        else:
            tensors[name] = tensor.to(dtype)
    return Published(folder, weights, tensors, config).write()


def scales(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = DTYPE) -> Tensor:
    """As those of real weights are, and no round numbers."""
    return (0.01 + 0.03 * torch.rand(shape, generator=generator)).to(dtype)


def gptq(
    bits: int,
    group: int,
    version: int = 1,
    lowest_zero: int = 1,
    seed: int = 0,
    dtype: torch.dtype = DTYPE,
    symmetric: bool = False,
) -> Callable[[str, tuple[int, int]], tuple[dict[str, Tensor], Tensor]]:
    """GPTQ: W[i, o] = scales[g, o] (q[i, o] - z[g, o]); version 1 stores z - 1."""
    generator = torch.Generator().manual_seed(seed)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        rows, width = shape
        size = width if group == -1 else group
        groups = -(-width // size)
        q = torch.randint(0, 2**bits, (width, rows), generator=generator)
        z = torch.randint(lowest_zero, 2**bits, (groups, rows), generator=generator)
        if symmetric:
            z.fill_(2 ** (bits - 1))
        s = scales((groups, rows), generator, dtype)
        g_idx = torch.tensor([i // size for i in range(width)], dtype=torch.int32)
        columns = [words(q[:, o].tolist(), bits) for o in range(rows)]
        stored = [words(row, bits) for row in z.tolist()]
        if version == 1:
            ones = words([1] * rows, bits)
            stored = [[(word - one) % 2**32 for word, one in zip(row, ones, strict=True)] for row in stored]
        weight = torch.empty(rows, width, dtype=torch.float64)
        for i in range(width):
            g = int(g_idx[i])
            weight[:, i] = s[g].double() * (q[i] - z[g]).double()
        made = {"qweight": int32(columns).t().contiguous(), "qzeros": int32(stored), "scales": s, "g_idx": g_idx}
        return made, weight

    return pack


def gptq_config(bits: int, group: int, version: int = 1, **more: Any) -> dict[str, Any]:
    form = {1: "gptq", 2: "gptq_v2"}[version]
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "checkpoint_format": form,
    } | more


def ternary(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)


def bitnet(
    inverse: bool, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Callable[[str, tuple[int, int]], tuple[dict[str, Tensor], Tensor]]:
    """BitNet: byte [r, i] holds t + 1 of rows r, r + R, r + 2R, r + 3R; W = t / scale (`inverse`) or t scale."""
    generator = torch.Generator().manual_seed(seed)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        rows, width = shape
        t = ternary(shape, generator)
        scale = scales((1,), generator, dtype)
        scale = (1 / scale.float()).to(dtype) if inverse else scale
        quarter = rows // 4
        data = [
            [sum((int(t[r + k * quarter, i]) + 1) << (2 * k) for k in range(4)) for i in range(width)]
            for r in range(quarter)
        ]
        factor = 1 / scale.double() if inverse else scale.double()
        return {"weight": torch.tensor(data, dtype=torch.uint8), "weight_scale": scale}, t.double() * factor

    return pack


def mlx(bits: int, group: int, seed: int = 0, binary: bool = False) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    """MLX: W = scales q + biases, codes along the words of a row."""
    generator = torch.Generator().manual_seed(seed)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        rows, width = shape
        groups = width // group
        q = torch.randint(0, 2**bits, shape, generator=generator)
        s = scales((rows, groups), generator)
        b = -s / 2 if binary else (-s * 2**bits * torch.rand((rows, groups), generator=generator)).to(DTYPE)
        stored = int32([words(row, bits) for row in q.tolist()]).view(torch.uint32)
        weight = torch.empty(shape, dtype=torch.float64)
        for i in range(width):
            weight[:, i] = s[:, i // group].double() * q[:, i].double() + b[:, i // group].double()
        return {"weight": stored, "scales": s, "biases": b}, weight

    return pack


def signs(
    group: int,
    form: str = "int8",
    order: Literal["little", "big"] = "little",
    positive: int = 1,
    zeros: bool = False,
    seed: int = 0,
) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    """Signs and scales; `form` int8, uint8 or int32."""
    generator = torch.Generator().manual_seed(seed)

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        rows, width = shape
        size = width if group == -1 else group
        t = ternary(shape, generator)
        if not zeros:
            t[t == 0] = 1
        s = scales((rows, -(-width // size)), generator)
        weight = torch.empty(shape, dtype=torch.float64)
        for i in range(width):
            weight[:, i] = t[:, i].double() * s[:, i // size].double()
        if form == "int8":
            return {"weight": t, "weight_scale": s}, weight
        bits = np.where((t.numpy() > 0) == bool(positive), 1, 0).astype(np.uint8)
        data = np.packbits(bits, axis=1, bitorder=order)
        stored = torch.from_numpy(data) if form == "uint8" else torch.from_numpy(data.view("<i4").copy())
        return {"weight": stored, "weight_scale": s}, weight

    return pack
