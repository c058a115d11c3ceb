"""The branch of an embedding: a lookup into A, then B. The fast twin adds it in one product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bridge.peft.ops.dispatch import has_bfloat16
from bridge.peft.ops.dropout import SeededMask, draw_seed
from bridge.peft.ops.reference import add_in_base_dtype, lora_lookup_reference
from bridge.peft.tensors import is_plain


@dataclass(frozen=True)
class Lookup:
    """How the base looks its rows up, which A's columns follow.

    Attributes:
        padding_idx: The token whose row gets no gradient, or None.
        scale_grad_by_freq: Whether gradients are divided by how often a token occurs.
        factor: What the base multiplies its rows by: a number, a tensor of one element, or None.
    """

    padding_idx: int | None = None
    scale_grad_by_freq: bool = False
    factor: Tensor | float | None = None


def lora_lookup(
    base_out: Tensor,
    ids: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    lookup: Lookup,
    dropout: float = 0.0,
) -> Tensor:
    """Return ``base_out + scale * B A[:, ids]``.

    Args:
        base_out: (..., embedding_dim), the base's rows; not written to.
        ids: (...), indices of tokens.
        lora_a: (dim, num_embeddings).
        lora_b: (embedding_dim, dim).
        scale: Factor of the branch.
        lookup: How the base looks its rows up.
        dropout: Probability with which an element of the branch's output is dropped, 0 in
            evaluation; its input is an index, of which nothing can be dropped.

    Returns:
        (..., embedding_dim), in ``base_out``'s dtype.
    """
    if dropout > 0.0 or not _is_one_product(base_out, lora_a, lora_b):
        branch = lora_lookup_reference(
            ids, lora_a, lora_b, scale, lookup.padding_idx, lookup.scale_grad_by_freq
        )
        branch = _scaled(branch, lookup.factor)
        return add_in_base_dtype(base_out, _dropped(branch, dropout))
    rows = _scaled(_columns(ids, lora_a, lookup), lookup.factor).to(base_out.dtype)
    rows, b = rows.reshape(-1, rows.shape[-1]), lora_b.t().to(base_out.dtype)
    base = base_out.reshape(-1, base_out.shape[-1])
    return torch.addmm(base, rows, b, alpha=scale).view(base_out.shape)


def _columns(ids: Tensor, lora_a: Tensor, lookup: Lookup) -> Tensor:
    """A[:, ids] as (..., dim)."""
    by_freq = lookup.scale_grad_by_freq
    return F.embedding(ids, lora_a.t(), lookup.padding_idx, scale_grad_by_freq=by_freq)


def _scaled(x: Tensor, factor: Tensor | float | None) -> Tensor:
    if factor is None:
        return x
    return x * (factor.to(x.dtype) if isinstance(factor, Tensor) else factor)


def _is_one_product(base_out: Tensor, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether base and branch may be added within one product, in the dtype of the base."""
    if not all(map(is_plain, (base_out, lora_a, lora_b))) or base_out.is_nested:
        return False
    device = base_out.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return False
    if lora_a.dtype != lora_b.dtype:
        return False
    # float32 A and B over bfloat16 rows: what they add is rounded to bfloat16 anyway
    narrow = base_out.dtype == torch.bfloat16 and lora_a.dtype == torch.float32
    return lora_a.dtype == base_out.dtype or (narrow and has_bfloat16(device))


def _dropped(branch: Tensor, p: float) -> Tensor:
    """Inverted dropout by the seeded mask of linears; a compiled graph draws its words itself."""
    if p == 0.0:
        return branch
    seed = None if torch.compiler.is_compiling() else draw_seed()
    mask = SeededMask(branch.shape[:-1].numel(), branch.shape[-1], p, branch.device, seed)
    kept = mask.whole().view(branch.shape)
    return torch.where(kept, branch / mask.keep_probability, 0.0)
