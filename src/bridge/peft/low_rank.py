"""Products of two thin matrices: norm, singular values, best approximation of lower rank.

`B A` is never formed: with B = Q R and Aᵀ = P S it is Q (R Sᵀ) Pᵀ, and R Sᵀ is small.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `B A` of a given rank (Eckart and Young, 1936).

    Returns:
        A of shape (rank, in_features) and B of shape (out_features, rank), in the dtypes given,
        each with the square root of the singular values.
    """
    q, r = torch.linalg.qr(b.double())
    p, s = torch.linalg.qr(a.double().T)
    u, singular, vt = torch.linalg.svd(r @ s.T)
    root = singular[:rank].sqrt()
    new_a = root[:, None] * (vt[:rank] @ p.T)
    new_b = q @ u[:, :rank] * root
    return new_a.to(a.dtype), new_b.to(b.dtype)


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """The min(r, in_features, out_features) singular values of `B A`, largest first, in float64."""
    r = torch.linalg.qr(b.double(), mode="r").R
    s = torch.linalg.qr(a.double().mT, mode="r").R
    return torch.linalg.svdvals(r @ s.mT)


def norm(a: Tensor, b: Tensor) -> float:
    """The Frobenius norm of `B A`, in float64, from two matrices of rank × rank.

    `‖B A‖² = tr(Aᵀ Bᵀ B A) = Σ (Bᵀ B) ∘ (A Aᵀ)`.
    """
    a, b = a.double(), b.double()
    squared = float(((b.mT @ b) * (a @ a.mT)).sum())
    return math.sqrt(max(squared, 0.0))


def kept_energy(a: Tensor, b: Tensor, rank: int) -> float:
    """Share of the squared singular values of `B A` in the `rank` largest; 1 for a zero update.

    Of a stack of them, the share in the `rank` largest of each.
    """
    if rank >= a.shape[-2]:
        return 1.0
    squares = singular_values(a, b).square()
    total = float(squares.sum())
    return float(squares[..., :rank].sum()) / total if total else 1.0


def used_rank(a: Tensor, b: Tensor, energy: float = 0.99) -> int:
    """The smallest rank that holds `energy`, a share, of the squared singular values of `B A`.

    Of a stack of them, the largest of these ranks.
    """
    if a.dim() == 3:
        return max(used_rank(*pair, energy) for pair in zip(a, b, strict=True))
    squares = singular_values(a, b).square()
    total = float(squares.sum())
    if total == 0.0:
        return 0
    held = squares.cumsum(0) / total
    return min(int((held < energy).sum()) + 1, squares.numel())


def relative_difference(pair: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """`|B' A' - B A| / |B A|` in the Frobenius norm, of the pairs (A', B') and (A, B)."""
    a = torch.cat([pair[0].double(), other[0].double()])
    b = torch.cat([pair[1].double(), -other[1].double()], dim=1)
    # of a small difference the singular values are exact, where `norm` loses half the digits
    difference = float(torch.linalg.vector_norm(singular_values(a, b)))
    size = norm(*other)
    return difference / size if size else 0.0
