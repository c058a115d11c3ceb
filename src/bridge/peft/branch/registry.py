"""Which kind of branch stands on which class of modules, and what can take one."""

from __future__ import annotations

from torch import nn

from bridge.peft.branch.kinds import KINDS, READ_KINDS
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.untouched import NOT_A_LINEAR, check_untouched
from bridge.peft.errors import UnsupportedLinearError


def kind_of(base_type: type[nn.Module]) -> type[LoRAMixin] | None:
    """The kind that takes modules of a class; None if none does."""
    return next((kind for kind in KINDS if kind.takes(base_type)), None)


def features(module: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of a module that can be adapted, or is."""
    kind = type(module) if isinstance(module, LoRAMixin) else kind_of(type(module))
    assert kind is not None, type(module)
    return kind.features(module)


def check_adaptable(module: nn.Module, *, is_read: bool = False) -> None:
    """Raise unless `module` can be adapted as it is; touches nothing."""
    check_untouched(module)
    if reason := unsupported_reason(module, is_read=is_read):
        raise UnsupportedLinearError(f"cannot adapt {type(module).__name__}: {reason}")


def unsupported_reason(module: nn.Module, *, is_read: bool = False) -> str | None:
    """Say why a module that is not adapted yet cannot be, or None if it can.

    Args:
        module: Any module.
        is_read: Other code of its model reads the weight past the forward.
    """
    kind = kind_of(type(module))
    if is_read:
        kind = READ_KINDS.get(type(module), kind)
    if kind is None:
        return NOT_A_LINEAR
    return kind.refusal(module)
