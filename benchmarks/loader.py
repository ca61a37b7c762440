"""The data path: augmentation beside a plain pipeline, workers, reading, planning, resuming, memory, in one run.

    python -m benchmarks.loader [--parts augmentation workers transport reading planning padding ranks memory]
                                [--profile]

On 400 JPEG images of 640x480 (about 120 KB each) that are made for it, through the published training augmentation.
--profile: only where a worker's time goes, stage by stage.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from benchmarks.convert import write_images
from benchmarks.results import write
from data_tools import convert
from framework.data import transforms
from framework.data.batch import IMAGENET_MEAN, IMAGENET_STD, Example, bytes_of, collate
from framework.data.loader import DataConfig, TrainLoader, _load
from framework.data.order import epoch_order, rank_share, step_micro_batches, steps_per_epoch, uniform_draws
from framework.data.source import IndexedSource
from framework.data.transforms import Geometry, augment, decode_rgb, training_geometry, warp_boxes, warp_image
from framework.data.transport import Sent, Slots, sent
from framework.engine.ranks import init_ranks

IMAGES, MICRO_BATCH, TURNS = 400, 4, 7
PUBLISHED = DataConfig()
COCO_IMAGES = 118_287
# Usual shapes of photographs of at most 640 px, and how many of 100 have them: a guess at COCO, which is not here.
SHAPES_HW = {(480, 640): 38, (427, 640): 18, (640, 480): 13, (640, 427): 6, (426, 640): 6, (375, 500): 5,
             (360, 640): 3, (333, 500): 3, (612, 612): 2, (500, 375): 2, (640, 640): 2, (640, 512): 2}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--profile", action="store_true", help="only print where the time goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder))
        if args.profile:
            print(*(f"{stage:12} {share:6.1%}" for stage, share in profile(shards).items()), sep="\n")
            return 0
        for part in args.parts:
            result = PARTS[part](shards)
            write("loader", "The data path", part, result, f"python -m benchmarks.loader --parts {part}")
            print(part, result, flush=True)
    return 0


def make_shards(folder: Path) -> Path:
    source = write_images(folder / "source", IMAGES)
    convert.main(["--images", str(source / "images"), "--annotations", str(source / "instances.json"),
                  "--out", str(folder / "shards"), "--shard-mib", "16"])  # fmt: skip
    return folder / "shards"


def geometry_of(image_id: int, size_hw: tuple[int, int]) -> Geometry:
    return training_geometry(size_hw, uniform_draws(8, 0, 0, image_id), PUBLISHED.sizes, PUBLISHED.max_size,
                             PUBLISHED.crop_resize, PUBLISHED.crop_sizes)  # fmt: skip


# One core: images to collated batches.


def augmentation(shards: Path) -> dict[str, Any]:
    source = IndexedSource(shards)
    ways: dict[str, Callable[[list[int]], Any]] = {
        "ours": lambda batch: collate([augment(*source.read(i), geometry_of, "contiguous") for i in batch]),
        "plain Pillow and float": lambda batch: plain_batch(source, batch),
        "decoding alone": lambda batch: [simplejpeg.decode_jpeg(source.read(i)[0], colorspace="RGB") for i in batch],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    batches = [list(range(i, i + MICRO_BATCH)) for i in range(0, 80, MICRO_BATCH)]
    for _ in range(TURNS):
        for name, way in ways.items():
            started = time.perf_counter()
            for batch in batches:
                way(batch)
            seconds[name].append(time.perf_counter() - started)
    count = MICRO_BATCH * len(batches)
    rates = {name: count / statistics.median(times) for name, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["plain Pillow and float"], strict=True)]
    return {
        "rates": [{"way": name, "images/s and core": rate} for name, rate in rates.items()],
        "load": os.getloadavg()[0],
        "ours / plain (median of pairs)": statistics.median(ratios),
        "ours / plain (all pairs)": ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios)),
        "largest difference from Pillow, grey levels": largest_difference(source),
        "shares of ours": profile(shards),
    }


def plain_batch(source: IndexedSource, batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """As the published code does it: Pillow from end to end, float and normalisation before padding."""
    import io

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = []
    for i in batch:
        data, sample = source.read(i)
        geometry = geometry_of(sample.image_id, (sample.height, sample.width))
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if geometry.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if geometry.crop_tlhw is not None:
            top, left, height, width = geometry.crop_tlhw
            image = image.resize(geometry.before_crop_hw[::-1], Image.Resampling.BILINEAR)
            image = image.crop((left, top, left + width, top + height))
        image = image.resize(geometry.size_hw[::-1], Image.Resampling.BILINEAR)
        warp_boxes(np.array(sample.boxes_xyxy_px, dtype=float), (sample.height, sample.width), geometry)
        pixels_3HW = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        images.append((pixels_3HW - mean) / std)
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    padded = torch.zeros(len(images), 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    mask = torch.ones(len(images), *padded.shape[-2:], dtype=torch.bool)
    for slot, outside, image, (h, w) in zip(padded, mask, images, sizes, strict=True):
        slot[:, :h, :w].copy_(image)
        outside[:h, :w] = False
    return padded, mask


def largest_difference(source: IndexedSource) -> int:
    worst = 0
    for i in range(40):
        data, sample = source.read(i)
        geometry = geometry_of(sample.image_id, (sample.height, sample.width))
        fast, exact = (warp_image(decode_rgb(data, way), geometry, way).astype(int) for way in ("fast", "pillow"))
        worst = max(worst, int(abs(fast - exact).max()))
    return worst


def profile(shards: Path) -> dict[str, float]:
    """Shares of one core's time: reading with checksums and JSON, geometry, decoding, warping, boxes, collating."""
    source = IndexedSource(shards)
    spent: Counter[str] = Counter()

    def timed(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        spent[stage] += time.perf_counter() - started
        return result

    for start in range(0, 120, MICRO_BATCH):
        examples = []
        for i in range(start, start + MICRO_BATCH):
            data, sample = timed("read", source.read, i)
            geometry = timed("geometry", geometry_of, sample.image_id, (sample.height, sample.width))
            pixels = timed("warp", warp_image, timed("decode", decode_rgb, data), geometry)
            boxes, labels = timed("boxes", transforms.warped_annotations, sample, "contiguous", geometry)
            examples.append(Example(pixels, sample.image_id, (sample.height, sample.width), boxes, labels))
        timed("collate", collate, examples)
    total = sum(spent.values())
    return {stage: round(seconds / total, 3) for stage, seconds in spent.most_common()}


# Processes, reading.


def workers(shards: Path) -> dict[str, Any]:
    """Whole epochs through the loader with one worker and with two, by turns."""
    init_ranks()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(5):
        for count, times in seconds.items():
            train = TrainLoader(DataConfig(train=str(shards), workers=count), seed=0, global_batch=MICRO_BATCH,
                                micro_batch=MICRO_BATCH, rank=0, world=1)  # fmt: skip
            steps: Iterator[Any] = train.epoch(turn)
            for _ in range(4 * count):  # the workers have started
                next(steps)
            started, served = time.perf_counter(), sum(1 for _ in steps)
            times.append((time.perf_counter() - started) / served)
    ratios = [a / b for a, b in zip(seconds[1], seconds[2], strict=True)]
    return {
        "images/s": [{"workers": n, "images/s": MICRO_BATCH / statistics.median(t)} for n, t in seconds.items()],
        "two / one (median of pairs)": statistics.median(ratios),
        "two / one (all pairs)": ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios)),
        "load": os.getloadavg()[0],
    }


