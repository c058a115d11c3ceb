"""Where A and B of a tensor-parallel linear lie, derived from where its weight W lies.

    W (out, in)              A (r, in)    B (out, r)   h = A x      y = B h
    column: Shard(0)         replicated   Shard(0)     replicated   sharded, last dimension
    row: Shard(1)            Shard(1)     replicated   Partial      Partial, until the base's reduce
    replicated               replicated   replicated   as x         as x

So forward needs no collective beyond the base's own. In backward each rank sees a part of what
the replicated factor's gradient sums over (its own columns, or its own part of h), so that
gradient, r values a feature, is summed once.

`torch.distributed.tensor` is imported inside the functions: it costs half a second, which only
those who shard should pay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bridge.peft.errors import UnsupportedLinearError
from bridge.peft.parallel.megatron import is_split_by_megatron
from bridge.peft.tensors import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one linear lie on a mesh of one dimension.

    Attributes:
        mesh: The ranks among which the linear is shared.
        a: Placement of A, (dim, in_features).
        b: Placement of B, (out_features, dim).
    """

    mesh: DeviceMesh
    a: Placement
    b: Placement

    @property
    def is_column(self) -> bool:
        """Whether each rank computes some of the output's features."""
        return self.b.is_shard()

    @property
    def is_row(self) -> bool:
        """Whether each rank sees some of the input's features."""
        return self.a.is_shard()

    @property
    def rank(self) -> int:
        """This process's place on the mesh."""
        return self.mesh.get_local_rank()


def layout_of(weight: Tensor, *, below_fsdp: bool = False) -> Layout:
    """The layout of A and B over a sharded weight.

    Args:
        weight: A DTensor of shape (out_features, in_features).
        below_fsdp: Whether `fully_shard` was called on it too, whose mesh then comes first.

    Raises:
        UnsupportedLinearError: Its mesh has several dimensions, or it is a partial sum.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert isinstance(weight, DTensor)
    mesh, placement = weight.device_mesh, weight.placements[-1]
    if below_fsdp and mesh.ndim == 2 and mesh.mesh_dim_names:
        mesh = mesh[mesh.mesh_dim_names[-1]]
    if mesh.ndim != 1:
        raise UnsupportedLinearError(
            f"its weight is sharded over a mesh of {mesh.ndim} dimensions; shard it over the "
            "tensor-parallel dimension alone (mesh['tp']), adapt the model, then call fully_shard"
        )
    if placement.is_shard(0):
        return Layout(mesh, a=Replicate(), b=Shard(0))
    if placement.is_shard(1):
        return Layout(mesh, a=Shard(1), b=Replicate())
    if placement.is_replicate():
        return Layout(mesh, a=Replicate(), b=Replicate())
    raise UnsupportedLinearError(f"its weight is placed as {placement}, not sharded or replicated")


def layout_of_factors(lora_a: DTensor, lora_b: DTensor) -> Layout:
    """The layout that placed factors have already; their base may be at hand as a local tensor.

    Args:
        lora_a: A, (dim, in_features).
        lora_b: B, (out_features, dim).
    """
    return Layout(lora_a.device_mesh, lora_a.placements[0], lora_b.placements[0])


def placed(full: Tensor, mesh: DeviceMesh, placement: Placement, *, alike: bool) -> nn.Parameter:
    """A trainable parameter that holds this rank's part of a tensor.

    Args:
        full: The whole tensor, on every rank.
        mesh: The ranks.
        placement: What each of them keeps.
        alike: Whether all ranks hold the same values; the first one's count otherwise.
    """
    from torch.distributed.tensor import distribute_tensor

    source = None if alike else 0
    # cloned: a slice would keep the whole alive
    part = distribute_tensor(full.detach(), mesh, [placement], src_data_rank=source).clone()
    return nn.Parameter(part, requires_grad=full.requires_grad)


def agreed_seed(model: nn.Module, seed: int) -> int:
    """The first rank's seed where a model is sharded, so that all ranks draw the same A.

    Args:
        model: The model; every rank must call if it is sharded.
        seed: This rank's own.
    """
    is_split = any(map(is_sharded, model.parameters())) or is_split_by_megatron(model)
    if not is_split:
        return seed
    agreed: list[Any] = [seed]
    torch.distributed.broadcast_object_list(agreed)
    return agreed[0]
