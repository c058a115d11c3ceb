"""A stand-in for linears of libraries that are not here: 4-bit values in int32, groups of scales.

As GPTQ's and AWQ's it stores `qweight` and `scales`, has no `weight`, and unpacks in its forward.
"""

import torch
from torch import nn

_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


class PackedLinear(nn.Module):
    """4-bit values, eight in an int32 along the input, and a scale for each group of 32."""

    def __init__(self, dense: nn.Linear, group: int = 32):
        super().__init__()
        self.in_features, self.out_features, self.group = (
            dense.in_features,
            dense.out_features,
            group,
        )
        weight = dense.weight.detach()
        blocks = weight.view(self.out_features, -1, group)
        scales = blocks.abs().amax(2, keepdim=True) / 7
        values = ((blocks / scales).round() + 8).to(torch.int32).view(self.out_features, -1, 8)
        self.register_buffer("qweight", (values << _SHIFTS).sum(2, dtype=torch.int32))
        self.register_buffer("scales", scales.squeeze(2))
        self.register_buffer("bias", dense.bias.detach().clone())

    def unpacked(self):
        values = ((self.qweight.unsqueeze(2) >> _SHIFTS) & 15) - 8
        blocks = values.view(self.out_features, -1, self.group)
        return (blocks * self.scales.unsqueeze(2)).view(self.out_features, -1)

    def forward(self, x):
        return nn.functional.linear(x, self.unpacked().to(x.dtype), self.bias.to(x.dtype))


class NoGradientLinear(PackedLinear):
    """One whose kernel is for inference: its input gets no gradient."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class NoKernelLinear(PackedLinear):
    """One whose kernel is not for this machine."""

    def forward(self, x):
        raise RuntimeError("no kernel image is available for execution on the device")


class RoundingLinear(PackedLinear):
    """One that quantises its input as well, with a gradient straight through."""

    def forward(self, x):
        scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-6) / 7
        return super().forward(x + ((x / scale).round() * scale - x).detach())
