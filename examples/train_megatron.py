"""Adapt and train a GPT of Megatron Core on two tensor parallel ranks; save one adapter of both.

    torchrun --nproc-per-node 2 examples/train_megatron.py

Runs on GPUs where there are two, else on the CPU, for which attention is torch's own here.
"""

import os
import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bridge.peft import LoRA, load_adapter, save_adapter
from bridge.peft.parallel.grad_norm import clip_grad_norm_

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it says of apex and Transformer Engine
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

warnings.filterwarnings("ignore", module="megatron")
VOCABULARY, LENGTH = 64, 12
device = "cuda" if torch.cuda.device_count() > 1 else "cpu"


class Attention(nn.Module):
    """Causal attention; queries, keys and values are (tokens, batch, heads, head_dim)."""

    def __init__(self, **settings: object) -> None:
        super().__init__()

    def forward(self, *qkv: torch.Tensor, **settings: object) -> torch.Tensor:
        """Return (tokens, batch, hidden)."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in qkv[:3])
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def base() -> GPTModel:
    """The same random model each time, whatever the number of ranks."""
    torch.manual_seed(0)
    spec = get_gpt_layer_local_spec(normalization="LayerNorm")
    layer: Any = spec.submodules
    if device == "cpu":
        layer.self_attention.submodules.core_attention = Attention
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        tensor_model_parallel_size=dist.get_world_size(),
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return GPTModel(config, spec, vocab_size=VOCABULARY, max_sequence_length=LENGTH).to(device)


if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if device == "cuda" else "gloo")
parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
if device == "cuda":
    model_parallel_cuda_manual_seed(0)
recipe = LoRA(
    target_modules=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], dim=8, seed=1
)
if dist.get_rank() == 0:
    print(recipe.plan(base()))
else:
    recipe.plan(base())
model = recipe(base())  # every rank draws the whole A from the seed and keeps its part

generator = torch.Generator().manual_seed(0)
first = torch.randint(0, VOCABULARY, (16, 1), generator=generator)
tokens = ((first + 3 * torch.arange(LENGTH + 1)) % VOCABULARY).to(device)  # to learn: count by 3
positions = torch.arange(LENGTH, device=device).expand(16, -1)
group: Any = parallel_state.get_tensor_model_parallel_group()


def loss_of(model: nn.Module) -> torch.Tensor:
    """The mean loss, the same on every rank."""
    return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()


trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
for step in range(31):
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()  # gradients of A and B are complete: nothing is left to sum
    norm = clip_grad_norm_(trained, 1.0, group)
    optimizer.step()
    if step % 10 == 0 and dist.get_rank() == 0:
        print(f"step {step:2}: loss {loss.item():.4f}, norm of the gradients {norm.item():.3f}")

shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
dist.broadcast_object_list(shared)
save_adapter(model, shared[0])  # whole A and B, written by the first rank: every rank must call
again = load_adapter(base(), shared[0])
with torch.no_grad():
    torch.testing.assert_close(loss_of(again), loss_of(model))
if dist.get_rank() == 0:
    print("loaded into the base model again, the adapter gives the same loss")
dist.barrier()
dist.destroy_process_group()
