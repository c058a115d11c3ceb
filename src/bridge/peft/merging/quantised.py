"""Merge one layer whose base is quantised: into its dequantised weight, or quantised again."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bridge.peft.branch.dense import SetAside, make_dense, quantise_again
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.quantised.format import Format
from bridge.peft.errors import AdapterError
from bridge.peft.merging.report import MergeRow
from bridge.peft.merging.weight import merge_weight
from bridge.peft.tensors import all_finite


def check_can_be_packed_again(fqn: str, layer: LoRAMixin, form: Format) -> None:
    """Raise `AdapterError` unless a quantised layer's format can quantise a merged weight.

    Args:
        fqn: The layer's name.
        layer: An adapted layer.
        form: Its format.
    """
    if form.settings(form.packed(layer)) is None:
        raise AdapterError(
            f"{fqn} is {form.label(layer)}, which bridge.peft cannot quantise again; merge without "
            "requantize, which writes dense weights"
        )


def merge_dense(
    fqn: str, layer: LoRAMixin, compute_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[MergeRow, SetAside]:
    """Put the sum of dequantised W and update in the place of a quantised base, in place.

    Args:
        fqn: The layer's name.
        layer: An adapted layer.
        compute_dtype: Dtype of the sum.
        dtype: Dtype of the weight that is written.

    Returns:
        The row of the report, and the base, to put back.
    """
    _, merged, row = _merged(fqn, layer, compute_dtype, dtype)
    return row, make_dense(layer, merged)


def merge_and_pack(
    fqn: str, layer: LoRAMixin, form: Format, compute_dtype: torch.dtype
) -> tuple[MergeRow, SetAside]:
    """Put that sum, quantised as the base is, in its place, in place.

    Args:
        fqn: The layer's name.
        layer: An adapted layer.
        form: Its format, which can (`check_can_be_packed_again`).
        compute_dtype: Dtype of the sum.

    Returns:
        The row of the report, its errors those of quantising, and the base, to put back.
    """
    weight, exact, row = _merged(fqn, layer, compute_dtype, compute_dtype)
    settings = form.settings(form.packed(layer))
    assert settings is not None
    packed = form.pack(exact, settings)
    stored = form.dense(packed).to(exact.dtype)
    if not all_finite(stored):
        raise AdapterError(f"{fqn}: the merged weight, quantised again, is not finite")
    error, meant = (stored - exact).abs(), exact != weight
    kept = meant & (stored == weight)
    row = replace(
        row,
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        unchanged=float(kept.sum()) / max(float(meant.sum()), 1.0),
    )
    return row, quantise_again(layer, form, packed)


def _merged(
    fqn: str, layer: LoRAMixin, compute_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor, MergeRow]:
    """The dequantised weight, the sum, and its row of the report."""
    weight = layer.dense_weight()
    merged, row = merge_weight(
        weight,
        *layer.whole_factors(),
        layer.scale,
        magnitude=layer.whole_magnitude(),
        compute_dtype=compute_dtype,
        dtype=dtype,
        fqn=fqn,
    )
    return weight, merged, row
