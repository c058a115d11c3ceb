"""A small model, sharded by FSDP2 in the ways that users shard, and the same in one process."""

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from bridge.peft import LoRA
from bridge.peft.model.walk import clean_fqn
from bridge.peft.tensors import sharded_like

#: Ranks of 3 and widths of 12 and 20: most of A and B is cut unevenly.
RECIPE = LoRA(target_modules=["q", "up", "down"], dim=3, alpha=6, seed=7)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.q, self.up, self.down = nn.Linear(12, 12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        x = x + torch.tanh(self.q(x))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Tiny(nn.Module):
    """Token ids (batch, length) to logits of five classes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(12, 5)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def base():
    """The same base on every rank."""
    torch.manual_seed(0)
    return Tiny()


def shard(model, *, parts=None, **options):
    """`fully_shard` as users call it: each block, then the rest."""
    for part in model.blocks if parts is None else parts:
        fully_shard(part, **options)
    return fully_shard(model, **options)


def batch(step):
    """The global batch of a step: ids (4, 3) and classes."""
    generator = torch.Generator().manual_seed(step)
    shape = {"size": (4, 3), "generator": generator}
    return torch.randint(16, **shape), torch.randint(5, **shape)


def mine(tensor):
    """This rank's rows of a global batch."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(model, ids, classes):
    return F.cross_entropy(model(ids).flatten(0, 1), classes.flatten())


def move_b(model):
    """Give B values other than zero, the same ones whatever the sharding."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                values = torch.randn(parameter.shape, generator=generator) / 4
                parameter.copy_(sharded_like(values, parameter))
    return model


def trainable(model):
    return {clean_fqn(name): p for name, p in model.named_parameters() if p.requires_grad}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def close(got, wanted, tolerance):
    """Assert that tensors by name agree, and that there are some."""
    assert got.keys() == wanted.keys() and got and all(t is not None for t in wanted.values())
    for name in wanted:
        torch.testing.assert_close(
            full(got[name]),
            wanted[name],
            rtol=0,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def strict():
    """Make warnings errors in a process of a test, as pytest does in its own."""
    warnings.simplefilter("error")
    # torch's own linears do so
    warnings.filterwarnings("ignore", ".*returned a view tensor")
