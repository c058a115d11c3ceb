"""LoRA adapters of mlx_lm: `adapters.safetensors`, and what makes them in `adapter_config.json`.

y = W x + scale · (x lora_a) lora_b, with lora_a (in, rank) and lora_b (rank, out): A and B
transposed, so both ways are exact. All modules have one rank, scale and dropout. mlx_lm adapts the
same linears, `keys`, in the last `num_layers` layers, and misses none of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bridge.peft.errors import AdapterError, AdapterFileError
from bridge.peft.formats.convert.converted import (
    Converted,
    Step,
    check_nothing_whole,
    extra_of,
    one_rank_and_scale,
    restored,
)
from bridge.peft.formats.convert.layout import AttentionLayout
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.formats.peft.fields import is_dropout
from bridge.peft.formats.peft.keys import Halves
from bridge.peft.model.walk import some_names

TENSORS_NAME = "adapters.safetensors"
_KEY = re.compile(r"(?P<fqn>.+)\.lora_(?P<half>[ab])")
_PLACE = re.compile(r"(?P<stack>(?:.+?\.)?(?:layers|h|blocks))\.(?P<layer>\d+)\.(?P<end>.+)")


def to_mlx(adapter: AdapterFile, layout: AttentionLayout) -> Converted:
    """Convert a PEFT adapter; exact.

    Args:
        adapter: The adapter.
        layout: The model's: mlx_lm counts its layers from the last.

    Raises:
        AdapterError: mlx_lm would adapt other modules, or the modules differ in rank or scale.
    """
    check_nothing_whole(adapter, "mlx_lm")
    rank, scale = one_rank_and_scale(adapter, "mlx_lm")
    if layout.layers is None:
        raise AdapterError("mlx_lm counts layers from the last; pass the model's directory")
    keys, first = _last_layers(adapter, layout.layers)
    tensors: dict[str, Tensor] = {}
    for fqn, (a, b) in adapter.tensors.items():
        tensors[f"{fqn}.lora_a"], tensors[f"{fqn}.lora_b"] = a.T.contiguous(), b.T.contiguous()
    dropout = adapter.parsed.lora_dropout
    config = {
        "fine_tune_type": "lora",
        "num_layers": layout.layers - first,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": keys},
        "model": adapter.config.get("base_model_name_or_path"),
    }
    return Converted(
        tensors=tensors,
        extra=extra_of(adapter, layout, rank, scale, format="mlx"),
        steps=[Step(name=fqn, how="transposed") for fqn in adapter.tensors],
        config=config,
    )


def from_mlx(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    extra: Mapping[str, Any],
    layout: AttentionLayout | None,
) -> tuple[AdapterFile, list[Step]]:
    """Convert an mlx_lm adapter; exact.

    Args:
        tensors: By key of the file.
        config: Its decoded `adapter_config.json`.
        extra: Its decoded `bridge_adapter.json`; empty if it has none.
        layout: The model's, if known.

    Raises:
        AdapterFileError: It is of another kind, or a key, a shape or the config is not right.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise AdapterFileError(
            f"adapter_config.json: fine_tune_type={kind!r:.80} of mlx_lm is not supported yet; "
            "fuse it into the model with mlx_lm.fuse"
        )
    match config.get("lora_parameters"):
        case {"scale": int() | float() as scale, **others} if 0 < abs(scale) < 1e9:
            dropout = others.get("dropout", 0.0)
        case other:
            raise _wrong(other)
    if not is_dropout(dropout):
        raise _wrong(config["lora_parameters"])
    halves = Halves()
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.dim() != 2:
            what = "experts" if tensor.dim() == 3 else "not an A or B of a linear"
            raise AdapterFileError(
                f"{key[:80]!r} is {what} in the mlx_lm adapter, which is not supported yet; fuse "
                "it into the model with mlx_lm.fuse"
            )
        halves.add(match["fqn"], match["half"].upper(), tensor.T.contiguous(), key)
    pairs = halves.pairs()
    steps = [Step(name=fqn, how="transposed") for fqn in pairs]
    scales = dict.fromkeys(pairs, float(scale))
    return restored(pairs, scales, {**extra, "dropout": dropout}, layout), steps


def _wrong(parameters: object) -> AdapterFileError:
    return AdapterFileError(
        "adapter_config.json: lora_parameters must hold mlx_lm's scale and dropout, got "
        f"{parameters!r:.80}"
    )


def _last_layers(adapter: AdapterFile, layers: int) -> tuple[list[str], int]:
    """The names of the adapted linears within a layer, and the first layer that has them."""
    ends: dict[int, set[str]] = {}
    stacks: set[str] = set()
    for fqn in adapter.tensors:
        match = _PLACE.fullmatch(fqn)
        if match is None:
            raise AdapterError(
                f"{fqn} is not in a layer, and mlx_lm adapts only linears within layers; leave it "
                "out when training"
            )
        stacks.add(match["stack"])
        ends.setdefault(int(match["layer"]), set()).add(match["end"])
    first, keys = min(ends), sorted(set().union(*ends.values()))
    if len(stacks) > 1:
        raise AdapterError(
            f"the adapter covers the stacks {some_names(sorted(stacks))}, and mlx_lm adapts one"
        )
    for layer in range(first, layers):
        if missing := sorted(set(keys) - ends.get(layer, set())):
            raise AdapterError(
                f"{missing[0]} of layer {layer} is not adapted, and mlx_lm adapts the same linears "
                f"in each of the last {layers - first} layers; it cannot hold this adapter"
            )
    if max(ends) >= layers:
        raise AdapterError(
            f"the adapter adapts layer {max(ends)} of a model of {layers} layers; pass the right "
            "model (--model)"
        )
    return keys, first
