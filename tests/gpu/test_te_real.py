"""TELinearAdapter on the real Transformer Engine; needs a CUDA device."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.te_contract import TELinearContract

pytestmark = pytest.mark.gpu


@pytest.fixture
def te():
    pytorch = pytest.importorskip("transformer_engine.pytorch")
    from bridge.peft import lora_layers
    from bridge.peft.merging import in_memory

    return SimpleNamespace(
        Linear=pytorch.Linear, layers=lora_layers, merging=in_memory, device="cuda"
    )


class TestOnTransformerEngine(TELinearContract):
    def test_fp8_autocast_keeps_the_branch_in_the_precision_of_the_lora_weights(self, te):
        from transformer_engine.pytorch import autocast

        layer = te.layers.patch_linear_module(
            te.Linear(128, 128, params_dtype=torch.bfloat16, device="cuda"), dim=16
        )
        x = torch.randn(128, 128, device="cuda", dtype=torch.bfloat16)
        with autocast(enabled=True):
            base = layer(x)
            self.trained(layer)
            adapted = layer(x)
        branch = layer.scale * x @ layer.lora_a.weight.T @ layer.lora_b.weight.T
        torch.testing.assert_close(adapted, base + branch, rtol=2e-2, atol=2e-1)
