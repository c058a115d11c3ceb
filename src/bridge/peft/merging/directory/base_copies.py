"""The copies of base weights that PEFT saves beside the update of an embedding or a head."""

from __future__ import annotations

import dataclasses

import torch
from safetensors import safe_open
from torch import Tensor

from bridge.peft.formats.files.safetensors_file import FLOATING
from bridge.peft.formats.model_directory import Checkpoint
from bridge.peft.formats.peft import AdapterFile
from bridge.peft.merging.rounding import row_blocks


def without_base_copies(checkpoint: Checkpoint, adapter: AdapterFile) -> AdapterFile:
    """The adapter without the base weights that the checkpoint holds as well.

    What differs from the checkpoint (the embedding of a resized vocabulary) stays.

    Args:
        checkpoint: The base model.
        adapter: The adapter.
    """
    same = {n for n in adapter.base_weights if _is_held(checkpoint, n, adapter.whole[n])}
    whole = {name: tensor for name, tensor in adapter.whole.items() if name not in same}
    return dataclasses.replace(adapter, whole=whole)


def _is_held(checkpoint: Checkpoint, name: str, tensor: Tensor) -> bool:
    """Whether the checkpoint holds a tensor with these values under this name or the end of it."""
    for shard_name, shard in checkpoint.shards.items():
        for entry in shard.entries:
            if entry.dtype in FLOATING and f".{name}".endswith(f".{entry.name}"):
                if entry.shape != tuple(tensor.shape):
                    return False
                # maps the file, so that only the rows at hand are in memory
                with safe_open(checkpoint.directory / shard_name, "pt") as file:
                    stored = file.get_slice(entry.name)
                    return all(
                        _are_same(stored[rows.start : rows.stop], tensor[rows])
                        for rows in row_blocks(len(tensor), tensor[0].numel())
                    )
    return False


def _are_same(stored: Tensor, saved: Tensor) -> bool:
    """Whether two tensors are the same, one perhaps rounded to the other's dtype."""
    return torch.equal(stored.to(saved.dtype), saved) or torch.equal(stored, saved.to(stored.dtype))
