"""The projections of torch's attention as PEFT files hold them.

PEFT wraps `nn.MultiheadAttention` as a whole, and the output projection inside its wrapper:

    ….attention.lora_A.weight                      of q, k and v in one, ours ….in_proj_weight
    ….attention.base_layer.out_proj.lora_A.weight  of the output, ours ….out_proj

PEFT up to 0.21.2 adds the update of the output twice (huggingface/peft#3774), in training too. The
config says which version a file is of (`peft_version`); of those its B is doubled when it is read
and halved when it is written, which is exact, so that both compute the same.

Both have one rank and one alpha. Where only one of the two is adapted, or they differ, a file holds
them as what they are: a parameter and a linear, of which PEFT reads the first alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bridge.peft.branch.kinds.attention import OUT_PROJECTION
from bridge.peft.branch.kinds.experts import IN_PROJECTION, is_attention
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.formats.peft.adapter_file import AdapterFile
from bridge.peft.formats.peft.keys import ATTENTION_OUTPUT, config_name

#: The last version of PEFT that is known to add the output's update twice.
_TWICE_UP_TO = "0.21.2"


def attentions(layers: Mapping[str, LoRAMixin]) -> dict[str, tuple[str, str]]:
    """The adapted attentions that are one module in a file.

    Args:
        layers: The adapted modules and parameters of a model.

    Returns:
        By fully qualified name, the names of the two branches.
    """
    found: dict[str, tuple[str, str]] = {}
    for fqn, layer in layers.items():
        name = fqn.removesuffix(f".{IN_PROJECTION}")
        output = f"{name}.{OUT_PROJECTION}"
        if name != fqn and is_attention(layer.base) and output in layers:
            other = layers[output]
            if (layer.dim, layer.scale) == (other.dim, other.scale) and other.start is None:
                found[name] = (fqn, output)
    return found


def names_in_file(found: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """The names of branches in a file, where they differ from those in the model.

    Args:
        found: As `attentions` or `in_model` has it.
    """
    names: dict[str, str] = {}
    for name, (inputs, output) in found.items():
        names |= {inputs: name, output: f"{name}{ATTENTION_OUTPUT}"}
    return names


def in_file(adapter: AdapterFile, found: Mapping[str, tuple[str, str]]) -> AdapterFile:
    """The adapter of a model with attentions under the names that a file has for them.

    Args:
        adapter: Under the model's names.
        found: As `attentions` gives it.
    """
    if not found:
        return adapter
    names = names_in_file(found)
    tensors = dict(adapter.tensors)
    for _, output in found.values():
        a, b = tensors[output]
        tensors[output] = a, b / 2
    extra: dict[str, Any] = dict(adapter.extra)
    for field in ("exceptions", "base"):
        if isinstance(extra.get(field), dict):
            extra[field] = {names.get(fqn, fqn): value for fqn, value in extra[field].items()}
    return dataclasses.replace(
        adapter,
        config=adapter.config | {"peft_version": _TWICE_UP_TO},
        extra=extra,
        tensors={names.get(fqn, fqn): pair for fqn, pair in tensors.items()},
        whole=_with_bias(adapter.whole, names),
        parameters=adapter.parameters - names.keys(),
    )


def in_model(adapter: AdapterFile) -> AdapterFile:
    """The adapter of a file with attentions under the names of a model's branches.

    Args:
        adapter: As it was read.
    """
    found = {
        name: (f"{name}.{IN_PROJECTION}", f"{name}.{OUT_PROJECTION}")
        for fqn in adapter.tensors
        if (name := config_name(fqn, adapter.tensors)) != fqn
    }
    if not found:
        return adapter
    tensors = dict(adapter.tensors)
    if _counts_twice(adapter.config.get("peft_version")):
        for name in found:
            a, b = tensors[f"{name}{ATTENTION_OUTPUT}"]
            tensors[f"{name}{ATTENTION_OUTPUT}"] = a, 2 * b
    names = {old: new for new, old in names_in_file(found).items()}
    return dataclasses.replace(
        adapter,
        tensors={names.get(fqn, fqn): pair for fqn, pair in tensors.items()},
        whole=_with_bias(adapter.whole, names),
        parameters=adapter.parameters | {inputs for inputs, _ in found.values()},
        alphas=adapter.alphas | {new: adapter.alpha(old) for old, new in names.items()},
        names_in_file=adapter.names_in_file | {new: old for old, new in names.items()},
    )


def _with_bias(whole: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """What is saved whole, the bias of the output projection under its name in `names`."""
    biases = {f"{old}.bias": f"{new}.bias" for old, new in names.items()}
    return {biases.get(name, name): tensor for name, tensor in whole.items()}


def _counts_twice(version: Any) -> bool:
    """Whether a file is of a version of PEFT that adds an attention's output update twice."""
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if found is None:  # before files said it
        return True
    last = re.match(r"(\d+)\.(\d+)", _TWICE_UP_TO)
    assert last is not None
    return tuple(map(int, found.groups())) <= tuple(map(int, last.groups()))
