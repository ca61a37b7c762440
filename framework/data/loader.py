"""From a shard set to the micro-batches of a rank.

                 epoch_order, cut into steps, micro-batches and ranks: integers, made in the main process
                      |
    worker w of W:  plan ------> read ------> augment ------> collate ------> WebLoader ------> steps
                    micro-       encoded      uint8 RGB       one Batch,      in the plan's     lists of
                    batches      bytes,       and boxes       its pixels      order, for        Batches
                    i % W == w   JSON                         in a slot       any W

Each arrow carries one micro-batch. A sample that cannot be used becomes a masked slot with a message
(`Batch.bad`) and goes on through the stages; nothing is dropped. To resume, the plan starts later.
"""

import contextlib
import logging
import math
import os
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch.utils.data import get_worker_info
from webdataset import DataPipeline, WebLoader

from data_tools.sample import FINISHED_SET, MANIFEST, Manifest, Sample, read_manifest
from framework.data.batch import MASKED_SIDE_PX, Batch, Example, collate, masked_example, padded_pixels
from framework.data.order import (
    MASKED,
    epoch_order,
    rank_share,
    step_micro_batches,
    steps_per_epoch,
    uniform_draws,
)
from framework.data.remote import Cache, RemoteSet, is_remote
from framework.data.source import BadSample, IndexedSource
from framework.data.transforms import (
    Backend,
    Geometry,
    GeometryOf,
    augment,
    evaluation_geometry,
    training_geometry,
)
from framework.data.transport import Sent, Slots, sent
from framework.errors import InputError, UsageError
from framework.processes import give_back_freed_memory

log = logging.getLogger("tenfold")

Labels = Literal["contiguous", "category_id"]
Order = Literal["full", "block"]
Tail = Literal["drop", "mask"]

PREFETCHED = 2  # batches that each worker makes ahead


@dataclass(frozen=True)
class DataConfig:
    """Defaults: the published augmentation.

    train, val: shard folders, or their http(s):// or s3:// URLs.
    cache, cache_gib: folder on each node's disk for what URLs name (null: ~/.cache/tenfold), and what it may hold.
    labels: the number that a class has in the model.
    order, tail: of an epoch, see framework/data/order.py.
    group_by_shape: put images that are alike in shape and size after augmentation into one micro-batch, among the 32
        neighbours in the epoch's order: less padding to compute. Micro-batches of more than 16 are as they come. With
        one micro-batch a step and rank, ranks wait for the one with the largest images, if not as long as without.
    workers: processes of each rank that read and decode; 0: the training process does it.
    max_bad: so many unusable samples are masked and logged; one more fails the run.
    sizes, max_size: short sides to choose from, bound on the long side.
    backend: fast (simplejpeg, cv2, torch) or pillow, as published to the last bit; they differ by up to 2 grey levels.
    crop_resize, crop_sizes: half of the images are resized to one of these short sides and cropped, each
        side to between the least and the largest; crop_resize [] turns this off.
    """

    train: str | None = None
    val: str | None = None
    cache: str | None = None
    cache_gib: float = 64.0
    labels: Labels = "contiguous"
    order: Order = "full"
    tail: Tail = "drop"
    group_by_shape: bool = False
    workers: int = 2
    max_bad: int = 0
    backend: Backend = "fast"
    sizes: list[int] = field(default_factory=lambda: list(range(480, 801, 32)))
    max_size: int = 1333
    crop_resize: list[int] = field(default_factory=lambda: [400, 500, 600])
    crop_sizes: list[int] = field(default_factory=lambda: [384, 600])

    def __post_init__(self) -> None:
        def refuse(keys: str, found: object, expected: str) -> None:
            raise UsageError(f"{keys}: found {found}; expected {expected}")

        for key, choices in (("labels", Labels), ("order", Order), ("tail", Tail), ("backend", Backend)):
            if getattr(self, key) not in get_args(choices):
                refuse(f"data.{key}", getattr(self, key), " or ".join(get_args(choices)))
        for key in ("workers", "max_bad"):
            if getattr(self, key) < 0:
                refuse(f"data.{key}", getattr(self, key), "0 or more")
        if not 0 < self.cache_gib < math.inf:
            refuse("data.cache_gib", self.cache_gib, "above 0")
        if not self.sizes or min(self.sizes) < 1:
            refuse("data.sizes", self.sizes, "one or more short sides of at least 1 px")
        if self.max_size < max(self.sizes):
            refuse("data.max_size, data.sizes", f"{self.max_size}, {self.sizes}",
                   "a bound on the long side that is not below a short side")  # fmt: skip
        if self.crop_resize and min(self.crop_resize) < 1:
            refuse("data.crop_resize", self.crop_resize, "short sides of at least 1 px, or [] for no crop")
        if len(self.crop_sizes) != 2 or not 1 <= self.crop_sizes[0] <= self.crop_sizes[1]:
            refuse("data.crop_sizes", self.crop_sizes, "the least and the largest side of a crop")


