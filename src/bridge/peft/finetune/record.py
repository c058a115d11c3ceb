"""The run record: `run.json` says what a run is, so that `--resume` continues no other.

A checkpoint directory is published by a rename, so every `checkpoint-N` is complete; what a killed
process left half-written lies in `.partial` and is removed by the next one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bridge.peft import LoRA
from bridge.peft.dtypes import parse_dtype
from bridge.peft.errors import AdapterError
from bridge.peft.finetune.options import TrainingOptions, flag, steering_fields

RECORD = "run.json"
PARTIAL = ".partial"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_OURS = {RECORD, "metrics.json", "loss.png", "logs"}
_OUR_PREFIXES = ("adapter_", "bridge_adapter", ".adapter", ".partial", ".run.json", ".metrics.json")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What a run trains, on what and how; `digests` and `world_size` are known once it starts.

    Attributes:
        model: Directory (absolute) or Hub id of the base model.
        data: JSONL file (absolute); empty for the demo.
        eval_data: JSONL file (absolute), or None to hold out a share of the data.
        demo: Whether this is the embedded demo.
        lora: The recipe.
        options: How to train.
        digests: Of the base model, the data and the evaluation data.
        world_size: Processes that train together.
    """

    model: str
    data: str
    eval_data: str | None
    demo: bool
    lora: LoRA
    options: TrainingOptions
    digests: dict[str, str] = field(default_factory=dict)
    world_size: int = 1

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        record = dataclasses.asdict(self)
        record["lora"] = {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in record["lora"].items()
        }
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RunSpec:
        """Rebuild a record.

        Raises:
            AdapterError: a value that no record holds.
        """
        values = dict(record)
        lora = dict(values.pop("lora"))
        if lora.get("lora_dtype") is not None:
            lora["lora_dtype"] = parse_dtype(lora["lora_dtype"])
        options = TrainingOptions(**values.pop("options"))
        return cls(lora=LoRA(**lora), options=options, **values)


def existing_run(output: Path) -> RunSpec | None:
    """Return the record of the run that `output` holds; None if it is free.

    Raises:
        AdapterError: `output` is a file, holds other files, or its record cannot be read.
    """
    if output.exists() and not output.is_dir():
        raise AdapterError(f"{output} is a file; pass a directory with --output")
    if not output.is_dir() or not any(output.iterdir()):
        return None
    path = output / RECORD
    if not path.is_file():
        raise AdapterError(
            f"{output} holds files that are no run of bridge-peft; pass another --output"
        )
    try:
        return RunSpec.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"cannot read {path} ({error}); pass another --output, or --overwrite to start anew"
        ) from error


def write_record(output: Path, spec: RunSpec) -> None:
    """Write `run.json`, whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / RECORD, json.dumps(spec.to_json(), indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file in one step: a reader sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def is_finished(output: Path) -> bool:
    """Say whether the run in `output` came to its end: the metrics are written last."""
    return (output / "metrics.json").is_file()


def checkpoints(output: Path) -> list[Path]:
    """Return the complete checkpoints in `output`, oldest first."""
    found = [
        (int(match[1]), path)
        for path in (output.iterdir() if output.is_dir() else ())
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def checkpoint_to_resume(output: Path, processes: int) -> Path:
    """Return the newest checkpoint, checked to hold what `processes` processes need.

    Raises:
        AdapterError: somebody removed one of its files.
    """
    *older, newest = checkpoints(output)
    names = ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"]
    names += ["trainer_state.json"]
    names += (
        [f"rng_state_{i}.pth" for i in range(processes)] if processes > 1 else ["rng_state.pth"]
    )
    if missing := [name for name in names if not (newest / name).is_file()]:
        instead = (
            f"to resume from {older[-1].name}" if older else "and start again with --overwrite"
        )
        raise AdapterError(f"{newest} lacks {missing[0]}; remove it {instead}")
    return newest


def clear_run(output: Path) -> None:
    """Remove what a run of ours left in `output`, and nothing else."""
    kept = set(checkpoints(output))
    for path in list(output.iterdir()) if output.is_dir() else []:
        if path in kept or path.name in _OURS or path.name.startswith(_OUR_PREFIXES):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def continue_spec(recorded: RunSpec, asked: Mapping[str, Any]) -> RunSpec:
    """Return the recorded run with the few options that may change on the way.

    Args:
        recorded: from `run.json`.
        asked: what was given on the command line: `model`, `data`, `eval_data`, fields of the
            recipe and of the options, in one mapping.

    Raises:
        AdapterError: a given value differs from the run's own.
    """
    steering = steering_fields()
    parts: dict[str, Any] = {"lora": recorded.lora, "options": recorded.options}
    for name, value in asked.items():
        part = next((key for key, old in parts.items() if hasattr(old, name)), None)
        if part is None:
            own, given = getattr(recorded, name), value
        else:
            changed = dataclasses.replace(parts[part], **{name: value})
            own, given = getattr(parts[part], name), getattr(changed, name)
            if part == "options" and name not in steering:
                parts[part] = changed
                continue
        if given != own:
            raise AdapterError(
                f"{flag(name)} is {given} but the run to resume has {own}; leave the flag out, "
                "or start another run with another --output"
            )
    return dataclasses.replace(recorded, options=parts["options"])


def check_same_run(recorded: RunSpec, now: RunSpec, output: Path) -> None:
    """Check that model, data and processes are still those the run began with.

    Raises:
        AdapterError: one of them is not.
    """
    for what in recorded.digests:
        if recorded.digests[what] != now.digests.get(what):
            raise AdapterError(
                f"the {what} is not the one that the run in {output} began with; bring it back, "
                "or start another run with another --output"
            )
    if recorded.world_size != now.world_size:
        raise AdapterError(
            f"the run in {output} began with {recorded.world_size} processes, not "
            f"{now.world_size}; start as many again"
        )
