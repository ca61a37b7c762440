"""Means of what happened since the last record: losses, throughput, time spent waiting for data; bad samples."""

import logging
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from framework.data.batch import Batch
from framework.engine.ranks import Ranks
from framework.tracking.stragglers import Stragglers

log = logging.getLogger("tenfold")

T = TypeVar("T")


class Meter:
    """Sums stay on the device until `read`, so that a step never waits for its numbers."""

    def __init__(self, ranks: Ranks, bad_samples: Iterable[str] = (), stragglers: Stragglers | None = None):
        """bad_samples: messages of those that an earlier attempt of this run met."""
        self.ranks, self.stragglers = ranks, stragglers
        self.bad_samples = set(bad_samples)
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.images, self.waited_s = 0, 0, 0.0
        self.bad_here: set[str] = set()
        self.started = time.perf_counter()

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same items; the time until each one arrives counts as waiting for data."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited_s += time.perf_counter() - asked
            yield item

    def add(self, metrics: dict[str, Tensor], micro_batches: list[Batch]) -> None:
        """Metrics of one step on this rank, always the same or, if it was skipped, none; what the step was made of."""
        if metrics and self.sums:
            torch._foreach_add_([self.sums[name] for name in metrics], list(metrics.values()))
        elif metrics:
            self.sums = {name: value.clone() for name, value in metrics.items()}
        self.steps += bool(metrics)
        self.images += sum(int(batch.targets.valid_B.sum()) for batch in micro_batches)
        self.bad_here.update(message for batch in micro_batches for message in batch.bad)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside, evaluation or saving, is not time of training."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Means over the steps since the last call and over ranks; distinct bad samples of the run. Collective."""
        names = list(self.sums)
        waited = self.waited_s / max(time.perf_counter() - self.started, 1e-9)
        others = torch.tensor([float(self.images), float(len(self.bad_here))], device=self.ranks.device)
        own = torch.zeros(2, self.ranks.world)  # a column for each rank
        own[:, self.ranks.rank] = torch.tensor([waited, self.stragglers.forward_s() if self.stragglers else 0.0])
        summed = self.ranks.sum(torch.cat([*(self.sums[n].view(1) for n in names), others, own.view(-1).to(others)]))
        *means, images, newly_bad = summed[: -2 * self.ranks.world].tolist()
        waited_W, forward_s_W = summed[-2 * self.ranks.world :].cpu().view(2, -1)
        values = {name: mean / (self.steps * self.ranks.world) for name, mean in zip(names, means, strict=True)}
        # After the sum, which waits for the device: the time the steps really took.
        values["throughput/images_per_s"] = images / (time.perf_counter() - self.started)
        values["throughput/data_wait"] = float(waited_W.mean())
        if self.stragglers is not None:
            values |= self.stragglers.values(forward_s_W, waited_W)
        if newly_bad:  # the same number on every rank
            self._share_bad_samples()
        values["data/bad_samples"] = float(len(self.bad_samples))
        values["memory/peak_gib"] = peak_memory_gib(self.ranks.device)
        self._reset()
        return values

    def _share_bad_samples(self) -> None:
        everywhere = set().union(*self.ranks.all_gather_objects(self.bad_here))
        for message in sorted(everywhere - self.bad_samples):
            log.info("a masked slot instead of %s", message)
        self.bad_samples |= everywhere


def peak_memory_gib(device: torch.device) -> float:
    """The most this process has held: on a GPU by torch's allocator, on the CPU resident (Linux: in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
