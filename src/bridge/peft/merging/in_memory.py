"""Merge LoRA branches into base weights, and unmerge them: `merge`, `unmerge`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bridge.peft.branch.dense import SetAside, put_base
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.quantised.table import FORMATS, format_of
from bridge.peft.dtypes import TRAINABLE_DTYPES
from bridge.peft.errors import AdapterError
from bridge.peft.merging.quantised import (
    check_can_be_packed_again,
    merge_and_pack,
    merge_dense,
)
from bridge.peft.merging.report import MergeReport, MergeRow
from bridge.peft.merging.shared_weights import sharers
from bridge.peft.merging.token_rows import (
    check_rows_mergeable,
    merge_token_rows,
    unmerge_token_rows,
)
from bridge.peft.merging.weight import merge_weight
from bridge.peft.model.disable import check_kept
from bridge.peft.model.encoder_fast_path import fit_encoders
from bridge.peft.model.participation import takes_no_part
from bridge.peft.model.quantisation import dense_while_merged, quantised_again
from bridge.peft.model.trained_parameters import forget_tie
from bridge.peft.model.walk import adapted_modules, unwrap
from bridge.peft.parallel.fsdp import reshard
from bridge.peft.tensors import all_finite, full_tensor, is_plain, is_sharded, sharded_like

#: The dtypes in which a merge can be computed.
COMPUTE_DTYPES = (torch.float32, torch.float64)


def check_compute_dtype(compute_dtype: torch.dtype) -> None:
    """Raise `AdapterError` unless a merge can be computed in `compute_dtype`."""
    if compute_dtype not in COMPUTE_DTYPES:
        raise AdapterError(
            f"a merge is computed in torch.float32 or torch.float64, got {compute_dtype}"
        )


@torch.no_grad()
def merge(
    model: nn.Module,
    *,
    keep_base: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    untie: bool = False,
    requantize: bool = False,
    dense_dtype: torch.dtype = torch.bfloat16,
    dtype: torch.dtype | None = None,
) -> MergeReport:
    """Fold every branch into its base weight, in place: `W <- W + scale · B A`.

    With DoRA it is `W <- m / |W + scale · B A| · (W + scale · B A)`, by rows.

    The sum is computed in `compute_dtype` and rounded once. While merged, the branch is not
    computed, and `model.state_dict()` is that of the dense merged model, without A and B. Sharded
    weights are gathered one after the other, and each rank keeps its part of the sum, so with those
    every rank must call.

    A quantised base (4-bit, 8-bit, float8) is dequantised to exactly the weight that the adapter
    was trained on, and its layer holds the dense sum until `unmerge` puts the base back.

    Args:
        model: An adapted model.
        keep_base: Keep the original weights on the CPU, so that `unmerge` can restore them.
        compute_dtype: Dtype of the computation, float32 or float64.
        untie: Give an adapted weight that is shared with another module (a tied output head)
            storage of its own, instead of refusing. `unmerge` leaves it untied.
        requantize: Quantise the sum again as the base is; the report then holds the error of that.
        dense_dtype: Dtype of the dense weights that stand in for quantised ones.
        dtype: The old name of `compute_dtype`.

    Returns:
        A report with a row per layer.

    Raises:
        AdapterError: Nothing to merge, merged already, switched off, a weight that is shared, not
            finite or on `meta`, or packed so that it cannot be read (or packed again); the model
            is as it was before.

    Example:
        >>> report = merge(model)
        >>> print(report)
    """
    if dtype is not None:
        warnings.warn("merge(dtype=…) is now compute_dtype=…", DeprecationWarning, stacklevel=2)
        compute_dtype = dtype
    check_compute_dtype(compute_dtype)
    if dense_dtype not in TRAINABLE_DTYPES:
        raise AdapterError(f"dense_dtype must be a floating dtype of 16 bits up, got {dense_dtype}")
    reshard(unwrap(model))
    layers, tied = _mergeable_layers(model, untie=untie)
    for fqn, layer in layers:
        if requantize and (form := format_of(layer)) is not None:
            check_can_be_packed_again(fqn, layer, form)
        _check_finite(fqn, layer, compute_dtype, dense_dtype)
    check_rows_mergeable(model)
    merge_layer = functools.partial(
        _merge_layer,
        compute_dtype=compute_dtype,
        keep_base=keep_base,
        dense_dtype=None if requantize else dense_dtype,
    )
    notes = _untie(model, tied)
    rows: list[MergeRow] = []
    try:
        for fqn, layer in layers:
            rows.append(merge_layer(fqn, layer))
        notes += merge_token_rows(model, keep_base=keep_base)
    except BaseException:
        # out of memory, Ctrl-C: no model is left half merged if the originals are there
        for _, layer in layers:
            if layer.unmerged_weight is not None:
                _restore(layer)
        raise
    fit_encoders(unwrap(model))
    return MergeReport(tuple(rows), (*notes, *dense_while_merged(unwrap(model))))


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the base weights bit for bit and compute the branches again, in place.

    Args:
        model: A model that `merge` was called on.

    Raises:
        AdapterError: Nothing is merged, the adapters are switched off, or the originals were given
            up (`keep_base=False`).
    """
    reshard(unwrap(model))
    merged = [(f, m) for f, m in adapted_modules(model) if isinstance(m, LoRAMixin) and m.merged]
    if not merged:
        raise AdapterError("nothing is merged; call merge(model) first")
    for fqn, layer in merged:
        check_kept(fqn, layer)
        _check_enabled(fqn, layer)
    unmerge_token_rows(model)
    for _, layer in merged:
        _restore(layer)
    quantised_again(unwrap(model))
    fit_encoders(unwrap(model))