class TrainLoader:
    """The training micro-batches of one rank; who is in which depends on seed, epoch and global batch alone.

    Args:
        seed: of order and augmentation.
        global_batch, micro_batch: images of an optimizer step over all ranks, images of one forward pass.
    Raises:
        UsageError: no data.train; a global batch that the ranks cannot share in whole micro-batches.
        InputError: a damaged shard set; one with too few images for a step.
    """

    def __init__(
        self, config: DataConfig, *, seed: int, global_batch: int, micro_batch: int, rank: int, world: int
    ) -> None:
        if not config.train:
            raise UsageError("data.train: found null; expected a shard folder, as data_tools.convert makes it")
        if micro_batch < 1 or global_batch < 1 or global_batch % (micro_batch * world):
            raise UsageError(
                f"train.global_batch, train.micro_batch: found {global_batch}, {micro_batch} on {world} "
                f"ranks; expected a multiple of micro-batch x ranks, which is {micro_batch * world}"
            )
        self.config, self.seed, self.rank, self.world = config, seed, rank, world
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.accumulation = global_batch // (micro_batch * world)
        self.source = _open(config.train, config)
        self.manifest = self.source.manifest
        self.steps_per_epoch = steps_per_epoch(len(self.source), global_batch, config.tail)
        if self.steps_per_epoch == 0:
            raise InputError(
                f"{config.train}: holds {len(self.source)} images, too few for a step of train.global_batch="
                f"{global_batch}; lower that, or fill the step up with data.tail=mask"
            )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The steps of the epoch from first_step on: of each, the micro-batches to accumulate over."""
        order = epoch_order(len(self.source), self.seed, epoch, self.config.order, self.source.index["shard"])
        steps = range(first_step, self.steps_per_epoch)
        sizes = self.global_batch, self.micro_batch
        geometry_of = partial(_training_geometry_of, self.config, self.seed, epoch)
        size_hw_of = partial(self._size_hw, geometry_of) if self.config.group_by_shape else None
        plan = partial(_training_plan, order, steps, *sizes, self.rank, self.world, size_hw_of)
        batches = _load(self.source, plan, geometry_of, self.config, self.micro_batch, self.accumulation)
        while step := list(islice(batches, self.accumulation)):
            yield step

    def largest(self, epoch: int, grain: int = 1) -> tuple[list[tuple[int, int]], int]:
        """Of this rank's micro-batches in the epoch the one that pads to the most pixels, sides to multiples of grain:
        sizes (height, width) of its images after augmentation, and its number of boxes. From the index alone."""
        order = epoch_order(len(self.source), self.seed, epoch, self.config.order, self.source.index["shard"])
        size_hw_of = partial(self._size_hw, partial(_training_geometry_of, self.config, self.seed, epoch))
        plan = _training_plan(order, range(self.steps_per_epoch), self.global_batch, self.micro_batch, self.rank,
                              self.world, size_hw_of if self.config.group_by_shape else None)  # fmt: skip
        sized = ((padded_pixels(sizes_hw := [size_hw_of(i) for i in samples.tolist()], grain), sizes_hw, samples)
                 for samples in plan)  # fmt: skip
        _, sizes_hw, samples = max(sized, key=lambda one: one[0])
        return sizes_hw, int(self.source.index["boxes"][samples[samples != MASKED]].sum())

    def _size_hw(self, geometry_of: GeometryOf, i: int) -> tuple[int, int]:
        """Of sample i after augmentation: drawn from the index alone, before anything is read."""
        if i == MASKED:
            return MASKED_SIDE_PX, MASKED_SIDE_PX
        return geometry_of(self.source.image_id(i), self.source.size_hw(i)).size_hw


class EvalLoader:
    """The evaluation batches of one rank; over all ranks each image exactly once.

    batch_size neighbours in the index are a group (the last may be smaller), whatever the number of ranks;
    rank r iterates groups r, r + world, ... and may have none. Batches have targets too, without the crowds.
    """

    def __init__(self, folder: str | Path, config: DataConfig, *, batch_size: int, rank: int, world: int) -> None:
        self.config, self.batch_size = config, batch_size
        self.source = _open(folder, config)
        self.manifest = self.source.manifest
        self._groups = range(rank, -(-len(self.source) // batch_size), world)

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Batch]:
        plan = partial(_evaluation_plan, self._groups, self.batch_size, len(self.source))
        return _load(self.source, plan, partial(_evaluation_geometry_of, self.config), self.config, self.batch_size, 1)

    def ground_truth(self) -> dict[str, list[dict[str, Any]]]:
        """All images, annotations (crowds included) and classes of the set, in COCO's format.

        Annotations are numbered anew from 1: pycocotools takes an id of 0 for "not matched".
        Raises:
            BadSample: annotations cannot be read, so that nothing can be measured against them.
        """
        samples = [self.source.read_sample(i) for i in range(len(self.source))]
        annotations = (annotation for sample in samples for annotation in coco_annotations(sample))
        return {
            "images": [_coco_image(sample) for sample in samples],
            "annotations": [{"id": number, **found} for number, found in enumerate(annotations, start=1)],
            "categories": [{"id": c.category_id, "name": c.name} for c in self.manifest.classes],
        }


def _coco_image(sample: Sample) -> dict[str, Any]:
    return {
        "id": sample.image_id,
        "file_name": sample.file_name,
        "height": sample.height,
        "width": sample.width,
    }


def coco_annotations(sample: Sample) -> Iterator[dict[str, Any]]:
    """The annotations of one image in COCO's format, crowds included, without ids."""
    columns = (sample.boxes_xyxy_px, sample.category_ids, sample.areas, sample.iscrowd)
    for (x1, y1, x2, y2), category_id, area, iscrowd in zip(*columns, strict=True):
        yield {
            "image_id": sample.image_id,
            "category_id": category_id,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": area,
            "iscrowd": iscrowd,
        }


