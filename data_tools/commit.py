"""Folders that are there as a whole or not at all."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from framework.errors import InputError, UsageError
from framework.files import alone_in, sync

log = logging.getLogger("tenfold")


class Faults(InputError):
    """Of data; its message also tells what is left of the attempt."""


@contextlib.contextmanager
def partial_folder(out: Path, mark: str, *, keep: str | None = None) -> Iterator[Path]:
    """A folder beside `out` to write into; `commit` turns it into `out`, otherwise it is removed at the end.

    mark: name of an empty file in it, which tells whose it is: what a killed attempt left is used, or removed.
    keep: a pattern of files whose presence makes the folder stay when the attempt fails: the next one finds them.

    Raises:
        UsageError: it cannot be made, holds something else, or another process is writing it.
    """
    partial = out.with_name(out.name + ".partial")
    _make(partial, out)
    with alone_in(partial, "choose another --out"):
        _refuse_foreign(partial, mark)
        (partial / mark).touch()
        mine = partial.stat().st_ino
        if not keep:
            _clear(partial, mark)
        try:
            yield partial
        except (OSError, KeyboardInterrupt, InputError) as error:
            if not keep or not any(partial.rglob(keep)):
                _discard(partial, mark)
            elif not isinstance(error, Faults):  # which tells of it
                log.info("what is finished stays in %s; the same command goes on with it", partial)
            raise error
        except BaseException:
            _discard(partial, mark)
            raise
        with contextlib.suppress(FileNotFoundError):  # renamed; there may be another process's by now
            if partial.stat().st_ino == mine:
                _discard(partial, mark)
        remove(out / mark)  # not before it is renamed: a kill in between would leave a folder that is refused


def _make(partial: Path, out: Path) -> None:
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {partial} cannot be made ({error.strerror}); choose another --out") from error


def _refuse_foreign(partial: Path, mark: str) -> None:
    found = sorted(path.name for path in partial.iterdir())
    if found and mark not in found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise UsageError(
            f"{partial}: exists with {found[0]!r}{more}, and without the file {mark} that this command leaves in a "
            "folder of its own; move or remove it, or choose another --out"
        )


def _clear(partial: Path, mark: str) -> None:
    remove(*(path for path in partial.glob("*") if path.name != mark))


def _discard(partial: Path, mark: str) -> None:
    """The mark goes last: removing may be killed too."""
    _clear(partial, mark)
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
