"""A cheap fingerprint of the base weights that an adapter was trained on.

For each adapted module: shape, dtype, and a hash of the first values, rounded to bfloat16 so that
the same checkpoint loaded in another floating dtype is the same base. A quantised weight's packed
bytes are hashed as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.registry import kind_of
from bridge.peft.dtypes import dtype_name
from bridge.peft.errors import AdapterFileError
from bridge.peft.parallel.parts import first_rows
from bridge.peft.parallel.shard import Shard
from bridge.peft.tensors import is_plain, is_sharded

#: Values of each weight that are hashed.
HASHED_VALUES = 2048
_FIELDS = ("shape", "dtype", "hash")


def fingerprint(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """The fingerprint of some linears of a model.

    Args:
        modules: Linears by fully qualified name, adapted or not. One whose base weight is not at
            hand (on `meta`, a quantised tensor subclass, or merged with the base given up) is left
            out. With sharded ones every rank must call.

    Returns:
        `{"model.layers.0.….q_proj": {"shape": [4096, 4096], "dtype": "bfloat16", "hash": "…"}}`.
    """
    found: dict[str, dict[str, Any]] = {}
    for fqn, module in modules.items():
        if (weight := _base_weight(module)) is not None:
            shard = _shard(module)
            found[fqn] = {
                "shape": list(shard.shape(weight.shape) if shard else weight.shape),
                "dtype": dtype_name(weight.dtype),
                "hash": _hash(weight, shard),
            }
    return found


def differences(
    stored: Mapping[str, Mapping[str, Any]], modules: Mapping[str, nn.Module]
) -> list[str]:
    """What differs between the base that a file was made on and this one; empty if nothing does.

    Args:
        stored: A fingerprint out of a file.
        modules: The linears of the model at hand, by name.
    """
    here = fingerprint({fqn: modules[fqn] for fqn in stored if fqn in modules})
    found = []
    for fqn, mine in here.items():
        theirs = stored[fqn]
        comparable = mine["dtype"] == theirs["dtype"] or (
            _is_floating(mine["dtype"]) and _is_floating(theirs["dtype"])
        )
        if not comparable:
            found.append(f"{fqn} is {mine['dtype']} here and was {theirs['dtype']} there")
        elif mine["shape"] != theirs["shape"]:
            found.append(f"{fqn} is {mine['shape']} here and was {theirs['shape']} there")
        elif mine["hash"] != theirs["hash"]:
            found.append(f"{fqn} has other values here")
    return found


def check_stored(content: Any) -> None:
    """Raise `AdapterFileError` unless a fingerprint out of a file has the form of one.

    Args:
        content: The decoded field.
    """
    entries = content.values() if isinstance(content, dict) else [None]
    for entry in entries:
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(name), list if name == "shape" else str) for name in _FIELDS
        ):
            raise AdapterFileError(
                "bridge_adapter.json: base must hold shape, dtype and hash of each module, got "
                f"{entry if isinstance(content, dict) else content!r:.80}"
            )


def _base_weight(module: nn.Module) -> Tensor | None:
    """The weight before any merge, if it is whole and at hand."""
    weight = getattr(module, "weight", None)
    if isinstance(module, LoRAMixin):
        weight = module.unmerged_weight if module.merged else module.base_weight
    if not isinstance(weight, Tensor) or weight.is_meta:
        return None
    data = weight.detach()
    # a subclass (torchao's, fp8) has no bytes of its own to look at
    return data if is_plain(data) or _is_sharded_plainly(data) else None


def _is_sharded_plainly(weight: Tensor) -> bool:
    return is_sharded(weight) and is_plain(weight.to_local())  # pyright: ignore


def _shard(module: nn.Module) -> Shard | None:
    """Which part of the weight a module of Megatron's holds; None for other modules."""
    kind = kind_of(type(module))
    return None if kind is None else kind.weight_shard(module)


def _hash(weight: Tensor, shard: Shard | None) -> str:
    # the first rows that hold enough values, so that nothing large is copied
    width = max(weight.shape[1:].numel(), 1) if shard is None else shard.shape(weight.shape)[1]
    count = -(-HASHED_VALUES // max(width, 1))
    if shard is not None:
        rows = shard.first_rows(weight, count)
    else:
        rows = first_rows(weight, count) if is_sharded(weight) else weight[:count]
    values = rows.reshape(-1)[:HASHED_VALUES].to("cpu")
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    data = bytes(values.contiguous().view(torch.uint8).tolist())
    return hashlib.sha256(data).hexdigest()[:16]


def _is_floating(dtype: str) -> bool:
    return "float" in dtype
