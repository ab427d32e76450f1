"""Second moments of what goes into linear layers: M = E[x x^T] over tokens, or its diagonal alone.

The error of a linear layer's output is a quadratic form of the error of its weights, E ||D x||^2 = tr(D M D^T): all
that calibration, error feedback and the weighted start of LoRA need to know of the data. The diagonal takes 4 bytes
an input, the whole 4 in^2: 67 MB at 4,096 inputs and 822 MB at 14,336. Layers that read the same tensor (q, k and v;
gate and up) share one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Inputs copied to the accumulator's dtype at a time.
_CHUNK_ELEMENTS = 2**25


class SecondMoment:
    """The running sum of x x^T, or of x^2, over tokens.

    Nothing is allocated before the first update.

    Args:
        width: the length of x.
        full: the whole matrix rather than its diagonal.
        device: where the sum is kept; by default where the first x is. Products are computed where x is.
        dtype: of products and sums. float32 holds each product of two 16-bit floats to 24 bits.

    Attributes:
        count: how many tokens were seen.
    """

    def __init__(
        self,
        width: int,
        full: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if width < 1:
            raise ValueError(f"a moment of width {width}: it must be 1 or more")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"a moment in {dtype}: sums of many products need torch.float32 or torch.float64")
        self.width, self.full, self.dtype = width, full, dtype
        self.device = None if device is None else torch.device(device)
        self.count = 0
        self._sum: Tensor | None = None

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of `x` [..., width], those where `mask` [...] is true (not zero) if there is one.

        Raises:
            ValueError: if `x` has another width or is not of floats, or the mask another shape.
        """
        if x.shape[-1] != self.width or not x.is_floating_point():
            raise ValueError(f"expected floats [..., {self.width}], got {x.dtype} of shape {tuple(x.shape)}")
        tokens = x.reshape(-1, self.width)
        if mask is not None:
            if mask.shape != x.shape[:-1]:
                raise ValueError(f"a mask of shape {tuple(mask.shape)} does not fit tokens {tuple(x.shape[:-1])}")
            tokens = tokens[mask.reshape(-1).to(x.device) != 0]
        if len(tokens) == 0:
            return
        added: Tensor | None = None
        for chunk in tokens.split(max(1, _CHUNK_ELEMENTS // self.width)):
            values = chunk.to(self.dtype)
            product = values.t() @ values if self.full else values.square().sum(0)
            added = product if added is None else added.add_(product)
        assert added is not None
        added = added.to(self.device or added.device)
        self._sum = added if self._sum is None else self._sum.add_(added.to(self._sum.device))
        self.count += len(tokens)

    def merge(self, other: SecondMoment) -> None:
        """Add what `other` has seen, on another part of the data.

        Raises:
            ValueError: if it has another width or kind.
        """
        if (self.width, self.full) != (other.width, other.full):
            raise ValueError(f"{other} cannot be merged into {self}")
        if other._sum is None:
            return
        added = other._sum.to(self.device or other._sum.device, self.dtype)
        self._sum = added.clone() if self._sum is None else self._sum.add_(added.to(self._sum.device))
        self.count += other.count

    @property
    def matrix(self) -> Tensor:
        """E[x x^T], [width, width].

        Raises:
            ValueError: if only the diagonal was kept, no token was seen, or an input was NaN or too large.
        """
        if not self.full:
            raise ValueError(f"{self} keeps no more than the diagonal")
        return self._mean()

    @property
    def diagonal(self) -> Tensor:
        """E[x^2], [width].

        Raises:
            ValueError: if no token was seen, or an input was NaN or too large.
        """
        mean = self._mean()
        return mean.diagonal().clone() if self.full else mean

    def _mean(self) -> Tensor:
        if self._sum is None:
            raise ValueError(f"{self} has seen no token")
        mean = self._sum / self.count
        if not torch.isfinite(mean).all():
            raise ValueError(f"{self}: an input was NaN, or too large for {self.dtype}")
        return mean

    def __repr__(self) -> str:
        kind = "matrix" if self.full else "diagonal"
        return f"SecondMoment({kind} of {self.width} inputs, {self.count} tokens)"


@contextmanager
def observe_inputs(
    module: nn.Module,
    names: Iterable[str],
    full: bool = True,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    mask: Callable[[], Tensor | None] | None = None,
    share: bool = True,
) -> Iterator[dict[str, SecondMoment]]:
    """Within the block, the moments of what goes into submodules `names` of `module` are summed up: {name: moment}.

        with observe_inputs(block, names) as moments:
            for batch in batches:
                block(batch)
        moments["mlp.down_proj"].matrix

    Layers that are given the same tensor at their first call have one moment together from then on.

    Args:
        names: linear layers, anything with `in_features`.
        full, device, dtype: as in `SecondMoment`.
        mask: gives the mask [...] of the tokens that count in the batch at hand, or None for all of them.
        share: False keeps a moment for each layer, should they part ways later.

    Raises:
        ValueError: if a name is no linear layer.
        RuntimeError: on a call, if layers that shared their input no longer do.
    """
    moments: dict[str, SecondMoment] = {}
    for name in names:
        width = getattr(module.get_submodule(name), "in_features", None)
        if not isinstance(width, int):
            raise ValueError(f"{name} is a {type(module.get_submodule(name)).__name__}, no linear layer")
        moments[name] = SecondMoment(width, full, device, dtype)
    observer = _Observer(moments, mask, share)
    handles = [
        module.get_submodule(name).register_forward_pre_hook(observer.hook(name), with_kwargs=True) for name in moments
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


class _Observer:
    """Which layer was given which tensor last.

    Attributes:
        last: by the layer that sums up, the tensor that it saw last, as long as anything else holds it.
    """

    def __init__(
        self, moments: dict[str, SecondMoment], mask: Callable[[], Tensor | None] | None, share: bool
    ) -> None:
        self.moments, self.mask, self.share = moments, mask, share
        self.last: dict[str, weakref.ref[Tensor]] = {}
        self.leaders: dict[str, str] = {}
        self.calls = dict.fromkeys(moments, 0)

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.see(name, args[0] if args else kwargs["input"])

        return observe

    def see(self, name: str, x: Tensor) -> None:
        leader = self.leaders.get(name) or self._leader_of(name, x)
        self.leaders[name] = leader
        self.calls[name] += 1
        if leader == name:
            self.moments[name].update(x, None if self.mask is None else self.mask())
            self.last[name] = weakref.ref(x)
        elif x is not self.last[leader]() or self.calls[name] != self.calls[leader]:
            raise RuntimeError(
                f"{leader} and {name} were given the same tensor at first and no longer are: share=False"
            )

    def _leader_of(self, name: str, x: Tensor) -> str:
        """Whose moment `name`, called for the first time, is to share: that of a layer which has seen this x alone."""
        for other, seen in self.last.items():
            if self.share and seen() is x and self.calls[other] == 1 and self.moments[other].width == x.shape[-1]:
                self.moments[name] = self.moments[other]
                return other
        return name
