"""TELinearAdapter on a CPU double that states which behaviours it copies."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers.doubles import transformer_engine as double
from tests.helpers.te_contract import TELinearContract


@pytest.fixture
def te(monkeypatch):
    """Our layers, imported afresh beside the double."""
    ours = [name for name in sys.modules if name.startswith("bridge.peft")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    for name, module in double.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    layers = importlib.import_module("bridge.peft.lora_layers")
    merging = importlib.import_module("bridge.peft.merging.in_memory")
    yield SimpleNamespace(Linear=double.Linear, layers=layers, merging=merging, device="cpu")
    for name in [n for n in sys.modules if n.startswith("bridge.peft")]:
        monkeypatch.delitem(sys.modules, name)


class TestOnTheDouble(TELinearContract):
    def test_a_copy_carries_all_settings_on(self, te):
        settings = {
            "parallel_mode": "column",
            "tp_group": object(),
            "sequence_parallel": True,
            "fuse_wgrad_accumulation": True,
            "save_original_input": True,
        }
        base = te.Linear(4, 4, params_dtype=torch.bfloat16, return_bias=True, **settings)
        copied = te.layers.TELinearAdapter(base)
        for name, value in settings.items():
            assert getattr(copied, name) is value
        assert copied.return_bias is True and copied.weight.dtype == torch.bfloat16
        assert copied.weight.device == base.weight.device

    def test_forward_arguments_reach_the_base(self, te):
        layer = te.layers.patch_linear_module(te.Linear(4, 4))
        layer(torch.randn(2, 4), True, fp8_output=False, fp8_grad=True)
        assert layer.seen == (True, False, True)

    def test_a_sharded_linear_is_refused(self, te):
        with pytest.raises(NotImplementedError, match="2 ranks"):
            te.layers.patch_linear_module(te.Linear(4, 4, tp_size=2))

    def test_copying_fp8_weights_is_refused_and_patching_them_is_not(self, te):
        base = te.Linear(4, 4)
        base.weight = nn.Parameter(base.weight.data.as_subclass(double.Float8Tensor))
        with pytest.raises(NotImplementedError, match="patch_linear_module"):
            te.layers.TELinearAdapter(base)
        assert te.layers.patch_linear_module(base).lora_a.weight.dtype == torch.float32

    def test_the_copying_class_refuses_an_nn_linear(self, te):
        with pytest.raises(NotImplementedError, match="copies a te.Linear"):
            te.layers.TELinearAdapter(nn.Linear(2, 2))

    def test_the_plan_says_why_split_parameters_stay_as_they_are(self, te):
        lora = importlib.import_module("bridge.peft.lora")
        model = nn.Sequential(te.Linear(4, 4), te.Linear(4, 4, parameters_split=("q", "k")))
        (skipped,) = lora.LoRA(dim=2).plan(model).not_adapted
        assert "parameters_split" in skipped.reason

    def test_the_recipe_and_the_adapter_file_leave_extra_state_alone(self, te):
        peft = importlib.import_module("bridge.peft")
        model = nn.Sequential(te.Linear(4, 4), nn.Linear(4, 4))
        peft.LoRA(dim=2)(model)
        assert set(peft.adapter_state_dict(model)) == {
            f"{i}.lora_{x}.weight" for i in (0, 1) for x in "ab"
        }
