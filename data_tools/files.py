"""Folders of images, XML and text as the readers of VOC and YOLO take them: flat, in UTF-8, nothing left out."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_tools.annotations import Fault
from framework.errors import UsageError

# An image is known by its suffix where no annotation names it.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def files_in(folder: Path, suffixes: Sequence[str], flag: str) -> list[Path]:
    """The files of these suffixes, by name; flag: that names the folder.

    Raises:
        UsageError: there is none, or one lies in a folder below, which would be left out in silence.
    """
    what = f"{suffixes[0]} files" if len(suffixes) == 1 else "images"
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    below = [path for path in files if path.parent != folder]
    if below:
        raise UsageError(
            f"{flag} {folder}: {below[0].relative_to(folder)} lies in a folder below; expected all {what} of a set "
            f"in one folder: give {below[0].parent}, and convert each folder by itself"
        )
    if not files:
        raise UsageError(f"{flag} {folder}: no {what} in it; expected {' '.join(suffixes)}")
    return files


def by_stem(files: Iterable[Path]) -> dict[str, list[str]]:
    """Name without suffix -> file names."""
    names: dict[str, list[str]] = defaultdict(list)
    for file in files:
        names[file.stem].append(file.name)
    return names


def read_text(path: Path) -> str:
    """Raises Fault: not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")  # some editors write its signature
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Fault(f"is not UTF-8: byte {data[error.start]:#04x} in line {line}") from None
