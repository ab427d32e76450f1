"""Three bits and more: the best grid of a group by trying many and descending from the best of them.

For fixed codes the best scale and offset are the (weighted) regression of w on q; for fixed scale and offset the best
codes are the nearest. Alternating the two, the half-quadratic descent of HQQ (Badri & Shaji, 2023) with the scale set
free, ends in a local optimum, of which there are many. So a few hundred grids, of widths from half the group's range
to more than all of it and in four places each, are scored by the regression on their codes; the best of each width
compete for a place among the starts, from which the alternation descends; and around the best found, grids of slightly
other widths and places are tried once more.

Grids wider than the range look wasteful but are not: with few weights and many levels, the best grid is often one that
uses every second level.

Groups are columns: tensors are [g, n], so that each step is one pass over memory in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_ITERATIONS = 6


@dataclass(frozen=True)
class Search:
    """How many grids are tried.

    Attributes:
        widths: of so many widths, in
        places: so many places a step each;
        starts: from so many of them the alternation descends,
        near: and from so many of those around the best found.
    """

    widths: int
    places: int
    starts: int
    near: int


QUICK, THOROUGH = Search(26, 4, 10, 3), Search(80, 6, 40, 6)

# Below this share of the range a grid leaves out tails and is placed about the mean, above about the middle.
_TAILS = 0.75
_INDEX_BITS = 5
# The second look: changes of the grid's width and place, both in its steps.
_NEAR = tuple((wider, shift) for wider in (-0.4, -0.2, 0.2, 0.4) for shift in (-0.33, 0.0, 0.33))


def best_grid(
    values: Tensor, importance: Tensor | None, qmax: int, search: Search = QUICK
) -> tuple[Tensor, Tensor, Tensor]:
    """(squared error, scale, offset), each [1, n], of the best grid found for groups `values` [g, n], codes 0..`qmax`.

    Args:
        values: in units of half the group's range, about its middle: in [-1, 1].
        importance: [g, n], weights of the squared errors, >= 0, about 1 on average; None for all alike.
    """
    fit = _Fit(values, importance, qmax)
    about_mean = values - fit.mean
    peaks, grids = [], _grids(values.shape[0], qmax, search)
    for width, shifts in grids:
        source = about_mean if width < _TAILS else values
        peak = None
        for index, shift in enumerate(shifts):
            key = _keyed(fit.score(source, 2 * width / qmax, shift - width), index)
            peak = key if peak is None else torch.minimum(peak, key)
        assert peak is not None
        peaks.append(peak)
    ranked = torch.stack(peaks)  # [widths, n]
    best_widths = ranked.topk(min(search.starts, len(grids)), 0, largest=False).indices  # [starts, n]
    places = ranked.gather(0, best_widths) & (2**_INDEX_BITS - 1)
    widths = values.new_tensor([width for width, _ in grids])
    longest = max(len(shifts) for _, shifts in grids)
    shift_table = values.new_tensor([[*shifts, *[0.0] * (longest - len(shifts))] for _, shifts in grids])
    found = None
    for chosen, place in zip(best_widths, places, strict=True):
        half = widths[chosen].unsqueeze(0)  # [1, n]
        offset = shift_table[chosen, place.long()].unsqueeze(0) - half + fit.mean * (half < _TAILS)
        found = _better(found, fit.descend(2 * half / qmax, offset))
    assert found is not None
    return _look_around(fit, found, qmax, search.near)


def _look_around(
    fit: _Fit, found: tuple[Tensor, Tensor, Tensor], qmax: int, starts: int
) -> tuple[Tensor, Tensor, Tensor]:
    _, scale, offset = found
    middle = offset + scale * (qmax / 2)
    near = []
    for wider, shift in _NEAR:
        factor = 1 + wider / qmax
        near.append((scale * factor, middle + scale * (shift - factor * qmax / 2)))
    keys = torch.cat([_keyed(fit.score(fit.values, *grid), index).unsqueeze(0) for index, grid in enumerate(near)])
    for key in keys.topk(starts, 0, largest=False).values:
        place = (key & (2**_INDEX_BITS - 1)).long()
        wider, shift = fit.values.new_tensor(_NEAR).t()
        factor = 1 + wider[place] / qmax
        found = _better(found, fit.descend(scale * factor, middle + scale * (shift[place] - factor * qmax / 2)))
    return found


def _better(
    old: tuple[Tensor, Tensor, Tensor] | None, new: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of two (error, scale, offset), each [1, n], the one of less error, group by group."""
    if old is None:
        return new
    better = new[0] < old[0]
    return (
        torch.minimum(new[0], old[0]),
        torch.where(better, new[1], old[1]),
        torch.where(better, new[2], old[2]),
    )


