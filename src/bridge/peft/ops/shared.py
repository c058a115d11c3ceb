"""Several LoRA linears of one input in one autograd function: q, k and v, or gate and up.

    H = X [A_1; A_2; …]ᵀ                    one product instead of one each
    Y_i = X W_iᵀ + b_i + s_i H_i B_iᵀ
    dX = Σ dY_i W_i + dH [A_1; A_2; …]      accumulated by the products, not by autograd

What is saved is what the layers save one by one: x, once, and their h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge.peft.ops.fused import plain_linear, rows_of
from bridge.peft.ops.products import contract, contract_backward, expand_, expand_backward
from bridge.peft.ops.reference import lora_linear_reference


class LoRATensors(NamedTuple):
    """What one of the linears computes with.

    Attributes:
        weight: (out_features, in_features), frozen.
        bias: (out_features,) or None, frozen.
        lora_a: (dim, in_features).
        lora_b: (out_features, dim).
        scale: Factor of the branch.
    """

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float


def fused_shared(x: Tensor, layers: Sequence[LoRATensors]) -> tuple[Tensor, ...]:
    """Return ``W_i x + b_i + s_i B_i A_i x`` for each layer, without dropout.

    Args:
        x: (..., in_features).
        layers: Two or more, of one dtype, with frozen bases.

    Returns:
        One (..., out_features) for each.
    """
    weights, biases, a, b, scales = zip(*layers, strict=True)
    return SharedInputFunction.apply(x, scales, *weights, *biases, *a, *b)  # pyright: ignore


class SharedInputFunction(torch.autograd.Function):
    """``y_i = W_i x + b_i + s_i B_i A_i x`` for plain frozen bases."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return one (..., out_features) for each layer."""
        layers, ys = _layers(tensors, scales), []
        h = contract(rows_of(x), torch.cat([layer.lora_a for layer in layers]), None)
        for layer, part in zip(layers, h.split(_dims(layers), 1), strict=True):
            y = plain_linear(x, layer.weight, layer.bias)
            expand_(rows_of(y), part, layer.lora_b.t(), layer.scale, None)
            ys.append(y)
        ctx.save_for_backward(x, h, *tensors)
        ctx.scales = scales
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of x, and of every A and B."""
        x, h, *tensors = ctx.saved_tensors
        layers = _layers(tensors, ctx.scales)
        if torch.is_grad_enabled():
            return _differentiable(ctx, x, layers, dys)
        rows, s = rows_of(x), max(ctx.scales, key=abs) or 1.0
        dhs, dbs, dx = [], [], None
        for layer, h_, dy in zip(layers, h.split(_dims(layers), 1), dys, strict=True):
            dy = rows_of(dy).contiguous()
            dh, db = expand_backward(dy, h_, layer.lora_b.t(), layer.scale, None)
            # usually all scales are one, which enters before the products are rounded
            dhs.append(dh if layer.scale == s else dh.mul_(layer.scale / s))
            dbs.append(db.t())
            if ctx.needs_input_grad[0]:
                dx = dy @ layer.weight if dx is None else dx.addmm_(dy, layer.weight)
        a = torch.cat([layer.lora_a for layer in layers])
        da = contract_backward(rows, torch.cat(dhs, 1), a, s, None, dx)
        frozen = [None] * (2 * len(layers))
        dx = None if dx is None else dx.view(x.shape)
        return dx, None, *frozen, *da.split(_dims(layers)), *dbs


def _layers(tensors: Sequence[Tensor | None], scales: tuple[float, ...]) -> list[LoRATensors]:
    n = len(scales)
    parts = (tensors[i : i + n] for i in range(0, 4 * n, n))
    return [LoRATensors(*layer) for layer in zip(*parts, scales, strict=True)]  # pyright: ignore


def _dims(layers: Sequence[LoRATensors]) -> list[int]:
    return [layer.lora_a.shape[0] for layer in layers]


def _differentiable(
    ctx: Any, x: Tensor, layers: Sequence[LoRATensors], dys: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients by the reference formula, so that they can be differentiated again."""
    ys = [lora_linear_reference(x, *layer) for layer in layers]
    tensors = (x, *(layer.lora_a for layer in layers), *(layer.lora_b for layer in layers))
    wanted = tensors if ctx.needs_input_grad[0] else tensors[1:]
    grads = torch.autograd.grad(ys, wanted, dys, create_graph=True)
    dx = (grads[0],) if ctx.needs_input_grad[0] else (None,)
    frozen = [None] * (2 * len(layers))
    return *dx, None, *frozen, *grads[-2 * len(layers) :]
