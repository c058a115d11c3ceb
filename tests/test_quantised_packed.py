"""Quantised linears of libraries that are not here or not known, and float8 without its kernel."""

from abc import ABC

import pytest
import torch
from torch import nn
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import FP8Linear, _dequantize_fp8_weight

from bridge.peft import (
    AdapterError,
    LoRA,
    disable_adapters,
    load_adapter,
    merge,
    patch_linear_module,
    save_adapter,
    unmerge,
)
from bridge.peft.branch.quantised import input_gradients
from bridge.peft.branch.quantised.table import dense_weight, format_of
from bridge.peft.doctor import doctor
from bridge.peft.errors import UnsupportedLinearError
from tests.helpers.doubles.packed_linear import (
    NoGradientLinear,
    NoKernelLinear,
    PackedLinear,
    RoundingLinear,
)
from tests.helpers.quantised import N_IN, N_OUT, dense_linear

X = torch.randn(5, N_IN, generator=torch.Generator().manual_seed(2))


def trained(model):
    LoRA(dim=4, seed=0)(model)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if hasattr(module, "lora_b"):
            shape = module.lora_b.weight.shape
            module.lora_b.weight.data.copy_(torch.randn(shape, generator=generator) * 0.02)
    return model


def net(kind=PackedLinear):
    return nn.Sequential(dense_linear(), nn.ReLU(), kind(dense_linear(seed=1)))


def test_a_packed_linear_that_nobody_knows_carries_a_branch_and_is_named_in_the_plan():
    base = net()
    plan = LoRA(dim=4).plan(base)
    assert [(row.base_type, row.quantised) for row in plan.rows] == [
        ("Linear", None),
        ("PackedLinear", "packed (tests)"),
    ]
    size = (N_IN // 8 + N_IN // 32) * 4 * N_OUT
    assert "of it" in str(plan) and plan.quantised[0].bytes == size
    expected = base(X)
    model = LoRA(dim=4)(base)
    assert torch.equal(model(X), expected)
    assert model[2].lora_path().name == "branch"
    assert {k for k in model[2].state_dict() if "lora" not in k} == {"qweight", "scales", "bias"}


def test_its_gradients_are_those_of_the_weight_that_it_unpacks():
    model = trained(net())
    dense = nn.Linear(N_IN, N_OUT)
    dense.weight.data, dense.bias.data = model[2].unpacked(), model[2].bias.clone()
    oracle = trained(nn.Sequential(dense_linear(), nn.ReLU(), dense))
    for one in (model, oracle):
        one(X).square().sum().backward()
    for layer in (0, 2):
        for name in ("lora_a", "lora_b"):
            ours, theirs = (getattr(m[layer], name).weight.grad for m in (model, oracle))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_it_is_saved_loaded_disabled_doctored_merged_and_unmerged(tmp_path):
    model = trained(net())
    base, adapted = net()(X), model(X)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(net(), tmp_path, strict=True)(X), adapted)
    with disable_adapters(model):
        assert torch.equal(model(X), base)
    assert doctor(model, inputs={"input": X}).healthy
    torch.testing.assert_close(dense_weight(model[2]), model[2].unpacked(), rtol=1e-5, atol=1e-6)
    merge(model, dense_dtype=torch.float32)
    torch.testing.assert_close(model(X), adapted, rtol=1e-4, atol=1e-5)
    assert set(model[2].state_dict()) == {"weight", "bias"}
    with disable_adapters(model):
        assert torch.equal(model(X), base)
    unmerge(model)
    assert torch.equal(model(X), adapted)
    with pytest.raises(AdapterError, match="2 is packed .* cannot quantise again"):
        merge(model, requantize=True)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(NoGradientLinear, "gives its input no gradient"), (NoKernelLinear, "no kernel image is av")],
)
def test_one_that_would_stop_the_gradient_is_refused_before_anything_is_touched(kind, reason):
    model = nn.Sequential(kind(dense_linear()))
    with pytest.raises(UnsupportedLinearError, match=reason):
        patch_linear_module(model[0], dim=4, lora_dtype=torch.float32)
    with pytest.raises(AdapterError, match=f"the first is 0: .*{reason}"):
        LoRA(dim=4)(model)
    assert type(model[0]) is kind and set(model.state_dict()) == {"0.qweight", "0.scales", "0.bias"}
    mixed = net(kind)
    plan = LoRA(dim=4).plan(mixed)
    assert [row.fqn for row in plan.rows] == ["0"] and reason in plan.not_adapted[0].reason


def test_one_that_quantises_its_input_trains_and_is_not_merged():
    model = trained(net(RoundingLinear))
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.any() and model[2].lora_b.weight.grad.any()
    with pytest.raises(
        AdapterError, match=r"2: a RoundingLinear of tests answers otherwise than W x \+ b"
    ):
        merge(model)
    assert not any(module.merged for module in (model[0], model[2]))