def _untie(model: nn.Module, tied: Mapping[LoRAMixin, list[str]]) -> tuple[str, ...]:
    """Give layers whose weight is shared one of their own, in place; what that changed."""
    names = {module: fqn for fqn, module in adapted_modules(model)}
    for layer in tied:
        own = nn.Parameter(layer.base_weight.detach().clone(), requires_grad=False)
        setattr(layer.base, layer.weight_name, own)
        forget_tie(unwrap(model))
    return tuple(
        f"{names[layer]} is no longer tied to {', '.join(others)}; the model's config says so too "
        "(tie_word_embeddings=False)"
        for layer, others in tied.items()
    )


def _merge_layer(
    fqn: str,
    layer: LoRAMixin,
    *,
    compute_dtype: torch.dtype,
    keep_base: bool,
    dense_dtype: torch.dtype | None,
) -> MergeRow:
    """Merge one layer, in place; a quantised one is quantised again without a `dense_dtype`."""
    if (form := format_of(layer)) is not None:
        if dense_dtype is None:
            row, base = merge_and_pack(fqn, layer, form, compute_dtype)
        else:
            row, base = merge_dense(fqn, layer, compute_dtype, dense_dtype)
        layer.unmerged_weight = base if keep_base else None
        layer.merged = True
        return row
    weight = layer.base_weight
    merged, row = merge_weight(
        layer.oriented(full_tensor(weight)),
        *_factors(layer),
        layer.scale,
        magnitude=layer.whole_magnitude(),
        compute_dtype=compute_dtype,
        fqn=fqn,
    )
    if keep_base:
        layer.unmerged_weight = weight.detach().to("cpu", copy=True)
    weight.copy_(sharded_like(layer.oriented(merged), weight))
    layer.merged = True
    layer.weight_was_written()
    return row


def _factors(layer: LoRAMixin) -> tuple[Tensor, Tensor]:
    """A and B that go with `full_tensor` of the weight: Megatron's is this rank's part alone."""
    if is_sharded(layer.base_weight):
        return layer.whole_factors()
    a, b = layer.factors()
    return full_tensor(a), full_tensor(b)


def _restore(layer: LoRAMixin) -> None:
    assert layer.unmerged_weight is not None
    if isinstance(layer.unmerged_weight, SetAside):
        put_base(layer, layer.unmerged_weight)
    else:
        layer.base_weight.copy_(layer.unmerged_weight)
    layer.unmerged_weight = None
    layer.merged = False
    layer.weight_was_written()


def _mergeable_layers(
    model: nn.Module, *, untie: bool
) -> tuple[list[tuple[str, LoRAMixin]], dict[LoRAMixin, list[str]]]:
    """All adapted layers, and those to untie with the names of what shares their weight.

    Raises:
        AdapterError: With the first reason against it.
    """
    layers: list[tuple[str, LoRAMixin]] = []
    for fqn, module in adapted_modules(model):
        if not isinstance(module, LoRAMixin):
            raise AdapterError(
                f"{fqn} wraps its base in {type(module).__name__}; only layers adapted in place "
                "can be merged here"
            )
        _check_mergeable(fqn, module)
        layers.append((fqn, module))
    if not layers:
        raise AdapterError("the model has no adapters to merge; LoRA(...)(model) adds them")
    shared = sharers(unwrap(model), [layer for _, layer in layers])
    # what is made of a quantised weight is a new one
    tied = [(f, layer) for f, layer in layers if layer in shared and format_of(layer) is None]
    if tied and not untie:
        fqn, layer = tied[0]
        raise AdapterError(
            f"{fqn} shares its weight with {', '.join(shared[layer])}, which a merge would change "
            "too; pass untie=True to give it a weight of its own"
        )
    if sharded := [fqn for fqn, layer in tied if is_sharded(layer.base_weight)]:
        raise AdapterError(
            f"{sharded[0]} shares its weight with {', '.join(shared[tied[0][1]])}, and both are "
            "sharded as one; save the adapter and merge it into the unsharded base"
        )
    return layers, {layer: shared[layer] for _, layer in tied}