class Sender(torch.utils.data.IterableDataset[Any]):
    """A worker that sends the same images again and again: through slots, or as torch sends tensors."""

    def __init__(self, examples: list[Example], slots: Slots | None) -> None:
        self.examples, self.slots = examples, slots

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield sent(self.examples, self.slots) if self.slots else collate(self.examples).pixels_P


def transport(shards: Path) -> dict[str, Any]:
    """Batches of ready-made images from one worker to the training process, which reads a byte of each page."""
    source = IndexedSource(shards)
    examples = [augment(*source.read(i), geometry_of, "contiguous") for i in range(MICRO_BATCH)]
    seconds: dict[str, list[float]] = {"through slots": [], "as torch sends tensors": []}
    for _ in range(TURNS):
        # New ones each time: a worker that is ended keeps those it has taken.
        for times, used in zip(seconds.values(), (Slots(5, bytes_of(examples)), None), strict=True):
            loader = iter(torch.utils.data.DataLoader(Sender(examples, used), batch_size=None, num_workers=1))
            for count in range(60):
                if count == 20:  # the worker has started, and each slot has been used
                    started = time.perf_counter()
                message = next(loader)
                pixels = message.received().pixels_P if isinstance(message, Sent) else message
                pixels[:: resource.getpagesize()].sum()
                del message, pixels
            times.append((time.perf_counter() - started) / 40)
            del loader
    slow, fast = seconds["as torch sends tensors"], seconds["through slots"]
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {
        "batches": [{"way": way, "ms": 1e3 * statistics.median(times)} for way, times in seconds.items()],
        "MB of a batch": bytes_of(examples) / 1e6,
        "torch / slots (median of pairs)": statistics.median(ratios),
        "torch / slots (all pairs)": ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios)),
        "load": os.getloadavg()[0],
    }


