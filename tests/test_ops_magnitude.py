"""DoRA's rescaling and norms on tensors, against dense formulas in float64."""

import pytest
import torch
from torch.testing import assert_close

from bridge.peft.ops.dispatch import lora_linear, project, rescale
from bridge.peft.ops.magnitude import RescaleFunction, factor_of, row_norms, row_squares
from bridge.peft.ops.reference import dora_linear_reference, rescale_reference

SCALE = 0.7
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def case(dtype=torch.float32, shape=(2, 150, 40), out=24, dim=4, bias=True, lora_dtype=None):
    """x, W, b, A, B, m: the base's first, then the branch's; all but W and b want gradients."""
    torch.manual_seed(1)
    x, w = torch.randn(*shape), torch.randn(out, shape[-1]) / shape[-1] ** 0.5
    a, b = torch.randn(dim, shape[-1]) / shape[-1] ** 0.5, torch.randn(out, dim)
    m = 1 + 0.3 * torch.randn(out)
    base = [x.to(dtype), w.to(dtype), torch.randn(out).to(dtype) if bias else None]
    lora = [t.to(lora_dtype or dtype) for t in (a, b, m)]
    return [base[0].requires_grad_(), *base[1:], *(t.requires_grad_() for t in lora)]


def fast(x, w, bias, a, b, m):
    out = lora_linear(x, w, bias, a, b, SCALE)
    with torch.no_grad():
        norm = row_norms(row_squares(w), project(w, a), a, b, SCALE)
    return rescale(out, m, norm, bias)


def slow(x, w, bias, a, b, m):
    return dora_linear_reference(x, w, bias, a, b, m, SCALE)


def results(y, t, dy):
    """y, dx, dA, dB, dm."""
    return [y, *torch.autograd.grad(y, (t[0], *t[3:]), dy.to(y.dtype))]


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def cast(t, dtype):
    """The same tensors in one dtype, with the same wish for gradients."""
    return [v if v is None else v.detach().to(dtype).requires_grad_(v.requires_grad) for v in t]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=["same", "lora32"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients_are_as_exact_as_the_dense_formula_in_the_same_dtype(
    dtype, lora_dtype, bias
):
    t = case(dtype, (2, 300, 128), 96, 16, bias, lora_dtype)
    dy = torch.randn(2, 300, 96, dtype=torch.float64)
    inputs = cast(t, torch.float64)
    exact = results(slow(*inputs), inputs, dy.to(dtype))
    got = results(fast(*t), t, dy)
    reference = results(slow(*t), t, dy)
    # float32 A and B are multiplied in bfloat16 where x is
    narrowed = 2.0**-8 if (dtype, lora_dtype) == (torch.bfloat16, torch.float32) else 0.0
    for name, g, r, e in zip(("y", "dx", "dA", "dB", "dm"), got, reference, exact, strict=True):
        assert g.shape == r.shape
        assert error(g, e) <= 1.2 * error(r, e) + narrowed + 1e-9, name


def test_in_float64_it_is_the_dense_formula():
    t = case(torch.float64)
    dy = torch.randn(2, 150, 24, dtype=torch.float64)
    for got, want in zip(results(fast(*t), t, dy), results(slow(*t), t, dy), strict=True):
        assert_close(got, want)


def test_a_trained_bias_gets_its_whole_gradient():
    t = case(torch.float64)
    t[2].requires_grad_()
    (got,) = torch.autograd.grad(fast(*t).square().sum(), t[2])
    (want,) = torch.autograd.grad(slow(*t).square().sum(), t[2])
    assert_close(got, want)


@pytest.mark.parametrize("shape", [(40,), (7, 40), (2, 3, 7, 40), (0, 40), (2, 0, 40)])
def test_any_number_of_leading_dimensions_and_no_tokens(shape):
    t = case(torch.float64, shape)
    dy = torch.randn(*shape[:-1], 24, dtype=torch.float64)
    for got, want in zip(results(fast(*t), t, dy), results(slow(*t), t, dy), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS], ids=str)
def test_where_the_magnitude_is_the_norm_the_output_stays_bit_for_bit(dtype, bias):
    x, w, bias, a, b, _ = case(dtype, bias=bias)
    norm = row_norms(row_squares(w), project(w, a), a, torch.zeros_like(b), SCALE)
    out = lora_linear(x, w, bias, a, torch.zeros_like(b), SCALE)
    for m in (norm, norm.to(dtype)):
        assert torch.equal(rescale(out, m, norm, bias), torch.nn.functional.linear(x, w, bias))
        assert torch.equal(rescale_reference(out, m, norm, bias), out)


def test_norms_are_those_of_the_dense_sum_and_without_an_update_those_of_the_weight():
    _, w, _, a, b, _ = case()
    for size in (1e-3, 1.0, 30.0):
        got = row_norms(row_squares(w), project(w, a), a, size * b, SCALE)
        dense = (w.double() + SCALE * size * b.double() @ a.double()).norm(dim=1)
        assert_close(got.double(), dense, rtol=1e-6, atol=0.0)
    none = row_norms(row_squares(w), project(w, a), a, 0 * b, SCALE)
    assert torch.equal(none, row_squares(w).sqrt())


def test_an_update_that_takes_a_row_away_gives_a_norm_near_zero_and_no_nan():
    _, w, _, a, b, _ = case()
    w = -SCALE * (b @ a).detach()
    got = row_norms(row_squares(w), project(w, a), a, b, SCALE)
    assert bool((got >= 0).all()) and bool((got < 1e-2 * w.norm(dim=1)).all())


def test_a_row_of_zeros_gives_the_bias_and_trains_b():
    x, w, bias, a, b, m = case(torch.float64)
    with torch.no_grad():
        w[0], b[0], m[0] = 0, 0, 0
    y = fast(x, w, bias, a, b, m)
    assert torch.equal(y[..., 0], bias[0].expand_as(y[..., 0]))
    da, db, dm = torch.autograd.grad(y.square().sum(), (a, b, m))
    assert all(bool(g.isfinite().all()) for g in (da, db, dm)) and bool(db[0].any())


def test_only_the_unscaled_output_is_kept_and_the_result_may_be_written_to():
    x, w, bias, a, b, m = case()
    out = lora_linear(x, w, bias, a, b, SCALE)
    norm = row_squares(w).sqrt()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = rescale(out, m, norm, bias)
    assert sorted(t.numel() for t in saved if t.numel() > 24) == [out.numel()]
    assert y._base is None and y.grad_fn.name() == "RescaleFunctionBackward"
    before = torch.autograd.grad(y.sum(), m, retain_graph=True)[0]
    y2 = rescale(out, m, norm, bias)
    y2.mul_(2)
    assert_close(torch.autograd.grad(y2.sum(), m)[0], 2 * before)


def test_it_can_be_differentiated_twice():
    torch.manual_seed(0)
    v = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    m = torch.rand(5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    norm = torch.rand(5, dtype=torch.float64) + 0.5
    for last in (bias, None):
        inputs = (v, m, norm, last)
        assert torch.autograd.gradcheck(RescaleFunction.apply, inputs)
        assert torch.autograd.gradgradcheck(RescaleFunction.apply, inputs)


def test_a_magnitude_in_16_bits_is_compared_with_a_norm_rounded_alike():
    norm = torch.tensor([1.0009765625, 3.3])
    assert torch.equal(factor_of(norm.bfloat16(), norm), torch.ones(2))
    assert factor_of(2 * norm, norm).tolist() == [2.0, 2.0]
