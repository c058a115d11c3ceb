"""Modules trained in full beside the branches; what is random is proposed; sound dtypes."""

import copy
import json
import warnings
from collections import OrderedDict

import pytest
import torch
import transformers
from torch import nn

from bridge.peft import AdapterError, LoRA, disable_adapters, load_adapter, save_adapter
from bridge.peft.branch.mixin import LoRAMixin
from bridge.peft.doctor import doctor
from bridge.peft.errors import TargetError
from tests.helpers import models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 4, "vocab_size": 64}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The directory of an encoder without a head."""
    directory = tmp_path_factory.mktemp("encoder")
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(directory)
    return directory


def classifier(directory, seed=0, kind=transformers.BertForSequenceClassification):
    torch.manual_seed(seed)
    return kind.from_pretrained(directory, num_labels=2).eval()


def ids():
    return torch.randint(3, 64, (4, 6), generator=torch.Generator().manual_seed(1))


def test_a_random_head_is_proposed_and_left_out_of_all_linear(encoder):
    model = classifier(encoder)
    plan = LoRA(dim=2).plan(model)
    assert "classifier: from no checkpoint" in plan.notes[0]
    assert "modules_to_train=['classifier']" in plan.notes[0]
    assert not any(row.fqn.startswith("classifier") for row in plan.rows)
    with pytest.warns(UserWarning, match="classifier: from no checkpoint"):
        LoRA(dim=2)(model)


def test_a_head_of_two_linears_is_one_module(tmp_path):
    config = transformers.RobertaConfig(**SMALL)
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    model = classifier(tmp_path, kind=transformers.RobertaForSequenceClassification)
    assert "modules_to_train=['classifier']" in LoRA(dim=2).plan(model).notes[0]
    LoRA(dim=2, modules_to_train=["classifier"])(model)
    assert all(p.requires_grad for p in model.classifier.parameters())


def test_a_head_trained_in_full_comes_back_into_another_session_s_random_one(encoder, tmp_path):
    recipe = LoRA(dim=2, modules_to_train=["classifier"], seed=0)
    model = classifier(encoder, seed=1)
    plan = recipe.plan(model)
    assert [row.fqn for row in plan.trained_in_full] == ["classifier"]
    assert "trained in full: classifier (Linear, 66 parameters)" in str(plan)
    recipe(model)
    assert plan.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        model.classifier.weight.normal_()
    save_adapter(model, tmp_path)
    again = load_adapter(classifier(encoder, seed=2), tmp_path)
    assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_an_entry_that_matches_nothing_is_an_error_with_the_nearest_names():
    with pytest.raises(TargetError, match="modules_to_train entry 'lm_haed'.*'lm_head'"):
        LoRA(dim=2, modules_to_train=["lm_haed"])(models.llama())


def test_what_is_trained_in_full_is_not_adapted_too():
    model = models.llama()
    LoRA(dim=2, modules_to_train=["mlp"])(model)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_training_in_full_in_16_bits_is_said():
    with pytest.warns(UserWarning, match="lm_head: trained in full in 16 bits"):
        LoRA(dim=2, modules_to_train=["lm_head"])(models.llama().bfloat16())


def test_models_without_marks_have_nothing_random(encoder):
    made = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
    for model in (made, copy.deepcopy(classifier(encoder))):
        assert not LoRA(dim=2).plan(model).notes


def test_a_adapter_s_dtype_is_float32_over_half_bases_and_the_seed_s_layers_keep_theirs(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        model = LoRA(dim=2)(models.llama().to(dtype))
        assert model.lm_head.weight.dtype == dtype
        layer = model.model.layers[0].self_attn.q_proj
        assert {layer.lora_a.weight.dtype, layer.lora_b.weight.dtype} == {torch.float32}
        assert model(ids()).logits.dtype == dtype
    doubled = LoRA(dim=2)(models.llama().double())
    assert doubled.model.layers[0].self_attn.q_proj.lora_a.weight.dtype == torch.float64


def test_disabled_a_model_trained_in_full_is_its_base_and_ties_stay():
    base = models.llama(tie_word_embeddings=True).eval()
    model = LoRA(dim=2, modules_to_train=["lm_head"])(copy.deepcopy(base))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight.normal_()
    with disable_adapters(model):
        assert torch.equal(model(ids()).logits, base(ids()).logits)
    assert not torch.equal(model(ids()).logits, base(ids()).logits)


def test_a_module_with_buffers_is_refused_before_anything_is_trained():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(AdapterError, match="^1 has buffers"):
        LoRA(dim=2, modules_to_train=["1"])(model)
    assert type(model[0]) is nn.Linear


def test_disabling_may_overlap():
    model = LoRA(dim=2)(nn.Sequential(nn.Linear(4, 4)))
    nn.init.normal_(model[0].lora_b.weight)
    x = torch.randn(2, 4)
    adapted = model(x)
    first, second = disable_adapters(model), disable_adapters(model)
    first.__enter__()
    base = model(x)
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(x), base)
    second.__exit__(None, None, None)
    assert torch.equal(model(x), adapted)


def test_where_a_copy_to_train_cannot_be_made_the_model_is_left_as_it_was(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight.requires_grad_(False)
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}

    def no_memory(self):
        raise MemoryError("no memory for a copy")

    monkeypatch.setattr(torch.Tensor, "clone", no_memory)
    with pytest.raises(MemoryError):
        LoRA(dim=2, target_modules=["0"], modules_to_train=["1"])(model)
    after = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    assert after.keys() == before.keys()
    assert all(after[n][0] is p and after[n][1] == grad for n, (p, grad) in before.items())
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


class Head(nn.Module):
    """A parameter of its own and a module below, both trained."""

    def __init__(self):
        super().__init__()
        self.scale, self.proj = nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.proj(x * self.scale)


def with_head(head=Head):
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(lin=nn.Linear(8, 8), head=head()))


def test_a_module_inside_one_that_is_trained_is_not_named_again(tmp_path):
    model = LoRA(target_modules=["lin"], modules_to_train=["head"], dim=2)(with_head())
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head"]
    x = torch.randn(4, 8)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(with_head(), tmp_path)(x), model(x))
    assert torch.equal(load_adapter(with_head(), tmp_path)(x), model(x))


def test_a_weight_is_adapted_or_trained_in_full_and_not_both():
    tied = models.llama(tie_word_embeddings=True)
    for targets, whole in ((["embed_tokens"], ["lm_head"]), (["lm_head"], ["embed_tokens"])):
        with pytest.raises(TargetError, match=f"trains the weight of .*{targets[0]} in full"):
            LoRA(target_modules=targets, modules_to_train=whole, dim=2)(tied)
    assert not any(isinstance(m, LoRAMixin) for m in tied.modules())


def test_the_doctor_finds_a_model_with_a_trained_head_healthy():
    model = LoRA(target_modules=["lin"], modules_to_train=["head"], dim=2)(with_head())
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    before = model.head.proj.weight
    report = doctor(model, inputs={"input": torch.randn(4, 8)})
    assert report.healthy and report["what is trained"].status == "pass", str(report)
    assert model.head.proj.weight is before
