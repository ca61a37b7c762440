"""How a batch goes from a worker process to the training process: its pixels through memory that both have mapped.

Each worker has a few slots, mapped before it is forked (so workers are always forked) and used again and again; torch's
own way maps new shared memory for every batch, and the system has to find pages for it (benchmarks/loader.py, part
transport). The memory is anonymous: a container's small /dev/shm does not bound it, and a page takes room only once it
was written.
"""

import itertools
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import RawArray

import numpy as np
import torch

from framework.data.batch import Batch, Example, bytes_of, collate

_numbers = itertools.count()
_mapped: "weakref.WeakValueDictionary[int, Slots]" = weakref.WeakValueDictionary()  # what this process has


class Slots:
    """`count` pieces of shared memory of `size` bytes. A worker takes them; the training process frees them again."""

    def __init__(self, count: int, size: int) -> None:
        self.size, self.number, self._pid = size, next(_numbers), os.getpid()
        self._memory = mmap.mmap(-1, max(1, count * size))
        self._taken = RawArray("b", count)  # set by the worker alone, cleared by the training process alone
        _mapped[self.number] = self

    def take(self, size: int) -> int | None:
        """A free slot; None where there is none, or none so large."""
        free = [slot for slot, taken in enumerate(self._taken) if not taken]
        if not free or size > self.size:
            return None
        self._taken[free[0]] = 1
        return free[0]

    def free(self, slot: int) -> None:
        if os.getpid() == self._pid:  # a fork, too, has the pixels, and drops them
            self._taken[slot] = 0

    def pixels(self, slot: int, size: int) -> np.ndarray:
        """The first bytes of a slot: uint8 (size,)."""
        return np.frombuffer(self._memory, np.uint8, size, slot * self.size)


@dataclass(frozen=True)
class Sent:
    """A batch on its way; its pixels are in the slot, or still in the batch where none was free."""

    batch: Batch
    slots: int
    slot: int | None
    size: int

    def received(self) -> Batch:
        """The batch; its slot is free again once nobody has its pixels any more."""
        if self.slot is None:
            return self.batch
        slots = _mapped[self.slots]
        pixels = slots.pixels(self.slot, self.size)
        weakref.finalize(pixels, slots.free, self.slot).atexit = False  # all tensors of these pixels hold this array
        return replace(self.batch, pixels_P=torch.from_numpy(pixels))

    def pin_memory(self) -> Batch:
        """Called by torch's thread of that name, for a GPU; it copies, so that the slot is free at once."""
        return self.received().pin_memory()


def sent(examples: Sequence[Example], slots: Slots) -> Sent:
    """The collated batch, to be put in the queue of the worker that has these slots."""
    size = bytes_of(examples)
    slot = slots.take(size)
    if slot is None:
        return Sent(collate(examples), slots.number, None, size)
    batch = collate(examples, slots.pixels(slot, size))
    return Sent(replace(batch, pixels_P=batch.pixels_P[:0]), slots.number, slot, size)
