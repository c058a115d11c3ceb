"""Every quantised linear carries a branch: its output, its gradients, and what a merge does."""

import copy
import pickle

import pytest
import torch
from torch import nn

from bridge.peft import (
    AdapterError,
    LoRA,
    disable_adapters,
    merge,
    patch_linear_module,
    unmerge,
)
from bridge.peft.branch.quantised.table import dense_weight, format_of, weight_bytes
from bridge.peft.doctor import doctor
from bridge.peft.model.size import model_size
from tests.helpers.quantised import KINDS, N_IN, N_OUT, dense_linear, eight_bit, four_bit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*KernelPreference"),
    pytest.mark.filterwarnings("ignore:.*ScaleCalculationMode"),
]
kinds = pytest.mark.parametrize("kind", KINDS)


def adapted(kind, dim=4, **recipe):
    """A model of one quantised linear with a branch whose B is not zero; rows for it."""
    make, dtype, tolerance = KINDS[kind]
    model = LoRA(dim=dim, seed=0, **recipe)(nn.Sequential(make()))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model[0].lora_b.weight.copy_(torch.randn(N_OUT, dim, generator=generator) * 0.02)
    return model, torch.randn(6, N_IN, generator=generator).to(dtype), tolerance


def assert_near(got, expected, tolerance):
    """Equal within a tolerance relative to the largest value."""
    got, expected = got.detach().float(), expected.detach().float()
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@kinds
def test_before_training_the_output_is_the_bases_bit_for_bit(kind):
    make, dtype, _ = KINDS[kind]
    base, x = make(), torch.randn(3, N_IN).to(dtype)
    model = LoRA(dim=4)(nn.Sequential(make()))
    assert model[0].lora_path().name == "branch"
    assert torch.equal(model(x), base(x))


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_output_and_gradients_are_those_of_the_dequantised_base(kind, dropout):
    model, x, tolerance = adapted(kind, dropout=dropout)
    layer = model[0]
    weight, (a, b) = dense_weight(layer).float(), (layer.lora_a.weight, layer.lora_b.weight)
    oracle = nn.Sequential(nn.Linear(N_IN, N_OUT))
    with torch.no_grad():
        oracle[0].weight.copy_(weight)
        oracle[0].bias.copy_(layer.bias)
    patch_linear_module(oracle[0], dim=4, dropout=dropout, dropout_position="pre")
    oracle[0].scale = layer.scale
    with torch.no_grad():
        oracle[0].lora_a.weight.copy_(a)
        oracle[0].lora_b.weight.copy_(b)
    x, exact = x.clone().requires_grad_(), x.float().requires_grad_()
    torch.manual_seed(7)
    got = model(x)
    torch.manual_seed(7)
    expected = oracle(exact)
    assert_near(got, expected, tolerance)
    got.float().square().sum().backward()
    expected.square().sum().backward()
    assert_near(x.grad, exact.grad, 3 * tolerance + 1e-5)
    assert all(p.grad is None for p in (layer.weight, layer.bias))
    assert_near(a.grad, oracle[0].lora_a.weight.grad, 3 * tolerance + 1e-5)
    assert_near(b.grad, oracle[0].lora_b.weight.grad, 3 * tolerance + 1e-5)


@kinds
def test_a_merge_writes_the_dequantised_weight_and_the_update_and_unmerge_restores_every_bit(kind):
    model, x, tolerance = adapted(kind)
    model.eval()
    layer, before = model[0], model(x)
    update = layer.lora_b.weight.double() @ layer.lora_a.weight.double()
    exact = (dense_weight(layer).double() + layer.scale * update).detach()
    report = merge(model)
    assert layer.weight.dtype == torch.bfloat16 and list(model.state_dict()) == [
        "0.weight",
        "0.bias",
    ]
    error = (layer.weight.double() - exact).abs()
    assert bool((error <= 2**-8 * exact.abs() + 1e-7).all())  # rounded once, from float32
    assert report.rows[0].max_error == pytest.approx(float(error.max()), rel=1e-2)
    assert model(x).dtype == x.dtype
    assert_near(model(x), before, tolerance + 2**-7)
    with disable_adapters(model):
        base = model(x)
    assert_near(copy.deepcopy(model)(x), model(x), 0)
    unmerge(model)
    assert torch.equal(model(x), before)
    with disable_adapters(model):
        assert torch.equal(model(x), base)


