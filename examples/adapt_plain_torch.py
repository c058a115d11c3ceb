"""Adapt a plain torch model, train it, and get the base back bit for bit."""

import torch
from torch import nn

from bridge.peft import LoRA, disable_adapters

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
x = torch.randn(256, 64)
target = x.roll(1, dims=-1)
base_output = model(x)

recipe = LoRA(dim=8, alpha=16)
print(recipe.plan(model))
model = recipe(model)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(101):
    loss = nn.functional.mse_loss(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3}: loss {loss.item():.4f}")

with disable_adapters(model):
    assert torch.equal(model(x), base_output)
print("with adapters disabled the output is the base's, bit for bit")
