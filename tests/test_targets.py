"""Targets: what matches, what does not, and what the user is told."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from bridge.peft import LoRA, adapter_state_dict, disable_adapters
from bridge.peft.errors import AlreadyAdaptedError, TargetError
from bridge.peft.targets import matches
from tests.helpers import models


def adapted(model):
    return [name for name, m in model.named_modules() if hasattr(m, "lora_a")]


@pytest.mark.parametrize(
    ("entry", "fqn", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("q_proj", "model.q_proj.inner", False),
        ("*.layers.0.*.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("*.layers.0.*.q_proj", "model.layers.10.self_attn.q_proj", False),
        ("*_proj", "a.b.k_proj", True),
        ("re:.*[qk]_proj", "a.b.k_proj", True),
        ("re:[qk]_proj", "a.b.k_proj", False),
    ],
)
def test_an_entry_is_the_last_components_a_wildcard_or_a_full_regex(entry, fqn, expected):
    assert matches(entry, fqn) is expected


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 2),
        (["q_proj", "v_proj"], 4),
        ("q_proj", 2),
        (["*.layers.1.*"], 7),
        (["re:.*\\.(up|down)_proj"], 4),
        ("all-linear", 14),
        (["lm_head"], 1),
    ],
)
def test_exactly_the_targets_are_adapted(targets, count):
    model = LoRA(target_modules=targets, dim=2)(models.llama())
    assert len(adapted(model)) == count


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_leaves_the_output_head_alone_tied_or_not(tied):
    model = models.llama(tie_word_embeddings=tied)
    plan = LoRA().plan(model)
    assert [(s.fqn, s.reason) for s in plan.not_adapted] == [("lm_head", "output head")]


def test_all_linear_finds_the_head_of_a_plain_torch_model():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.body, self.unembed = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
            self.unembed.weight = self.emb.weight

    assert adapted(LoRA(dim=2)(Tied())) == ["body"]


def test_exclusions_are_left_alone_and_listed():
    recipe = LoRA(exclude_modules=["down_proj"], dim=2)
    model = models.llama()
    assert {s.reason for s in recipe.plan(model).not_adapted} == {"output head", "excluded"}
    assert not any("down_proj" in name for name in adapted(recipe(model)))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            {"target_modules": ["q_prj"]},
            "'q_prj' matches none of the 15 linears; did you mean 'q_proj'",
        ),
        ({"target_modules": ["q_proj", "re:nothing.*"]}, "'re:nothing.*' matches none"),
        ({"target_modules": ["xyzzy"]}, "their names end in 'down_proj'"),
        ({"target_modules": ["input_layernorm"]}, "cannot be adapted: LlamaRMSNorm"),
        ({"target_modules": ["self_attn"]}, "cannot be adapted: LlamaAttention"),
        ({"exclude_modules": ["v_prj"]}, "exclude_modules entry 'v_prj'.*did you mean"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "excluded"),
        (
            {"rank_pattern": {"q_prj": 4}},
            "rank_pattern entry 'q_prj' matches none of the 14.*did you mean 'q_proj'",
        ),
        ({"target_modules": ["Q_PROJ"]}, "did you mean 'q_proj'"),
        ({"target_modules": ["all-linear"]}, "pass target_modules='all-linear', not in a list"),
        ({"target_modules": ["layers.1"]}, r"linears below it are 'model\.layers\.1\.\*'"),
        ({"exclude_modules": ["layers.1"]}, r"exclude nothing.*'model\.layers\.1\.\*'"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 4}}, "alpha_pattern entry"),
    ],
)
def test_every_entry_must_match_and_the_error_helps(recipe, words):
    model = models.llama()
    with pytest.raises(TargetError, match=words) as raised:
        LoRA(dim=2, **recipe)(model)
    assert isinstance(raised.value, ValueError)
    assert adapted(model) == [] and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile])
def test_wrapping_a_linear_changes_neither_its_name_nor_its_initial_a(wrap):
    recipe = LoRA(target_modules=["0", "1"], dim=2, seed=5)
    plain, wrapped = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    wrapped[0] = wrap(wrapped[0])
    assert [row.fqn for row in recipe.plan(wrapped).rows] == ["0", "1"]
    expected = adapter_state_dict(recipe(plain))
    torch.testing.assert_close(adapter_state_dict(recipe(wrapped)), expected, rtol=0, atol=0)


def test_excluding_what_is_left_alone_anyway_is_not_an_error():
    assert len(LoRA(exclude_modules=["embed_tokens"], dim=2).plan(models.llama()).rows) == 14


def test_a_model_without_linears_is_refused():
    with pytest.raises(TargetError, match="Sequential has no linear"):
        LoRA()(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_an_adapted_model_is_refused_and_keeps_its_adapter():
    model = LoRA(target_modules=["q_proj"], dim=2)(models.llama())
    with pytest.raises(AlreadyAdaptedError, match=r"first: model\.layers\.0\.self_attn\.q_proj"):
        LoRA(target_modules=["v_proj"], dim=2)(model)
    assert len(adapted(model)) == 2


@pytest.mark.parametrize("target", ["first", "second"])
def test_a_linear_reached_by_two_names_is_adapted_once_by_either(target):
    model = nn.Module()
    model.first = nn.Linear(3, 3)
    model.second = model.first
    plan = LoRA(target_modules=[target], dim=2).plan(model)
    assert [row.fqn for row in plan.rows] == ["first"]
    LoRA(target_modules=[target], dim=2)(model)
    assert model.first is model.second and adapted(model) == ["first"]


def test_a_linear_itself_can_be_the_model():
    layer = LoRA(dim=2)(nn.Linear(4, 4))
    assert set(layer.state_dict()) == {"weight", "bias", "lora_a.weight", "lora_b.weight"}


def test_what_looks_like_a_linear_and_is_none_is_listed():
    plan = LoRA().plan(models.mixtral())
    reasons = {s.fqn: s.reason for s in plan.not_adapted}
    found = reasons["model.layers.0.mlp.experts.gate_up_proj"]
    assert "frozen; target_parameters=['experts.gate_up_proj'] adapts it" in found
    attention = nn.ModuleDict({"mha": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    reasons = {s.fqn: s.reason for s in LoRA().plan(attention).not_adapted}
    assert "target_modules=['mha']" in reasons["mha"]
    assert "MultiheadAttention" in reasons["mha.out_proj"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:.*zeros at padded positions")
@torch.no_grad()
def test_a_transformer_encoder_layer_does_not_bypass_its_adapters():
    for norm_first in (False, True):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
        x = torch.randn(2, 5, 8)
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        before = [model(x), model(x, src_key_padding_mask=mask)]
        LoRA(dim=2)(model)
        torch.testing.assert_close(model(x), before[0])
        for module in model.modules():
            if hasattr(module, "lora_b"):
                module.lora_b.weight.normal_()
        assert (model(x) - before[0]).abs().max() > 1e-3
        kept = ~mask
        changed = model(x, src_key_padding_mask=mask)[:, : before[1].shape[1]]
        assert (changed - before[1])[kept[:, : changed.shape[1]]].abs().max() > 1e-3
        with disable_adapters(model):
            assert torch.equal(model(x), before[0])
            assert torch.equal(model(x, src_key_padding_mask=mask), before[1])
