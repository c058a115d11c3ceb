"""Bare state dicts of A and B under a model's own names, with no config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bridge.peft.formats.convert.converted import Step, restored
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.formats.peft.keys import split_keys


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
    contents = split_keys(tensors)
    pairs, rest = contents.pairs, contents.rest
    scales = {fqn: alpha / a.shape[0] for fqn, (a, _) in pairs.items()}
    steps = [Step(name=fqn, how="renamed") for fqn in pairs]
    if rest:
        more = f" with {len(rest) - 1} more: neither A nor B" if len(rest) > 1 else ""
        steps.append(Step(name=next(iter(rest)), how=f"left out{more}"))
    return restored(pairs, scales, extra, None, contents.magnitudes, contents.embeddings), steps
