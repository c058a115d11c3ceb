"""A save leaves the old files or the new ones, whatever stops it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bridge.peft.errors import AdapterError
from bridge.peft.formats.files.atomic import COMMITTED, current_path, replace_file, write_files

NAMES = ("adapter_config.json", "adapter_model.safetensors", "bridge_adapter.json")
OLD = {name: f"old {name}".encode() for name in NAMES}
NEW = {name: f"new {name}".encode() for name in NAMES}


def read(directory):
    return {name: current_path(directory, name).read_bytes() for name in NAMES}


def hidden(directory):
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


#: Dies, as by `kill -9`, before or after the n-th call that changes the disk.
_DIE = """
    import os, sys
    from pathlib import Path
    from bridge.peft.formats.files.atomic import write_files
    calls, at = 0, int(sys.argv[2])
    def deadly(function):
        def call(*args, **kwargs):
            global calls
            calls += 1
            number = calls
            if number == at: os._exit(9)
            try:
                return function(*args, **kwargs)
            finally:
                if -number == at: os._exit(9)
        return call
    for name in ("fsync", "rename", "replace", "rmdir", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    names = ("adapter_config.json", "adapter_model.safetensors", "bridge_adapter.json")
    write_files(Path(sys.argv[1]), {name: f"new {name}".encode() for name in names})
    print(calls)
"""


def run(script, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_kill_at_any_moment_leaves_the_old_files_or_the_new_ones(tmp_path):
    total = int(run(_DIE, tmp_path / "count", 0).stdout)
    assert total > 10
    outcomes = []
    for at in (*range(1, total + 1), *range(-total, 0)):
        directory = tmp_path / f"at{at}"
        write_files(directory, OLD)
        assert run(_DIE, directory, at).returncode == 9
        found = read(directory)
        assert found in (OLD, NEW), at
        outcomes.append(found == NEW)
        # the next save tidies up after it
        last = {name: b"last" for name in NAMES}
        write_files(directory, last)
        assert {name: (directory / name).read_bytes() for name in NAMES} == last
        assert COMMITTED not in hidden(directory)
    assert {False, True} == set(outcomes)


_FULL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    from bridge.peft.errors import AdapterError
    from bridge.peft.formats.files.atomic import write_files
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        write_files(Path(sys.argv[1]), {"a": b"new", "b": bytes(1000)})
    except AdapterError as error:
        print(error)
"""


def test_a_disk_that_fills_up_leaves_the_old_files_and_no_others(tmp_path):
    write_files(tmp_path / "out", {"a": b"old", "b": b"old"})
    said = run(_FULL_DISK, tmp_path / "out").stdout
    assert "cannot write the adapter" in said and said.count("\n") == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        "a": b"old",
        "b": b"old",
    }


def test_nothing_is_left_where_nothing_was(tmp_path):
    assert "cannot write" in run(_FULL_DISK, tmp_path / "new").stdout
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_written_to_is_one_family_of_error(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(AdapterError, match="cannot write the adapter to .*pass a directory"):
            write_files(directory, NEW)
    assert (tmp_path / "file").read_text() == "not a directory"


def test_an_exception_while_staging_leaves_no_trace(tmp_path, monkeypatch):
    write_files(tmp_path, OLD)

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, NEW)
    assert read(tmp_path) == OLD and not hidden(tmp_path)


def test_old_staging_of_killed_saves_is_removed_and_fresh_is_left(tmp_path):
    import os

    old, fresh = tmp_path / ".adapter.staging-old", tmp_path / ".adapter.staging-fresh"
    for path in (old, fresh):
        path.mkdir()
        (path / "x").write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    write_files(tmp_path, NEW)
    assert hidden(tmp_path) == [fresh.name]


def test_saves_at_the_same_time_leave_one_of_them_whole(tmp_path):
    def save(number):
        for _ in range(20):
            write_files(tmp_path, {name: f"{number}".encode() for name in NAMES})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(4)))
    assert len(set(read(tmp_path).values())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)


def test_files_have_ordinary_permissions(tmp_path):
    write_files(tmp_path / "out", NEW)
    (tmp_path / "ordinary").write_text("")
    wanted = (tmp_path / "ordinary").stat().st_mode
    assert {(tmp_path / "out" / name).stat().st_mode for name in NAMES} == {wanted}


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    replace_file(tmp_path / "a.json", b"old")
    replace_file(tmp_path / "a.json", b"new")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "a.json", b"newer")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.json", b"new")]
