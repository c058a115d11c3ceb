"""`torch.nn.Linear` and its subclasses (4-bit, 8-bit, a user's own)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bridge.peft.branch.mixin import LoRAMixin, Start
from bridge.peft.branch.options import BranchOptions, DropoutPosition, InitMethod
from bridge.peft.branch.quantised.input_gradients import no_gradient_reason
from bridge.peft.branch.quantised.table import format_of
from bridge.peft.branch.sharding import FollowsSharding, is_distributed, place_branch
from bridge.peft.errors import UnsupportedLinearError
from bridge.peft.ops.dispatch import lora_linear
from bridge.peft.parallel.fsdp import is_managed
from bridge.peft.parallel.layout import layout_of
from bridge.peft.parallel.tensor import sharded_linear
from bridge.peft.parallel.transformers_styles import is_tensor_parallel
from bridge.peft.tensors import is_plain, is_sharded

#: Rows on which a base is tried; kernels in 8 bits want a multiple of 16.
_ROWS = 16


class LinearAdapter(LoRAMixin, FollowsSharding, nn.Linear):
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
    takes_functions = True
    #: Whether the branch takes part where other code reads the weight and never calls the layer.
    when_read: ClassVar[bool] = False

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """As the mixin's; and the one linear of torch that is never called."""
        if type(module) is NonDynamicallyQuantizableLinear and not cls.when_read:
            return (
                "nn.MultiheadAttention reads its weight and never calls its forward; name the "
                "attention itself, which adapts both its projections"
            )
        if not hasattr(module, "weight"):
            held = ", ".join(module._parameters) or "nothing"
            return f"it has no weight, but {held}; load the model with its weights decompressed"
        if reason := super().refusal(module):
            return reason
        if (form := format_of(module)) is not None:
            return no_gradient_reason(module, form)
        return _own_forward_reason(module)

    @classmethod
    def sharded_refusal(cls, module: nn.Module) -> str | None:
        """Why a module whose weight is a DTensor cannot be adapted; None if it can."""
        if not (is_distributed(module) or is_tensor_parallel(module)):
            return super().sharded_refusal(module)
        try:
            layout_of(module.weight, below_fsdp=is_managed(module))  # pyright: ignore
        except UnsupportedLinearError as error:
            return str(error)
        return None

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

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor | None = None, *, input: Tensor | None = None
    ) -> Tensor:
        """`W x + b + scale · B A x`.

        Args:
            x: (..., in_features).
            input: The same, by the name that `nn.Linear` gives it.

        Returns:
            (..., out_features).
        """
        if x is None:
            x = self.given(input)
        if self.merged or not self.adapter_enabled:
            return super().forward(x)
        if not (compute := self._one_function(x)):
            return super().forward(x)
        self.note_call()
        a, b = self.factors()
        drop = self.dropout_now(), self.dropout_position
        out = compute(x, self.base_weight, self.bias, a, b, self.scale, *drop)
        return self.finished(out, a, b)

    def is_linear(self) -> bool:
        """Whether the base computes `W x + b`, as a subclass with its own forward need not."""
        weight = self.base_weight
        if self.plain_forward or not is_plain(weight) or format_of(self) is not None:
            return True
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_ROWS, self.in_features, generator=generator).to(weight)
        with torch.no_grad():  # on a copy, whose observers may see it
            expected, got = F.linear(x, weight, self.bias), copy.deepcopy(self)._base_forward(x)
        tolerance = 100 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
        return torch.allclose(got, expected, rtol=0.0, atol=tolerance)

    def _one_function(self, x: Tensor) -> Callable[..., Tensor] | None:
        """The function that is base and branch in one; None where something comes in between."""
        if self.has_hooks_on_a_or_b():
            return None
        weight, bias = self.base_weight, self.bias
        if self.has_plain_base() and not is_sharded(self.lora_a.weight):
            return lora_linear
        if not (self.plain_forward and is_sharded(weight) and is_sharded(x)):
            return None
        return None if bias is not None and bias.requires_grad else sharded_linear

    @classmethod
    def attach_branch(cls, module: nn.Module, options: BranchOptions, start: Start = None) -> None:
        """As the mixin's; A and B lie where the layout of a sharded weight wants them."""
        super().attach_branch(module, options, start)
        place_branch(module, alike=start is not None)


def _own_forward_reason(module: nn.Module) -> str | None:
    """Why a subclass with a forward of its own cannot carry a branch: it is a router, say."""
    forward, weight = type(module).forward, module.weight
    if forward is nn.Linear.forward or not is_plain(weight) or not weight.is_floating_point():  # pyright: ignore
        return None
    shape = (_ROWS, module.in_features)
    x = torch.zeros(shape, dtype=weight.dtype, device="meta")  # pyright: ignore
    try:
        with torch.no_grad():  # on a copy without values: an observer in it must see nothing
            out = forward(copy.deepcopy(module).to("meta"), x)
    except TypeError:  # it takes more than x, which its callers know
        return None
    except Exception as error:
        return f"its own forward does not map (…, in_features): {str(error).splitlines()[0]:.60}"
    if not isinstance(out, Tensor) or out.shape != (_ROWS, module.out_features):
        got = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        return f"its own forward does not answer with (…, out_features), but with {got}"
    return None
