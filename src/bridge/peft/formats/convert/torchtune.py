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

from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.convert.converted import Converted, Step, is_prefix, paired, restored
from bridge.peft.formats.convert.layout import AttentionLayout, interleave_halves, part_halves
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.formats.peft.config import alpha_for

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
_HEAD = ("lm_head", "output")
_ROTARY = ("attn.q_proj", "attn.k_proj")
_PEFT_NAME = re.compile(r"(?P<prefix>.*\.)?layers\.(?P<layer>\d+)\.(?P<end>\w+\.\w+)")
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
    if adapter.whole:
        raise AdapterError(
            f"{next(iter(adapter.whole))} is saved whole, which a torchtune adapter cannot hold; "
            "save it with the base model"
        )
    tensors: dict[str, Tensor] = {}
    steps: list[Step] = []
    prefixes: set[str] = set()
    for fqn, (a, b) in adapter.tensors.items():
        name, prefix = _tune_name(fqn)
        prefixes |= prefix
        if permuted := name.endswith(_ROTARY) and layout.interleaved:
            b = interleave_halves(b, _even(layout, name, b))
        tensors[f"{name}.lora_a.weight"], tensors[f"{name}.lora_b.weight"] = a, b.contiguous()
        steps.append(Step(name=name, how="rows of B permuted" if permuted else "renamed"))
    if len(prefixes) > 1:
        raise AdapterError(f"the adapter covers {len(prefixes)} stacks of layers; convert one")
    scales = {_tune_name(fqn)[0]: adapter.scale(fqn) for fqn in adapter.tensors}
    ranks = {_tune_name(fqn)[0]: adapter.rank(fqn) for fqn in adapter.tensors}
    if len(set(ranks.values())) > 1 or len(set(scales.values())) > 1:
        raise AdapterError(
            "the modules differ in rank or scale, and a torchtune recipe has one lora_rank and one "
            "lora_alpha; resize the adapter to one rank first"
        )
    fqn = next(iter(adapter.tensors))
    side = {
        "format": "torchtune",
        "dim": adapter.rank(fqn),
        "alpha": alpha_for(adapter.scale(fqn), adapter.rank(fqn)),
        "dropout": adapter.parsed.lora_dropout,
        "layout": layout.to_dict(),
        "prefix": next(iter(prefixes), "model."),
        "peft": {"config": adapter.config, "extra": adapter.extra},
    }
    return Converted(tensors=tensors, side=side, steps=steps)


def from_torchtune(
    tensors: Mapping[str, Tensor],
    side: Mapping[str, Any],
    layout: AttentionLayout,
    alpha: float,
) -> tuple[AdapterFile, list[Step]]:
    """Convert a torchtune adapter; exact.

    Args:
        tensors: By key of the file.
        side: Its side file; empty if it has none.
        layout: The model's attention layout.
        alpha: The recipe's `lora_alpha`; `scale = alpha / rank`.

    Raises:
        AdapterFileError: A key, a shape or the side file is not right.
    """
    prefix = side.get("prefix", "model.")
    if not is_prefix(prefix):
        raise AdapterFileError("bridge_adapter.json: prefix must be a name")
    halves: dict[str, dict[str, Tensor]] = {}
    steps: list[Step] = []
    for key, tensor in tensors.items():
        match = _TUNE_KEY.fullmatch(key) if len(key) < 1000 else None
        name = match["end"] if match else ""
        if match is None or name not in (_BACK if match["layer"] else (_HEAD[1],)):
            raise AdapterFileError(
                f"{key[:80]!r} is no key of a torchtune adapter of a Llama type model; remove it"
            )
        if tensor.dim() != 2 or not tensor.numel():
            raise AdapterFileError(f"{key[:80]!r} is no matrix; save the adapter again")
        fqn = f"{prefix}layers.{match['layer']}.{_BACK[name]}" if match["layer"] else _HEAD[0]
        permuted = name in _ROTARY and layout.interleaved
        if match["m"] == "b":
            steps.append(Step(name=fqn, how="rows of B permuted" if permuted else "renamed"))
            if permuted:
                tensor = part_halves(tensor, _even(layout, name, tensor)).contiguous()
        halves.setdefault(fqn, {})[match["m"]] = tensor
    pairs = paired(halves)
    scales = {fqn: alpha / a.shape[0] for fqn, (a, _) in pairs.items()}
    return restored(pairs, scales, side, layout), steps


def _tune_name(fqn: str) -> tuple[str, set[str]]:
    """Torchtune's name of a module, and what stands before `layers` in ours."""
    if fqn == _HEAD[0]:
        return _HEAD[1], set()
    match = _PEFT_NAME.fullmatch(fqn)
    if match is None or match["end"] not in NAMES:
        raise AdapterError(
            f"{fqn} has no counterpart in torchtune; only q, k, v, o, gate, up and down "
            "projections and the head of Llama and Qwen type models do"
        )
    return f"layers.{int(match['layer'])}.{NAMES[match['end']]}", {match["prefix"] or ""}


def _even(layout: AttentionLayout, name: str, b: Tensor) -> int:
    """The size of a head, which must be even and divide the rows of B."""
    wanted = layout.rows(f"{name.rpartition('.')[2]}")
    if layout.head_dim % 2 or b.shape[0] != wanted:
        raise AdapterFileError(
            f"{name} has {b.shape[0]} rows, and the model's heads need {wanted}, in halves; pass "
            "the right model or heads"
        )
    return layout.head_dim
