"""What a tensor is: plain, sharded, and the whole of a sharded one, and whether it is finite."""

from __future__ import annotations

import torch
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


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no inf; forty times as fast as to look at each value."""
    # a sum with NaN or inf in it is never finite; one that overflows needs the closer look
    total = tensor.sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())
