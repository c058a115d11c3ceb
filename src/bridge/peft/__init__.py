"""Low-rank adapters for any linear, in place: the public API and nothing else.

Names are imported on first use, so that `bridge-peft --help` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bridge.peft.version import __version__ as __version__

if TYPE_CHECKING:
    from bridge.peft.adapter_wrapper import AdapterWrapper
    from bridge.peft.errors import AdapterError
    from bridge.peft.formats.peft.model import load_adapter, save_adapter
    from bridge.peft.lora import LoRA
    from bridge.peft.lora_layers import (
        LinearAdapter,
        LoRALinear,
        TELinearAdapter,
        patch_linear_module,
    )
    from bridge.peft.merging.in_memory import merge, unmerge
    from bridge.peft.model.adapter_state import adapter_state_dict
    from bridge.peft.model.disable import disable_adapters
    from bridge.peft.model.optimizer_groups import optimizer_groups

_HOME = {
    "AdapterError": "errors",
    "AdapterWrapper": "adapter_wrapper",
    "LinearAdapter": "lora_layers",
    "LoRA": "lora",
    "LoRALinear": "lora_layers",
    "TELinearAdapter": "lora_layers",
    "adapter_state_dict": "model.adapter_state",
    "disable_adapters": "model.disable",
    "load_adapter": "formats.peft.model",
    "merge": "merging.in_memory",
    "optimizer_groups": "model.optimizer_groups",
    "patch_linear_module": "lora_layers",
    "save_adapter": "formats.peft.model",
    "unmerge": "merging.in_memory",
}

__all__ = [
    "AdapterError",
    "AdapterWrapper",
    "LinearAdapter",
    "LoRA",
    "LoRALinear",
    "TELinearAdapter",
    "adapter_state_dict",
    "disable_adapters",
    "load_adapter",
    "merge",
    "optimizer_groups",
    "patch_linear_module",
    "save_adapter",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
