"""Spread a model over the processes of a run: `--parallel`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from bridge.peft.finetune.options import Parallel
from bridge.peft.finetune.ranks import process_count


def shard(model: nn.Module, parallel: Parallel) -> bool:
    """Shard an adapted model over all processes where `parallel` says so, in place.

    A tensor parallel one was loaded in shards.

    Returns:
        Whether the model is sharded now; if not, `DistributedDataParallel` is left to the trainer.
    """
    if parallel != "fsdp" or process_count() == 1:
        return parallel == "tp" and process_count() > 1
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (process_count(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return True


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model, each to be gathered at a time: what its outermost lists hold."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)
