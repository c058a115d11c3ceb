"""A disk too small for a run is told before it begins; one that fills up, with what was kept."""

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from bridge.peft import AdapterError
from bridge.peft.finetune.disk import disk_full_told
from bridge.peft.finetune.record import checkpoints
from tests.helpers.cli_fixtures import (
    finetune,
    refused,
)

needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
pytestmark = pytest.mark.usefixtures("one_cpu_thread")
QUICK = ["--dim", 4, "--steps", 4, "--batch-size", 4]


def test_a_full_disk_is_told_before_anything_is_written(model, data, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    arguments = ("--model", model, "--data", data)
    assert "no disk space for the run" in refused(capsys, tmp_path / "out", *arguments)


@needs_full_device
def test_a_disk_that_fills_up_keeps_the_newest_checkpoint(
    model, data, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "out"
    save = torch.save

    def save_until_full(value, path, *args, **kwargs):
        return save(value, "/dev/full" if "checkpoint-3/" in str(path) else path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save_until_full)
    arguments = ("--model", model, "--data", data, "--output", output, *QUICK)
    assert finetune(*arguments, "--save-every", 1) == 2
    error = capsys.readouterr().err
    assert "no space left on the disk; free some and continue from checkpoint-2" in error
    assert [path.name for path in checkpoints(output)] == ["checkpoint-1", "checkpoint-2"]
    assert not (output / ".partial").exists()
    monkeypatch.setattr(torch, "save", save)
    assert finetune("--resume", "--output", output) == 0


def fail(error: Exception):
    raise error


@needs_full_device
@pytest.mark.parametrize(
    "write",
    [
        lambda: torch.save(torch.zeros(10**6), "/dev/full"),
        lambda: torch.save({"tiny": 1}, "/dev/full"),
        lambda: Path("/dev/full").write_text("text"),
        lambda: fail(OSError(errno.EDQUOT, "quota")),
        lambda: fail(RuntimeError("No space left on device (os error 28)")),
    ],
)
def test_a_full_disk_is_recognised_in_each_library_s_words(write, tmp_path):
    with pytest.raises(AdapterError, match="no space left on the disk.* start again with --over"):
        with disk_full_told(tmp_path):
            write()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output"), ValueError("another")])
def test_another_error_is_not_taken_for_a_full_disk(error, tmp_path):
    with pytest.raises(type(error), match=str(error.args[-1])), disk_full_told(tmp_path):
        raise error
