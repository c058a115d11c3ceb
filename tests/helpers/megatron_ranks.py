"""What the tests on several ranks ask of an adapted Megatron model, whole whatever the ranks."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist

from bridge.peft import LoRA, adapter_state_dict
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


def megatron_loop(model):
    """Three steps of Megatron's own DDP, `finalize_model_grads` and clipping optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from tests.helpers.megatron import loss_of

    settings = OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.01, clip_grad=0.1, bf16=False, fp16=False
    )
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(overlap_grad_reduce=False), model
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = get_megatron_optimizer(settings, [wrapped])
    norms, gradients = [], {}
    for step in range(3):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        loss_of(wrapped, step).backward()
        finalize_model_grads([wrapped])
        if not gradients:
            gradients = whole_gradients(model, "main_grad")
        result: Any = optimizer.step()
        updated, norm, _ = result
        assert updated
        norms.append(norm)
    return gradients, torch.tensor(norms), adapter_state_dict(model)
