"""A module some of whose parameters carry branches, and read with them in its own forward only."""

from __future__ import annotations

import functools
import threading
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bridge.peft.branch.functions.starts import is_start
from bridge.peft.branch.kinds.attention import AttentionInputBranch
from bridge.peft.branch.kinds.experts import (
    SUFFIX,
    ParameterBranch,
    is_attention,
    parameter_refusal,
)
from bridge.peft.branch.kinds.read_linear import reading
from bridge.peft.branch.mixin import Start
from bridge.peft.branch.options import BranchOptions
from bridge.peft.branch.untouched import check_untouched
from bridge.peft.errors import UnsupportedLinearError
from bridge.peft.ops.low_rank_weight import LowRankWeight

#: The modules whose forward runs in this thread, each with its weights as it reads them.
_running = threading.local()


def patch_parameter(
    module: nn.Module, name: str, options: BranchOptions, start: Start = None
) -> ParameterBranch:
    """Give a parameter of a module a branch, in place; the module stays the same object.

    Args:
        module: The module that holds it; it may carry branches on others.
        name: The parameter's name there.
        options: The branch's options.
        start: A seed for A, the values of A and B, or None for torch's default CPU generator.

    Raises:
        UnsupportedLinearError: The parameter cannot carry one, or not of this function.
        AlreadyAdaptedError: The module is patched already.
    """
    if not isinstance(module, ParameterHolder):
        check_untouched(module)
    if options.use_dora or is_start(options.lora_A_init_method):
        raise UnsupportedLinearError(
            f"cannot adapt {type(module).__name__}.{name}: DoRA and starts out of the weight are "
            "for linears"
        )
    if reason := parameter_refusal(module, name):
        raise UnsupportedLinearError(f"cannot adapt {type(module).__name__}.{name}: {reason}")
    kind = AttentionInputBranch if is_attention(module) else ParameterBranch
    branch = kind(module, name, options, start)
    if not isinstance(module, ParameterHolder):
        matrices = (n for n, p in module._parameters.items() if p is not None and p.dim() in (2, 3))
        _set_class(module, _holder_class(type(module), tuple(matrices)))
    module.add_module(f"{name}{SUFFIX}", branch)
    return branch


def take_parameter_branch_off(branch: ParameterBranch) -> None:
    """Undo `patch_parameter`, in place; whether the parameter wants gradients aside.

    Args:
        branch: A branch that is not merged.
    """
    module = branch.base
    assert isinstance(module, ParameterHolder)
    del module._modules[f"{branch.weight_name}{SUFFIX}"]
    if not any(isinstance(child, ParameterBranch) for child in module.children()):
        _set_class(module, module.base_type)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    if "_hf_hook" in vars(module):
        # accelerate keeps the bound forward it stands before; it must be the adapted one.
        vars(module)["_old_forward"] = cls.forward.__get__(module)


class ParameterHolder(nn.Module):
    """A module whose own forward runs with some of its parameters read together with branches."""

    #: The class before adaptation; its forward does the work.
    base_type: ClassVar[type[nn.Module]]
    #: The parameters that may be read so.
    matrices: ClassVar[tuple[str, ...]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own forward, in which the parameters read with their branches.

        Args:
            *args: The base's.
            **kwargs: The base's.
        """
        if torch.compiler.is_compiling():  # what is traced is a forward
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        stack = _stack()
        stack.append((self, {}))
        try:
            # no hook tells the output projection: torch's encoders look for hooks
            with reading() if is_attention(self) else nullcontext():
                return super().forward(*args, **kwargs)  # pyright: ignore
        finally:
            stack.pop()


def _stack() -> list[tuple[nn.Module, dict[str, LowRankWeight | Tensor]]]:
    if not hasattr(_running, "modules"):
        _running.modules = []
    return _running.modules


def _parameter_or_read(module: nn.Module, name: str) -> Any:
    """What `module.name` is: in its forward W with the branch, to everybody else the parameter."""
    if name not in module._parameters:
        raise AttributeError(name)
    branch = module._modules.get(f"{name}{SUFFIX}")
    if not isinstance(branch, ParameterBranch):
        return module._parameters[name]
    if torch.compiler.is_compiling():
        return branch.read() if branch.is_active() else module._parameters[name]
    for running, weights in reversed(_stack()):
        if running is module and not branch.is_active():
            branch.note_call()  # switched off it takes part too
        elif running is module:
            if name not in weights:
                weights[name] = branch.read()
            return weights[name]
    return module._parameters[name]


@functools.cache
def _holder_class(base_type: type[nn.Module], matrices: tuple[str, ...]) -> type[nn.Module]:
    """The class over `base_type`: one, so that compiled graphs are shared."""
    read = {n: property(functools.partial(_parameter_or_read, name=n)) for n in matrices}
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"{base_type.__name__} with branches on parameters; its forward is its own.",
        "__reduce_ex__": _reduce_by_base_type,
        "base_type": base_type,
        "matrices": matrices,
        **read,
    }
    return type(f"{base_type.__name__}Adapter", (ParameterHolder, base_type), namespace)


def _reduce_by_base_type(self: ParameterHolder, protocol: int) -> tuple[Any, ...]:
    # The class was made at run time and has no importable name; its base has.
    state = object.__reduce_ex__(self, 2)[2]
    return _new_holder, (self.base_type, self.matrices), state


def _new_holder(base_type: type[nn.Module], matrices: tuple[str, ...]) -> nn.Module:
    cls = _holder_class(base_type, matrices)
    return cls.__new__(cls)
