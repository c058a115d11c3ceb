"""A branch whose A or B is split over ranks: what the ranks exchange between A and B.

    h = s A x          each rank with its part of A, or of the tokens
    h = exchanged(h)   (tokens, dim): the only activation that travels, dim wide and not in_features
    y += B h           each rank with its part of B, or of the tokens

Backward goes the same way in the other direction. A factor that is whole on every rank sees only a
part of the tokens, or of the sum, where `sums_a` or `sums_b` says so: then its gradient is summed
over the ranks here, within autograd, so that a training loop need not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridge.peft.ops.dispatch import cast_for_products, choose_path, lora_add
from bridge.peft.ops.dropout import SeededMask, draw_seed
from bridge.peft.ops.fused import rows_of
from bridge.peft.ops.products import contract, contract_backward, expand_, expand_backward
from bridge.peft.ops.reference import add_in_base_dtype

Way = Literal["keep", "sum", "gather", "scatter"]


class Exchange(NamedTuple):
    """What the ranks of a group exchange in one branch.

    Attributes:
        group: The ranks; None is this process alone.
        h: What becomes of h in forward: kept, summed over the ranks, gathered (tokens of one rank
            after those of another), or summed and scattered (each rank its tokens).
        dh: What becomes of its gradient in backward: the adjoint.
        sums_a: A is whole on every rank, its gradient a part.
        sums_b: B likewise.
        splits_x: Each rank has its own part of x, which wants a dropout mask of its own.
        splits_y: Each rank has its own part of y, likewise.
    """

    group: dist.ProcessGroup | None = None
    h: Way = "keep"
    dh: Way = "keep"
    sums_a: bool = False
    sums_b: bool = False
    splits_x: bool = False
    splits_y: bool = False

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return 1 if self.group is None else self.group.size()

    def moved(self, t: Tensor, way: Way) -> Tensor:
        """`t`, (tokens, …), as it is after the ranks have exchanged it; `t` may be written to."""
        if way == "keep" or self.size == 1:
            return t
        t = t.contiguous()
        if way == "sum":
            dist.all_reduce(t, group=self.group)
            return t
        if way == "gather":
            whole = t.new_empty((t.shape[0] * self.size, *t.shape[1:]))
            dist.all_gather_into_tensor(whole, t, group=self.group)
            return whole
        part = t.new_empty((t.shape[0] // self.size, *t.shape[1:]))
        dist.reduce_scatter_tensor(part, t, group=self.group)
        return part

    def summed(self, gradient: Tensor) -> Tensor:
        """The sum of a factor's gradient over the ranks, added in float32 or better."""
        wide = gradient.float() if gradient.itemsize == 2 else gradient
        return self.moved(wide, "sum").to(gradient.dtype)


class Dropped(NamedTuple):
    """The dropout of one call: the mask of x or of y, the factor of h, and 1 / (1 - p)."""

    pre: SeededMask | None
    post: SeededMask | None
    factor: float

    @classmethod
    def of(
        cls, x: Tensor, width: int, tokens: int, p: float, position: str, exchange: Exchange
    ) -> Dropped:
        """Draw the mask of one call.

        Args:
            x: The branch's input, (..., in_features).
            width: Features of this rank's y.
            tokens: Rows of this rank's y.
            p: Probability in [0, 1).
            position: `"pre"` or `"post"`.
            exchange: Where every rank has a part of its own, the rank is mixed into the seed;
                else the masks are alike, given that the ranks' default generators are.
        """
        if p == 0.0:
            return cls(None, None, 1.0)
        pre = position == "pre"
        differs = exchange.splits_x if pre else exchange.splits_y
        rank = exchange.group.rank() if differs and exchange.group is not None else 0
        shape = (rows_of(x).shape[0], x.shape[-1]) if pre else (tokens, width)
        mask = SeededMask(*shape, p, x.device, draw_seed(rank))
        factor = 1.0 / mask.keep_probability
        return cls(mask, None, factor) if pre else cls(None, mask, factor)


