"""Writing a shard set: tar files that plain webdataset reads, their index, their manifest.

sizes -> shard_bounds -> samples of each shard -> write_shard, in any order, anywhere -> write_manifest
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from data_tools.sample import INDEX, INDEX_DTYPE, MANIFEST, Category, Manifest, Sample, Shard
from framework.files import crc32, sha256_of, sync
from framework.tracking.console import write_json

HEADER_BYTES = BLOCK_BYTES = 512  # of tar: a member is one header and its data in whole blocks


def sample_key(image_id: int) -> str:
    """The members' name without suffix; no dot in it, since webdataset cuts names at the first."""
    return f"{image_id:012d}"


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def sample_bytes(image_bytes: int, json_bytes: int) -> int:
    """What a sample takes in a tar file."""
    return 2 * HEADER_BYTES + _padded(image_bytes) + _padded(json_bytes)


def shard_bounds(sizes: Iterable[int], shard_bytes: int) -> list[range]:
    """Which samples each shard holds, in their order: it ends before it would pass `shard_bytes`, a larger sample has
    one of its own. sizes: what `sample_bytes` says, or expects, of each."""
    bounds: list[range] = []
    start = number = length = 0
    for number, size in enumerate(sizes):
        if length and length + size > shard_bytes:
            bounds.append(range(start, number))
            start, length = number, 0
        length += size
    return [*bounds, range(start, number + 1)] if length else bounds


@dataclass(frozen=True)
class WrittenShard:
    """A shard, and the index's records of its samples: INDEX_DTYPE without the number of the shard."""

    shard: Shard
    records: list[tuple[int, ...]]


def write_shard(folder: Path, number: int, samples: Iterable[tuple[Sample, bytes]]) -> WrittenShard:
    """Write samples and their JPEG bytes; the same samples give the same bytes. The file has its name when all of it
    is on the disk. Raises OSError."""
    path = folder / shard_name(number)
    unfinished = path.with_name(f"{path.name}.tmp")
    records: list[tuple[int, ...]] = []
    with unfinished.open("wb") as file:
        end = 0
        for sample, jpeg in samples:
            key, text = sample_key(sample.image_id), sample.to_json()
            image_at = end + HEADER_BYTES
            json_at = image_at + _padded(len(jpeg)) + HEADER_BYTES
            end = json_at + _padded(len(text))
            file.write(_member(f"{key}.jpg", jpeg) + _member(f"{key}.json", text))
            records.append(
                (sample.image_id, sample.width, sample.height, len(sample.labels))
                + (image_at, len(jpeg), crc32(jpeg), json_at, len(text), crc32(text))
            )
        ended = end + 2 * BLOCK_BYTES
        file.write(bytes(-(-ended // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - end))
    shard = Shard(path.name, len(records), unfinished.stat().st_size, sha256_of(unfinished))
    sync(unfinished)
    os.replace(unfinished, path)
    return WrittenShard(shard, records)


def write_manifest(
    folder: Path, written: Sequence[WrittenShard], classes: list[Category], repairs: Mapping[str, int]
) -> Manifest:
    """Write the index, and last the manifest, which makes a set of the shards: `written`, in their order."""
    numbered = ((image_id, number, *rest) for number, one in enumerate(written) for image_id, *rest in one.records)
    index = np.array(list(numbered), dtype=INDEX_DTYPE)
    buffer = io.BytesIO()
    np.save(buffer, index)
    unfinished = folder / f"{INDEX}.tmp"
    unfinished.write_bytes(buffer.getvalue())
    sync(unfinished)
    os.replace(unfinished, folder / INDEX)
    index_sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    shards, boxes = [one.shard for one in written], int(index["boxes"].sum())
    manifest = Manifest(classes, shards, len(index), boxes, index_sha256, dict(sorted(repairs.items())))
    manifest = replace(manifest, fingerprint=manifest.computed_fingerprint())
    write_json(folder / MANIFEST, asdict(manifest))
    return manifest


def _member(name: str, data: bytes) -> bytes:
    """Of a tar file, to the bit as webdataset's TarWriter makes it, which takes seconds to import torch."""
    member = tarfile.TarInfo(name)
    # Fixed times and owners: nothing but the samples decides on the bytes.
    member.size, member.mtime, member.mode, member.uname, member.gname = len(data), 0, 0o444, "tenfold", "tenfold"
    return member.tobuf() + data + bytes(_padded(len(data)) - len(data))


def _padded(length: int) -> int:
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES
