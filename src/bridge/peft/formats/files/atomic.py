"""Write files so that a crash leaves the old ones or the new ones: one file, or a group as one.

The new files of a group are staged in a directory beside the old ones and flushed. Renaming that
directory is the commit. After it the files are moved to their places one by one; whoever reads or
writes the directory after a crash in between finds the rest in the committed directory and takes it
from there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bridge.peft.errors import AdapterFileError

#: Holds files that are committed and not yet in their places.
COMMITTED = ".adapter.commit"
_STAGING_PREFIX = ".adapter.staging-"
_STALE_SECONDS = 3600.0
_COMMIT_ATTEMPTS = 100


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file in one step: a reader sees the old content or the new one, never a part.

    Args:
        path: The file; its directory must exist.
        content: What it is to hold.

    Raises:
        OSError: It cannot be written; what it held is still there.
    """
    staged = path.with_name(f".{path.name}.partial")
    try:
        _write_flushed(staged, content)
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def write_files(directory: Path, files: Mapping[str, bytes | memoryview]) -> None:
    """Put `files` into `directory`, all of them or none.

    Args:
        directory: Created if missing.
        files: Contents by file name.

    Raises:
        AdapterFileError: The directory cannot be written to; what it held is still there.
    """
    created = False
    try:
        created = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        finish_commit(directory)
        _remove_stale_staging(directory)
        _stage_and_commit(directory, files)
        finish_commit(directory)
    except OSError as error:
        if created:
            _remove_if_empty(directory)
        raise AdapterFileError(
            f"cannot write the adapter to {directory}: {error.strerror or error}; free space or "
            "pass a directory that can be written to"
        ) from error


def finish_commit(directory: Path) -> None:
    """Move what a committed save left in its own directory to its place.

    Args:
        directory: The adapter directory.
    """
    committed = directory / COMMITTED
    if committed.is_symlink() or not committed.is_dir():
        return
    # Another process may be finishing the same commit.
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(committed.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, directory / path.name)
    sync_directory(directory)
    _remove_if_empty(committed)


def current_path(directory: Path, name: str) -> Path:
    """Where the newest committed version of a file is; it may not exist.

    Args:
        directory: The adapter directory.
        name: A file name.
    """
    committed = directory / COMMITTED
    path = committed / name
    if committed.is_dir() and (path.exists() or path.is_symlink()):
        return path
    return directory / name


def _stage_and_commit(directory: Path, files: Mapping[str, bytes | memoryview]) -> None:
    staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=directory))
    try:
        for name, content in files.items():
            _write_flushed(staging / name, content)
        sync_directory(staging)
        _commit(staging, directory)
        sync_directory(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_flushed(path: Path, content: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _commit(staging: Path, directory: Path) -> None:
    """Rename, after any commit of another process that is still being finished."""
    for _ in range(_COMMIT_ATTEMPTS):
        try:
            os.rename(staging, directory / COMMITTED)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            finish_commit(directory)
    raise OSError(errno.EBUSY, "other processes keep saving into it")


def _remove_stale_staging(directory: Path) -> None:
    """Remove what a killed process staged and never committed."""
    for path in directory.glob(f"{_STAGING_PREFIX}*"):
        try:
            stale = path.is_dir() and time.time() - path.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:
            continue  # another process has finished with it
        if stale:
            shutil.rmtree(path, ignore_errors=True)


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return


def sync_directory(directory: Path) -> None:
    """Bring to disk what was created, renamed or removed in a directory."""
    if os.name == "nt":
        return  # directories cannot be opened there
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
