"""A starts the same for the same (seed, FQN), whatever surrounds the module."""

import torch
from torch import nn

from bridge.peft import LoRA
from bridge.peft.branch.initializers import derive_seed


class Body(nn.Module):
    def __init__(self, names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(6, 4))


def a_of(model, name):
    return model.get_submodule(name).lora_a.weight


def test_a_depends_on_seed_and_name_alone():
    one = LoRA(dim=2, seed=5, target_modules=["x", "y"])(Body(["x", "y"]))
    torch.manual_seed(99)
    other = LoRA(dim=2, seed=5, target_modules=["y", "z", "x"])(Body(["z", "y", "x"]))
    for name in ("x", "y"):
        assert torch.equal(a_of(one, name), a_of(other, name))
    assert not torch.equal(a_of(one, "x"), a_of(one, "y"))
    changed = LoRA(dim=2, seed=6, target_modules=["x"])(Body(["x"]))
    assert not torch.equal(a_of(one, "x"), a_of(changed, "x"))


def test_without_a_seed_torchs_generator_decides():
    torch.manual_seed(1)
    one = LoRA(dim=2)(Body(["x"]))
    torch.manual_seed(1)
    same = LoRA(dim=2)(Body(["x"]))
    other = LoRA(dim=2)(Body(["x"]))
    assert torch.equal(a_of(one, "x"), a_of(same, "x"))
    assert not torch.equal(a_of(one, "x"), a_of(other, "x"))


def test_meta_and_half_precision_start_from_the_same_numbers():
    full = LoRA(dim=2, seed=1)(Body(["x"]))
    half = LoRA(dim=2, seed=1, lora_dtype=torch.bfloat16)(Body(["x"]))
    with torch.device("meta"):
        meta = Body(["x"])
    LoRA(dim=2, seed=1)(meta).to_empty(device="cpu")
    assert torch.equal(a_of(full, "x").bfloat16(), a_of(half, "x"))
    assert torch.equal(a_of(full, "x"), a_of(meta, "x"))


def test_derived_seeds_stay_the_same_in_every_release():
    assert derive_seed(0, "model.layers.0.self_attn.q_proj") == 4117733072516773929
