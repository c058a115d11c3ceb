"""Seeded dropout: its probability, its independence, and that it is the same mask again."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from bridge.peft.ops.dispatch import lora_add, lora_linear
from bridge.peft.ops.dropout import SeededMask, apply_, consume_, draw_seed

CPU = torch.device("cpu")
ROWS, COLUMNS = 1024, 512


def centred(p: float, seed: int, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """The mask less its mean, over its standard deviation."""
    mask = SeededMask(rows, columns, p, CPU, seed)
    keep = mask.keep_probability
    return (mask.whole().float() - keep) / math.sqrt(keep * (1 - keep))


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.1, 0.3, 0.5, 0.9, 0.999999])
def test_probability_is_exact_to_16_bits(p: float):
    mask = SeededMask(2, 2, p, CPU, seed=1)
    assert abs(1 - mask.keep_probability - p) <= 2**-16
    # over all words that the hash can give, the share kept is that probability exactly
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    assert (words >= mask._threshold).double().mean().item() == mask.keep_probability


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_mean_and_variance_over_calls_rows_and_columns(p: float):
    masks = [centred(p, seed) for seed in range(8)]
    total = torch.stack([m.sum() / math.sqrt(m.numel()) for m in masks])
    assert total.abs().max() < 4.5
    for m in masks[:2]:
        # variances of row and column counts: chi-squares, as standard normal scores
        assert abs((m.sum(1) ** 2 / COLUMNS).mean() - 1) * math.sqrt(ROWS / 2) < 4.5
        assert abs((m.sum(0) ** 2 / ROWS).mean() - 1) * math.sqrt(COLUMNS / 2) < 4.5


def together(m: Tensor) -> dict[str, Tensor]:
    """Products of neighbours and of rectangles' corners: each has mean 0 and variance 1."""
    half, left = ROWS // 2, COLUMNS // 2
    return {
        "neighbours in a row": m[:, 1:] * m[:, :-1],
        "neighbours in a column": m[1:] * m[:-1],
        "diagonal neighbours": m[1:, 1:] * m[:-1, :-1],
        "far rows": m[half:] * m[:half],
        "far columns": m[:, left:] * m[:, :left],
        "corners of a square": m[1:, 1:] * m[1:, :-1] * m[:-1, 1:] * m[:-1, :-1],
        "far corners": m[half:, left:] * m[half:, :left] * m[:half, left:] * m[:half, :left],
    }


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_are_independent_of_their_neighbours_and_around_rectangles(p: float):
    for seed in range(4):
        for name, product in together(centred(p, seed)).items():
            score = product.sum().item() / math.sqrt(product.numel())
            assert abs(score) < 4.5, (name, seed, score)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_two_rows_and_no_two_columns_are_alike(p: float):
    m = centred(p, seed=3)
    for pairs, length in ((m @ m.t(), COLUMNS), (m.t() @ m, ROWS)):
        scores = pairs[~torch.eye(len(pairs), dtype=torch.bool)] / math.sqrt(length)
        assert scores.abs().max() < 8.0
        assert abs(scores.var().item() - 1) < 0.02


def test_the_spectrum_is_that_of_a_random_matrix():
    # any structure across many rows and columns would stand out of the Marchenko-Pastur edge
    largest = torch.linalg.matrix_norm(centred(0.1, seed=4), 2).item()
    assert abs(largest / (math.sqrt(ROWS) + math.sqrt(COLUMNS)) - 1) < 0.02


def test_calls_are_independent():
    first, second = centred(0.1, draw_seed()), centred(0.1, draw_seed())
    assert abs((first * second).sum() / math.sqrt(first.numel())) < 4.5
    # seeds one apart, too
    first, second = centred(0.1, 100), centred(0.1, 101)
    assert abs((first * second).sum() / math.sqrt(first.numel())) < 4.5


