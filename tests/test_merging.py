"""Merging: one rounding and no more, all the way back, and never half of it."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from bridge.peft import (
    AdapterError,
    LinearAdapter,
    LoRA,
    LoRALinear,
    disable_adapters,
    merge,
    unmerge,
)
from bridge.peft.merging import in_memory, rounding
from bridge.peft.merging.in_memory import merge_weight
from tests.helpers import models

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF_ULP = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}


def layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_b")]


def trained(model, size=0.1, **recipe):
    """The model adapted, every B moved away from zero."""
    model = LoRA(**({"dim": 4, "seed": 1} | recipe))(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in layers(model):
            values = torch.randn(layer.lora_b.weight.shape, generator=generator) * size
            layer.lora_b.weight.copy_(values)
    return model.eval()


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(bits(one[name]), bits(other[name])), name


def logits(model):
    with torch.no_grad():
        return model(**models.inputs(model)).logits


@st.composite
def branches(draw):
    """W, A, B and a scale: any small shape, any trainable dtypes, ordinary sizes."""
    rows, columns, rank = (draw(st.integers(1, 9)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = [draw(st.sampled_from(DTYPES)) for _ in range(2)]
    size = 10.0 ** draw(st.integers(-4, 0))
    weight = torch.randn(rows, columns, generator=generator).to(kinds[0])
    a = torch.randn(rank, columns, generator=generator).to(kinds[1])
    b = (torch.randn(rows, rank, generator=generator) * size).to(kinds[1])
    return weight, a, b, draw(st.sampled_from((0.25, 1.0, 2.0, -3.0)))


@settings(max_examples=150, deadline=None)
@given(branches(), st.sampled_from(in_memory.COMPUTE_DTYPES))
def test_merged_weight_is_the_exact_sum_rounded_once(branch, dtype):
    weight, a, b, scale = branch
    merged, row = merge_weight(weight, a, b, scale, compute_dtype=dtype)
    exact = weight.double() + scale * (b.double() @ a.double())
    # one rounding to the weight's dtype, and float32's error in computing the sum before it
    terms = weight.double().abs() + abs(scale) * (b.double().abs() @ a.double().abs())
    computing = HALF_ULP[torch.promote_types(dtype, weight.dtype)] * 12 * terms
    tiny = torch.finfo(weight.dtype).smallest_normal * HALF_ULP[weight.dtype]
    allowed = exact.abs() * HALF_ULP[weight.dtype] * 1.01 + computing + tiny
    error = (merged.double() - exact).abs()
    assert merged.dtype == weight.dtype
    assert bool((error <= allowed).all())
    assert row.max_error == pytest.approx(error.max().item(), abs=computing.max().item())
    assert row.mean_error == pytest.approx(error.mean().item(), abs=computing.max().item())


@settings(max_examples=100, deadline=None)
@given(branches())
def test_report_counts_what_the_rounding_swallowed(branch):
    weight, a, b, scale = branch
    merged, row = merge_weight(weight, a, b, scale)
    update = scale * (b.double() @ a.double())
    # a row of B or a column of A may have underflowed to 0: nothing was to change there
    meant = (b != 0).any(1)[:, None] & (a != 0).any(0)
    kept = (merged == weight)[meant].float()
    assert row.unchanged == pytest.approx(kept.mean().item() if len(kept) else 0.0)
    assert row.relative_update == pytest.approx(
        (update.norm() / weight.double().norm()).item(), rel=1e-5
    )


def test_rows_and_columns_without_an_update_do_not_count_as_unchanged():
    a, b = torch.ones(1, 4), torch.ones(3, 1)
    a[0, 1], b[2, 0] = 0, 0
    _, row = merge_weight(torch.ones(3, 4), a, b, 1.0)
    assert row.unchanged == 0
    assert merge_weight(torch.ones(3, 4), a, b * 0, 1.0)[1].unchanged == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_size_of_the_blocks_changes_nothing(dtype, monkeypatch):
    weight, a, b = torch.randn(37, 8).to(dtype), torch.randn(2, 8), torch.randn(37, 2)
    whole, row = merge_weight(weight, a, b, 0.5)
    monkeypatch.setitem(rounding._BLOCK, "cpu", 24)
    cut, row_of_blocks = merge_weight(weight, a, b, 0.5)
    torch.testing.assert_close(cut, whole, rtol=HALF_ULP[dtype] * 2, atol=0)
    assert row_of_blocks.unchanged == row.unchanged
    assert row_of_blocks.mean_error == pytest.approx(row.mean_error, rel=1e-3)


def test_float64_weights_lose_nothing_to_a_float32_computation():
    weight = torch.tensor([[1 + 2.0**-40]], dtype=torch.float64)
    merged, row = merge_weight(weight, torch.ones(1, 1), torch.full((1, 1), 2.0**-45), 1.0)
    assert merged.item() == 1 + 2.0**-40 + 2.0**-45
    assert row.max_error == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_error_of_a_sum_in_its_own_dtype_is_reported_too(dtype):
    eps = torch.finfo(dtype).eps
    weight, b = torch.ones(1, 1, dtype=dtype), torch.full((1, 1), eps / 4, dtype=dtype)
    merged, row = merge_weight(weight, torch.ones(1, 1), b, 1.0, compute_dtype=dtype)
    assert merged.item() == 1
    assert row.max_error == pytest.approx(eps / 4)
    assert row.unchanged == 1


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_weights_merge_to_empty_weights(shape):
    rows, columns = shape
    merged, row = merge_weight(torch.empty(shape), torch.ones(2, columns), torch.ones(rows, 2), 1.0)
    assert merged.shape == shape
    assert (row.max_error, row.unchanged) == (0, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_unmerge_restores_every_bit(kind, dtype):
    model = getattr(models, kind)().to(dtype)
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() == 2).view(-1)[0] = -0.0
    model = trained(model)
    before, answer = state(model), logits(model)
    merge(model)
    assert not torch.equal(logits(model), answer) or dtype == torch.float64
    unmerge(model)
    assert_same_bits(state(model), before)
    assert torch.equal(logits(model), answer)
    assert all(layer.unmerged_weight is None for layer in layers(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "mixtral"])
def test_merged_model_computes_what_the_adapted_one_computed(kind):
    model = trained(getattr(models, kind)())
    base = copy.deepcopy(model)
    for layer in layers(base):
        layer.adapter_enabled = False
    adapted = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    assert (logits(base) - adapted).abs().max() > 100 * (logits(model) - adapted).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merged_logits_differ_as_much_as_noise_of_the_reported_size_makes_them(dtype):
    model = trained(models.llama().to(dtype), size=0.002)
    exact = copy.deepcopy(model).double()
    wanted = logits(exact)
    merged = copy.deepcopy(model)
    report = merge(merged)
    difference = (logits(merged.double()) - wanted).norm()

    merge(exact, compute_dtype=torch.float64)
    with torch.no_grad():
        for layer, row in zip(layers(exact), report.rows, strict=True):
            noise = torch.rand_like(layer.weight).mul_(4).sub_(2) * row.mean_error
            layer.weight.add_(noise)
    predicted = (logits(exact) - wanted).norm()
    assert 0.5 < difference / predicted < 2
    assert all(row.max_error < 0.01 for row in report.rows)


def test_merged_state_dict_is_a_dense_model_that_transformers_saves_and_loads(tmp_path):
    model = trained(models.llama())
    merge(model)
    assert state(model).keys() == models.llama().state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = type(models.llama()).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_without_its_base_a_merged_model_stays_merged():
    model = trained(models.llama())
    merge(model, keep_base=False)
    merged = state(model)
    for step in (unmerge, lambda m: disable_adapters(m).__enter__()):
        with pytest.raises(AdapterError, match=r"keep_base=False.*load the base model again"):
            step(model)
    assert_same_bits(state(model), merged)
    assert all(layer.unmerged_weight is None for layer in layers(model))


def test_merged_twice_or_never_is_refused():
    model = trained(models.llama())
    with pytest.raises(AdapterError, match="nothing is merged"):
        unmerge(model)
    merge(model)
    merged = state(model)
    with pytest.raises(AdapterError, match=r"merged already; unmerge\(model\) first"):
        merge(model)
    assert_same_bits(state(model), merged)
    with pytest.raises(AdapterError, match="no adapters to merge"):
        merge(models.llama())


def test_compute_dtype_other_than_float32_or_float64_is_refused():
    with pytest.raises(AdapterError, match=r"float32 or torch.float64, got torch.bfloat16"):
        merge(trained(models.llama()), compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["lora_a.weight", "lora_b.weight", "weight"])
def test_nan_and_inf_refuse_before_anything_is_touched(place, bad):
    model = trained(models.llama())
    last = layers(model)[-1]
    with torch.no_grad():
        last.get_parameter(place)[1, 1] = bad
    before = state(model)
    with pytest.raises(AdapterError, match=r"down_proj: .* NaN or inf; nothing was merged"):
        merge(model)
    assert_same_bits(state(model), before)
    assert not any(layer.merged for layer in layers(model))


def test_a_sum_that_overflows_refuses_before_anything_is_touched():
    model = trained(models.llama().half())
    with torch.no_grad():
        last = layers(model)[-1]
        last.lora_a.weight.fill_(100)
        last.lora_b.weight.fill_(1000)
    before = state(model)
    with pytest.raises(AdapterError, match=r"overflows torch.float16; nothing was merged"):
        merge(model)
    assert_same_bits(state(model), before)


def test_large_but_finite_sums_are_merged():
    layer = trained(nn.Sequential(nn.Linear(4, 4).half()))
    with torch.no_grad():
        layer[0].weight.fill_(-60000)
        layer[0].lora_a.weight.fill_(100)
        layer[0].lora_b.weight.fill_(12.5)
    merge(layer)
    assert layer[0].weight.max().item() == -20000


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_merge_leaves_the_model_as_it_was(error, monkeypatch):
    model = trained(models.llama())
    before, calls = state(model), []

    def fail_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return merge_weight(*args, **kwargs)

    monkeypatch.setattr(in_memory, "merge_weight", fail_at_the_third)
    with pytest.raises(error):
        merge(model)
    assert_same_bits(state(model), before)
    assert not any(layer.merged for layer in layers(model))


def test_disabled_adapters_are_the_base_bit_for_bit_while_merged():
    base = models.llama().eval()
    wanted = logits(base)
    model = trained(copy.deepcopy(base))
    merge(model)
    merged, answer = state(model), logits(model)
    with disable_adapters(model):
        assert torch.equal(logits(model), wanted)
        with disable_adapters(model):
            assert torch.equal(logits(model), wanted)
        assert torch.equal(logits(model), wanted)
    assert_same_bits(state(model), merged)
    assert torch.equal(logits(model), answer)


def test_merging_and_unmerging_inside_disable_adapters_are_refused():
    model = trained(models.llama())
    before = state(model)
    with disable_adapters(model), pytest.raises(AdapterError, match="leave disable_adapters"):
        merge(model)
    merge(model)
    with disable_adapters(model), pytest.raises(AdapterError, match="leave disable_adapters"):
        unmerge(model)
    unmerge(model)
    assert_same_bits(state(model), before)


def test_a_tied_head_is_refused_and_named():
    model = trained(models.llama(tie_word_embeddings=True), target_modules=["lm_head", "q_proj"])
    before = state(model)
    with pytest.raises(
        AdapterError, match=r"lm_head shares its weight with model.embed_tokens.weight.*untie=True"
    ):
        merge(model)
    assert_same_bits(state(model), before)
    assert model.config.tie_word_embeddings


def test_untied_on_request_the_embedding_keeps_its_values_and_the_head_its_own(tmp_path):
    base = models.llama(tie_word_embeddings=True).eval()
    embedding = base.model.embed_tokens.weight.detach().clone()
    model = trained(copy.deepcopy(base), target_modules=["lm_head", "q_proj"])
    adapted = logits(model)
    merge(model, untie=True)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(base).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), adapted, rtol=1e-4, atol=1e-5)
    with disable_adapters(model):
        assert torch.equal(logits(model), logits(base))


def test_unmerge_after_untying_restores_the_values_and_stays_untied():
    base = models.llama(tie_word_embeddings=True).eval()
    model = trained(copy.deepcopy(base), target_modules=["lm_head"])
    before, adapted = state(model), logits(model)
    merge(model, untie=True)
    unmerge(model)
    assert_same_bits(state(model), before)
    assert torch.equal(logits(model), adapted)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    merge(model)


def test_a_view_into_another_modules_weight_counts_as_shared_and_its_neighbour_does_not():
    packed = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight, model[1].weight = nn.Parameter(packed[:4]), nn.Parameter(packed[4:])
    merge(trained(model))
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 6, bias=False))
    model[0].weight, model[1].weight = nn.Parameter(packed[:4]), nn.Parameter(packed[2:])
    with pytest.raises(AdapterError, match=r"0 shares its weight with 1.weight"):
        merge(trained(model, target_modules=["0"]))


def test_one_linear_under_two_names_is_merged_once():
    linear = nn.Linear(4, 4)
    model = trained(nn.Sequential(linear, nn.ReLU(), linear))
    x = torch.randn(3, 4)
    adapted = model(x)
    assert len(merge(model).rows) == 1
    torch.testing.assert_close(model(x), adapted)


def test_meta_and_wrapped_bases_are_refused():
    with torch.device("meta"):
        model = models.llama()
    with pytest.raises(AdapterError, match="meta device; load its weights"):
        merge(LoRA(dim=2)(model))
    linear = nn.Linear(4, 4)
    wrapped = nn.Sequential(LoRALinear(linear, LinearAdapter(linear)))
    with pytest.raises(AdapterError, match="0 wraps its base in LoRALinear"):
        merge(wrapped)


def test_the_old_name_of_the_computation_s_dtype_still_works():
    model = trained(models.llama())
    with pytest.warns(DeprecationWarning, match="compute_dtype"):
        merge(model, dtype=torch.float64)


def encoder(**more):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **more)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.filterwarnings("ignore:.*zeros at padded positions")
def test_torch_encoders_merge_like_any_other_model():
    base = encoder()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        wanted = base(x)
        model = trained(copy.deepcopy(base))
        adapted = model(x)
        assert not torch.allclose(adapted, wanted, atol=1e-3)
        merge(model)
        torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
        with disable_adapters(model):
            assert torch.equal(model(x), wanted)
        unmerge(model)
        assert torch.equal(model(x), adapted)


def test_copies_and_pickles_of_a_merged_model_can_be_unmerged():
    model = trained(models.llama())
    before = state(model)
    merge(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        unmerge(other)
        assert_same_bits(state(other), before)


def test_a_merged_model_that_was_cast_unmerges_to_the_cast_base():
    model = trained(models.llama())
    wanted = {n: t.bfloat16() for n, t in state(model).items()}
    merge(model)
    model.bfloat16()
    unmerge(model)
    assert_same_bits(state(model), wanted)


def test_loading_into_a_merged_model_is_refused():
    model = trained(models.llama())
    values = state(model)
    merge(model)
    with pytest.raises(RuntimeError, match=r"is merged: .*unmerge\(model\) first"):
        model.load_state_dict(values)


def test_an_update_too_small_for_bfloat16_is_reported_as_lost():
    model = trained(models.llama().bfloat16(), size=1e-6, lora_dtype=torch.float32)
    report = merge(model)
    assert len(report.lost) == len(report.rows)
    unmerge(model)
    assert not merge(model.float()).lost


@pytest.mark.parametrize(
    "reparametrise",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ],
    ids=["pruned", "weight_norm", "spectral_norm"],
)
def test_weights_computed_from_other_parameters_are_refused(reparametrise):
    model = nn.Sequential(nn.Linear(8, 8))
    reparametrise(model[0])
    x = torch.randn(2, 8)
    trained(model)
    adapted = model.eval()(x)
    with pytest.raises(AdapterError, match="weight of 0 is computed from other parameters"):
        merge(model)
    assert torch.equal(model(x), adapted)
