"""LoRA adapters in torchtune's names.

    layers.N.attn.{q_proj, k_proj, v_proj, output_proj}    layers.N.mlp.{w1, w2, w3}    output

w1 is the gate, w2 the down, w3 the up projection. For Llama type models torchtune computes the
rotary embedding on interleaved halves, so the rows of B of q and k are permuted within each head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bridge.peft.errors import AdapterFileError
from bridge.peft.formats.convert.converted import (
    Converted,
    Step,
    extra_of,
    one_rank_and_scale,
    places,
    prefix_of,
    restored,
)
from bridge.peft.formats.convert.layout import AttentionLayout, interleave_halves, part_halves
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.formats.peft.keys import Halves

#: By PEFT's name of a part of a layer.
NAMES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
_BACK = {theirs: ours for ours, theirs in NAMES.items()}
_HEAD, _TUNE_HEAD = "lm_head", "output"
_ROTARY = ("attn.q_proj", "attn.k_proj")
_TUNE_KEY = re.compile(
    r"(?:layers\.(?P<layer>\d+)\.)?(?P<end>\w+(?:\.\w+)?)\.lora_(?P<m>[ab])\.weight"
)


def to_torchtune(adapter: AdapterFile, layout: AttentionLayout) -> Converted:
    """Convert a PEFT adapter of a Llama or Qwen type model; exact.

    Args:
        adapter: The adapter.
        layout: The model's attention layout.

    Raises:
        AdapterError: A module has no counterpart.
    """
    prefix, found = places(adapter, (*NAMES, _HEAD), "torchtune")
    rank, scale = one_rank_and_scale(adapter, "torchtune")
    tensors: dict[str, Tensor] = {}
    steps: list[Step] = []
    for fqn, (a, b) in adapter.tensors.items():
        layer, end = found.get(fqn, (None, ""))
        name = _TUNE_HEAD if layer is None else f"layers.{layer}.{NAMES[end]}"
        if permuted := name.endswith(_ROTARY) and layout.interleaved:
            b = interleave_halves(b, _even(layout, name, b))
        tensors[f"{name}.lora_a.weight"], tensors[f"{name}.lora_b.weight"] = a, b.contiguous()
        steps.append(Step(name=name, how=_how(permuted)))
    extra = extra_of(adapter, layout, rank, scale, format="torchtune", prefix=prefix)
    return Converted(tensors=tensors, extra=extra, steps=steps)


def from_torchtune(
    tensors: Mapping[str, Tensor],
    extra: Mapping[str, Any],
    layout: AttentionLayout,
    alpha: float,
) -> tuple[AdapterFile, list[Step]]:
    """Convert a torchtune adapter; exact.

    Args:
        tensors: By key of the file.
        extra: Its decoded `bridge_adapter.json`; empty if it has none.
        layout: The model's attention layout.
        alpha: The recipe's `lora_alpha`; `scale = alpha / rank`.

    Raises:
        AdapterFileError: A key, a shape or `extra` is not right.
    """
    prefix = prefix_of(extra)
    halves = Halves()
    steps: list[Step] = []
    for key, tensor in tensors.items():
        match = _TUNE_KEY.fullmatch(key) if len(key) < 1000 else None
        name = match["end"] if match else ""
        if match is None or name not in (_BACK if match["layer"] else (_TUNE_HEAD,)):
            raise AdapterFileError(
                f"{key[:80]!r} is not a key of a torchtune adapter of a Llama type model; remove it"
            )
        fqn = f"{prefix}layers.{match['layer']}.{_BACK[name]}" if match["layer"] else _HEAD
        halves.add(fqn, match["m"].upper(), tensor, key)
    pairs = halves.pairs()
    for fqn, (a, b) in pairs.items():
        name = NAMES.get(".".join(fqn.rsplit(".", 2)[1:]), "")
        if permuted := name in _ROTARY and layout.interleaved:
            pairs[fqn] = (a, part_halves(b, _even(layout, name, b)).contiguous())
        steps.append(Step(name=fqn, how=_how(permuted)))
    scales = {fqn: alpha / a.shape[0] for fqn, (a, _) in pairs.items()}
    return restored(pairs, scales, extra, layout), steps


def _how(permuted: bool) -> str:
    return "rows of B permuted" if permuted else "renamed"


def _even(layout: AttentionLayout, name: str, b: Tensor) -> int:
    """The size of a head, which must be even and divide the rows of B."""
    wanted = layout.rows(f"{name.rpartition('.')[2]}")
    if layout.head_dim % 2 or b.shape[0] != wanted:
        raise AdapterFileError(
            f"{name} has {b.shape[0]} rows, and the model's heads need {wanted}, in halves; pass "
            "the right model or heads"
        )
    return layout.head_dim
