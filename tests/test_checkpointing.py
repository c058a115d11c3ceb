"""Activation checkpointing over a frozen base: every adapter has the gradient it has without."""

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from bridge.peft import LoRA, save_adapter
from bridge.peft.formats.peft import read_adapter
from tests.helpers import models
from tests.helpers.fsdp import (
    RECIPE,
    Block,
    Tiny,
    base,
    batch,
    close,
    loss_of,
    mine,
    move_b,
    shard,
    strict,
    trainable,
)
from tests.helpers.ranks import on_ranks

MODES = {"reentrant": CheckpointImpl.REENTRANT, "not reentrant": CheckpointImpl.NO_REENTRANT}


def wrap(model, mode):
    apply_activation_checkpointing(
        model,
        partial(checkpoint_wrapper, checkpoint_impl=MODES[mode]),
        check_fn=lambda module: isinstance(module, Block),
    )


def gradients(model, ids, classes):
    loss_of(model, ids, classes).backward()
    return {name: p.grad for name, p in trainable(model).items()}


def whole_gradients():
    return gradients(move_b(RECIPE(base())), *batch(0))


class CallsCheckpoint(Tiny):
    """A model whose own forward checkpoints its blocks."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapped", ["first", "last", "after a step"])
def test_wrapped_blocks_give_every_adapter_its_gradient(mode, wrapped, tmp_path):
    model = base()
    if wrapped == "first":
        wrap(model, mode)
    move_b(RECIPE(model))
    if wrapped == "after a step":
        gradients(model, *batch(0))
        model.zero_grad()
    if wrapped != "first":
        wrap(model, mode)
    close(gradients(model, *batch(0)), whole_gradients(), 1e-6)
    save_adapter(model, tmp_path)
    assert "blocks.0.q" in read_adapter(tmp_path).tensors


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_model_that_calls_checkpoint_itself_gives_every_adapter_its_gradient(use_reentrant):
    model = CallsCheckpoint(use_reentrant)
    model.load_state_dict(base().state_dict())
    close(gradients(move_b(RECIPE(model)), *batch(0)), whole_gradients(), 1e-6)


def test_a_model_that_checkpoints_nothing_computes_no_gradient_of_its_embeddings():
    model = RECIPE(base())
    embedded = []
    model.embed.register_forward_hook(lambda *call: embedded.append(call[-1].requires_grad))
    model(batch(0)[0])
    assert embedded == [False]


@pytest.mark.parametrize("mode", MODES)
def test_floating_inputs_of_a_wrapped_block_are_left_as_the_caller_has_them(mode):
    torch.manual_seed(0)
    model = LoRA(dim=2)(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    model[0] = checkpoint_wrapper(model[0], checkpoint_impl=MODES[mode])
    x = torch.ones(3, 4)
    model(x).sum().backward()
    assert model[0].lora_b.weight.grad.any()
    assert not x.requires_grad and x.grad is None


def sharded_blocks():
    strict()
    wanted = whole_gradients()
    for mode in MODES:
        for steps in (
            ("recipe", "wrap", "shard"),
            ("wrap", "shard", "recipe"),
            ("recipe", "shard", "wrap"),
            ("shard", "recipe", "wrap"),
        ):
            model = base()
            for step in steps:
                if step == "wrap":
                    wrap(model, mode)
                elif step == "shard":
                    shard(model)
                else:
                    RECIPE(model)
            move_b(model)
            found = gradients(model, *map(mine, batch(0)))
            close(found, wanted, 1e-5)


def sharded_transformers():
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated")
    wanted = None
    for order in ("whole", "recipe first", "sharded first"):
        for use_reentrant in (True, False):
            torch.manual_seed(0)
            model = models.llama()
            steps = [LoRA(dim=3, seed=7), lambda m: shard(m, parts=m.model.layers)]
            for step in {"whole": steps[:1], "sharded first": steps[::-1]}.get(order, steps):
                step(model)
            move_b(model).train()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            ids = torch.arange(1, 29).view(4, 7)
            part = ids if order == "whole" else mine(ids)
            model(input_ids=part, labels=part).loss.backward()
            found = {name: p.grad for name, p in trainable(model).items()}
            wanted = wanted or found
            close(found, wanted, 1e-5)


def sharded():
    sharded_blocks()
    sharded_transformers()
    dist.barrier()


@pytest.mark.distributed
def test_checkpointed_blocks_that_are_sharded_give_the_gradients_of_one_process(tmp_path):
    on_ranks(2, sharded, tmp_path)
