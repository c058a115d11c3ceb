"""Products of two thin matrices: their norm, their best approximation of lower rank.

`B A` is never formed: with B = Q R and Aᵀ = P S it is Q (R Sᵀ) Pᵀ, and R Sᵀ is small.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `B A` of a given rank (Eckart and Young, 1936).

    Args:
        a: A, (r, in_features).
        b: B, (out_features, r).
        rank: At most r.

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
    """The singular values of `B A`, largest first, in float64.

    Args:
        a: A, (r, in_features).
        b: B, (out_features, r).

    Returns:
        (min(r, in_features, out_features),).
    """
    r = torch.linalg.qr(b.double(), mode="r").R
    s = torch.linalg.qr(a.double().T, mode="r").R
    return torch.linalg.svdvals(r @ s.T)


def norm(a: Tensor, b: Tensor) -> float:
    """The Frobenius norm of `B A`, computed in float64.

    Args:
        a: A, (r, in_features).
        b: B, (out_features, r).
    """
    return float(torch.linalg.vector_norm(singular_values(a, b)))


def relative_difference(pair: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """`|B' A' - B A| / |B A|` in the Frobenius norm.

    Args:
        pair: A' and B'.
        other: A and B.
    """
    a = torch.cat([pair[0].double(), other[0].double()])
    b = torch.cat([pair[1].double(), -other[1].double()], dim=1)
    size = norm(*other)
    return norm(a, b) / size if size else 0.0
