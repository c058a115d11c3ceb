"""What the tests on several ranks ask of an adapted Megatron model, whole whatever the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from bridge.peft import LoRA
from bridge.peft.model.walk import adapted_modules

RECIPE = LoRA(dim=4, alpha=8, seed=1)


def with_random_b(model):
    """Give B values, the same whole ones on any number of ranks, so that A has a gradient."""
    generator = torch.Generator().manual_seed(3)
    for _, layer in adapted_modules(model):
        shape = layer.lora_b.whole().shape
        layer.lora_b.set_whole(torch.randn(shape, generator=generator) * 0.1)
    return model


def trained(model):
    """A and B by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def whole_gradients(model, attribute="grad"):
    """The gradients of A and B, put together of all ranks."""
    return {
        f"{fqn}.{name}": matrix.shard.joined(getattr(matrix.weight, attribute)).clone()
        for fqn, layer in adapted_modules(model)
        for name, matrix in (("a", layer.lora_a), ("b", layer.lora_b))
    }


def whole_logits(model):
    """The logits of one batch over the whole vocabulary."""
    from tests.helpers.megatron import batch, positions

    with torch.no_grad():
        part = model(batch()[0], positions(), None)
    group = model.output_layer.tp_group
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, -1)