def refuse_no_set(name: str, location: str | Path) -> None:
    """Raises UsageError, naming the flag or key, where there is no finished shard set. URLs are not looked at."""
    if is_remote(location) or Path(location, MANIFEST).is_file():
        return
    found = f"has no {MANIFEST}" if Path(location).exists() else "is not there"
    raise UsageError(f"{name}: {location} {found}; {FINISHED_SET}")


def manifest_of(location: str | Path, config: DataConfig) -> Manifest:
    """Raises InputError: no shard set, or one that cannot be had."""
    return RemoteSet(str(location), _cache(config)).manifest if is_remote(location) else read_manifest(location)


def _cache(config: DataConfig) -> Cache:
    folder = Path(config.cache or "~/.cache/tenfold").expanduser().absolute()
    return Cache(folder, int(config.cache_gib * 2**30))


def _open(location: str | Path, config: DataConfig) -> IndexedSource:
    source = IndexedSource(location, _cache(config) if is_remote(location) else None)
    if not len(source):
        raise InputError(f"{location}: holds no images; expected at least one")
    held = sum(shard.bytes for shard in source.manifest.shards)
    if source.remote and held > config.cache_gib * 2**30:
        log.warning("%s: %.3g GiB, and data.cache_gib=%g: shards are downloaded again and again; raise it%s", location,
                    held / 2**30, config.cache_gib, ", or set data.order=block" * (config.order == "full"))  # fmt: skip
    return source


# Plans: micro-batches of sample indices.


def _training_plan(
    order: np.ndarray,
    steps: range,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    size_hw_of: Callable[[int], tuple[int, int]] | None = None,
) -> Iterator[np.ndarray]:
    for step in steps:
        yield from rank_share(step_micro_batches(order, step, global_batch, micro_batch), rank, world, size_hw_of)


def _evaluation_plan(groups: range, batch_size: int, num_samples: int) -> Iterator[np.ndarray]:
    for group in groups:
        yield np.arange(group * batch_size, min((group + 1) * batch_size, num_samples))


# Geometries of an image, by its id and its size (height, width).


def _training_geometry_of(
    config: DataConfig, seed: int, epoch: int, image_id: int, size_hw: tuple[int, int]
) -> Geometry:
    return training_geometry(
        size_hw,
        uniform_draws(8, seed, epoch, image_id),
        config.sizes,
        config.max_size,
        config.crop_resize,
        config.crop_sizes,
    )


def _evaluation_geometry_of(config: DataConfig, image_id: int, size_hw: tuple[int, int]) -> Geometry:
    return evaluation_geometry(size_hw, max(config.sizes), config.max_size)


# Stages.


class Encoded(NamedTuple):
    place: int  # in the index
    image: bytes
    sample: Sample


def _load(
    source: IndexedSource,
    plan: Callable[[], Iterator[np.ndarray]],
    geometry_of: GeometryOf,
    config: DataConfig,
    batch_size: int,
    held: int,
) -> Iterator[Batch]:
    """held: so many batches the caller keeps at a time, while it asks for as many again."""
    slots = PREFETCHED + 1 + 2 * -(-held // max(1, config.workers))
    size = 3 * batch_size * max(config.sizes) * config.max_size
    workers = [_Worker(source, Slots(slots, size)) for _ in range(config.workers)]
    _workers.update(workers)
    stages = DataPipeline(
        partial(_plan, plan),
        partial(_read, source, workers),
        partial(_augment, source, workers, geometry_of, config.labels, config.backend),
        partial(_collate, workers),
    )
    loader = WebLoader(
        stages,
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=PREFETCHED if config.workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_start_worker, workers),
        multiprocessing_context=_DeafFork() if config.workers else None,
        generator=torch.Generator(),  # the default is the global one, which would move with each iteration
    )
    if config.workers:
        give_back_freed_memory()
    return _told(iter(loader), workers)


