"""What several parts do with files: name their content, bring them to the disk, refuse what is in their place."""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from framework.errors import UsageError

try:
    from isal.isal_zlib import crc32  # the same number, four times as fast
except ImportError:
    from zlib import crc32

__all__ = ["alone_in", "by_numbers", "crc32", "refuse_file_at", "refuse_folder_at", "sha256_of", "sync"]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone_in(folder: Path, advice: str) -> Iterator[None]:
    """Holds the folder, which is made if need be, against other processes; on a file system without locks, does not.

    Raises:
        UsageError: another process holds it; ends with the advice.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"{folder}: another process is writing it; wait for it, or {advice}") from error
            except OSError:
                pass
            there = False
            with contextlib.suppress(FileNotFoundError):  # renamed or removed before it was locked
                there = os.fstat(descriptor).st_ino == folder.stat().st_ino
            if there:
                yield
                return


def refuse_file_at(name: str, folder: str | Path) -> None:
    """Raises UsageError, naming the flag or key, where a file is in the place of the folder or of one above it."""
    for path in (Path(folder), *Path(folder).parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{name}: {path} is a file; expected a folder")


def refuse_folder_at(name: str, file: str | Path) -> None:
    """Raises UsageError, naming the flag or key, where a folder is in the place of the file, or a file above it."""
    if Path(file).is_dir():
        raise UsageError(f"{name}: {file} is a folder; expected the name of a file")
    refuse_file_at(name, Path(file).parent)


def by_numbers(name: str) -> list[tuple[int, str]]:
    """To sort file names by: the numbers in them as numbers, 9 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
