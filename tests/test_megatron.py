"""The recipe on a `GPTModel` of Megatron Core, in one process."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from bridge.peft import (
    AdapterError,
    LoRA,
    LoRALinear,
    adapter_state_dict,
    disable_adapters,
    load_adapter,
    merge,
    patch_linear_module,
    save_adapter,
)
from bridge.peft.branch.kinds.megatron import MegatronLoRA
from bridge.peft.branch.options import BranchOptions
from bridge.peft.doctor import doctor
from bridge.peft.errors import AlreadyAdaptedError, TargetError, UnsupportedLinearError
from bridge.peft.model import adapt
from bridge.peft.model.walk import adapted_modules
from bridge.peft.ops.reference import lora_branch_reference
from bridge.peft.parallel.megatron import LinearLayout
from tests.helpers.doubles import megatron_te
from tests.helpers.megatron import (
    MOE,
    TARGETS,
    batch,
    cuda_calls_answered_by_the_cpu,
    gpt,
    loss_of,
    positions,
)
from tests.helpers.megatron_ranks import RECIPE, trained, whole_gradients, with_random_b

pytestmark = pytest.mark.usefixtures("one_megatron_rank")
FUSED = [
    f"decoder.layers.{i}.{name}"
    for i in range(2)
    for name in (
        "self_attention.linear_proj",
        "self_attention.linear_qkv",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
]


def logits(model):
    with torch.no_grad():
        return model(batch()[0], positions(), None)


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"])
def test_the_recipe_wraps_the_four_linears_of_every_layer(targets):
    model = gpt()
    names, before = set(model.state_dict()), logits(model)
    plan = LoRA(dim=4, target_modules=targets).plan(model)
    assert [row.fqn for row in plan.rows] == FUSED
    assert {row.path for row in plan.rows} == {"branch"}
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    LoRA(dim=4, target_modules=targets)(model)
    assert [fqn for fqn, _ in adapted_modules(model)] == FUSED
    assert all(isinstance(m, LoRALinear) for _, m in adapted_modules(model))
    new = {f"{f}.adapter.linear_{side}.weight" for f in FUSED for side in ("in", "out")}
    assert set(model.state_dict()) - names == new == set(adapter_state_dict(model))
    assert names <= set(model.state_dict())
    assert plan.trainable == sum(p.numel() for p in trained(model).values())
    assert torch.equal(logits(model), before)  # B is zero


def test_a_base_checkpoint_loads_with_only_the_adapters_keys_missing():
    model = RECIPE(gpt(seed=5))
    missing, unexpected = model.load_state_dict(gpt().state_dict(), strict=False)
    assert not unexpected and set(missing) == set(adapter_state_dict(model))
    assert torch.equal(logits(model), logits(gpt()))
    model.load_state_dict(model.state_dict())  # strictly


def test_disabled_it_is_its_base_and_a_copy_computes_the_same():
    model = with_random_b(RECIPE(gpt()))
    expected = logits(model)
    with disable_adapters(model):
        assert torch.equal(logits(model), logits(gpt()))
    layer = model.decoder.layers[0].mlp.linear_fc1
    assert torch.equal(
        copy.deepcopy(layer.adapter)(torch.ones(2, 1, 32)), layer.adapter(torch.ones(2, 1, 32))
    )
    assert torch.equal(logits(model), expected)


def test_an_adapter_that_cannot_be_made_leaves_the_model_as_it_was(monkeypatch):
    model = gpt()
    modules = dict(model.named_modules())
    monkeypatch.setattr(adapt, "train_in_full", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        RECIPE(model)
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())


def test_the_doctor_finds_a_trained_model_healthy():
    model = with_random_b(RECIPE(gpt()))
    inputs = {"input_ids": batch()[0], "position_ids": positions(), "attention_mask": None}
    report = doctor(model, inputs=inputs)
    assert report.healthy and all(check.status == "pass" for check in report.checks), report


@pytest.mark.parametrize("again", ["uniform", "block", "core_attn", "mlp", "layernorm"])
@pytest.mark.parametrize("targets", [TARGETS, ["linear_fc2"]], ids=["all", "fc2"])
def test_recompute_brings_gradients_to_the_first_block(again, targets):
    settings = {"recompute_granularity": "selective", "recompute_modules": [again]}
    if again in ("uniform", "block"):
        settings = {"recompute_granularity": "full", "recompute_method": again}
        settings["recompute_num_layers"] = 1
    recipe = dataclasses.replace(RECIPE, target_modules=targets, dropout=0.5)
    found = []
    for config in ({}, settings):
        with cuda_calls_answered_by_the_cpu():  # for the random states
            model = with_random_b(recipe(gpt(**config))).train()
            torch.manual_seed(7)
            loss_of(model).backward()
        found.append(whole_gradients(model))
    assert all(bool(g.any()) for g in found[1].values())
    # a norm rounds otherwise with gradients than without
    close = {"rtol": 1e-4, "atol": 1e-7} if again == "layernorm" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found[1], found[0], **close)


def test_without_recompute_the_backward_ends_at_the_first_branch():
    model = RECIPE(gpt())
    inputs = []
    model.decoder.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
    )
    loss_of(model)
    assert not inputs[0].requires_grad


def test_experts_of_a_sequential_mlp_are_adapted_and_grouped_ones_refused(monkeypatch):
    from megatron.core.transformer.moe import grouped_gemm_util

    with cuda_calls_answered_by_the_cpu():
        plan = LoRA(dim=4).plan(gpt(**MOE))
        experts = [row.fqn for row in plan.rows if ".experts.local_experts." in row.fqn]
        assert len(experts) == 2 * 4 * 2
        # its own kernels are not installed here, and not needed to build it
        monkeypatch.setattr(grouped_gemm_util, "assert_grouped_gemm_is_available", lambda: None)
        grouped = gpt(grouped_gemm=True, **MOE)
    with pytest.raises(TargetError, match="GroupedMLP.*moe_grouped_gemm=False"):
        LoRA(target_modules=["experts"])(grouped)
    (skipped,) = {s.reason for s in LoRA().plan(grouped).not_adapted if "experts" in s.fqn}
    assert "several experts in one" in skipped


def test_what_cannot_be_adapted_says_why_and_what_to_do():
    column = gpt().decoder.layers[0].mlp.linear_fc1
    with pytest.raises(UnsupportedLinearError, match=r"wrapped, not patched.*LoRA\(\.\.\.\)"):
        patch_linear_module(column)
    with pytest.raises(AlreadyAdaptedError):
        RECIPE(RECIPE(gpt()))
    for change, message in (
        ({"gather_output": True}, "gathers its output"),
        ({"weight": None}, "no weight of its own"),
        ({"pipeline": 2}, "pipeline_model_parallel_size=1"),
        ({"experts": 2}, "expert_model_parallel_size=1"),
        ({"tensor": 2}, "expert_tensor_parallel_size=2"),
    ):
        model = gpt(num_layers=1)
        for name in ("self_attention.linear_qkv", "mlp.linear_fc1"):
            linear = model.decoder.layers[0].get_submodule(name)
            linear.config = copy.copy(linear.config)
            linear.is_expert = "experts" in change or "tensor" in change
            linear.config.pipeline_model_parallel_size = change.get("pipeline", 1)
            linear.config.expert_model_parallel_size = change.get("experts", 1)
            linear.config.tensor_model_parallel_size = change.get("tensor", 1)
            linear.gather_output = change.get("gather_output", False)
            linear.weight = change.get("weight", linear.weight)
        with pytest.raises(TargetError, match=message):
            LoRA(target_modules=["linear_qkv"])(model)


def test_a_model_in_megatrons_own_ddp_is_refused():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model = gpt()
    with cuda_calls_answered_by_the_cpu():
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    with pytest.raises(AdapterError, match="adapt the model first"):
        RECIPE(wrapped)


DOUBLES = [
    megatron_te.TEColumnParallelLinear,
    megatron_te.TERowParallelLinear,
    megatron_te.TELayerNormColumnParallelLinear,
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double", DOUBLES, ids=lambda cls: cls.__name__)
def test_a_double_of_transformer_engines_linears_takes_the_branch(double, bias, tmp_path):
    model = nn.Sequential(double(8, 6, bias))
    base = model[0]
    x = torch.randn(5, 2, 8)
    out, expected_bias = model(x)
    with_random_b(LoRA(dim=2, alpha=4)(model))
    layer = model[0]
    fed = x
    if "LayerNorm" in double.__name__:
        fed = nn.functional.layer_norm(x, (8,), base.layer_norm_weight)
    branch = lora_branch_reference(fed, layer.lora_a.weight, layer.lora_b.weight, 2.0)
    got, got_bias = model(x)
    torch.testing.assert_close(got, out + branch)
    assert got_bias is expected_bias
    with disable_adapters(model):  # in the form that the model knows
        got, got_bias = model(x)
    assert torch.equal(got, out) and got_bias is expected_bias
    merge(model)
    torch.testing.assert_close(model(x)[0], out + branch)
    assert set(model.state_dict()) == {f"0.{name}" for name in base.state_dict()}


def test_a_double_with_a_layer_norm_answers_as_before_once_the_wrapper_is_off(monkeypatch):
    model = nn.Sequential(megatron_te.TELayerNormColumnParallelLinear(8, 6))
    base = model[0]
    monkeypatch.setattr(adapt, "train_in_full", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LoRA(dim=2)(model)
    assert model[0] is base and base.return_layernorm_output is False


def test_the_mode_of_transformer_engines_linear_tells_an_expert():
    linear = megatron_te.TEColumnParallelLinear(8, 6)
    assert not LinearLayout.of(linear).is_expert
    linear.parallel_mode = None  # as Megatron sets it where a token dispatcher communicates
    assert LinearLayout.of(linear).is_expert


def test_the_adapter_stands_in_a_lora_linear_by_itself():
    base = gpt().decoder.layers[0].mlp.linear_fc2.requires_grad_(False)
    adapter = MegatronLoRA(base, BranchOptions(dim=2, alpha=4), start=3)
    nn.init.normal_(adapter.linear_out.weight)
    x = torch.randn(5, 2, 48)
    out, bias = LoRALinear(base, adapter)(x)
    expected = lora_branch_reference(x, adapter.linear_in.weight, adapter.linear_out.weight, 2.0)
    torch.testing.assert_close(out, base(x)[0] + expected)
    assert bias is None


def test_adapted_on_meta_it_is_drawn_when_the_memory_is_there(tmp_path):
    with torch.device("meta"):
        model = gpt()
    for parameter in model.parameters():
        assert parameter.is_meta
    RECIPE(model)
    model.to_empty(device="cpu")
    expected = adapter_state_dict(RECIPE(gpt()))
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(tensor, expected[name]), name
    for parameter in trained(model).values():
        assert hasattr(parameter, "tensor_model_parallel")


def test_a_file_of_another_base_is_told(tmp_path):
    save_adapter(RECIPE(gpt()), tmp_path)
    with pytest.warns(UserWarning, match="not the one that the adapter was made on"):
        load_adapter(gpt(seed=9), tmp_path)
