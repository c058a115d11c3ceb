"""Switch the branches of a model off for a while: `disable_adapters`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bridge.peft.branch.dense import SetAside, base_restored
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.token_rows import WithTokenRows
from bridge.peft.branch.wrapper import AdapterWrapper
from bridge.peft.errors import AdapterError
from bridge.peft.model.encoder_fast_path import encoder_fast_path
from bridge.peft.model.trained_parameters import has_replaced, original_parameters
from bridge.peft.model.walk import adapted_modules, token_rows_of, unwrap
from bridge.peft.parallel.fsdp import reshard

#: The modules that are switched off: by how many contexts, and what switches them on again.
_OFF: WeakKeyDictionary[nn.Module, tuple[int, ExitStack]] = WeakKeyDictionary()
_LOCK = threading.RLock()


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within the context the model is its base, bit for bit, merged or not.

    Contexts may overlap, in threads too: the adapters are off until the last one ends.

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
            check_kept(fqn, module)
    for fqn, module in token_rows_of(model):
        check_rows_kept(fqn, module)
    root = unwrap(model)
    parts = list(root.modules())
    if writes := any(map(_is_written, parts)):
        reshard(root)  # gathered copies must not be written to, nor outlive what is written
    with _LOCK, ExitStack() as entered:
        for module in parts:
            _switch_off(module)
            entered.callback(_switch_on, module)
        leave = entered.pop_all()
    try:
        yield
    finally:
        with _LOCK:
            if writes:
                reshard(root)
            leave.close()


def _is_written(module: nn.Module) -> bool:
    """Whether switching a module off writes into parameters."""
    return (isinstance(module, LoRAMixin) and module.merged) or has_replaced(module)


def _switch_off(module: nn.Module) -> None:
    """Make one module its base's; of contexts that overlap the first does it."""
    if module in _OFF:
        depth, stack = _OFF[module]
        _OFF[module] = depth + 1, stack
        return
    with ExitStack() as stack:
        stack.enter_context(encoder_fast_path(module))
        stack.enter_context(original_parameters(module))
        if isinstance(module, LoRAMixin) and module.merged:
            stack.enter_context(_base_weight_restored(module))
        if isinstance(module, WithTokenRows) and module.merged:
            stack.enter_context(base_rows_restored(module))
        if isinstance(module, LoRAMixin | AdapterWrapper | WithTokenRows):
            stack.callback(setattr, module, "adapter_enabled", module.adapter_enabled)
            module.adapter_enabled = False
        _OFF[module] = 1, stack.pop_all()


def _switch_on(module: nn.Module) -> None:
    """Undo `_switch_off`; of contexts that overlap the last does it."""
    depth, stack = _OFF.pop(module)
    if depth > 1:
        _OFF[module] = depth - 1, stack
    else:
        stack.close()


@contextmanager
def _base_weight_restored(layer: LoRAMixin) -> Iterator[None]:
    base = layer.unmerged_weight
    assert base is not None
    if isinstance(base, SetAside):
        with base_restored(layer, base):
            yield
        return
    weight = layer.base_weight
    merged = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(base)
    layer.weight_was_written()
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(merged)
        layer.weight_was_written()


@contextmanager
def base_rows_restored(module: WithTokenRows) -> Iterator[None]:
    """Within the context a merged embedding has the base's own rows.

    Args:
        module: One that is merged; one that follows another does nothing.
    """
    if module.unmerged_rows is None:
        yield
        return
    weight, indices = module.base_weight, module.rows.indices
    merged = weight.detach()[indices]
    with torch.no_grad():
        weight[indices] = module.unmerged_rows.to(weight)
    try:
        yield
    finally:
        with torch.no_grad():
            weight[indices] = merged


def check_rows_kept(fqn: str, module: WithTokenRows) -> None:
    """Raise `AdapterError` if a merged embedding's own rows were given up.

    Args:
        fqn: Its name, for the message.
        module: An embedding with rows of its own for some tokens.
    """
    if module.merged and module.unmerged_rows is None:
        raise AdapterError(
            f"{fqn} was merged with keep_base=False, so its base weight is gone; load the base "
            "model again"
        )


def check_kept(fqn: str, layer: LoRAMixin) -> None:
    """Raise `AdapterError` if a merged layer's base weight was given up.

    Args:
        fqn: The layer's name, for the message.
        layer: A merged layer.
    """
    if layer.unmerged_weight is None:
        raise AdapterError(
            f"{fqn} was merged with keep_base=False, so its base weight is gone; load the base "
            "model again"
        )
