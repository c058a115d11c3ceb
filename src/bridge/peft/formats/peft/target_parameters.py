"""Adapters on parameters as PEFT files hold them: `target_parameters`.

PEFT wraps the module that has the parameter, once for each parameter of it, so the keys name
the module and how deep a wrapper lies, not the parameter. The first parameter of the module is
wrapped first and lies deepest:

    ….experts.base_layer.lora_A.weight   gate_up_proj: (experts · r, in), expert after expert
    ….experts.base_layer.lora_B.weight                 (out, r · experts), experts running fastest
    ….experts.lora_A.weight              down_proj, likewise
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.peft.config import PeftConfig
from bridge.peft.formats.peft.names import ends_in

Pairs = Mapping[str, tuple[Tensor, Tensor]]
_LEVEL = ".base_layer"
#: Parameters that modules register after the others; all of transformers' experts do so.
_LAST = ("down_proj", "w2", "output_linear")


def unwrapped(
    pairs: Pairs, config: PeftConfig, extra: Mapping[str, Any]
) -> tuple[dict[str, tuple[Tensor, Tensor]], set[str]]:
    """A and B by module or parameter, out of A and B by wrapper.

    Args:
        pairs: By the names in the file.
        config: The file's config.
        extra: Our own file beside it, which names the parameters of each module in order.

    Returns:
        By fully qualified name; those of parameters as stacks, A (experts, r, in) and B
        (experts, out, r), or as they are where there is one matrix; and the parameters' names.

    Raises:
        AdapterFileError: It cannot be told which parameters are meant, or a shape is wrong.
    """
    modules: dict[str, tuple[Tensor, Tensor]] = {}
    levels: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for name, pair in pairs.items():
        module, depth = name, 0
        while module.endswith(_LEVEL):
            module, depth = module.removesuffix(_LEVEL), depth + 1
        if config.target_parameters and (depth or _is_holder(module, config)):
            levels.setdefault(module, {})[depth] = pair
        else:
            modules[name] = pair
    parameters: dict[str, tuple[Tensor, Tensor]] = {}
    for module, found in levels.items():
        names = extra.get("parameters", {}).get(module) or _names_of(module, config, len(found))
        if len(names) != len(found) or found.keys() != set(range(len(found))):
            raise AdapterFileError(
                f"{module} has {len(found)} adapters on parameters in the file, and "
                f"target_parameters names {sorted(names) or 'none'} there; save the adapter again"
            )
        for depth, name in zip(sorted(found, reverse=True), names, strict=True):
            fqn = f"{module}.{name}"
            parameters[fqn] = _stacked(fqn, *found[depth], config)
    return modules | parameters, {*parameters}


def wrapped(fqns: Iterable[str]) -> dict[str, str]:
    """The name in the file of each parameter.

    Args:
        fqns: Parameters by fully qualified name, those of a module in the order in which it has
            them.
    """
    by_module: dict[str, list[str]] = {}
    for fqn in fqns:
        by_module.setdefault(fqn.rpartition(".")[0], []).append(fqn)
    return {
        fqn: module + _LEVEL * (len(names) - 1 - i)
        for module, names in by_module.items()
        for i, fqn in enumerate(names)
    }


def flattened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a parameter as matrices, in PEFT's order.

    Args:
        a: (experts, r, in), or one matrix.
        b: (experts, out, r), or one matrix.
    """
    if a.dim() == 2:
        return a, b
    return a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1)


def choose_entries(adapted: Collection[str], others: Collection[str]) -> list[str]:
    """The shortest `target_parameters` that mean exactly the adapted parameters.

    Args:
        adapted: Parameters by fully qualified name.
        others: The model's other parameters.
    """
    for parts in (1, 2, 3):
        entries = {".".join(fqn.split(".")[-parts:]) for fqn in adapted}
        # of one part only PEFT could take them for a module's
        if parts > 1 and not any(ends_in(name, entries) for name in others):
            return sorted(entries)
    return sorted(adapted)


def _is_holder(module: str, config: PeftConfig) -> bool:
    """Whether the wrapper of a name is one around parameters, not an adapted linear."""
    if config.target_modules is not None and config.is_target(module):
        return False
    owners = [entry.rpartition(".")[0] for entry in config.target_parameters]
    return any(not owner or ends_in(module, [owner]) for owner in owners)


def _names_of(module: str, config: PeftConfig, count: int) -> list[str]:
    """The targeted parameters of a module, in the order that transformers' experts have."""
    split = [entry.rpartition(".") for entry in config.target_parameters]
    own = {name for owner, _, name in split if owner and ends_in(module, [owner])}
    names = own if len(own) == count else own | {name for owner, _, name in split if not owner}
    return sorted(names, key=lambda name: (name in _LAST, name))


def _stacked(fqn: str, a: Tensor, b: Tensor, config: PeftConfig) -> tuple[Tensor, Tensor]:
    rank = config.rank_pattern.value(fqn, config.r)
    if a.shape[0] % rank or a.shape[0] != b.shape[1]:
        raise AdapterFileError(
            f"{fqn}: the config gives it rank {rank}, the file A {tuple(a.shape)} and B "
            f"{tuple(b.shape)}; save the adapter again"
        )
    experts = a.shape[0] // rank
    if experts == 1:
        return a, b
    return a.view(experts, rank, -1), b.view(-1, rank, experts).permute(2, 0, 1).contiguous()
