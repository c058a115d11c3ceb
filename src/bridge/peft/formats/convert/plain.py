"""Bare state dicts of A and B under a model's own names, with no config.

….q_proj.lora_a.weight            ours (`adapter_state_dict`), Automodel's
….q_proj.lora_A[.default].weight  PEFT's, as they are in a live model
….q_proj.linear_in.weight         of the layers in version 0.2 and earlier of Megatron-Bridge
….q_proj.adapter.linear_in.weight wrapped in `LoRALinear`
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bridge.peft.formats.convert.converted import Halves, Step, restored
from bridge.peft.formats.peft.adapter_file import AdapterFile

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<fqn>.+?)\.(?:adapter\.)?"
    r"(?:lora_(?P<m>[abAB])(?:\.default)?|linear_(?P<side>in|out))\.weight"
)


def from_plain(
    tensors: Mapping[str, Tensor], extra: Mapping[str, Any], alpha: float
) -> tuple[AdapterFile, list[Step]]:
    """Give a bare state dict a config.

    Args:
        tensors: By key; weights of the base beside A and B are left out, and the steps say so.
        extra: The decoded `bridge_adapter.json`, if there is one.
        alpha: `scale = alpha / rank`.

    Raises:
        AdapterFileError: There is no A and B, or they do not make pairs.
    """
    halves = Halves()
    left_out: list[str] = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key) if len(key) < 1000 else None
        if match is None:
            left_out.append(key)
            continue
        letter = match["m"].lower() if match["m"] else {"in": "a", "out": "b"}[match["side"]]
        halves.add(match["fqn"], letter, tensor, key)
    pairs = halves.pairs()
    scales = {fqn: alpha / a.shape[0] for fqn, (a, _) in pairs.items()}
    steps = [Step(name=fqn, how="renamed") for fqn in pairs]
    if left_out:
        how = (
            f"left out with {len(left_out) - 1} more: neither A nor B"
            if left_out[1:]
            else "left out"
        )
        steps.append(Step(name=left_out[0], how=how))
    return restored(pairs, scales, extra, None), steps
