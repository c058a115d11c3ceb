"""Weights that torchao quantised: tensor subclasses inside a plain `nn.Linear`."""

import copy
import warnings

import pytest
import torch
from torch import nn

from bridge.peft import LoRA, merge

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        Int8WeightOnlyConfig(),
        Float8WeightOnlyConfig(),
        IntxWeightOnlyConfig(weight_dtype=torch.int4),
    ],
    ids=lambda config: type(config).__name__,
)
def test_they_keep_their_own_product_train_and_are_not_merged_into(config):
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    quantize_(model, config)
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    expected = model(x)
    LoRA(dim=4)(model)
    assert torch.equal(model(x), expected)
    assert model[0].lora_path().name == "branch"
    model(x).sum().backward()
    assert x.grad is not None and model[0].lora_b.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="quantised"):
        merge(model)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
