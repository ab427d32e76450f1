"""The best affine grid of a group by brute force, in float64: what the solver is measured against. Slow.

The codes that a grid (s, o) gives change only where a threshold o + s (k + 1/2) passes a weight. In the plane of
(s, o) each weight and threshold make a line; between the lines lie the cells of equal codes, and every cell is bounded
by a piece of some line. So a walk along each line, on both of its sides, meets all assignments there are. Each is
scored by its own regression.
"""

from __future__ import annotations

import numpy as np


def best_error(values: np.ndarray, qmax: int, weights: np.ndarray | None = None) -> float:
    """The least (weighted) squared error of `values` [g] on any grid s q + o with q in 0..qmax."""
    x = np.asarray(values, dtype=np.float64)
    h = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    # Equal values take equal codes on some best grid: one value with their joint weight.
    x, where = np.unique(x, return_inverse=True)
    h = np.bincount(where, weights=h)
    x, h = x[h > 0], h[h > 0]
    if len(x) < 2:
        return 0.0
    x = x - (h * x).sum() / h.sum()
    best = max(_walk(x, h, k, qmax) for k in range(qmax))
    return max(float((h * x * x).sum()) - best, 0.0)


def _walk(x: np.ndarray, h: np.ndarray, k: int, qmax: int) -> float:
    """The most energy explained by the codes met on the lines of threshold `k`, one line for each of `x` [n]."""
    n = len(x)
    gap = x[None, :] - x[:, None]  # [line, weight]
    # As s grows from 0, a weight above the line's own falls from qmax to k + 1: past m at s = gap / (m - k - 1).
    # One below it rises from 0 to k: to m at s = -gap / (k + 1 - m).
    at, before, after = [], [], []
    for m in range(1, qmax + 1):
        if m != k + 1:
            falls = m > k + 1
            s = gap / (m - k - 1)
            at.append(np.where(s > 0, s, np.inf))
            before.append(m if falls else m - 1)
            after.append(m - 1 if falls else m)
    best = 0.0
    for own in (k, k + 1):
        code = np.where(gap > 0, qmax, 0)
        np.fill_diagonal(code, own)
        first = [(h * code).sum(1), (h * code**2).sum(1), (h * code * x).sum(1)]
        sums = [start[:, None] for start in first]
        if at:
            s = np.concatenate(at, 1)  # [line, event]
            order = np.argsort(s, 1)
            live = np.isfinite(np.take_along_axis(s, order, 1))
            low, high = (np.repeat(np.array(t, dtype=np.float64), n)[order] for t in (before, after))
            weight, value = np.tile(h, len(at))[order] * live, np.tile(x, len(at))[order]
            changes = (weight * (high - low), weight * (high**2 - low**2), weight * value * (high - low))
            sums = [
                np.concatenate([start, start + np.cumsum(c, 1)], 1) for start, c in zip(sums, changes, strict=True)
            ]
        count, square, product = sums
        variance = square - count**2 / h.sum()
        gain = np.where(variance > 1e-9 * h.max(), product**2 / np.maximum(variance, 1e-300), 0.0)
        best = max(best, float(gain.max()))
    return best
