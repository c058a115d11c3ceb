"""Count what a step really communicates and really keeps."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bridge.peft.branch.matrix import LoRAMatrix

#: By the names of torch's operators: the collective, and whether its input is the whole tensor.
_COLLECTIVES = {
    "_allgather_base_": ("all-gather", False),
    "allgather_into_tensor_coalesced_": ("all-gather", False),
    "all_gather_into_tensor": ("all-gather", False),
    "_reduce_scatter_base_": ("reduce-scatter", True),
    "reduce_scatter_tensor": ("reduce-scatter", True),
    "allreduce_": ("all-reduce", True),
    "all_reduce": ("all-reduce", True),
    "all_reduce_": ("all-reduce", True),
}


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages of tensors, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


class Collectives(TorchDispatchMode):
    """Calls and bytes of whole tensors by (collective, ranks), and the most held in buffers.

    `calls` and `bytes` are of what torch's own operators are given; `peak_buffers` is of the
    tensors into which was gathered, and out of which is reduced and scattered, while they live.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()
        self.bytes: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace not in ("c10d", "_c10d_functional"):
            return out
        name = func.__name__.partition(".")[0]
        if name not in _COLLECTIVES:
            assert name in ("wait_tensor", "broadcast_", "barrier"), f"{func} is not counted"
            return out
        kind, input_is_whole = _COLLECTIVES[name]
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        whole = max(tensors, key=size_of)
        part = min(tensors, key=size_of)
        del input_is_whole
        key = kind, size_of(whole) // max(1, size_of(part))
        self.calls[key] += 1
        self.bytes[key] += size_of(whole)
        return out
