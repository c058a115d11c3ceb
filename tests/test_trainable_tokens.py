"""Chosen token rows: trained alone, tied ends follow, PEFT's files both ways."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from bridge.peft import (
    LoRA,
    adapter_state_dict,
    disable_adapters,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from bridge.peft.branch.token_rows import WithTokenRows
from bridge.peft.cli.inspect import describe
from bridge.peft.doctor import doctor
from bridge.peft.errors import AdapterError, TargetError
from bridge.peft.formats.peft import read_adapter
from bridge.peft.merging.directory import merge_directory
from bridge.peft.ops.token_rows import looked_up, projected, replaced_rows_reference
from tests.helpers import models, parts, peft_files
from tests.helpers.ranks import on_ranks

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = [9, 2, 5]
IDS = torch.tensor([[1, 5, 5, 2], [3, 0, 9, 63]])
RECIPE = {"target_modules": ["q_proj"], "trainable_tokens": {"embed_tokens": TOKENS}}
KEY = "model.embed_tokens.token_rows.weight"
MODELS = {"llama": models.llama, "gemma3": parts.gemma3}
TIES = pytest.mark.parametrize("tied", [False, True])
NAMES = pytest.mark.parametrize("name", MODELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_products_agree_with_a_weight_that_has_the_rows(dtype):
    weight, x = torch.randn(12, 6, dtype=dtype), torch.randn(2, 3, 6, dtype=dtype)
    rows = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    tokens, ids = torch.tensor([2, 5, 9]), torch.tensor([[0, 2, 2], [9, 11, 3]])
    dense = replaced_rows_reference(weight, rows, tokens)
    found = looked_up(F.embedding(ids, weight), ids, rows, tokens, 2.0)
    expected = F.embedding(ids, dense)
    expected = torch.where(((ids == 2) | (ids == 9))[..., None], 2 * expected, expected)
    assert torch.equal(found, expected)
    head = projected(F.linear(x, weight), x, rows, tokens, None)
    torch.testing.assert_close(head, F.linear(x, dense))
    for got, wanted in ((found, expected), (head, F.linear(x, dense))):
        one, other = (
            torch.autograd.grad(y.square().sum(), rows, retain_graph=True)[0] for y in (got, wanted)
        )
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@TIES
def test_only_the_rows_are_trained_and_the_start_is_the_base_bit_for_bit(tied):
    base = parts.build(models.llama, tie_word_embeddings=tied)
    model = LoRA(**RECIPE, dim=2)(copy.deepcopy(base))
    assert torch.equal(parts.logits(model), parts.logits(base))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert shapes.pop(KEY) == (3, 32) and all("lora_" in name for name in shapes)
    assert {k for k in model.state_dict() if "lora_" not in k} == {*base.state_dict(), KEY}
    weight = model.model.embed_tokens._parameters["weight"].clone()
    models.train_a_little(model)
    assert torch.equal(model.model.embed_tokens.base_weight, weight)
    assert model.model.embed_tokens.base_weight.grad is None
    assert adapter_state_dict(model)[KEY].shape == (3, 32)


@TIES
@NAMES
def test_the_model_is_that_with_these_rows_in_its_weight(name, tied):
    base = parts.build(MODELS[name], tie_word_embeddings=tied)
    model = parts.adapted(base, **RECIPE)
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "lora_b"):
                layer.lora_b.weight.zero_()
    dense = copy.deepcopy(base)
    with torch.no_grad():
        dense.model.embed_tokens.weight[sorted(TOKENS)] = adapter_state_dict(model)[KEY]
    torch.testing.assert_close(parts.logits(model, IDS), parts.logits(dense, IDS), **CLOSE)
    wanted, got = (
        torch.autograd.grad(one(input_ids=IDS).logits.square().mean(), [parameter])[0]
        for one, parameter in (
            (dense, dense.model.embed_tokens.weight),
            (model, model.model.embed_tokens.token_rows.weight),
        )
    )
    torch.testing.assert_close(got, wanted[sorted(TOKENS)], **CLOSE)


def test_a_list_means_the_input_embedding():
    recipe = LoRA(dim=2, target_modules=["q_proj"], trainable_tokens=TOKENS)
    assert recipe.plan(models.llama()).token_rows[0].fqn == "model.embed_tokens"
    recipe = LoRA(dim=2, target_modules=["0"], trainable_tokens=[1])
    with pytest.raises(TargetError, match="does not say which is its input embedding"):
        recipe(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"trainable_tokens": {"embed_tokens": [64]}}, "token 64, and model.embed_tokens has 64"),
        ({"trainable_tokens": {"embed_token": [1]}}, "did you mean 'embed_tokens'"),
        ({"trainable_tokens": {"lm_head": [1]}}, "lm_head, a Linear: it is not an embedding"),
        ({"trainable_tokens": [1], "target_modules": ["embed_tokens"]}, "and in target_modules"),
        ({"trainable_tokens": [1], "modules_to_train": ["embed_tokens"]}, "modules_to_train"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(recipe, words):
    model = models.llama()
    with pytest.raises(TargetError, match=words):
        LoRA(**({"target_modules": ["q_proj"]} | recipe))(model)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, WithTokenRows) for m in model.modules())


@pytest.mark.parametrize("value", ["12", [-1], [True], {"embed_tokens": 3}, 5, [1.0]])
def test_a_value_that_is_no_list_of_tokens_is_refused(value):
    with pytest.raises(AdapterError, match="trainable_tokens takes indices"):
        LoRA(trainable_tokens=value)


def test_plan_counts_the_rows():
    model = models.llama(tie_word_embeddings=True)
    recipe = LoRA(**RECIPE, dim=2)
    plan = recipe.plan(model)
    assert "trained rows: 3 tokens of model.embed_tokens, and of 1 modules tied" in str(plan)
    assert plan.to_dict()["token_rows"][0]["tokens"] == 3
    recipe(model)
    assert plan.trainable == sum(t.numel() for t in adapter_state_dict(model).values())


def test_half_precision_rows_train_in_float32():
    model = LoRA(**RECIPE)(models.llama().to(torch.bfloat16))
    assert model.model.embed_tokens.token_rows.weight.dtype == torch.float32
    assert model.model.embed_tokens(IDS).dtype == torch.bfloat16


@TIES
def test_disabled_it_is_the_base_bit_for_bit_merged_or_not(tied):
    base = parts.build(models.llama, tie_word_embeddings=tied)
    model = parts.adapted(base, **RECIPE)
    changed = parts.logits(model, IDS)
    assert not torch.allclose(changed, parts.logits(base, IDS))
    for _ in range(2):
        with disable_adapters(model):
            assert torch.equal(parts.logits(model, IDS), parts.logits(base, IDS))
        torch.testing.assert_close(parts.logits(model, IDS), changed, **CLOSE)
        if not model.model.embed_tokens.merged:
            merge(model)


@TIES
@NAMES
def test_merge_writes_the_rows_and_unmerge_restores_bit_for_bit(tmp_path, name, tied):
    base = parts.build(MODELS[name], tie_word_embeddings=tied)
    model = parts.adapted(base, **RECIPE)
    expected = parts.logits(model, IDS)
    assert any("3 token rows" in note for note in merge(model).notes)
    torch.testing.assert_close(parts.logits(model, IDS), expected, **CLOSE)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings == tied
    torch.testing.assert_close(parts.logits(again, IDS), expected, **CLOSE)
    unmerge(model)
    assert torch.equal(parts.logits(model, IDS), expected)
    assert torch.equal(model.model.embed_tokens.base_weight, base.model.embed_tokens.weight)


@TIES
@NAMES
def test_peft_reads_ours(tmp_path, name, tied):
    base = parts.build(MODELS[name], tie_word_embeddings=tied)
    ours = parts.adapted(base, **RECIPE)
    save_adapter(ours, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    (key,) = [k for k in stored if "embed_tokens" in k]
    assert key == "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    theirs = parts.read_by_peft(base, tmp_path)
    torch.testing.assert_close(parts.logits(theirs, IDS), parts.logits(ours, IDS), **CLOSE)


@TIES
@NAMES
@pytest.mark.parametrize("as_list", [False, True])
def test_we_read_peft_s(tmp_path, name, tied, as_list):
    base = parts.build(MODELS[name], tie_word_embeddings=tied)
    theirs = peft_files.saved_by_peft(
        copy.deepcopy(base),
        tmp_path,
        target_modules=["q_proj"],
        trainable_token_indices=TOKENS if as_list else {"embed_tokens": TOKENS},
    )
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(parts.logits(ours, IDS), parts.logits(theirs, IDS), **CLOSE)
    assert describe(read_adapter(tmp_path))["token_rows"][0]["tokens"] == TOKENS


def test_ours_comes_back_bit_for_bit_and_into_the_same_model(tmp_path):
    base = parts.build(models.llama)
    model = parts.adapted(base, **RECIPE)
    save_adapter(model, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path, strict=True)
    for _ in range(2):
        for name, tensor in adapter_state_dict(model).items():
            assert torch.equal(adapter_state_dict(again)[name], tensor), name
        load_adapter(again, tmp_path)
    other = LoRA(target_modules=["q_proj"], dim=4, trainable_tokens=[1])(copy.deepcopy(base))
    with pytest.raises(AdapterError, match="different tokens"):
        load_adapter(other, tmp_path)


def test_files_that_do_not_agree_with_themselves_or_the_model_are_refused(tmp_path):
    model = parts.adapted(parts.build(models.llama), **RECIPE)
    save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match="token 9, and model.embed_tokens has 8"):
        load_adapter(parts.build(models.llama, vocab_size=8), tmp_path)
    for tokens, words in (
        ([1, 2], "has 3 token rows.*names 2 tokens"),
        ([1, 1, 2], "different tokens"),
        ([1, 2, "3"], "a list of at most"),
        ({"embed_tokens": [1, 2, -3]}, "a list of at most"),
    ):
        peft_files.set_config(tmp_path, trainable_token_indices=tokens)
        with pytest.raises(AdapterError, match=words):
            read_adapter(tmp_path)


@pytest.mark.parametrize("chosen", [[64, 65, 66], [1, 64]])
@TIES
@pytest.mark.filterwarnings("ignore:.*(from no checkpoint|saved in full)")
def test_new_tokens_are_saved_alone_or_with_the_rest_of_a_resized_embedding(tmp_path, tied, chosen):
    base = parts.build(models.llama, tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    load = type(base).from_pretrained
    models_of = [load(tmp_path / "base") for _ in range(2)]
    for one in models_of:
        one.resize_token_embeddings(67, mean_resizing=False)
    recipe = {"trainable_tokens": chosen, "target_modules": ["q_proj"]}
    model = parts.adapted(models_of[0], **recipe)
    save_adapter(model, tmp_path / "adapter")
    is_alone = not any("embed_tokens.weight" in n for n in read_adapter(tmp_path / "adapter").whole)
    assert is_alone == (chosen == [64, 65, 66])
    ids = torch.tensor([[1, 64, 65, 66]])
    loaded = load_adapter(models_of[1], tmp_path / "adapter")
    torch.testing.assert_close(parts.logits(loaded, ids), parts.logits(model, ids), **CLOSE)
    with pytest.raises(AdapterError):
        load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="resize the base model first"):
        model.resize_token_embeddings(70)


@TIES
@NAMES
def test_a_directory_is_merged_and_stays_tied(tmp_path, name, tied):
    base = parts.build(MODELS[name], tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    model = parts.adapted(base, **RECIPE)
    save_adapter(model, tmp_path / "adapter")
    adapter = [(tmp_path / "adapter", 1.0)]
    report = merge_directory(tmp_path / "base", adapter, tmp_path / "out")
    assert any("3 rows of model.embed_tokens" in note for note in report.notes)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == tied
    torch.testing.assert_close(parts.logits(merged, IDS), parts.logits(model, IDS), **CLOSE)
    with pytest.raises(AdapterError, match="weighted or summed"):
        merge_directory(tmp_path / "base", adapter * 2, tmp_path / "two")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_their_tied_head_follows(copied):
    base = parts.build(models.llama, tie_word_embeddings=True)
    model = copied(parts.adapted(base, **RECIPE))
    before = parts.logits(model, IDS)
    with torch.no_grad():
        model.model.embed_tokens.token_rows.weight.add_(1.0)
    after = parts.logits(model, IDS)
    assert model.lm_head.rows is model.model.embed_tokens.token_rows
    assert not torch.allclose(after[..., TOKENS], before[..., TOKENS])


def test_meta_rows_take_the_base_s_values_when_it_is_loaded():
    base = parts.build(models.llama)
    with torch.device("meta"):
        model = LoRA(**RECIPE, dim=2)(models.llama())
    model.to_empty(device="cpu")
    assert model.load_state_dict(base.state_dict(), strict=False).unexpected_keys == []
    model.model.rotary_emb.inv_freq = base.model.rotary_emb.inv_freq
    assert torch.equal(parts.logits(model.eval(), IDS), parts.logits(base, IDS))


@pytest.mark.parametrize("reentrant", [True, False])
@TIES
def test_checkpointing_and_compiling_give_the_same_gradients(reentrant, tied):
    model = parts.adapted(parts.build(models.llama, tie_word_embeddings=tied), **RECIPE).train()
    gradients = []
    for how in ("plain", "checkpointed", "compiled"):
        if how == "checkpointed":
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
        if how == "compiled":
            model.activation_checkpointing_disable()
        model.zero_grad()
        run(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for others in gradients[1:]:
        for got, wanted in zip(others, gradients[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_code_that_reads_the_head_s_weight_sees_the_rows():
    class Chunked(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            hidden = self.model(input_ids).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(
                logits=F.linear(hidden, self.lm_head.weight)
            )

    base = parts.build(models.llama, tie_word_embeddings=True)
    model = parts.adapted(base, **RECIPE)
    chunked = copy.deepcopy(base)
    chunked.__class__ = Chunked
    chunked = parts.adapted(chunked, **RECIPE)
    torch.testing.assert_close(parts.logits(chunked, IDS), parts.logits(model, IDS), **CLOSE)


def test_doctor_finds_it_healthy(tmp_path):
    base = parts.build(models.llama, tie_word_embeddings=True)
    model = parts.adapted(base, **RECIPE)
    save_adapter(model, tmp_path)
    for report in (doctor(model), doctor(base, tmp_path)):
        assert report.healthy, str(report)
        assert not any("base parameters" in check.detail for check in report.checks)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.mid = nn.Linear(8, 8)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.mid(self.embed(ids)))


def shard_and_compare():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    recipe = LoRA(dim=2, seed=1, target_modules=["mid"], trainable_tokens={"embed": [1, 5, 9]})
    whole = parts.moved(recipe(Tokens()))
    sharded = copy.deepcopy(whole)
    fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (2,)))
    ids = torch.tensor([[1, 5, 2], [9, 0, 1]])
    torch.testing.assert_close(sharded(ids), whole(ids))
    for model in (whole, sharded):
        model(ids).square().mean().backward()
    for shard, tensor in zip(sharded.parameters(), whole.parameters(), strict=True):
        if tensor.grad is not None:
            torch.testing.assert_close(shard.grad.full_tensor(), tensor.grad)
    for name, tensor in adapter_state_dict(sharded).items():
        assert torch.equal(tensor, adapter_state_dict(whole)[name]), name


@pytest.mark.distributed
def test_fsdp2_gives_the_numbers_of_one_process(tmp_path):
    on_ranks(2, shard_and_compare, tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_assigned_from_meta_they_have_values_before_an_optimizer_takes_them(whole):
    full = parts.adapted(parts.build(models.llama), **RECIPE)
    with torch.no_grad():
        full.model.embed_tokens.token_rows.weight.add_(1.0)
    state = full.state_dict() if whole else parts.build(models.llama).state_dict()
    with torch.device("meta"):
        model = LoRA(dim=4, **RECIPE)(models.llama())
    model.load_state_dict(state, strict=whole, assign=True)
    rows = model.model.embed_tokens.token_rows
    assert not rows.weight.is_meta and not rows.indices.is_meta
    model.model.rotary_emb = copy.deepcopy(full.model.rotary_emb)
    expected = full if whole else parts.build(models.llama)
    torch.testing.assert_close(parts.logits(model, IDS), parts.logits(expected, IDS), **CLOSE)
    assert model.model.embed_tokens.token_rows is rows


def test_merged_they_leave_no_trace_in_the_checkpoint():
    model = parts.adapted(parts.build(models.llama), **RECIPE)
    before = model.state_dict().keys()
    merge(model)
    assert model.state_dict().keys() == parts.build(models.llama).state_dict().keys()
    with pytest.raises(RuntimeError, match="embed_tokens is merged: loading now would be undone"):
        model.load_state_dict(parts.build(models.llama).state_dict(), strict=False)
    unmerge(model)
    assert model.state_dict().keys() == before
