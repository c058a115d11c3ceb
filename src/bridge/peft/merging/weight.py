"""Merge one weight: `merge_weight`."""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.peft.merging.report import MergeRow
from bridge.peft.merging.rounding import Rounding, Update, merge_rows, row_blocks


@torch.no_grad()
def merge_weight(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    magnitude: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype | None = None,
    fqn: str = "",
) -> tuple[Tensor, MergeRow]:
    """`W + scale · B A`, computed in `compute_dtype` and rounded once to `dtype`.

    With a magnitude m (DoRA) it is `m / |W + scale · B A|` times that, row by row.

    Args:
        weight: W, (out_features, in_features).
        lora_a: A, (dim, in_features).
        lora_b: B, (out_features, dim).
        scale: Factor of the branch.
        magnitude: m, (out_features,), or None.
        compute_dtype: float32 or float64; float64 weights always take float64.
        dtype: Dtype of the result; None is that of W.
        fqn: Name for the report.

    Returns:
        The merged weight, a new tensor, and its row of the report.
    """
    weight = weight.detach()
    compute_dtype = torch.promote_types(compute_dtype, weight.dtype)
    update = Update.of([(lora_a, lora_b, scale)], dtype=compute_dtype, device=weight.device)
    blocks = [*row_blocks(*weight.shape, device=weight.device)]
    if magnitude is not None:
        update = update.rescaled(magnitude.detach(), ((rows, weight[rows]) for rows in blocks))
    merged = torch.empty_like(weight, dtype=dtype)
    rounding = Rounding()
    for rows in blocks:
        rounding += merge_rows(weight[rows], update, rows, merged[rows])
    return merged, MergeRow.of(fqn, rounding, update)
