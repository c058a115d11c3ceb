"""The reference formula: what it says, in numbers and in shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from bridge.peft.ops.reference import (
    add_in_base_dtype,
    lora_branch_reference,
    lora_linear_reference,
)


def tensors(dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    return [t.to(dtype) for t in (x, w, b, torch.randn(2, 4), torch.randn(5, 2))]


def test_is_the_merged_weight_applied_to_x():
    x, w, bias, a, b = tensors()
    merged = w + 0.7 * b @ a
    assert_close(lora_linear_reference(x, w, bias, a, b, 0.7), F.linear(x, merged, bias))


def test_numbers_worked_out_by_hand():
    # A x = 3 + 8 = 11, so s B A x = 11 / 2 (5, 6) = (27.5, 33)
    x, w = torch.tensor([1.0, 2.0]), torch.eye(2)
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0], [6.0]])
    assert_close(lora_linear_reference(x, w, None, a, b, 0.5), torch.tensor([28.5, 35.0]))


def test_pre_mask_drops_elements_of_the_branch_input_and_rescales():
    x, w, bias, a, b = tensors()
    mask = torch.rand(2, 3, 4) < 0.5
    got = lora_linear_reference(x, w, bias, a, b, 0.7, 0.5, "pre", mask)
    assert_close(got, F.linear(x, w, bias) + F.linear(F.linear(x * mask * 2, a), b) * 0.7)


def test_post_mask_drops_elements_of_the_branch_output_and_rescales():
    x, w, bias, a, b = tensors()
    mask = torch.rand(2, 3, 5) < 0.5
    got = lora_linear_reference(x, w, bias, a, b, 0.7, 0.5, "post", mask)
    assert_close(got, F.linear(x, w, bias) + F.linear(F.linear(x, a), b) * 0.7 * mask * 2)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_without_a_mask_it_draws_one_and_is_unbiased(position: str):
    x, w, bias, a, b = tensors()
    x = x.expand(4000, 2, 3, 4)
    mean = lora_linear_reference(x, w, bias, a, b, 0.7, 0.3, position).mean(0)
    assert_close(mean, lora_linear_reference(x[0], w, bias, a, b, 0.7), atol=0.2, rtol=0.0)


def test_branch_runs_in_the_precision_of_the_lora_weights():
    x, w, _, a, b = tensors(torch.bfloat16)
    branch = lora_branch_reference(x, a.float(), b.float(), 0.7)
    assert branch.dtype == torch.float32
    got = lora_linear_reference(x, w, None, a.float(), b.float(), 0.7)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (F.linear(x, w).float() + branch).bfloat16())


def test_adding_the_branch_rounds_once():
    # 1 + 0.003907 is nearer to 1.0078125 than to 1 in bfloat16; a branch rounded first would be
    # 0.00390625, whose sum is a tie that goes to 1
    base, branch = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 0.003907)
    assert add_in_base_dtype(base, branch).item() == 1.0078125
    assert (base + branch.bfloat16()).item() == 1.0


def test_complex_weights_work():
    x, w, _, a, b = tensors(torch.complex128)
    assert_close(lora_linear_reference(x, w, None, a, b, 0.7), F.linear(x, w + 0.7 * b @ a))
