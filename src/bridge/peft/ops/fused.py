"""The LoRA linear as autograd functions that save x, A, B, h and one seed, and nothing larger.

`branch.py` has the mathematics of the branch; here it is joined to a base. `docs/memory.md` lists
what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge.peft.ops.branch import Branch, add_branch_, branch_backward
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
        y = F.linear(x, weight, bias).contiguous()
        h = add_branch_(_rows(y), _rows(x), lora_a, lora_b, seed, branch)
        ctx.save_for_backward(x, weight, bias, lora_a, lora_b, h)
        ctx.seed, ctx.branch = seed, branch
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of what needs them."""
        x, weight, bias, lora_a, lora_b, h = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (x, weight, bias, lora_a, lora_b)
            return *_differentiable(lora_linear_reference, inputs, dy, ctx), None, None
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        x_rows, dy_rows = _rows(x), _rows(dy).contiguous()
        dx = dy_rows @ weight if needs_x else None
        da, db = branch_backward(dy_rows, x_rows, lora_a, lora_b, h, ctx.seed, ctx.branch, dx)
        dw = dy_rows.t() @ x_rows if needs_weight else None
        dbias = dy_rows.sum(0) if needs_bias else None
        return None if dx is None else dx.view(x.shape), dw, dbias, da, db, None, None


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
        y = base_out.clone(memory_format=torch.contiguous_format)
        h = add_branch_(_rows(y), _rows(x), lora_a, lora_b, seed, branch)
        ctx.save_for_backward(x, lora_a, lora_b, h)
        ctx.seed, ctx.branch = seed, branch
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of what needs them."""
        x, lora_a, lora_b, h = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (None, x, lora_a, lora_b)
            _, *grads = _differentiable(_branch_alone, inputs, dy, ctx)
            return dy, *grads, None, None
        x_rows, dy_rows = _rows(x), _rows(dy).contiguous()
        dx = torch.zeros_like(x_rows) if ctx.needs_input_grad[1] else None
        da, db = branch_backward(dy_rows, x_rows, lora_a, lora_b, h, ctx.seed, ctx.branch, dx)
        return dy, None if dx is None else dx.view(x.shape), da, db, None, None


def _rows(x: Tensor) -> Tensor:
    """Return x as a matrix of tokens."""
    return x.reshape(-1, x.shape[-1])


def _branch_alone(_: None, *args: Any) -> Tensor:
    """The branch with the argument order of `LoRAAddFunction`."""
    return lora_branch_reference(*args)


def _differentiable(
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    dy: Tensor,
    ctx: Any,
) -> list[Tensor | None]:
    """The gradients by the reference formula, so that they can be differentiated again."""
    branch: Branch = ctx.branch
    x = next(t for t in inputs if t is not None)
    mask = branch.mask(ctx.seed, _rows(x), _rows(dy))
    p, kept = 0.0, None
    if mask is not None:
        p = 1.0 - mask.keep_probability
        shape = x.shape if branch.position == "pre" else dy.shape
        kept = mask.block(slice(None)).bool().view(shape)
    y = formula(*inputs, branch.scale, p, branch.position, kept)
    wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
    grads = iter(
        torch.autograd.grad(
            y, [t for t in wanted if t is not None], dy.to(y.dtype), create_graph=True
        )
    )
    return [
        next(grads) if need and t is not None else None
        for t, need in zip(inputs, ctx.needs_input_grad, strict=False)
    ]
