"""Check that all processes of a job train the same thing, before they train it.

A rank with another checkpoint, another rank of the adapter or another version of the library does
not crash: it averages its gradients into everybody's. One small collective tells.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.errors import AdapterError
from bridge.peft.model.walk import adapted_modules, clean_fqn, unwrap
from bridge.peft.tensors import is_plain
from bridge.peft.version import __version__

#: Of a frozen weight, this many values, spread over it, are compared; of a trained one all.
SAMPLED_VALUES = 1024

#: What is compared, in words; the values of each thing in it, by name.
Facts = Mapping[str, Mapping[str, str]]
_NO_FACTS: Mapping[str, object] = MappingProxyType({})


def check_ranks_agree(
    model: nn.Module, facts: Mapping[str, object] = _NO_FACTS, group: Any = None
) -> None:
    """Raise on every rank unless all of them have the same model, adapter and versions.

    Compared are the versions of torch and of this library; each parameter's name, shape, dtype and
    whether it is trained; the options of each branch; a sample of the frozen weights and all values
    of the trained ones, where they are whole (a sharded parameter is compared by shape only).

    Args:
        model: The adapted model, best before it is sharded or wrapped.
        facts: What else must be the same, by name: hyperparameters, a digest of the data.
        group: A process group; None is all processes. Without a process group nothing is done.

    Raises:
        AdapterError: What differs, and on which ranks.
    """
    if dist.is_available() and dist.is_initialized():
        check_same({**_given(facts), **_facts_of(unwrap(model))}, group)


def check_same_facts(facts: Mapping[str, object], group: Any = None) -> None:
    """`check_ranks_agree` before there is a model: the versions and `facts` alone."""
    if dist.is_available() and dist.is_initialized():
        check_same(_given(facts), group)


def check_same(facts: Facts, group: Any = None) -> None:
    """Compare digests first, and details only of what differs.

    Args:
        facts: What must be the same on all ranks.
        group: A process group; None is all processes.

    Raises:
        AdapterError: On every rank, if anything differs on any.
    """
    digests = _gathered({name: _digest(values) for name, values in facts.items()}, group)
    names = dict.fromkeys(name for rank in digests for name in rank)
    differing = [name for name in names if len({rank.get(name) for rank in digests}) > 1]
    if not differing:
        return
    details = _gathered({name: dict(facts.get(name, {})) for name in differing}, group)
    told = [f"{name} ({_difference([rank[name] for rank in details])})" for name in differing]
    raise AdapterError(
        f"the ranks of this job do not agree on {'; nor on '.join(told)}; start all of them with "
        "the same software, files and options"
    )


def _given(facts: Mapping[str, object]) -> dict[str, dict[str, str]]:
    versions = {"bridge-peft": __version__, "torch": torch.__version__}
    return {
        "the version of": versions,
        **{name: _flat(value) for name, value in facts.items()},
    }


def _flat(value: object) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {str(key): str(item) for key, item in value.items()}
    return {"": str(value)}


def _facts_of(model: nn.Module) -> dict[str, dict[str, str]]:
    parameters = {clean_fqn(name): p for name, p in model.named_parameters()}
    adapted = {fqn: m for fqn, m in adapted_modules(model) if isinstance(m, LoRAMixin)}
    whole = {name: p for name, p in parameters.items() if is_plain(p) and not p.is_meta}
    return {
        "the parameters": {
            name: f"{tuple(p.shape)} {p.dtype} {'trained' if p.requires_grad else 'frozen'}"
            for name, p in parameters.items()
        },
        "the options of": {fqn: str(module.branch_options) for fqn, module in adapted.items()},
        "the values of": {name: _value_digest(p) for name, p in whole.items()},
    }


def _gathered(mine: dict[str, Any], group: Any) -> list[dict[str, Any]]:
    everybody: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everybody, mine, group)
    return everybody


def _difference(ranks: Sequence[Mapping[str, str]]) -> str:
    """The first thing that differs, as each rank has it, and how many more there are."""
    names = dict.fromkeys(name for rank in ranks for name in rank)
    differing = [name for name in names if len({rank.get(name) for rank in ranks}) > 1]
    first = differing[0]
    holders: dict[str, list[str]] = {}
    for index, rank in enumerate(ranks):
        holders.setdefault(rank.get(first, "not there"), []).append(str(index))
    told = ", ".join(f"{value} on rank {' '.join(who)}" for value, who in holders.items())
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"{first}{': ' if first else ''}{told}{more}"


def _digest(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(values)).encode()).hexdigest()


def _value_digest(parameter: Tensor) -> str:
    values = parameter.detach().reshape(-1)
    if not parameter.requires_grad and values.numel() > SAMPLED_VALUES:
        values = values[:: values.numel() // SAMPLED_VALUES]
    values = values.cpu().contiguous()
    return hashlib.sha256(ctypes.string_at(values.data_ptr(), values.nbytes)).hexdigest()[:16]
