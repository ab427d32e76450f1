"""A robust norm: the sum of |w - Q|^p with p < 1, by half-quadratic splitting.

HQQ (Badri & Shaji, 2023) splits the error into a sparse part e, for the outliers, and a Gaussian one:

    min over q, s, o, e    ||e||_p^p + (beta / 2) ||w - e - (s q + o)||^2

and alternates: e by generalised soft-thresholding (Chartrand, 2007), e = sign(r) max(|r| - |r|^(p-1) / beta, 0) of the
residual r; then here, unlike there, scale *and* offset by regression of w - e on q; then q by rounding. e is not zero
where |r|^(2-p) > 1 / beta. In HQQ beta is an absolute number, for which the errors of a real layer, a few hundredths,
are all below that threshold: nothing ever is an outlier. Here residuals are in standard deviations of their own group
and beta is given by the threshold: W and 1000 W have the same outliers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ITERATIONS = 20
_ANNEALING = 1.01  # HQQ's kappa: beta grows, so the threshold falls


def shrink(residual: Tensor, beta: float, p: float) -> Tensor:
    """Generalised soft-thresholding, element by element: 0 up to |r| = beta^(-1 / (2 - p)), close to r far beyond."""
    size = residual.abs()
    return residual.sign() * (size - size.clamp_min(1e-12).pow(p - 1) / beta).clamp_min(0)


def robust_fit(
    values: Tensor,
    importance: Tensor | None,
    scale: Tensor,
    offset: Tensor,
    qmax: int,
    p: float,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """From a least-squares (scale, offset) [1, n] of groups `values` [g, n], the best found for the sum of |error|^p.

    Args:
        importance: [g, n] weights of the errors; None for all alike.
        p: the norm, between 0 and 1.
        threshold: the residual from which on a weight is an outlier, in standard deviations of its group.
    """
    weights = torch.ones_like(values[:1]) if importance is None else importance
    mass = weights.expand_as(values).sum(0, keepdim=True)
    deviation = values.std(0, keepdim=True, correction=0)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    beta = threshold ** (p - 2)
    least = torch.full_like(scale, torch.inf)
    best_scale, best_offset = scale, offset
    for _ in range(_ITERATIONS):
        usable = torch.where(scale > 0, scale, torch.inf)
        codes = ((values - offset) / usable).round_().clamp_(0, qmax)
        residual = (values - offset - scale * codes) / deviation
        error = (residual.abs().pow(p) * weights).sum(0, keepdim=True)
        better = error < least
        least = torch.minimum(error, least)
        best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, offset, best_offset)
        target = values - deviation * shrink(residual, beta, p)
        code_mean = (codes * weights).sum(0, keepdim=True) / mass
        mean = (target * weights).sum(0, keepdim=True) / mass
        covariance = (weights * (codes - code_mean) * target).sum(0, keepdim=True)
        variance = (weights * (codes - code_mean).square()).sum(0, keepdim=True)
        defined = (variance > 1e-5 * mass) & (covariance > 0)
        scale = torch.where(defined, covariance / variance.clamp_min(1e-30), scale)
        offset = torch.where(defined, mean - scale * code_mean, offset)
        beta *= _ANNEALING
    return best_scale, best_offset
