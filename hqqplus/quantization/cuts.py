"""One and two bits: the best grid of a group by searching over where its sorted weights are cut.

On any grid the codes of sorted weights never fall, so they are given by Q = 2^nbits - 1 cuts c_1 <= ... <= c_Q: weight
i has as code the number of cuts at or below i. The best scale and offset for given codes are a regression, and with

    P(c) = sum of the c smallest weights (centred),    H(c) = their number (or the sum of their importances),

what that regression explains needs the cuts alone:

    sum q = sum_k (H - H(c_k)),   sum q^2 = sum_k (2 k - 1) (H - H(c_k)),   sum q w = -sum_k P(c_k)
    explained = (sum q w)^2 / (sum q^2 - (sum q)^2 / H)

Rounding to the fitted grid can only lower the error further, so the best cuts of all are those of the best grid: this
is an exact search over codes, not a descent from some start. At one bit there are g - 1 splits: 1-D two-means. At two
bits all triples are tried up to groups of 32; above, a lattice of them and the cuts of a few plain grids, and then
windows of ever finer steps around the best: of the lattice one for each of a few middle cuts, because neighbours on it
lead to the same place.

Groups are columns here: tensors are [g, n], so that each step is one pass over memory in order.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

# Groups up to this size are searched in full at two bits: 6,545 triples.
EXACT_GROUP = 32
_STARTS, _FINALISTS = 8, 4
# Grids (scale, offset) over a range of [-1, 1] whose cuts are looked at beside the lattice: what the lattice misses
# are values that come in lumps, between which these cut cleanly.
_PLAIN = ((2 / 3, -1.0), (1.0, -1.0), (1.0, -2.0))
_INDEX_BITS = 9


def best_cuts(values: Tensor, importance: Tensor | None, nbits: int) -> tuple[Tensor, Tensor]:
    """The scale and offset [1, n] of least squared error for groups `values` [g, n], at one or two bits.

    Args:
        values: in units in which sums of squares neither overflow nor vanish.
        importance: [g, n], weights of the squared errors, >= 0, about 1 on average; None for all alike.

    The scale is 0 where all weights (of any importance) are equal.
    """
    size, count = values.shape
    if importance is None:
        ordered = _sort(values)
        ranks = torch.arange(size + 1, dtype=values.dtype, device=values.device)
        mass = ranks.unsqueeze(1)  # [g + 1, 1]
        mean = ordered.mean(0, keepdim=True)
        centred = ordered - mean
        moments = centred
    else:
        order = _argsort(values)
        ordered, importance = values.gather(0, order), importance.gather(0, order)
        mass = _prefix(importance)  # [g + 1, n]
        mean = (importance * ordered).sum(0, keepdim=True) / mass[-1:].clamp_min(torch.finfo(values.dtype).tiny)
        centred = ordered - mean
        moments = importance * centred
    sums = _prefix(moments)  # [g + 1, n]
    energy = (moments * centred).sum(0)  # [n]
    cuts = _split(sums, mass, energy) if nbits == 1 else _triple(ordered, sums, mass, energy)  # [Q, n]
    product = -sums.gather(0, cuts).sum(0, keepdim=True)
    total, square = _code_sums(mass.expand(-1, count).gather(0, cuts).unbind(0), mass[-1])
    variance = (square - total * total / mass[-1].clamp_min(1e-30)).unsqueeze(0)
    scale = torch.where(variance > _least(size), product / variance.clamp_min(1e-30), torch.zeros_like(product))
    scale = scale.clamp_min(0)
    return scale, mean - scale * (total / mass[-1].clamp_min(1e-30)).unsqueeze(0)


def _least(size: int) -> float:
    """A variance of codes (times the group's mass) below this is rounding noise: all codes that count are equal."""
    return 1e-5 * size


def _code_sums(below: tuple[Tensor, ...], mass: Tensor) -> tuple[Tensor, Tensor]:
    """(sum q, sum q^2) from H(c_1), ..., H(c_Q) and H."""
    total = sum((mass - cut for cut in below), torch.zeros_like(mass))
    square = sum(((2 * k + 1) * (mass - cut) for k, cut in enumerate(below)), torch.zeros_like(mass))
    return total, square


def _split(sums: Tensor, mass: Tensor, energy: Tensor) -> Tensor:
    """The best single cut: [1, n]."""
    inside, whole = mass[1:-1], mass[-1:]
    variance = inside * (whole - inside) / whole.clamp_min(1e-30)
    usable = variance > _least(len(mass) - 1)
    explained = sums[1:-1].square() * torch.where(usable, 1 / variance.clamp_min(1e-30), torch.zeros_like(variance))
    if len(explained) == 0:  # a group of one
        return torch.zeros_like(energy, dtype=torch.long).unsqueeze(0)
    return explained.argmax(0, keepdim=True) + 1


def _triple(ordered: Tensor, sums: Tensor, mass: Tensor, energy: Tensor) -> Tensor:
    """The best three cuts: [3, n]."""
    size = len(sums) - 1
    points, step = _lattice(size)
    lattice = torch.tensor(points, device=sums.device)
    at, weight = sums[lattice], mass[lattice]  # [m, n], [m, n or 1]
    m = len(points)
    if mass.shape[1] == 1:
        inverses = _equal_inverses(size, mass.dtype, mass.device)
    else:
        inverses = [_inverse(weight, mass[-1], j, _least(size)) for j in range(m)]
    work = _Work(energy)
    keys = []
    for j, inverse in enumerate(inverses):
        # All c_1 at or below the j-th point and all c_3 at or above it.
        product = torch.add(at[: j + 1, None], at[None, j:] + at[j], out=work(0, j + 1, m - j, at.shape[1]))
        keys.append(_least_error(energy, product.square_(), inverse, 2))
    on_lattice = torch.stack(keys)  # [m, n]
    if m == size + 1:
        return _on_lattice(on_lattice, on_lattice.argmin(0, keepdim=True), size).squeeze(1)
    plain = torch.stack([_cuts_of(ordered, *grid) for grid in _PLAIN], 1)  # [3, grids, n]
    _, plain_keys = _window(work, sums, mass, energy, plain, 1, 0)
    rows = torch.cat([on_lattice, plain_keys]).topk(_STARTS, 0, largest=False).indices  # [starts, n]
    from_plain = plain.gather(1, (rows - m).clamp_min_(0).expand(3, -1, -1))
    cuts = torch.where(rows < m, _on_lattice(on_lattice, rows.clamp_max(m - 1), size), from_plain)  # [3, starts, n]
    while True:
        step = (step + 1) // 2
        cuts, near = _window(work, sums, mass, energy, cuts, step, 1)
        if step <= 2:
            break
    best = near.topk(_FINALISTS, 0, largest=False).indices
    cuts, near = _window(work, sums, mass, energy, cuts.gather(1, best.expand(3, -1, -1)), 1, 2)
    return cuts.gather(1, near.argmin(0, keepdim=True).expand(3, -1, -1)).squeeze(1)


def _inverse(weight: Tensor, whole: Tensor, j: int, limit: float) -> Tensor:
    """1 / (variance of the codes, times the mass) for middle cut j and all c_1 at or below, c_3 at or above it.

    `weight` [m, n or 1] is H at the points of the lattice -> [j + 1, m - j, n or 1]; 0 where no two codes differ.
    """
    low, high = weight[: j + 1, None], weight[None, j:]
    total = 3 * whole - weight[j] - low - high
    variance = (9 * whole - 3 * weight[j] - low - 5 * high) - total * total / whole.clamp_min(1e-30)
    return torch.where(variance > limit, 1 / variance.clamp_min(1e-30), torch.zeros_like(variance))


@lru_cache(maxsize=32)
def _equal_inverses(size: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """`_inverse` of every middle cut where all weights count alike: the same for all groups of a size."""
    points, _ = _lattice(size)
    weight = torch.tensor(points, dtype=dtype, device=device).unsqueeze(1)
    return [_inverse(weight, weight[-1], j, _least(size)) for j in range(len(points))]


def _on_lattice(keys: Tensor, middle: Tensor, size: int) -> Tensor:
    """The cuts [3, k, n] with middle cut at points `middle` [k, n] of the lattice, by their `keys` [m, n]."""
    index = keys.gather(0, middle) & (2**_INDEX_BITS - 1)
    return _lattice_table(size, keys.device)[:, middle * 2**_INDEX_BITS + index]


@lru_cache(maxsize=32)
def _lattice_table(size: int, device: torch.device) -> Tensor:
    """(middle point, index) -> the three cuts: [3, m 2^index bits]. A table, because integer division is slow."""
    points, _ = _lattice(size)
    m = len(points)
    # "cpu" said aloud: what is kept must not depend on a default device of the moment.
    lattice, index = torch.tensor(points, device="cpu"), torch.arange(2**_INDEX_BITS, device="cpu")
    table = []
    for j in range(m):
        low, high = (index // (m - j)).clamp_max(m - 1), (j + index % (m - j)).clamp_max(m - 1)
        table.append(torch.stack([lattice[low], lattice[j].expand(len(index)), lattice[high]]))
    return torch.cat(table, 1).to(device)


@lru_cache(maxsize=8)
def _window_steps(step: int, reach: int, device: torch.device) -> Tensor:
    """index of a triple in a window -> the steps of its three cuts: [3, side^3]."""
    steps = torch.arange(-reach, reach + 1, device="cpu") * step
    return torch.cartesian_prod(steps, steps, steps).t().contiguous().to(device)


def _cuts_of(ordered: Tensor, scale: float, offset: float) -> Tensor:
    """The cuts [3, n] that a grid makes in sorted groups [g, n]."""
    return torch.stack([(ordered < offset + scale * (k + 0.5)).sum(0, dtype=torch.int32).long() for k in range(3)])


@lru_cache
def _lattice(size: int) -> tuple[list[int], int]:
    """(cut positions to start from, the widest gap between two), dense at the ends, for outliers to be cut off."""
    if size <= EXACT_GROUP:
        return list(range(size + 1)), 1
    inner = 17 if size <= 64 else 25
    even = {round(i * size / (inner - 1)) for i in range(inner)}
    points = sorted(even | {1, 2, size - 2, size - 1})
    return points, max(b - a for a, b in itertools.pairwise(points))


class _Work:
    """Memory for the large intermediate results of a chunk, taken once: taking it anew costs more than using it."""

    def __init__(self, like: Tensor) -> None:
        self.rows = [like.new_empty(0), like.new_empty(0)]

    def __call__(self, row: int, *shape: int) -> Tensor:
        count = math.prod(shape)
        if self.rows[row].numel() < count:
            self.rows[row] = self.rows[row].new_empty(count)
        return self.rows[row][:count].view(shape)


def _window(
    work: _Work, sums: Tensor, mass: Tensor, energy: Tensor, cuts: Tensor, step: int, reach: int
) -> tuple[Tensor, Tensor]:
    """Around each of `cuts` [3, k, n]: the best triple at most `reach` steps away, and its error's key [k, n]."""
    size, side = len(sums) - 1, 2 * reach + 1
    steps = torch.arange(-reach, reach + 1, device=cuts.device) * step
    tried = (cuts[:, None] + steps[:, None, None]).clamp_(0, size)  # [3, side, k, n]
    flat = tried.flatten(0, 1)
    value = sums.unsqueeze(1).expand(-1, flat.shape[1], -1).gather(0, flat).view(tried.shape)
    if mass.shape[1] == 1:
        weight = tried.to(mass.dtype)
    else:
        weight = mass.unsqueeze(1).expand(-1, flat.shape[1], -1).gather(0, flat).view(tried.shape)
    whole = mass[-1]
    shape = side, side, side, *cuts.shape[1:]
    first, second, third = weight[0][:, None, None], weight[1][:, None], weight[2]
    total = torch.sub(3 * whole - first, second + third, out=work(0, *shape))
    variance = torch.sub(9 * whole - first, 3 * second + 5 * third, out=work(1, *shape))
    variance -= total.square_().mul_(1 / whole.clamp_min(1e-30))
    # Out of order cuts are codes like any others, only never the best; without a variance nothing is explained.
    inverse = variance.clamp_min_(_least(size)).reciprocal_()
    product = torch.add(value[0][:, None, None], value[1][:, None] + value[2], out=work(0, *shape))
    key = _least_error(energy, product.square_(), inverse, 3)
    moved = cuts + _window_steps(step, reach, cuts.device)[:, key & (2**_INDEX_BITS - 1)]
    low, middle, high = moved.clamp_(0, size)  # put in order by three comparisons
    low, middle = torch.minimum(low, middle), torch.maximum(low, middle)
    middle, high = torch.minimum(middle, high), torch.maximum(middle, high)
    return torch.stack([torch.minimum(low, middle), torch.maximum(low, middle), high]), key


def _least_error(energy: Tensor, squares: Tensor, inverse: Tensor, leading: int) -> Tensor:
    """The least of energy - squares * inverse over the leading dimensions, with its index, as one int32 key.

    The bits of a positive float are ordered like the float. The lowest bits of the error (six parts in 100,000 of it)
    give way to the index: finding both in one pass is many times faster than a minimum with its index. Uses up
    `squares`.
    """
    # The slack keeps errors above zero where energy and what is explained are equal but for rounding.
    error = torch.addcmul(energy * (1 + 2e-6), squares, inverse, value=-1, out=squares)
    keys = error.flatten(0, leading - 1).to(torch.float32).view(torch.int32)
    index = torch.arange(len(keys), dtype=torch.int32, device=keys.device).view(-1, *([1] * (keys.dim() - 1)))
    return keys.bitwise_and_(-(2**_INDEX_BITS)).bitwise_or_(index).amin(0)


def _prefix(values: Tensor) -> Tensor:
    """[g, n] -> sums over the first 0, 1, ..., g rows: [g + 1, n]."""
    if values.device.type != "cpu" or len(values) > 256:
        return torch.nn.functional.pad(values.cumsum(0), (0, 0, 1, 0))
    sums = values.new_zeros(len(values) + 1, values.shape[1])
    for i in range(len(values)):  # row by row this is several times faster than cumsum
        torch.add(sums[i], values[i], out=sums[i + 1])
    return sums


def _sort(values: Tensor) -> Tensor:
    """Columns of `values` [g, n] in ascending order."""
    if values.device.type != "cpu":
        return values.sort(0).values
    # numpy sorts short rows with vector instructions, many times faster than torch.
    rows = values.t().clone(memory_format=torch.contiguous_format).numpy()
    rows.sort(axis=1)
    return torch.from_numpy(rows).t().contiguous()


def _argsort(values: Tensor) -> Tensor:
    if values.device.type != "cpu":
        return values.argsort(0)
    return torch.from_numpy(values.t().contiguous().numpy().argsort(axis=1)).t().contiguous()
