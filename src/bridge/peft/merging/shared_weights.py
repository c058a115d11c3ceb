"""Which parameters of a model lie in the same memory: tied heads, views of one packed weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.tensors import is_sharded


def sharers(model: nn.Module, layers: Iterable[LoRAMixin]) -> Mapping[LoRAMixin, list[str]]:
    """Name the other modules' parameters that overlap the weight of each layer.

    Args:
        model: The model, not wrapped.
        layers: Adapted layers.

    Returns:
        For each layer whose weight is shared the names of those parameters.
    """
    by_storage: dict[int, list[tuple[str, nn.Module, Tensor]]] = {}
    for fqn, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and (storage := _storage(parameter)):
                item = (f"{fqn}.{name}".lstrip("."), module, parameter)
                by_storage.setdefault(storage, []).append(item)
    found: dict[LoRAMixin, list[str]] = {}
    for layer in layers:
        weight = layer.base_weight
        for name, module, parameter in by_storage.get(_storage(weight), []):
            if module is not layer.base and _overlap(weight, parameter):
                found.setdefault(layer, []).append(name)
    return found


def _storage(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 where there is none (empty, `meta`, a wrapper)."""
    if is_sharded(tensor):  # tied shards are one parameter, and may be empty on some rank
        return id(tensor)
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _overlap(first: Tensor, second: Tensor) -> bool:
    if is_sharded(first) or is_sharded(second):
        return first is second
    (start, end), (other_start, other_end) = _extent(first), _extent(second)
    return start < other_end and other_start < end


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the one after its last."""
    if not tensor.numel():
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()
