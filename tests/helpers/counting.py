"""Count what a step really communicates, gathers and keeps for backward."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bridge.peft.branch.functions.dora import LoRAMagnitude
from bridge.peft.branch.matrix import LoRAMatrix

#: The collectives by the names of torch's operators.
_COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
}
#: Operators that move nothing, and DDP's copy of the first rank's buffers.
_OTHERS = ("wait_tensor", "_wrap_tensor_autograd", "broadcast_")


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "to_local", lambda: tensor)().detach()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each once."""
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


class Collectives(TorchDispatchMode):
    """Calls and bytes of whole tensors, by (collective, the kind of its ranks).

    `peak` is the most bytes that FSDP2 held at once in gathered weights, in the buffers into which
    it gathers, in gradients before they are reduced, and in the buffers out of which it reduces.

    Args:
        kinds: What to call a process group, by its name.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        super().__init__()
        self.kinds = kinds
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.peak = 0
        self._gathered: dict[int, torch.UntypedStorage] = {}  # freed by being resized to nothing
        self._buffers: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.__name__.partition(".")[0]
        tensors = [t for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
        if func.namespace in ("c10d", "_c10d_functional") and name not in _OTHERS:
            key = _COLLECTIVES[name], self.kinds[_group_name(args)]
            self.calls[key] += 1
            self.bytes[key] += max(map(size_of, tensors))
            if key[1] == "fsdp":
                self._buffers.append(weakref.ref(max(tensors, key=size_of)))
                self._look()
        elif func.namespace == "fsdp" and name == "split_with_sizes_copy":
            storages = [t.untyped_storage() for t in kwargs["out"]]
            self._gathered |= {s._cdata: s for s in storages}
            self._look()
        elif func.namespace == "fsdp" and name == "chunk_cat":
            self._look(kwargs["out"], *tree_leaves(args[0]))
        return out

    def _look(self, *more: Tensor) -> None:
        buffers = [t for ref in self._buffers if (t := ref()) is not None]
        gathered = sum(storage.nbytes() for storage in self._gathered.values())
        self.peak = max(self.peak, gathered + storage_bytes([*buffers, *more]))


def _group_name(args: tuple) -> str:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument).group_name
            except RuntimeError:  # the operator, sum or average
                continue
    names = [a for a in args if isinstance(a, str)]
    return _resolve_process_group(names[-1]).group_name


@contextmanager
def saved_in(model: nn.Module, inside: str) -> Iterator[dict[str, int]]:
    """Bytes that autograd saves in modules whose names begin so, each storage once.

    Yields a dict that is filled at the end: `"branches"`, what is saved in adapted linears and
    nowhere else, and `"base"`, the rest. What belongs to the model is left out.
    """
    own = {local(t).untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    by_base: dict[int, Tensor] = {}
    by_branch: dict[int, Tensor] = {}
    stack: list[nn.Module] = []

    def pack(tensor: Tensor) -> Tensor:
        key = local(tensor).untyped_storage()._cdata
        if stack and key not in own:
            found = by_branch if hasattr(stack[-1], "lora_a") else by_base
            found[key] = local(tensor)  # kept, so that no other tensor takes its place
        return tensor

    handles = []
    for name, module in model.named_modules():
        if name.startswith(inside) and not isinstance(module, LoRAMatrix | LoRAMagnitude):
            handles += [
                module.register_forward_pre_hook(lambda m, _: stack.append(m)),
                module.register_forward_hook(lambda *_: stack.pop() and None),
            ]
    found: dict[str, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    for handle in handles:
        handle.remove()
    alone = [t for key, t in by_branch.items() if key not in by_base]
    found |= {"branches": storage_bytes(alone), "base": storage_bytes(by_base.values())}
