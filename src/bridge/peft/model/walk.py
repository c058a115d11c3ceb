"""Walk a model that carries branches: inside its wrappers, and to its adapted modules."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.wrapper import AdapterWrapper

_WRAPPER_LEVELS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, `DataParallel` or `torch.compile`'s module."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def clean_fqn(fqn: str) -> str:
    """`fqn` without the levels that compiling or activation checkpointing puts in between."""
    return ".".join(part for part in fqn.split(".") if part not in _WRAPPER_LEVELS)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, LoRAMixin | AdapterWrapper]]:
    """All adapted modules of a model, each once, with their fully qualified names.

    Args:
        model: A model, possibly inside `DistributedDataParallel` or compiled.
    """
    for fqn, module in unwrap(model).named_modules():
        if isinstance(module, LoRAMixin | AdapterWrapper):
            yield clean_fqn(fqn), module


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the base model has or had, each once, by fully qualified name.

    Args:
        model: A model, adapted or not, not wrapped.
    """
    modules = {clean_fqn(fqn): module for fqn, module in model.named_modules()}
    own = tuple(
        f"{fqn}.{child}."
        for fqn, module in modules.items()
        if isinstance(module, LoRAMixin)
        for child in ("lora_a", "lora_b", "dropout")
    )
    return {fqn: module for fqn, module in modules.items() if not f"{fqn}.".startswith(own)}
