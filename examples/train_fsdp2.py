"""Train a model that FSDP2 shards over two processes: from meta to a file that one process loads.

    torchrun --nproc-per-node 2 examples/train_fsdp2.py

With CUDA each process takes a GPU and they talk over NCCL; without, they talk over gloo.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from bridge.peft import LoRA, load_adapter, save_adapter

config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
)


def base() -> LlamaForCausalLM:
    """A stand-in for a checkpoint: the same random model each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def main() -> None:
    """Shard, train, write a checkpoint to go on from, and save the adapter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    torch.set_num_threads(1)

    # nothing is allocated before it is sharded; only the first rank reads the base
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    LoRA(dim=8, seed=0)(model)  # a seed, so that the run can be repeated
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device=device)  # A is drawn, B is zero
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # in no checkpoint
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, base().state_dict() if rank == 0 else {}, options=options)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    tokens = (torch.arange(8)[:, None] + torch.arange(12)) % 64  # to learn: counting
    mine = tokens.chunk(dist.get_world_size())[rank].to(device)
    for step in range(41):
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach(), op=dist.ReduceOp.SUM)
        if step % 20 == 0 and rank == 0:
            print(f"step {step:2}: loss {loss.item() / dist.get_world_size():.4f}")

    directory = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(directory)
    # to go on from, on any number of ranks: A, B and the optimizer's state, nothing of the base
    trained = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer, options=trained)
    state = {"adapter": weights, "optimizer": moments}
    dcp.save(state, checkpoint_id=f"{directory[0]}/checkpoint")  # pyright: ignore
    # for everybody else: PEFT's files; every rank calls, the first one writes
    save_adapter(model, f"{directory[0]}/adapter")

    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens.to(device)).logits.cpu()
    if rank == 0:
        again = load_adapter(base(), f"{directory[0]}/adapter").eval()
        difference = (again(input_ids=tokens).logits - logits).abs().max()
        print(f"loaded into one process, the adapter's logits differ by at most {difference:.1e}")
        assert difference < 1e-3
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
