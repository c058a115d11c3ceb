"""The fast path against its oracle: values, gradients, what it saves, and what it leaves alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from bridge.peft.ops.dispatch import lora_add, lora_linear
from bridge.peft.ops.dropout import SeededMask, draw_seed
from bridge.peft.ops.reference import (
    add_in_base_dtype,
    lora_branch_reference,
    lora_linear_reference,
)

CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.7


def case(
    shape: Sequence[int] = (2, 150, 40),
    out: int = 24,
    dim: int = 4,
    dtype: torch.dtype = torch.float32,
    lora_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """x, W, b, A, B: the last two of `lora_dtype`; x, A and B want gradients."""
    torch.manual_seed(1)
    x, w, bias = torch.randn(*shape), torch.randn(out, shape[-1]), torch.randn(out)
    a, b = torch.randn(dim, shape[-1]), torch.randn(out, dim)
    base = [t.to(dtype) for t in (x, w / shape[-1] ** 0.5, bias)]
    lora = [t.to(lora_dtype or dtype) for t in (a / shape[-1] ** 0.5, b)]
    for t in (base[0], *lora):
        t.requires_grad_(True)
    return [*base, *lora]


def fast(t: list[Tensor], op: str, p: float = 0.0, position: str = "pre") -> Tensor:
    """The fast path over `case`, with the seed of its mask fixed."""
    x, w, bias, a, b = t
    torch.manual_seed(2)
    if op == "linear":
        return lora_linear(x, w, bias, a, b, SCALE, p, position)
    return lora_add(F.linear(x, w, bias), x, a, b, SCALE, p, position)


def slow(t: list[Tensor], p: float = 0.0, position: str = "pre") -> Tensor:
    """The reference with the mask that `fast` uses, and its dtype of products."""
    x, w, bias, a, b = t
    if x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        a, b = a.to(x.dtype), b.to(x.dtype)  # float32 weights are multiplied as autocast does
    if p == 0.0:
        return lora_linear_reference(x, w, bias, a, b, SCALE)
    torch.manual_seed(2)
    width = x.shape[-1] if position == "pre" else w.shape[0]
    mask = SeededMask(x.shape[:-1].numel(), width, p, CPU, draw_seed())
    kept, p = mask.whole().view(*x.shape[:-1], width), 1 - mask.keep_probability
    base = F.linear(x, w, bias)
    return add_in_base_dtype(base, lora_branch_reference(x, a, b, SCALE, p, position, kept))


def results(y: Tensor, t: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y, dx, dA, dB."""
    return [y, *torch.autograd.grad(y, (t[0], t[3], t[4]), dy.to(y.dtype))]


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("op", ["linear", "add"])
@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=["same", "lora32"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_errors_are_at_most_those_of_the_formula_in_the_same_dtype(
    dtype: torch.dtype, lora_dtype: torch.dtype | None, p: float, position: str, op: str
):
    t = case((2, 300, 128), 96, 16, dtype, lora_dtype)
    dy = torch.randn(2, 300, 96, dtype=torch.float64)
    got = results(fast(t, op, p, position), t, dy)
    reference = results(slow(t, p, position), t, dy)
    exact_t = [v.detach().double().requires_grad_(v.requires_grad) for v in t]
    exact = results(slow(exact_t, p, position), exact_t, dy.to(dtype))
    for name, g, r, e in zip(("y", "dx", "dA", "dB"), got, reference, exact, strict=True):
        assert g.dtype == r.dtype and g.shape == r.shape
        assert error(g, e) <= 1.1 * error(r, e) + 1e-9, name


@pytest.mark.parametrize("op", ["linear", "add"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(40,), (7, 40), (2, 7, 40), (2, 3, 7, 40), (0, 40), (2, 0, 40)])
def test_any_number_of_leading_dimensions_and_no_tokens(shape: tuple[int, ...], p: float, op: str):
    t = case(shape, dtype=torch.float64)
    dy = torch.randn(*shape[:-1], 24, dtype=torch.float64)
    for position in ("pre", "post"):
        got, want = results(fast(t, op, p, position), t, dy), results(slow(t, p, position), t, dy)
        assert_close(got, want)


def strided(kind: str) -> Tensor:
    """The same values under other strides."""
    x = torch.randn(6, 5, 40, dtype=torch.float64)
    if kind == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "last axis":
        return x.transpose(0, 2).contiguous().transpose(0, 2)
    if kind == "sliced":
        return torch.cat([x, x], -1)[..., :40]
    return x[:1].expand(6, 5, 40)


@pytest.mark.parametrize("op", ["linear", "add"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["transposed", "last axis", "sliced", "expanded"])
def test_input_of_any_strides(kind: str, p: float, op: str):
    t = [strided(kind), *case(dtype=torch.float64)[1:]]
    t[0].requires_grad_(True)
    dy = torch.randn(6, 5, 24, dtype=torch.float64)
    for position in ("pre", "post"):
        got, want = results(fast(t, op, p, position), t, dy), results(slow(t, p, position), t, dy)
        assert_close(got, want)


@pytest.mark.parametrize("op", ["linear", "add"])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_expanded_gradients(op: str, position: str):
    t = case(dtype=torch.float64)
    for dy in (torch.ones(()).double(), torch.randn(24).double(), torch.randn(2, 1, 1).double()):
        dy = dy.expand(2, 150, 24)
        got = results(fast(t, op, 0.3, position), t, dy)
        assert_close(got, results(slow(t, 0.3, position), t, dy))


@pytest.mark.parametrize("dim", [1, 3, 8, 16, 17, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layout_of_the_narrow_products(dim: int, dtype: torch.dtype):
    t = case((50, 40), dim=dim, dtype=dtype)
    dy = torch.randn(50, 24)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for g, r in zip(results(fast(t, "linear"), t, dy), results(slow(t), t, dy), strict=True):
        assert error(g, r.double()) < tolerance


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=["same", "lora32"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_output_is_bit_exact_base_at_init(
    dtype: torch.dtype, lora_dtype: torch.dtype | None, p: float
):
    for shape, position in itertools.product(((40,), (64, 40), (3, 70, 40)), ("pre", "post")):
        x, w, bias, a, b = case(shape, 200, 8, dtype, lora_dtype)
        for bias_ in (None, bias):
            base = F.linear(x, w, bias_)
            zero = torch.zeros_like(b, requires_grad=True)
            assert torch.equal(lora_linear(x, w, bias_, a, zero, SCALE, p, position), base)
            assert torch.equal(lora_add(base, x, a, zero, SCALE, p, position), base)


@pytest.mark.parametrize("op", ["linear", "add"])
@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_and_gradgradcheck(op: str, position: str, p: float):
    t = case((3, 6), 5, 2, torch.float64)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return fast([x, t[1], t[2], a, b], op, p, position)

    assert torch.autograd.gradcheck(run, (t[0], t[3], t[4]))
    assert torch.autograd.gradgradcheck(run, (t[0], t[3], t[4]))


def test_a_trainable_base_gets_its_gradients():
    t = case(dtype=torch.float64)
    for base in t[1:3]:
        base.requires_grad_(True)
    dy = torch.randn(2, 150, 24, dtype=torch.float64)
    got, want = (torch.autograd.grad(y, t, dy) for y in (fast(t, "linear"), slow(t)))
    assert_close(got, want)


@pytest.mark.parametrize("op", ["linear", "add"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_first_layer_wants_no_gradient_of_its_input(op: str, p: float):
    t = case(dtype=torch.float64)
    t[0].requires_grad_(False)
    dy = torch.randn(2, 150, 24, dtype=torch.float64)
    got, want = (torch.autograd.grad(y, t[3:], dy) for y in (fast(t, op, p), slow(t, p)))
    assert_close(got, want)


@pytest.mark.parametrize("op", ["linear", "add"])
def test_gradients_accumulate_over_micro_batches(op: str):
    t = case(dtype=torch.float64)
    for _ in range(3):
        fast(t, op).sum().backward()
    for leaf, grad in zip(
        (t[0], t[3], t[4]), torch.autograd.grad(3 * slow(t).sum(), (t[0], t[3], t[4])), strict=True
    ):
        assert_close(leaf.grad, grad)


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("op", ["linear", "add"])
def test_saves_tokens_times_rank_beyond_x_and_the_weights(op: str, p: float, position: str):
    t = case((2, 150, 40), dim=4)
    known = {v.untyped_storage().data_ptr() for v in t}
    saved: list[Tensor] = []

    def pack(v: Tensor) -> Tensor:
        saved.append(v)
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        fast(t, op, p, position)
    extra = {
        v.untyped_storage().data_ptr(): v.untyped_storage().nbytes()
        for v in saved
        if v.untyped_storage().data_ptr() not in known
    }
    assert sum(extra.values()) <= 2 * 150 * 4 * 4


@pytest.mark.parametrize("op", ["linear", "add"])
@pytest.mark.parametrize("shape", [(40,), (7, 40), (2, 7, 40)])
def test_consumers_may_write_into_the_result(op: str, shape: tuple[int, ...]):
    t = case(shape, dtype=torch.float64)
    y = fast(t, op)
    y.add_(1.0).mul_(2.0)
    y[..., :3] = 0.0
    y.view(-1, 24)[:1].zero_()
    want = (slow(t) + 1.0) * torch.cat([torch.zeros(3), 2 * torch.ones(21)])
    want = torch.cat([torch.zeros(1, 24), want.reshape(-1, 24)[1:]]).view_as(y)
    assert_close(y, want.to(y.dtype))
    leaves = (t[0], t[3], t[4])
    assert_close(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), leaves))


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_adding_never_writes_into_the_base_result(p: float, position: str):
    x, w, bias, a, b = case()
    # exp's backward needs its own result; a slice is a view; both must stay what they were
    whole = torch.randn(2, 150, 30, requires_grad=True)
    for base_out in (torch.exp(F.linear(x, w, bias)), whole[..., :24], torch.ones(2, 150, 24)):
        before = base_out.detach().clone()
        y = lora_add(base_out, x, a, b, SCALE, p, position)
        assert torch.equal(base_out, before)
        assert y.data_ptr() != base_out.data_ptr()
        y.sum().backward()


def test_a_base_result_of_any_strides_can_be_added_to():
    x, w, bias, a, b = case((4, 6, 40))
    base_out = F.linear(x, w, bias).transpose(0, 1).contiguous().transpose(0, 1)
    y = lora_add(base_out, x, a, b, SCALE)
    assert_close(y, slow([x, w, bias, a, b]))
