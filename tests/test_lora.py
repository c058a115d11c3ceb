"""The recipe on models: freezing, training, checkpointing, compiling, wrapping."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from bridge.peft import LoRA, adapter_state_dict, disable_adapters
from tests.helpers import models


def logits(model):
    return model(**models.inputs(model)).logits


def move_b(model):
    """Give every B values other than zero."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_b"):
                module.lora_b.weight.normal_(std=0.1)


def gradients(model):
    """Gradients of A and B for a fixed batch."""
    model.zero_grad()
    logits(model).pow(2).mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 0}, "dim must be an integer >= 1, got 0"),
        ({"alpha": math.nan}, "alpha must be a finite number"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\)"),
        ({"dropout_position": "both"}, "dropout_position must be one of 'pre', 'post'"),
        ({"lora_A_init_method": "ones"}, "must be one of 'xavier', 'uniform'"),
        ({"lora_dtype": torch.int8}, "lora_dtype must be"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": [3]}, "target_modules takes names"),
        ({"target_modules": None}, "target_modules takes names"),
        ({"target_modules": ["re:("]}, "not a valid regex"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be an integer"),
        ({"alpha_pattern": {"q": math.inf}}, r"alpha_pattern\['q'\] must be a finite"),
        ({"rank_pattern": {"": 2}}, "a pattern takes names"),
        ({"rank_pattern": [("q", 2)]}, "rank_pattern must map entries to numbers"),
        ({"alpha_pattern": None}, "alpha_pattern must map entries to numbers"),
        ({"use_rslora": "no"}, "use_rslora must be True or False, got 'no'"),
        ({"seed": -1}, "seed must be an integer >= 0"),
    ],
)
def test_the_recipe_is_checked_once_at_construction(options, words):
    with pytest.raises(ValueError, match=words):
        LoRA(**options)


def test_a_recipe_does_not_follow_later_changes_of_the_callers_dicts():
    ranks = {"q_proj": 2}
    recipe = LoRA(rank_pattern=ranks)
    ranks["q_proj"] = -5
    assert recipe.rank_pattern == {"q_proj": 2}


def test_the_recipe_is_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        LoRA().dim = 4
    with pytest.raises(TypeError):
        LoRA("all-linear")


def test_everything_is_frozen_but_the_branches_and_the_same_model_comes_back():
    model = models.llama()
    assert LoRA(dim=2)(model) is model
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_state_dict(model)) and len(trainable) == 28


def test_patterns_and_rank_stabilised_scaling_reach_the_layers():
    recipe = LoRA(
        dim=4, alpha=8, rank_pattern={"q_proj": 2, "*.layers.1.*": 6}, alpha_pattern={"k_proj": 3}
    )
    model = recipe(models.llama())
    first, second = (layer.self_attn for layer in model.model.layers)
    assert (first.q_proj.dim, second.q_proj.dim, second.v_proj.dim) == (2, 2, 6)
    assert (first.k_proj.alpha, first.v_proj.alpha) == (3, 8)
    stable = LoRA(dim=4, alpha=8, use_rslora=True)(models.llama())
    assert stable.model.layers[0].mlp.up_proj.scale == 4


def test_adapter_state_dict_has_the_adapters_tensors_and_nothing_else():
    model = LoRA(dim=2, target_modules=["q_proj"])(models.llama())
    assert {k: tuple(v.shape) for k, v in adapter_state_dict(model).items()} == {
        f"model.layers.{i}.self_attn.q_proj.lora_{x}.weight": (2, 32) if x == "a" else (32, 2)
        for i in (0, 1)
        for x in "ab"
    }
    assert adapter_state_dict(models.llama()) == {}


