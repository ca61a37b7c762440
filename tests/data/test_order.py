import hashlib
import time

import numpy as np
import pytest

from framework.data.order import (
    BLOCK_SHARDS,
    WINDOW,
    epoch_order,
    hash_64,
    rank_share,
    step_micro_batches,
    steps_per_epoch,
    uniform_draws,
)

SHARD_N = np.repeat(np.arange(30, dtype=np.uint32), np.arange(30) % 5 * 3)  # uneven shards, six of them empty


def order_of(mode: str, seed: int = 1, epoch: int = 0) -> np.ndarray:
    return epoch_order(len(SHARD_N), seed, epoch, mode, SHARD_N)


def test_hash_is_splitmix64():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # its first three from state 0
    assert hash_64(np.arange(1, 4, dtype=np.uint64)).tolist() == published


def test_stream_never_changes():
    """A resumed run must see what the stopped one would have seen, whatever is installed by then."""
    assert epoch_order(10, seed=7, epoch=3).tolist() == [2, 7, 8, 4, 0, 5, 6, 9, 1, 3]
    shard_N = np.arange(118_287) // 1500
    digests = [
        hashlib.sha256(epoch_order(118_287, 42, 5, mode, shard_N).astype("<i8").tobytes()).hexdigest()[:16]
        for mode in ("full", "block")
    ]
    assert digests == ["71fc2c210d5ed435", "0543aa1919a40d3d"]
    draws = [0.16658950015792984, 0.15197920718724733, 0.4390520647404036]
    assert uniform_draws(3, seed=42, epoch=5, image_id=139) == draws
    for key in ((0, 0, 0), (2**63, 10**6, 2**62), (7, 1, 5)):  # one by one or as an array: the same hash
        bits = hash_64(np.arange(50, dtype=np.uint64), key[0], key[1], 2, key[2])
        assert uniform_draws(50, *key) == ((bits >> np.uint64(11)) * 2.0**-53).tolist()


@pytest.mark.parametrize("mode", ["full", "block"])
@pytest.mark.parametrize("num_samples", [0, 1, 2, 3, 64, 65, 1000])
def test_order_is_a_permutation(mode, num_samples):
    shard_N = np.arange(num_samples) // 7
    order = epoch_order(num_samples, seed=5, epoch=2, mode=mode, shard_N=shard_N)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@pytest.mark.parametrize("mode", ["full", "block"])
def test_epochs_and_seeds_differ_and_repeat(mode):
    orders = [order_of(mode, seed, epoch).tolist() for seed in (-1, 0, 1, 2**64) for epoch in (0, 1, 2)]
    assert orders[3:6] == orders[9:]  # seeds count modulo 2**64
    assert len({tuple(order) for order in orders}) == 9
    assert orders[0] == order_of(mode, -1, 0).tolist()


def test_every_sample_comes_early_and_late():
    """The place of each of 16 samples over 1600 epochs is uniform: chi-square far from its tail."""
    places = np.array([np.argsort(epoch_order(16, seed=3, epoch=epoch)) for epoch in range(1600)])
    counts = np.array([np.bincount(places[:, sample], minlength=16) for sample in range(16)])
    chi_square = ((counts - 100) ** 2 / 100).sum(axis=1)  # 15 degrees of freedom: mean 15, 0.1 % above 37.7
    assert chi_square.max() < 45 and 10 < chi_square.mean() < 20


def test_block_order_reads_few_shards_at_a_time():
    shards_of_epochs = []
    for epoch in range(3):
        shard_in_order_N = SHARD_N[order_of("block", epoch=epoch)]
        first, last = (
            np.array([np.flatnonzero(shard_in_order_N == shard)[end] for shard in np.unique(SHARD_N)])
            for end in (0, -1)
        )
        opened_together = [(first <= place) & (place <= last) for place in range(len(SHARD_N))]
        assert max(opened.sum() for opened in opened_together) <= BLOCK_SHARDS
        assert (np.diff(shard_in_order_N) != 0).sum() > 2 * len(first)  # shuffled inside, not shard after shard
        shards_of_epochs.append(tuple(shard_in_order_N))
    assert len(set(shards_of_epochs)) == 3


