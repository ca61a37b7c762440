"""Folders that are there as a whole or not at all."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from framework.errors import InputError
from framework.files import alone_in, sync

log = logging.getLogger("tenfold")


@contextlib.contextmanager
def partial_folder(out: Path, *, keep: str | None = None) -> Iterator[Path]:
    """A folder beside `out` to write into; `commit` turns it into `out`, otherwise it is removed at the end.

    keep: a pattern of files whose presence makes the folder stay when the attempt fails: the next one finds them.

    Raises:
        UsageError: another process is writing it.
    """
    partial = out.with_name(out.name + ".partial")
    with alone_in(partial, "choose another --out"):
        mine = partial.stat().st_ino
        if not keep:
            remove(*partial.iterdir())
        try:
            yield partial
        except (OSError, KeyboardInterrupt, InputError) as error:
            if not keep or not any(partial.rglob(keep)):
                remove(partial)
            elif not isinstance(error, InputError):  # which tells of it
                log.info("what is finished stays in %s; the same command goes on with it", partial)
            raise error
        except BaseException:
            remove(partial)
            raise
        with contextlib.suppress(FileNotFoundError):  # renamed; there may be another process's by now
            if partial.stat().st_ino == mine:
                remove(partial)


def commit(partial: Path, out: Path, *, without: Iterable[Path] = ()) -> None:
    """Rename the folder to `out`, which is absent or empty, after everything in it has reached the disk, and `without`
    was removed from it."""
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    remove(*without)
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