@pytest.mark.parametrize("step", [1, 7, 64, 100])
def test_the_mask_does_not_depend_on_how_it_is_cut_into_blocks(step: int):
    mask = SeededMask(64, 33, 0.3, CPU, seed=5)
    matrix = torch.empty(64, 33)
    cuts = [slice(start, start + step) for start in range(0, 64, step)]
    got = [mask.of(rows, matrix[rows], torch.float32).bool() for rows in cuts]
    assert torch.equal(torch.cat(got), mask.whole())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masking_by_bit_patterns_is_masking(dtype: torch.dtype):
    x, mask = torch.randn(64, 33).to(dtype), SeededMask(64, 33, 0.3, CPU, seed=6)
    expected = torch.where(mask.whole(), x, 0.0)
    kept = mask.of(slice(0, 64), x, dtype)
    assert torch.equal(apply_(x.clone(), kept), expected)
    assert torch.equal(consume_(kept, x), expected)


Op = Callable[..., Tensor]


def linear(x: Tensor, a: Tensor, b: Tensor, position: str, p: float = 0.25) -> Tensor:
    return lora_linear(x, torch.eye(b.shape[0], x.shape[-1]), None, a, b, 1.0, p, position)


def added(x: Tensor, a: Tensor, b: Tensor, position: str, p: float = 0.25) -> Tensor:
    return lora_add(x[..., : b.shape[0]] * 1.0, x, a, b, 1.0, p, position)


def parts() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 40, 16, requires_grad=True)
    return x, torch.randn(4, 16, requires_grad=True), torch.randn(12, 4, requires_grad=True)


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("op", [linear, added])
class TestInTheLayer:
    def test_backward_drops_what_forward_dropped(self, op: Op, position: str):
        # for fixed masks y is linear in x, so <y(v), u> = <v, dx(u)>
        x, a, b = parts()
        torch.manual_seed(7)
        y = op(x, a, b, position)
        u = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, u)
        assert_close((y * u).sum(), (x * dx).sum())

    def test_the_default_generator_decides(self, op: Op, position: str):
        tensors = parts()
        torch.manual_seed(8)
        first = op(*tensors, position)
        second = op(*tensors, position)
        torch.manual_seed(8)
        assert torch.equal(op(*tensors, position), first)
        assert not torch.equal(first, second)

    def test_the_mean_over_calls_is_the_layer_without_dropout(self, op: Op, position: str):
        x, a, b = parts()
        with torch.no_grad():
            mean = torch.stack([op(x, a, b, position) for _ in range(400)]).mean(0)
            error = (mean - op(x, a, b, position, 0.0)).pow(2).mean().sqrt()
        assert error < 0.27

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_repeats_the_mask(self, op: Op, position: str, use_reentrant: bool):
        x, a, b = parts()
        torch.manual_seed(9)
        y = op(x, a, b, position)
        plain = torch.autograd.grad(y.square().sum(), (x, a, b))
        torch.manual_seed(9)
        y2 = checkpoint(op, x, a, b, position, use_reentrant=use_reentrant)
        torch.rand(5)  # the state at backward is not the one at forward
        y2.square().sum().backward()
        assert torch.equal(y, y2)
        for leaf, grad in zip((x, a, b), plain, strict=True):
            assert_close(leaf.grad, grad)


def test_pre_drops_inputs_and_post_drops_outputs():
    x, zero = torch.ones(50, 8, requires_grad=True), torch.zeros(6, 8)
    a, b = torch.ones(1, 8, requires_grad=True), torch.ones(6, 1, requires_grad=True)
    pre = lora_linear(x, zero, None, a, b, 1.0, 0.5, "pre")
    # the number of inputs kept, times 2, the same in every output
    assert torch.equal(pre, pre[:, :1].expand_as(pre))
    assert set((pre / 2).unique().tolist()) <= set(range(9))
    (dx,) = torch.autograd.grad(pre.sum(), x)
    assert torch.equal(dx.sum(1), pre[:, 0] * 6)
    assert set(dx.unique().tolist()) == {0.0, 12.0}
    post = lora_linear(x, zero, None, a, b, 1.0, 0.5, "post")
    assert set(post.unique().tolist()) == {0.0, 16.0}


def test_one_seed_is_drawn_a_call_whatever_the_shape():
    for tokens in (1, 1000):
        _, a, b = parts()
        torch.manual_seed(10)
        linear(torch.ones(tokens, 16), a, b, "pre")
        assert torch.rand(1).item() == pytest.approx(_after_one_seed(), abs=0)


def _after_one_seed() -> float:
    torch.manual_seed(10)
    draw_seed()
    return torch.rand(1).item()
