"""Which modules can be adapted, and the reason where one cannot."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from bridge.peft._optional import HAVE_TE, TELinear
from bridge.peft.adapter_wrapper import AdapterWrapper
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.orientation import is_transposed
from bridge.peft.errors import AlreadyAdaptedError, UnsupportedLinearError

#: What a branch adds to a module, which must be free before.
_BRANCH_ATTRIBUTES = (
    *("dim", "alpha", "scale", "dropout", "dropout_position", "lora_a", "lora_b"),
    *("adapter_enabled", "merged", "unmerged_weight"),
)


def check_adaptable(module: nn.Module) -> None:
    """Raise unless `module` is a linear that can be adapted as it is; touches nothing.

    Args:
        module: Any module.

    Raises:
        AlreadyAdaptedError: It carries an adapter or a foreign patch.
        UnsupportedLinearError: It is not such a linear; the message says why.
    """
    name = type(module).__name__
    if not isinstance(module, nn.Module):
        raise UnsupportedLinearError(f"cannot adapt {module!r}: it is no module; pass a linear")
    if isinstance(module, LoRAMixin | AdapterWrapper):
        raise AlreadyAdaptedError(
            f"{name} is already adapted; start from the base model, or go on with that adapter"
        )
    if hasattr(module, "super_fwd") or (
        "forward" in vars(module) and "_hf_hook" not in vars(module)
    ):
        raise AlreadyAdaptedError(
            f"{name} has its forward patched on the instance, which would bypass the adapter; "
            "undo that patch first"
        )
    if reason := unsupported_reason(module):
        raise UnsupportedLinearError(f"cannot adapt {name}: {reason}")


def unsupported_reason(module: nn.Module) -> str | None:
    """Say why a module that is not adapted yet cannot be, or None if it can.

    Args:
        module: Any module.
    """
    if HAVE_TE and type(module) is TELinear:
        return _te_unsupported_reason(module)
    if HAVE_TE and isinstance(module, TELinear):
        return "subclasses of te.Linear answer with tuples of their own; wrap it in LoRALinear"
    if not (isinstance(module, nn.Linear) or is_transposed(type(module))):
        return "it is neither a torch.nn.Linear nor a transformer_engine.pytorch.Linear"
    if taken := [name for name in _BRANCH_ATTRIBUTES if hasattr(module, name)]:
        return f"its own attribute {taken[0]!r} would be overwritten by the adapter's"
    if type(module) is NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads its weight and never calls its forward"
    if isinstance(module.weight, UninitializedParameter):
        return "its shape is not known yet; run one forward of the model first"
    if hasattr(module.weight, "device_mesh"):
        return "its weight is sharded (DTensor); adapt the model before sharding it"
    if module.weight.device.type == "meta" and "_hf_hook" in vars(module):
        return "its weight is offloaded; load the model without disk or CPU offload"
    return None


def _te_unsupported_reason(module: TELinear) -> str | None:
    if "weight" not in module._parameters:
        return "its weight is split (parameters_split); build it with parameters_split=None"
    if getattr(module, "tp_size", 1) > 1:
        return f"it is sharded over {module.tp_size} ranks; wrap it in LoRALinear"  # pyright: ignore
    return None


#: Settings of a `te.Linear` that a copy carries on when it has them: attribute -> constructor name.
_TE_SETTINGS = {
    "use_bias": "bias",
    "return_bias": "return_bias",
    "parallel_mode": "parallel_mode",
    "tp_group": "tp_group",
    "tp_size": "tp_size",
    "sequence_parallel": "sequence_parallel",
    "fuse_wgrad_accumulation": "fuse_wgrad_accumulation",
    "get_rng_state_tracker": "get_rng_state_tracker",
    "rng_tracker_name": "rng_tracker_name",
    "symmetric_ar_type": "symmetric_ar_type",
    "save_original_input": "save_original_input",
}


def te_constructor_arguments(orig: TELinear) -> dict[str, Any]:
    """The arguments that build another `te.Linear` like `orig`, weights aside.

    Args:
        orig: A `te.Linear` with unsharded, unquantised weights.

    Raises:
        UnsupportedLinearError: Its weight is an fp8 tensor, which a copy would quantise again.
    """
    weight = orig.weight
    if type(weight) not in (nn.Parameter, Tensor):
        raise UnsupportedLinearError(
            f"cannot copy a te.Linear whose weight is a {type(weight).__name__} (fp8): writing it "
            "would quantise again; patch_linear_module adapts it in place"
        )
    settings = {
        name: getattr(orig, attribute)
        for attribute, name in _TE_SETTINGS.items()
        if getattr(orig, attribute, None) is not None
    }
    return {
        "in_features": orig.in_features,
        "out_features": orig.out_features,
        "params_dtype": weight.dtype,
        "device": weight.device.type if weight.is_meta else weight.device,
        **settings,
    }
