"""Adapters on experts in one parameter: what they share with those on linears, and what is theirs.

`test_experts_architectures.py` has the numbers, `test_experts_files.py` the files.
"""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from bridge.peft import (
    LoRA,
    adapter_state_dict,
    disable_adapters,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from bridge.peft.branch.kinds.experts import ParameterBranch
from bridge.peft.doctor import doctor
from bridge.peft.errors import AdapterError, TargetError
from bridge.peft.model.walk import adapted_modules
from tests.helpers.moe_architectures import IMPLEMENTATIONS, mixture

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
IDS = torch.arange(3, 27)[None]


def recipe(**options):
    settings = {"target_modules": (), "target_parameters": EXPERTS, "dim": 2, "alpha": 3, "seed": 0}
    return LoRA(**{**settings, **options})


def adapted(how="eager", name="qwen3_moe", std=0.2, **options):
    model = recipe(**options)(mixture(name, how)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in adapted_modules(model):
            layer.lora_b.weight.normal_(std=std, generator=generator)
    return model


def logits(model):
    return model(input_ids=IDS).logits


def experts(model):
    return model.model.layers[0].mlp.experts


# -- names


def test_the_base_keeps_its_names_and_gains_those_of_a_and_b_only():
    base, model = mixture("qwen3_moe"), adapted()
    added = model.state_dict().keys() - base.state_dict().keys()
    assert base.state_dict().keys() < model.state_dict().keys()
    assert added == adapter_state_dict(model).keys()
    first = "model.layers.0.mlp.experts.gate_up_proj_lora.lora_a.weight"
    assert adapter_state_dict(model)[first].shape == (4, 2, 32)
    assert len(added) == 2 * 2 * 2


def test_an_adapter_state_dict_loads_into_another_model_adapted_alike():
    model, other = adapted(), recipe()(mixture("qwen3_moe")).eval()
    missing = other.load_state_dict(adapter_state_dict(model), strict=False)
    assert not missing.unexpected_keys
    assert torch.equal(logits(other), logits(model))


def test_one_class_serves_all_layers_and_outside_a_forward_a_parameter_is_a_parameter():
    model = adapted()
    first, second = (model.get_submodule(f"model.layers.{i}.mlp.experts") for i in (0, 1))
    assert type(first) is type(second)
    assert first.gate_up_proj is first._parameters["gate_up_proj"]
    assert isinstance(first, type(mixture("qwen3_moe").model.layers[0].mlp.experts))


def test_a_depends_on_the_seed_and_the_name_of_the_parameter_alone():
    together, alone = recipe()(mixture("qwen3_moe")), mixture("qwen3_moe")
    recipe(target_parameters=["model.layers.1.mlp.experts.down_proj"])(alone)
    name = "model.layers.1.mlp.experts.down_proj_lora.lora_a.weight"
    assert torch.equal(adapter_state_dict(together)[name], adapter_state_dict(alone)[name])
    a = adapter_state_dict(together)[name]
    assert not torch.equal(a[0], a[1]), "every expert starts from numbers of its own"
    bound = (6 / (a.shape[1] + a.shape[2])) ** 0.5  # of each matrix, not of the stack
    assert 0.9 * bound < a.abs().max() <= bound


# -- targets and plan


def test_every_stack_is_in_the_plan_as_adapted_or_frozen_with_the_entry_that_adapts_it():
    plan = LoRA(target_parameters=["experts.down_proj"], dim=4).plan(mixture("qwen3_moe"))
    rows = {row.fqn: row for row in plan.rows}
    row = rows["model.layers.0.mlp.experts.down_proj"]
    assert (row.stack, row.in_features, row.out_features, row.dim) == (4, 16, 32, 4)
    assert row.trainable == 4 * 4 * (16 + 32) and row.flops_per_token == 2 * 2 * 4 * (16 + 32)
    skipped = {s.fqn: s.reason for s in plan.not_adapted}
    reason = skipped["model.layers.1.mlp.experts.gate_up_proj"]
    assert "(4×32×32), frozen; target_parameters=['experts.gate_up_proj'] adapts it" in reason
    assert "4 of 32×16" in str(plan)
    model = LoRA(target_parameters=["experts.down_proj"], dim=4)(mixture("qwen3_moe"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == plan.trainable


def test_patterns_and_exclusions_act_on_parameters():
    model = recipe(
        rank_pattern={"experts.down_proj": 5},
        alpha_pattern={"*.layers.1.*.gate_up_proj": 7},
        exclude_modules=["*.layers.0.*.down_proj"],
    )(mixture("qwen3_moe"))
    found = {fqn: (m.dim, m.alpha) for fqn, m in adapted_modules(model)}
    assert found == {
        "model.layers.0.mlp.experts.gate_up_proj": (2, 3),
        "model.layers.1.mlp.experts.gate_up_proj": (2, 7),
        "model.layers.1.mlp.experts.down_proj": (5, 3),
    }


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["experts.gate_up_poj"], "did you mean 'gate_up_proj'"),
        (["re:.*nothing"], "matches none of the"),
        (["q_proj.weight"], "belongs to a Linear, which target_modules names"),
    ],
)
def test_an_entry_that_matches_nothing_to_adapt_is_told_with_the_nearest_names(entries, words):
    with pytest.raises(TargetError, match=words):
        recipe(target_parameters=entries).plan(mixture("qwen3_moe"))


def test_a_routers_matrix_can_carry_a_branch():
    model = recipe(target_parameters=["mlp.gate.weight"])(mixture("qwen3_moe")).eval()
    before = logits(model)
    with torch.no_grad():
        for _, layer in adapted_modules(model):
            assert layer.lora_a.weight.shape == (2, 32)
            layer.lora_b.weight.normal_()
    after = logits(model)
    merge(model)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(logits(model), after)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_A_init_method": "pissa"}])
def test_functions_that_are_for_linears_are_refused_before_anything_is_touched(options):
    with pytest.raises(AdapterError, match="is for linears, and target_parameters names other"):
        recipe(**options)


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_a_frozen_a_gets_no_gradient_and_b_the_same_as_beside_a_trained_one(how):
    gradients = []
    for freeze_a in (False, True):
        model = adapted(how, freeze_a=freeze_a)
        logits(model).square().sum().backward()
        branch = experts(model).gate_up_proj_lora
        assert (branch.lora_a.weight.grad is None) == freeze_a
        gradients.append(branch.lora_b.weight.grad)
    torch.testing.assert_close(*gradients)


# -- compute


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_acts_in_training_only_and_is_seeded(how, position):
    model = adapted(how, dropout=0.5, dropout_position=position)
    plain = adapted(how)
    assert torch.equal(logits(model), logits(plain))
    model.train()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(logits(model))
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])  # batched, the base copies whole experts
def test_nothing_of_the_size_of_the_stack_is_saved_for_backward(how):
    model = adapted(how)
    layer = experts(model)
    sizes = []
    own = {p.data_ptr() for p in layer.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            sizes.append(tensor.numel())
        return tensor

    x, weights = torch.randn(2, 32, requires_grad=True), torch.full((2, 1), 1.0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, torch.tensor([[0], [1]]), weights)
    assert max(sizes) < 32 * 32, "an update of one expert has so many elements"


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_half_precision_bases_train_float32_matrices(how):
    model = mixture("qwen3_moe", how).to(torch.bfloat16)
    recipe()(model)
    layer = experts(model)
    assert layer.gate_up_proj_lora.lora_a.weight.dtype == torch.float32
    out = logits(model)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.gate_up_proj_lora.lora_b.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(adapted(how)).isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_activation_checkpointing_gives_the_same_gradients(how, reentrant):
    gradients = []
    for checkpoints in (False, True):
        model = adapted(how, dropout=0.2).train()
        layer, x = experts(model), torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])
        weights = torch.full((6, 2), 0.5)
        torch.manual_seed(5)
        if checkpoints:
            out = checkpoint(layer, x, index, weights, use_reentrant=reentrant)
        else:
            out = layer(x, index, weights)
        out.square().sum().backward()
        gradients.append([p.grad for p in layer.parameters() if p.requires_grad] + [x.grad])
    for plain, other in zip(*gradients, strict=True):
        assert torch.equal(plain, other)


