"""Work space for blocks, kept between calls on the CPU.

Fresh memory from the system costs a page fault every 4 KB, several times the arithmetic that a
block of dropout takes; the CUDA allocator keeps its own memory, and a kept buffer there would be
shared between streams.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_kept = threading.local()


def scratch(slot: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor of the shape and device of ``like``.

    On the CPU it is the caller's until the same thread asks for the same slot again.
    """
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    buffer: Tensor | None = getattr(_kept, slot, None)
    if buffer is None or buffer.dtype != dtype or buffer.shape != like.shape:
        buffer = _reshaped(buffer, like.shape, dtype)
        setattr(_kept, slot, buffer)
    return buffer


def _reshaped(buffer: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The same memory under another shape and dtype, or more memory."""
    size = shape.numel() * dtype.itemsize
    with torch.inference_mode(False):
        if buffer is None or buffer.untyped_storage().nbytes() < size:
            return torch.empty(shape, dtype=dtype)
        return torch.empty(0, dtype=dtype).set_(
            buffer.untyped_storage(), 0, shape, torch.empty(shape, device="meta").stride()
        )
