"""The start of LoRA in closed form for a layer's inputs: B A minimising E ||(D - B A) x||^2, D = W - Q.

With M = E[x x^T] = S S^T that is ||(D - B A) S||_F^2, whose minimum keeps the r leading singular directions of D S
(Eckart & Young): B A = U U^T D, where U [out, r] holds the leading eigenvectors of D M D^T. The same minimum as in
CLoQ (arXiv:2501.18475), QERA (arXiv:2410.06040) and EoRA (arXiv:2410.21271), which go by S and its inverse; no root
and no inverse is needed here, so a singular moment is nothing special.

Beside plain SVD, which is this for M = 1, it matters because real inputs are far from white.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Heights up to which D M D^T is decomposed in full, and multiplications that are affordable in float64 for it.
_EXACT_BELOW = 1024
_EXACT_PRODUCTS = 2**34
_ITERATIONS, _OVERSAMPLING = 8, 3
# Eigenvalues below this share of the largest are what rounding left of zeros.
_ZERO = {torch.float64: 1e-13, torch.float32: 1e-6}


@dataclass(frozen=True)
class WeightedFactors:
    """The best rank-r approximation of a residual for its inputs.

    Attributes:
        a, b: [r, in_features] and [out_features, r], float32; direction by direction of equal norm.
        energy: [r], float64: what each direction takes off E ||D x||^2, falling. Over `residual_energy` in sum it is
            the share that is held.
    """

    a: Tensor
    b: Tensor
    energy: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def truncated(self, rank: int) -> WeightedFactors:
        """The best approximation of a lower rank: its first directions.

        Raises:
            ValueError: if `rank` is negative or above this one.
        """
        if not 0 <= rank <= self.rank:
            raise ValueError(f"rank {rank}: these factors have {self.rank}")
        return WeightedFactors(self.a[:rank].clone(), self.b[:, :rank].clone(), self.energy[:rank].clone())

    def to(self, device: torch.device | str) -> WeightedFactors:
        return WeightedFactors(self.a.to(device), self.b.to(device), self.energy.to(device))


@torch.no_grad()
def weighted_factors(residual: Tensor, moment: Tensor, rank: int) -> WeightedFactors:
    """The factors of `residual` [out_features, in_features] for inputs with second moment `moment`.

    Where `rank` exceeds the rank of the product the rest is zero. Deterministic; the global random state is left
    alone. Up to 1,024 outputs it is an eigendecomposition in float64, beyond that subspace iteration from a random
    start in float32.

    Args:
        moment: M [in_features, in_features], symmetric and positive semidefinite, or its diagonal [in_features].

    Raises:
        ValueError: if a shape does not fit, a value is not finite, the diagonal is negative, or `rank` is below 1.
    """
    _check(residual, moment)
    if rank < 1:
        raise ValueError(f"rank is {rank}: it must be 1 or more")
    out_features, in_features = residual.shape
    smaller = min(out_features, in_features)
    kept = min(rank, smaller)
    exact = out_features <= _EXACT_BELOW and out_features * in_features * in_features <= _EXACT_PRODUCTS
    dtype = torch.float64 if exact else torch.float32
    # In units of their largest values: squares of squares are ahead.
    unit, mean = (float(t.abs().max()) or 1.0 for t in (residual, moment))
    matrix, metric = residual.to(torch.float64).div(unit).to(dtype), moment.to(residual.device, dtype) / mean
    energy, u = _exact(matrix, metric) if exact else _iterated(matrix, metric, kept)
    energy, u = energy[:kept], u[:, :kept]
    present = energy > _ZERO[dtype] * energy[:1]
    v = u.t() @ matrix  # [kept, in_features]
    norm = v.norm(dim=1)
    present &= norm > 0
    root = torch.where(present, norm, 1.0).sqrt()
    u, v, energy = u * present, v * present[:, None], (energy * present).double()
    a, b = v / root[:, None] * unit**0.5, u * root * unit**0.5
    pad = rank - kept
    return WeightedFactors(
        nn.functional.pad(a.float(), (0, 0, 0, pad)).contiguous(),
        nn.functional.pad(b.float(), (0, pad)).contiguous(),
        nn.functional.pad(energy * (unit * unit * mean), (0, pad)),
    )


@torch.no_grad()
def residual_energy(residual: Tensor, moment: Tensor) -> float:
    """E ||D x||^2 = tr(D M D^T), for M [in_features, in_features] or its diagonal [in_features].

    Raises:
        ValueError: as `weighted_factors`.
    """
    _check(residual, moment)
    matrix = residual.to(torch.float64)
    return float((matrix * _times(matrix, moment.to(matrix))).sum())


def _check(residual: Tensor, moment: Tensor) -> None:
    if residual.dim() != 2 or not residual.is_floating_point() or residual.numel() == 0:
        raise ValueError(
            f"expected a non-empty matrix of floats, not {residual.dtype} of shape {tuple(residual.shape)}"
        )
    width = residual.shape[1]
    if moment.shape not in ((width,), (width, width)) or not moment.is_floating_point():
        raise ValueError(
            f"the moment is {moment.dtype} of shape {tuple(moment.shape)}: it must be floats [{width}, {width}], "
            f"or its diagonal [{width}]"
        )
    if not (torch.isfinite(residual).all() and torch.isfinite(moment).all()):
        raise ValueError("the residual and the moment must be finite")
    if (moment if moment.dim() == 1 else moment.diagonal()).lt(0).any():
        raise ValueError("the diagonal of a moment must not be negative")


def _times(matrix: Tensor, moment: Tensor) -> Tensor:
    """`matrix` M, [n, in_features]."""
    return matrix * moment if moment.dim() == 1 else matrix @ moment


def _exact(matrix: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenvalues of D M D^T, largest first [out], and the eigenvectors [out, out]."""
    product = _times(matrix, moment) @ matrix.t()
    energy, u = torch.linalg.eigh((product + product.t()) / 2)
    return energy.flip(0), u.flip(1)


def _iterated(matrix: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues of D M D^T and more, by subspace iteration."""
    columns = min(rank * _OVERSAMPLING, *matrix.shape)

    def product(u: Tensor) -> Tensor:
        return matrix @ _times(u.t() @ matrix, moment).t()

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), columns, generator=generator).to(matrix)
    u = torch.linalg.qr(product(start)).Q
    for _ in range(_ITERATIONS):
        u = torch.linalg.qr(product(u)).Q
    small = u.t() @ product(u)
    energy, turn = torch.linalg.eigh((small + small.t()) / 2)
    return energy.flip(0), u @ turn.flip(1)
