"""A linear whose weight other code reads past its forward: it reads as W + s · B A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge.peft.branch.kinds.linear import LinearAdapter
from bridge.peft.ops.dispatch import ComputePath

#: Why a layer is of this kind.
READ = "other code reads its weight, which reads as W + s·B·A"


class ReadLinearAdapter(LinearAdapter):
    """`LinearAdapter` for code that takes `layer.weight` into a product of its own.

    Called, it computes as a `LinearAdapter` does. Read, `layer.weight` is the dense
    `W + s · B A`, (out_features, in_features), so that the branch takes part and A and B
    get their gradients; dropout does not act there. The checkpoint's names stay, and
    `layer.base_weight` is W itself.
    """

    @classmethod
    def takes(cls, base_type: type[nn.Module]) -> bool:
        """No class as such: the recipe chooses this kind for the linears of a model that are read.

        Args:
            base_type: The class of a module before adaptation.
        """
        return False

    def lora_path(self) -> ComputePath:
        """As the mixin's, and that other code reads the weight."""
        return ComputePath("read", READ)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`W + s · B A`, in the dtype of W; W where the branch is off or merged."""
        self.note_call()
        base = self.base_weight
        if self.merged or not self.adapter_enabled:
            return base
        if base.is_meta:  # offloaded, or not loaded yet
            return base
        if self.has_hooks_on_a_or_b():  # which bring the weights of A and B when they are called
            rows = torch.eye(self.in_features, dtype=self.branch_dtype, device=base.device)
            update = self.lora_b(self.lora_a(rows)).t()
        else:
            update = self.lora_b.weight @ self.lora_a.weight
        return (base + self.scale * update).to(base.dtype)

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # not `super()`'s, which would read the weight with the branch in it
        return F.linear(x, self.base_weight, self.bias)
