"""Which samples make up which micro-batch: pure functions of integers, the same on every host.

Order and augmentation draw from one keyed hash (splitmix64) instead of a random library, whose stream may
change with its version: a run that is resumed years later sees the same images in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_SHARDS = 8  # of 256 MiB: 2 GiB are shuffled together, which fits the page cache of any node
MASKED = -1  # the index of a slot with no sample: the rest of the last batch of an epoch with tail 'mask'

WINDOW = 32  # samples whose shapes are compared: the paper's batch

_GAMMA, _LOW_64 = 0x9E3779B97F4A7C15, (1 << 64) - 1
_SAMPLES, _SHARDS, _PIXELS = 0, 1, 2  # uses of one (seed, epoch)
_CHUNK = 1 << 16  # planned at a time: stays in the cache


@dataclass(frozen=True)
class DataState:
    """Where the training data stands: all that a resumed run needs to go on with the next sample.

    samples_consumed: of this epoch, tail slots included; counted where the optimizer steps, not where data is
    read, so that what was prefetched and not trained on is served again.
    """

    fingerprint: str
    seed: int
    epoch: int
    samples_consumed: int
    global_batch: int


def epoch_order(
    num_samples: int, seed: int, epoch: int, mode: str = "full", shard_N: np.ndarray | None = None
) -> np.ndarray:
    """The permutation of all samples in one epoch: (num_samples,) int64.

    mode 'full': over everything. mode 'block': shards are shuffled and grouped into blocks of BLOCK_SHARDS,
    samples are shuffled inside their block, so that few shards are read at a time; shard_N is the shard of
    each sample.
    """
    assert mode == "full" or shard_N is not None, "block order needs the shard of each sample"
    block_S = _block_of_shards(shard_N, seed, epoch) if shard_N is not None and mode == "block" else None
    index_mask = np.uint64((1 << max(num_samples - 1, 0).bit_length()) - 1)
    keys_N = np.empty(num_samples, dtype=np.uint64)
    for start in range(0, num_samples, _CHUNK):
        index = np.arange(start, min(start + _CHUNK, num_samples), dtype=np.uint64)
        keys = hash_64(index, seed, epoch, _SAMPLES)
        if shard_N is not None and block_S is not None:
            keys = _with_block_first(keys, block_S[shard_N[start : start + _CHUNK]], int(block_S.max()))
        # The index rides in the low bits: sorting numbers is twice as fast as argsort, and no two are equal.
        keys_N[start : start + _CHUNK] = (keys & ~index_mask) | index
    keys_N.sort()
    return (keys_N & index_mask).view(np.int64)


def _block_of_shards(shard_N: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    shards = np.arange(int(shard_N.max(initial=0)) + 1, dtype=np.uint64)
    place = np.empty_like(shards)
    place[np.argsort(hash_64(shards, seed, epoch, _SHARDS))] = shards
    return place // np.uint64(BLOCK_SHARDS)


def _with_block_first(keys: np.ndarray, block: np.ndarray, last_block: int) -> np.ndarray:
    """The block in the high bits of the keys, so that one sort orders by both."""
    bits = last_block.bit_length()
    return (keys >> np.uint64(bits)) | (block << np.uint64(64 - bits)) if bits else keys


def steps_per_epoch(num_samples: int, global_batch: int, tail: str) -> int:
    """Optimizer steps of an epoch; tail 'drop' leaves the last incomplete batch out, 'mask' fills it up."""
    return num_samples // global_batch if tail == "drop" else -(-num_samples // global_batch)


def step_micro_batches(order: np.ndarray, step: int, global_batch: int, micro_batch: int) -> list[np.ndarray]:
    """The sample indices of one step, in micro-batches; MASKED where the epoch has no more samples."""
    samples = np.full(global_batch, MASKED, dtype=np.int64)
    found = order[step * global_batch : (step + 1) * global_batch]
    samples[: len(found)] = found
    return [samples[start : start + micro_batch] for start in range(0, global_batch, micro_batch)]


def rank_share(
    micro_batches: Sequence[np.ndarray],
    rank: int,
    world: int,
    size_hw_of: Callable[[int], tuple[int, int]] | None = None,
) -> Sequence[np.ndarray]:
    """The whole micro-batches of one rank: neighbours, as many for each rank; by shape if there are sizes."""
    assert len(micro_batches) % world == 0, f"{len(micro_batches)} micro-batches over {world} ranks"
    accumulation = len(micro_batches) // world
    share = range(rank * accumulation, (rank + 1) * accumulation)
    if size_hw_of is None:
        return micro_batches[share.start : share.stop]
    length = max(1, WINDOW // len(micro_batches[0]))
    windows = range(share.start // length * length, share.stop, length)
    by_shape = [one for at in windows for one in _by_shape(micro_batches[at : at + length], size_hw_of)]
    return by_shape[share.start - windows.start : share.stop - windows.start]


def _by_shape(
    micro_batches: Sequence[np.ndarray], size_hw_of: Callable[[int], tuple[int, int]]
) -> Sequence[np.ndarray]:
    """The same samples in as many micro-batches, each of shapes that are alike, so that little of it is padding.

    The smallest comes first, then the largest, the second smallest, the second largest, ...: each two neighbours are
    about as much work as any other two, so that ranks with several micro-batches a step wait little for each other.
    """
    sizes_hw = {i: size_hw_of(i) for i in np.concatenate(micro_batches).tolist()}

    def shape(i: int) -> tuple[bool, int, int, int]:
        height, width = sizes_hw[i]
        return width > height, max(height, width), min(height, width), i

    def area(samples: np.ndarray) -> int:
        heights, widths = zip(*[sizes_hw[i] for i in samples.tolist()], strict=True)
        return max(heights) * max(widths)

    samples = np.array(sorted(np.concatenate(micro_batches).tolist(), key=shape), dtype=np.int64)
    cut = sorted(samples.reshape(len(micro_batches), -1), key=area)
    half = -(-len(cut) // 2)
    return [one for pair in zip(cut[:half], [*cut[half:][::-1], None], strict=False) for one in pair if one is not None]


def hash_64(values: np.ndarray, *key: int) -> np.ndarray:
    """A bijection of 64-bit integers for each key: uint64 in, uint64 out, evenly spread.

    Source: splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state + np.uint64((part + _GAMMA) & _LOW_64))
    return _mix(values * np.uint64(_GAMMA) + state)


def uniform_draws(count: int, seed: int, epoch: int, image_id: int) -> list[float]:
    """`count` numbers in [0, 1) for the augmentation of one image in one epoch."""
    state = 0
    for part in (seed, epoch, _PIXELS, image_id):
        state = _mix_one((state + part + _GAMMA) & _LOW_64)
    return [(_mix_one((value * _GAMMA + state) & _LOW_64) >> 11) * 2.0**-53 for value in range(count)]


def _mix_one(z: int) -> int:
    """`_mix` of one number: for a few of them, Python's integers are faster than arrays."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _LOW_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _LOW_64
    return z ^ (z >> 31)


def _mix(z: np.ndarray) -> np.ndarray:
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
