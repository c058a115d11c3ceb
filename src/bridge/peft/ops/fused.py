"""The LoRA linear as autograd functions that save x, A, B, h and one seed, and nothing larger.

x is for the gradients of A and W; where both are frozen it is not saved.

`products.py` has the products of the branch; here they are joined to a base. `docs/math.md` derives
the backward, `docs/memory.md` lists what is saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge.peft.errors import AdapterError
from bridge.peft.ops.products import Branch, contract, contract_backward, expand_, expand_backward
from bridge.peft.ops.ranks import NO_SECOND_DERIVATIVES
from bridge.peft.ops.reference import lora_branch_reference, lora_linear_reference


class LoRALinearFunction(torch.autograd.Function):
    """``y = W x + b + s B A x`` for a plain base; the branch is added into the base's result."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return y; the inputs are those of `linear_forward`."""
        y, h = linear_forward(*inputs)
        x, *tensors, ctx.branch = inputs
        keeps_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.x_shape = x.shape
        ctx.save_for_backward(x if keeps_x else None, *tensors, h)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of what needs them."""
        x, weight, bias, lora_a, lora_b, h = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            inputs = (x, weight, bias, lora_a, lora_b)
            return *_differentiable(lora_linear_reference, inputs, needs[:5], dy, ctx), None
        rows, dy = None if x is None else rows_of(x), rows_of(dy).contiguous()
        base_dx = (lambda: dy @ weight) if needs[0] else None
        dx, da, db = _branch_backward(ctx.branch, rows, dy, h, lora_a, lora_b, base_dx)
        dw = dy.t() @ rows if needs[1] and rows is not None else None
        dbias = dy.sum(0) if needs[2] else None
        da = da if needs[3] else None
        return None if dx is None else dx.view(ctx.x_shape), dw, dbias, da, db, None


class LoRAAddFunction(torch.autograd.Function):
    """``y = base_out + s B A x`` for the result of any base; ``base_out`` is only read."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return y; the inputs are those of `add_forward`."""
        y, h = add_forward(*inputs)
        _base_out, x, *tensors, ctx.branch = inputs
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, *tensors, h)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of what needs them."""
        x, lora_a, lora_b, h = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():
            inputs = (x, lora_a, lora_b)
            return dy, *_differentiable(lora_branch_reference, inputs, needs, dy, ctx), None
        rows, dy_rows = None if x is None else rows_of(x), rows_of(dy).contiguous()
        like = _stand_in(dy_rows, lora_a)
        zeros = functools.partial(torch.zeros, like.shape, dtype=ctx.x_dtype, device=like.device)
        base_dx = zeros if needs[0] else None
        dx, da, db = _branch_backward(ctx.branch, rows, dy_rows, h, lora_a, lora_b, base_dx)
        return dy, None if dx is None else dx.view(ctx.x_shape), da, db, None


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, branch: Branch
) -> tuple[Tensor, Tensor]:
    """Return `LoRALinearFunction`'s y, (..., out_features), and h, (tokens, dim)."""
    rows = rows_of(x)
    pre, post, s = branch.masks(rows, lora_b)
    # The narrow product comes first: it leaves x in cache for the wide one.
    h = contract(rows, lora_a, pre)
    y = plain_linear(x, weight, bias)
    expand_(rows_of(y), h, lora_b.t(), s, post)
    return y, h


def add_forward(
    base_out: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, branch: Branch
) -> tuple[Tensor, Tensor]:
    """Return `LoRAAddFunction`'s y, (..., out_features), and h, (tokens, dim)."""
    rows = rows_of(x)
    pre, post, s = branch.masks(rows, lora_b)
    h = contract(rows, lora_a, pre)
    y = base_out.clone(memory_format=torch.contiguous_format)
    expand_(rows_of(y), h, lora_b.t(), s, post)
    return y, h


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``W x + b`` as a tensor of its own that may be written to, in an autograd function."""
    y = F.linear(x, weight, bias)
    if y._is_view() or not y.is_contiguous():
        # Consumers may write into our result, which a view made in here would forbid.
        y = torch.ops.aten._unsafe_view(y.contiguous(), y.shape)
    return y


def _branch_backward(
    branch: Branch,
    x: Tensor | None,
    dy: Tensor,
    h: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    base_dx: Callable[[], Tensor] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return the gradients of x, A and B; that of A is None without x.

    What is summed over ranks is on its way while the gradient of x is computed.

    Args:
        branch: The branch of the call.
        x: (tokens, in_features); None where A is frozen.
        dy: (tokens, out_features).
        h: (tokens, dim), as forward gave it.
        lora_a: A.
        lora_b: B.
        base_dx: Gives the base's gradient of x, which may be written to; None: it is not wanted.
    """
    pre, post, s = branch.masks(_stand_in(dy, lora_a), lora_b)
    sum_a, sum_b = branch.ranks.sum_a, branch.ranks.sum_b
    dh, db = expand_backward(dy, h, lora_b.t(), s, post)
    summed_b = None if sum_b is None else sum_b.begin(db)
    if sum_a is None or x is None:
        dx = None if base_dx is None else base_dx()
        da = contract_backward(x, dh, lora_a, s, pre, dx)
    else:
        da = contract_backward(x, dh, lora_a, s, pre, None)
        assert da is not None
        summed_a = sum_a.begin(da)
        dx = None if base_dx is None else base_dx()
        contract_backward(None, dh, lora_a, s, pre, dx)
        da = summed_a()
    return dx, da, (db if summed_b is None else summed_b()).t()


def _stand_in(dy: Tensor, lora_a: Tensor) -> Tensor:
    """A tensor of the shape of x's rows, (tokens, in_features), that takes no memory."""
    return lora_a.new_empty(()).expand(dy.shape[0], lora_a.shape[1])


def rows_of(x: Tensor) -> Tensor:
    """Return x, (..., features), as a matrix of tokens, (tokens, features)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _differentiable(
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    dy: Tensor,
    ctx: Any,
) -> list[Tensor | None]:
    """Return the gradients by the reference formula, so that they can be differentiated again."""
    branch: Branch = ctx.branch
    x, lora_b = inputs[0], inputs[-1]
    assert lora_b is not None
    if branch.ranks.sum_a is not None or branch.ranks.sum_b is not None:
        raise AdapterError(NO_SECOND_DERIVATIVES)
    if x is None:
        raise AdapterError(
            "second derivatives need the input, which is not kept where A is frozen; train A too "
            "(requires_grad_(True) on lora_a)"
        )
    p, kept = 0.0, None
    for mask in branch.masks(rows_of(x), lora_b)[:2]:
        if mask is not None:
            p, kept = 1.0 - mask.keep_probability, mask.whole().view(*x.shape[:-1], -1)
    y = formula(*inputs, branch.scale, p, branch.position, kept)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    grads = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype), create_graph=True))
    return [next(grads) if need else None for need in needs]
