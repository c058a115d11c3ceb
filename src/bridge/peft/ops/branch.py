"""The branch over rows of tokens: forward and backward products, blocked where it drops.

    h = s A x                 s = alpha / dim; "pre" dropout acts on this x
    y += B h                  "post" dropout acts on B h
    dh = s Bᵀ dy,  dx += Aᵀ dh,  dA = dh xᵀ,  dB = dy hᵀ

In the code tokens come first: x (tokens, in), y (tokens, out), h (tokens, dim). No autograd here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.peft.ops.dropout import SeededMask, apply_, as_wide_as, consume_

# Where tokens are worked in blocks, a block has about this many elements and stays in cache.
_BLOCK_ELEMENTS = 2**19


@dataclass(frozen=True)
class Branch:
    """What defines a branch beside its tensors.

    Attributes:
        scale: ``alpha / dim``.
        dropout: The effective drop probability.
        position: ``"pre"`` or ``"post"``.
    """

    scale: float
    dropout: float
    position: str

    def mask(self, seed: int | None, x: Tensor, y: Tensor) -> SeededMask | None:
        """Return the mask of a call over x (tokens, in) and y (tokens, out), if it drops."""
        if seed is None:
            return None
        rows, columns = (x if self.position == "pre" else y).shape
        return SeededMask(rows, columns, self.dropout, x.device, seed)

    def factor(self, mask: SeededMask | None) -> float:
        """Return s, with dropout's rescaling folded in."""
        return self.scale if mask is None else self.scale / mask.keep_probability


def add_branch_(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, seed: int | None, branch: Branch
) -> Tensor:
    """Add the branch into y in place and return h.

    Args:
        y: (tokens, out), the base's result.
        x: (tokens, in).
        a: (dim, in).
        b: (out, dim).
        seed: The seed of the mask, or None where nothing is dropped.
        branch: Scale and dropout.

    Returns:
        h, (tokens, dim), what backward wants beside x.
    """
    mask = branch.mask(seed, x, y)
    s = branch.factor(mask)
    hs = []
    for rows, pre, post in _blocks(y, x, a.dtype, mask, branch.position):
        x_ = x[rows].to(a.dtype)
        h = ((x_ if pre is None else consume_(pre, x_)) @ a.t()).mul_(s)
        _accumulate_(y[rows], h, b.t(), post)
        hs.append(h)
    return hs[0] if len(hs) == 1 else torch.cat(hs)


def branch_backward(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    h: Tensor,
    seed: int | None,
    branch: Branch,
    dx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Add the branch's gradient into dx in place, where there is one, and return dA and dB.

    Args:
        dy: (tokens, out).
        x: (tokens, in).
        a: (dim, in).
        b: (out, dim).
        h: (tokens, dim), from `add_branch_`.
        seed: The seed given to `add_branch_`.
        branch: Scale and dropout.
        dx: (tokens, in), the base's gradient, or None.

    Returns:
        dA (dim, in) and dB (out, dim), in the dtypes of ``a`` and ``b``.
    """
    mask = branch.mask(seed, x, dy)
    s = branch.factor(mask)
    da, db = _Sum(a), _Sum(b)
    for rows, pre, post in _blocks(dy, x, a.dtype, mask, branch.position):
        dy_, x_ = dy[rows].to(a.dtype), x[rows].to(a.dtype)
        if post is not None:
            dy_ = consume_(post, dy_)
        dh = (dy_ @ b).mul_(s)
        if dx is not None:
            _accumulate_(dx[rows], dh, a, pre)
        if pre is not None:
            x_ = consume_(pre, x_)
        da.add(_outer(dh, x_))
        db.add(_outer(h[rows], dy_).t())
    return da.total(), db.total()


class _Sum:
    """A sum over blocks, kept in float32 or better and rounded once."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._total: Tensor | None = None

    def add(self, part: Tensor) -> None:
        if self._total is None:
            self._total = part
        elif self._total.dtype in (torch.bfloat16, torch.float16):
            self._total = self._total.float().add_(part)
        else:
            self._total.add_(part)

    def total(self) -> Tensor:
        return (
            torch.zeros_like(self._like)
            if self._total is None
            else self._total.to(self._like.dtype)
        )


def _blocks(
    y: Tensor, x: Tensor, dtype: torch.dtype, mask: SeededMask | None, position: str
) -> Iterator[tuple[slice, Tensor | None, Tensor | None]]:
    """Yield blocks of rows, each with its mask for x and for y; one block if nothing is masked."""
    tokens, width = x.shape[0], max(x.shape[1], y.shape[1])
    if mask is None and x.dtype == y.dtype == dtype:
        yield slice(0, tokens), None, None
        return
    step = max(1, _BLOCK_ELEMENTS // width)
    scratch = None
    for start in range(0, max(tokens, 1), step):
        rows = slice(start, min(start + step, tokens))
        if mask is None:
            yield rows, None, None
            continue
        kept = mask.block(rows, scratch)
        scratch = kept if scratch is None else scratch
        kept = as_wide_as(kept, dtype)
        yield (rows, kept, None) if position == "pre" else (rows, None, kept)


def _accumulate_(out: Tensor, left: Tensor, right: Tensor, mask: Tensor | None) -> None:
    """Add ``left @ right``, less what the mask drops, into ``out`` in place."""
    if mask is None and out.dtype == left.dtype:
        out.addmm_(left, right)
        return
    product = left @ right
    out.add_(product if mask is None else apply_(product, mask))


def _outer(h: Tensor, y: Tensor) -> Tensor:
    """Return ``hᵀ y``, (dim, features), for h (tokens, dim) and y (tokens, features)."""
    return h.t() @ y
