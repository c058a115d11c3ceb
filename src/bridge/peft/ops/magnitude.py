"""DoRA's magnitude: the norms of the rows of ``W + s B A``, and outputs rescaled by them.

    n² = |W|² + 2 s (W Aᵀ) · B + s² (B A Aᵀ) · B           row by row: no dense ``B A``
    y  = c v + (1 - c) b,   c = m / n                      v = W x + b + s B A x
    dv = c dy,   dm = Σ dy (v - b) / n                     n is a constant (the paper's section 4.3)

Backward keeps v, which is not the result, so that consumers may write into that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bridge.peft.ops.fused import rows_of
from bridge.peft.ops.products import row_slices
from bridge.peft.ops.reference import rescale_reference
from bridge.peft.ops.scratch import scratch


class RescaleFunction(torch.autograd.Function):
    """``y = c v + (1 - c) b`` with ``c = m / n``: one pass forward, one backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return y; the inputs are those of `rescale_forward`."""
        y, factor = rescale_forward(*inputs)
        ctx.save_for_backward(*inputs, factor)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of v, m and b, where they are needed."""
        v, magnitude, norm, bias, factor = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _differentiable(v, magnitude, norm, bias, dy, needs)
        dy_rows, v_rows = rows_of(dy), rows_of(v)
        dv = torch.empty_like(dy_rows, memory_format=torch.contiguous_format) if needs[0] else None
        dc = torch.zeros_like(factor) if needs[1] else None
        for rows in row_slices(dy_rows, factor.dtype, tensors=4):  # dy, dv, v and a product
            dy_ = dy_rows[rows]
            if dv is not None:
                torch.mul(dy_, factor, out=dv[rows])
            if dc is not None:
                dc += _product(v_rows[rows], bias, dy_, factor.dtype).sum(0)
        dm = None if dc is None else _over(dc, norm, magnitude)
        db = (
            ((1 - factor) * dy_rows.sum(0, dtype=factor.dtype)).to(bias.dtype) if needs[3] else None
        )
        return None if dv is None else dv.view(dy.shape), dm, None, db


def rescale_forward(
    v: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `RescaleFunction`'s y, (..., out_features), and c, (out_features,).

    Args as in `rescale_reference`.
    """
    factor = factor_of(magnitude, norm)
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    if bias is None:
        return torch.mul(v, factor, out=y), factor
    return torch.addcmul((1 - factor) * bias, v, factor, out=y), factor


def factor_of(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return ``c = m / n``, (out_features,), in the dtype of the norms; 1 where a row is zero.

    A magnitude in 16 bits is rounded, and so the norm is: where m starts as the norm, c is 1.
    """
    rounded = norm.to(magnitude.dtype).to(norm.dtype) if magnitude.itemsize == 2 else norm
    return torch.where(rounded > 0, magnitude.to(norm.dtype) / rounded, 1)


def row_norms(squares: Tensor, projected: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the norms of the rows of ``W + scale * B A``, (out_features,).

    With B = 0 they are the roots of ``squares``, bit for bit. Where the update takes most of a row
    away, the norm n has a relative error of about eps |W|² / n².

    Args:
        squares: The squared norms of the rows of W, in the dtype of the computation.
        projected: W Aᵀ, (out_features, dim).
        a: (dim, in_features).
        b: (out_features, dim).
        scale: Factor of the branch.
    """
    a, b, projected = (t.to(squares.dtype) for t in (a, b, projected))
    change = (2 * scale * projected + scale**2 * (b @ (a @ a.t()))) * b
    return (squares + change.sum(1)).clamp_min(0).sqrt()


def row_squares(weight: Tensor) -> Tensor:
    """Return the squared norms of the rows of a weight, (out_features,), in float32 or better."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()


def _product(v: Tensor, bias: Tensor | None, dy: Tensor, dtype: torch.dtype) -> Tensor:
    """``(v - b) dy`` of a block, in ``dtype``; the result is scratch."""
    product = scratch("product", dy, dtype)
    if bias is None and v.dtype == dtype:
        return torch.mul(v, dy, out=product)
    product.copy_(v)
    return (product if bias is None else product.sub_(bias)).mul_(dy)


def _over(dc: Tensor, norm: Tensor, magnitude: Tensor) -> Tensor:
    """The gradient of m out of that of c: 0 where a row is zero and c is no function of m."""
    rounded = norm.to(magnitude.dtype).to(norm.dtype)
    return torch.where(rounded > 0, dc / rounded, 0).to(magnitude.dtype)


def _differentiable(
    v: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients by the reference formula, so that they can be differentiated again."""
    y = rescale_reference(v, magnitude, norm, bias)
    inputs = (v, magnitude, None, bias)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    grads: Iterator[Tensor] = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(grads) if need else None for need in needs)