@pytest.mark.parametrize(
    ("num_samples", "global_batch", "drop", "mask"), [(0, 4, 0, 0), (3, 4, 0, 1), (4, 4, 1, 1), (9, 4, 2, 3)]
)
def test_steps_per_epoch(num_samples, global_batch, drop, mask):
    assert steps_per_epoch(num_samples, global_batch, "drop") == drop
    assert steps_per_epoch(num_samples, global_batch, "mask") == mask


def served(order: np.ndarray, tail: str, world: int, global_batch: int = 24, micro_batch: int = 2):
    """For each rank the list of its steps, each a list of micro-batches."""
    steps = range(steps_per_epoch(len(order), global_batch, tail))
    cut = [step_micro_batches(order, step, global_batch, micro_batch) for step in steps]
    return [[list(rank_share(micro_batches, rank, world)) for micro_batches in cut] for rank in range(world)]


@pytest.mark.parametrize("mode", ["full", "block"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_each_sample_once_over_the_ranks(mode, world):
    order = order_of(mode)
    dropped, masked = (served(order, tail, world) for tail in ("drop", "mask"))
    whole = len(order) // 24 * 24
    assert 0 < whole < len(order)
    assert {len(steps) for steps in dropped} == {whole // 24}
    assert {len(steps) for steps in masked} == {whole // 24 + 1}
    assert sorted(np.concatenate(sum(sum(dropped, []), []))) == sorted(order[:whole])
    ids = np.concatenate(sum(sum(masked, []), []))
    assert sorted(ids[ids >= 0]) == list(range(len(order)))
    assert (ids < 0).sum() == whole + 24 - len(order)


@pytest.mark.parametrize("world", [2, 3, 4, 12])
def test_micro_batches_do_not_depend_on_world(world):
    order = order_of("full")
    alone = [[tuple(m) for m in step] for step in served(order, "mask", 1)[0]]
    shared = served(order, "mask", world)
    assert [[tuple(m) for steps in shared for m in steps[step]] for step in range(len(alone))] == alone


def test_ten_million_samples():
    start = time.perf_counter()
    epoch_order(10_000_000, seed=0, epoch=0)
    print(f"epoch_order over 10M samples: {time.perf_counter() - start:.2f} s")


def test_micro_batches_by_shape():
    """Four of each of eight sizes, two images each: alike ones together, neighbours as much work as any others."""
    sides = np.array([10, 20, 30, 40])[np.arange(32) % 4]
    wide = np.arange(32) % 8 < 4

    def size_hw_of(i: int) -> tuple[int, int]:
        return (5, int(sides[i])) if wide[i] else (int(sides[i]), 5)

    cut = [np.arange(32)[start : start + 2] for start in range(0, 32, 2)]
    found = rank_share(cut, 0, 1, size_hw_of)
    assert sorted(np.concatenate(found).tolist()) == list(range(32))
    assert all(size_hw_of(a) == size_hw_of(b) for a, b in found)
    work = [int(sides[a]) for a, _ in found]
    assert {a + b for a, b in zip(work[::2], work[1::2], strict=True)} == {50}
    for world in (2, 4, 8, 16):
        shares = [rank_share(cut, rank, world, size_hw_of) for rank in range(world)]
        assert np.array_equal(np.concatenate(shares), found)


def test_shapes_are_compared_inside_windows():
    """A rank asks for the sizes of its own windows alone: with 64 ranks, a few of a thousand."""
    cut = list(np.arange(1024).reshape(-1, 4))
    for rank in (0, 17, 63):
        asked = set()
        rank_share(cut, rank, 64, lambda i, asked=asked: (asked.add(i) or 10, 10))
        assert asked == set(range(rank * 16 // WINDOW * WINDOW, rank * 16 // WINDOW * WINDOW + WINDOW))
