"""AdapterWrapper: the base's names are the checkpoint's names."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from bridge.peft import AdapterWrapper, LoRALinear


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear_in = nn.Linear(4, 2, bias=False)
        self.linear_out = nn.Linear(2, 3, bias=False)

    def forward(self, x):
        return self.linear_out(self.linear_in(x))


@pytest.fixture
def block():
    return nn.ModuleDict({"fc": LoRALinear(nn.Linear(4, 3), Adapter())})


def test_state_dict_puts_the_base_at_its_own_prefix(block):
    assert set(block.state_dict()) == {
        "fc.weight",
        "fc.bias",
        "fc.adapter.linear_in.weight",
        "fc.adapter.linear_out.weight",
    }
    with pytest.warns(FutureWarning, match="Positional args"):
        nn.Module.state_dict(nn.Linear(1, 1), {}, "x.")
    assert set(block["fc"].state_dict({}, "p.", True)) == {
        f"p.{k.removeprefix('fc.')}" for k in block.state_dict()
    }


def test_strict_load_of_its_own_state_dict_round_trips(block):
    other = nn.ModuleDict({"fc": LoRALinear(nn.Linear(4, 3), Adapter())})
    other.load_state_dict(block.state_dict())
    x = torch.randn(2, 4)
    assert torch.equal(other["fc"](x), block["fc"](x))
    alone = LoRALinear(nn.Linear(4, 3), Adapter())
    alone.load_state_dict(block["fc"].state_dict())
    assert torch.equal(alone(x), block["fc"](x))


def test_a_base_checkpoint_loads_with_only_the_adapters_keys_missing(block):
    checkpoint = {f"fc.{k}": v for k, v in nn.Linear(4, 3).state_dict().items()}
    incompatible = block.load_state_dict(checkpoint, strict=False)
    assert set(incompatible.missing_keys) == {
        "fc.adapter.linear_in.weight",
        "fc.adapter.linear_out.weight",
    }
    assert incompatible.unexpected_keys == []
    assert torch.equal(block["fc"].to_wrap.weight, checkpoint["fc.weight"])


def test_distributed_checkpoints_have_the_same_names_and_load(block):
    state = get_model_state_dict(block)
    assert state.keys() == block.state_dict().keys()
    other = nn.ModuleDict({"fc": LoRALinear(nn.Linear(4, 3), Adapter())})
    set_model_state_dict(other, state)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_missing_and_unexpected_keys_are_named_as_in_the_checkpoint(block):
    state = block.state_dict()
    del state["fc.weight"]
    state["fc.extra"] = torch.zeros(1)
    incompatible = block.load_state_dict(state, strict=False)
    assert incompatible.missing_keys == ["fc.weight"]
    assert incompatible.unexpected_keys == ["fc.extra"]


def test_sharded_state_dict_merges_both_parts_with_their_prefixes():
    class Sharded(nn.Linear):
        def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
            return {f"{prefix}weight": (prefix, sharded_offsets, metadata)}

    wrapper = AdapterWrapper(Sharded(2, 2), Sharded(2, 2))
    merged = wrapper.sharded_state_dict("layer.", ((0, 1, 2),), {"a": 1})
    assert merged == {
        "layer.weight": ("layer.", ((0, 1, 2),), {"a": 1}),
        "layer.adapter.weight": ("layer.adapter.", ((0, 1, 2),), {"a": 1}),
    }


def test_a_base_with_state_under_adapter_is_refused():
    with pytest.raises(ValueError, match="'adapter.'"):
        AdapterWrapper(nn.ModuleDict({"adapter": nn.Linear(2, 2)}), nn.Linear(2, 2))


def test_output_keeps_the_bases_dtype_with_an_adapter_in_another():
    layer = LoRALinear(nn.Linear(4, 3, dtype=torch.bfloat16), Mixed())
    assert layer(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Mixed(nn.Module):
    def forward(self, x):
        return x.float()[..., :3]
