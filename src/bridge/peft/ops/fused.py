"""The LoRA linear as autograd functions that save x, A, B, h and one seed, and nothing larger.

`branch.py` has the products of the branch; here they are joined to a base. `docs/math.md` derives
the backward, `docs/memory.md` lists what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge.peft.ops.branch import Branch, contract, contract_backward, expand_, expand_backward
from bridge.peft.ops.reference import lora_branch_reference, lora_linear_reference


class LoRALinearFunction(torch.autograd.Function):
    """``y = W x + b + s B A x`` for a plain base; the branch is added into the base's result."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        seed: int | None,
        branch: Branch,
    ) -> Tensor:
        """Return y, (..., out_features), in the dtype of the base's result."""
        pre, post, s = branch.masks(seed, _rows(x), lora_b.shape[0])
        # The narrow product comes first: it leaves x in cache for the wide one.
        h = contract(_rows(x), lora_a, pre)
        y = F.linear(x, weight, bias).contiguous()
        expand_(_rows(y), h, lora_b.t(), s, post)
        ctx.save_for_backward(x, weight, bias, lora_a, lora_b, h)
        ctx.seed, ctx.branch = seed, branch
        # F.linear may return a view of its own result: not a view, consumers may write into it.
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of what needs them."""
        *inputs, h = ctx.saved_tensors
        x, weight, _, lora_a, lora_b = inputs
        needs = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            return *_differentiable(lora_linear_reference, inputs, needs, dy, ctx), None, None
        x_rows, dy_rows = _rows(x), _rows(dy).contiguous()
        pre, post, s = ctx.branch.masks(ctx.seed, x_rows, lora_b.shape[0])
        dh, db = expand_backward(dy_rows, h, lora_b.t(), s, post)
        dx = dy_rows @ weight if needs[0] else None
        da = contract_backward(x_rows, dh, lora_a, s, pre, dx)
        dw = dy_rows.t() @ x_rows if needs[1] else None
        dbias = dy_rows.sum(0) if needs[2] else None
        return None if dx is None else dx.view(x.shape), dw, dbias, da, db.t(), None, None


class LoRAAddFunction(torch.autograd.Function):
    """``y = base_out + s B A x`` for the result of any base; ``base_out`` is only read."""

    @staticmethod
    def forward(
        ctx: Any,
        base_out: Tensor,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        seed: int | None,
        branch: Branch,
    ) -> Tensor:
        """Return y, of the shape and dtype of ``base_out``."""
        pre, post, s = branch.masks(seed, _rows(x), lora_b.shape[0])
        h = contract(_rows(x), lora_a, pre)
        y = base_out.clone(memory_format=torch.contiguous_format)
        expand_(_rows(y), h, lora_b.t(), s, post)
        ctx.save_for_backward(x, lora_a, lora_b, h)
        ctx.seed, ctx.branch = seed, branch
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of what needs them."""
        *inputs, h = ctx.saved_tensors
        x, lora_a, lora_b = inputs
        needs = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():
            return dy, *_differentiable(lora_branch_reference, inputs, needs, dy, ctx), None, None
        x_rows, dy_rows = _rows(x), _rows(dy).contiguous()
        pre, post, s = ctx.branch.masks(ctx.seed, x_rows, lora_b.shape[0])
        dh, db = expand_backward(dy_rows, h, lora_b.t(), s, post)
        dx = torch.zeros_like(x_rows) if needs[0] else None
        da = contract_backward(x_rows, dh, lora_a, s, pre, dx)
        return dy, None if dx is None else dx.view(x.shape), da, db.t(), None, None


def _rows(x: Tensor) -> Tensor:
    """Return x as a matrix of tokens."""
    return x.reshape(-1, x.shape[-1])


def _differentiable(
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    dy: Tensor,
    ctx: Any,
) -> list[Tensor | None]:
    """Return the gradients by the reference formula, so that they can be differentiated again."""
    branch: Branch = ctx.branch
    x = inputs[0]
    assert x is not None
    masks = branch.masks(ctx.seed, _rows(x), dy.shape[-1])[:2]
    p, kept = 0.0, None
    for mask in masks:
        if mask is not None:
            p, kept = 1.0 - mask.keep_probability, mask.whole().view(*x.shape[:-1], -1)
    y = formula(*inputs, branch.scale, p, branch.position, kept)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    grads = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype), create_graph=True))
    return [next(grads) if need else None for need in needs]
