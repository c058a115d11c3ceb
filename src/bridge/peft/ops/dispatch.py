"""The LoRA branch on tensors: ``y = W x + b + scale * B A x``, and the choice of its path."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bridge.peft.dtypes import TRAINABLE_DTYPES
from bridge.peft.ops.dropout import SeededMask, draw_seed
from bridge.peft.ops.fused import (
    LoRAAddFunction,
    LoRALinearFunction,
    add_forward,
    linear_forward,
)
from bridge.peft.ops.magnitude import RescaleFunction, rescale_forward
from bridge.peft.ops.products import Branch, contract
from bridge.peft.ops.ranks import ALONE, Ranks
from bridge.peft.ops.reference import (
    add_in_base_dtype,
    lora_branch_reference,
    lora_linear_reference,
    rescale_reference,
)
from bridge.peft.tensors import is_plain


@dataclass(frozen=True)
class ComputePath:
    """How a layer is computed.

    Attributes:
        name: ``"fused"`` (base and branch in one function), ``"branch"`` (the branch
            added to another base's result) or ``"reference"`` (the plain formula).
        reason: Why, in a few words.
    """

    name: str
    reason: str


#: The dtypes that autocast casts.
_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)

_FUSED = ComputePath("fused", "plain linear: the branch is added into its result")
_BRANCH = ComputePath("branch", "the base's own forward, then the branch")
_COMPILED = ComputePath("reference", "compiled: the compiler fuses the plain formula itself")
_FROZEN = ComputePath("reference", "B is frozen, so the plain formula saves less")
_OBSERVED = ComputePath("reference", "a dispatch mode looks on, which must see no writes in place")
_TRACED = ComputePath("reference", "traced: a trace holds no autograd functions")
_TRANSFORMED = ComputePath("reference", "inside torch.func or a forward-mode derivative")


def choose_path(
    *tensors: Tensor | None,
    plain_linear: bool = True,
    trains_b: bool = True,
) -> ComputePath:
    """Say which path computes a layer, and why.

    Args:
        tensors: What the branch, and a plain base, compute with, as far as it is known: in a call
            x and all weights; ahead of it the weights alone. Not the weight of another base.
        plain_linear: Whether the base is ``F.linear(x, weight, bias)`` and nothing else.
        trains_b: Whether B wants gradients, or gradients are off altogether; A may be frozen.
    """
    for t in tensors:
        if t is not None and not is_plain(t):
            return ComputePath("reference", f"{type(t).__name__} is a tensor subclass")
        if t is not None and t.is_nested:
            return ComputePath("reference", "a nested tensor has no rows of one width")
        if t is not None and t.dtype not in TRAINABLE_DTYPES:
            return ComputePath("reference", f"{t.dtype} is not a dtype of the fast path")
    if torch.compiler.is_compiling():
        return _COMPILED
    if torch._C._get_tracing_state() is not None:
        return _TRACED
    if torch._C._len_torch_dispatch_stack() > 0:
        return _OBSERVED
    if not trains_b:
        return _FROZEN
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return _TRANSFORMED
    return _FUSED if plain_linear else _BRANCH


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout: float = 0.0,
    dropout_position: str = "post",
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return ``W x + b + scale * B A x`` for a plain floating linear base.

    Args as in `lora_linear_reference`; ``dropout`` is the effective one: 0 in evaluation, and
    ``ranks`` says what several of them share.

    Returns:
        (..., out_features), in the dtype of ``F.linear(x, weight, bias)``; autocast included.
    """
    x, weight, bias, lora_a, lora_b = autocast(x, weight, bias, lora_a, lora_b)
    lora_a, lora_b = for_products(x, lora_a, lora_b)
    path = choose_path(x, weight, bias, lora_a, lora_b, trains_b=trains(lora_b))
    if path.name == "reference":
        drop = _reference_dropout(x, lora_b, dropout, dropout_position, path, ranks.shard)
        lora_a, lora_b = ranks.factors(lora_a, lora_b)
        return lora_linear_reference(x, weight, bias, lora_a, lora_b, scale, *drop)
    seed = draw_seed(ranks.shard) if dropout > 0.0 else None
    branch = Branch(scale, dropout, dropout_position, seed, ranks)
    arguments = (x, weight, bias, lora_a, lora_b, branch)
    if torch.is_grad_enabled():
        return LoRALinearFunction.apply(*arguments)
    return linear_forward(*arguments)[0]


def lora_add(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout: float = 0.0,
    dropout_position: str = "post",
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return ``base_out + scale * B A x``, for any base whose own forward gave ``base_out``.

    Args as in `lora_branch_reference`; ``base_out``, (..., out_features), is never written to, and
    ``ranks`` says what several of them share.
    """
    x, lora_a, lora_b = cast_for_products(x, lora_a, lora_b)
    path = choose_path(base_out, x, lora_a, lora_b, plain_linear=False, trains_b=trains(lora_b))
    if path.name == "reference":
        drop = _reference_dropout(x, lora_b, dropout, dropout_position, path, ranks.shard)
        lora_a, lora_b = ranks.factors(lora_a, lora_b)
        out = lora_branch_reference(x, lora_a, lora_b, scale, *drop)
        return add_in_base_dtype(base_out, out)
    seed = draw_seed(ranks.shard) if dropout > 0.0 else None
    branch = Branch(scale, dropout, dropout_position, seed, ranks)
    arguments = (base_out, x, lora_a, lora_b, branch)
    if torch.is_grad_enabled():
        return LoRAAddFunction.apply(*arguments)
    return add_forward(*arguments)[0]


def cast_for_products(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, A and B in the dtypes in which they are multiplied; autograd sees the casts.

    Args as in `lora_add`.
    """
    x, lora_a, lora_b = autocast(x, lora_a, lora_b)
    return x, *for_products(x, lora_a, lora_b)


def rescale(out: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``c (out - b) + b`` with ``c = m / norm``, DoRA's last step over any base.

    Args as in `rescale_reference`; ``out``, (..., out_features), is never written to.
    """
    path = choose_path(out, magnitude, norm, bias, plain_linear=False)
    if path.name == "reference":
        return rescale_reference(out, magnitude, norm, bias)
    if torch.is_grad_enabled():
        return RescaleFunction.apply(out, magnitude, norm, bias)
    return rescale_forward(out, magnitude, norm, bias)[0]


def project(weight: Tensor, lora_a: Tensor) -> Tensor:
    """Return ``W Aᵀ``, (out_features, dim), of a dense weight (out_features, in_features)."""
    lora_a, _ = for_products(weight, lora_a, lora_a)
    if choose_path(weight, lora_a, plain_linear=False).name == "reference":
        return weight.to(lora_a.dtype) @ lora_a.t()
    return contract(weight, lora_a, None)


def trains(lora_b: Tensor) -> bool:
    """Whether B wants gradients, or nothing does."""
    return not torch.is_grad_enabled() or lora_b.requires_grad


def _reference_dropout(
    x: Tensor, lora_b: Tensor, dropout: float, position: str, path: ComputePath, shard: int
) -> tuple[float, str, Tensor | None]:
    """What the reference drops: by the seeded mask of the fast paths wherever it can be drawn.

    So the same seed drops the same elements with and without gradients, A or B frozen or not;
    a compiled graph draws the words of the mask itself, and fuses what makes the mask.
    """
    if dropout == 0.0 or path not in (_COMPILED, _FROZEN):
        return dropout, position, None
    seed = draw_seed(shard) if path is _FROZEN else None
    width = x.shape[-1] if position == "pre" else lora_b.shape[0]
    other = shard if seed is None else 0  # a seed knows its shard already
    mask = SeededMask(x.shape[:-1].numel(), width, dropout, x.device, seed, other)
    kept = mask.whole().view(*x.shape[:-1], width)
    return 1.0 - mask.keep_probability, position, kept


def for_products(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B as they are multiplied with x: float32 ones in bfloat16 where x is, as autocast does.

    What they add to y and dx is rounded to bfloat16 anyway, and the wide tensors need no copies in
    float32. Weights, their gradients' sums and the optimizer stay in float32. Not in float16, in
    whose range the gradients of A and B may overflow, nor where bfloat16 is emulated.
    """
    narrow = x.dtype == torch.bfloat16 and lora_a.dtype == lora_b.dtype == torch.float32
    if not narrow or not has_bfloat16(x.device.type):
        return lora_a, lora_b
    return lora_a.to(torch.bfloat16), lora_b.to(torch.bfloat16)


@functools.cache
def has_bfloat16(device: str) -> bool:
    """Whether a kind of device multiplies bfloat16 itself, and does not emulate it.

    Args:
        device: `"cpu"`, `"cuda"`, …
    """
    return device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Within the context, what is computed on a device keeps its own dtypes."""
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """Cast what ``F.linear`` would cast under autocast, outside of the autograd function."""
    if not torch._C._is_any_autocast_enabled():  # the usual case, told by one call
        return x, *others
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype in _AUTOCAST else t for t in (x, *others))
