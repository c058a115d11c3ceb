"""FSDP2: A and B under the management of the `fully_shard` that manages their base.

Adapted first and sharded later, A and B are parameters of the model as all others are. Added to a
model that is sharded already, they join the group of parameters of the nearest `fully_shard` at or
above their linear: gathered, reduced and offloaded with the base's weights, under its policies, in
the collectives that these need anyway, as if they had been there from the start.

torch has no public way to add a parameter to such a group, so `join` reaches into `_fully_shard`,
here and nowhere else, and refuses a torch in which that looks different.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft.errors import AdapterError
from bridge.peft.tensors import is_sharded

#: A module and the name of one of its own parameters.
Place = tuple[nn.Module, str]
#: What torch's `FSDPParam` is made of.
_ARGUMENTS = (
    *("self", "param", "module_info", "mesh_info", "post_forward_mesh_info", "device"),
    *("shard_placement_fn", "mp_policy", "offload_policy"),
)


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules of a model that `fully_shard` was called on.

    Args:
        model: Any model.
    """
    # not imported: whoever has sharded a model has imported it, and nobody else should pay for it
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def reshard(model: nn.Module) -> None:
    """Put this rank's shards, where FSDP2 has left whole parameters, back into the modules.

    After a forward a module may hold the gathered copies, in the dtype of computation; what is
    written into those is lost. To read or write parameters, call this first.

    Args:
        model: Any model; one that is not sharded is left alone.
    """
    for module in sharded_modules(model):
        module.reshard()


def is_managed(module: nn.Module) -> bool:
    """Whether `fully_shard` manages the parameters of a module's own.

    Args:
        module: Any module.
    """
    return getattr(module, "_is_fsdp_managed_module", False)


def is_data_parallel(module: nn.Module) -> bool:
    """Whether the weight of a linear is sharded by FSDP2, and by nothing else.

    Args:
        module: Any module.
    """
    weight: Any = getattr(module, "weight", None)
    if not (is_sharded(weight) and is_managed(module)):
        return False
    *replicated, last = weight.placements  # of hybrid sharding: Replicate(), Shard(…)
    return last.is_shard() and all(p.is_replicate() for p in replicated)


def check_can_join(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Raise unless FSDP2 could manage new parameters of some modules; touches nothing.

    Args:
        model: The model, sharded or not.
        modules: Modules of it.

    Raises:
        AdapterError: This version of torch is not known to work so, or manages nothing there, or
            the `fully_shard` that manages them is above the model.
    """
    owners = _owners(model)
    for module in modules:
        if (owner := owners[module]) is not None:
            _group(owner)
        elif is_managed(module):
            raise AdapterError(
                f"fully_shard was called on a module above the {type(model).__name__} that is to "
                "be adapted, which has to take up A and B; pass the whole model"
            )


def join(model: nn.Module, places: Sequence[Place]) -> None:
    """Let FSDP2 manage new parameters of a sharded model as it manages those around them, in place.

    Every rank must call, with the same parameters of the same values. Parameters that have been
    replaced since the model's first forward are taken up as well.

    Args:
        model: The model; nothing happens if no `fully_shard` was called on it.
        places: Where the new parameters are; whole, on every rank.
    """
    owners = _owners(model)
    for module, name in places:
        if (owner := owners[module]) is not None:
            _add(_group(owner), module, name)
    for sharded in sharded_modules(model):
        state = sharded._get_fsdp_state()
        if state._is_root is not None:  # it has run before
            for group in _groups(state):
                _take_up(group)


def _owners(model: nn.Module) -> dict[nn.Module, Any]:
    """For each module the nearest one at or above it that `fully_shard` was called on, or None."""
    sharded = set(sharded_modules(model))
    owners: dict[nn.Module, Any] = {}
    waiting: list[tuple[nn.Module, nn.Module | None]] = [(model, None)]
    while waiting:
        module, owner = waiting.pop()
        if module not in owners:
            owners[module] = module if module in sharded else owner
            waiting += [(child, owners[module]) for child in module.children()]
    return owners


def _group(owner: Any) -> Any:
    """The group of parameters of a sharded module."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

        arguments = tuple(inspect.signature(FSDPParam.__init__).parameters)
        groups = _groups(owner._get_fsdp_state())
    except (ImportError, AttributeError):
        arguments, groups = (), []
    if arguments != _ARGUMENTS:
        raise AdapterError(
            f"torch {torch.__version__} keeps the parameters of fully_shard in a way that is not "
            "known here; adapt the model first, then call fully_shard"
        )
    if not groups:
        raise AdapterError(
            f"fully_shard manages no parameter of a {type(owner).__name__} that holds linears to "
            "adapt, so that nothing says how A and B are sharded; adapt the model first, then call "
            "fully_shard"
        )
    return groups[0]


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)  # one a mesh, from torch 2.12 on
    if groups is None:
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return groups


def _add(group: Any, module: nn.Module, name: str) -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

    parameter: Tensor = module._parameters[name]  # pyright: ignore[reportAssignmentType]
    if not parameter.is_meta:
        # beside a base that is offloaded, they were made on the CPU
        parameter.data = parameter.data.to(group.device)
    group.fsdp_params.append(
        FSDPParam(
            parameter,  # pyright: ignore[reportArgumentType]
            ParamModuleInfo(module, name),
            group.mesh_info,
            group.post_forward_mesh_info,
            group.device,
            None,
            group.mp_policy,
            group.offload_policy,
        )
    )
    module._is_fsdp_managed_module = True  # pyright: ignore[reportArgumentType]
    module._fsdp_use_orig_params = True  # pyright: ignore[reportArgumentType]


def _take_up(group: Any) -> None:
    """Do again, for the parameters that a group has now, what its first forward did."""
    for handles in (
        group._module_to_pre_save_state_dict_hook_handle,
        group._module_to_pre_load_state_dict_hook_handle,
    ):
        for handle in handles.values():
            handle.remove()
        handles.clear()
    group._reset_sharded_params = False
    group.lazy_init()
