"""The first forward tells which branches took no part; then nothing is left of the watch."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bridge.peft import AdapterError, LoRA, adapter_state_dict, merge, patch_linear_module
from bridge.peft.branch.kinds.read_linear import ReadLinearAdapter


class Hidden(nn.Module):
    """Reads a weight in a way that no source shows."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        weights = dict(self.named_parameters())
        return self.used(x) + F.linear(x, weights["read.weight"])


class Reads(nn.Module):
    """Hands a weight to a function, as WavLM and Mamba do; one of a list, too."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.parts = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x):
        if self.proj.weight.dtype != x.dtype:
            raise TypeError
        return F.linear(x, self.proj.weight) + x @ self.parts[0].weight.t()


class Experts(nn.Module):
    """Only the first expert gets tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x):
        return self.experts[0](x)


class Quiet(nn.Module):
    """Computes one of its linears without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.index, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            gate = self.index(x)
        return self.out(x) * gate


class Writes(nn.Module):
    """Rescales a weight in its forward, as RWKV does in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            self.out.weight.div_(2)
        return self.out(x)


def trained(model):
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_b"):
                module.lora_b.weight.normal_()
    return model


def test_a_linear_that_is_never_called_is_named_and_not_merged():
    model = trained(LoRA(dim=2)(nn.Sequential(Hidden())))
    with pytest.warns(UserWarning, match=r"1 of 2 adapted linears were not called.*0\.read"):
        model(torch.randn(2, 8))
    model(torch.randn(2, 8))  # said once
    with pytest.raises(AdapterError, match=r"0\.read was never called"):
        merge(model)


def test_a_linear_that_is_called_later_after_all_is_merged():
    model = trained(LoRA(dim=2)(Hidden()))
    with pytest.warns(UserWarning, match="read"):
        model(torch.randn(2, 8))
    model.read(torch.randn(2, 8))
    merge(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_watches_its_own_first_forward(copied):
    model = LoRA(dim=2)(nn.Sequential(Hidden()))
    other = copied(model)
    for one in (model, other):
        with pytest.warns(UserWarning, match=r"0\.read"):
            one(torch.randn(2, 8))


def test_the_watch_leaves_no_hooks():
    model = LoRA(dim=2, target_modules=["used"])(nn.Sequential(Hidden()))
    model(torch.randn(2, 8))
    modules = [m for m in model.modules() if m is not model]  # the model's inputs keep theirs
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert not model._forward_hooks and model[0].used.on_call is None


def test_idle_experts_are_not_taken_for_bypassed_linears():
    model = trained(LoRA(dim=2)(Experts()))
    model(torch.randn(2, 8))
    merge(model)


def test_weights_that_source_reads_read_with_the_branch_in_them_and_train():
    model = trained(LoRA(dim=2, alpha=3)(Reads()))
    assert isinstance(model.proj, ReadLinearAdapter)
    assert isinstance(model.parts[0], ReadLinearAdapter)
    x = torch.randn(4, 8)
    dense = [
        layer.base_weight + layer.scale * layer.lora_b.weight @ layer.lora_a.weight
        for layer in (model.proj, model.parts[0])
    ]
    wanted = F.linear(x, dense[0]) + x @ dense[1].t()
    torch.testing.assert_close(model(x), wanted)
    model(x).square().sum().backward()
    assert all(layer.lora_a.weight.grad is not None for layer in (model.proj, model.parts[0]))
    merge(model)
    torch.testing.assert_close(model(x), wanted)


def test_a_read_linear_keeps_names_copies_and_loads():
    model = trained(LoRA(dim=2)(Reads()))
    names = {n for n in model.state_dict() if n.startswith("proj")}
    wanted = {"proj.weight", "proj.bias", "proj.lora_a.weight", "proj.lora_b.weight"}
    assert names == wanted
    x = torch.randn(4, 8)
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other(x), model(x))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other.bfloat16()(x.bfloat16()), model.bfloat16()(x.bfloat16()))