@lru_cache
def _grids(size: int, qmax: int, search: Search = QUICK) -> list[tuple[float, list[float]]]:
    """(half width, shifts of the grid's middle), in units of half the range."""
    # The fewer weights to a level, the wider a grid may be worth trying; the more weights, the longer the tails.
    narrow, wide = {8: (0.6, 2.3), 16: (0.55, 1.8), 32: (0.5, 1.35), 64: (0.45, 1.2)}.get(
        1 << max(3, (size - 1).bit_length()), (max(0.1, 0.35 * math.sqrt(128 / size)) if size > 64 else 0.6, 1.1)
    )
    count, places = search.widths, search.places
    if qmax == 255:  # as fine as that, the whole range is what counts, and where in a step of the grid it lies
        narrow, wide, count, places = 0.98, 1.02, 5, 16
    result = []
    for i in range(count):
        width = narrow * (wide / narrow) ** (i / (count - 1))
        step = 2 * width / qmax
        reach = max(places // 2, min(search.places, math.ceil(max(0.0, 1 - width) * places / step)))
        result.append((width, [k / places * step for k in range(-reach, reach + 1)]))
    return result


def _keyed(error: Tensor, index: int) -> Tensor:
    """Errors [1, n] >= 0 as int32 [n] of the same order, with `index` in the lowest bits."""
    keys = error.squeeze(0).to(torch.float32).view(torch.int32)
    return (keys & -(2**_INDEX_BITS)) | index


class _Fit:
    """Codes and regressions over one set of groups, in buffers made once."""

    def __init__(self, values: Tensor, importance: Tensor | None, qmax: int) -> None:
        self.values, self.importance, self.qmax = values, importance, qmax
        if importance is None:
            self.mass = values.new_full((1, 1), values.shape[0])
            self.mean = values.mean(0, keepdim=True)
        else:
            self.mass = importance.sum(0, keepdim=True).clamp_min(1e-30)  # [1, n]
            self.mean = (importance * values).sum(0, keepdim=True) / self.mass
        centred = values - self.mean
        self.moments = centred if importance is None else importance * centred
        self.energy = (self.moments * centred).sum(0, keepdim=True)
        # Codes differ at all: then their variance, times the mass, is at least this for equal importance.
        self.least = 0.2 if importance is None else 1e-5 * values.shape[0]
        self.codes, self.spare = torch.empty_like(values), torch.empty_like(values)

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of codes, cov, var) [1, n] of `self.codes`, which are about their middle; uses them up."""
        codes, spare = self.codes, self.spare
        product = torch.mul(codes, self.moments, out=spare).sum(0, keepdim=True)
        if self.importance is None:
            total = codes.sum(0, keepdim=True)
            square = codes.square_().sum(0, keepdim=True)
        else:
            total = torch.mul(codes, self.importance, out=spare).sum(0, keepdim=True)
            square = spare.mul_(codes).sum(0, keepdim=True)
        return total, product, square.addcmul_(total, total / self.mass, value=-1).clamp_min_(self.least)

    def score(self, source: Tensor, scale: float | Tensor, offset: float | Tensor) -> Tensor:
        """The error [1, n] left by the regression on the codes that a grid gives `source` (values, up to a shift)."""
        torch.sub(source, offset, out=self.codes).div_(scale).round_().clamp_(0, self.qmax).sub_(self.qmax / 2)
        _, product, variance = self._sums()
        return (self.energy - product.square_().div_(variance)).clamp_min_(0)

    def descend(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(error, scale, offset) [1, n] after alternating rounding and regression."""
        half = self.qmax / 2
        for _ in range(_ITERATIONS):
            torch.sub(self.values, offset, out=self.codes).div_(scale).round_().clamp_(0, self.qmax).sub_(half)
            total, product, variance = self._sums()
            scale = (product / variance).clamp_min_(1e-6)
            offset = self.mean - scale * (total / self.mass + half)
        codes = torch.sub(self.values, offset, out=self.codes).div_(scale).round_().clamp_(0, self.qmax)
        error = torch.addcmul(self.values - offset, codes, scale, value=-1, out=self.spare).square_()
        if self.importance is not None:
            error *= self.importance
        return error.sum(0, keepdim=True), scale, offset
