"""Merge LoRA branches into base weights, unmerge them, and switch them off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft.branch import TRAINABLE_DTYPES
from bridge.peft.encoder_fast_path import encoder_fast_path
from bridge.peft.errors import AdapterError
from bridge.peft.lora_mixin import LoRAMixin
from bridge.peft.module_matcher import adapted_modules, unwrap
from bridge.peft.text_table import table
from bridge.peft.whole_parameters import forget_tie, original_parameters

#: Above this share of weights that stay the same, an update counts as lost.
LOST = 0.5


@dataclass(frozen=True, kw_only=True)
class MergeRow:
    """What merging did to one layer.

    Attributes:
        fqn: Fully qualified name.
        max_error: Largest absolute difference between the stored weight and the exact sum.
        mean_error: Mean of that difference.
        unchanged: Share of the weights that the update did not change, of those it should have.
        relative_update: Frobenius norm of the update over that of the base weight.
    """

    fqn: str
    max_error: float
    mean_error: float
    unchanged: float
    relative_update: float


@dataclass(frozen=True)
class MergeReport:
    """A row per merged layer; prints as a table, with a warning where an update was lost.

    Attributes:
        rows: One per layer, in the model's order.
    """

    rows: tuple[MergeRow, ...]

    @property
    def lost(self) -> tuple[str, ...]:
        """Names of the layers where more than half of the update was lost to rounding."""
        return tuple(row.fqn for row in self.rows if row.unchanged > LOST)

    def to_dict(self) -> dict[str, Any]:
        """Rows and lost layers, ready for JSON."""
        return {"rows": [asdict(row) for row in self.rows], "lost": list(self.lost)}

    def __str__(self) -> str:
        head = ("module", "max error", "mean error", "unchanged", "|update|/|W|")
        body = (
            (
                row.fqn,
                f"{row.max_error:.2e}",
                f"{row.mean_error:.2e}",
                f"{row.unchanged:.1%}",
                f"{row.relative_update:.2e}",
            )
            for row in self.rows
        )
        lines = list(table(head, body))
        if self.lost:
            lines.append(
                f"warning: in {len(self.lost)} of {len(self.rows)} layers more than half of the "
                "update was too small for the weight's dtype; keep the adapter unmerged, or merge "
                "into float32 weights"
            )
        return "\n".join(lines)


def merge_weight(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    dtype: torch.dtype = torch.float32,
    fqn: str = "",
) -> tuple[Tensor, MergeRow]:
    """`W + scale · B A`, computed in `dtype` and rounded once to the dtype of W.

    Args:
        weight: W, (out_features, in_features).
        lora_a: A, (dim, in_features).
        lora_b: B, (out_features, dim).
        scale: Factor of the branch.
        dtype: Dtype of the computation, float32 or float64.
        fqn: Name for the report.

    Returns:
        The merged weight, a new tensor like W, and its row of the report.
    """
    device = weight.device
    update = (lora_b.to(device, dtype) @ lora_a.to(device, dtype)).mul_(scale)
    base = weight.to(dtype)
    exact = base + update
    merged = exact.to(weight.dtype)
    error = (merged.to(dtype) - exact).abs_()
    meant = update != 0
    unchanged = (meant & (merged == weight)).sum() / meant.sum().clamp(min=1)
    norm = torch.linalg.vector_norm(base)
    relative = torch.linalg.vector_norm(update) / norm.clamp(min=torch.finfo(dtype).tiny)
    row = MergeRow(
        fqn=fqn,
        max_error=float(error.max()) if error.numel() else 0.0,
        mean_error=float(error.mean()) if error.numel() else 0.0,
        unchanged=float(unchanged),
        relative_update=float(relative),
    )
    return merged, row


@torch.no_grad()
def merge(
    model: nn.Module,
    *,
    keep_base: bool = True,
    dtype: torch.dtype = torch.float32,
    untie: bool = False,
) -> MergeReport:
    """Fold every branch into its base weight, in place: `W <- W + scale · B A`.

    The sum is computed in `dtype` and rounded once. While merged, the branch is not computed, and
    `model.state_dict()` is that of the dense merged model, without A and B.

    Args:
        model: An adapted model.
        keep_base: Keep the original weights on the CPU, so that `unmerge` can restore them.
        dtype: Dtype of the computation, float32 or float64.
        untie: Give an adapted weight that is shared with another module (a tied output head)
            storage of its own, instead of refusing.

    Returns:
        A report with a row per layer.

    Raises:
        AdapterError: Nothing to merge, merged already, a weight that is quantised, shared, not
            finite or on `meta`; the model is as it was before.

    Example:
        >>> report = merge(model)
        >>> print(report)
    """
    if dtype not in (torch.float32, torch.float64):
        raise AdapterError(f"merge computes in torch.float32 or torch.float64, got {dtype}")
    layers = _mergeable_layers(model, untie=untie)
    for fqn, layer in layers:
        _check_finite(fqn, layer, dtype)
    rows = []
    for fqn, layer in layers:
        if _sharers(unwrap(model), layer):
            _untie(unwrap(model), layer)
        weight = base_weight(layer)
        oriented = layer.oriented(weight)
        merged, row = merge_weight(
            oriented, layer.lora_a.weight, layer.lora_b.weight, layer.scale, dtype=dtype, fqn=fqn
        )
        if keep_base:
            layer.unmerged_weight = weight.detach().to("cpu", copy=True)
        weight.copy_(layer.oriented(merged))
        layer.merged = True
        _drop_stale_copies(layer)
        rows.append(row)
    return MergeReport(tuple(rows))


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the base weights bit for bit and compute the branches again, in place.

    Args:
        model: A model that `merge` was called on.

    Raises:
        AdapterError: Nothing is merged, or the originals were given up (`keep_base=False`).
    """
    merged = [(f, m) for f, m in adapted_modules(model) if isinstance(m, LoRAMixin) and m.merged]
    if not merged:
        raise AdapterError("nothing is merged; call merge(model) first")
    for fqn, layer in merged:
        _check_kept(fqn, layer)
    for _, layer in merged:
        assert layer.unmerged_weight is not None
        base_weight(layer).copy_(layer.unmerged_weight)
        layer.unmerged_weight = None
        layer.merged = False
        _drop_stale_copies(layer)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within the context the model is its base, bit for bit, merged or not.

    Args:
        model: An adapted model.

    Raises:
        AdapterError: The model has no adapters, or is merged and its base was given up.

    Example:
        >>> with disable_adapters(model):
        ...     base_logits = model(**batch).logits
    """
    modules = list(adapted_modules(model))
    if not modules:
        raise AdapterError("the model has no adapters to disable; LoRA(...)(model) adds them")
    for fqn, module in modules:
        if isinstance(module, LoRAMixin) and module.merged:
            _check_kept(fqn, module)
    before = [(module, module.adapter_enabled) for _, module in modules]
    with ExitStack() as stack:
        stack.enter_context(encoder_fast_path(unwrap(model)))
        stack.enter_context(original_parameters(unwrap(model)))
        for _, module in modules:
            if isinstance(module, LoRAMixin) and module.merged:
                stack.enter_context(_base_weight_restored(module))
        try:
            for module, _ in before:
                module.adapter_enabled = False
            yield
        finally:
            for module, enabled in before:
                module.adapter_enabled = enabled


@contextmanager
def _base_weight_restored(layer: LoRAMixin) -> Iterator[None]:
    weight, base = base_weight(layer), layer.unmerged_weight
    assert base is not None
    merged = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(base)
    _drop_stale_copies(layer)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(merged)
        _drop_stale_copies(layer)


def base_weight(layer: LoRAMixin) -> Tensor:
    """The base's weight, (out_features, in_features) unless the base stores it transposed."""
    return layer.weight  # pyright: ignore[reportReturnType]


