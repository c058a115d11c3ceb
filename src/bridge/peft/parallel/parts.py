"""Which part of a sharded matrix is this rank's, and some rows of it brought together."""

from __future__ import annotations

import torch
from torch import Tensor


def own_part(sharded: Tensor) -> tuple[slice, slice]:
    """The rows and columns of the whole matrix that this rank holds.

    Args:
        sharded: A DTensor of two dimensions, sharded or replicated over any mesh.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(sharded, DTensor)
    sizes, offsets = compute_local_shape_and_global_offset(
        sharded.shape, sharded.device_mesh, sharded.placements
    )
    rows, columns = (slice(o, o + n) for n, o in zip(sizes, offsets, strict=True))
    return rows, columns


def first_rows(sharded: Tensor, count: int) -> Tensor:
    """The first rows of a sharded matrix, whole, on every rank; nothing larger is gathered.

    A collective: every rank of the matrix's mesh must call.

    Args:
        sharded: A DTensor of two dimensions.
        count: How many rows.
    """
    from torch.distributed.tensor import DTensor

    assert isinstance(sharded, DTensor)
    mesh = sharded.device_mesh
    local = sharded.to_local().detach()
    count = min(count, sharded.shape[0])
    found = torch.zeros(count, sharded.shape[1], dtype=local.dtype, device=mesh.device_type)
    rows, columns = own_part(sharded)
    is_first_copy = all(
        mesh.get_local_rank(dim) == 0
        for dim, placement in enumerate(sharded.placements)
        if placement.is_replicate()
    )
    if is_first_copy and rows.start < count:
        end = min(rows.stop, count)
        found[rows.start : end, columns] = local[: end - rows.start].to(found.device)
    # as bytes: a sum of floats would turn -0.0 into 0.0, and these are to be hashed
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(found.view(torch.uint8), group=mesh.get_group(dim))
    return found
