"""What a tensor is: plain, sharded, and the whole of a sharded one, and whether it is finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_plain(tensor: object) -> bool:
    """Whether this is an ordinary tensor, not a subclass (sharded, torchao's, fp8)."""
    return type(tensor) in _PLAIN


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor, told without importing `torch.distributed.tensor`."""
    return hasattr(tensor, "device_mesh")


def full_tensor(tensor: Any) -> Tensor:
    """All of a DTensor, detached; of another tensor itself, detached.

    Of a DTensor this is a collective: every rank must call.
    """
    if is_sharded(tensor):  # one that is offloaded is gathered by its mesh's device
        tensor = tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
    return tensor.detach()


def sharded_like(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut as another one is sharded; itself if that one is not.

    Nothing is sent: every rank must have the same `full`.

    Args:
        full: On any device.
        like: A DTensor of the same shape, or any other tensor.
    """
    if not is_sharded(like):
        return full
    # Imported here because it costs half a second, which only a DTensor's user should pay.
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(
        full.detach().to(like.device_mesh.device_type),
        like.device_mesh,
        like.placements,
        src_data_rank=None,
    )


def write_count(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 where that is not counted.

    Writes through `.data`, and FSDP's into a gathered parameter, are not.
    """
    return 0 if tensor.is_inference() else tensor._version


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no inf; forty times as fast as to look at each value."""
    # a sum with NaN or inf in it is never finite; one that overflows needs the closer look
    total = tensor.sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())
