"""Adapted architectures of transformers against dense copies with the weights W + s B A.

The gradients too: dL/dA = s Bᵀ dL/dW and dL/dB = s dL/dW Aᵀ for every adapted linear. What is read,
left out or warned of is named here, so that nothing is passed over silently.
"""

import copy
import re
from collections.abc import Mapping
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from bridge.peft import LoRA, merge
from bridge.peft.branch.kinds.read_linear import ReadLinearAdapter
from bridge.peft.doctor.sample_inputs import sample_inputs
from bridge.peft.model.walk import adapted_modules
from tests.helpers.architectures import ARCHITECTURES, tiny

#: The model's own code reads the weight of these linears and never calls them.
READ = {
    "bloom, slow but exact": {"dense", "dense_4h_to_h"},
    "conditional_detr": {"k_proj"},
    "detr": {"k_proj"},
    "falcon_mamba": {"dt_proj"},
    "jamba": {"dt_proj"},
    "layoutlmv3": {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"},
    "longcat_flash": {"classifier"},
    "mamba": {"dt_proj"},
    "mobilebert": {"dense"},
    "wav2vec2, x-vector": {"kernel"},
    "wavlm": {"k_proj", "out_proj", "q_proj", "v_proj"},
}
#: These compute something else than a linear, or share its weight, and are left out by the plan.
LEFT_OUT = {
    "llama4_text": ({"router"}, "does not answer with"),
    "neomme": ({"embedding_projection", "unembedding_projection"}, "shares its weight"),
    "phimoe": ({"router"}, "does not answer with"),
}
#: What the first forward says of a model that does something else than it seems.
WARNED = {
    "layoutlmv3": "under torch.no_grad",
    "longformer": "were not called in the model's first forward",
    "rwkv": "writes into the base weight",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_output_and_gradients_are_those_of_a_dense_copy(name):
    base, model = tiny(name).requires_grad_(False), tiny(name)
    inputs = sample_inputs(base)
    LoRA(dim=2, alpha=3, seed=0)(model)
    training = name == "rwkv"  # in evaluation it rescales its weights, which is warned of
    for module in (base, model):
        module.train(training)
    layers = dict(adapted_modules(model))
    with _said_of(name if not training else ""):
        assert torch.equal(_output(base, inputs), _output(model, inputs)), "not its base at first"
    _randomise(layers)

    output = _output(model, inputs)
    dense = _dense_copy(base, layers)
    expected = _output(dense, inputs)
    assert _is_close(output, expected)

    _loss(output).backward()
    _loss(expected).backward()
    _check_gradients(layers, {fqn: dense.get_submodule(fqn).weight.grad for fqn in layers})


@pytest.mark.parametrize("name", READ)
def test_linears_that_are_read_are_found_and_merge_into_the_same_function(name):
    model = LoRA(dim=2, alpha=3, seed=0)(tiny(name))
    read = {fqn for fqn, m in adapted_modules(model) if isinstance(m, ReadLinearAdapter)}
    assert _ends(read) >= READ[name]
    inputs = sample_inputs(model)
    _randomise(dict(adapted_modules(model)))
    with torch.no_grad():
        output = _output(model, inputs)
        merge(model)
        assert _is_close(output, _output(model, inputs))


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_cannot_carry_a_branch_is_left_out_with_the_reason(name):
    ends, reason = LEFT_OUT[name]
    skipped = {s.fqn: s.reason for s in LoRA(dim=2).plan(tiny(name)).not_adapted}
    assert ends <= _ends(fqn for fqn, why in skipped.items() if reason in why)


def test_a_model_that_rescales_its_weights_in_evaluation_is_told_of():
    model = LoRA(dim=2, alpha=3, seed=0)(tiny("rwkv")).eval()
    with torch.no_grad(), _said_of("rwkv"):
        model(**sample_inputs(model))


def test_what_is_left_out_is_printed(capsys):
    with capsys.disabled():
        print(f"\n{len(ARCHITECTURES)} architectures against dense copies; left out or said:")
        for name, (ends, reason) in LEFT_OUT.items():
            print(f"  {name}: {', '.join(sorted(ends))} ({reason})")
        for name, warning in WARNED.items():
            print(f"  {name}: {warning}")
    assert len(ARCHITECTURES) >= 45
    for table in (READ, LEFT_OUT, WARNED):
        assert table.keys() <= ARCHITECTURES.keys()


def _said_of(name):
    """The first forward of an architecture that is warned of; of others nothing is said."""
    return pytest.warns(UserWarning, match=WARNED[name]) if name in WARNED else nullcontext()


def _randomise(layers, std=0.1):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_b.weight.normal_(std=std, generator=generator)


def _tensors(output):
    """The floating-point tensors in what a model returns."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if not isinstance(output, tuple | list):
        return []
    return [tensor for item in output for tensor in _tensors(item)]


def _output(model, inputs):
    """All that a model returns, in one row; what is masked out (-inf) is left out."""
    torch.manual_seed(0)
    row = torch.cat([tensor.flatten() for tensor in _tensors(model(**inputs))])
    return row[row.detach().isfinite()]


def _is_close(output, expected):
    atol = 1e-4 * expected.detach().abs().max().item()
    return torch.allclose(output, expected, rtol=1e-4, atol=atol)


def _loss(output):
    generator = torch.Generator().manual_seed(3)
    return (output * torch.randn(output.shape, generator=generator)).sum()


def _dense_copy(base, layers):
    """The base with W + s B A as the plain weights of some linears; these alone are trainable."""
    dense = copy.deepcopy(base).requires_grad_(False)
    for fqn, layer in layers.items():
        update = layer.scale * layer.lora_b.weight.detach() @ layer.lora_a.weight.detach()
        linear = dense.get_submodule(fqn)
        linear.weight = nn.Parameter(linear.weight.detach() + layer.oriented(update))
    return dense


def _check_gradients(layers, weight_gradients):
    largest = max(g.norm() for g in weight_gradients.values() if g is not None)
    for fqn, gradient in weight_gradients.items():
        a, b, scale = layers[fqn].lora_a.weight, layers[fqn].lora_b.weight, layers[fqn].scale
        if gradient is None:  # called, but its output is not used
            assert a.grad is None and b.grad is None, fqn
            continue
        gradient = layers[fqn].oriented(gradient)
        with torch.no_grad():
            expected = {a: scale * b.T @ gradient, b: scale * gradient @ a.T}
        for parameter, want in expected.items():
            assert parameter.grad is not None, fqn
            assert (parameter.grad - want).norm() <= 1e-3 * want.norm() + 1e-5 * largest, fqn


def _ends(fqns):
    """The ends of names, numbers left out: `query_scale.layers.0` is `query_scale.layers`."""
    ends = set()
    for fqn in fqns:
        parts = [part for part in fqn.split(".") if not re.fullmatch(r"\d+", part)]
        ends.add(".".join(parts[-2:]) if fqn[-1].isdigit() else parts[-1])
    return ends
