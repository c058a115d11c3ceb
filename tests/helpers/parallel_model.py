"""A small transformer with a head, and the ways to lay it out on several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from bridge.peft import LoRA

WIDTH, HEADS, VOCABULARY, TOKENS, BATCH = 16, 4, 32, 8, 8
RECIPE = LoRA(dim=4, alpha=8, seed=1, modules_to_train=["head"])


class Attention(nn.Module):
    """Causal attention; the number of heads follows the width that a rank holds."""

    def __init__(self):
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=name == "o"))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.gate = (nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    """Token ids (batch, tokens) -> logits (batch, tokens, vocabulary)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def base_model() -> Transformer:
    """The same base model wherever it is built."""
    torch.manual_seed(0)
    return Transformer()


def batch(step: int) -> Tensor:
    """The global batch of a step: (batch, tokens) ids."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token loss."""
    logits = model(ids)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def tensor_parallel(model: Transformer, mesh: DeviceMesh, *, sequence: bool = False) -> Transformer:
    """Shard the blocks and the head over a mesh, in place, by torch's own styles."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    def gathered() -> PrepareModuleInput:
        return PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())

    plan = {}
    for number in range(len(model.blocks)):
        at = f"blocks.{number}."
        for name in ("attention.q", "attention.k", "attention.v"):
            plan[at + name] = ColwiseParallel()
        for name in ("up", "gate"):
            layout = {"input_layouts": Shard(1)} if sequence else {}
            plan[at + name] = ColwiseParallel(**layout)
        for name in ("attention.o", "down"):
            layout = {"output_layouts": Shard(1)} if sequence else {}
            plan[at + name] = RowwiseParallel(**layout)
        if sequence:
            plan[at + "norm1"] = plan[at + "norm2"] = SequenceParallel(use_local_output=True)
            plan[at + "attention"] = gathered()
    plan["head"] = ColwiseParallel(output_layouts=Replicate())
    if sequence:
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        plan["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    wanted_grad = {name for name, p in model.named_parameters() if p.requires_grad}
    parallelize_module(model, mesh, plan)
    for name, parameter in model.named_parameters():  # SequenceParallel forgets what is frozen
        parameter.requires_grad_(name in wanted_grad)
    return model


def fully_sharded(model: Transformer, mesh: DeviceMesh) -> Any:
    """Shard every block and the model over a mesh, in place."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _ddp(model: Transformer) -> nn.Module:
    return nn.parallel.DistributedDataParallel(RECIPE(model))


def _fsdp(model: Transformer) -> nn.Module:
    return fully_sharded(RECIPE(model), dist.init_device_mesh("cpu", (2,)))


def _fsdp_first(model: Transformer) -> nn.Module:
    return RECIPE(fully_sharded(model, dist.init_device_mesh("cpu", (2,))))


def _tp_last(model: Transformer) -> nn.Module:
    return tensor_parallel(RECIPE(model), dist.init_device_mesh("cpu", (2,)))


def _tp_first(model: Transformer) -> nn.Module:
    return RECIPE(tensor_parallel(model, dist.init_device_mesh("cpu", (2,))))


def _sp_last(model: Transformer) -> nn.Module:
    return tensor_parallel(RECIPE(model), dist.init_device_mesh("cpu", (2,)), sequence=True)


def _sp_first(model: Transformer) -> nn.Module:
    return RECIPE(tensor_parallel(model, dist.init_device_mesh("cpu", (2,)), sequence=True))


def _fsdp_tp(model: Transformer) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return fully_sharded(RECIPE(tensor_parallel(model, mesh["tp"])), mesh["dp"])


def _fsdp_tp_recipe_last(model: Transformer) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return RECIPE(fully_sharded(tensor_parallel(model, mesh["tp"]), mesh["dp"]))


def _fsdp_tp_recipe_first(model: Transformer) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return fully_sharded(tensor_parallel(RECIPE(model), mesh["tp"], sequence=True), mesh["dp"])


#: How to lay the base out and adapt it, and the number of ranks that see different data.
LAYOUTS: dict[str, tuple[Callable[[Transformer], nn.Module], int]] = {
    "DDP": (_ddp, 2),
    "FSDP2 after the recipe": (_fsdp, 2),
    "FSDP2 before the recipe": (_fsdp_first, 2),
    "TP after the recipe": (_tp_last, 1),
    "TP before the recipe": (_tp_first, 1),
    "TP with sequence parallel after the recipe": (_sp_last, 1),
    "TP with sequence parallel before the recipe": (_sp_first, 1),
    "FSDP2 x TP": (_fsdp_tp, 2),
    "TP, then FSDP2, then the recipe": (_fsdp_tp_recipe_last, 2),
    "recipe, then TP with sequence parallel, then FSDP2": (_fsdp_tp_recipe_first, 2),
}
