"""Shard sets for the tests, whole and damaged."""

import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.sample import INDEX, MANIFEST, Category, Manifest, Sample, Shard, read_manifest
from data_tools.shards import WrittenShard, sample_bytes, shard_bounds, write_manifest, write_shard

CLASSES = [Category("fish", 3), Category("starfish", 7), Category("stingray", 90)]


def make_sample(image_id: int, boxes: int = 2, height: int = 60, width: int = 80) -> tuple[bytes, Sample]:
    """A noisy image and annotations, a function of the id; the third of its boxes is a crowd."""
    rng = np.random.default_rng(image_id)
    pixels = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG")
    low_N2 = rng.uniform(0, 0.5, (boxes, 2)) * [width, height]
    boxes_xyxy_px = np.concatenate([low_N2, low_N2 + rng.uniform(0.1, 0.5, (boxes, 2)) * [width, height]], axis=1)
    labels = rng.integers(0, len(CLASSES), boxes).tolist()
    sample = Sample(
        image_id=image_id,
        file_name=f"{image_id}.jpg",
        width=width,
        height=height,
        boxes_xyxy_px=boxes_xyxy_px.tolist(),
        labels=labels,
        category_ids=[CLASSES[label].category_id for label in labels],
        areas=(np.prod(boxes_xyxy_px[:, 2:] - boxes_xyxy_px[:, :2], axis=1)).tolist(),
        iscrowd=[int(n == 2) for n in range(boxes)],
        annotation_ids=[100 * image_id + n for n in range(boxes)],
        segmentation=[[] for _ in range(boxes)],
    )
    return buffer.getvalue(), sample


def write_shards(
    folder: Path, samples: list[tuple[bytes, Sample]], shard_bytes: int = 30_000, classes: list[Category] = CLASSES
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [sample_bytes(len(image), len(sample.to_json())) for image, sample in samples]
    bounds = shard_bounds(sizes, shard_bytes)
    written = [write_shard(folder, n, ((samples[i][1], samples[i][0]) for i in one)) for n, one in enumerate(bounds)]
    write_manifest(folder, written, classes, {})
    return folder


def shard_of(folder: Path, i: int) -> str:
    """The file name of the shard that sample i lies in."""
    return read_manifest(folder).shards[np.load(folder / INDEX)[i]["shard"]].name


def write_raw_shard(folder: Path, samples: list[tuple[bytes, bytes, Sample]]) -> Path:
    """A set of one shard that vouches for any bytes: image, JSON, and the sample that the index says they are."""
    path, records = folder / "shard-000000.tar", []
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as tar:
        for image, text, sample in samples:
            at = []
            for data, suffix in ((image, "jpg"), (text, "json")):
                member = tarfile.TarInfo(f"{sample.image_id:012d}.{suffix}")
                member.size = len(data)
                at += [tar.offset + 512, len(data), zlib.crc32(data)]
                tar.addfile(member, io.BytesIO(data))
            records.append((sample.image_id, sample.width, sample.height, len(sample.labels), *at))
    shard = Shard(path.name, len(records), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    write_manifest(folder, [WrittenShard(shard, records)], CLASSES, {})
    return folder


def commit(folder: Path, index: np.ndarray, manifest: Manifest, index_bytes: bytes | None = None) -> None:
    """Write index (or these bytes as one) and manifest so that they vouch for each other."""
    np.save(folder / INDEX, index)
    if index_bytes is not None:
        (folder / INDEX).write_bytes(index_bytes)
    manifest = replace(manifest, index_sha256=hashlib.sha256((folder / INDEX).read_bytes()).hexdigest())
    manifest = replace(manifest, fingerprint=manifest.computed_fingerprint())
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)))


def overwrite(folder: Path, i: int, member: str, data: bytes, fix_crc: bool) -> None:
    """Put `data` at the start of a member; with fix_crc the index says that it belongs there."""
    manifest, index = read_manifest(folder), np.load(folder / INDEX)
    offset, length = int(index[i][f"{member}_offset"]), int(index[i][f"{member}_length"])
    with (folder / manifest.shards[index[i]["shard"]].name).open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.seek(offset)
        if fix_crc:
            index[f"{member}_crc32"][i] = zlib.crc32(file.read(length))
            commit(folder, index, manifest)
