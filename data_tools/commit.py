"""Folders that are there as a whole or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from framework.errors import UsageError
from framework.files import sync


@contextlib.contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; `commit` turns it into `out`, otherwise it is removed at the end.

    Raises:
        UsageError: another process is writing it.
    """
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        _lock(descriptor, partial)
        remove(*partial.iterdir())  # left by a process that was killed
        try:
            yield partial
        finally:
            remove(partial)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"{folder}: another process is writing it; wait for it, or choose another --out") from error
    except OSError:  # a file system without locks
        pass


def commit(partial: Path, out: Path) -> None:
    """Rename the folder to `out`, which is absent or empty, after everything in it has reached the disk."""
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    os.rename(partial, out)
    sync(out.parent)


def remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_free(out: Path) -> bool:
    """Nothing is there that a commit would have to replace."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))
