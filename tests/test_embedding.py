"""Embeddings as targets: a lookup into A, then B, on the base's own forward."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding

from bridge.peft import LoRA, adapter_state_dict, disable_adapters, load_adapter, save_adapter
from bridge.peft.branch.options import BranchOptions
from bridge.peft.branch.patch import patch_in_place
from bridge.peft.doctor import doctor
from bridge.peft.errors import TargetError, UnsupportedLinearError
from bridge.peft.ops.lookup import Lookup, lora_lookup
from bridge.peft.ops.reference import lora_lookup_reference
from tests.helpers import models, parts
from tests.helpers.ranks import on_ranks

EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}
IDS = torch.tensor([[1, 5, 5], [3, 0, 9]])


def layer(*size, **options):
    torch.manual_seed(0)
    embedding = nn.Embedding(*(size or (12, 6)), **options)
    return patch_in_place(embedding, BranchOptions(dim=3, alpha=6), 1)


def moved_layer(*size, **options):
    made = layer(*size, **options)
    with torch.no_grad():
        made.lora_a.weight.normal_(generator=torch.Generator().manual_seed(3))
    return made


def test_state_dict_names_and_shapes():
    shapes = {name: tuple(t.shape) for name, t in layer().state_dict().items()}
    assert shapes == {"weight": (12, 6), "lora_a.weight": (3, 12), "lora_b.weight": (6, 3)}


def test_output_is_the_base_s_at_the_start_and_a_is_zero():
    made = layer()
    assert torch.equal(made(IDS), F.embedding(IDS, made.weight))
    assert not made.lora_a.weight.any()
    assert made.lora_b.weight.std().item() == pytest.approx(1.0, abs=0.5)


def test_start_depends_on_seed_and_name_alone():
    b = [LoRA(dim=2, seed=s, target_modules=["embed_tokens"])(models.llama()) for s in (1, 1, 2)]
    first, again, other = (m.model.embed_tokens.lora_b.weight for m in b)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_output_is_that_of_the_dense_sum():
    made = moved_layer()
    dense = made.weight + made.scale * (made.lora_b.weight @ made.lora_a.weight).t()
    torch.testing.assert_close(made(IDS), F.embedding(IDS, dense))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [None, 3.0, torch.tensor(3.0)])
def test_fast_lookup_agrees_with_the_reference(dtype, factor):
    base = torch.randn(2, 3, 6, dtype=dtype)
    a, b = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((3, 12), (6, 3)))
    lookup = Lookup(padding_idx=5, factor=factor)
    fast = lora_lookup(base, IDS, a, b, 0.5, lookup)
    expected = base + (factor or 1.0) * lora_lookup_reference(IDS, a, b, 0.5, padding_idx=5)
    coarse = dtype.itemsize == 2
    close = {"rtol": 2e-2, "atol": 5e-2} if coarse else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(fast, expected.to(dtype), **close)
    grads = [torch.autograd.grad(y.square().sum(), (a, b)) for y in (fast, expected)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=close["rtol"] * 5, atol=close["atol"] * 10)


def test_gradients_are_those_of_finite_differences():
    a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 10), (4, 2)))
    base = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, b: lora_lookup(base, IDS, a, b, 0.5, Lookup()), (a, b)
    )


@pytest.mark.parametrize("lora_dtype", [None, torch.float32])
def test_half_precision_bases_keep_their_dtype_and_train_in_float32(lora_dtype):
    model = LoRA(**EMBEDDING, lora_dtype=lora_dtype)(models.llama().to(torch.bfloat16))
    embedding = model.model.embed_tokens
    assert embedding.lora_a.weight.dtype == torch.float32
    assert embedding(IDS).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert embedding(IDS).dtype == torch.bfloat16
    embedding(IDS).sum().backward()
    assert embedding.lora_a.weight.grad.dtype == torch.float32


def test_autocast_keeps_a_float32_embedding_in_float32():
    made = moved_layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert made(IDS).dtype == torch.float32


def test_a_token_that_is_not_trained_on_keeps_its_embedding_and_so_does_padding():
    model = LoRA(**EMBEDDING, dim=4)(parts.build(models.llama, pad_token_id=0))
    before = model.model.embed_tokens(torch.arange(64))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        model(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.model.embed_tokens(torch.arange(64))
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert changed == [1, 3, 5, 9]


def test_gradient_by_frequency_is_the_base_s_rule():
    made = layer(scale_grad_by_freq=True)
    (gradient,) = torch.autograd.grad(made(IDS).sum(), [made.lora_a.weight])
    torch.testing.assert_close(gradient[:, 5], gradient[:, 1])


def test_a_scaled_embedding_scales_its_branch():
    base = parts.build(parts.gemma3)
    model = parts.adapted(base, **EMBEDDING)
    embedding = model.model.embed_tokens
    dense = (
        embedding.weight
        + embedding.scale * embedding.lora_b.weight.matmul(embedding.lora_a.weight).t()
    )
    expected = F.embedding(IDS, dense) * embedding.embed_scale
    torch.testing.assert_close(embedding(IDS), expected)


@pytest.mark.parametrize(
    ("embedding", "reason"),
    [
        (nn.Embedding(8, 4, max_norm=1.0), "max_norm"),
        (nn.Embedding(8, 4, sparse=True), "sparse=False"),
        (BartLearnedPositionalEmbedding(64, 4), "not a lookup of its rows"),
    ],
)
def test_an_embedding_that_does_more_than_look_up_is_refused(embedding, reason):
    nn.init.normal_(embedding.weight)
    with pytest.raises(UnsupportedLinearError, match=reason):
        patch_in_place(embedding, BranchOptions())


def test_all_linear_takes_no_embedding_and_a_near_miss_names_one():
    model = models.llama()
    assert not any("embed" in row.fqn for row in LoRA().plan(model).rows)
    with pytest.raises(TargetError, match="did you mean 'embed_tokens'"):
        LoRA(target_modules=["embed_token"]).plan(model)


def test_plan_counts_what_is_trained_and_no_product_with_a():
    model = models.llama()
    recipe = LoRA(dim=4, target_modules=["embed_tokens"], rank_pattern={"embed_tokens": 2})
    (row,) = recipe.plan(model).rows
    assert (row.in_features, row.out_features, row.dim) == (64, 32, 2)
    assert row.flops_per_token == 2 * 2 * 32
    recipe(model)
    assert row.trainable == sum(t.numel() for t in adapter_state_dict(model).values())


def test_dropout_acts_after_b_and_the_recipe_says_where_it_does_not():
    with pytest.warns(UserWarning, match="an embedding's input is a token"):
        LoRA(target_modules=["embed_tokens"], dropout=0.5)(models.llama())
    recipe = LoRA(target_modules=["embed_tokens"], dropout=0.5, dropout_position="post")
    embedding = parts.moved(recipe(models.llama())).model.embed_tokens
    ids = torch.arange(64)
    torch.manual_seed(3)
    dropped = embedding(ids) == F.embedding(ids, embedding.weight)
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.1)
    torch.manual_seed(3)
    again = embedding(ids)
    torch.manual_seed(3)
    assert torch.equal(again, embedding(ids))
    embedding.eval()
    assert not (embedding(ids) == F.embedding(ids, embedding.weight)).all(dim=1).any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(copied):
    made = moved_layer()
    assert torch.equal(copied(made)(IDS), made(IDS))


def test_disabled_it_is_the_base_bit_for_bit():
    base = parts.build(models.llama)
    model = parts.adapted(base, **EMBEDDING)
    assert not torch.allclose(parts.logits(model), parts.logits(base))
    with disable_adapters(model):
        assert torch.equal(parts.logits(model), parts.logits(base))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant):
    model = parts.adapted(parts.build(models.llama), **EMBEDDING).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**models.inputs(model), use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for got, wanted in zip(*gradients, strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted)


def test_it_compiles_to_one_graph_and_trains_there():
    made = moved_layer()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), made(IDS))
    wanted = torch.autograd.grad(made(IDS).square().sum(), a_and_b(made))
    got = torch.autograd.grad(compiled(IDS).square().sum(), a_and_b(made))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def a_and_b(made):
    return (made.lora_a.weight, made.lora_b.weight)


def test_hooks_on_a_and_b_bring_their_weights():
    made = moved_layer(padding_idx=5)
    wanted = made(IDS)
    gradient = torch.autograd.grad(wanted.square().sum(), a_and_b(made))
    made.lora_a.register_forward_pre_hook(lambda module, args: None)
    torch.testing.assert_close(made(IDS), wanted)
    again = torch.autograd.grad(made(IDS).square().sum(), a_and_b(made))
    for one, other in zip(again, gradient, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("moved", [False, True])
def test_doctor_finds_an_adapted_embedding_healthy(moved):
    model = LoRA(**EMBEDDING, dim=4, seed=1)(parts.build(models.llama))
    report = doctor(parts.moved(model) if moved else model)
    assert report.healthy, str(report)
    assert not moved or not any(c.status == "skip" for c in report.checks), str(report)


def test_meta_model_materialises_reproducibly():
    with torch.device("meta"):
        model = LoRA(**EMBEDDING, dim=4, seed=1)(models.llama())
    model.to_empty(device="cpu")
    real = LoRA(**EMBEDDING, dim=4, seed=1)(models.llama())
    for name, tensor in adapter_state_dict(real).items():
        assert torch.equal(adapter_state_dict(model)[name], tensor), name


def test_resize_is_refused_once_the_embedding_is_adapted():
    model = LoRA(**EMBEDDING)(models.llama())
    with pytest.raises(ValueError, match="input embedding, which is adapted"):
        model.resize_token_embeddings(70)


def test_a_resized_embedding_is_saved_with_its_adapter(tmp_path):
    base = parts.build(models.llama)
    base.save_pretrained(tmp_path / "base")
    load = type(base).from_pretrained
    model = load(tmp_path / "base")
    model.resize_token_embeddings(70, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = parts.moved(LoRA(**EMBEDDING, dim=4)(model))
        save_adapter(model, tmp_path / "adapter")
        other = load(tmp_path / "base")
        other.resize_token_embeddings(70, mean_resizing=False)
        load_adapter(other, tmp_path / "adapter")
    ids = torch.tensor([[1, 68, 69]])
    torch.testing.assert_close(parts.logits(other, ids), parts.logits(model, ids))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(12, 8), nn.Linear(8, 4)

    def forward(self, ids):
        return self.out(self.embed(ids))


def shard_and_compare():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = parts.moved(LoRA(dim=3, seed=1, target_modules=["embed", "out"])(Tokens()))
    sharded = copy.deepcopy(whole)
    mesh = dist.init_device_mesh("cpu", (2,))
    fully_shard(sharded.embed, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert torch.equal(sharded(IDS), whole(IDS))
    for model in (whole, sharded):
        model(IDS).square().mean().backward()
    for shard, tensor in zip(sharded.parameters(), whole.parameters(), strict=True):
        if tensor.grad is not None:
            torch.testing.assert_close(shard.grad.full_tensor(), tensor.grad)
    for name, tensor in adapter_state_dict(sharded).items():
        assert torch.equal(tensor, adapter_state_dict(whole)[name]), name


@pytest.mark.distributed
def test_fsdp2_gives_the_numbers_of_one_process(tmp_path):
    on_ranks(2, shard_and_compare, tmp_path)


def test_dora_and_starts_out_of_the_weight_are_for_linears():
    for options in ({"use_dora": True}, {"lora_A_init_method": "olora"}):
        model = parts.build(models.llama)
        with pytest.raises(UnsupportedLinearError, match="which is for linears"):
            LoRA(**EMBEDDING, **options)(model)
        assert all(p.requires_grad for p in model.parameters())


def test_with_a_frozen_b_is_what_starts_at_zero():
    model = LoRA(**EMBEDDING, freeze_a=True)(parts.build(models.llama))
    embedding = model.model.embed_tokens
    assert embedding.lora_a.weight.any() and not embedding.lora_b.weight.any()
    (gradient,) = torch.autograd.grad(embedding(IDS).sum(), [embedding.lora_b.weight])
    assert gradient.any()
