"""The branch over a stack of weights: tokens sorted by expert, or a batch of them for each expert.

    y[i] = x[i] W[e] + s (x[i] L[e]) R[e]        for the expert e of token i

W is (experts, in, out), L (experts, in, dim) and R (experts, dim, out), as grouped products take
them. No update of a whole weight is formed: a token pays for its own expert's two thin products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridge.peft.ops.dispatch import autocast, choose_path, for_products, trains
from bridge.peft.ops.dropout import draw_seed
from bridge.peft.ops.products import Branch, contract, contract_backward, expand_, expand_backward
from bridge.peft.ops.reference import add_in_base_dtype

#: `product(x, stack, offs=ends)`: (tokens, in) and (experts, in, out) to (tokens, out).
Product = Callable[..., Tensor]
#: Kernels of grouped products want rows of a multiple of so many bytes.
_ALIGNMENT = 16


def lora_grouped(
    product: Product,
    x: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    ends: Tensor,
    scale: float,
    dropout: float = 0.0,
    dropout_position: str = "post",
) -> Tensor:
    """Return the grouped product with the branch, for tokens that are sorted by expert.

    Args:
        product: The base's own grouped product.
        x: (tokens, in_features).
        weight: (experts, in_features, out_features).
        left: (experts, in_features, dim).
        right: (experts, dim, out_features).
        ends: (experts,): where each expert's tokens end; those after the last are not computed.
        scale: Factor of the branch.
        dropout: The effective probability: 0 in evaluation.
        dropout_position: ``"pre"`` or ``"post"``.

    Returns:
        (tokens, out_features), in the dtype of the base's product.
    """
    left, right = for_products(x, left, right)
    path = choose_path(x, weight, left, right, trains_b=trains(right))
    if path.name == "reference" or weight.requires_grad:
        factors = (left, right, scale, dropout, dropout_position)
        return lora_grouped_reference(product, x, weight, ends, *factors)
    branch = Branch(scale, dropout, dropout_position, draw_seed() if dropout > 0.0 else None)
    arguments = (x, weight, left, right, ends, branch, product)
    if torch.is_grad_enabled():
        return LoRAGroupedFunction.apply(*arguments)
    return grouped_forward(*arguments)[0]


def lora_grouped_reference(
    product: Product,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    left: Tensor,
    right: Tensor,
    scale: float,
    dropout: float = 0.0,
    dropout_position: str = "post",
) -> Tensor:
    """As `lora_grouped`, by three products of the base's own kind."""
    base = product(x, weight, offs=ends)
    gap = -left.shape[-1] % max(1, _ALIGNMENT // left.element_size())
    left, right = F.pad(left, (0, gap)), F.pad(right, (0, 0, 0, gap))
    x = x.to(left.dtype)
    if dropout_position == "pre":
        x = F.dropout(x, dropout)
    branch = product(product(x, left, offs=ends) * scale, right, offs=ends)
    return add_in_base_dtype(
        base, F.dropout(branch, dropout) if dropout_position == "post" else branch
    )


def lora_batched_add(
    base_out: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    scale: float,
    dropout: float = 0.0,
    dropout_position: str = "post",
) -> Tensor:
    """Return ``base_out + scale * x left right`` for batches of matrices.

    Args:
        base_out: (batch, tokens, out_features): what the base's own product gave.
        x: (batch, tokens, in_features).
        left: (batch, in_features, dim).
        right: (batch, dim, out_features).
        scale: Factor of the branch.
        dropout: The effective probability: 0 in evaluation.
        dropout_position: ``"pre"`` or ``"post"``.
    """
    x, left, right = autocast(x, left, right)
    left, right = for_products(x, left, right)
    x = x.to(left.dtype)
    if dropout_position == "pre":
        x = F.dropout(x, dropout)
    narrow = torch.bmm(x, left)
    if dropout == 0.0 and base_out.dtype == right.dtype:
        return torch.baddbmm(base_out, narrow, right, alpha=scale)
    branch = torch.bmm(narrow * scale, right)
    return add_in_base_dtype(
        base_out, F.dropout(branch, dropout) if dropout_position == "post" else branch
    )


class LoRAGroupedFunction(torch.autograd.Function):
    """`lora_grouped` that saves x, the weights, h and one seed, and nothing larger."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return y; the inputs are those of `grouped_forward`."""
        y, h = grouped_forward(*inputs)
        x, *tensors, ctx.branch, ctx.product = inputs
        # x is for the gradient of `left`
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, *tensors, h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of x, left and right."""
        x, weight, left, right, ends, h = ctx.saved_tensors
        dy = dy.contiguous()
        dx = ctx.product(dy, weight.mT, offs=ends) if ctx.needs_input_grad[0] else None
        # the transpose of `left` has the layout of A
        d_left = None if x is None else torch.zeros_like(left.mT)
        d_right = torch.zeros_like(right)
        for e, rows, branch in _groups(ends, ctx.branch):
            a, d_rows = left[e].t(), None if dx is None else dx[rows]
            pre, post, s = branch.masks(_rows_like(dy[rows], a), right[e].t())
            dh, d_right[e] = expand_backward(dy[rows], h[rows], right[e], s, post)
            d_a = contract_backward(None if x is None else x[rows], dh, a, s, pre, d_rows)
            if d_left is not None and d_a is not None:
                d_left[e] = d_a
        return dx, None, None if d_left is None else d_left.mT, d_right, None, None, None


def _rows_like(dy: Tensor, a: Tensor) -> Tensor:
    """A tensor of the shape of a group's x, (tokens, in_features), that takes no memory."""
    return a.new_empty(()).expand(dy.shape[0], a.shape[1])


def grouped_forward(
    x: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    ends: Tensor,
    branch: Branch,
    product: Product,
) -> tuple[Tensor, Tensor]:
    """Return `LoRAGroupedFunction`'s y, (tokens, out_features), and h, (tokens, dim)."""
    y = product(x, weight, offs=ends)
    h = left.new_empty(x.shape[0], left.shape[-1])
    for e, rows, own in _groups(ends, branch):
        x_ = x[rows]
        pre, post, s = own.masks(x_, right[e].t())
        h[rows] = contract(x_, left[e].t(), pre)
        expand_(y[rows], h[rows], right[e], s, post)
    return y, h


def _groups(ends: Tensor, branch: Branch) -> Iterator[tuple[int, slice, Branch]]:
    """Each expert that has tokens, its rows, and its branch with a seed of its own."""
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            own = branch if branch.seed is None else branch._replace(seed=branch.seed ^ e)
            yield e, slice(start, end), own
        start = end
