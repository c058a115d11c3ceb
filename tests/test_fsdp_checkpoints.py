"""DCP checkpoints of the adapter alone, written by any number of ranks and read by another."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh

from bridge.peft import LoRA, adapter_state_dict
from tests.helpers.fsdp import RECIPE, base, batch, close, full, loss_of, shard, trainable
from tests.helpers.ranks import on_ranks

TRAINED = StateDictOptions(ignore_frozen_params=True)
LOOSE = StateDictOptions(strict=False)


class Job:
    """A training run on the first `count` ranks; on one rank without any sharding."""

    def __init__(self, count, groups, sharded_first=False, recipe=RECIPE):
        self.count, self.group = count, groups[count]
        self.takes_part = dist.get_rank() < count
        self.model = base()
        mesh = DeviceMesh("cpu", torch.arange(count))
        if not self.takes_part:
            return
        for step in ("shard", "recipe") if sharded_first else ("recipe", "shard"):
            if step == "recipe":
                recipe(self.model)
            elif count > 1:
                shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(trainable(self.model).values(), lr=3e-3)

    def train(self, steps):
        for step in steps:
            parts = [t.chunk(self.count)[dist.get_rank()] for t in batch(step)]
            loss_of(self.model, *parts).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self):
        weights, optimizer = get_state_dict(self.model, self.optimizer, options=TRAINED)
        return {"adapter": weights, "optimizer": optimizer}

    def save(self, path):
        dcp.save(self.state(), checkpoint_id=path, process_group=self.group)

    def save_in_the_background(self, path):
        return dcp.async_save(self.state(), checkpoint_id=path, process_group=self.group)

    def load(self, path):
        state = self.state()
        dcp.load(state, checkpoint_id=path, process_group=self.group)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["adapter"],
            optim_state_dict=state["optimizer"],
            options=LOOSE,
        )

    def moments(self):
        """The optimizer's state of A and B, whole, by name."""
        return {
            f"{name}.{key}": full(value)
            for name, parameter in trainable(self.model).items()
            for key, value in self.optimizer.state[parameter].items()
        }


def continue_elsewhere(before, after, groups, path, uninterrupted):
    """Half of a run on one number of ranks, the other half on another one."""
    first, weights, moments = Job(before, groups), {}, {}
    if first.takes_part:
        first.train(range(3))
        first.save(path)
        weights, moments = adapter_state_dict(first.model), first.moments()
    dist.barrier()
    second = Job(after, groups, sharded_first=True)
    if second.takes_part:
        second.load(path)
        loaded, loaded_moments = adapter_state_dict(second.model), second.moments()
        if first.takes_part:
            close(loaded, weights, 0)
            close(loaded_moments, moments, 0)
        second.train(range(3, 6))
        close(adapter_state_dict(second.model), uninterrupted, 1e-5)
    dist.barrier()


def resharding():
    groups = {count: dist.new_group(list(range(count))) for count in (1, 2, 4)}
    place = Path(os.environ["CHECKPOINTS"])
    alone = RECIPE(base())
    optimizer = torch.optim.AdamW(trainable(alone).values(), lr=3e-3)
    for step in range(6):
        loss_of(alone, *batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    uninterrupted = adapter_state_dict(alone)
    for before, after in ((2, 1), (1, 2), (4, 2)):
        path = place / f"{before}to{after}"
        continue_elsewhere(before, after, groups, path, uninterrupted)
    only_the_adapter(groups, place / "adapter")
    in_the_background(groups, place / "background")
    with_a_head(groups, place / "head")


def only_the_adapter(groups, path):
    job = Job(2, groups)
    if not job.takes_part:
        return
    job.train(range(2))
    state = get_model_state_dict(job.model, options=TRAINED)
    assert set(state) == set(adapter_state_dict(job.model))  # nothing of the base
    dcp.save({"adapter": state}, checkpoint_id=path, process_group=job.group)
    fresh = RECIPE(base())
    state = get_model_state_dict(fresh, options=TRAINED)
    dcp.load({"adapter": state}, checkpoint_id=path, no_dist=True)
    set_model_state_dict(fresh, state, options=LOOSE)
    close(adapter_state_dict(fresh), adapter_state_dict(job.model), 0)


def in_the_background(groups, path):
    job = Job(2, groups)
    if not job.takes_part:
        return
    job.train(range(2))
    wanted = {name: tensor.clone() for name, tensor in adapter_state_dict(job.model).items()}
    saving = job.save_in_the_background(path)
    job.train(range(2, 4))  # goes on while it is written
    saving.result()
    job.load(path)
    close(adapter_state_dict(job.model), wanted, 0)


def with_a_head(groups, path):
    recipe = LoRA(target_modules=["q"], dim=3, seed=7, modules_to_train=["head"])
    job = Job(2, groups, recipe=recipe)
    other = Job(2, groups, sharded_first=True, recipe=recipe)
    if not job.takes_part:
        return
    job.train(range(2))
    job.save(path)
    other.load(path)
    close(trainable(other.model), {n: full(p) for n, p in trainable(job.model).items()}, 0)
    assert "head.weight" in trainable(other.model)


@pytest.mark.distributed
def test_a_checkpoint_goes_on_with_any_number_of_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path / "checkpoints"))
    on_ranks(4, resharding, tmp_path)
