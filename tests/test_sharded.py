"""FSDP2 over two processes: adapted on meta, sharded, materialised, the same numbers."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bridge.peft import LoRA, adapter_state_dict, save_adapter
from bridge.peft.formats.peft import read_adapter
from tests.helpers.ranks import on_ranks

RECIPE = LoRA(dim=4, seed=1)


def body():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def shard_and_compare():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    torch.manual_seed(0)
    whole = RECIPE(body())
    with torch.device("meta"):
        sharded = body()
    RECIPE(sharded)
    mesh = dist.init_device_mesh("cpu", (2,))
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded.to_empty(device="cpu")

    for name, tensor in adapter_state_dict(sharded).items():
        assert torch.equal(tensor, adapter_state_dict(whole)[name]), name
    with torch.no_grad():
        for layer in (whole[0], whole[2]):
            layer.lora_b.weight.normal_()
        for shard, tensor in zip(sharded.parameters(), whole.parameters(), strict=True):
            shard.copy_(distribute_tensor(tensor.data, shard.device_mesh, shard.placements))
    x = torch.randn(4, 8)
    sharded(x).square().mean().backward()
    whole(x).square().mean().backward()
    for shard, tensor in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert shard.requires_grad == tensor.requires_grad
        if tensor.grad is not None:
            torch.testing.assert_close(shard.grad.full_tensor(), tensor.grad)


class WithHead(nn.Module):
    """A body and a head that is trained in full beside the adapter."""

    def __init__(self):
        super().__init__()
        self.body, self.head = body(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def shard_and_save():
    from torch.distributed.fsdp import fully_shard

    directory = Path(os.environ["ADAPTER_DIRECTORY"])
    torch.manual_seed(0)
    model = LoRA(target_modules=["body.*"], dim=4, seed=1)(WithHead())
    model.head.requires_grad_(True)
    head = model.head.weight.detach().clone()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
    save_adapter(model, directory)
    saved = read_adapter(directory)
    assert torch.equal(saved.whole["head.weight"], head)
    assert set(saved.whole) == {"head.weight", "head.bias"}
    assert saved.parsed.modules_to_save == ("head",)
    # A and B on every rank, the head alone in shards
    model = LoRA(target_modules=["body.*"], dim=4, seed=1)(WithHead())
    model.head.requires_grad_(True)
    head = model.head.weight.detach().clone()
    fully_shard(model.head, mesh=dist.init_device_mesh("cpu", (2,)))
    save_adapter(model, directory)
    assert torch.equal(read_adapter(directory).whole["head.weight"], head)


@pytest.mark.distributed
def test_a_head_trained_beside_a_sharded_adapter_is_gathered_and_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_DIRECTORY", str(tmp_path / "adapter"))
    on_ranks(2, shard_and_save, tmp_path)


@pytest.mark.distributed
def test_fsdp2_from_meta_computes_what_one_process_computes(tmp_path):
    on_ranks(2, shard_and_compare, tmp_path)
