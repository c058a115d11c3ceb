"""An interrupted merge goes on where it stopped; another one starts anew."""

import errno
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bridge.peft import AdapterError, save_adapter
from tests.helpers import models
from tests.helpers.directories import case, contents, cut, run, trained

transformers.utils.logging.disable_progress_bar()
BF16 = torch.bfloat16


def stop_after(share, error):
    """A `progress` that raises once so much is written."""

    def progress(done, total):
        if done >= share * total:
            raise error

    return progress


def finished(files):
    """The files in the unfinished output that have their own names, and what tells them apart."""
    part = files.out.with_name("out.part")
    return {path.name: path.stat().st_ino for path in part.glob("*.safetensors")}


def test_an_interrupted_merge_goes_on_where_it_stopped(tmp_path):
    files, seen = case(tmp_path), []
    whole = run(files)
    wanted = contents(files.out)
    shutil.rmtree(files.out)
    with pytest.raises(KeyboardInterrupt):
        run(files, progress=stop_after(0.5, KeyboardInterrupt))
    assert not files.out.exists()
    kept = finished(files)
    assert len(kept) > 1
    report = run(files, progress=lambda done, total: seen.append(done / total))
    assert all((files.out / name).stat().st_ino == inode for name, inode in kept.items())
    assert contents(files.out) == wanted
    assert report == whole
    assert seen == sorted(seen)
    assert (seen[0] > 0.3, seen[-1]) == (True, 1)
    assert not files.out.with_name("out.part").exists()


KILLED = """
import os, signal, sys
from bridge.peft.merging.directory import merge_directory

def progress(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

merge_directory(sys.argv[1], [(sys.argv[2], 1.0)], sys.argv[3], progress=progress)
"""


def test_a_merge_that_was_killed_ends_like_an_uninterrupted_one(tmp_path):
    files = case(tmp_path)
    whole = run(files)
    wanted = contents(files.out)
    shutil.rmtree(files.out)
    arguments = [sys.executable, "-c", KILLED, files.base, files.adapter, files.out]
    assert subprocess.run(arguments, check=False).returncode == -9
    assert not files.out.exists()
    kept = finished(files)
    assert kept and list(files.out.with_name("out.part").glob("*.safetensors.part"))
    assert run(files) == whole
    assert contents(files.out) == wanted
    assert all((files.out / name).stat().st_ino == inode for name, inode in kept.items())


@pytest.mark.parametrize("change", ["weight", "dtype", "adapter", "base", "file", "job"])
def test_another_job_starts_anew(change, tmp_path):
    files = case(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(files, progress=stop_after(0.5, KeyboardInterrupt))
    part = files.out.with_name("out.part")
    options = {"weight": {"weight": 2.0}, "dtype": {"dtype": BF16}}.get(change, {})
    if change == "adapter":
        save_adapter(trained(models.llama(), seed=9), files.adapter)
    elif change == "base":
        for path in files.base.glob("*.safetensors"):
            state = {name: tensor + 1 for name, tensor in load_file(path).items()}
            save_file(state, path, metadata={"format": "pt"})
    elif change == "file":
        cut(next(part.glob("*.safetensors")), 10)
    elif change == "job":
        (part / ".merge.json").write_text("{")
    run(files, **options)
    merged = contents(files.out)
    shutil.rmtree(files.out)
    run(files, **options)
    assert contents(files.out) == merged


def test_a_full_disk_leaves_no_output_and_the_finished_files(tmp_path):
    files = case(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(AdapterError, match=r"no space left on the disk.*goes on from them"):
        run(files, progress=stop_after(0.5, full))
    assert not files.out.exists()
    kept = finished(files)
    assert kept and not list(files.out.with_name("out.part").glob("*.part"))
    run(files)
    assert all((files.out / name).stat().st_ino == inode for name, inode in kept.items())
