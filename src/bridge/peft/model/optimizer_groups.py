"""Parameter groups for any torch optimizer: B learns faster than A (LoRA+).

Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024 (arXiv:2402.12354).
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from bridge.peft.errors import AdapterError
from bridge.peft.model.walk import adapted_modules, unwrap


def optimizer_groups(
    model: nn.Module, *, lr: float, b_ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Everything that is trained, each parameter once, in groups for a torch optimizer.

    Args:
        model: An adapted model, possibly wrapped or sharded.
        lr: Learning rate of A, of DoRA's magnitudes and of what is trained in full.
        b_ratio: Learning rate of B over that of A; 1 is plain LoRA, 16 the paper's.
        weight_decay: Of A, B and other matrices; vectors (biases, norms, magnitudes) have none.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and a `name`: `"a"`, `"b"`, `"in full"` and
        `"vectors"`; those that would be empty are left out.

    Raises:
        AdapterError: A number is out of range, the model is not adapted, or nothing is trained.

    Example:
        >>> optimizer = torch.optim.AdamW(optimizer_groups(model, lr=2e-4))
    """
    _check("lr", lr)
    _check("b_ratio", b_ratio)
    _check("weight_decay", weight_decay, may_be_zero=True)
    of_a, of_b = _factors(model)
    if not of_a and not of_b:
        raise AdapterError("the model has no adapters; LoRA(...)(model) adds them")
    groups: dict[str, list[nn.Parameter]] = {"a": [], "b": [], "in full": [], "vectors": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in of_a:
            groups["a"].append(parameter)
        elif id(parameter) in of_b:
            groups["b"].append(parameter)
        else:
            groups["in full" if parameter.dim() > 1 else "vectors"].append(parameter)
    if not any(groups.values()):
        raise AdapterError("nothing of the model is trained; requires_grad_(True) on its adapters")
    return [
        {
            "name": name,
            "params": parameters,
            "lr": lr * b_ratio if name == "b" else lr,
            "weight_decay": 0.0 if name == "vectors" else weight_decay,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def _factors(model: nn.Module) -> tuple[set[int], set[int]]:
    """The ids of all A and of all B."""
    of_a: set[int] = set()
    of_b: set[int] = set()
    for _, module in adapted_modules(unwrap(model)):
        for name, parameter in module.adapter_parameters().items():
            if _is_in(name, ("lora_a", "lora_A", "linear_in")):
                of_a.add(id(parameter))
            elif _is_in(name, ("lora_b", "lora_B", "linear_out")):
                of_b.add(id(parameter))
    return of_a, of_b


def _is_in(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in parts for part in name.split("."))


def _check(name: str, value: Any, *, may_be_zero: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and (value > 0 or (may_be_zero and value == 0)):
        return
    wanted = "0 or more" if may_be_zero else "a number above 0"
    raise AdapterError(f"{name} must be {wanted}, got {value!r}")
