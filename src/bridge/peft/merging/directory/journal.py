"""What an unfinished merge has done, so that the next one can go on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bridge.peft.formats.files.atomic import current_path
from bridge.peft.formats.peft.adapter_file import CONFIG_NAME, TENSORS_NAME
from bridge.peft.merging.directory.checkpoint import Checkpoint
from bridge.peft.merging.report import MergeRow

JOURNAL_NAME = ".merge.json"
_VERSION = 1


@dataclass
class Journal:
    """The finished files of a merge, kept beside them.

    Attributes:
        directory: The unfinished output.
        job: Identifies inputs and options.
        done: By file name its size and its rows of the report.
    """

    directory: Path
    job: str
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path, job: str) -> Journal:
        """Go on with the same job, or start anew.

        Args:
            directory: The unfinished output.
            job: Identifies inputs and options.
        """
        journal = cls(directory, job)
        try:
            known = json.loads((directory / JOURNAL_NAME).read_bytes())
            if known["job"] == job:
                journal.done = {name: item for name, item in known["done"].items() if _rows(item)}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass  # no journal, or one that a crash cut short: nothing is known to be done
        return journal

    def rows(self, name: str) -> list[MergeRow] | None:
        """The report's rows of a file that is finished and still there; else None."""
        item, path = self.done.get(name), self.directory / name
        if item is None or not path.is_file() or path.stat().st_size != item["size"]:
            return None
        return _rows(item)

    def record(self, name: str, rows: Sequence[MergeRow]) -> None:
        """Say that a file is finished.

        Args:
            name: Its name.
            rows: Its rows of the report.
        """
        size = (self.directory / name).stat().st_size
        self.done[name] = {"size": size, "rows": [asdict(row) for row in rows]}
        self.save()

    def save(self) -> None:
        """Write the journal, whole or not at all."""
        staged = self.directory / f"{JOURNAL_NAME}.part"
        staged.write_text(json.dumps({"job": self.job, "done": self.done}))
        os.replace(staged, self.directory / JOURNAL_NAME)


def fingerprint(
    checkpoint: Checkpoint, adapters: Iterable[tuple[Path, float]], options: Sequence[object]
) -> str:
    """Identify a merge: files by size and time, options by value.

    Args:
        checkpoint: The base model.
        adapters: Their directories and weights.
        options: Whatever else changes the output.
    """
    digest = hashlib.sha256(f"{_VERSION} {checkpoint.config} {options}".encode())
    for name, shard in checkpoint.shards.items():
        info = shard.path.stat()
        digest.update(f"{name} {info.st_size} {info.st_mtime_ns} {shard.entries}".encode())
    for directory, weight in adapters:
        digest.update(f"adapter {weight!r}".encode())
        for name in (CONFIG_NAME, TENSORS_NAME):
            info = current_path(directory, name).stat()
            digest.update(f"{name} {info.st_size} {info.st_mtime_ns}".encode())
    return digest.hexdigest()


def _rows(item: dict[str, Any]) -> list[MergeRow]:
    return [MergeRow(**row) for row in item["rows"]]
