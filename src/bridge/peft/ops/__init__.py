"""The LoRA branch on tensors: ``y = W x + b + scale * B A x``, and the choice of path."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bridge.peft.ops.reference import (
    add_branch,
    lora_branch_reference,
    lora_linear_reference,
)

__all__ = ["Path", "choose_path", "lora_add", "lora_linear"]


@dataclass(frozen=True)
class Path:
    """How a layer is computed.

    Attributes:
        name: ``"fused"`` (base and branch in one function), ``"branch"`` (the branch added into
            another base's result) or ``"reference"`` (the plain formula).
        reason: Why, in a few words.
    """

    name: str
    reason: str


def choose_path(*tensors: Tensor | None, plain_linear: bool = True, dropout: float = 0.0) -> Path:
    """Say which path computes a layer, and why.

    Args:
        tensors: What the layer computes with, as far as it is known: at call time x and all
            weights; ahead of time the base weight alone.
        plain_linear: Whether the base is a floating ``nn.Linear`` with nothing special.
        dropout: The effective dropout probability.

    Returns:
        The path, with its reason.
    """
    return Path("reference", "plain formula")


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
        (..., out_features), in the dtype of ``F.linear(x, weight, bias)``.
    """
    return lora_linear_reference(
        x, weight, bias, lora_a, lora_b, scale, dropout, dropout_position
    )


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
        base_out: (..., out_features), the base's result.
        x: (..., in_features).
        lora_a: (dim, in_features).
        lora_b: (out_features, dim).
        scale: Factor of the branch, ``alpha / dim``.
        dropout: The effective probability in [0, 1): 0 in evaluation.
        dropout_position: ``"pre"`` drops elements of x, ``"post"`` elements of the branch.

    Returns:
        (..., out_features), in the dtype of ``base_out``.
    """
    branch = lora_branch_reference(x, lora_a, lora_b, scale, dropout, dropout_position)
    return add_branch(base_out, branch)
