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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge.peft.ops.dropout import SeededMask, apply_, consume_
from bridge.peft.ops.ranks import ALONE, Ranks
from bridge.peft.ops.scratch import scratch

# Masked tokens are worked in blocks of about this many bytes. On a CPU a few such blocks stay in
# its last cache, and smaller ones cost more in calls than they save; a GPU wants few large kernels.
_BLOCK_BYTES = {"cpu": 2**22}
_BLOCK_BYTES_ON_DEVICE = 2**26


class Branch(NamedTuple):
    """What defines a branch in one call, beside its tensors.

    `scale` is ``alpha / dim``, `dropout` the effective probability, `position` ``"pre"`` or
    ``"post"``, `seed` that of the mask, or None where nothing is dropped; `ranks` says what several
    of them share.
    """

    scale: float
    dropout: float
    position: str
    seed: int | None
    ranks: Ranks = ALONE

    def masks(self, x: Tensor, b: Tensor) -> tuple[SeededMask | None, SeededMask | None, float]:
        """Return the mask of x (tokens, in), that of the branch's output, and the factor of h.

        The factor is ``scale``, with dropout's rescaling folded in.
        """
        if self.seed is None:
            return None, None, self.scale
        columns = x.shape[1] if self.position == "pre" else b.shape[0]
        mask = SeededMask(x.shape[0], columns, self.dropout, x.device, self.seed)
        s = self.scale / mask.keep_probability
        return (mask, None, s) if self.position == "pre" else (None, mask, s)


def contract(x: Tensor, a: Tensor, mask: SeededMask | None) -> Tensor:
    """Return ``x aᵀ``, (tokens, dim), in the dtype of ``a``, (dim, features); ``mask`` is of x."""
    if mask is None and x.dtype == a.dtype:
        return _narrow(x, a)
    return _cat([_narrow(_masked(x_, a, kept), a) for kept, x_ in _blocks(a, mask, x)])


def contract_backward(
    x: Tensor | None, dh: Tensor, a: Tensor, s: float, mask: SeededMask | None, dx: Tensor | None
) -> Tensor | None:
    """Add ``s dh a``, masked, into dx in place, where there is one, and return ``s dhᵀ x``.

    dh, (tokens, dim), is the gradient of `contract`'s result over s; the result that of ``a``.
    Without x, where ``a`` is frozen, there is none.
    """
    wide = dx if x is None else x
    if wide is None:
        return None
    if mask is None and wide.dtype == a.dtype:
        if dx is not None:
            dx.addmm_(dh, a, alpha=s)
        return None if x is None else _outer(dh, x, a, s)
    total = _Sum()
    for kept, x_, dh_, dx_ in _blocks(a, mask, wide, dh, wide if dx is None else dx):
        if dx is not None:
            _add_product_(dx_, dh_, a, s, kept)
        if x is not None:
            total.add(_outer(dh_, _masked(x_, a, kept), a, s))
    return None if x is None else total.value.to(a.dtype)


def expand_(y: Tensor, h: Tensor, a: Tensor, s: float, mask: SeededMask | None) -> None:
    """Add ``s h a``, masked, into y, (tokens, features), in place; h is (tokens, dim)."""
    if mask is None and y.dtype == a.dtype:
        y.addmm_(h, a, alpha=s)
        return
    for kept, y_, h_ in _blocks(a, mask, y, h):
        _add_product_(y_, h_, a, s, kept)


def expand_backward(
    dy: Tensor, h: Tensor, a: Tensor, s: float, mask: SeededMask | None
) -> tuple[Tensor, Tensor]:
    """Return ``dy aᵀ``, the gradient of h over s, and ``s hᵀ dy``, that of ``a``."""
    if mask is None and dy.dtype == a.dtype:
        return _narrow(dy, a), _outer(h, dy, a, s)
    total, dhs = _Sum(), []
    for kept, dy_, h_ in _blocks(a, mask, dy, h):
        block = _masked(dy_, a, kept)
        dhs.append(_narrow(block, a))
        total.add(_outer(h_, block, a, s))
    return _cat(dhs), total.value.to(a.dtype)


def row_slices(wide: Tensor, dtype: torch.dtype, tensors: int = 1) -> Iterator[slice]:
    """Cut (tokens, features) into blocks of rows, at least one, of a size that is fast.

    Args:
        wide: The tensor to cut.
        dtype: Of what is computed with.
        tensors: How many as wide ones are worked at once, which share the cache.
    """
    size = _BLOCK_BYTES.get(wide.device.type, _BLOCK_BYTES_ON_DEVICE) // tensors
    step = max(1, size // (wide.shape[1] * dtype.itemsize))
    for start in range(0, max(1, wide.shape[0]), step):
        yield slice(start, start + step)


def _blocks(
    a: Tensor, mask: SeededMask | None, wide: Tensor, *others: Tensor
) -> Iterator[tuple[Any, ...]]:
    """Yield blocks of rows: the mask, as wide as elements of ``a``, and those of the tensors."""
    for rows in row_slices(wide, a.dtype):
        block = wide[rows]
        kept = None if mask is None else mask.of(rows, block, a.dtype)
        yield kept, block, *(t[rows] for t in others)


def _cat(parts: list[Tensor]) -> Tensor:
    """The blocks in one, without a copy where there is one only."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _masked(x: Tensor, a: Tensor, kept: Tensor | None) -> Tensor:
    """A block of x in the dtype of ``a``, its dropped elements 0; uses up ``kept``."""
    if x.dtype != a.dtype:
        x = scratch("converted", x, a.dtype).copy_(x)
    return x if kept is None else consume_(kept, x)


def _add_product_(y: Tensor, h: Tensor, a: Tensor, s: float, kept: Tensor | None) -> None:
    """Add ``s h a``, its dropped elements 0, into a block of y in place."""
    # s enters before the product is rounded; with beta=0 what was there is not read
    product = scratch("product", y, a.dtype).addmm_(h, a, beta=0, alpha=s)
    y.add_(product if kept is None else apply_(product, kept))


def _narrow(x: Tensor, a: Tensor) -> Tensor:
    """``x aᵀ``: (tokens, dim), by the way that is fastest on a CPU with AVX-512."""
    dim, features = a.shape
    if a.element_size() == 2 and dim < 32 and features <= 4096 and x.device.type == "cpu":
        return (a @ x.t()).t()  # oneDNN: as columns in half the time
    # MKL: fewer than 16 columns from a matrix stored the other way take twice the time
    return x @ (a.contiguous() if dim < 16 else a).t()


def _outer(h: Tensor, x: Tensor, a: Tensor, s: float) -> Tensor:
    """``s hᵀ x``, of the shape of ``a``: (dim, features); ``a`` itself is not read."""
    return torch.addmm(a, h.t(), x, beta=0, alpha=s)


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
