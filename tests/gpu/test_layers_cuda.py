"""The layers on a CUDA device: what the CPU suite proves, once more where kernels differ."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bridge.peft import LoRA, disable_adapters, merge, patch_linear_module, unmerge

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_layer(dtype=torch.bfloat16, **options):
    return patch_linear_module(nn.Linear(256, 512, device="cuda", dtype=dtype), dim=16, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 1024])
def test_output_is_bit_exact_base_at_init(dtype, tokens):
    layer = make_layer(dtype)
    x = torch.randn(tokens, 256, device="cuda", dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_agree_with_float64(dtype):
    layer = make_layer(dtype)
    with torch.no_grad():
        layer.lora_b.weight.normal_(std=0.1)
    x = torch.randn(4, 64, 256, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(4, 64, 512, device="cuda", dtype=dtype)
    layer(x).backward(dy)
    exact = patch_linear_module(nn.Linear(256, 512, device="cuda", dtype=torch.float64), dim=16)
    exact.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    x64 = x.detach().double().requires_grad_()
    exact(x64).backward(dy.double())
    limit = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    pairs = [(x.grad, x64.grad)]
    pairs += [
        (getattr(layer, n).weight.grad, getattr(exact, n).weight.grad) for n in ("lora_a", "lora_b")
    ]
    for actual, expected in pairs:
        assert (actual.double() - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_is_reproducible_from_the_seed_and_off_in_eval(position):
    layer = make_layer(dropout=0.3, dropout_position=position)
    with torch.no_grad():
        layer.lora_b.weight.normal_()
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_starts_from_the_same_numbers_on_either_device():
    on_cpu = LoRA(dim=4, seed=3)(nn.Sequential(nn.Linear(8, 8)))
    on_gpu = LoRA(dim=4, seed=3)(nn.Sequential(nn.Linear(8, 8, device="cuda")))
    assert torch.equal(on_cpu[0].lora_a.weight, on_gpu[0].lora_a.weight.cpu())


@torch.no_grad()
def test_merge_unmerge_and_disabling_are_exact():
    model = LoRA(dim=4)(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).cuda().bfloat16())
    for layer in model:
        layer.lora_b.weight.normal_()
    x = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    weights = [layer.weight.clone() for layer in model]
    adapted = model(x)
    with disable_adapters(model):
        base = model(x)
    merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=5e-2, atol=5e-1)
    with disable_adapters(model):
        assert torch.equal(model(x), base)
    unmerge(model)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(model, weights, strict=True))


def test_compiled_layer_computes_the_same():
    layer = make_layer()
    with torch.no_grad():
        layer.lora_b.weight.normal_(std=0.1)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    expected = layer(x)
    torch.testing.assert_close(
        torch.compile(layer, fullgraph=True)(x), expected, rtol=2e-2, atol=0.1
    )
