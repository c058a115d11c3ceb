"""What stands around an adapted model stays right: observers, optimizers, ranks, callers."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from bridge.peft import AdapterError, LoRA, disable_adapters, load_adapter, merge, save_adapter
from bridge.peft.doctor import doctor
from tests.helpers import models
from tests.helpers.ranks import on_ranks


def trained(model):
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_b"):
                module.lora_b.weight.normal_()
    return model


def ids():
    return torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(1))


class Observed(nn.Linear):
    """Counts its calls and keeps the smallest input, as observers for quantisation do."""

    def __init__(self, *sizes) -> None:
        super().__init__(*sizes)
        self.register_buffer("least", torch.tensor(9.0))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.least.copy_(torch.minimum(self.least, x.detach().min()))
        return super().forward(x)


def test_planning_adapting_and_merging_run_no_module_of_the_model():
    model = nn.Sequential(Observed(4, 4))
    LoRA(dim=2).plan(model)
    merge(trained(LoRA(dim=2)(model)))
    assert model[0].calls == 0 and model[0].least == 9.0


def test_linears_that_are_compiled_one_by_one_count_as_called():
    model = trained(LoRA(dim=2)(nn.Sequential(nn.Linear(4, 4))))
    model[0].compile(backend="eager")
    model(torch.randn(2, 4))
    merge(model)


def test_loading_new_values_keeps_the_parameters_that_an_optimizer_holds(tmp_path):
    model = LoRA(dim=2, target_modules=["q_proj"], modules_to_train=["lm_head"])(models.llama())
    save_adapter(model, tmp_path)
    held = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        held[-1].normal_()
    load_adapter(model, tmp_path)
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip(held, after, strict=True))


def test_saving_while_switched_off_is_refused(tmp_path):
    model = trained(LoRA(dim=2)(nn.Sequential(nn.Linear(4, 4))))
    with disable_adapters(model), pytest.raises(AdapterError, match="0 is switched off"):
        save_adapter(model, tmp_path)


def test_a_parametrization_from_before_can_be_removed_and_the_result_merged():
    model = nn.Sequential(nn.Linear(4, 4))
    weight_norm(model[0])
    trained(LoRA(dim=2)(model))
    x = torch.randn(2, 4)
    wanted = model(x)
    parametrize.remove_parametrizations(model[0], "weight")
    assert torch.equal(model(x), wanted)
    model[0].weight = nn.Parameter(model[0].weight, requires_grad=False)
    merge(model)
    torch.testing.assert_close(model(x), wanted)


def test_a_lazy_linear_is_refused_with_what_to_do():
    with pytest.raises(AdapterError, match="0 is a LazyLinear.*run one forward"):
        LoRA(dim=2).plan(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_taken_where_the_base_takes_them():
    layer = trained(LoRA(dim=2)(nn.Sequential(nn.Linear(4, 3))))
    rows = [torch.randn(2, 4), torch.randn(3, 4)]
    with torch.no_grad():
        nested = layer(torch.nested.nested_tensor(rows))
        for got, row in zip(nested.unbind(), rows, strict=True):
            torch.testing.assert_close(got, layer(row))


def test_per_sample_gradients_work_in_training():
    model = LoRA(dim=2)(nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))).train()
    values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    token = torch.tensor([1, 2])

    def loss(values):
        return torch.func.functional_call(model, values, (token,)).square().sum()

    assert torch.func.grad(loss)(values).keys() == values.keys()


def test_tensors_that_a_model_writes_stay_the_callers():
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, memory):
            out = self.fc(x) + memory
            with torch.no_grad():
                memory.add_(x.mean(0))
            return out

    memory = torch.zeros(4)
    LoRA(dim=2)(Remembers()).train()(torch.ones(2, 4), memory)
    assert torch.equal(memory, torch.ones(4))


def test_doctor_names_a_replaced_layer_and_leaves_no_hooks():
    model = LoRA(dim=2)(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model[1] = nn.Linear(8, 8)
    report = doctor(model, inputs={"input": torch.randn(2, 8)})
    assert report["state"].status == "fail" and "1 was adapted" in report["state"].detail
    whole = LoRA(dim=2)(nn.Sequential(nn.Linear(8, 8)))
    whole(torch.randn(2, 8))
    before = copy.copy(whole._forward_hooks), copy.copy(whole._forward_pre_hooks)
    doctor(whole, inputs={"input": torch.randn(2, 3)})  # an input that it cannot take
    assert before == (whole._forward_hooks, whole._forward_pre_hooks)


def fail_to_save():
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    model = LoRA(dim=2)(nn.Sequential(nn.Linear(8, 8)))
    fully_shard(model, mesh=mesh)
    with pytest.raises(AdapterError, match="cannot write the adapter"):
        save_adapter(model, "/dev/null/adapter")


@pytest.mark.distributed
def test_every_rank_learns_that_a_save_failed(tmp_path):
    on_ranks(2, fail_to_save, tmp_path)


def test_compiled_dropout_takes_another_length_and_selective_checkpoints_the_same_gradients():
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    model = trained(LoRA(dim=2, dropout=0.1)(net)).train()
    compiled = torch.compile(model, backend="eager")
    for length in (4, 6):
        compiled(torch.randn(length, 8)).sum().backward()
    model[0].dropout.p = model[2].dropout.p = 0.0
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, products)
    x, gradients = torch.randn(3, 8, requires_grad=True), []
    for run in (
        lambda: checkpoint(model, x, use_reentrant=False, context_fn=contexts),
        lambda: model(x),
    ):
        model.zero_grad()
        run().sum().backward()
        gradients.append(model[0].lora_a.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def shard_a_read_head():
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = trained(LoRA(dim=2, target_modules=["lm_head"], seed=0)(models.llama())).eval()
    with torch.no_grad():
        wanted = model(ids()).logits
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
        torch.testing.assert_close(model(ids()).logits, wanted)


@pytest.mark.distributed
def test_a_head_that_is_read_is_sharded_as_its_base(tmp_path):
    on_ranks(2, shard_a_read_head, tmp_path)


def test_outside_of_a_forward_a_read_weight_is_the_parameter_itself():
    model = trained(LoRA(dim=2, target_modules=["lm_head"])(models.llama()))
    assert model.lm_head.weight is model.get_parameter("lm_head.weight")
    assert model.lm_head.weight is model.lm_head.base_weight
