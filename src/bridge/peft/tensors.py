"""What a parameter's tensor is: plain, sharded, and the whole of a sharded one."""

from __future__ import annotations

from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_plain(tensor: object) -> bool:
    """Whether this is an ordinary tensor, not a subclass (sharded, torchao's, fp8)."""
    return type(tensor) in _PLAIN


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, told without importing `torch.distributed.tensor`."""
    return hasattr(tensor, "device_mesh")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a DTensor, detached; of another tensor itself, detached.

    Of a DTensor this is a collective: every rank must call.
    """
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach()