def exchanged_lora_add(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    exchange: Exchange,
    dropout: float = 0.0,
    position: str = "post",
) -> Tensor:
    """Return ``base_out + scale · B A x`` with h exchanged between the ranks.

    Args:
        base_out: This rank's result of the base, (..., out_features of this rank); only read.
        x: This rank's input, (..., in_features of this rank).
        lora_a: This rank's A, (dim, in_features of this rank).
        lora_b: This rank's B, (out_features of this rank, dim).
        scale: Factor of the branch.
        exchange: What the ranks exchange.
        dropout: The effective probability: 0 in evaluation.
        position: `"pre"` or `"post"`.
    """
    if exchange.size == 1:
        return lora_add(base_out, x, lora_a, lora_b, scale, dropout, position)
    x, lora_a, lora_b = cast_for_products(x, lora_a, lora_b)
    tokens = rows_of(base_out).shape[0]
    drop = Dropped.of(x, base_out.shape[-1], tokens, dropout, position, exchange)
    trains = not torch.is_grad_enabled() or lora_b.requires_grad
    path = choose_path(base_out, x, lora_a, lora_b, plain_linear=False, trains_b=trains)
    if path.name == "reference":
        branch = exchanged_branch_reference(x, lora_a, lora_b, scale, exchange, drop)
        return add_in_base_dtype(base_out, branch)
    return _ExchangedLoRAAdd.apply(base_out, x, lora_a, lora_b, scale, exchange, drop)


def exchanged_branch_reference(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, exchange: Exchange, drop: Dropped
) -> Tensor:
    """Return the branch alone by the plain formula, for `exchanged_lora_add`'s arguments."""
    a = _differentiably(lora_a, lambda t: t, exchange.summed) if exchange.sums_a else lora_a
    b = _differentiably(lora_b, lambda t: t, exchange.summed) if exchange.sums_b else lora_b
    h = F.linear(_masked(x.to(a.dtype), drop.pre), a) * scale
    h = _differentiably(
        h,
        lambda t: exchange.moved(t.clone(), exchange.h),
        lambda dt: exchange.moved(dt.clone(), exchange.dh),
    )
    return _masked(F.linear(h, b), drop.post)


def _masked(x: Tensor, mask: SeededMask | None) -> Tensor:
    if mask is None:
        return x
    kept = mask.whole().view(x.shape)
    return torch.where(kept, x / mask.keep_probability, 0.0)


def _differentiably(
    t: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> Tensor:
    return _Mapped.apply(t, there, back)


class _Mapped(torch.autograd.Function):
    """A function of a tensor, and what becomes of the gradient."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, there: Any, back: Any) -> Tensor:
        ctx.back = back
        out = there(t)
        return out.view_as(out) if out is t else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.back(grad), None, None


class _ExchangedLoRAAdd(torch.autograd.Function):
    """The fast twin of `exchanged_branch_reference`: saves x, A, B and h, and nothing larger."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        base_out, x, a, b, scale, exchange, drop = inputs
        s = scale * drop.factor
        h = exchange.moved(contract(rows_of(x), a, drop.pre), exchange.h)
        y = base_out.clone(memory_format=torch.contiguous_format)
        expand_(rows_of(y), h, b.t(), s, drop.post)
        ctx.save_for_backward(x, a, b, h)
        ctx.s, ctx.exchange, ctx.drop = s, exchange, drop
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, a, b, h = ctx.saved_tensors
        s, exchange, drop = ctx.s, ctx.exchange, ctx.drop
        rows = rows_of(x)
        dh, db = expand_backward(rows_of(dy).contiguous(), h, b.t(), s, drop.post)
        dh = exchange.moved(dh, exchange.dh)
        dx = torch.zeros_like(rows) if ctx.needs_input_grad[1] else None
        da = contract_backward(rows, dh, a, s, drop.pre, dx)
        assert da is not None
        if exchange.sums_a:
            da = exchange.summed(da)
        if exchange.sums_b:
            db = exchange.summed(db)
        dx = None if dx is None else dx.view(x.shape)
        return dy, dx, da, db.t(), None, None, None
