"""Whether a module is still as its class made it: not adapted, not patched on the instance."""

from __future__ import annotations

from torch import nn

from bridge.peft.branch.wrapper import AdapterWrapper
from bridge.peft.errors import AlreadyAdaptedError, UnsupportedLinearError
from bridge.peft.parallel.transformers_styles import is_tensor_parallel

#: Why a module of no kind cannot be adapted.
NOT_A_LINEAR = (
    "it is neither a torch.nn.Linear nor a transformer_engine.pytorch.Linear, and no embedding or "
    "convolution"
)


def check_untouched(module: nn.Module) -> None:
    """Raise unless `module` is a module as its class made it, without an adapter or a patch."""
    if not isinstance(module, nn.Module):
        raise UnsupportedLinearError(f"cannot adapt {module!r}: it is not a module; pass a linear")
    name = type(module).__name__
    if isinstance(module, AdapterWrapper) or hasattr(module, "branch_options"):
        raise AlreadyAdaptedError(
            f"{name} is already adapted; start from the base model, or go on with that adapter"
        )
    if reason := foreign_patch(module):
        raise AlreadyAdaptedError(f"cannot adapt {name}: {reason}")


def foreign_patch(module: nn.Module) -> str | None:
    """Why the forward of this instance would pass an adapter by; None if it would not.

    Args:
        module: Any module.
    """
    # accelerate's hooks and transformers' tensor parallelism stand before a forward, and can stand
    # before the adapted one too
    own = vars(module)
    patched = "forward" in own and "_hf_hook" not in own and not is_tensor_parallel(module)
    if hasattr(module, "super_fwd") or patched:
        return "its forward is patched on the instance, past the adapter; undo that patch first"
    return None
