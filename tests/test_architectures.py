"""Adapted architectures of transformers against dense copies with the weights W + s B A.

The gradients too: dL/dA = s Bᵀ dL/dW and dL/dB = s dL/dW Aᵀ for every adapted linear. What an
architecture does not call is named here, so that nothing is left out silently.
"""

import copy
import re
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from bridge.peft import LoRA, merge
from bridge.peft.model.walk import adapted_modules
from tests.helpers.architectures import ARCHITECTURES, tiny
from tests.helpers.sample_inputs import sample_inputs

_TDNN = {"kernel"}
#: The model reads the weight of these linears and never calls them: their branch has no effect.
BYPASSED = {
    "bloom, slow but exact": {"dense", "dense_4h_to_h"},
    "conditional_detr": {"k_proj"},
    "detr": {"k_proj"},
    "falcon_mamba": {"dt_proj"},
    "jamba": {"dt_proj"},
    "layoutlmv3": {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"},
    "longcat_flash": {"classifier"},
    "mamba": {"dt_proj"},
    "mobilebert": {"dense"},
    "neomme": {"unembedding_projection"},
    "wav2vec2, x-vector": _TDNN,
    "wavlm": {"k_proj", "out_proj", "q_proj", "v_proj"},
}
#: These take no part in the forward on these inputs: other tasks, other inputs, other tokens.
IDLE = {
    "conditional_detr": {"query_scale.layers"},  # of the first layer
    "esm": {"regression"},  # predicts contacts
    "longformer": {"key_global", "query_global", "value_global"},
    "neomme": {"down_proj", "up_proj"},  # of images
    "switch_transformers": {"wi", "wo"},  # experts that no token is sent to
}
#: These compute something else than a linear, so that a branch beside them is wrong.
NOT_LINEAR = {
    "llama4_text": {"router"},
    "phimoe": {"router"},
}
#: In evaluation its blocks divide what they add; in training they do not.
TRAINING = ("rwkv",)
#: Architectures that cannot be adapted yet, with the error.
BROKEN = {"perceiver": (AttributeError, "_forward_hooks")}
WORKING = [name for name in ARCHITECTURES if name not in BROKEN]


@pytest.mark.parametrize("name", WORKING)
def test_output_and_gradients_are_those_of_a_dense_copy(name):
    base, model = tiny(name).requires_grad_(False), tiny(name)
    inputs = sample_inputs(base)
    exclude = sorted(NOT_LINEAR.get(name, ()))
    LoRA(exclude_modules=exclude, dim=2, alpha=3, seed=0)(model)
    for module in (base, model):
        module.train(name in TRAINING)
    layers = dict(adapted_modules(model))
    assert torch.equal(_output(base, inputs), _output(model, inputs)), "not its base at the start"
    _randomise(layers)

    called, output = _called(model, layers, inputs)
    dense = _dense_copy(base, {fqn: layers[fqn] for fqn in called})
    expected = _output(dense, inputs)
    assert _is_close(output, expected)

    _loss(output).backward()
    _loss(expected).backward()
    _check_gradients(layers, {fqn: dense.get_submodule(fqn).weight.grad for fqn in called})

    missed = {fqn: layer for fqn, layer in layers.items() if fqn not in called}
    bypassed = {fqn for fqn in missed if _matters(dense, fqn, inputs)}
    assert _ends(bypassed) == BYPASSED.get(name, set())
    assert _ends(missed.keys() - bypassed) == IDLE.get(name, set())


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_branch_beside_what_is_not_a_linear_is_wrong(name):
    base, model = tiny(name), LoRA(dim=2, alpha=3, seed=0)(tiny(name))
    inputs = sample_inputs(base)
    layers = dict(adapted_modules(model))
    _randomise(layers)
    output, expected = _output(model, inputs), _output(_dense_copy(base, layers), inputs)
    assert not _is_close(output, expected)


@pytest.mark.parametrize("name", [name for name in BYPASSED if name != "neomme"])
def test_merging_a_bypassed_linear_changes_the_model(name):
    model = LoRA(dim=2, alpha=3, seed=0)(tiny(name))
    inputs = sample_inputs(model)
    _randomise(dict(adapted_modules(model)), std=1.0)
    output = _output(model, inputs)
    merge(model)
    assert not _is_close(output, _output(model, inputs))


@pytest.mark.parametrize("name", TRAINING)
def test_a_model_that_rescales_its_weights_in_evaluation_is_wrong_there(name):
    base, model = tiny(name), LoRA(dim=2, alpha=3, seed=0)(tiny(name))
    inputs = sample_inputs(base)
    layers = dict(adapted_modules(model))
    _randomise(layers)
    dense = _dense_copy(base, layers)
    with torch.no_grad():
        assert not _is_close(_output(model, inputs), _output(dense, inputs))


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_adapted_says_the_known_error(name):
    error, message = BROKEN[name]
    with pytest.raises(error, match=message):
        LoRA(dim=2)(tiny(name))


def test_what_is_left_out_is_printed(capsys):
    with capsys.disabled():
        print(f"\n{len(WORKING)} architectures against dense copies; left out:")
        for title, table in (("bypassed", BYPASSED), ("idle", IDLE), ("not linear", NOT_LINEAR)):
            for name, ends in table.items():
                print(f"  {name}: {', '.join(sorted(ends))} ({title})")
        for name, (error, message) in BROKEN.items():
            print(f"  {name}: {error.__name__}: {message}")
    assert len(WORKING) >= 45
    for table in (BYPASSED, IDLE, NOT_LINEAR):
        assert table.keys() <= ARCHITECTURES.keys()


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


def _called(model, layers, inputs):
    """The adapted modules whose forward the model calls, and its output."""
    called = set()
    hooks = [
        layer.register_forward_hook(lambda *_, fqn=fqn: called.add(fqn))
        for fqn, layer in layers.items()
    ]
    output = _output(model, inputs)
    for hook in hooks:
        hook.remove()
    return called, output


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


@torch.no_grad()
def _matters(model, fqn, inputs):
    """Whether the model's output depends on the weight of a linear."""
    before = _output(model, inputs)
    weight = model.get_submodule(fqn).weight
    kept = weight.detach().clone()
    weight.normal_(generator=torch.Generator().manual_seed(4))
    after = _output(model, inputs)
    weight.copy_(kept)
    return before.shape != after.shape or not torch.equal(before, after)


def _ends(fqns):
    """The ends of names, numbers left out: `query_scale.layers.0` is `query_scale.layers`."""
    ends = set()
    for fqn in fqns:
        parts = [part for part in fqn.split(".") if not re.fullmatch(r"\d+", part)]
        ends.add(".".join(parts[-2:]) if fqn[-1].isdigit() else parts[-1])
    return ends
