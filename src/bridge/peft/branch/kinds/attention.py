"""`nn.MultiheadAttention`: the matrix of its q, k and v, and its output projection.

torch's attention hands both weights to a function and calls no linear, so the branches take part
where the weights are read, in its forward, as the dense `W + s · B A`:

    attention.in_proj_weight                      W, (3 · embed_dim, embed_dim)
    attention.in_proj_weight_lora.lora_a.weight   A, (dim, embed_dim)
    attention.in_proj_weight_lora.lora_b.weight   B, (3 · embed_dim, dim)
    attention.out_proj.lora_a.weight, …           those of the output projection
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bridge.peft.branch.kinds.experts import IN_PROJECTION, ParameterBranch, is_attention
from bridge.peft.branch.kinds.read_linear import READ, ReadLinearAdapter, read_in_full
from bridge.peft.branch.untouched import foreign_patch
from bridge.peft.ops.dispatch import ComputePath

#: The name of the output projection in torch's attention.
OUT_PROJECTION = "out_proj"


def attention_refusal(module: nn.Module) -> str | None:
    """Why the projections of an attention of torch cannot be adapted; None if they can.

    Args:
        module: An `nn.MultiheadAttention`, not adapted.
    """
    if not is_attention(module):
        return "its class computes attention by a forward of its own"
    if module._parameters[IN_PROJECTION] is None:
        return "its q, k and v have widths of their own (kdim, vdim), and so no common matrix"
    return foreign_patch(module)


class AttentionInputBranch(ParameterBranch):
    """A branch on the matrix of q, k and v in one; dropout does not act there."""

    def lora_path(self) -> ComputePath:
        """That the attention reads the weight."""
        return ComputePath("read", READ)

    def read(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`W + s · B A`, (3 · embed_dim, embed_dim), in the dtype of W."""
        self.note_call()
        self.check_not_offloaded()
        return read_in_full(self, self.base_weight)


class AttentionOutputAdapter(ReadLinearAdapter):
    """`ReadLinearAdapter` for the output projection, which has a class of its own in torch."""

    base_type = NonDynamicallyQuantizableLinear
