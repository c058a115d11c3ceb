"""A linear of a user's own, and a branch with values."""

import torch
from torch import nn


class DoublingLinear(nn.Linear):
    """A user's subclass with a forward of its own."""

    def forward(self, input):
        return super().forward(input) * 2


def make_trained(layer):
    """Give B values other than zero, as training would."""
    with torch.no_grad():
        layer.lora_b.weight.normal_()
    return layer
