"""Means of what happened since the last record: losses, learning rates, throughput, time spent waiting for data."""

import logging
import resource
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from framework.data.batch import Batch
from framework.engine.ranks import Ranks

log = logging.getLogger("tenfold")

T = TypeVar("T")


class Meter:
    """Sums stay on the device until `read`, so that a step never waits for its numbers."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.bad_samples = 0
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.images, self.waited_s = 0, 0, 0.0
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
        """Metrics of one step on this rank, and what it was made of; bad samples are logged here."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.steps += 1
        for batch in micro_batches:
            self.images += len(batch.image_ids)
            self.bad_samples += len(batch.bad)
            for message in batch.bad:
                log.warning("masked %s", message)

    def read(self) -> dict[str, float]:
        """Means over the steps since the last call and over ranks; bad samples since the start. Collective."""
        names = list(self.sums)
        waited = self.waited_s / max(time.perf_counter() - self.started, 1e-9)
        others = torch.tensor([waited, float(self.images), float(self.bad_samples)], device=self.ranks.device)
        summed = self.ranks.sum(torch.cat([torch.stack([self.sums[n] for n in names]), others]))
        *means, waited, images, bad_samples = summed.tolist()
        values = {name: mean / (self.steps * self.ranks.world) for name, mean in zip(names, means, strict=True)}
        # After the sum, which waits for the device: the time the steps really took.
        values["throughput/images_per_s"] = images / (time.perf_counter() - self.started)
        values["throughput/data_wait"] = waited / self.ranks.world
        values["data/bad_samples"] = bad_samples
        values["memory/peak_gib"] = peak_memory_gib(self.ranks.device)
        self._reset()
        return values


def peak_memory_gib(device: torch.device) -> float:
    """The most this process has held: on a GPU by torch's allocator, on the CPU resident (Linux: in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
