"""A tensor-parallel linear and its branch, computed on this rank's tensors by the fast path.

See `layout` for where everything lies. DTensors come in and go out; between them the products are
those of one process on smaller matrices, so nothing is dispatched operation by operation.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bridge.peft.errors import AdapterError
from bridge.peft.ops.dispatch import lora_add, lora_linear
from bridge.peft.ops.ranks import Ranks
from bridge.peft.parallel.gradient_sum import SumOverRanks
from bridge.peft.parallel.layout import Layout, layout_of, layout_of_factors
from bridge.peft.tensors import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

#: How many masks were drawn on each mesh; at every thousandth its ranks are compared.
_masks_drawn: Counter[DeviceMesh] = Counter()
_COMPARED_EVERY = 1000


def sharded_linear(
    x: DTensor,
    weight: DTensor,
    bias: DTensor | None,
    lora_a: DTensor,
    lora_b: DTensor,
    scale: float,
    dropout: float,
    position: str,
) -> DTensor:
    """`W x + b + scale · B A x` where all of it is sharded.

    Args as in `ops.dispatch.lora_linear`. The bias must not want a gradient.

    Returns:
        (..., out_features): sharded along the last dimension over a column-parallel weight, a
        partial sum over a row-parallel one, placed as x over a replicated one.
    """
    layout = layout_of(weight)
    x, a, b = _ready(x, lora_a, lora_b, layout)
    # autograd need not know of what is frozen
    with torch.set_grad_enabled(weight.requires_grad and torch.is_grad_enabled()):
        local_weight, local_bias = weight.to_local(), None if bias is None else bias.to_local()
    if layout.is_row and layout.rank > 0:
        local_bias = None  # added once, by the first rank, to the partial sums
    local = lora_linear(
        _local_input(x, layout),
        local_weight,
        local_bias,
        a.to_local(),
        b.to_local(),
        scale,
        dropout,
        position,
        _ranks(x, layout, dropout, position),
    )
    return _as_output(local, lora_b.shape[0], x, layout)


def add_sharded_branch(
    base_out: Tensor,
    x: Tensor,
    lora_a: DTensor,
    lora_b: DTensor,
    scale: float,
    dropout: float,
    position: str,
) -> Tensor:
    """`base_out + scale · B A x` where the factors are sharded, over any base.

    Args as in `ops.dispatch.lora_add`. x and `base_out` are both DTensors, or both this rank's
    part, as in inference with transformers' own tensor parallelism.

    Returns:
        (..., out_features), as `base_out`.
    """
    layout = layout_of_factors(lora_a, lora_b)
    if not is_sharded(x):
        ranks = _ranks(None, layout, dropout, position)
        factors = lora_a.to_local(), lora_b.to_local()
        return lora_add(base_out, x, *factors, scale, dropout, position, ranks)
    x, a, b = _ready(x, lora_a, lora_b, layout)  # pyright: ignore[reportArgumentType]
    out = _output_placement(x, layout)
    if base_out.placements != (out,):  # pyright: ignore[reportAttributeAccessIssue]
        base_out = base_out.redistribute(placements=[out])  # pyright: ignore
    local = lora_add(
        base_out.to_local(),  # pyright: ignore[reportAttributeAccessIssue]
        _local_input(x, layout),
        a.to_local(),
        b.to_local(),
        scale,
        dropout,
        position,
        _ranks(x, layout, dropout, position),
    )
    return _as_output(local, lora_b.shape[0], x, layout)


def _ready(
    x: DTensor, lora_a: DTensor, lora_b: DTensor, layout: Layout
) -> tuple[DTensor, DTensor, DTensor]:
    """x, A and B where the layout wants them; the usual case moves nothing."""
    wanted = _input_placement(x, layout)
    if x.placements != (wanted,):
        x = x.redistribute(placements=[wanted])
    if lora_a.placements != (layout.a,):
        lora_a = lora_a.redistribute(placements=[layout.a])
    if lora_b.placements != (layout.b,):
        lora_b = lora_b.redistribute(placements=[layout.b])
    return x, lora_a, lora_b


def _input_placement(x: DTensor, layout: Layout) -> Placement:
    from torch.distributed.tensor import Replicate, Shard

    last = x.dim() - 1
    if layout.is_row:
        return Shard(last)
    (now,) = x.placements
    if layout.is_column or now.is_partial() or now.is_shard(last):
        return Replicate()
    return now


def _output_placement(x: DTensor, layout: Layout) -> Placement:
    from torch.distributed.tensor import Partial, Shard

    if layout.is_row:
        return Partial()
    return Shard(x.dim() - 1) if layout.is_column else x.placements[0]


def _local_input(x: DTensor, layout: Layout) -> Tensor:
    from torch.distributed.tensor import Partial

    if layout.is_column:  # dx sums over the output's features, of which each rank has some
        return x.to_local(grad_placements=[Partial()])
    return x.to_local()


def _ranks(x: DTensor | None, layout: Layout, dropout: float, position: str) -> Ranks:
    """What the ranks share: which mask each draws, and which factors see a part of a gradient."""
    tokens_are_shared = x is not None and not (layout.is_row or x.placements[0].is_replicate())
    shard = _shard_of_mask(layout, dropout, position)
    total = SumOverRanks(layout.mesh)
    return Ranks(
        shard,
        sum_a=total if layout.is_column or tokens_are_shared else None,
        sum_b=total if layout.is_row or tokens_are_shared else None,
    )


def _as_output(local: Tensor, out_features: int, x: DTensor, layout: Layout) -> DTensor:
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*x.shape[:-1], out_features))
    # given, because the shards of an uneven split cannot tell
    stride = torch.empty(shape, device="meta").stride()
    placement = _output_placement(x, layout)
    return DTensor.from_local(
        local, layout.mesh, [placement], run_check=False, shape=shape, stride=stride
    )


def _shard_of_mask(layout: Layout, dropout: float, position: str) -> int:
    """Which of several masks this rank draws: one for all where the dropped tensor is replicated.

    Dropout acts on x before A, or on the output after B: what is sharded there gets a mask a rank.
    A row-parallel branch is summed after its dropout, so that the same mask drops from every part.
    """
    if dropout == 0.0:
        return 0
    _check_ranks_draw_alike(layout.mesh)
    is_sharded_there = layout.is_row if position == "pre" else layout.is_column
    return layout.rank if is_sharded_there else 0


def _check_ranks_draw_alike(mesh: DeviceMesh) -> None:
    """Raise, now and then and at the first mask, unless the default generators of a mesh agree."""
    if torch.compiler.is_compiling():
        return
    _masks_drawn[mesh] += 1
    if _masks_drawn[mesh] % _COMPARED_EVERY != 1:
        return
    state = torch.get_rng_state().to(torch.int64)
    places = torch.arange(1, state.numel() + 1)
    mine = (state * places).sum().reshape(1).to(mesh.device_type)
    all_states = [torch.empty_like(mine) for _ in range(mesh.size())]
    torch.distributed.all_gather(all_states, mine, group=mesh.get_group())
    if any(not torch.equal(other, mine) for other in all_states):
        raise AdapterError(
            "the ranks of a tensor-parallel group draw different random numbers, so their dropout "
            "masks would disagree where activations are replicated; call torch.manual_seed(s) with "
            "the same s on all of them"
        )