def reading(shards: Path) -> dict[str, Any]:
    """The reading stage alone, files in the page cache: pread, crc32, JSON to a Sample."""
    source = IndexedSource(shards)
    order = epoch_order(len(source), 0, 0)
    rates = []
    for _ in range(TURNS):
        started = time.perf_counter()
        for i in order:
            source.read(int(i))
        rates.append(len(order) / (time.perf_counter() - started))
    return {"samples/s": statistics.median(rates), "MB/s": statistics.median(rates) * mean_bytes(source) / 1e6}


def mean_bytes(source: IndexedSource) -> float:
    return float(source.index["image_length"].mean())


# Integers.


def planning(shards: Path) -> dict[str, Any]:
    """The order of 10 million samples; the first micro-batch of an epoch of COCO that is resumed anywhere."""
    seconds, peak = in_child(lambda: epoch_order(10_000_000, 0, 0))
    resumes = []
    for step in (0, 1000, 3695):
        started = time.perf_counter()
        order = epoch_order(COCO_IMAGES, 0, 7)
        rank_share(step_micro_batches(order, step, 32, 2), 3, 8)
        resumes.append(time.perf_counter() - started)
    return {"s for 10M samples": seconds, "MiB for 10M samples": peak, "s to resume 118,287 samples": max(resumes)}


