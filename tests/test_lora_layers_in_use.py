"""A layer among other things: copied, pickled, compiled, trained, offloaded, quantised."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bridge.peft import LinearAdapter, patch_linear_module
from tests.helpers.layers import DoublingLinear, make_trained

# 12: copying, pickling, compiling.


@pytest.mark.parametrize("kind", [nn.Linear, DoublingLinear])
def test_copies_and_pickles_compute_the_same(kind):
    layer = make_trained(patch_linear_module(kind(6, 5), dim=3))
    x = torch.randn(4, 6)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    clones = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    for clone in clones:
        assert type(clone) is type(layer)
        assert torch.equal(clone(x), layer(x))
        assert clone.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("kind", [nn.Linear, DoublingLinear])
def test_identical_patched_blocks_compile_to_one_graph(kind):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layers = [make_trained(patch_linear_module(kind(8, 8), dim=2)) for _ in range(12)]
    x = torch.randn(3, 8)
    for layer in layers:
        expected = layer(x)
        layer.compile(backend=backend, fullgraph=True)
        torch.testing.assert_close(layer(x), expected)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_one_class_per_base_type():
    first, second = (patch_linear_module(DoublingLinear(2, 2)) for _ in range(2))
    assert type(first) is type(second)


# Training, and what stands around a layer.


def test_training_moves_only_the_branch_and_lowers_the_loss():
    base = nn.Linear(16, 16)
    layer = patch_linear_module(base, dim=4, alpha=8)
    weight = layer.weight.clone()
    x, target = torch.randn(64, 16), torch.randn(64, 16)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(layer.weight, weight)


def test_a_weight_parametrised_by_torch_keeps_its_parametrisation():
    base = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    x = torch.randn(2, 4)
    expected = base(x)
    layer = patch_linear_module(base, dim=2)
    assert torch.equal(layer(x), expected)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_a.weight",
        "lora_b.weight",
    }


def test_linears_with_accelerate_hooks_are_adapted_not_bypassed():
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    model = dispatch_model(nn.Sequential(nn.Linear(3, 3)), device_map={"": "cpu"}, force_hooks=True)
    assert "forward" in vars(model[0])
    layer = make_trained(patch_linear_module(model[0], dim=2))
    x = torch.randn(2, 3)
    expected = LinearAdapter.forward(layer, x)
    assert torch.equal(model(x), expected)
    remove_hook_from_submodules(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("make", ["4bit", "8bit"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_quantised_bases_keep_forward_and_keys_and_train(make):
    import bitsandbytes as bnb

    source = nn.Linear(64, 32)
    if make == "4bit":
        base = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.bfloat16)
        base.load_state_dict(source.state_dict())
    else:
        base = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
        base.load_state_dict(source.state_dict())
    base.to("cpu")
    x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    expected = base(x)
    if make == "4bit":
        with pytest.raises(ValueError, match="uint8.*lora_dtype"):
            patch_linear_module(base)
    keys = set(base.state_dict())
    layer = patch_linear_module(base, dim=4, lora_dtype=torch.bfloat16)
    assert isinstance(layer, LinearAdapter) and isinstance(layer, type(base).__mro__[0])
    assert set(layer.state_dict()) == keys | {"lora_a.weight", "lora_b.weight"}
    assert torch.equal(layer(x), expected)
    make_trained(layer)
    layer(x).sum().backward()
    assert x.grad is not None and layer.lora_a.weight.grad.abs().sum() > 0
    optimizer = torch.optim.SGD([layer.lora_a.weight, layer.lora_b.weight], lr=1e-3)
    optimizer.step()
    assert not torch.equal(layer(x), expected)
