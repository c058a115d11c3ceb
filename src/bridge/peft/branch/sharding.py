"""A linear whose A and B follow its weight when tensor parallelism shards it."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from bridge.peft.branch.matrix import LoRAMatrix
from bridge.peft.errors import UnsupportedLinearError
from bridge.peft.parallel.fsdp import is_data_parallel, is_managed
from bridge.peft.parallel.layout import layout_of
from bridge.peft.tensors import is_sharded

_CHILDREN = ("dropout", "lora_a", "lora_b", "lora_start", "lora_magnitude")
#: Why DoRA's layers are not shared among ranks by tensor parallelism.
NOT_SHARDED = (
    "DoRA needs the norms of the weight's whole rows, which tensor parallelism splits; shard the "
    "adapted model with FSDP2 (fully_shard), or adapt it without use_dora"
)
_APPLIED = "_distribute_module_applied"
_ASIDE = "branch_aside"


class FollowsSharding(nn.Module):
    """A module whose A and B are placed where the layout of its weight wants them.

    `torch.distributed.tensor.parallel`'s styles shard every parameter they find below a linear,
    and know nothing of A and B. `distribute_module`, which all of them call, first asks whether
    `_distribute_module_applied` is set and sets it when it is done; in between they see a linear
    without children.
    """

    lora_a: LoRAMatrix
    lora_b: LoRAMatrix

    @property
    def _distribute_module_applied(self) -> bool:
        applied = is_distributed(self)
        # others look at every attribute (torch.jit.trace, inspect), and must not change the module
        if not applied and sys._getframe(1).f_code.co_name == "distribute_module":
            aside = {name: self._modules.pop(name) for name in _CHILDREN if name in self._modules}
            vars(self)[_ASIDE] = aside
        return applied

    @_distribute_module_applied.setter
    def _distribute_module_applied(self, value: bool) -> None:
        vars(self)[_APPLIED] = value
        self._modules.update(vars(self).pop(_ASIDE, {}))
        place_branch(self, alike=False)


def is_distributed(module: nn.Module) -> bool:
    """Whether `torch.distributed.tensor.distribute_module` was called on a module.

    Args:
        module: Any module.
    """
    return vars(module).get(_APPLIED, False)


def place_branch(module: Any, *, alike: bool) -> None:
    """Place A and B as the layout of their base's weight says, in place.

    Nothing happens if the weight is whole, or FSDP2's alone.

    Args:
        module: A module with `weight`, `lora_a` and `lora_b`.
        alike: Whether all ranks hold the same A and B; the first one's count otherwise.
    """
    weight = module._parameters.get("weight")
    if weight is None or not is_sharded(weight) or is_data_parallel(module):
        return
    if "lora_magnitude" in module._modules:
        raise UnsupportedLinearError(NOT_SHARDED)
    if "lora_start" in module._modules:
        raise UnsupportedLinearError(
            "a start out of the base's weight (PiSSA, OLoRA) is not shared among ranks by tensor "
            "parallelism; shard the adapted model with FSDP2 (fully_shard)"
        )
    layout = layout_of(weight, below_fsdp=is_managed(module))
    module.lora_a.place(layout.mesh, layout.a, alike=alike)
    module.lora_b.place(layout.mesh, layout.b, alike=alike)
