"""Ranks that would train different things are told before they do, on all ranks."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bridge.peft import AdapterError, LoRA
from bridge.peft.model import agreement
from bridge.peft.model.agreement import check_ranks_agree
from tests.helpers.ranks import on_ranks

RECIPE = LoRA(target_modules=["0"], dim=4, seed=1)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def disagreement(model, facts=None):
    """What this rank is told; every rank must be told the same."""
    with pytest.raises(AdapterError) as caught:
        check_ranks_agree(model, facts or {})
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, str(caught.value))
    assert len(set(told)) == 1
    return told[0]


def compare():
    odd = dist.get_rank() == 1
    check_ranks_agree(RECIPE(base()), {"the data": "a"})
    assert "the data (a on rank 0 2, b on rank 1)" in disagreement(
        RECIPE(base()), {"the data": "b" if odd else "a"}
    )
    other_rank = disagreement(RECIPE(base()) if not odd else replace(RECIPE, dim=8)(base()))
    assert (
        "the parameters (0.lora_a.weight: (4, 64) torch.float32 trained on rank 0 2" in other_rank
    )
    assert "(8, 64) torch.float32 trained on rank 1" in other_rank
    # alpha changes no shape and no value
    other_alpha = disagreement((replace(RECIPE, alpha=8) if odd else RECIPE)(base()))
    assert "the options of (0: BranchOptions(" in other_alpha and "alpha=8" in other_alpha
    other_start = disagreement((replace(RECIPE, seed=2) if odd else RECIPE)(base()))
    assert "the values of (0.lora_a.weight: " in other_start
    checkpoint = base()
    if odd:
        with torch.no_grad():
            checkpoint[2].weight += 1e-3
    assert "the values of (2.weight: " in disagreement(RECIPE(checkpoint))
    trained = RECIPE(base())
    trained[2].requires_grad_(odd)
    assert "2.weight: (8, 64) torch.float32 frozen on rank 0 2" in disagreement(trained)
    if odd:
        agreement.__version__ = "0.0.9"
    assert "the version of (bridge-peft: " in disagreement(RECIPE(base()))


@pytest.mark.distributed
def test_what_differs_is_named_with_its_ranks_on_all_of_them(tmp_path):
    on_ranks(3, compare, tmp_path)


def test_without_a_process_group_there_is_nothing_to_agree_on():
    assert "RANK" not in os.environ
    check_ranks_agree(RECIPE(base()))
