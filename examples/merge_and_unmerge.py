"""Merge an adapter into bfloat16 weights, read the report, and go back."""

import torch
from torch import nn

from bridge.peft import LoRA, merge, unmerge

torch.manual_seed(0)
model = LoRA(dim=8, alpha=16)(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).bfloat16())
with torch.no_grad():
    for scale, layer in zip((2e-2, 2e-5), model, strict=True):
        layer.lora_b.weight.normal_(std=scale)  # an update of some size, and a very small one

before = [layer.weight.clone() for layer in model]
print(merge(model))
unmerge(model)
assert all(torch.equal(layer.weight, w) for layer, w in zip(model, before, strict=True))
print("the base weights are back, bit for bit")
