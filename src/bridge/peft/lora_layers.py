"""Low-rank adapters on linears: the layer classes, and patching in place.

LoRA (Hu et al., 2021, arXiv:2106.09685) adds a trained branch of low rank to a frozen linear:

    y = W x + b + scale · B A x,    A: (dim, in_features),  B: (out_features, dim),  B = 0 at start

The branch stands over whatever linear comes next in the method resolution order, so the base's own
forward (quantised, fp8, a user's subclass) keeps doing the base's work, and the base's parameters
keep their names: the state dict gains `lora_a.weight` and `lora_b.weight` only.
"""

from __future__ import annotations

import torch
from torch import nn

from bridge.peft._optional import TELinear
from bridge.peft.branch.kinds import LinearAdapter, TELinearAdapter
from bridge.peft.branch.options import BranchOptions, DropoutPosition, InitMethod
from bridge.peft.branch.patch import patch_in_place
from bridge.peft.branch.registry import kind_of
from bridge.peft.branch.wrapper import LoRALinear
from bridge.peft.errors import UnsupportedLinearError
from bridge.peft.parallel.fsdp import is_data_parallel

__all__ = ["LinearAdapter", "LoRALinear", "TELinearAdapter", "patch_linear_module"]


def patch_linear_module(
    orig_linear: nn.Linear | TELinear,
    dim: int = 8,
    alpha: float = 32,
    dropout: float = 0.0,
    dropout_position: DropoutPosition = "post",
    lora_A_init_method: InitMethod = "xavier",
    lora_dtype: torch.dtype | None = None,
) -> nn.Linear | TELinear:
    """Adapt a linear in place; nothing of the base is copied or allocated, so `meta` is fine.

    Args:
        orig_linear: An `nn.Linear`, a subclass of it (4-bit, 8-bit, a user's), a `te.Linear`, or
            transformers' `Conv1D`.
        dim: Rank of the update.
        alpha: Scaling numerator, `scale = alpha / dim`.
        dropout: Probability in [0, 1).
        dropout_position: `"pre"` (on x) or `"post"` (on the scaled branch output).
        lora_A_init_method: `"xavier"` or `"uniform"`.
        lora_dtype: Dtype of A and B; None takes the base weight's, which must then be floating.

    Returns:
        The same object, its class now both an adapter class and its old class.

    Raises:
        UnsupportedLinearError: Not such a linear (`NotImplementedError` and `AssertionError`).
        AlreadyAdaptedError: Adapted or patched before (`AssertionError`); it is left as it was.
        ValueError: An option is out of range.

    Example:
        >>> layer = patch_linear_module(nn.Linear(64, 64), dim=4)
        >>> sorted(layer.state_dict())
        ['bias', 'lora_a.weight', 'lora_b.weight', 'weight']
    """
    options = BranchOptions(
        dim=dim,
        alpha=alpha,
        dropout=dropout,
        dropout_position=dropout_position,
        lora_A_init_method=lora_A_init_method,
        lora_dtype=lora_dtype,
    )
    kind = kind_of(type(orig_linear))
    if kind is not None and not kind.in_all_linear:
        raise UnsupportedLinearError(
            f"cannot adapt {type(orig_linear).__name__}: it is not a linear; "
            "LoRA(target_modules=[its name])(model) adapts embeddings and convolutions"
        )
    if is_data_parallel(orig_linear):
        raise UnsupportedLinearError(
            f"cannot adapt this {type(orig_linear).__name__} alone: its weight is sharded by "
            "fully_shard, which the model around it knows; LoRA(...)(model) adapts it"
        )
    patch_in_place(orig_linear, options)
    return orig_linear
