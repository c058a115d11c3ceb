"""Which linears read one input, by the names that the usual architectures give them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from bridge.peft.errors import TargetError
from bridge.peft.lora_layers import LinearAdapter
from bridge.peft.model.walk import adapted_modules
from bridge.peft.shared_input import SharedInput

#: Names of siblings that read one input.
FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


def families(widths: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Those linears that are siblings of one family with inputs of one width, two or more each.

    Args:
        widths: `in_features` by fully qualified name.

    Example:
        >>> families({"layers.0.q_proj": 64, "layers.0.v_proj": 64, "layers.0.o_proj": 64})
        [('layers.0.q_proj', 'layers.0.v_proj')]
    """
    found: dict[tuple[str, int, int], list[str]] = {}
    for fqn, width in widths.items():
        parent, _, name = fqn.rpartition(".")
        for i, family in enumerate(FAMILIES):
            if name in family:
                found.setdefault((parent, i, width), []).append(fqn)
    return [tuple(siblings) for siblings in found.values() if len(siblings) > 1]


def share_inputs(model: nn.Module) -> nn.Module:
    """Compute adapted siblings that read one input together, in place: q, k and v; gate and up.

    One product makes the narrow activations of all of them, and products sum the gradients of their
    input: equal results up to rounding, in less time. Every call is checked: a linear that gets
    another tensor than its siblings is computed alone. So are all without gradients, with dropout,
    and where a layer does not take the fused path (compiled, quantised).

    The backward of siblings is one, so a loss of one of them frees the graph of all of them.

    Args:
        model: An adapted model, possibly wrapped.

    Returns:
        The same model.

    Raises:
        TargetError: No adapted siblings have names of `FAMILIES`.
    """
    layers = {
        fqn: module
        for fqn, module in adapted_modules(model)
        if isinstance(module, LinearAdapter) and module.plain_forward
    }
    found = families({fqn: layer.in_features for fqn, layer in layers.items()})
    if not found:
        raise no_families(len(layers))
    for siblings in found:
        shared = SharedInput({fqn: layers[fqn] for fqn in siblings})
        for fqn in siblings:
            layers[fqn].shared_input = shared
    return model


def no_families(count: int) -> TargetError:
    """The error that no siblings read one input.

    Args:
        count: How many linears there are to choose from.
    """
    names = ", ".join("/".join(family) for family in FAMILIES)
    return TargetError(
        f"share_inputs finds no siblings that read one input among {count} plain linears; it knows "
        f"them by these names: {names}"
    )
