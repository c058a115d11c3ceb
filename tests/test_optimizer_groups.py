"""LoRA+: every trained parameter is in one group, and B's learning rate is a multiple of A's."""

import copy

import pytest
import torch
from torch import nn

from bridge.peft import LoRA, LoRALinear, optimizer_groups
from bridge.peft.errors import AdapterError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x))


def adapted(**recipe):
    torch.manual_seed(0)
    return LoRA(target_modules=["body.*"], dim=2, seed=0, **recipe)(Model())


def names_of(model, group):
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_all_that_is_trained_is_in_one_group_with_its_rate_and_decay():
    model = adapted(use_dora=True, modules_to_train=["head"])
    groups = optimizer_groups(model, lr=1e-3, b_ratio=8, weight_decay=0.1)
    found = {g["name"]: names_of(model, g) for g in groups}
    assert found == {
        "a": {"body.0.lora_a.weight", "body.2.lora_a.weight"},
        "b": {"body.0.lora_b.weight", "body.2.lora_b.weight"},
        "in full": {"head.weight"},
        "vectors": {"head.bias", "body.0.lora_magnitude.weight", "body.2.lora_magnitude.weight"},
    }
    assert {g["name"]: g["lr"] for g in groups} == {
        "a": 1e-3,
        "b": 8e-3,
        "in full": 1e-3,
        "vectors": 1e-3,
    }
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.1, 0.0]
    all_of_them = [p for g in groups for p in g["params"]]
    assert len(all_of_them) == len({*map(id, all_of_them)})
    assert {*map(id, all_of_them)} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_any_optimizer_takes_them_and_a_ratio_of_one_is_plain_lora(make):
    x, y = torch.randn(9, 6), torch.randn(9, 3)
    plain, grouped = adapted(), adapted()
    optimizers = [
        make([p for p in plain.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0),
        make(optimizer_groups(grouped, lr=0.01, b_ratio=1)),
    ]
    for model, optimizer in zip((plain, grouped), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    for mine, other in zip(grouped.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_with_sgd_b_steps_exactly_the_ratio_further():
    x, y = torch.randn(9, 6), torch.randn(9, 3)
    steps = {}
    for ratio in (1, 16):
        model = adapted()
        before = copy.deepcopy(model)
        optimizer = torch.optim.SGD(optimizer_groups(model, lr=0.01, b_ratio=ratio))
        (model(x) - y).square().mean().backward()
        optimizer.step()
        steps[ratio] = model.body[0].lora_b.weight - before.body[0].lora_b.weight
    torch.testing.assert_close(steps[16], 16 * steps[1])


def test_wrapped_models_and_frozen_factors_are_grouped_too():
    model = adapted()
    model.body[0].lora_a.weight.requires_grad_(False)
    model.head = LoRALinear(model.head, nn.Sequential())
    model.head.adapter.linear_in = nn.Linear(6, 2, bias=False)
    model.head.adapter.linear_out = nn.Linear(2, 3, bias=False)
    groups = {g["name"]: g for g in optimizer_groups(nn.Sequential(model), lr=1.0)}
    assert [len(groups[name]["params"]) for name in ("a", "b")] == [2, 3]


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(AdapterError, match="has no adapters"):
        optimizer_groups(Model(), lr=1.0)
    with pytest.raises(AdapterError, match="nothing of the model is trained"):
        optimizer_groups(adapted().requires_grad_(False), lr=1.0)
    for name, value in (("lr", 0), ("b_ratio", float("inf")), ("weight_decay", -1), ("lr", "1")):
        with pytest.raises(AdapterError, match=f"{name} must be"):
            optimizer_groups(adapted(), **{"lr": 1.0, name: value})