def in_child(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and additional MiB at the peak of a call in a forked process."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            started = time.perf_counter()
            function()
            seconds = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os.write(writer, f"{seconds} {peak / 1024}".encode())
        finally:
            os._exit(0)
    os.wait()
    seconds, peak = os.read(reader, 100).decode().split()
    return float(seconds), float(peak)


def padding(shards: Path) -> dict[str, Any]:
    """Pixels that are computed for one of the images, padding included; and the work of the slowest of 8 ranks.

    Of 6,400 images in a mix of shapes, without pixels: by their numbers alone.
    """
    shapes_hw, shares = zip(*SHAPES_HW.items(), strict=True)
    draw = np.random.default_rng(0)
    files_hw = [shapes_hw[i] for i in draw.choice(len(shapes_hw), 6400, p=np.array(shares) / sum(shares))]
    sizes_hw = {i: geometry_of(i, size_hw).size_hw for i, size_hw in enumerate(files_hw)}
    order, world = epoch_order(len(files_hw), 0, 0), 8
    rows = []
    for batch, micro_batch in ((32, 2), (32, 4), (64, 4), (128, 4), (256, 4)):
        row: dict[str, Any] = {"global batch": batch, "micro-batch": micro_batch}
        for way, size_hw_of in (("as they come", None), ("by shape", sizes_hw.__getitem__)):
            computed = slowest = 0
            for step in range(len(order) // batch):
                cut = step_micro_batches(order, step, batch, micro_batch)
                shares_px = [[padded_px([sizes_hw[i] for i in micro.tolist()]) for micro in
                              rank_share(cut, rank, world, size_hw_of)] for rank in range(world)]  # fmt: skip
                computed += sum(map(sum, shares_px))
                slowest += world * max(map(sum, shares_px))
            row |= {f"padded / own, {way}": computed, f"slowest rank, {way}": slowest}
        row["slowest rank, by shape / as they come"] = row["slowest rank, by shape"] / row["slowest rank, as they come"]
        own = sum(h * w for h, w in sizes_hw.values())
        rows.append({key: value / own if type(value) is int and value > 10**6 else value for key, value in row.items()})
    return {"worlds of 8 ranks": rows}


def padded_px(sizes_hw: list[tuple[int, int]]) -> int:
    return len(sizes_hw) * max(h for h, _ in sizes_hw) * max(w for _, w in sizes_hw)


def ranks(shards: Path) -> dict[str, Any]:
    """Every sample once, and as many steps for all, over 1 to 4096 ranks; bytes of the nodes in block order."""
    shard_N = np.arange(COCO_IMAGES) // 1600
    bytes_N = np.random.default_rng(0).lognormal(np.log(150_000), 0.4, COCO_IMAGES)
    rows = []
    for world in (1, 2, 8, 64, 512, 4096):
        batch = max(world, 32)
        for mode in ("full", "block"):
            order = epoch_order(COCO_IMAGES, 0, 0, mode, shard_N)
            steps = steps_per_epoch(COCO_IMAGES, batch, "mask")
            seen = np.zeros(COCO_IMAGES, dtype=np.int64)
            of_node: Counter[int] = Counter()
            for step in range(steps):
                micro_batches = step_micro_batches(order, step, batch, 1)
                for rank in range(world):
                    mine = np.concatenate(rank_share(micro_batches, rank, world))
                    mine = mine[mine >= 0]  # the tail of the epoch is masked
                    seen[mine] += 1
                    of_node[rank // 8] += int(bytes_N[mine].sum())
            spread = (max(of_node.values()) - min(of_node.values())) / (sum(of_node.values()) / len(of_node))
            rows.append({
                "ranks": world, "order": mode, "steps of each": steps, "every sample once": bool((seen == 1).all()),
                "largest difference of bytes between nodes of 8": f"{spread:.1%}",
            })  # fmt: skip
    return {"worlds": rows}


def memory(shards: Path) -> dict[str, Any]:
    """Resident MiB of a worker that serves 20,000 samples, after every 5,000."""
    source = IndexedSource(shards)
    plan = [np.arange(n, n + MICRO_BATCH) % len(source) for n in range(0, 20_000 + MICRO_BATCH, MICRO_BATCH)]
    config = DataConfig(train=str(shards), workers=1)
    batches = _load(source, partial(iter, plan), geometry_small, config, MICRO_BATCH, 1)
    sizes, served = [], 0
    for batch in batches:
        served += len(batch.image_ids)
        if served % 5000 == 0:
            [worker] = multiprocessing.active_children()
            pages = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1])
            sizes.append(round(pages * resource.getpagesize() / 2**20, 1))
    return {"resident MiB after 5, 10, 15, 20 thousand": ", ".join(map(str, sizes)), "growth MiB": sizes[-1] - sizes[0]}


def geometry_small(image_id: int, size_hw: tuple[int, int]) -> Geometry:
    """Of changing sizes, as in training, but small: the count matters here, not the pixels."""
    draws = uniform_draws(8, 0, 0, image_id)
    return training_geometry(size_hw, draws, [96, 128, 160], 256, [80, 100], [64, 96])


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "augmentation": augmentation, "workers": workers, "transport": transport, "reading": reading,
    "planning": planning, "padding": padding, "ranks": ranks, "memory": memory,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
