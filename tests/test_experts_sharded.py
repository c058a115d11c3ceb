"""Adapted experts under FSDP2 over two processes: the numbers, gradients and file of one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bridge.peft import LoRA, adapter_state_dict, load_adapter, save_adapter
from bridge.peft.model.walk import adapted_modules
from tests.helpers.moe_architectures import mixture
from tests.helpers.ranks import on_ranks

RECIPE = LoRA(
    target_modules=["q_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    dim=4,
    seed=1,
)
IDS = torch.arange(3, 27)[None]


def model_of(how, shard_first=None):
    model = mixture("qwen3_moe", how)
    if shard_first is not None:
        shard_first(model)
    RECIPE(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, layer in adapted_modules(model):
            whole = torch.empty(layer.lora_b.weight.shape).normal_(std=0.1, generator=generator)
            layer.lora_b.set_whole(whole)
    return model


def shard_and_compare():
    from torch.distributed.fsdp import fully_shard

    def shard(model):
        mesh = dist.init_device_mesh("cpu", (2,))
        for i in (0, 1):
            fully_shard(model.get_submodule(f"model.layers.{i}"), mesh=mesh)
        fully_shard(model, mesh=mesh)

    for how, shard_first in (("eager", False), ("grouped_mm", False), ("grouped_mm", True)):
        whole = model_of(how)
        sharded = model_of(how, shard if shard_first else None)
        if not shard_first:
            shard(sharded)
        losses = []
        for model in (whole, sharded):
            model.train()
            losses.append(model(input_ids=IDS).logits.square().mean())
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0])
        parameters = dict(sharded.named_parameters())
        for name, tensor in whole.named_parameters():
            assert (tensor.grad is None) == (parameters[name].grad is None), name
            if tensor.grad is not None:
                full = parameters[name].grad.full_tensor()
                torch.testing.assert_close(full, tensor.grad, rtol=1e-4, atol=1e-6)
        state = adapter_state_dict(sharded)
        for name, tensor in adapter_state_dict(whole).items():
            assert torch.equal(state[name], tensor), name
        directory = Path(os.environ["ADAPTER_DIRECTORY"]) / f"{how}-{shard_first}"
        save_adapter(sharded, directory)
        dist.barrier()
        again = load_adapter(mixture("qwen3_moe", how), directory)
        for name, tensor in adapter_state_dict(whole).items():
            assert torch.equal(adapter_state_dict(again)[name], tensor), name


@pytest.mark.distributed
def test_sharded_experts_compute_train_and_save_as_one_process_does(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_DIRECTORY", str(tmp_path / "adapter"))
    (tmp_path / "adapter").mkdir()
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    on_ranks(2, shard_and_compare, ranks)
