"""A cheap fingerprint of the base weights that an adapter was trained on.

For each adapted module: shape, dtype, and a hash of the first values, rounded to bfloat16 so that
the same checkpoint loaded in another floating dtype is the same base. Of a quantised weight the
packed values are hashed as they are, its scales too, and how it is quantised is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bridge.peft.branch.dense import SetAside
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.quantised.format import Format
from bridge.peft.branch.quantised.table import FORMATS, format_of
from bridge.peft.branch.registry import kind_of
from bridge.peft.dtypes import FLOATING, dtype_name
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
            hand (on `meta`, quantised and sharded in another storage than bytes, or merged with the
            base given up) is left out. With sharded ones every rank must call.

    Returns:
        `{"model.layers.0.….q_proj": {"shape": [4096, 4096], "dtype": "bfloat16", "hash": "…"}}`; of
        a quantised weight also `"quantised"`, what it is called, and `"scales"`, their hash.
    """
    found: dict[str, dict[str, Any]] = {}
    for fqn, module in modules.items():
        base = base_part(module)
        if (form := format_of(base)) is not None:
            found[fqn] = packed_fingerprint(form, form.packed(base), form.label(base))
        elif (weight := _own_weight(base)) is not None:
            found[fqn] = _entry(weight, _shard(module))
    return {fqn: entry for fqn, entry in found.items() if entry}


def packed_fingerprint(form: Format, packed: Any, label: str) -> dict[str, Any]:
    """The fingerprint of one quantised weight; empty on `meta`.

    Args:
        form: Its format.
        packed: What it holds.
        label: What it is called.
    """
    values, *scales = form.tensors(packed)
    if values.is_meta:
        return {}
    hashes = "".join(map(_hash, scales))
    told = {"quantised": label, "scales": hashlib.sha256(hashes.encode()).hexdigest()[:16]}
    return _entry(values) | told


def _entry(weight: Tensor, shard: Shard | None = None) -> dict[str, Any]:
    return {
        "shape": list(shard.shape(weight.shape) if shard else weight.shape),
        "dtype": dtype_name(weight.dtype),
        "hash": _hash(weight, shard),
    }


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
        comparable = mine["dtype"] == theirs["dtype"] or {mine["dtype"], theirs["dtype"]} <= {
            *FLOATING
        }
        if not comparable:
            found.append(f"{fqn} is {_called(mine)} here and was {_called(theirs)} there")
        elif mine["shape"] != theirs["shape"]:
            found.append(f"{fqn} is {mine['shape']} here and was {theirs['shape']} there")
        elif mine["hash"] != theirs["hash"]:
            found.append(f"{fqn} has other values here")
        elif "scales" in mine and "scales" in theirs and mine["scales"] != theirs["scales"]:
            found.append(f"{fqn} has other scales here")
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


def base_part(module: nn.Module) -> nn.Module:
    """A module, or what was set aside of it in a merge.

    Args:
        module: A module of a model, adapted or not.
    """
    if isinstance(module, LoRAMixin) and module.merged:
        kept = module.unmerged_weight
        if isinstance(kept, SetAside):
            return kept.as_module()
        base = nn.Module()
        if kept is not None:
            base.weight = nn.Parameter(kept, requires_grad=False)
        return base
    return module


def _own_weight(module: nn.Module) -> Tensor | None:
    """The weight of a base that is not quantised, or sharded bytes of one, if it is at hand."""
    weight = (
        module.base_weight if isinstance(module, LoRAMixin) else getattr(module, "weight", None)
    )
    if not isinstance(weight, Tensor) or weight.is_meta:
        return None
    data = weight.detach()
    if is_sharded(data) and data.is_floating_point() and any(f.told(module) for f in FORMATS):
        return None  # packed values in a floating storage, which no rounding may touch
    # a subclass that is not sharded has no bytes of its own to look at
    return data if is_plain(data) or _is_sharded_plainly(data) else None


def _is_sharded_plainly(weight: Tensor) -> bool:
    return is_sharded(weight) and is_plain(weight.to_local())  # pyright: ignore


def _shard(module: nn.Module) -> Shard | None:
    """Which part of the weight a module of Megatron's holds; None for other modules."""
    kind = kind_of(type(module))
    return None if kind is None else kind.weight_shard(module)


def _called(entry: Mapping[str, Any]) -> str:
    return str(entry.get("quantised") or entry["dtype"])[:80]


def _hash(weight: Tensor, shard: Shard | None = None) -> str:
    weight = weight.reshape(1) if weight.dim() == 0 else weight
    # the first rows that hold enough values, so that nothing large is copied
    width = max(weight.shape[1:].numel(), 1) if shard is None else shard.shape(weight.shape)[1]
    count = -(-HASHED_VALUES // max(width, 1))
    if shard is not None:
        rows = shard.first_rows(weight, count)
    else:
        rows = first_rows(weight, count) if is_sharded(weight) else weight[:count]
    values = rows.reshape(-1)[:HASHED_VALUES].to("cpu")
    if values.is_floating_point() and values.itemsize > 1:
        values = values.to(torch.bfloat16)
    # a copy: one value with any stride counts as contiguous, and has no bytes to view
    data = bytes(
        torch.empty(values.shape, dtype=values.dtype).copy_(values).view(torch.uint8).tolist()
    )
    return hashlib.sha256(data).hexdigest()[:16]