@pytest.mark.parametrize("name", models.ALL)
def test_every_architecture_starts_as_its_base_trains_and_is_its_base_when_disabled(name):
    model = models.ALL[name]().eval()
    # Without gradients, because torch chooses its attention kernel by what requires them.
    with torch.no_grad():
        before = logits(model)
        LoRA(dim=4, alpha=8, seed=0)(model)
        assert torch.equal(logits(model), before)
    losses = models.train_a_little(model.train(), steps=8)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        model.eval()
        assert not torch.equal(logits(model), before)
        with disable_adapters(model):
            assert torch.equal(logits(model), before)
        assert not torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, dropout):
    model = LoRA(dim=4, dropout=dropout)(models.llama()).train()
    move_b(model)
    torch.manual_seed(3)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(3)
    actual = gradients(model)
    assert expected.keys() == actual.keys() and len(actual) == 28
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient)


def test_reentrant_checkpointing_of_a_plain_torch_model_trains_too():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, ids):
            x = self.emb(ids)
            x += 1  # in place, on what comes out of the embedding
            return checkpoint(self.fc, x, use_reentrant=True)

    model = LoRA(dim=2)(Plain())
    model(torch.tensor([1, 2])).sum().backward()
    assert model.fc.lora_b.weight.grad.abs().sum() > 0 and model.emb.weight.grad is None


def test_autocast_keeps_fp32_gradients():
    model = LoRA(dim=4)(models.llama())
    move_b(model)
    exact = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = logits(model)
    model.zero_grad()
    output.float().pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            error = (parameter.grad - exact[name]).norm() / exact[name].norm()
            assert error < 0.2


@pytest.mark.slow
def test_compiled_model_computes_and_trains_the_same():
    model = LoRA(dim=4)(models.llama())
    move_b(model)
    expected = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    actual = {k.removeprefix("_orig_mod."): v for k, v in gradients(compiled).items()}
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, rtol=1e-4, atol=1e-6)
    assert adapter_state_dict(compiled).keys() == adapter_state_dict(model).keys()
    torch._dynamo.reset()


def test_a_deep_copy_is_independent():
    model = LoRA(dim=2)(models.llama()).eval()
    move_b(model)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), logits(model))
    models.train_a_little(clone.train())
    clone.eval()
    assert not torch.equal(logits(clone), logits(model))


def test_state_dict_round_trips_and_base_keys_are_the_bases():
    base = models.llama()
    names = set(base.state_dict())
    model = LoRA(dim=2)(copy.deepcopy(base))
    move_b(model)
    state = model.state_dict()
    assert set(state) - set(adapter_state_dict(model)) == names
    other = LoRA(dim=2)(models.llama())
    other.load_state_dict(state)
    model.eval()
    other.eval()
    assert torch.equal(logits(other), logits(model))
    incompatible = other.load_state_dict(base.state_dict(), strict=False)
    assert set(incompatible.missing_keys) == set(adapter_state_dict(model))


def test_train_and_eval_reach_the_branchs_dropout():
    model = LoRA(dim=2, dropout=0.5)(models.llama())
    move_b(model)
    assert not torch.equal(logits(model.train()), logits(model))
    assert torch.equal(logits(model.eval()), logits(model))


def test_distributed_data_parallel_sees_only_the_branch_and_gives_clean_names():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = LoRA(dim=2)(models.llama())
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(**models.inputs(model)).logits.pow(2).mean().backward()
        assert adapter_state_dict(wrapped).keys() == adapter_state_dict(model).keys()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        dist.destroy_process_group()


def test_training_lora_after_keeps_tied_embeddings_tied():
    model = LoRA(dim=2)(models.llama(tie_word_embeddings=True))
    models.train_a_little(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_and_b_are_float32_over_a_quantised_base_unless_told_otherwise():
    import bitsandbytes as bnb

    model = nn.Sequential(nn.Linear(64, 64), bnb.nn.Linear4bit(64, 64))
    model[1].load_state_dict(nn.Linear(64, 64).state_dict())
    model.to("cpu")
    assert model[1].weight.dtype == torch.uint8
    plan = LoRA(dim=2).plan(model)
    assert {row.dtype for row in plan.rows} == {torch.float32}
    assert plan.base_parameters == 2 * (64 * 64 + 64)
    LoRA(dim=2, lora_dtype=torch.bfloat16)(model)
    assert model[1].lora_a.weight.dtype == torch.bfloat16