@kinds
def test_a_merge_may_quantise_again_and_reports_the_error(kind):
    model, x, _ = adapted(kind)
    model.eval()
    layer, before = model[0], model(x)
    label, size = format_of(layer).label(layer), weight_bytes(layer)
    update = layer.lora_b.weight @ layer.lora_a.weight
    exact = (dense_weight(layer).float() + layer.scale * update).detach()
    (row,) = merge(model, requantize=True).rows
    assert (format_of(layer).label(layer), weight_bytes(layer)) == (label, size)
    error = (dense_weight(layer).float() - exact).abs()
    assert row.max_error == pytest.approx(float(error.max()), rel=1e-2)
    assert row.mean_error == pytest.approx(float(error.mean()), rel=1e-2)
    assert 0 < row.max_error < 0.3 * float(exact.abs().max())
    with disable_adapters(model):
        model(x)
    unmerge(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if not k.startswith("torchao i") and "float8" not in k]
)
@pytest.mark.parametrize("state", ["trained", "merged", "quantised again"])
def test_copies_and_pickles_compute_the_same_and_unmerge(kind, state):
    # torchao's own modules cannot be pickled: they carry a partial as `extra_repr`
    model, x, _ = adapted(kind)
    model.eval()
    before = model(x)
    if state != "trained":
        merge(model, requantize=state == "quantised again")
    now = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        assert torch.equal(other(x), now)
    for other in (copy.deepcopy(model), model):
        if state != "trained":
            unmerge(other)
        assert torch.equal(other(x), before)


@kinds
def test_state_dicts_come_back_after_a_merge(kind):
    model, x, _ = adapted(kind)
    keys = set(model.state_dict())
    merge(model)
    unmerge(model)
    assert set(model.state_dict()) == keys
    expected = model(x)
    other, _, _ = adapted(kind)
    with torch.no_grad():
        other[0].lora_b.weight.zero_()
    lora = {k: v for k, v in model.state_dict().items() if "lora" in k}
    other.load_state_dict(lora, strict=False)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_dtype_of_a_merged_weight_may_be_chosen(dtype):
    model, x, _ = adapted("nf4")
    expected = model(x)
    merge(model, dense_dtype=dtype)
    assert model[0].weight.dtype == dtype
    assert_near(model(x), expected, 1e-5 if dtype != torch.float16 else 2**-9)
    with pytest.raises(AdapterError, match="dense_dtype must be a floating dtype"):
        merge(adapted("nf4")[0], dense_dtype=torch.int8)


def test_a_merge_that_gives_the_base_up_leaves_a_plain_layer():
    model, _, _ = adapted("nf4")
    merge(model, keep_base=False)
    assert not any(isinstance(v, torch.Tensor) for v in vars(model[0]).values())
    with pytest.raises(AdapterError, match="keep_base=False"):
        unmerge(model)


