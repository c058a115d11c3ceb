"""The LoRA branch on tensors: ``y = W x + b + scale * B A x``, and the choice of its path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.peft.ops.branch import Branch
from bridge.peft.ops.dropout import draw_seed
from bridge.peft.ops.fused import LoRAAddFunction, LoRALinearFunction
from bridge.peft.ops.reference import add_branch, lora_branch_reference, lora_linear_reference

__all__ = ["Path", "choose_path", "lora_add", "lora_linear"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Path:
    """How a layer is computed.

    Attributes:
        name: ``"fused"`` (base and branch in one function), ``"branch"`` (the branch added to
            another base's result) or ``"reference"`` (the plain formula).
        reason: Why, in a few words.
    """

    name: str
    reason: str


def choose_path(
    *tensors: Tensor | None, plain_linear: bool = True, trains_a_and_b: bool = True
) -> Path:
    """Say which path computes a layer, and why.

    Args:
        tensors: What the layer computes with, as far as it is known: in a call x and all
            weights; ahead of it the base's weight alone, or nothing for a base that is not plain.
        plain_linear: Whether the base is an ``nn.Linear`` with nothing special about it.
        trains_a_and_b: Whether both A and B want gradients, or gradients are off altogether.

    Returns:
        The path, with its reason.
    """
    given = [t for t in tensors if t is not None]
    for t in given:
        if type(t) not in (Tensor, torch.nn.Parameter):
            return Path("reference", f"{type(t).__name__} is a tensor subclass")
        if t.dtype not in _FLOATS:
            return Path("reference", f"{t.dtype} is not a dtype of the fast path")
    if not trains_a_and_b:
        return Path("reference", "A or B is frozen: autograd then saves less")
    if _transformed():
        return Path("reference", "inside a torch.func transform or forward-mode derivative")
    if plain_linear:
        return Path("fused", "plain linear: the branch is added into its result")
    return Path("branch", "the base's own forward, then the branch")


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout: float = 0.0,
    dropout_position: str = "post",
) -> Tensor:
    """Return ``W x + b + scale * B A x`` for a plain floating linear base.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        lora_a: (dim, in_features).
        lora_b: (out_features, dim).
        scale: Factor of the branch, ``alpha / dim``.
        dropout: The effective probability in [0, 1): 0 in evaluation.
        dropout_position: ``"pre"`` drops elements of x, ``"post"`` elements of the branch.

    Returns:
        (..., out_features), in the dtype of ``F.linear(x, weight, bias)``; autocast included.
    """
    tensors = _autocast(x, weight, bias, lora_a, lora_b)
    if choose_path(*tensors, trains_a_and_b=_trains(lora_a, lora_b)).name == "reference":
        return lora_linear_reference(*tensors, scale, dropout, dropout_position)
    seed = draw_seed(x.device) if dropout > 0.0 else None
    return LoRALinearFunction.apply(*tensors, seed, Branch(scale, dropout, dropout_position))


def lora_add(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout: float = 0.0,
    dropout_position: str = "post",
) -> Tensor:
    """Return ``base_out + scale * B A x``, for any base whose own forward gave ``base_out``.

    Args:
        base_out: (..., out_features), the base's result; never written to.
        x: (..., in_features).
        lora_a: (dim, in_features).
        lora_b: (out_features, dim).
        scale: Factor of the branch, ``alpha / dim``.
        dropout: The effective probability in [0, 1): 0 in evaluation.
        dropout_position: ``"pre"`` drops elements of x, ``"post"`` elements of the branch.

    Returns:
        (..., out_features), in the dtype of ``base_out``.
    """
    tensors = _autocast(x, lora_a, lora_b)
    path = choose_path(
        base_out, *tensors, plain_linear=False, trains_a_and_b=_trains(lora_a, lora_b)
    )
    if path.name == "reference":
        branch = lora_branch_reference(*tensors, scale, dropout, dropout_position)
        return add_branch(base_out, branch)
    seed = draw_seed(x.device) if dropout > 0.0 else None
    return LoRAAddFunction.apply(base_out, *tensors, seed, Branch(scale, dropout, dropout_position))


def _trains(lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether A and B both want gradients, or nothing does."""
    return not torch.is_grad_enabled() or (lora_a.requires_grad and lora_b.requires_grad)


def _transformed() -> bool:
    """Whether torch.func transforms or forward-mode derivatives are at work."""
    if torch.compiler.is_compiling():
        return False
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._are_functorch_transforms_active()


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast what ``F.linear`` would cast under autocast, outside of the autograd function."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
        for t in tensors
    )