@pytest.mark.parametrize("how", ["grouped_mm", "batched_mm"])
def test_a_compiled_layer_is_one_graph_with_the_same_numbers(how):
    layer = experts(adapted(how, dim=8))
    x, weights = torch.randn(6, 32), torch.full((6, 2), 0.5)
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, index, weights), layer(x, index, weights))
    with disable_adapters(layer):
        base = layer(x, index, weights)
        torch.testing.assert_close(compiled(x, index, weights), base)
    assert not torch.allclose(base, layer(x, index, weights))


class Mixed(nn.Module):
    """Experts that are added up in a way that no branch can take part in."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 4))
        self.how = "einsum"

    def forward(self, x):
        if self.how == "einsum":
            return torch.einsum("ni,eoi->no", x, self.stack)
        if self.how == "sum":
            return x @ self.stack.sum(0)
        if self.how == "plus":
            return x @ (self.stack + 1)[0]
        return x @ self.stack.data[0]


@pytest.mark.parametrize("how", ["einsum", "sum", "plus", "data"])
def test_a_use_that_a_branch_cannot_take_part_in_is_refused_and_never_silent(how):
    model = LoRA(target_modules=(), target_parameters=["stack"], dim=2)(nn.Sequential(Mixed()))
    model[0].how = how
    with pytest.raises((AdapterError, TypeError), match=r"stack is adapted|LowRankWeight"):
        model(torch.randn(2, 4))


def test_a_stack_that_is_read_past_its_module_is_told_of():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Mixed()

        def forward(self, x):
            return x @ self.inner.stack[0]

    model = LoRA(target_modules=(), target_parameters=["stack"], dim=2)(nn.Sequential(Reads()))
    with pytest.warns(UserWarning, match=r"not called in the model's\s+first forward"):
        model(torch.randn(2, 4))


# -- switching off, merging, copies


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_disabled_it_is_its_base_and_merging_and_unmerging_are_exact(how):
    base, model = mixture("qwen3_moe", how), adapted(how)
    before, plain = logits(model), logits(base)
    with disable_adapters(model):
        assert torch.equal(logits(model), plain)
    report = merge(model)
    assert [row.fqn for row in report.rows] == [fqn for fqn, _ in adapted_modules(model)]
    assert all(row.relative_update > 0 for row in report.rows)
    assert model.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits(model), before)
    with disable_adapters(model):
        assert torch.equal(logits(model), plain)
    unmerge(model)
    assert torch.equal(logits(model), before)
    for name, parameter in base.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_copies_and_pickles_have_branches_of_their_own():
    model = adapted()
    before = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), before)
        layer = experts(other)
        assert layer.gate_up_proj_lora.base is layer
        with torch.no_grad():
            layer.gate_up_proj_lora.lora_b.weight.zero_()
        assert not torch.equal(logits(other), before)
    assert torch.equal(logits(model), before)


def test_a_failure_while_adapting_leaves_the_model_as_it_was(monkeypatch):
    model = mixture("qwen3_moe")
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    calls, attach = [], ParameterBranch._attach

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return attach(*args, **kwargs)

    monkeypatch.setattr(ParameterBranch, "_attach", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        recipe()(model)
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_adapted_on_meta_draws_the_same_numbers_when_it_is_materialised():
    whole = recipe()(mixture("qwen3_moe"))
    with torch.device("meta"):
        empty = transformers.Qwen3MoeForCausalLM(mixture("qwen3_moe").config)
    recipe()(empty)
    empty.to_empty(device="cpu")
    for name, tensor in adapter_state_dict(whole).items():
        assert torch.equal(adapter_state_dict(empty)[name], tensor), name


def test_the_doctor_passes_adapted_experts():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = doctor(adapted(target_modules="all-linear"))
    assert not [check for check in report.checks if check.status == "fail"], str(report)


def test_loading_again_into_an_adapted_model_takes_the_values(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    other = recipe()(mixture("qwen3_moe")).eval()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
