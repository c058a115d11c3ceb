"""The names of Megatron's fused linears and of their parts in a PEFT file."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.peft.adapter_file import AdapterFile

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
_PEFT_NAME = re.compile(r"(?P<prefix>.*\.)?layers\.(?P<layer>\d+)\.(?P<end>\w+\.\w+)")
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
        AdapterError: A module is part of none.
    """
    if adapter.whole:
        raise AdapterError(
            f"{next(iter(adapter.whole))} is saved whole, which a Megatron adapter cannot hold; "
            "save it with the base model"
        )
    groups: dict[str, dict[str, str]] = {}
    prefixes: set[str] = set()
    for fqn in adapter.tensors:
        match = _PEFT_NAME.fullmatch(fqn)
        if match is None or match["end"] not in _FUSED_OF:
            raise AdapterError(
                f"{fqn} has no counterpart in a Megatron model; only q, k, v, o, gate, up and down "
                "projections of Llama and Qwen type layers do"
            )
        fused, part = _FUSED_OF[match["end"]]
        prefixes.add(match["prefix"] or "")
        groups.setdefault(f"decoder.layers.{int(match['layer'])}.{fused}", {})[part] = fqn
    if len(prefixes) > 1:
        raise AdapterError(f"the adapter covers {len(prefixes)} stacks of layers; convert one")
    return prefixes.pop(), groups


def read_pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, str, Pair]]:
    """A and B of the fused linears in a state dict.

    Args:
        tensors: By Megatron's keys, with or without a prefix.

    Returns:
        By name: the layer, which linear it is (a key of `FUSED`), A and B.

    Raises:
        AdapterFileError: A key is no such linear's, or a pair is not complete.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    places: dict[str, tuple[int, str]] = {}
    for key, tensor in tensors.items():
        match = _MEGATRON_KEY.fullmatch(key) if len(key) < 1000 else None
        if match is None or match["fused"] not in FUSED:
            raise AdapterFileError(
                f"{key[:80]!r} is no key of a Megatron adapter on {', '.join(FUSED)}; remove it"
            )
        name = f"decoder.layers.{int(match['layer'])}.{match['fused']}"
        if tensor.dim() != 2 or not tensor.numel() or match["side"] in halves.setdefault(name, {}):
            raise AdapterFileError(f"{key[:80]!r} is there twice or is no matrix; save it again")
        halves[name][match["side"]] = tensor
        places[name] = (int(match["layer"]), match["fused"])
    result = {}
    for name, pair in halves.items():
        if len(pair) < 2 or pair["in"].shape[0] != pair["out"].shape[1]:
            raise AdapterFileError(
                f"{name}: linear_in and linear_out do not make a pair; save the adapter again"
            )
        result[name] = (*places[name], (pair["in"], pair["out"]))
    return result