def _plan(plan: Callable[[], Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """Every W-th micro-batch: WebLoader takes from its workers in turns, which restores the plan's order."""
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    return islice(plan(), worker, None, workers)


def _read(
    source: IndexedSource, workers: "list[_Worker]", micro_batches: Iterable[np.ndarray]
) -> Iterator[list[Encoded | Example]]:
    for indices in micro_batches:
        yield [_read_one(source, workers, int(i)) for i in indices]


def _read_one(source: IndexedSource, workers: "list[_Worker]", i: int) -> Encoded | Example:
    if i == MASKED:
        return masked_example(-1, (MASKED_SIDE_PX, MASKED_SIDE_PX))
    _is_at(workers, i)
    try:
        return Encoded(i, *source.read(i))
    except BadSample as error:
        return masked_example(source.image_id(i), source.size_hw(i), str(error))


def _augment(
    source: IndexedSource,
    workers: "list[_Worker]",
    geometry_of: GeometryOf,
    labels: str,
    backend: Backend,
    micro_batches: Iterable[list[Encoded | Example]],
) -> Iterator[list[Example]]:
    def one(slot: Encoded | Example) -> Example:
        if isinstance(slot, Example):
            return slot
        _is_at(workers, slot.place)
        try:
            return augment(slot.image, slot.sample, geometry_of, labels, backend)
        except InputError as error:
            message = str(source.bad(slot.place, str(error)))
            return masked_example(source.image_id(slot.place), source.size_hw(slot.place), message)

    for slots in micro_batches:
        yield [one(slot) for slot in slots]


def _collate(workers: "list[_Worker]", micro_batches: Iterable[list[Example]]) -> Iterator[Batch | Sent]:
    info = get_worker_info()
    for examples in micro_batches:
        yield sent(examples, workers[info.id].slots) if info else collate(examples)


# Worker processes.


class _Worker:
    """What a worker process tells the training process: its pid, and the sample that it works on; and its slots."""

    def __init__(self, source: IndexedSource, slots: Slots) -> None:
        self.source, self.slots, self.shared = source, slots, RawArray("q", [0, MASKED])


_workers: "weakref.WeakSet[_Worker]" = weakref.WeakSet()  # of all loaders of this process


def _is_at(workers: list[_Worker], i: int) -> None:
    info = get_worker_info()
    if info:
        workers[info.id].shared[1] = i


@contextlib.contextmanager
def dead_workers_told() -> Iterator[None]:
    """Around all that may run while workers work: torch raises where the main thread is when one of them dies.

    Raises:
        InputError: instead of torch's RuntimeError, with what the worker was at.
    """
    try:
        yield
    except RuntimeError as error:
        pids = {int(number) for number in re.findall(r"\d+", str(error))} - {0}  # 0: not started
        dead = [worker for worker in _workers if worker.shared[0] in pids]
        if "DataLoader worker" not in str(error) or not dead:
            raise
        at = {worker.source.where(worker.shared[1]) for worker in dead if worker.shared[1] != MASKED}
        last = ", ".join(sorted(at)) or "nothing"
        raise InputError(f"a data worker has died; last worked on: {last} ({error}); if it took too much memory, lower "
                         "data.workers") from error  # fmt: skip


def _told(batches: Iterator[Batch | Sent], workers: list[_Worker]) -> Iterator[Batch]:
    """The batches; an error of a worker, which torch has wrapped in the worker's traceback, as one line again."""
    while True:
        try:
            with dead_workers_told():
                batch = next(batches)
        except StopIteration:
            return
        except (InputError, UsageError) as error:
            said = str(error).rstrip().rpartition(f"{type(error).__name__}: ")[2] if workers else str(error)
            raise type(error)(said) from error
        yield batch.received() if isinstance(batch, Sent) else batch


class _DeafProcess(ForkProcess):
    """Forked while SIGTERM is blocked, so that no thread of it hears one: torch starts some before `_start_worker`."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _DeafFork(ForkContext):
    Process = _DeafProcess


def _start_worker(workers: list[_Worker], worker: int) -> None:
    """One thread; deaf to the signals that a scheduler or Ctrl-C sends to all processes.

    The training process decides what happens then, and may need the batches that are on their way. It also
    ends its workers by SIGTERM: were that ignored, a training process that fails would wait for ever.
    """
    workers[worker].shared[0] = os.getpid()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    threading.Thread(target=_leave_when_parent_says_so, daemon=True).start()


def _leave_when_parent_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
