"""The run record: `run.json` says what a run is, so that `--resume` continues no other.

A checkpoint directory is published by a rename once it is complete; what a killed process left
half-written lies in `.partial` and is removed by the next one. A `checkpoint-N` that lacks
something after all (a disk that failed, a copy that was cut short) is passed over.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.peft import LoRA
from bridge.peft.dtypes import dtype_name, parse_dtype
from bridge.peft.errors import AdapterError
from bridge.peft.finetune.options import FREE_ON_RESUME, TrainingOptions, flag
from bridge.peft.formats.files.atomic import replace_file

RECORD = "run.json"
METRICS = "metrics.json"  # written last
PARTIAL = ".partial"
COMPLETE = "complete.json"  # names the files of a checkpoint
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_OURS = {RECORD, METRICS, "loss.png", "logs"}
_OUR_PREFIXES = ("adapter_", "bridge_adapter", ".adapter", ".partial", ".run.json", ".metrics.json")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What a run trains, on what and how; `digests` and `world_size` are known once it starts.

    Model and files are absolute paths, or the model a Hub id; `data` is empty for the demo, and
    without `eval_data` a share of the data is held out.
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
        if (dtype := self.lora.lora_dtype) is not None:
            record["lora"]["lora_dtype"] = dtype_name(dtype)
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RunSpec:
        """Rebuild a record."""
        values = dict(record)
        lora = dict(values.pop("lora"))
        if lora.get("lora_dtype") is not None:
            lora["lora_dtype"] = parse_dtype(lora["lora_dtype"])
        options = TrainingOptions(**values.pop("options"))
        return cls(lora=LoRA(**lora), options=options, **values)


def existing_run(output: Path) -> RunSpec | None:
    """Return the record of the run that `output` holds; None if it is free."""
    if output.exists() and not output.is_dir():
        raise AdapterError(f"{output} is a file; pass a directory with --output")
    # a process that was killed while it wrote the record leaves nothing else
    if not output.is_dir() or not {p.name for p in output.iterdir()} - {f".{RECORD}.partial"}:
        return None
    path = output / RECORD
    if not path.is_file():
        raise AdapterError(
            f"{output} holds files that are not a run of bridge-peft; pass another --output"
        )
    try:
        return RunSpec.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"cannot read {path} ({error}); pass another --output, or remove {output}"
        ) from error


def write_record(output: Path, spec: RunSpec) -> None:
    """Write `run.json`, in one step."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RECORD, spec.to_json())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON in one step: a reader sees the old file or the new one."""
    replace_file(path, (json.dumps(values, indent=2) + "\n").encode())


def is_finished(output: Path) -> bool:
    """Say whether the run in `output` came to its end."""
    return (output / METRICS).is_file()


def checkpoints(output: Path) -> list[Path]:
    """Return the complete checkpoints in `output`, oldest first."""
    return [path for path in _checkpoints(output) if missing_file(path) is None]


def incomplete(output: Path) -> list[Path]:
    """Return the checkpoints in `output` that lack something, oldest first."""
    return [path for path in _checkpoints(output) if missing_file(path) is not None]


def missing_file(checkpoint: Path) -> str | None:
    """Return the name of a file that a checkpoint lacks or has only a part of; None if complete."""
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return COMPLETE
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return name
    return None


def passed_over(output: Path) -> list[str]:
    """Say which checkpoints in `output` are not resumed from, though they are newer."""
    kept = checkpoints(output)
    newest = _step(kept[-1]) if kept else -1
    return [
        f"{path.name} is incomplete ({missing_file(path)}): passed over"
        for path in incomplete(output)
        if _step(path) > newest
    ]


def _checkpoints(output: Path) -> list[Path]:
    found = [
        path
        for path in (output.iterdir() if output.is_dir() else ())
        if _CHECKPOINT.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def resume_command(output: Path) -> str:
    """Return the words that continue the run in `output`."""
    return f"bridge-peft finetune --resume --output {shlex.quote(str(output))}"


def clear_run(output: Path) -> None:
    """Remove what a run of ours left in `output`, and nothing else."""
    kept = set(_checkpoints(output))
    for path in list(output.iterdir()) if output.is_dir() else []:
        if path in kept or path.name in _OURS or path.name.startswith(_OUR_PREFIXES):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def continue_spec(recorded: RunSpec, asked: Mapping[str, Any]) -> RunSpec:
    """Return the recorded run with the few options that may change on the way."""
    options = recorded.options
    for name, value in asked.items():
        if name in FREE_ON_RESUME:
            options = dataclasses.replace(options, **{name: value})
            continue
        parts = (recorded.lora, recorded.options)
        part = next((part for part in parts if hasattr(part, name)), recorded)
        own = getattr(part, name)
        # as the part itself would hold it: a name alone is a tuple of one
        given = getattr(dataclasses.replace(part, **{name: value}), name)
        if given != own:
            raise AdapterError(
                f"{flag(name)} is {given} but the run to resume has {own}; leave the flag out, "
                "or start another run with another --output"
            )
    return dataclasses.replace(recorded, options=options)


def check_same_run(recorded: RunSpec, now: RunSpec, output: Path) -> None:
    """Check that model and data are still those the run began with."""
    for what, digest in recorded.digests.items():
        if now.digests.get(what) != digest:
            raise AdapterError(
                f"the {what} is not the one that the run in {output} began with; bring it back, "
                "or start another run with another --output"
            )
