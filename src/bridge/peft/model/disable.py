"""Switch the branches of a model off for a while: `disable_adapters`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.errors import AdapterError
from bridge.peft.model.encoder_fast_path import encoder_fast_path
from bridge.peft.model.trained_parameters import original_parameters
from bridge.peft.model.walk import adapted_modules, unwrap


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
            check_kept(fqn, module)
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
    weight, base = layer.base_weight, layer.unmerged_weight
    assert base is not None
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
