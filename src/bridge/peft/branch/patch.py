"""Make a module an adapted one in place: the same object, of a class that is both."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from bridge.peft.branch.functions.starts import check_has_values, is_start
from bridge.peft.branch.kinds import READ_KINDS
from bridge.peft.branch.kinds.experts import ParameterBranch
from bridge.peft.branch.kinds.parameter_holder import take_parameter_branch_off
from bridge.peft.branch.mixin import BRANCH_ATTRIBUTES, LoRAMixin, Start
from bridge.peft.branch.options import BranchOptions
from bridge.peft.branch.registry import check_adaptable, kind_of
from bridge.peft.branch.sharding import NOT_SHARDED
from bridge.peft.errors import AdapterError, UnsupportedLinearError
from bridge.peft.parallel.fsdp import is_data_parallel
from bridge.peft.parallel.transformers_styles import renew_forward
from bridge.peft.tensors import is_sharded


def add_branch(
    module: nn.Module,
    options: BranchOptions,
    start: Start = None,
    *,
    is_read: bool = False,
    name: str = "",
) -> LoRAMixin:
    """Adapt a module: in place, or by what must stand in its place where its kind wraps.

    Args as in `patch_in_place`; `name` is the module's fully qualified name.
    """
    kind = kind_of(type(module))
    if kind is None or not kind.wraps:
        return patch_in_place(module, options, start, is_read=is_read)
    check_adaptable(module)
    _check_takes(kind, module, options)
    return kind.wrap(module, options, start, name)


def patch_in_place(
    module: nn.Module, options: BranchOptions, start: Start = None, *, is_read: bool = False
) -> LoRAMixin:
    """Adapt a module in place; nothing of the base is copied or allocated.

    Args:
        module: The module to adapt.
        options: The branch's options.
        start: A seed for A, the values of A and B, or None for torch's default CPU generator.
        is_read: Other code reads the weight past the forward; see `ReadLinearAdapter`.

    Returns:
        The same object.

    Raises:
        UnsupportedLinearError: It cannot be adapted.
        AlreadyAdaptedError: It is adapted or patched already; it is left as it was.
    """
    check_adaptable(module, is_read=is_read)
    if adapted_class(type(module)).wraps:
        raise UnsupportedLinearError(
            f"a {type(module).__name__} is wrapped, not patched in place; adapt the model around "
            "it: LoRA(...)(model)"
        )
    adapted = adapted_class(type(module))
    if is_read:
        adapted = READ_KINDS.get(type(module), adapted)
    wanted_grad = [p for p in module._parameters.values() if p is not None and p.requires_grad]
    _check_takes(adapted, module, options)
    if options.use_dora and is_sharded(adapted.weight_of(module)) and not is_data_parallel(module):
        raise UnsupportedLinearError(f"cannot adapt {type(module).__name__}: {NOT_SHARDED}")
    method = options.lora_A_init_method
    starts_from_weight = is_start(method) and not isinstance(start, tuple)
    if starts_from_weight:
        check_has_values(adapted.weight_of(module), method)
    adapted.attach_branch(module, options, start)
    module.__class__ = adapted  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(module, LoRAMixin)
    if options.use_dora and not module.is_linear():
        take_branch_off(module)
        for parameter in wanted_grad:
            parameter.requires_grad_(True)
        raise UnsupportedLinearError(
            f"cannot adapt {type(module).__name__} with DoRA: its forward is not W x + b; leave it "
            "out with exclude_modules, or adapt without use_dora"
        )
    if starts_from_weight:
        assert not isinstance(start, tuple)
        try:
            module.set_start(start)
        except AdapterError:
            take_branch_off(module)
            for parameter in wanted_grad:
                parameter.requires_grad_(True)
            raise
    if module.magnitude is not None and not module.magnitude.is_set:
        module.reset_magnitude()
    show_forward(module)
    return module


def _check_takes(kind: type[LoRAMixin], module: nn.Module, options: BranchOptions) -> None:
    """Raise unless a kind can do what the options ask for beside W x + s · B A x."""
    method = options.lora_A_init_method
    asked = "use_dora" if options.use_dora else f"lora_A_init_method={method!r}"
    if not kind.takes_functions and (options.use_dora or is_start(method)):
        raise UnsupportedLinearError(
            f"cannot adapt {type(module).__name__} with {asked}, which is for linears; leave it "
            "out with exclude_modules"
        )


def take_branch_off(layer: LoRAMixin) -> nn.Module:
    """Make an adapted module what it was before; whether it wants gradients aside.

    Args:
        layer: An adapted module that is not merged.

    Returns:
        The base: the same object, or the one that was wrapped.
    """
    if isinstance(layer, ParameterBranch):
        take_parameter_branch_off(layer)
        return layer
    if layer.wraps:
        return layer.let_go()
    for name in BRANCH_ATTRIBUTES:
        layer._modules.pop(name, None)
        vars(layer).pop(name, None)
    layer.__class__ = layer.base_type  # pyright: ignore[reportAttributeAccessIssue]
    show_forward(layer)
    return layer


def show_forward(module: nn.Module) -> None:
    """Show whoever keeps the bound forward of a module that of its class as it is now.

    Args:
        module: Its class was changed.
    """
    if "_hf_hook" in vars(module):  # accelerate's hooks
        vars(module)["_old_forward"] = type(module).forward.__get__(module)
    renew_forward(module)


@functools.cache
def adapted_class(base_type: type[nn.Module]) -> type[LoRAMixin]:
    """The adapter class over `base_type`: one per type, so that compiled graphs are shared."""
    kind = kind_of(base_type)
    assert kind is not None, base_type
    if kind.wraps or getattr(kind, "base_type", None) is base_type:
        return kind
    plain = kind.plain_forward and base_type.forward is nn.Linear.forward
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"{base_type.__name__} + LoRA; the base's forward is its own.",
        "__reduce_ex__": _reduce_by_base_type,
        "base_type": base_type,
        "input_name": _input_name(base_type),
        "plain_forward": plain,
    }
    if not plain:
        namespace["forward"] = LoRAMixin.forward
    if isinstance(vars(base_type).get("weight"), property) and "forward" not in vars(base_type):
        # torch.nn.utils.parametrize deletes its properties from the very class of the module
        namespace |= {n: v for n, v in vars(base_type).items() if isinstance(v, property)}
        return type(f"{base_type.__name__}Adapter", (kind, *base_type.__bases__), namespace)
    return type(f"{base_type.__name__}Adapter", (kind, base_type), namespace)


def _input_name(base_type: type[nn.Module]) -> str:
    names = [*inspect.signature(base_type.forward).parameters]
    return names[1] if len(names) > 1 else "input"


def _reduce_by_base_type(self: LoRAMixin, protocol: int) -> tuple[Any, ...]:
    # The class was made at run time and has no importable name; its base has.
    state = object.__reduce_ex__(self, 2)[2]
    return _new_adapted, (self.base_type,), state


def _new_adapted(base_type: type[nn.Module]) -> nn.Module:
    cls = adapted_class(base_type)
    return cls.__new__(cls)
