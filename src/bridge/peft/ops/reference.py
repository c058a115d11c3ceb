"""The LoRA formula, obvious at a glance: the oracle of every fast path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_branch_reference(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout: float = 0.0,
    dropout_position: str = "post",
    mask: Tensor | None = None,
) -> Tensor:
    """Return the branch ``scale * B A x`` in the precision of the LoRA weights.

    Args:
        x: (..., in_features), any floating or complex dtype.
        lora_a: (dim, in_features).
        lora_b: (out_features, dim).
        scale: Factor of the branch, ``alpha / dim``.
        dropout: Probability in [0, 1) with which an element is dropped.
        dropout_position: ``"pre"`` drops elements of x, ``"post"`` elements of the branch.
        mask: Which elements are kept, in place of a fresh draw: boolean, of x's shape for
            ``"pre"`` and of the result's shape for ``"post"``.

    Returns:
        (..., out_features), in ``lora_a.dtype`` (in autocast's dtype under autocast).

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """
    x = x.to(lora_a.dtype)
    if dropout_position == "pre":
        x = _drop(x, dropout, mask)
    branch = F.linear(F.linear(x, lora_a) * scale, lora_b)
    return _drop(branch, dropout, mask) if dropout_position == "post" else branch


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout: float = 0.0,
    dropout_position: str = "post",
    mask: Tensor | None = None,
) -> Tensor:
    """Return ``W x + b + scale * B A x``, (..., out_features), in ``F.linear(x, W, b)``'s dtype.

    Weight is (out_features, in_features), bias (out_features,); the rest is as in the branch.
    """
    base = F.linear(x, weight, bias)
    return add_in_base_dtype(
        base, lora_branch_reference(x, lora_a, lora_b, scale, dropout, dropout_position, mask)
    )


def lora_lookup_reference(
    ids: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Return an embedding's branch ``scale * B A[:, ids]``: a lookup into A, then B.

    Args:
        ids: (...), indices of tokens.
        lora_a: (dim, num_embeddings).
        lora_b: (embedding_dim, dim).
        scale: Factor of the branch.
        padding_idx: The token whose column of A gets no gradient, or None.
        scale_grad_by_freq: Whether gradients are divided by how often a token occurs.

    Returns:
        (..., embedding_dim), in ``lora_a.dtype`` (in autocast's dtype under autocast).
    """
    rows = F.embedding(ids, lora_a.t(), padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return F.linear(rows * scale, lora_b)


def add_in_base_dtype(base_out: Tensor, branch: Tensor) -> Tensor:
    """Return ``base_out + branch`` in the dtype of ``base_out``, rounded once."""
    return (base_out + branch).to(base_out.dtype)


def _drop(x: Tensor, p: float, mask: Tensor | None) -> Tensor:
    """Inverted dropout of ``x``; with ``mask``, keep exactly those elements."""
    if mask is not None:
        return torch.where(mask, x / (1.0 - p), 0.0)
    return F.dropout(x, p) if p > 0.0 else x
