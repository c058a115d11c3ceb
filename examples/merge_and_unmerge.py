"""Merge an adapter into bfloat16 weights, read the report, and go back."""

import torch
from torch import nn

from bridge.peft import LoRA, merge, unmerge

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).bfloat16()
model = LoRA(dim=8, alpha=16)(model)
with torch.no_grad():  # an update of some size, and a very small one
    model.get_parameter("0.lora_b.weight").normal_(std=2e-2)
    model.get_parameter("1.lora_b.weight").normal_(std=2e-5)

before = {name: p.clone() for name, p in model.named_parameters()}
print(merge(model))
unmerge(model)
assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
print("the base weights are back, bit for bit")
