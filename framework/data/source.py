"""Samples of a shard set by number: positional reads through the index, every byte checked against its crc32.

No tar reader runs, nothing is unpacked, no name from the data is opened: the manifest names the shards (plain
file names inside the folder) and the index says where in them a sample lies. The folder is local, or of a file system
that several nodes share; or it is a URL, whose shards come through a cache (framework/data/remote.py).
"""

import os
import time
import weakref
from pathlib import Path

import numpy as np

from data_tools.sample import (
    INDEX,
    INDEX_DTYPE,
    Manifest,
    Sample,
    is_class,
    read_index,
    read_manifest,
    samples_per_shard,
)
from framework.data.remote import Cache, RemoteSet, is_remote
from framework.errors import InputError
from framework.files import crc32, sha256_of

MAX_OPEN_FILES = 128  # a set may have more shards than a process may have files
TOUCHED_EVERY_S = 60.0  # so that the cache knows which shards are in use
AGAIN = "copy the set again, or convert the data again"


class BadSample(InputError):
    """One sample cannot be used; the message names its image id, shard and offset."""


class IndexedSource:
    """Random access to the samples of a finished shard set.

    location: a folder, or the http(s) or s3 URL of one, which takes a cache.
    Raises:
        InputError: the set is unfinished, a shard is missing or truncated, manifest and index do not belong
            together; of a URL also when a shard cannot be had, while samples are read.
    """

    def __init__(self, location: str | Path, cache: Cache | None = None) -> None:
        self.remote = RemoteSet(str(location), cache) if cache and is_remote(location) else None
        self.location = self.remote.url if self.remote else str(location)
        folder = self.remote.folder if self.remote else Path(location)
        self.folder = folder
        self.manifest = self.remote.manifest if self.remote else read_manifest(folder)
        self.index = read_index(folder, self.manifest)
        if not self.remote:
            _check_shards(folder, self.manifest)
        _check_index(folder, self.manifest, self.index)
        self._records = self.index.view(np.ndarray)  # a memmap takes far longer to give one of them
        self._last: tuple[int | None, dict[str, int]] = None, {}
        self._files: dict[int, int] = {}
        self._used_s: dict[int, float] = {}
        weakref.finalize(self, _close, self._files)

    def __len__(self) -> int:
        return self.manifest.images

    def read(self, i: int) -> tuple[bytes, Sample]:
        """The encoded image of sample i and its annotations. Raises BadSample."""
        return self._member(i, "image"), self.read_sample(i)

    def read_sample(self, i: int) -> Sample:
        """The annotations of sample i. Raises BadSample."""
        try:
            sample = Sample.from_json(self._member(i, "json"))
        except BadSample:
            raise
        except InputError as error:
            raise self.bad(i, str(error), "json") from error
        if sample.image_id != self.image_id(i):
            raise self.bad(i, f"the JSON is of image {sample.image_id}", "json")
        for label, category_id in zip(sample.labels, sample.category_ids, strict=True):
            if not is_class(label, category_id, self.manifest.classes):
                reason = f"label {label} with category id {category_id} is no class of the manifest"
                raise self.bad(i, reason, "json")
        return sample

    def image_id(self, i: int) -> int:
        return self._record(i)["image_id"]

    def size_hw(self, i: int) -> tuple[int, int]:
        record = self._record(i)
        return record["height"], record["width"]

    def bad(self, i: int, reason: str, member: str = "image") -> BadSample:
        return BadSample(f"{self.where(i, member)}: {reason}")

    def where(self, i: int, member: str = "image") -> str:
        record = self._record(i)
        shard, offset = self.manifest.shards[record["shard"]].name, record[f"{member}_offset"]
        return f"image {record['image_id']} in {self.location}/{shard} at offset {offset}"

    def _record(self, i: int) -> dict[str, int]:
        last = self._last
        if last[0] != i:  # a sample's record is asked for several times
            last = self._last = i, dict(zip(INDEX_DTYPE.names or (), self._records[i].item(), strict=True))
        return last[1]

    def _member(self, i: int, member: str) -> bytes:
        record = self._record(i)
        length, offset, shard = record[f"{member}_length"], record[f"{member}_offset"], record["shard"]
        try:
            data = os.pread(self._file(shard), length, offset)
        except OSError as error:
            raise self.bad(i, f"cannot be read ({error.strerror})", member) from error
        if crc32(data) != record[f"{member}_crc32"]:
            advice = f"; remove {self.folder / self.manifest.shards[shard].name}" if self.remote else ""
            raise self.bad(i, f"the {member} bytes do not have the crc32 of the index{advice}", member)
        return data

    def _file(self, shard: int) -> int:
        # Opened at the first read and never seeked: forked workers may share what is open.
        if shard not in self._files:
            if self.remote:  # what the cache has dropped takes room while it is open
                for dropped in [one for one, file in self._files.items() if os.fstat(file).st_nlink == 0]:
                    os.close(self._files.pop(dropped))
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            found = self.manifest.shards[shard]
            path = self.folder / found.name
            self._files[shard] = self.remote.open(found) if self.remote else os.open(path, os.O_RDONLY)
            self._used_s[shard] = time.monotonic()
        elif self.remote and time.monotonic() - self._used_s[shard] > TOUCHED_EVERY_S:
            self._used_s[shard] = time.monotonic()
            self.remote.used(self._files[shard])
        return self._files[shard]


def _close(files: dict[int, int]) -> None:
    for descriptor in files.values():
        os.close(descriptor)


def _check_shards(folder: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file():
            raise InputError(f"{path}: missing, the manifest names it; {AGAIN}")
        if path.stat().st_size != shard.bytes:
            raise InputError(f"{path}: {path.stat().st_size} bytes, the manifest says {shard.bytes}; {AGAIN}")


def _check_index(folder: Path, manifest: Manifest, index: np.ndarray) -> None:
    path = folder / INDEX
    if sha256_of(path) != manifest.index_sha256:
        raise InputError(f"{path}: not the index that the manifest was written with; {AGAIN}")
    if samples_per_shard(index, manifest) != [shard.samples for shard in manifest.shards] + [0]:
        raise InputError(f"{path}: samples per shard differ from the manifest's; {AGAIN}")
    empty = (index["width"] == 0) | (index["height"] == 0)
    if empty.any():
        raise InputError(f"{path}: image {index[int(empty.argmax())]['image_id']} has no pixels; {AGAIN}")
    bytes_N = np.array([shard.bytes for shard in manifest.shards], dtype=np.uint64)[index["shard"]]
    for member in ("image", "json"):
        length_N = index[f"{member}_length"].astype(np.uint64)
        outside = (length_N > bytes_N) | (index[f"{member}_offset"] > bytes_N - length_N)
        if outside.any():
            first = index[int(outside.argmax())]
            raise InputError(f"{path}: image {first['image_id']} lies beyond the end of its shard; {AGAIN}")
