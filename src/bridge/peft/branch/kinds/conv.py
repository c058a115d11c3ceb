"""`torch.nn.Conv1d`, `Conv2d`, `Conv3d`, grouped ones too: a convolution to `dim` channels, then B.

    y = conv(x, W) + scale · B conv(x, A)

A's kernel, stride, padding and dilation are the base's, B is a convolution of one point. Both are
kept as matrices: A (dim, in_channels · kernel) and B (out_channels, dim), so that `B A` is the
update of W with its last dimensions flattened. Of a grouped base A sees all channels and B is
block-diagonal, as in PEFT; the update then is of no grouped weight, and cannot be merged.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from bridge.peft.branch.matrix import Blocks
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.branch.options import BranchOptions
from bridge.peft.errors import AdapterError
from bridge.peft.ops.reference import add_in_base_dtype

#: Each class with its function.
_FUNCTIONS: dict[type[_ConvNd], Any] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


class ConvAdapter(LoRAMixin):
    """Convolution + LoRA; dropout acts on x, or on the branch's output."""

    in_all_linear = False

    @classmethod
    def takes(cls, base_type: type[nn.Module]) -> bool:
        """Whether this is one of the three, or derives from one.

        Args:
            base_type: The class of a module before adaptation.
        """
        return issubclass(base_type, tuple(_FUNCTIONS))

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """As the mixin's; and what a convolution does beside convolving."""
        assert isinstance(module, _ConvNd)
        kind = next(kind for kind in _FUNCTIONS if isinstance(module, kind))
        if type(module).forward is not kind.forward:
            return "its own forward may pad or shift its input, of which the branch knows nothing"
        if module.padding_mode != "zeros":
            return f"it pads with {module.padding_mode!r}, and a branch with zeros"
        return super().refusal(module)

    @classmethod
    def features(cls, module: nn.Module) -> tuple[int, int]:
        """`(in_channels · kernel, out_channels)`: the flattened sides of an ungrouped weight."""
        assert isinstance(module, _ConvNd)
        return module.in_channels * prod(module.kernel_size), module.out_channels

    @classmethod
    def blocks_of_b(cls, module: nn.Module, options: BranchOptions) -> Blocks | None:
        """The diagonal blocks of a grouped convolution's B."""
        assert isinstance(module, _ConvNd)
        groups = module.groups
        if groups == 1:
            return None
        if options.dim % groups:
            raise AdapterError(
                f"rank {options.dim} over {groups} groups of a {type(module).__name__}: it must be "
                "a multiple; use rank_pattern, or leave it out with exclude_modules"
            )
        out, dim = module.out_channels // groups, options.dim // groups
        return tuple((g * out, (g + 1) * out, g * dim, (g + 1) * dim) for g in range(groups))

    def is_linear(self) -> bool:
        """Whether the update is one of the base's weight; a grouped one's is not."""
        return self._base.groups == 1

    def oriented(self, weight: Tensor) -> Tensor:
        """The weight as (out_channels, in_channels · kernel), or back."""
        return weight.flatten(1) if weight.dim() > 2 else weight.view(self.base_weight.shape)

    def sample_input(self, rows: int) -> Tensor:
        """A few random inputs, a little larger than the kernel."""
        base = self._base
        sizes = zip(base.kernel_size, base.dilation, strict=True)
        shape = rows, base.in_channels, *((k - 1) * d + 3 for k, d in sizes)
        return torch.randn(shape).to(self.base_weight.device, self.base_weight.dtype)

    @property
    def _base(self) -> _ConvNd:
        assert isinstance(self, _ConvNd)
        return self

    def _add_branch(self, base_out: Tensor, x: Tensor) -> Tensor:
        base, dtype, pre = self._base, self.branch_dtype, self.dropout_position == "pre"
        kind = next(kind for kind in _FUNCTIONS if isinstance(base, kind))
        a, b = self._a_and_b()
        a = a.view(-1, base.in_channels, *base.kernel_size)
        b = b.view(*b.shape, *(1 for _ in base.kernel_size))
        x = self.dropout(x.to(dtype)) if pre else x.to(dtype)
        convolve = _FUNCTIONS[kind]
        h = convolve(x, a, None, base.stride, base.padding, base.dilation)
        branch = convolve(h * self.scale, b)
        return add_in_base_dtype(base_out, branch if pre else self.dropout(branch))

    def _a_and_b(self) -> tuple[Tensor, Tensor]:
        """A and B; by calls of them where hooks bring their weights."""
        if not self.has_hooks_on_a_or_b():
            return self.lora_a.weight, self.lora_b.values
        where = {"dtype": self.branch_dtype, "device": self.base_weight.device}
        a = self.lora_a(torch.eye(self.lora_a.in_features, **where)).t()
        return a.contiguous(), self.lora_b(torch.eye(self.dim, **where)).t().contiguous()
