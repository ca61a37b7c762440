"""Make the manifest and the index of tar shards that somebody else wrote; the shards stay as they are.

each shard -> members -> pairs of image and JSON -> records; all faults are told, and then nothing is written
"""

import argparse
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.check import image_faults, json_faults, key_and_kind, read_members
from data_tools.convert import refuse
from data_tools.files import IMAGE_SUFFIXES
from data_tools.sample import INDEX, INDEX_DTYPE, MANIFEST, Category, Sample, Shard, is_plain
from data_tools.shards import WrittenShard, write_manifest
from framework.errors import InputError, UsageError, command
from framework.files import alone_in, by_numbers, crc32, sha256_of
from framework.tracking.console import progress, setup_logging

EXAMPLE = """example:
  python -m data_tools.index shards/theirs --categories annotations/instances_train2017.json

Shards are plain tar files, *.tar, in the order of the numbers in their names. A sample is two members of one key, the
name up to its first dot: an image (.jpg, .png, ...) and a .json as data_tools.convert writes it: image_id,
file_name, width, height, boxes_xyxy_px, labels, category_ids, areas, iscrowd, annotation_ids, segmentation. Labels
count the categories by their ids, from 0."""


@dataclass
class Pair:
    """The two members of a key, as far as they are there."""

    image: tarfile.TarInfo | None = None
    text: tarfile.TarInfo | None = None


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    setup_logging(None, is_main=True)
    classes = read_categories(args.categories)
    paths = sorted(args.shards.glob("*.tar"), key=lambda path: by_numbers(path.name))
    if not paths:
        raise UsageError(f"{args.shards}: no *.tar in it (compressed ones cannot be read from the middle: unpack them)")
    if unfit := [path.name for path in paths if not is_plain(path.name)]:
        raise UsageError(f"{args.shards}: shard name {unfit[0]!r:.99}: expected printable letters, 200 bytes at most")
    written: list[WrittenShard] = []
    faults: list[str] = []
    seen: dict[int, str] = {}
    annotation_ids: set[int] = set()
    with alone_in(args.shards, "choose another folder"):
        with progress(len(paths), description="index") as bar:
            for path in paths:
                records, wrong = read_shard(path, classes, seen, annotation_ids)
                faults += wrong
                if not faults:
                    shard = Shard(path.name, len(records), path.stat().st_size, sha256_of(path))
                    written.append(WrittenShard(shard, records))
                bar.update()
        if not faults and not seen:
            faults.append(f"{args.shards}: no sample in its shards")
        refuse(faults)
        manifest = write_manifest(args.shards, written, classes, {})
    print(f"{args.shards}: {manifest.images} images, {manifest.boxes} boxes, {len(paths)} shard(s), "
          f"fingerprint {manifest.fingerprint}")  # fmt: skip
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.index",
        description="Make the manifest and the index of tar shards that somebody else wrote.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", type=Path, help="folder of *.tar")
    parser.add_argument(
        "--categories", type=Path, required=True, metavar="FILE",
        help="JSON with the list 'categories' of COCO: id and name of each",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not args.shards.is_dir():
        raise UsageError(f"{args.shards}: not a folder; expected one of tar shards")
    for name in (MANIFEST, INDEX):
        if (args.shards / name).exists():
            raise UsageError(f"{args.shards}: has a {name} already; python -m data_tools.check tells whether the set "
                             "is sound, remove it to make another")  # fmt: skip
    return args


def read_categories(path: Path) -> list[Category]:
    """The classes by category id. Raises InputError, UsageError."""
    if not path.is_file():
        raise UsageError(f"--categories {path}: not a file; expected JSON with COCO's list 'categories'")
    try:
        raw = json.loads(path.read_bytes())["categories"]
        classes = [Category(one["name"], one["id"]) for one in sorted(raw, key=lambda one: one["id"])]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: expected an object with the list 'categories', id and name of each "
                         f"({type(error).__name__}: {error})") from error  # fmt: skip
    if not classes or not all(type(one.category_id) is int and isinstance(one.name, str) for one in classes):
        raise InputError(f"{path}: expected at least one category, with a number as id and a text as name")
    if len({one.category_id for one in classes}) < len(classes):
        raise InputError(f"{path}: two categories have one id")
    return classes


def read_shard(
    path: Path, classes: Sequence[Category], seen: dict[int, str], annotation_ids: set[int]
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Records of the samples in the order of their first members, and faults. seen: shard of each image id so far."""
    pairs, faults = read_pairs(path)
    records: list[tuple[int, ...]] = []
    if not pairs:
        return records, faults
    with path.open("rb") as file:
        for key, pair in pairs.items():
            if pair.image is None or pair.text is None:
                faults.append(f"{path}: {key} has no {'image' if pair.image is None else 'JSON'}")
                continue
            image, text = (read_member(file, member) for member in (pair.image, pair.text))
            try:
                sample = Sample.from_json(text)
                check_numbers(sample)
            except InputError as error:
                faults.append(f"{path}: {key}: {error}")
                continue
            record = (
                (sample.image_id, sample.width, sample.height, len(sample.labels))
                + (pair.image.offset_data, len(image), crc32(image))
                + (pair.text.offset_data, len(text), crc32(text))
            )
            one: Any = np.array([(record[0], 0, *record[1:])], dtype=INDEX_DTYPE)[0]
            wrong = [*image_faults(image, one), *json_faults(text, one, classes, annotation_ids)]
            if sample.image_id in seen:
                wrong.append(f"image_id {sample.image_id} is in {seen[sample.image_id]} too")
            seen[sample.image_id] = path.name
            records.append(record)
            faults += [f"{path}: {key}: {fault}" for fault in wrong]
    return records, faults


def read_pairs(path: Path) -> tuple[dict[str, Pair], list[str]]:
    """The members by key, and what is wrong with the file."""
    pairs: dict[str, Pair] = {}
    members, broken = read_members(path)
    faults = [f"{path}: not a whole tar file ({broken})"] if broken else []
    for member in members:
        key, kind = key_and_kind(member.name)
        if kind is None:
            faults.append(f"{path}: {member.name} is neither an image ({', '.join(IMAGE_SUFFIXES)}) nor .json")
        elif not member.isreg() or member.issparse():
            faults.append(f"{path}: {member.name} is a link, or no plain file")
        elif getattr(pairs.setdefault(key, Pair()), kind) is not None:
            faults.append(f"{path}: {member.name} is the second {kind} of {key}")
        else:
            setattr(pairs[key], kind, member)
    return pairs, faults


def read_member(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def check_numbers(sample: Sample) -> None:
    """Raises InputError: an id or a size that the index has no room for."""
    if not 0 <= sample.image_id < 2**63:
        raise InputError(f"image_id {sample.image_id}, expected 0 to 2^63 - 1")
    if not (0 < sample.width < 2**31 and 0 < sample.height < 2**31):
        raise InputError(f"a size of {sample.width}x{sample.height}, expected a pixel at least")


if __name__ == "__main__":
    command(main)
