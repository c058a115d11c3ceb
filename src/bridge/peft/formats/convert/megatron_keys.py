"""The names of Megatron's fused linears and of their parts in a PEFT file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.convert.converted import places
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.formats.peft.keys import Halves

Pair = tuple[Tensor, Tensor]

#: Each fused linear, the block it is in on both sides, and the parts it is made of.
FUSED = {
    "self_attention.linear_qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "self_attention.linear_proj": ("self_attn", ("o_proj",)),
    "mlp.linear_fc1": ("mlp", ("gate_proj", "up_proj")),
    "mlp.linear_fc2": ("mlp", ("down_proj",)),
}
_FUSED_OF = {
    f"{block}.{part}": (fused, part) for fused, (block, parts) in FUSED.items() for part in parts
}
_MEGATRON_NAME = r"(?P<prefix>(?:\w+\.)*?)decoder\.layers\.(?P<layer>\d+)\.(?P<fused>\w+\.\w+)"
_MEGATRON_KEY = re.compile(rf"{_MEGATRON_NAME}\.adapter\.linear_(?P<side>in|out)\.weight")
_MEGATRON_FQN = re.compile(_MEGATRON_NAME)


class Place(NamedTuple):
    """Where a fused linear is: its name without a prefix, its layer, and its key in `FUSED`."""

    name: str
    layer: int
    fused: str


def place_of(fqn: str) -> Place | None:
    """Where a module of a Megatron model is; None if it is not such a fused linear.

    Args:
        fqn: Its fully qualified name.
    """
    match = _MEGATRON_FQN.fullmatch(fqn) if len(fqn) < 1000 else None
    if match is None or match["fused"] not in FUSED:
        return None
    layer, fused = int(match["layer"]), match["fused"]
    return Place(f"decoder.layers.{layer}.{fused}", layer, fused)


def has_megatron_names(adapter: AdapterFile) -> bool:
    """Whether an adapter is of a Megatron model, by the names of all its modules.

    Raises:
        AdapterError: Some are, and others (experts, an output head) have no counterpart elsewhere.
    """
    odd = [fqn for fqn in adapter.tensors if place_of(fqn) is None]
    if odd and any(".linear_qkv" in fqn or ".linear_fc" in fqn for fqn in adapter.tensors):
        raise AdapterError(
            f"{odd[0]} of a Megatron model has no counterpart in a Llama or Qwen type model; only "
            f"{', '.join(FUSED)} have one"
        )
    return not odd


def group_by_fused(adapter: AdapterFile) -> tuple[str, dict[str, dict[str, str]]]:
    """Sort the modules of an adapter by the fused linear that they are part of.

    Args:
        adapter: A PEFT adapter.

    Returns:
        What stands before `layers` in its names, and
        `{"decoder.layers.0.self_attention.linear_qkv": {"q_proj": fqn, …}, …}`.

    Raises:
        AdapterError: A module is not part of one.
    """
    prefix, found = places(adapter, _FUSED_OF, "Megatron")
    groups: dict[str, dict[str, str]] = {}
    for fqn, (layer, end) in found.items():
        fused, part = _FUSED_OF[end]
        groups.setdefault(f"decoder.layers.{layer}.{fused}", {})[part] = fqn
    return prefix, groups


def read_pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, str, Pair]]:
    """A and B of the fused linears in a state dict.

    Args:
        tensors: By Megatron's keys, with or without a prefix.

    Returns:
        By name: the layer, which linear it is (a key of `FUSED`), A and B.

    Raises:
        AdapterFileError: A key is not that of such a linear, or a pair is not complete.
    """
    halves = Halves()
    where: dict[str, tuple[int, str]] = {}
    for key, tensor in tensors.items():
        match = _MEGATRON_KEY.fullmatch(key) if len(key) < 1000 else None
        if match is None or match["fused"] not in FUSED:
            raise AdapterFileError(
                f"{key[:80]!r} is not a key of a Megatron adapter on {', '.join(FUSED)}; remove it"
            )
        layer, fused = int(match["layer"]), match["fused"]
        name = f"decoder.layers.{layer}.{fused}"
        halves.add(name, "A" if match["side"] == "in" else "B", tensor, key)
        where[name] = (layer, fused)
    return {name: (*where[name], pair) for name, pair in halves.pairs().items()}