def _check_mergeable(fqn: str, layer: LoRAMixin) -> None:
    """Raise unless the layer's own weight can be merged into; tied weights aside."""
    weight = layer.base_weight
    if layer.merged:
        raise AdapterError(f"{fqn} is merged already; unmerge(model) first")
    _check_enabled(fqn, layer)
    is_quantised = format_of(layer) is not None
    if layer.weight_name not in layer.base._parameters and not is_quantised:
        raise AdapterError(
            f"the weight of {fqn} is computed from other parameters (pruning, weight or spectral "
            "norm, a parametrization); make it a plain nn.Parameter first (prune.remove, "
            "remove_parametrizations)"
        )
    if is_sharded(weight) and any(form.told(layer) for form in FORMATS):
        raise AdapterError(
            f"{fqn} is quantised and sharded; save the adapter and merge it into the unsharded base"
        )
    if is_sharded(weight) and isinstance(layer, nn.Linear) and not layer.plain_forward:
        raise AdapterError(
            f"{fqn} is a {layer.base_type.__name__}, whose own forward cannot be tried on a shard "
            "of its weight; save the adapter and merge it into the unsharded base"
        )
    if not layer.is_linear():
        raise AdapterError(
            f"{fqn} is a {layer.base_type.__name__}, whose own forward is not W x + b: merged into "
            "its weight, the branch would compute something else; keep it unmerged"
        )
    if takes_no_part(layer) and not layer.is_zero():
        raise AdapterError(
            f"{fqn} was never called, though the model and the module around it ran: its branch "
            "takes no part, and merging it could change the model; leave it out with "
            "exclude_modules and train again"
        )
    is_dense = weight.dtype in TRAINABLE_DTYPES and (is_plain(weight) or is_sharded(weight))
    if not is_quantised and not is_dense:
        kind = type(weight).__name__ if weight.dtype in TRAINABLE_DTYPES else weight.dtype
        raise AdapterError(
            f"{fqn} is quantised ({kind}) in a way that bridge.peft cannot read; keep the adapter "
            "unmerged, or dequantise the model with the library that quantised it"
        )
    if "meta" in (weight.device.type, layer.lora_a.weight.device.type):
        raise AdapterError(f"{fqn} is on the meta device; load its weights before merging")


def _check_finite(
    fqn: str, layer: LoRAMixin, compute_dtype: torch.dtype, dense_dtype: torch.dtype
) -> None:
    try:
        weight = full_tensor(layer.dense_weight())
    except AdapterError as error:
        raise AdapterError(f"{fqn}: {error}") from error
    (a, b), m = _factors(layer), layer.whole_magnitude()
    for name, tensor in (("base weight", weight), ("A", a), ("B", b), ("the magnitude", m)):
        if tensor is not None and not all_finite(tensor):
            raise AdapterError(f"{fqn}: {name} holds NaN or inf; nothing was merged")
    if not weight.numel():
        return
    # A bound first: only what could overflow is computed twice.
    size = abs(layer.scale) * a.shape[0] * float(a.abs().max()) * float(b.abs().max())
    # DoRA's rows are no longer than m, but their length is computed of the sum
    largest = max(float(weight.abs().max()) + size, 0.0 if m is None else float(m.abs().max()))
    dtype = weight.dtype if format_of(layer) is None else dense_dtype
    if largest < torch.finfo(dtype).max:
        return
    merged, _ = merge_weight(
        weight, a, b, layer.scale, magnitude=m, compute_dtype=compute_dtype, dtype=dtype
    )
    if not all_finite(merged):
        raise AdapterError(
            f"{fqn}: the merged weight overflows {dtype}; nothing was merged; "
            "convert the base to float32 or bfloat16 first"
        )


def _check_enabled(fqn: str, layer: LoRAMixin) -> None:
    if not layer.adapter_enabled:
        raise AdapterError(
            f"the adapter of {fqn} is switched off; leave disable_adapters before you merge or "
            "unmerge"
        )