def test_a_merge_that_breaks_off_leaves_every_layer_as_it_was(monkeypatch):
    model = LoRA(dim=4)(nn.Sequential(four_bit(quant_type="nf4"), eight_bit()))
    x = torch.randn(3, N_IN)
    before, classes = model(x), [type(m) for m in model]
    from bridge.peft.merging import in_memory

    good, calls = in_memory.merge_dense, []

    def breaks(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return good(*args)

    monkeypatch.setattr(in_memory, "merge_dense", breaks)
    with pytest.raises(MemoryError):
        merge(model)
    assert [type(m) for m in model] == classes and torch.equal(model(x), before)


def test_a_scale_that_is_not_finite_is_refused_before_anything_is_touched():
    model, _, _ = adapted("nf4 double")
    model[0].weight.quant_state.offset = torch.tensor(float("nan"))
    with pytest.raises(AdapterError, match="0: base weight holds NaN or inf"):
        merge(model)
    assert not model[0].merged


def test_a_cpu_layout_for_inference_is_told_of_and_gives_gradients_again():
    base = four_bit(torch.bfloat16, quant_type="nf4").eval()
    x = torch.randn(3, N_IN, dtype=torch.bfloat16)
    base.support_avx512bf16_for_cpu = True  # as on a machine with AVX-512 and its bfloat16 units
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    data, _ = _convert_weight_packed_for_cpu(base.weight.data, base.weight.quant_state)
    base.weight.data = data
    dense = dense_weight(base)
    model = nn.Sequential(base)
    with pytest.warns(UserWarning, match="0: an evaluation before had laid it out for inference"):
        LoRA(dim=4)(model)
    assert torch.equal(dense_weight(model[0]), dense)
    x.requires_grad_()
    model.eval()(x).sum().backward()
    assert_near(x.grad, dense.sum(0).expand(3, -1), 2e-2)


@pytest.mark.parametrize(
    ("kind", "bits"),
    # nf4: 4 bits, a float32 scale for each 64 weights, a table of 16; double quantised: a byte for
    # each 64, a float32 for each 256 of these, a table of 256 and an offset
    [("nf4", 4 + 32 / 64 + 16 * 32 / N_IN / N_OUT), ("int8", 8 + 32 / N_IN)],
)
def test_bytes_are_those_of_values_scales_and_tables(kind, bits):
    make, _, _ = KINDS[kind]
    model = nn.Sequential(make(), nn.LayerNorm(N_OUT))
    size = model_size(model)
    (part,) = size.quantised
    assert (part.modules, part.parameters) == (1, N_IN * N_OUT)
    assert 8 * part.bytes / part.parameters == pytest.approx(bits)
    rest = sum(p.nbytes for p in (model[0].bias, *model[1].parameters()))
    assert size.bytes == part.bytes + rest
    plan = LoRA(dim=4).plan(model)
    assert plan.base_bytes == size.bytes and plan.base_parameters == N_IN * N_OUT + 3 * N_OUT
    assert plan.rows[0].quantised == part.label and part.label in str(plan)
    assert plan.to_dict()["quantised"][0]["bytes"] == part.bytes


@kinds
def test_the_doctor_finds_nothing_wrong(kind):
    model, _, _ = adapted(kind)
    report = doctor(model)
    assert report.healthy, report
    assert report["NaN and inf in the base"].status == "pass"
    assert report["merge forecast"].status in ("pass", "warn")


def test_what_is_not_quantised_has_no_format():
    assert format_of(dense_linear()) is None and weight_bytes(dense_linear()) is None
    linear = dense_linear()
    assert torch.equal(dense_weight(linear), linear.weight)


@pytest.mark.parametrize("kind", ["nf4 double", "int8", "torchao int8 float32"])
@pytest.mark.parametrize("recipe", [{"use_dora": True}, {"lora_A_init_method": "pissa"}])
def test_the_other_functions_of_a_branch_merge_on_a_quantised_base(kind, recipe):
    model, x, tolerance = adapted(kind, **recipe)
    model.eval()
    before = model(x)
    report = merge(model, dense_dtype=torch.float32)
    assert report.rows[0].max_error < 1e-6
    assert_near(model(x), before, 4 * tolerance + 1e-5)
    unmerge(model)
    assert torch.equal(model(x), before)
    assert 0 < merge(model, requantize=True).rows[0].max_error
    unmerge(model)
    assert torch.equal(model(x), before)
