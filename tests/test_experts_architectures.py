"""Experts in one parameter, adapted, against dense copies with W + s B A expert by expert."""

import copy

import pytest
import torch
from torch import nn

from bridge.peft import LoRA
from bridge.peft.doctor.sample_inputs import sample_inputs
from bridge.peft.model.walk import adapted_modules
from tests.helpers.moe_architectures import ALL, implementations, mixture, stacks

CASES = [(name, how) for name in ALL for how in implementations(name)]


@pytest.mark.parametrize(("name", "how"), CASES, ids=lambda part: part)
def test_output_and_gradients_are_those_of_dense_experts(name, how):
    base, model = mixture(name, how).requires_grad_(False), mixture(name, how)
    inputs = sample_inputs(base)
    LoRA(target_modules=(), target_parameters=stacks(base), dim=2, alpha=3, seed=0)(model).eval()
    layers = dict(adapted_modules(model))
    assert list(layers) == stacks(base)
    assert torch.equal(logits(model, inputs), logits(base, inputs)), "not its base at first"

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_b.weight.normal_(std=0.1, generator=generator)
    dense = dense_copy(base, layers)
    output, expected = logits(model, inputs), logits(dense, inputs)
    scale = expected.detach().abs().max()
    torch.testing.assert_close(output / scale, expected / scale, rtol=0, atol=1e-5)
    assert (output - logits(base, inputs)).abs().max() > 1e-3 * scale, "the branch has no effect"

    weights = torch.randn(output.shape, generator=generator)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for fqn, layer in layers.items():
        check_gradients(layer, dense.get_parameter(fqn).grad)


def logits(model, inputs):
    return model(**inputs).logits


def dense_copy(base, layers):
    """The base whose experts are W + s B A, added up one by one."""
    dense = copy.deepcopy(base)
    for fqn, layer in layers.items():
        weight = dense.get_parameter(fqn).detach().clone()
        for e in range(len(weight)):
            update = layer.scale * layer.lora_b.weight[e] @ layer.lora_a.weight[e]
            weight[e] += (update.T if layer.transposed else update).detach()
        owner, _, name = fqn.rpartition(".")
        setattr(dense.get_submodule(owner), name, nn.Parameter(weight))
    return dense


def check_gradients(layer, weight_gradient):
    """dL/dA = s Bᵀ dL/dW and dL/dB = s dL/dW Aᵀ, for every expert."""
    a, b = layer.lora_a.weight, layer.lora_b.weight
    gradient = layer.oriented(weight_gradient)
    with torch.no_grad():
        wanted = {
            a: layer.scale * b.mT @ gradient,
            b: layer.scale * gradient @ a.mT,
        }
    for parameter, want in wanted.items():
        assert want.any()
        assert (parameter.grad - want).norm() <= 1e-4 * want.norm()
