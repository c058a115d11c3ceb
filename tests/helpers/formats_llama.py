"""A Llama with grouped-query attention, an adapter on it, and its dense merged weights."""

from __future__ import annotations

import copy

import torch

from bridge.peft import LoRA, adapter_state_dict
from bridge.peft.formats.convert.layout import AttentionLayout
from bridge.peft.formats.peft.describe import adapter_of
from tests.helpers import models

#: 4 heads of 8 in 2 groups: what `tests.helpers.models` builds.
LAYOUT = AttentionLayout(heads=4, groups=2, head_dim=8, layers=2)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base():
    torch.manual_seed(0)
    return models.llama().eval()


def adapted(target_modules=ALL, **recipe):
    """A Llama with a random adapter, unless told otherwise of rank 3 and alpha 6."""
    model = LoRA(target_modules=target_modules, **{"dim": 3, "alpha": 6, "seed": 1, **recipe})(
        base()
    )
    generator = torch.Generator().manual_seed(2)
    for tensor in adapter_state_dict(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def with_shared_a(model):
    """Give q, k, v one A, and gate, up one."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        for first, *others in (
            (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            (layer.mlp.gate_proj, layer.mlp.up_proj),
        ):
            for other in others:
                other.lora_a.weight.data.copy_(first.lora_a.weight.data)
    return model


def updates(adapter):
    """`scale · B A` of every module, in float64."""
    return {
        fqn: adapter.scale(fqn) * b.double() @ a.double() for fqn, (a, b) in adapter.tensors.items()
    }


def file_of(model):
    return adapter_of(model)
