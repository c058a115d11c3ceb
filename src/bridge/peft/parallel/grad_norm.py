"""Clip gradients of sharded parameters by the norm of all of them, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[nn.Parameter], max_norm: float, group: dist.ProcessGroup | None
) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, over the shards of tensor parallel ranks; a collective.

    Megatron's own optimizer clips so by itself; this is for a plain loop.

    Args:
        parameters: Those of an adapted Megatron model; what has no gradient is left out. Parts are
            known by Megatron's mark `tensor_model_parallel`; what is whole counts once.
        max_norm: The largest norm that is left alone.
        group: The tensor parallel ranks.

    Returns:
        The norm before clipping, float32.
    """
    held = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in held if p.grad is not None]
    rank = 0 if group is None else group.rank()
    counted = [
        g.float().square().sum()
        for p, g in zip(held, grads, strict=True)
        if rank == 0 or getattr(p, "tensor_model_parallel", False)
    ]
    device = grads[0].device if grads else None
    squared = torch.stack(counted).sum() if counted else torch.zeros((), device=device)
    if group is not None and group.size() > 1:
        dist.all_reduce(squared, group=group)
    norm = squared.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.dtype))
    return norm
