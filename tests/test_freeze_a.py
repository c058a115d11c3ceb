"""LoRA-FA: A stays as it was drawn, B trains, and backward keeps no input."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bridge.peft import LoRA, load_adapter, save_adapter
from bridge.peft.doctor import doctor
from bridge.peft.errors import AdapterError
from bridge.peft.ops.dispatch import lora_add, lora_linear
from bridge.peft.ops.reference import lora_linear_reference
from tests.helpers import models
from tests.helpers.layers import DoublingLinear


def case(dtype=torch.float32):
    torch.manual_seed(1)
    x, w, bias = torch.randn(3, 50, 40), torch.randn(24, 40), torch.randn(24)
    a, b = torch.randn(4, 40), torch.randn(24, 4)
    t = [v.to(dtype) for v in (x, w, bias, a, b)]
    t[0].requires_grad_()
    t[4].requires_grad_()
    return t


def add(x, w, bias, *rest):
    return lora_add(nn.functional.linear(x, w, bias), x, *rest)


@pytest.mark.parametrize("op", [lora_linear, add], ids=["linear", "add"])
@pytest.mark.parametrize("dropout", [(), (0.4, "pre"), (0.4, "post")], ids=str)
def test_only_h_is_kept_and_gradients_are_those_with_a_trained(op, dropout):
    x, w, bias, a, b = case()
    saved = []
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = op(x, w, bias, a, b, 0.7, *dropout)
    known = {t.data_ptr() for t in (w, bias, a, b)}
    others = [t for t in saved if t.data_ptr() not in known]
    assert sum(t.numel() for t in others) == x.shape[0] * x.shape[1] * a.shape[0]
    assert type(y.grad_fn).__name__.startswith("LoRA")
    got = torch.autograd.grad(y.square().sum(), (x, b))
    torch.manual_seed(5)
    y = op(x, w, bias, a.clone().requires_grad_(), b, 0.7, *dropout)
    want = torch.autograd.grad(y.square().sum(), (x, b))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes_have_the_reference_s_gradients(dtype):
    x, w, bias, a, b = case(dtype)
    a, b = a.float(), b.detach().float().requires_grad_()
    got = torch.autograd.grad(lora_linear(x, w, bias, a, b, 0.7).sum(), (x, b))
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, w, bias, a, b)]
    y = lora_linear_reference(*wide, 0.7)
    want = torch.autograd.grad(y.sum(), (wide[0], wide[4]))
    eps = 8 * torch.finfo(dtype).eps + 1e-6
    for mine, other in zip(got, want, strict=True):
        assert float((mine.double() - other).norm() / other.norm()) < eps


def test_a_trained_weight_still_gets_its_gradient_and_second_derivatives_say_why_not():
    x, w, bias, a, b = case(torch.float64)
    w.requires_grad_()
    got = torch.autograd.grad(lora_linear(x, w, bias, a, b, 0.7).square().sum(), w)
    want = torch.autograd.grad(lora_linear_reference(x, w, bias, a, b, 0.7).square().sum(), w)
    assert_close(got, want)
    y = lora_linear(x, w.detach(), bias, a, b, 0.7).square().sum()
    with pytest.raises(AdapterError, match="second derivatives need the input"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("linear", [nn.Linear, DoublingLinear])
def test_training_moves_b_and_leaves_a(use_dora, linear):
    if use_dora and linear is DoublingLinear:
        linear = nn.Linear
    model = LoRA(dim=2, seed=0, freeze_a=True, use_dora=use_dora)(nn.Sequential(linear(6, 4)))
    layer = model[0]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == ["0.lora_b.weight", "0.lora_magnitude.weight"][: 1 + use_dora]
    assert layer.lora_path().name != "reference"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trained), name


def test_the_plan_counts_what_is_trained_and_what_is_saved():
    base = nn.Sequential(nn.Linear(6, 4))
    plan, whole = LoRA(dim=2, freeze_a=True).plan(base), LoRA(dim=2).plan(base)
    assert (plan.trainable, whole.trainable) == (2 * 4, 2 * 10)
    assert plan.adapter_file_bytes == whole.adapter_file_bytes == 4 * 20
    assert (plan.optimizer_bytes, whole.optimizer_bytes) == (2 * 4 * 8, 2 * 4 * 20)


def test_saved_and_loaded_a_is_frozen_still_and_the_doctor_does_not_mind(tmp_path):
    base = models.llama()
    model = LoRA(target_modules=["q_proj"], dim=2, freeze_a=True)(copy.deepcopy(base))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_()
    save_adapter(model, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained and all("lora_b" in name for name in trained)
    report = doctor(again)
    assert report.healthy, str(report)
    inputs = models.inputs(base)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
