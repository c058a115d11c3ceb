"""The narrow products of a LoRA branch, over tokens, with the dropout mask where it belongs.

    h = s A x                 s = alpha / dim; "pre" dropout acts on this x
    y += B h                  "post" dropout acts on B h
    dh = s Bᵀ dy,  dB = dy hᵀ
    dx += Aᵀ dh,   dA = dh xᵀ

In the code tokens come first: x (tokens, in), y (tokens, out), h (tokens, dim). Input side
(x, A) and output side (y, Bᵀ) are alike, so there are two products and their gradients: `contract`
wide tokens to narrow ones, and `expand_` narrow ones into wide ones. No autograd here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.peft.ops.dropout import SeededMask, apply_, as_wide_as, consume_

# Masked tokens are worked in blocks of about this many elements, which stay in cache.
_BLOCK_ELEMENTS = 2**19
# Rows of h of at most this many bytes are faster computed as columns (MKL and oneDNN alike).
_NARROW_BYTES = 32
# From this many bytes on, MKL is faster at (xᵀ h)ᵀ than at hᵀ x.
_WIDE_BYTES = 256


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

    def masks(
        self, seed: int | None, x: Tensor, out_features: int
    ) -> tuple[SeededMask | None, SeededMask | None, float]:
        """Return the mask of x (tokens, in), that of the branch's output, and the factor of h.

        The factor is ``scale``, with dropout's rescaling folded in.
        """
        if seed is None:
            return None, None, self.scale
        tokens, in_features = x.shape
        if self.position == "pre":
            mask = SeededMask(tokens, in_features, self.dropout, x.device, seed)
            return mask, None, self.scale / mask.keep_probability
        mask = SeededMask(tokens, out_features, self.dropout, x.device, seed)
        return None, mask, self.scale / mask.keep_probability


def contract(x: Tensor, a: Tensor, mask: SeededMask | None) -> Tensor:
    """Return ``x aᵀ``.

    Args:
        x: (tokens, features).
        a: (dim, features).
        mask: What to drop of x, or None.

    Returns:
        (tokens, dim), in the dtype of ``a``.
    """
    if mask is None and x.dtype == a.dtype:
        return _narrow(x, a)
    return torch.cat([_narrow(_masked(x[rows], a, kept), a) for rows, kept in _blocks(x, a, mask)])


def contract_backward(
    x: Tensor, dh: Tensor, a: Tensor, s: float, mask: SeededMask | None, dx: Tensor | None
) -> Tensor:
    """Add ``s dh a``, masked, into dx in place, where there is one, and return ``s dhᵀ x``.

    Args:
        x: (tokens, features).
        dh: (tokens, dim), the gradient of ``contract``'s result over s.
        a: (dim, features).
        s: Factor.
        mask: What `contract` dropped of x, or None.
        dx: (tokens, features) or None.

    Returns:
        (dim, features), the gradient of ``a``.
    """
    if mask is None and x.dtype == a.dtype:
        if dx is not None:
            dx.addmm_(dh, a, alpha=s)
        return _outer(dh, x, s)
    total = _Sum()
    for rows, kept in _blocks(x, a, mask):
        if dx is not None:
            _add_product_(dx[rows], dh[rows], a, s, kept)
        total.add(_outer(dh[rows], _masked(x[rows], a, kept), s))
    return total.value.to(a.dtype)


def expand_(y: Tensor, h: Tensor, a: Tensor, s: float, mask: SeededMask | None) -> None:
    """Add ``s h a`` into y in place.

    Args:
        y: (tokens, features).
        h: (tokens, dim).
        a: (dim, features).
        s: Factor.
        mask: What to drop of the product, or None.
    """
    if mask is None and y.dtype == a.dtype:
        y.addmm_(h, a, alpha=s)
        return
    for rows, kept in _blocks(y, a, mask):
        _add_product_(y[rows], h[rows], a, s, kept)


def expand_backward(
    dy: Tensor, h: Tensor, a: Tensor, s: float, mask: SeededMask | None
) -> tuple[Tensor, Tensor]:
    """Return ``dy aᵀ``, the gradient of h over s, and ``s hᵀ dy``, that of ``a``.

    Args:
        dy: (tokens, features).
        h: (tokens, dim).
        a: (dim, features).
        s: Factor.
        mask: What `expand_` dropped of the product, or None.

    Returns:
        (tokens, dim) and (dim, features).
    """
    if mask is None and dy.dtype == a.dtype:
        return _narrow(dy, a), _outer(h, dy, s)
    total, dhs = _Sum(), []
    for rows, kept in _blocks(dy, a, mask):
        block = _masked(dy[rows], a, kept)
        dhs.append(_narrow(block, a))
        total.add(_outer(h[rows], block, s))
    return torch.cat(dhs), total.value.to(a.dtype)


def _blocks(x: Tensor, a: Tensor, mask: SeededMask | None) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield blocks of rows of x, each with its mask as wide as the elements of ``a``."""
    step = max(1, _BLOCK_ELEMENTS // x.shape[1])
    for start in range(0, max(x.shape[0], 1), step):
        rows = slice(start, start + step)
        yield rows, None if mask is None else as_wide_as(mask.block(rows), a.dtype)


def _masked(x: Tensor, a: Tensor, kept: Tensor | None) -> Tensor:
    """A block of x in the dtype of ``a``, its dropped elements 0; uses up ``kept``."""
    x = x.to(a.dtype)
    return x if kept is None else consume_(kept, x)


def _add_product_(y: Tensor, h: Tensor, a: Tensor, s: float, kept: Tensor | None) -> None:
    """Add ``s h a``, its dropped elements 0, into a block of y in place."""
    product = h @ a
    y.add_(product if kept is None else apply_(product, kept), alpha=s)


def _narrow(x: Tensor, a: Tensor) -> Tensor:
    """``x aᵀ``: (tokens, dim)."""
    if a.shape[0] * a.element_size() <= _NARROW_BYTES:
        return (a @ x.t()).t()
    return x @ a.t()


def _outer(h: Tensor, x: Tensor, s: float) -> Tensor:
    """``s hᵀ x``: (dim, features)."""
    nothing = h.new_empty(())  # with beta=0 it is not read
    if h.shape[1] * h.element_size() >= _WIDE_BYTES:
        return torch.addmm(nothing, x.t(), h, beta=0, alpha=s).t()
    return torch.addmm(nothing, h.t(), x, beta=0, alpha=s)


class _Sum:
    """A sum over blocks, kept in float32 or better until it is rounded once."""

    value: Tensor

    def __init__(self) -> None:
        self._parts = 0

    def add(self, part: Tensor) -> None:
        self._parts += 1
        if self._parts == 1:
            self.value = part
        elif self.value.itemsize == 2:
            self.value = self.value.float().add_(part)
        else:
            self.value.add_(part)
