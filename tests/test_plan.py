"""The plan: what it says is what happens, and it touches nothing."""

import copy
import json

import pytest
import torch
import transformers

from bridge.peft import LoRA, adapter_state_dict, save_adapter
from tests.helpers import models
from tests.helpers.timing import quickest


def test_totals_are_what_patching_then_gives(tmp_path):
    model = models.llama()
    recipe = LoRA(dim=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 8})
    plan = recipe.plan(model)
    total = sum(p.numel() for p in model.parameters())
    recipe(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.trainable == trainable
    assert plan.base_parameters == total
    assert plan.share == pytest.approx(trainable / (total + trainable))
    assert plan.optimizer_bytes == 2 * 4 * trainable
    assert plan.flops_per_token == 2 * trainable
    by_fqn = {row.fqn: row for row in plan.rows}
    assert len(by_fqn) == len(adapter_state_dict(model)) // 2
    for fqn, row in by_fqn.items():
        module = model.get_submodule(fqn)
        assert (row.dim, row.alpha, row.scale) == (module.dim, module.alpha, module.scale)
        assert (row.path, row.reason) == (module.lora_path().name, module.lora_path().reason)
    save_adapter(model, tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    header = size - plan.adapter_file_bytes
    assert 0 < header < 200 * (2 * len(plan.rows) + 1)


def test_planning_touches_nothing():
    model = models.llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    LoRA().plan(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in model.parameters())
    assert {n for n, _ in model.named_parameters()} == set(before)


def test_it_prints_as_a_table_and_exports_as_json():
    plan = LoRA(dim=4).plan(models.llama())
    text = str(plan)
    assert "model.layers.*.self_attn.q_proj ×2" in text
    assert "14 modules" in text and "lm_head (Linear): output head" in text
    record = json.loads(json.dumps(plan.to_dict()))
    assert record["totals"]["modules"] == len(record["rows"]) == 14
    assert record["rows"][0]["dtype"] == "float32"


def test_a_7b_llama_on_meta_plans_and_patches_in_under_a_second_each():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    assert quickest(lambda: LoRA().plan(model), 1) < 1
    assert len(LoRA().plan(model).rows) == 224
    models = iter((model, *(copy.deepcopy(model) for _ in range(2))))
    assert quickest(lambda: LoRA()(next(models)), 1) < 1
    assert all(p.is_meta for p in model.parameters())
