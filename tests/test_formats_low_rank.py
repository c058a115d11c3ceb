"""Products of thin matrices against the dense product."""

from __future__ import annotations

import pytest
import torch

from bridge.peft.low_rank import norm, relative_difference, singular_values, truncated

SHAPES = [(3, 7, 5), (1, 4, 4), (6, 4, 9), (6, 9, 4), (48, 64, 1)]


@pytest.mark.parametrize(("rank", "n_in", "n_out"), SHAPES)
def test_norm_and_singular_values_are_those_of_the_product(rank, n_in, n_out):
    a, b = torch.randn(rank, n_in), torch.randn(n_out, rank)
    dense = b.double() @ a.double()
    values = singular_values(a, b)
    torch.testing.assert_close(values, torch.linalg.svdvals(dense)[: len(values)])
    assert norm(a, b) == pytest.approx(float(torch.linalg.norm(dense)), rel=1e-12)
    assert norm(a, torch.zeros_like(b)) == 0


@pytest.mark.parametrize(("rank", "n_in", "n_out"), SHAPES)
def test_truncation_is_the_best_there_is(rank, n_in, n_out):
    a, b = torch.randn(rank, n_in), torch.randn(n_out, rank)
    dense = b.double() @ a.double()
    for smaller in range(1, min(rank, n_in, n_out) + 1):
        new_a, new_b = truncated(a, b, smaller)
        assert new_a.shape == (smaller, n_in) and new_b.shape == (n_out, smaller)
        u, s, vt = torch.linalg.svd(dense, full_matrices=False)
        best = u[:, :smaller] * s[:smaller] @ vt[:smaller]
        torch.testing.assert_close((new_b @ new_a).double(), best, atol=1e-5, rtol=1e-5)
        error = float(torch.linalg.norm(best - dense) / torch.linalg.norm(dense))
        assert relative_difference((new_a, new_b), (a, b)) == pytest.approx(error, abs=1e-6)


def test_the_dtype_stays_and_a_zero_update_has_no_error():
    a, b = torch.randn(4, 6).bfloat16(), torch.zeros(5, 4, dtype=torch.bfloat16)
    new_a, new_b = truncated(a, b, 2)
    assert new_a.dtype == new_b.dtype == torch.bfloat16
    assert relative_difference((new_a, new_b), (a, b)) == 0
