"""Conversion: memory on annotations of COCO's size, and rates beside decoding alone and beside tar.

    python -m benchmarks.convert [--parts annotations rates] [--workers W]

annotations: a COCO JSON of 118,287 images and 860,001 boxes with polygons is made, read and cut into shards' jobs.
rates: 4,800 JPEG files of 640x480 (1,200 pictures, four links to each); convert beside a pool of as many processes that
only decode (--verify decode), and beside `tar` (--verify none), by turns, the start of Python included; medians.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.results import ROOT, write

IMAGES, BOXES, CATEGORIES = 118_287, 860_001, 80
RATE_IMAGES, LINKS, SIZE_WH, TURNS = 1200, 4, (640, 480), 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            result = PARTS[part](Path(folder), args.workers)
        command = f"python -m benchmarks.convert --parts {part} --workers {args.workers}"
        write("convert", "Conversion", part, result, command)
        print(part, result)
    return 0


def annotations(folder: Path, workers: int) -> dict[str, Any]:
    path = folder / "instances.json"
    write_annotations(path)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, peak_gib, shards = pool.apply(read_annotations, (path,))
    return {
        "images": IMAGES, "boxes": BOXES, "MiB of JSON": path.stat().st_size / 2**20, "shards": shards,
        "CPU s to read, check and cut": round(seconds, 1), "peak GiB": round(peak_gib, 2),
    }  # fmt: skip


def write_annotations(path: Path) -> None:
    """With polygons of 10 to 60 corners; written in pieces, since only the reader's memory is measured."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write('{"info": {}, "images": [')
        for n in range(IMAGES):
            image = {"id": n, "file_name": f"{n:012d}.jpg", "width": 640, "height": 480}
            file.write(("," if n else "") + json.dumps(image))
        file.write('], "annotations": [')
        for n in range(BOXES):
            corners = np.round(rng.uniform(0, 200, 2 * int(rng.integers(10, 61))), 2).tolist()
            one = {"id": n, "image_id": int(rng.integers(IMAGES)), "category_id": 1 + n % CATEGORIES, "iscrowd": 0,
                   "bbox": [10.0, 20.0, 200.0, 200.0], "area": 1234.5, "segmentation": [corners]}  # fmt: skip
            file.write(("," if n else "") + json.dumps(one))
        categories = [{"id": 1 + n, "name": f"class {n}"} for n in range(CATEGORIES)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def read_annotations(path: Path) -> tuple[float, float, int]:
    """CPU seconds, peak GiB of this process, shards of 256 MiB if every image had 160 KB."""
    from data_tools.coco import read_coco
    from data_tools.shards import sample_bytes, shard_bounds

    started = time.process_time()
    data = read_coco(path)
    assert not data.faults, data.faults[0]
    bounds = shard_bounds((sample_bytes(160_000, json_bytes) for json_bytes in data.samples.json_bytes()), 2**28)
    seconds = time.process_time() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, len(bounds)


def rates(folder: Path, workers: int) -> dict[str, Any]:
    source = write_images(folder / "source", RATE_IMAGES, LINKS)
    paths = sorted((source / "images").iterdir())

    def converted(verify: str) -> Callable[[], None]:
        def run() -> None:
            subprocess.run(["rm", "-rf", str(folder / "out")], check=True)
            arguments = [
                "--images",
                str(source / "images"),
                "--annotations",
                str(source / "instances.json"),
                "--out",
                str(folder / "out"),
                "--shard-mib",
                "64",
                "--workers",
                str(workers),
                "--verify",
                verify,
            ]
            subprocess.run([sys.executable, "-m", "data_tools.convert", *arguments], cwd=ROOT, check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

        return run

    def decoded() -> None:
        code = "import sys; from benchmarks.convert import decode_all; decode_all(sys.argv[1], int(sys.argv[2]))"
        subprocess.run([sys.executable, "-c", code, str(source / "images"), str(workers)], cwd=ROOT, check=True)

    def tarred() -> None:
        subprocess.run(
            ["tar", "--hard-dereference", "-cf", str(folder / "out.tar"), "-C", str(source), "images"], check=True
        )
        subprocess.run(["sync", str(folder / "out.tar")], check=True)

    seconds = by_turns({"convert --verify decode": converted("decode"), "decoding alone": decoded,
                        "convert --verify none": converted("none"), "tar and sync": tarred})  # fmt: skip
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    rows = [{"what": what, "images/s": len(paths) / s, "MB/s": megabytes / s} for what, s in seconds.items()]
    return {
        "rates": rows, "workers": workers,
        "convert --verify decode / decoding alone": seconds["decoding alone"] / seconds["convert --verify decode"],
        "convert --verify none / tar": seconds["tar and sync"] / seconds["convert --verify none"],
    }  # fmt: skip


def write_images(folder: Path, count: int, links: int = 1) -> Path:
    """Smooth noise of about 120 KB an image, as photographs have at this size, and annotations of a box each.

    links: names that each picture has.
    """
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    width, height = SIZE_WH
    images, boxes = [], []
    for n in range(count):
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize(SIZE_WH, Image.Resampling.BICUBIC)).astype(np.int16)
        picture = (picture + rng.integers(-18, 19, picture.shape)).clip(0, 255).astype(np.uint8)
        first = folder / "images" / f"{n:06d}.jpg"
        Image.fromarray(picture).save(first, quality=85)
        for number in range(n, links * count, count):
            path = folder / "images" / f"{number:06d}.jpg"
            if path != first:
                os.link(first, path)
            images.append({"id": number, "file_name": path.name, "width": width, "height": height})
            boxes.append({"id": number, "image_id": number, "category_id": 1, "bbox": [10, 10, 100, 100]})
    coco = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_text(json.dumps(coco))
    return folder


def decode_all(folder: str, workers: int) -> None:
    """What `--verify decode` cannot do without: every image decoded by Pillow, shared out among processes."""
    paths = sorted(Path(folder).iterdir())
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pool.map(decode, paths, chunksize=32)


def decode(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def by_turns(commands: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds of each; one after the other, so that all meet the same machine."""
    seconds: dict[str, list[float]] = {what: [] for what in commands}
    for _ in range(TURNS):
        for what, run in commands.items():
            started = time.perf_counter()
            run()
            seconds[what].append(time.perf_counter() - started)
    return {what: statistics.median(times) for what, times in seconds.items()}


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {"annotations": annotations, "rates": rates}


if __name__ == "__main__":
    sys.exit(main())
