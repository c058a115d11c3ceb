"""A checkpoint: the adapter, and what training needs to go on from it as if it had not stopped.

`training_state.pt` holds the optimizer (whole tensors by parameter name, whatever the sharding),
the schedule, the random states of all processes, and the hash of the adapter file that they belong
to. `complete.json` names every file with its size and is written last, under a directory that
nobody takes for a checkpoint; a rename publishes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bridge.peft.errors import AdapterError
from bridge.peft.finetune.ranks import process_count, process_index
from bridge.peft.finetune.record import COMPLETE, checkpoints, incomplete
from bridge.peft.formats.files.atomic import sync_directory
from bridge.peft.formats.files.untrusted import TENSORS_NAME
from bridge.peft.parallel.fsdp import reshard
from bridge.peft.tensors import full_tensor, sharded_like

STATE = "training_state.pt"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint and the state of training in it, as `read_state` returns it."""

    path: Path
    state: dict[str, Any]


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """An optimizer's state by parameter name, in whole tensors; every process must call."""
    names = _names(optimizer, model)
    held = optimizer.state_dict()
    state = {
        names[index]: {key: full_tensor(value).cpu() for key, value in values.items()}
        for index, values in held["state"].items()
    }
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in _groups(held)]
    return {"state": state, "groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Any]
) -> None:
    """Bring an optimizer to a state that `optimizer_state` returned, under any sharding."""
    names = _names(optimizer, model)
    if sorted(names) != sorted(name for group in saved["groups"] for name in group["params"]):
        raise AdapterError(
            "the checkpoint's optimizer trained other parameters than the model has; start another "
            "run with another --output"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {key: _like(value, parameter) for key, value in saved["state"][name].items()}
        for index, (name, parameter) in enumerate(zip(names, parameters, strict=True))
        if name in saved["state"]
    }
    of_name = {name: index for index, name in enumerate(names)}
    groups = [
        {**group, "params": [of_name[name] for name in group["params"]]}
        for group in saved["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_states() -> list[dict[str, Tensor]]:
    """The states of torch's generators in all processes, in their order; every one must call."""
    mine = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    if process_count() == 1:
        return [mine]
    states: list[Any] = [None] * process_count()
    dist.all_gather_object(states, mine)
    return states


def set_random_state(states: list[dict[str, Tensor]], seed: int) -> None:
    """Go on where this process was, or with numbers of another seed if there were other ones."""
    if len(states) != process_count():
        torch.manual_seed(seed)
        return
    mine = states[process_index()]
    torch.set_rng_state(mine["cpu"])
    if torch.cuda.is_available() and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"])


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write `training_state.pt` beside the adapter's files that it belongs to."""
    torch.save({**state, "adapter_sha256": _hash(directory)}, directory / STATE)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read `training_state.pt`.

    Raises:
        AdapterError: It belongs to another adapter than the one that lies beside it.
    """
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    if state["adapter_sha256"] != _hash(checkpoint):
        raise AdapterError(
            f"{checkpoint}: the optimizer's state belongs to another adapter than the "
            f"{TENSORS_NAME} beside it; bring that file back, or remove {checkpoint.name} to "
            "resume from an earlier one"
        )
    return state


def publish(partial: Path, final: Path, *, keep: int) -> None:
    """Mark a checkpoint as complete, make it visible in one step, and remove older ones."""
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    (partial / COMPLETE).write_text(json.dumps({"files": sizes}, indent=2) + "\n")
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(partial)
    _discard(final, partial.parent)
    os.rename(partial, final)
    sync_directory(final.parent)
    for old in [*checkpoints(final.parent)[:-keep], *incomplete(final.parent)]:
        _discard(old, partial.parent)


def _discard(directory: Path, aside: Path) -> None:
    """Remove a checkpoint, which nobody sees half removed."""
    if directory.exists():
        os.rename(directory, aside / f"old-{directory.name}")
        shutil.rmtree(aside / f"old-{directory.name}")


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The parameters of an optimizer, by name, in the order of its state dict."""
    reshard(model)  # after an evaluation FSDP2's outermost module still has gathered copies
    of_parameter = {id(parameter): name for name, parameter in model.named_parameters()}
    return [of_parameter[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _groups(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    return state["param_groups"]


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor in the shards of a parameter; a count of steps as it is."""
    return sharded_like(value, parameter) if value.shape == parameter.shape else value


def _hash(directory: Path) -> str:
    with (directory / TENSORS_NAME).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
