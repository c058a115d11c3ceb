"""`torch.nn.Linear` and its subclasses (4-bit, 8-bit, a user's own)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.options import DropoutPosition, InitMethod
from bridge.peft.ops.dispatch import lora_linear


class LinearAdapter(LoRAMixin, nn.Linear):
    """Linear + LoRA; `weight` and `bias` keep their names in the checkpoint.

    Copies weight and bias of `orig_linear` into storage of its own and leaves `orig_linear` as it
    was; `patch_linear_module` is the way that copies nothing.

    Args:
        orig_linear: The plain `nn.Linear` to adapt, weight (out_features, in_features).
        dim, alpha, …: The branch's options; see `BranchOptions`.

    Raises:
        UnsupportedLinearError: `orig_linear` is not a plain `nn.Linear`.
        AlreadyAdaptedError: `orig_linear` is adapted already.
        ValueError: An option is out of range.
    """

    base_type = nn.Linear
    copies = "a plain nn.Linear"
    plain_forward = True

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """As the mixin's; and the one linear of torch that is never called."""
        if type(module) is NonDynamicallyQuantizableLinear:
            return "nn.MultiheadAttention reads its weight and never calls its forward"
        return super().refusal(module)

    def __init__(
        self,
        orig_linear: nn.Linear,
        dim: int = 8,
        alpha: float = 32,
        dropout: float = 0.0,
        dropout_position: DropoutPosition = "post",
        lora_A_init_method: InitMethod = "xavier",
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        self.check_copyable(orig_linear)
        has_bias = orig_linear.bias is not None
        super().__init__(
            orig_linear.in_features, orig_linear.out_features, bias=has_bias, device="meta"
        )
        self.weight = nn.Parameter(orig_linear.weight.detach().clone())
        if has_bias:
            self.bias = nn.Parameter(orig_linear.bias.detach().clone())
        self.train(orig_linear.training)
        self._init_adapter(
            self, dim, alpha, dropout, dropout_position, lora_A_init_method, lora_dtype
        )

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`W x + b + scale · B A x`: (..., in_features) -> (..., out_features)."""
        if self.merged or not self.adapter_enabled or not self.has_plain_base():
            return super().forward(x)
        a, b = self.lora_a.weight, self.lora_b.weight
        drop = self.dropout_now(), self.dropout_position
        return lora_linear(x, self.weight, self.bias, a, b, self.scale, *drop)