def test_the_plan_says_who_reads_a_weight_and_that_dropout_does_not_act_there():
    plan = LoRA(dim=2, dropout=0.1, target_modules=["proj"]).plan(Reads())
    assert "Reads reads its weight" in plan.rows[0].reason
    assert "where dropout cannot act" in plan.notes[0]


def test_branches_under_no_grad_are_named_and_reentrant_checkpoints_are_not():
    with pytest.warns(UserWarning, match=r"^index: computed under torch\.no_grad"):
        LoRA(dim=2)(Quiet())(torch.randn(2, 8))

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return checkpoint(self.fc, x, use_reentrant=True)

    LoRA(dim=2)(Checkpointed())(torch.randn(2, 8, requires_grad=True)).sum().backward()


def test_a_base_weight_that_the_forward_writes_is_named():
    with pytest.warns(UserWarning, match="^out: the model's forward writes into the base weight"):
        LoRA(dim=2)(Writes())(torch.randn(2, 8))


def test_a_layer_that_another_library_replaced_is_named_before_anything_is_computed():
    model = LoRA(dim=2)(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model[1] = nn.Linear(8, 8)
    for use in (lambda: model(torch.randn(2, 8)), lambda: adapter_state_dict(model)):
        with pytest.raises(AdapterError, match="^1 was adapted and is a Linear now"):
            use()


def test_a_model_cast_after_adapting_is_told_of():
    model = LoRA(dim=2)(nn.Sequential(nn.Linear(8, 8))).bfloat16()
    with pytest.warns(UserWarning, match="made in float32 and cast to bfloat16"):
        model(torch.randn(2, 8, dtype=torch.bfloat16))


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1), x


class Wide(nn.Linear):
    def forward(self, x):
        return super().forward(x).repeat(1, 2)


@pytest.mark.parametrize("kind", [Router, Wide])
def test_a_subclass_that_does_not_answer_as_a_linear_is_left_out(kind):
    model = nn.Sequential(kind(8, 8), nn.Linear(8, 8))
    plan = LoRA(dim=2).plan(model)
    assert [row.fqn for row in plan.rows] == ["1"]
    assert "does not answer with" in plan.not_adapted[0].reason
    with pytest.raises(NotImplementedError, match="does not answer with"):
        patch_linear_module(kind(8, 8))


class Doubling(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_subclass_that_is_not_its_weight_s_product_is_not_merged():
    model = trained(LoRA(dim=2)(nn.Sequential(Doubling(8, 8))))
    with pytest.raises(AdapterError, match="Doubling, whose own forward is not W x"):
        merge(model)


def test_one_of_two_tied_linears_is_left_out_of_all_linear_and_said_where_it_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert [row.fqn for row in LoRA(dim=2).plan(model).rows] == ["2"]
    assert "its weight with 1" in LoRA(dim=2, target_modules=["0"]).plan(model).notes[0]


class Mirrored(nn.Module):
    """A tied autoencoder: calls its linears, then reads them in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        for layer in reversed(self.layers):
            x = F.linear(x, layer.weight.t())
        return x


def test_weights_read_under_another_name_are_found():
    model = trained(LoRA(dim=2)(Mirrored()))
    x = torch.randn(4, 8)
    wanted = model(x)
    merge(model)
    torch.testing.assert_close(model(x), wanted)


def test_a_linear_that_is_passed_by_is_not_merged_where_no_full_forward_was_seen():
    model = trained(LoRA(dim=2)(Hidden()))
    model.forward(torch.randn(2, 8))  # past the model's hooks
    with pytest.raises(AdapterError, match="read was never called"):
        merge(model)


def test_running_statistics_that_training_changes_are_named():
    model = LoRA(dim=2)(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))).train()
    with pytest.warns(UserWarning, match=r"^1: training changes their buffers"):
        model(torch.randn(4, 8))
