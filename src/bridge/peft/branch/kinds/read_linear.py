"""A linear whose weight other code reads past its forward: it reads as W + s · B A."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge.peft.branch.kinds.linear import LinearAdapter
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.ops.dispatch import ComputePath

#: Why a layer is of this kind.
READ = "other code reads its weight, which reads as W + s·B·A"
#: How many readers run in this thread, one inside another.
_running = threading.local()


@contextmanager
def reading() -> Iterator[None]:
    """Within the context a reader runs in this thread."""
    _running.depth = getattr(_running, "depth", 0) + 1
    try:
        yield
    finally:
        _running.depth -= 1


def hook_reader(module: nn.Module) -> None:
    """Tell the read linears, in place, while a module runs that reads their weights.

    Args:
        module: Its forward, or what it calls, takes `layer.weight` of some of them.
    """
    if _begin not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_begin)
        module.register_forward_hook(_end, always_call=True)


def _begin(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        _running.depth = getattr(_running, "depth", 0) + 1


def _end(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        _running.depth = max(0, getattr(_running, "depth", 0) - 1)


def is_being_read() -> bool:
    """Whether a reader runs, here or in backward, which may run a part of its forward again."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
        return True
    return getattr(_running, "depth", 0) > 0


def read_in_full(layer: LoRAMixin, base: Tensor) -> Tensor:
    """`W + s · B A`, (out_features, in_features), in the dtype of W; its rows rescaled with DoRA.

    Args:
        layer: The branch, which is active.
        base: W.
    """
    if layer.has_hooks_on_a_or_b():  # which bring the weights of A and B when they are called
        a, b = layer.called_a_and_b()
    else:
        a, b = layer.factors()
    total = base + layer.scale * (b @ a)
    if layer.magnitude is not None:
        norm = layer.magnitude.norm(layer, a, b, layer.scale)
        total = layer.magnitude(total.t(), norm, None).t()
    return total.to(base.dtype)


class ReadLinearAdapter(LinearAdapter):
    """`LinearAdapter` for code that takes `layer.weight` into a product of its own.

    Called, it computes as a `LinearAdapter` does. Read while one of its readers runs,
    `layer.weight` is the dense `W + s · B A`, (out_features, in_features), its rows rescaled with
    DoRA, so that the branch takes part and A and B get their gradients; dropout does not act there.
    To everybody else (sharding, quantising, offloading, whoever writes it) it is W, the parameter.
    The checkpoint's names stay.
    """

    when_read = True

    @classmethod
    def takes(cls, base_type: type[nn.Module]) -> bool:
        """No class as such: the recipe chooses this kind for the linears of a model that are read.

        Args:
            base_type: The class of a module before adaptation.
        """
        return False

    def lora_path(self) -> ComputePath:
        """As the mixin's, and that other code reads the weight."""
        return ComputePath("read", READ)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """W; in a reader's forward `W + s · B A`, in the dtype of W, unless off or merged."""
        base = self.base_weight
        if not is_being_read():
            return base
        self.note_call()
        if self.merged or not self.adapter_enabled:
            return base
        if base.is_meta:  # offloaded, or not loaded yet
            return base
        return read_in_full(self, base)

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # not `super()`'s, which would read the weight with the branch in it
        return F.linear(x, self.base_weight, self.bias)
