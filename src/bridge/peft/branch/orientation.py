"""Which way round a linear stores its weight, and so how wide it is."""

from __future__ import annotations

from torch import Tensor, nn


def is_transposed(linear_type: type[nn.Module]) -> bool:
    """Whether this is transformers' `Conv1D` (GPT-2), a linear with an (in, out) weight.

    It is known by its name, so that transformers need not be imported.

    Args:
        linear_type: The class of a module.
    """
    names = {f"{base.__module__}.{base.__name__}" for base in linear_type.__mro__}
    return "transformers.pytorch_utils.Conv1D" in names


def features(linear: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of a linear that can be adapted.

    Args:
        linear: An `nn.Linear`, a `te.Linear` or a `Conv1D`, adapted or not.
    """
    if is_transposed(type(linear)):
        weight: Tensor = linear.weight  # pyright: ignore[reportAssignmentType]
        return weight.shape[0], weight.shape[1]
    return linear.in_features, linear.out_features  # pyright: ignore[reportReturnType]
