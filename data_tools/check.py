"""Reread a shard set, every byte of it, and list all that is wrong.

manifest -> index -> each shard: size, sha256, members -> each sample: crc32, JSON, boxes, pixels
"""

import argparse
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from data_tools.annotations import short
from data_tools.files import IMAGE_SUFFIXES
from data_tools.pixels import FORMATS
from data_tools.sample import (
    INDEX,
    MANIFEST,
    SPLITS,
    Category,
    Manifest,
    Sample,
    Shard,
    is_class,
    read_index,
    read_manifest,
    samples_per_shard,
)
from data_tools.shards import BLOCK_BYTES
from framework.errors import FAILED, InputError, UsageError, command
from framework.files import crc32, sha256_of
from framework.tracking.console import progress, setup_logging

EXAMPLE = """example:
  python -m data_tools.check shards/coco-val

A folder with train/ and val/ in it has both checked. Exit code 1: the faults are listed, one a line."""

Members = dict[int, tuple[str, int]]  # of a tar file: where the data begins -> name, length
LEAST_END_BYTES = 1024  # of zeros that end a tar file


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    setup_logging(None, is_main=True)
    folders = set_folders(args.shards)
    faults = [fault for folder in folders for fault in set_faults(folder)] or class_faults(folders)
    for fault in faults:
        print(fault)
    if faults:
        print(f"{args.shards}: {len(faults)} fault(s); convert the data again, or copy the set again")
        return FAILED
    for folder in folders:
        print(summary(folder, read_manifest(folder)))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.check",
        description="Reread a shard set: checksums, index, annotations, images.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", type=Path, help="shard set, or a folder of train/ and val/")
    args = parser.parse_args(argv)
    if not args.shards.is_dir():
        raise UsageError(f"{args.shards}: not a folder; expected a shard set")
    return args


def set_folders(folder: Path) -> list[Path]:
    """The folder itself when it is a set, else the splits in it."""
    splits = [folder / split for split in SPLITS if (folder / split).is_dir()]
    return [folder] if (folder / MANIFEST).is_file() or not splits else splits


def set_faults(folder: Path) -> Iterator[str]:
    """A line for each fault of a set."""
    try:
        manifest = read_manifest(folder)
        index = read_index(folder, manifest)
    except InputError as error:
        yield str(error)
        return
    yield from index_faults(folder / INDEX, index, manifest)
    names = {shard.name for shard in manifest.shards}
    for stray in sorted(path for path in folder.glob("*.tar") if path.name not in names):
        yield f"{stray}: not in the manifest"
    annotation_ids: set[int] = set()
    with progress(len(index), description=f"check {folder.name}") as bar:
        for number, shard in enumerate(manifest.shards):
            records = index[index["shard"] == number]
            yield from shard_faults(folder / shard.name, shard, records, manifest.classes, annotation_ids, bar.update)


def index_faults(path: Path, index: np.ndarray, manifest: Manifest) -> Iterator[str]:
    if sha256_of(path) != manifest.index_sha256:
        yield f"{path}: its sha256 is not the manifest's"
    if len(np.unique(index["image_id"])) != len(index):
        yield f"{path}: an image id occurs twice"
    *samples, elsewhere = samples_per_shard(index, manifest)
    expected = [shard.samples for shard in manifest.shards]
    if samples != expected:
        yield f"{path}: samples per shard {samples}, the manifest says {expected}"
    if elsewhere:
        yield f"{path}: {elsewhere} record(s) of a shard that the manifest does not name"
    if index["boxes"].sum() != manifest.boxes:
        yield f"{path}: {index['boxes'].sum()} boxes, the manifest says {manifest.boxes}"


def shard_faults(
    path: Path,
    shard: Shard,
    records: np.ndarray,
    classes: Sequence[Category],
    annotation_ids: set[int],
    done: Callable[[], Any],
) -> Iterator[str]:
    """Faults of a shard and of the samples that the index finds in it; annotation_ids: seen so far."""
    if not path.is_file():
        yield f"{path}: missing"
        return
    if path.stat().st_size != shard.bytes:
        yield f"{path}: {path.stat().st_size} bytes, the manifest says {shard.bytes}"
    if sha256_of(path) != shard.sha256:
        yield f"{path}: its sha256 is not the manifest's"
    found, broken = read_members(path)
    members: Members = {member.offset_data: (member.name, member.size) for member in found}
    if broken:
        yield f"{path}: not a whole tar file ({broken})"
    indexed = {int(at) for name in ("image_offset", "json_offset") for at in records[name]}
    for at in sorted(members.keys() - indexed):
        yield f"{path}: {members[at][0]} is not in the index"
    with path.open("rb") as file:
        for record in records:
            for fault in sample_faults(file, record, members, classes, annotation_ids):
                yield f"{path}: image {record['image_id']} at offset {record['image_offset']}: {fault}"
            done()


