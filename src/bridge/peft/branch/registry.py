"""Which kind of branch stands on which class of modules, and what can take one."""

from __future__ import annotations

from torch import nn

from bridge.peft.branch.kinds import KINDS
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.untouched import NOT_A_LINEAR, check_untouched
from bridge.peft.errors import UnsupportedLinearError


def kind_of(base_type: type[nn.Module]) -> type[LoRAMixin] | None:
    """The kind that takes modules of a class; None if none does."""
    return next((kind for kind in KINDS if kind.takes(base_type)), None)


def features(module: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of a module that can be adapted, or is."""
    kind = kind_of(type(module))
    assert kind is not None, type(module)
    return kind.features(module)


def check_adaptable(module: nn.Module) -> None:
    """Raise unless `module` can be adapted as it is; touches nothing."""
    check_untouched(module)
    if reason := unsupported_reason(module):
        raise UnsupportedLinearError(f"cannot adapt {type(module).__name__}: {reason}")


def unsupported_reason(module: nn.Module) -> str | None:
    """Say why a module that is not adapted yet cannot be, or None if it can."""
    kind = kind_of(type(module))
    if kind is None:
        return NOT_A_LINEAR
    return kind.refusal(module)
