"""GPT-2's `Conv1D`, a linear with a transposed weight, is adapted like any other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bridge.peft import LoRA, adapter_state_dict, disable_adapters, merge, unmerge
from bridge.peft.branch.registry import features, kind_of
from bridge.peft.lora_layers import patch_linear_module
from tests.helpers import models


def trained_conv() -> nn.Module:
    layer = patch_linear_module(Conv1D(5, 3), dim=2, alpha=4)
    with torch.no_grad():
        layer.lora_b.weight.normal_()
    return layer


def test_only_conv1d_is_transposed():
    assert kind_of(Conv1D).transposed
    assert not kind_of(nn.Linear).transposed
    assert features(Conv1D(5, 3)) == features(nn.Linear(3, 5)) == (3, 5)


def test_state_dict_keeps_the_base_names_and_peft_s_shapes():
    shapes = {name: tuple(t.shape) for name, t in trained_conv().state_dict().items()}
    assert shapes == {
        "weight": (3, 5),
        "bias": (5,),
        "lora_a.weight": (2, 3),
        "lora_b.weight": (5, 2),
    }


def test_output_is_the_base_and_the_branch():
    layer = trained_conv()
    x = torch.randn(2, 4, 3)
    dense = layer.weight.t() + layer.scale * layer.lora_b.weight @ layer.lora_a.weight
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.bias))


def test_merge_is_exact_and_unmerge_restores_bit_for_bit():
    layer = nn.Sequential(trained_conv())
    before = layer[0].weight.clone()
    x = torch.randn(4, 3)
    expected = layer(x)
    merge(layer)
    torch.testing.assert_close(layer(x), expected)
    unmerge(layer)
    assert torch.equal(layer[0].weight, before)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(copied):
    layer = trained_conv()
    x = torch.randn(4, 3)
    assert torch.equal(copied(layer)(x), layer(x))


def test_gpt2_plans_trains_and_gives_its_base_back():
    model = models.gpt2().eval()
    batch = models.inputs(model)
    base = model(**batch).logits
    recipe = LoRA(dim=2)
    plan = recipe.plan(model)
    shapes = {(r.fqn.split(".", 3)[3], r.out_features, r.in_features) for r in plan.rows}
    assert ("attn.c_attn", 96, 32) in shapes
    assert len(plan.rows) == 8
    recipe(model)
    assert plan.trainable == sum(t.numel() for t in adapter_state_dict(model).values())
    assert torch.equal(model(**batch).logits, base)
    losses = models.train_a_little(model)
    assert losses[-1] < losses[0]
    with disable_adapters(model):
        assert torch.equal(model(**batch).logits, base)
