import gc
import multiprocessing
import os
from itertools import islice

import numpy as np
import pytest
import torch

from framework.data.batch import Batch, Example, images_in
from framework.data.loader import TrainLoader
from framework.data.transport import Sent, Slots, sent
from tests.data.test_loader import digest, digests, train_loader


def examples(value: int) -> list[Example]:
    return [Example(np.full((8, 10 + n, 3), value + n, np.uint8), n, (8, 10)) for n in range(2)]


def arrived(slots: Slots, value: int) -> Sent:
    """One that another process has sent: made in a fork, by pickle."""
    here, there = multiprocessing.Pipe()

    def send() -> None:
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        there.send(sent(examples(value), slots))

    process = multiprocessing.get_context("fork").Process(target=send)
    process.start()
    message = here.recv()
    process.join()
    return message


def values(batch: Batch) -> list[set[int]]:
    return [set(image.flatten().tolist()) for image in images_in(batch.pixels_P, batch.sizes_hw)]


def test_pixels_come_through_the_slots_and_free_them():
    slots = Slots(2, 1000)
    first, second = arrived(slots, 10), arrived(slots, 20)
    assert (first.slot, second.slot) == (0, 1) and not len(first.batch.pixels_P)
    first, second = first.received(), second.received()
    assert values(first) == [{10}, {11}] and values(second) == [{20}, {21}]
    view = images_in(first.pixels_P, first.sizes_hw)[1]  # as good as the batch: what it shows must stay
    del first
    gc.collect()
    third = arrived(slots, 30)
    assert third.slot is None and values(third.received()) == [{30}, {31}]
    assert set(view.flatten().tolist()) == {11}
    del view
    gc.collect()
    assert arrived(slots, 40).slot == 0
    assert values(second) == [{20}, {21}]


def test_a_fork_that_drops_its_copy_frees_nothing():
    """The workers of a later loader are forked while batches of this one are held."""
    slots = Slots(1, 1000)
    held = [arrived(slots, 60).received()]
    process = multiprocessing.get_context("fork").Process(target=held.clear)
    process.start()
    process.join()
    assert arrived(slots, 70).slot is None and values(held[0]) == [{60}, {61}]


def test_what_no_slot_can_hold_travels_without_one():
    message = arrived(Slots(2, 100), 50)
    assert message.slot is None and values(message.received()) == [{50}, {51}]


def kept(loader: TrainLoader, count: int) -> list[Batch]:
    return [batch for step in islice(loader.epoch(0), count) for batch in step]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_kept_stay_as_they_were(shards, workers):
    """More of them than there are slots, so that some travel without one."""
    loader = train_loader(shards, global_batch=2, workers=workers)
    assert [digest(batch) for batch in kept(loader, 11)] == [batch for step in digests(loader) for batch in step]


def test_a_loop_that_lets_go_of_its_batches_needs_the_slots_alone(shards, monkeypatch):
    ways, received = [], Sent.received

    def noted(message: Sent) -> Batch:
        ways.append(message.slot)
        return received(message)

    monkeypatch.setattr(Sent, "received", noted)
    for accumulation in (1, 3):
        loader = train_loader(shards, global_batch=2 * accumulation, workers=2)
        for _ in loader.epoch(0):
            pass
    assert None not in ways and len(ways) >= 20


def test_no_file_is_opened_for_a_batch(shards):
    """As torch's own transport does: of a kept batch, one for each tensor; and /dev/shm may be small."""
    loader = train_loader(shards, global_batch=2, workers=1)
    steps = loader.epoch(0)
    batches = [next(steps)]
    before = len(os.listdir("/proc/self/fd"))
    batches += list(islice(steps, 6))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_pinned_where_there_is_a_gpu(shards, workers):
    for step in train_loader(shards, workers=workers).epoch(0):
        for batch in step:
            assert batch.pixels_P.is_pinned() and batch.targets.boxes_cxcywh_N4.is_pinned()
