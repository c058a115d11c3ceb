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


def dora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scale: float,
    dropout: float = 0.0,
    dropout_position: str = "post",
    mask: Tensor | None = None,
) -> Tensor:
    """Return ``m / |W + s B A| * (W x + s B A x) + b``, the norms by rows and dense.

    Args as in `lora_linear_reference`; magnitude m is (out_features,). No gradient flows through
    the norm (section 4.3 of the paper), and the base's own product sees no dropout.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024 (arXiv:2402.09353).
    """
    norm = torch.linalg.vector_norm(weight + scale * lora_b @ lora_a, dim=1).detach()
    drop = dropout, dropout_position, mask
    out = lora_linear_reference(x, weight, bias, lora_a, lora_b, scale, *drop)
    return rescale_reference(out, magnitude, norm, bias)


def rescale_reference(out: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``c (out - b) + b`` with ``c = m / norm``, in the dtype of ``out``.

    Written as ``c out + (1 - c) b``, so that it is ``out``, bit for bit, where c is 1.

    Args:
        out: (..., out_features), with the bias in it, if there is one.
        magnitude: m, (out_features,).
        norm: (out_features,), of which no gradient is taken. Where it is 0 the row of ``out`` is
            the bias whatever c is, and c is 1.
        bias: (out_features,) or None.
    """
    norm = norm.detach()
    if magnitude.itemsize == 2:  # m was rounded so when it started as the norm
        norm = norm.to(magnitude.dtype).to(norm.dtype)
    factor = torch.where(norm > 0, magnitude / norm.where(norm > 0, 1), 1)
    scaled = out * factor if bias is None else out * factor + (1 - factor) * bias
    return scaled.to(out.dtype)


def add_in_base_dtype(base_out: Tensor, branch: Tensor) -> Tensor:
    """Return ``base_out + branch`` in the dtype of ``base_out``, rounded once."""
    return (base_out + branch).to(base_out.dtype)


def _drop(x: Tensor, p: float, mask: Tensor | None) -> Tensor:
    """Inverted dropout of ``x``; with ``mask``, keep exactly those elements."""
    if mask is not None:
        return torch.where(mask, x / (1.0 - p), 0.0)
    return F.dropout(x, p) if p > 0.0 else x
