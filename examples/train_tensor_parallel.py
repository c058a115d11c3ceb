"""Train a tensor-parallel model: transformers shards it, the recipe follows its layout.

Run on two processes: torchrun --nproc-per-node 2 examples/train_tensor_parallel.py
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DistributedConfig, LlamaConfig, LlamaForCausalLM

from bridge.peft import LoRA, load_adapter, save_adapter

config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)
dist.init_process_group()  # gloo on CPUs, nccl on GPUs
first = dist.get_rank() == 0
directories = [tempfile.mkdtemp() if first else ""]
dist.broadcast_object_list(directories)
directory = Path(directories[0])
if first:  # stands for a checkpoint that one device cannot hold
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory / "base")
dist.barrier()

shards = DistributedConfig(tp_plan="auto")
model = AutoModelForCausalLM.from_pretrained(directory / "base", distributed_config=shards)
model = LoRA(dim=8, seed=0)(model)  # A and B are sharded as their base is

torch.manual_seed(1)  # the same data on all ranks of a tensor-parallel group
tokens = torch.randint(1, 64, (8, 16), device=model.device)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=3e-3)
for step in range(31):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)  # the norm of the whole adapter
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 and first:
        print(f"step {step:2}: loss {loss.item():.4f}")

save_adapter(model, directory / "adapter")  # every rank calls, the first one writes
with torch.no_grad():
    sharded = model(input_ids=tokens).logits
if first:
    whole = AutoModelForCausalLM.from_pretrained(directory / "base")
    load_adapter(whole, directory / "adapter")
    with torch.no_grad():
        logits = whole(input_ids=tokens.cpu()).logits
    torch.testing.assert_close(sharded.cpu(), logits, rtol=1e-4, atol=1e-4)
    print("one process reads the adapter and gives the same logits")
dist.barrier()
dist.destroy_process_group()