def test_a_class_is_tried_once_and_its_modules_stay_untouched():
    calls = []

    class CountingLinear(PackedLinear):
        def forward(self, x):
            calls.append(x.shape)
            self.seen = x  # what a forward sets is set on a copy
            return super().forward(x)

    model = nn.Sequential(*(CountingLinear(dense_linear()) for _ in range(4)))
    LoRA(dim=4).plan(model)
    assert len(calls) == 1 and not any(hasattr(module, "seen") for module in model)
    assert input_gradients.no_gradient_reason(model[0], format_of(model[0])) is None


def test_what_is_called_a_linear_and_is_not_packed_is_left_alone():
    class RouterLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x

    model = nn.Sequential(dense_linear(), RouterLinear())
    plan = LoRA(dim=4).plan(model)
    assert [row.fqn for row in plan.rows] == ["0"]
    with pytest.raises(UnsupportedLinearError, match=r"neither a torch.nn.Linear nor"):
        patch_linear_module(model[1], dim=4)


def float8(block=(32, 32), **more):
    """A linear as transformers loads it from a float8 checkpoint."""
    layer = FP8Linear(N_IN, N_OUT, block_size=block, has_bias=True, **more)
    form, weight = format_of(layer), dense_linear().weight.detach()
    form.put(layer, form.pack(weight, form.settings(form.packed(layer))))
    layer.bias = nn.Parameter(dense_linear().bias.detach())
    return layer


@pytest.fixture
def float8_kernel_replaced_by_dequantising(monkeypatch):
    """The real kernel needs a GPU: in its place the dense product, in bfloat16 as it answers."""

    def fp8_linear(x, weight, scales, block_size, bias, *others):
        dense = _dequantize_fp8_weight(weight, scales, block_size, torch.float32)
        return nn.functional.linear(x.float(), dense, bias).to(x.dtype)

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", fp8_linear)
    monkeypatch.setattr(input_gradients, "_TRIED", {})


def test_a_float8_checkpoints_linear_is_refused_where_its_kernel_does_not_run(monkeypatch):
    monkeypatch.setattr(input_gradients, "_TRIED", {})
    with pytest.raises(AdapterError, match="its own forward and backward do not run here"):
        LoRA(dim=4)(nn.Sequential(float8()))


@pytest.mark.usefixtures("float8_kernel_replaced_by_dequantising")
@pytest.mark.parametrize("block", [(32, 32), (48, 48), None])
def test_a_float8_checkpoints_linear_trains_and_merges(block):
    base = float8(block)
    dense = _dequantize_fp8_weight(base.weight, base.weight_scale_inv, block, torch.float32)
    assert torch.equal(dense_weight(base), dense)
    torch.testing.assert_close(dense, dense_linear().weight, rtol=0.07, atol=2e-3)
    x = X.to(torch.bfloat16).requires_grad_()
    expected = base(x)
    assert LoRA(dim=4).plan(nn.Sequential(base)).rows[0].quantised.startswith("float8")
    model = trained(nn.Sequential(base))
    with disable_adapters(model):
        assert torch.equal(model(x), expected)
    adapted = model(x)
    adapted.float().sum().backward()
    exact = dense + model[0].scale * model[0].lora_b.weight @ model[0].lora_a.weight
    torch.testing.assert_close(x.grad.float(), exact.sum(0).expand(5, -1), rtol=0.05, atol=0.05)
    assert model[0].lora_a.weight.grad.any() and model[0].lora_b.weight.grad.any()
    for requantize in (False, True):
        report = merge(model, requantize=requantize)
        assert report.rows[0].max_error < (0.05 if requantize else 0.005)
        torch.testing.assert_close(model(x), adapted, rtol=0.1, atol=0.1 if requantize else 0.03)
        unmerge(model)
        assert torch.equal(model(x), adapted)


def test_a_linear_that_is_compressed_is_refused_with_what_it_holds():
    model = nn.Sequential(dense_linear(), dense_linear())
    del model[1].weight  # as compressed-tensors leaves it until the first forward
    model[1].weight_packed = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), False)
    plan = LoRA(dim=4).plan(model)
    assert [row.fqn for row in plan.rows] == ["0"]
    assert "it has no weight, but bias, weight_packed; load the mo" in plan.not_adapted[0].reason
    with pytest.raises(UnsupportedLinearError, match="it has no weight"):
        patch_linear_module(model[1], dim=4)


def test_a_class_of_another_layout_in_memory_is_refused_by_name():
    class Foreign(ABC):  # noqa: B024 - as optimum-quanto's QModuleMixin
        pass

    class ForeignLinear(Foreign, nn.Linear):
        pass

    with pytest.raises(UnsupportedLinearError, match="has a layout in memory of its own"):
        patch_linear_module(ForeignLinear(4, 4))
