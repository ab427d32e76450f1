"""Running code on tensors that have sizes and no data, and counting the bytes that it holds at a time.

    with simulated() as live:
        model = with_fake_tensors(model)      # of one on the meta device
        live.start()
        model(tokens).logits.sum().backward()
    live.peak, live.now                       # bytes of what operators have returned since `start`

The operators are torch's and ours, as they run on a CPU; what one takes for itself inside is not seen. Where code asks
for a value it is told what well-behaved data would say: yes, 0, that every position counts, that each of many bins
(the tokens of an expert) holds as much as the others.
"""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators have made since `start` and that live.

    Attributes:
        now: bytes at this moment.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, Any] = {}
        self._before: list[dict[int, Any]] = []
        self._counts: dict[int, int] = {}
        self.now = self.peak = 0

    def start(self) -> None:
        """Count from here on; what there is already is not counted any more."""
        self._before = [storages for storages in (*self._before, self._storages) if storages]
        self._storages = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is _aten._local_scalar_dense.default:
            return True if args[0].dtype is torch.bool else self._counts.get(args[0].untyped_storage()._cdata, 0)
        if function is _aten.bincount.default:
            bins = max(1, kwargs.get("minlength", 0) if kwargs else 0, *args[2:3])
            counts = args[0].new_zeros(bins, dtype=torch.long)
            self._counts[counts.untyped_storage()._cdata] = args[0].numel() // bins
            return counts
        if function is _aten.equal.default:
            return True
        if function in _INDEXED:
            args = (args[0], _everywhere(args[1]), *args[2:])
        if function is _aten.nonzero.default:
            return args[0].new_zeros((args[0].numel(), args[0].dim()), dtype=torch.long)
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return outputs

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if any(key in storages for storages in (self._storages, *self._before)):
            return
        size = storage.nbytes()
        gone = functools.partial(_gone, weakref.ref(self), self._storages, key, size)
        self._storages[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _gone(counter: Any, storages: dict[int, Any], key: int, size: int, _: Any) -> None:
    live = counter()
    del storages[key]
    if live is not None and live._storages is storages:
        live.now -= size


def _everywhere(indices: Any) -> list[Any]:
    """`indices` of an indexing, a mask being true everywhere: its shape would depend on data."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
            found += [index.new_zeros(index.numel(), dtype=torch.long)] * index.dim()
        else:
            found.append(index)
    return found


@contextmanager
def simulated() -> Iterator[LiveBytes]:
    """Within the block tensors have no data, and what is alive of them is counted."""
    # Cycles are looked for among what is made in here alone: a model has many objects.
    gc.collect()
    gc.freeze()
    try:
        with warnings.catch_warnings(), FakeTensorMode(), LiveBytes() as live:
            warnings.simplefilter("ignore")  # of transformers, about what it has renamed
            yield live
    finally:
        gc.unfreeze()


def with_fake_tensors(model: nn.Module) -> nn.Module:
    """`model`, which is on the meta device, with all its tensors on a CPU that has no memory; shared ones stay so."""
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)
    return model
