"""FSDP2 over two processes on a 4-bit base: the numbers of one process, and a whole file."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bridge.peft import LoRA, adapter_state_dict, load_adapter, save_adapter
from bridge.peft.errors import AdapterError
from bridge.peft.formats.peft import read_adapter
from bridge.peft.merging.in_memory import merge
from tests.helpers.quantised import four_bit, torchao_nf4
from tests.helpers.ranks import on_ranks

#: How the packed values are stored, by which FSDP shards them; and torchao's own nf4.
MAKERS = {
    "uint8": lambda: four_bit(quant_type="nf4"),
    "float32": lambda: four_bit(quant_type="nf4", quant_storage=torch.float32),
    "torchao": lambda: torchao_nf4((256, 256)),  # with a block of scales for each process
}


def adapted(make):
    model = LoRA(dim=4, seed=1)(nn.Sequential(make(), nn.ReLU(), make()))
    generator = torch.Generator().manual_seed(2)
    for layer in (model[0], model[2]):
        shape = layer.lora_b.weight.shape
        layer.lora_b.weight.data.copy_(torch.randn(shape, generator=generator) * 0.05)
    return model


def shard_compare_and_save():
    from torch.distributed.fsdp import fully_shard

    directory = Path(os.environ["ADAPTER_DIRECTORY"])
    mesh, rank = dist.init_device_mesh("cpu", (2,)), dist.get_rank()
    for name, make in MAKERS.items():
        whole, sharded = adapted(make), adapted(make)
        for layer in (sharded[0], sharded[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        dtype = torch.bfloat16 if name == "torchao" else torch.float32
        width, generator = whole[0].in_features, torch.Generator().manual_seed(rank)
        x = torch.randn(4, width, generator=generator).to(dtype)
        assert torch.equal(sharded(x), whole(x)), name
        sharded(x).float().square().mean().backward()
        whole(x).float().square().mean().backward()
        for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
            assert ours.requires_grad == theirs.requires_grad
            if theirs.grad is not None:
                mean = theirs.grad.clone()
                dist.all_reduce(mean)
                torch.testing.assert_close(ours.grad.full_tensor(), mean / 2)
        for key, tensor in adapter_state_dict(sharded).items():
            assert torch.equal(tensor, adapter_state_dict(whole)[key]), key
        save_adapter(sharded, directory / name)
        with pytest.raises(AdapterError, match="is quantised and sharded"):
            merge(sharded)
        dist.barrier()


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:.*KernelPreference")
def test_fsdp2_on_a_4_bit_base_computes_and_saves_what_one_process_does(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_DIRECTORY", str(tmp_path / "adapters"))
    on_ranks(2, shard_compare_and_save, tmp_path)
    for name, make in MAKERS.items():
        (group,) = read_adapter(tmp_path / "adapters" / name).extra["quantised"]
        assert group["settings"]["kind"] == "nf4" and group["modules"] == ["0", "2"]
        base = nn.Sequential(make(), nn.ReLU(), make())
        loaded, expected = load_adapter(base, tmp_path / "adapters" / name), adapted(make)
        dtype = torch.bfloat16 if name == "torchao" else torch.float32
        x = torch.randn(3, base[0].in_features, dtype=dtype)
        assert torch.equal(loaded(x), expected(x))
