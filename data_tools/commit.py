"""Folders that are there as a whole or not at all."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from framework.files import alone_in, sync

log = logging.getLogger("tenfold")


@contextlib.contextmanager
def partial_folder(out: Path, *, resumable: bool = False) -> Iterator[Path]:
    """A folder beside `out` to write into; `commit` turns it into `out`, otherwise it is removed at the end.

    resumable: what an attempt left that was killed, interrupted or met a full disk is still there.

    Raises:
        UsageError: another process is writing it.
    """
    partial = out.with_name(out.name + ".partial")
    with alone_in(partial, "choose another --out"):
        if not resumable:
            remove(*partial.iterdir())
        try:
            yield partial
        except (OSError, KeyboardInterrupt):
            if resumable:
                log.info("what is finished stays in %s; the same command goes on with it", partial)
            else:
                remove(partial)
            raise
        except BaseException:
            remove(partial)
            raise
        remove(partial)


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