def read_members(path: Path) -> tuple[list[tarfile.TarInfo], str]:
    """The members but folders, up to the first that is broken, and what is wrong with that."""
    members: list[tarfile.TarInfo] = []
    end = 0
    try:
        file_bytes = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data < end or not 0 <= member.size < 2**32:
                    return members, f"{short(member.name)} has an impossible size or place"
                if member.offset_data + member.size > file_bytes:
                    return members, f"cut off in {short(member.name)}"
                end = member.offset_data + -(-member.size // BLOCK_BYTES) * BLOCK_BYTES
                if not member.isdir():
                    members.append(member)
        if not _ends_in_zeros(path, end):  # tarfile ends in silence at a header that it cannot read
            return members, f"nothing can be read from byte {end} on"
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        return members, str(error) or type(error).__name__  # whatever hostile headers make tarfile stumble over
    return members, ""


def _ends_in_zeros(path: Path, start: int) -> bool:
    with path.open("rb") as file:
        file.seek(start)
        length = 0
        while part := file.read(2**20):
            length += len(part)
            if part.count(0) < len(part):
                return False
    return length >= LEAST_END_BYTES


def key_and_kind(name: str) -> tuple[str, str | None]:
    """Key of a member by its name, as webdataset cuts it: at the first dot of its last part; and its kind, or None."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    kind = {"json": "text"}.get(suffix.lower(), "image" if f".{suffix.lower()}" in IMAGE_SUFFIXES else None)
    return f"{folder}{slash}{stem}", kind if stem and dot else None


def sample_faults(
    file: BinaryIO,
    record: np.void,
    members: Members,
    classes: Sequence[Category],
    annotation_ids: set[int],
) -> Iterator[str]:
    names = [members.get(int(record[f"{kind}_offset"]), ("none", 0)) for kind in ("image", "json")]
    lengths = [int(record[f"{kind}_length"]) for kind in ("image", "json")]
    keys, kinds = zip(*(key_and_kind(name) for name, _ in names), strict=True)
    if [length for _, length in names] != lengths or len(set(keys)) > 1 or kinds != ("image", "text"):
        yield f"the index says members of {lengths} bytes, the tar file has {names} there"
    image, text = (member_bytes(file, record, kind) for kind in ("image", "json"))
    if image is None:
        yield "the image bytes do not have the crc32 of the index"
    else:
        yield from image_faults(image, record)
    if text is None:
        yield "the JSON bytes do not have the crc32 of the index"
    else:
        yield from json_faults(text, record, classes, annotation_ids)


def member_bytes(file: BinaryIO, record: np.void, kind: str) -> bytes | None:
    if int(record[f"{kind}_offset"]) > os.fstat(file.fileno()).st_size:  # more than seek takes, perhaps
        return None
    file.seek(int(record[f"{kind}_offset"]))
    data = file.read(int(record[f"{kind}_length"]))
    return data if crc32(data) == record[f"{kind}_crc32"] else None


def image_faults(data: bytes, record: np.void) -> Iterator[str]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes make them stumble over
        yield f"not a whole image ({error})"
        return
    if image.size != (record["width"], record["height"]):
        yield f"the image is {'{}x{}'.format(*image.size)}, the index says {record['width']}x{record['height']}"


def json_faults(text: bytes, record: np.void, classes: Sequence[Category], annotation_ids: set[int]) -> Iterator[str]:
    try:
        sample = Sample.from_json(text)
    except InputError as error:
        yield str(error)
        return
    found = (sample.image_id, sample.width, sample.height, len(sample.labels))
    expected = tuple(int(record[name]) for name in ("image_id", "width", "height", "boxes"))
    if found != expected:
        yield f"its JSON has id, width, height, boxes {found}, the index {expected}"
    yield from box_faults(sample, classes)
    for twice in annotation_ids.intersection(sample.annotation_ids):
        yield f"annotation id {twice} occurs twice"
    annotation_ids.update(sample.annotation_ids)


def box_faults(sample: Sample, classes: Sequence[Category]) -> Iterator[str]:
    for n, (x1, y1, x2, y2) in enumerate(sample.boxes_xyxy_px):
        if not (0 <= x1 < x2 <= sample.width and 0 <= y1 < y2 <= sample.height):
            yield f"box {[x1, y1, x2, y2]} is not inside the image, or has no area"
        label, category_id = sample.labels[n], sample.category_ids[n]
        if not is_class(label, category_id, classes):
            yield f"label {label} with category id {category_id} is no class of the manifest"
        if sample.iscrowd[n] not in (0, 1) or not 0 <= sample.areas[n] < float("inf"):
            yield f"iscrowd {sample.iscrowd[n]}, area {sample.areas[n]}"


def class_faults(folders: list[Path]) -> list[str]:
    """Sets that stand side by side have to have the same classes."""
    first, *others = folders
    classes = read_manifest(first).classes
    return [f"{other}: its classes differ from those of {first}" for other in others
            if read_manifest(other).classes != classes]  # fmt: skip


def summary(folder: Path, manifest: Manifest) -> str:
    return (
        f"{folder}: sound; {manifest.images} images, {manifest.boxes} boxes, {len(manifest.classes)} classes, "
        f"{len(manifest.shards)} shard(s), fingerprint {manifest.fingerprint}"
    )


if __name__ == "__main__":
    command(main)
