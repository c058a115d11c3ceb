"""Whether a checkpoint is the base that an adapter was made on, by the adapter's fingerprint."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from bridge.peft.formats.peft import AdapterFile
from bridge.peft.formats.peft.fingerprint import differences
from bridge.peft.merging.directory.checkpoint import FLOATING, Checkpoint
from bridge.peft.merging.directory.edits import Edits


def other_bases(
    checkpoint: Checkpoint, edits: Edits, adapters: Sequence[tuple[AdapterFile, float]]
) -> Iterator[str]:
    """Say for each adapter that was made on another base what differs.

    Args:
        checkpoint: The base model.
        edits: What the adapters change in it.
        adapters: Each with its weight in the sum.
    """
    modules = _modules(checkpoint, edits)
    for adapter, _ in adapters:
        found = differences(adapter.extra.get("base", {}), modules)
        if found:
            more = f" ({len(found)} modules differ)" if len(found) > 1 else ""
            yield (
                f"the base model is not the one that the adapter was made on: {found[0]}{more}; "
                "results may differ from training"
            )


def _modules(checkpoint: Checkpoint, edits: Edits) -> dict[str, nn.Module]:
    """Modules whose weights look into the files; only what is hashed is ever read."""
    modules: dict[str, nn.Module] = {}
    for shard in checkpoint.shards.values():
        wanted = [e for e in shard.entries if e.name in edits.by_key and e.size]
        if not wanted:
            continue
        mapped = _map(shard.path)
        for entry in wanted:
            edit = edits.by_key[entry.name]
            dtype = FLOATING[entry.dtype]
            count, offset = entry.size // dtype.itemsize, shard.data_start + entry.start
            values = torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset)
            module = nn.Module()
            module.weight = nn.Parameter(values.view(entry.shape), requires_grad=False)
            modules[edit.fqn] = module
    return modules


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