def _mergeable_layers(model: nn.Module, *, untie: bool) -> list[tuple[str, LoRAMixin]]:
    """All adapted layers, or `AdapterError` with the first reason why they cannot be merged."""
    layers: list[tuple[str, LoRAMixin]] = []
    for fqn, module in adapted_modules(model):
        if not isinstance(module, LoRAMixin):
            raise AdapterError(
                f"{fqn} wraps its base in {type(module).__name__}; only layers adapted in place "
                "can be merged here"
            )
        weight = base_weight(module)
        if module.merged:
            raise AdapterError(f"{fqn} is merged already; unmerge(model) first")
        if weight.dtype not in TRAINABLE_DTYPES or type(weight) not in (nn.Parameter, Tensor):
            kind = type(weight).__name__ if weight.dtype in TRAINABLE_DTYPES else weight.dtype
            raise AdapterError(
                f"{fqn} is quantised ({kind}), so a merge would round to its few bits; load the "
                "base in bfloat16 or float32, load the adapter there, and merge"
            )
        if weight.device.type == "meta":
            raise AdapterError(f"{fqn} is on the meta device; load its weights before merging")
        shared = _sharers(unwrap(model), module)
        if shared and not untie:
            raise AdapterError(
                f"{fqn} shares its weight with {', '.join(shared)}, which a merge would change "
                "too; pass untie=True to give it a weight of its own"
            )
        layers.append((fqn, module))
    if not layers:
        raise AdapterError("the model has no adapters to merge; LoRA(...)(model) adds them")
    return layers


def _sharers(model: nn.Module, layer: LoRAMixin) -> list[str]:
    """Names of the other modules' parameters that live in the storage of the layer's weight."""
    storage = base_weight(layer).untyped_storage().data_ptr()
    own = {id(module) for module in layer.modules()}
    return [
        f"{fqn}.{name}"
        for fqn, module in model.named_modules()
        if id(module) not in own
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.untyped_storage().data_ptr() == storage
    ]


def _untie(model: nn.Module, layer: LoRAMixin) -> None:
    layer.weight = nn.Parameter(base_weight(layer).detach().clone(), requires_grad=False)
    forget_tie(model)


def _check_finite(fqn: str, layer: LoRAMixin, dtype: torch.dtype) -> None:
    weight, a, b = base_weight(layer), layer.lora_a.weight, layer.lora_b.weight
    for name, tensor in (("base weight", weight), ("A", a), ("B", b)):
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{fqn}: {name} holds NaN or inf; nothing was merged")
    if not weight.numel():
        return
    # A bound first: only what could overflow is computed twice.
    size = abs(layer.scale) * layer.dim * float(a.abs().max()) * float(b.abs().max())
    if float(weight.abs().max()) + size < torch.finfo(weight.dtype).max:
        return
    merged, _ = merge_weight(layer.oriented(weight), a, b, layer.scale, dtype=dtype)
    if not bool(torch.isfinite(merged).all()):
        raise AdapterError(
            f"{fqn}: the merged weight overflows {weight.dtype}; nothing was merged; "
            "convert the base to float32 or bfloat16 first"
        )


def _check_kept(fqn: str, layer: LoRAMixin) -> None:
    if layer.unmerged_weight is None:
        raise AdapterError(
            f"{fqn} was merged with keep_base=False, so its base weight is gone; load the base "
            "model again"
        )


def _drop_stale_copies(layer: LoRAMixin) -> None:
    """Forget the fp8 copies of the weight that Transformer Engine caches."""
    workspaces = getattr(layer, "_fp8_workspaces", None)
    if workspaces:
        workspaces.clear()
