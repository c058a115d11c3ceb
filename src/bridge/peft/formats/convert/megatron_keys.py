"""The names of Megatron's fused linears and of their parts in a PEFT file."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from bridge.peft.errors import AdapterFileError
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
_MEGATRON_KEY = re.compile(
    r"(?P<prefix>(?:\w+\.)*?)decoder\.layers\.(?P<layer>\d+)\.(?P<fused>\w+\.\w+)"
    r"\.adapter\.linear_(?P<side>in|out)\.weight"
)


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
