"""Writing a shard set: tar files that plain webdataset reads, their index, their manifest."""

import hashlib
import io
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from data_tools.sample import INDEX, INDEX_DTYPE, MANIFEST, Category, Manifest, Sample, Shard
from framework.files import sha256_of
from framework.tracking.console import write_json

HEADER_BYTES = BLOCK_BYTES = 512  # of tar: a member is one header and its data in whole blocks


def sample_key(image_id: int) -> str:
    """The members' name without suffix; no dot in it, since webdataset cuts names at the first."""
    return f"{image_id:012d}"


class _OpenShard:
    """A tar file that is being written. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.path, self.samples = path, 0
        self.file = path.open("wb")
        # Fixed times and owners: the same samples give the same bytes.
        self.tar = TarWriter(self.file, encoder=False, mtime=0, user="tenfold", group="tenfold")

    @property
    def length(self) -> int:
        return self.tar.tarstream.offset

    def add(self, key: str, jpeg: bytes, text: bytes) -> tuple[int, int]:
        """Where the data of the two members begins."""
        image_at = self.length + HEADER_BYTES
        self.tar.write({"__key__": key, "jpg": jpeg, "json": text})
        self.samples += 1
        return image_at, image_at + _padded(len(jpeg)) + HEADER_BYTES

    def close(self) -> Shard:
        self.tar.close()
        self.file.close()
        return Shard(self.path.name, self.samples, self.path.stat().st_size, sha256_of(self.path))


class ShardSetWriter:
    """Writes samples in the order of `add`; the same samples give the same bytes.

    A shard is closed before it would pass `shard_bytes`; a larger sample gets one of its own. The set is
    finished, and taken for one by its readers, when `finish` has written the manifest.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.shard_bytes = folder, shard_bytes
        self._open: _OpenShard | None = None
        self._shards: list[Shard] = []
        self._records: list[tuple[int, ...]] = []

    def add(self, sample: Sample, jpeg: bytes) -> None:
        text = sample.to_json()
        shard = self._shard_for(2 * HEADER_BYTES + _padded(len(jpeg)) + _padded(len(text)))
        image_at, json_at = shard.add(sample_key(sample.image_id), jpeg, text)
        self._records.append(
            (sample.image_id, len(self._shards), sample.width, sample.height, len(sample.labels))
            + (image_at, len(jpeg), zlib.crc32(jpeg), json_at, len(text), zlib.crc32(text))
        )

    def _shard_for(self, size: int) -> _OpenShard:
        if self._open is not None and self._open.length + size > self.shard_bytes:
            self._close_shard()
        if self._open is None:
            self._open = _OpenShard(self.folder / f"shard-{len(self._shards):06d}.tar")
        return self._open

    def _close_shard(self) -> None:
        if self._open is not None:
            self._shards.append(self._open.close())
            self._open = None

    def finish(self, classes: list[Category], repairs: Mapping[str, int]) -> Manifest:
        """Close the last shard, write index and manifest."""
        self._close_shard()
        index = np.array(self._records, dtype=INDEX_DTYPE)
        buffer = io.BytesIO()
        np.save(buffer, index)
        (self.folder / INDEX).write_bytes(buffer.getvalue())
        index_sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
        boxes = int(index["boxes"].sum())
        manifest = Manifest(classes, self._shards, len(index), boxes, index_sha256, dict(sorted(repairs.items())))
        manifest = replace(manifest, fingerprint=manifest.computed_fingerprint())
        write_json(self.folder / MANIFEST, asdict(manifest))
        return manifest


def _padded(length: int) -> int:
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES
