"""The schema that the writer of shards and their reader share: sample, manifest and index.

A shard set is a folder:

    shard-000000.tar ...   uncompressed tar; two members a sample: <key>.jpg (the original bytes), <key>.json; in
                           shards of others that data_tools.index took, <key>.jpeg or <key>.png, too
    index.npy              one INDEX_DTYPE record a sample, in the order of the shards: where its bytes are
    manifest.json          classes, shards with their sha256, counts, fingerprint; written last, so that a set
                           without a manifest is an unfinished one
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from framework.errors import InputError

FORMAT = "tenfold-shards-1"
MANIFEST, INDEX = "manifest.json", "index.npy"
FINISHED_SET = (
    "expected a finished shard set: 'python -m data_tools.convert' makes one, 'python -m data_tools.index' of others' "
    "tar files"
)
SPLITS = ("train", "val")  # folders of sets that stand side by side

INDEX_DTYPE = np.dtype(
    [
        ("image_id", "<i8"),
        ("shard", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("boxes", "<u4"),
        ("image_offset", "<u8"),
        ("image_length", "<u4"),
        ("image_crc32", "<u4"),
        ("json_offset", "<u8"),
        ("json_length", "<u4"),
        ("json_crc32", "<u4"),
    ]
)


@dataclass(frozen=True)
class Sample:
    """The annotations of one image; N boxes, crowds included.

    boxes_xyxy_px: N x 4 floats, inside the image of width x height pixels, x2 > x1 and y2 > y1.
    labels: N class indices, contiguous from 0, in the order of the manifest's classes.
    category_ids: N COCO category ids. areas: N floats in px^2 (of the mask where there is one).
    segmentation: N times whatever the annotation file held.
    """

    image_id: int
    file_name: str
    width: int
    height: int
    boxes_xyxy_px: list[list[float]]
    labels: list[int]
    category_ids: list[int]
    areas: list[float]
    iscrowd: list[int]
    annotation_ids: list[int]
    segmentation: list[Any]

    def to_json(self) -> bytes:
        return json.dumps(vars(self), separators=(",", ":"), sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Sample":
        """Raises InputError when the bytes are not JSON of this schema."""
        try:
            sample = cls(**json.loads(data))
            count = len(sample.boxes_xyxy_px)
            per_box = (sample.labels, sample.category_ids, sample.areas, sample.iscrowd,
                       sample.annotation_ids, sample.segmentation)  # fmt: skip
            if {type(values) for values in (sample.boxes_xyxy_px, *per_box)} != {list}:
                raise ValueError("what should be a list is none")
            if type(sample.file_name) is not str:
                raise ValueError("file_name is no text")
            if {len(values) for values in per_box} != {count}:
                raise ValueError("its lists differ in length")
            if not set(map(len, sample.boxes_xyxy_px)) <= {4}:
                raise ValueError("a box does not have 4 numbers")
            integers = (sample.image_id, sample.width, sample.height, *sample.labels, *sample.category_ids,
                        *sample.iscrowd, *sample.annotation_ids)  # fmt: skip
            if not set(map(type, integers)) <= {int}:
                raise ValueError("an id, a size, a label or iscrowd is not an integer")
            if not set(map(type, itertools.chain(sample.areas, *sample.boxes_xyxy_px))) <= {int, float}:
                raise ValueError("a box or an area is not a number")
            return sample
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"not a sample's JSON: {error}") from error


@dataclass(frozen=True)
class Category:
    """A class: its name and its COCO category id. Its contiguous label is its place in the manifest."""

    name: str
    category_id: int


def is_class(label: int, category_id: int, classes: Sequence[Category]) -> bool:
    return 0 <= label < len(classes) and classes[label].category_id == category_id


@dataclass(frozen=True)
class Shard:
    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a shard set holds. `fingerprint` names its content: classes, shards and index."""

    classes: list[Category]
    shards: list[Shard]
    images: int
    boxes: int
    index_sha256: str
    repairs: dict[str, int]
    fingerprint: str = ""
    format: str = FORMAT

    def computed_fingerprint(self) -> str:
        content = [[asdict(c) for c in self.classes], [s.sha256 for s in self.shards], self.index_sha256]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_manifest(folder: str | Path) -> Manifest:
    """Raises InputError: no manifest, not a manifest, another format, a name that leaves the folder."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: no {MANIFEST}; {FINISHED_SET}")
    try:
        raw = json.loads(path.read_bytes())
        if raw["format"] != FORMAT:
            raise InputError(f"{path}: format {raw['format']!r}, expected {FORMAT!r}; convert the data again")
        raw["classes"] = [Category(**c) for c in raw["classes"]]
        raw["shards"] = [Shard(**s) for s in raw["shards"]]
        manifest = Manifest(**raw)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a manifest of shards ({type(error).__name__}: {error})") from error
    _check_types(path, manifest)
    if manifest.fingerprint != manifest.computed_fingerprint():
        raise InputError(f"{path}: its fingerprint {manifest.fingerprint!r} does not fit its content; it was edited")
    return manifest


def _check_types(path: Path, manifest: Manifest) -> None:
    """Raises InputError: a number that is no count, a text that is none, a name that leaves the folder."""
    counts = [("images", manifest.images), ("boxes", manifest.boxes)]
    texts = [("index_sha256", manifest.index_sha256), ("fingerprint", manifest.fingerprint)]
    for shard in manifest.shards:
        if not is_plain(shard.name):
            raise InputError(f"{path}: shard name {shard.name!r:.99} is not a plain file name that ends in .tar")
        counts += [(f"shard {shard.name}: bytes", shard.bytes), (f"shard {shard.name}: samples", shard.samples)]
        texts += [(f"shard {shard.name}: sha256", shard.sha256)]
    for one in manifest.classes:
        if type(one.category_id) is not int or not -(2**63) <= one.category_id < 2**63:
            raise InputError(f"{path}: category id {one.category_id!r:.99} is no number")
        texts += [("name of a class", one.name)]
    for key, number in counts:
        if type(number) is not int or not 0 <= number < 2**60:
            raise InputError(f"{path}: {key} {number!r:.99} is no count")
    for key, text in texts:
        if type(text) is not str:
            raise InputError(f"{path}: {key} {text!r:.99} is no text")


def is_plain(name: object) -> bool:
    """May a shard have this name? Not one of another folder, nor one that other files of a set, or a cache, have."""
    return (isinstance(name, str) and name.isprintable() and name.endswith(".tar") and Path(name).name == name
            and len(name.encode(errors="replace")) <= 200)  # fmt: skip


def read_index(folder: str | Path, manifest: Manifest) -> np.ndarray:
    """The index, memory-mapped, of shape (images,) and dtype INDEX_DTYPE; InputError when it does not fit."""
    path = Path(folder) / INDEX
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy's parser raises whatever a damaged header makes it stumble over
        raise InputError(f"{path}: not an index ({' '.join(str(error).split())}); convert the data again") from error
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.images,):
        raise InputError(
            f"{path}: {index.shape} records of {index.dtype}, expected {manifest.images}; convert the data again"
        )
    return index


def samples_per_shard(index: np.ndarray, manifest: Manifest) -> list[int]:
    """Records of each of the manifest's shards; the last number counts those of any other shard."""
    shards = len(manifest.shards)  # all larger numbers are counted as this one: a damaged one may be 2^32 - 1
    return np.bincount(np.minimum(index["shard"], shards), minlength=shards + 1).tolist()
