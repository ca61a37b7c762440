import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from framework.data import loader as loader_module
from framework.data.batch import Batch, images_in
from framework.data.loader import DataConfig, EvalLoader, TrainLoader, dead_workers_told
from framework.data.loader import _training_plan as training_plan
from framework.data.order import MASKED, DataState, epoch_order, steps_per_epoch
from framework.errors import InputError, UsageError
from tests.data.conftest import NUM_IMAGES
from tests.data.shards import make_sample, overwrite, shard_of, write_shards

SMALL = dict(sizes=[48, 64, 80], max_size=120, crop_resize=[50, 60], crop_sizes=[32, 55])


def train_loader(folder, rank=0, world=1, seed=5, global_batch=8, micro_batch=2, workers=0, **config) -> TrainLoader:
    settings = DataConfig(train=str(folder), workers=workers, **SMALL | config)
    sizes = dict(global_batch=global_batch, micro_batch=micro_batch)
    return TrainLoader(settings, seed=seed, rank=rank, world=world, **sizes)


def digest(batch: Batch) -> str:
    """A few characters that stand for every bit of a batch."""
    targets = batch.targets
    tensors = (batch.pixels_P, targets.labels_N, targets.boxes_cxcywh_N4, targets.valid_B)
    rest = (batch.sizes_hw, batch.original_sizes_hw, batch.image_ids, targets.counts_B, batch.bad)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors) + repr(rest).encode()).hexdigest()[:12]


def digests(loader: TrainLoader, epoch: int = 0, first_step: int = 0) -> list[list[str]]:
    return [[digest(batch) for batch in step] for step in loader.epoch(epoch, first_step)]


def image_ids(loader: TrainLoader, epoch: int = 0) -> list[int]:
    return [i for step in loader.epoch(epoch) for batch in step for i in batch.image_ids]


@pytest.fixture
def damaged(shards, tmp_path):
    """Of 23 samples four bad ones: changed image or JSON; no image or no JSON, but with the right crc."""
    folder = shutil.copytree(shards, tmp_path / "damaged")
    overwrite(folder, 3, "image", b"\x00\x00", fix_crc=False)
    overwrite(folder, 8, "json", b"\x00\x00", fix_crc=False)
    overwrite(folder, 15, "image", b"nothing that Pillow knows", fix_crc=True)
    overwrite(folder, 22, "json", b"nonsense", fix_crc=True)
    return folder


BAD_IDS = {1003, 1008, 1015, 1022}


# Configuration


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(labels="coco"), r"data.labels: found coco; expected contiguous or category_id"),
        (dict(order="random"), r"data.order: found random; expected full or block"),
        (dict(tail="pad"), r"data.tail: found pad; expected drop or mask"),
        (dict(workers=-1), r"data.workers: found -1; expected 0 or more"),
        (dict(max_bad=-1), r"data.max_bad: found -1; expected 0 or more"),
        (dict(sizes=[]), r"data.sizes: found \[\]; expected one or more short sides"),
        (dict(sizes=[0, 480]), r"data.sizes: found \[0, 480\]"),
        (dict(sizes=[480, 800], max_size=700), r"data.max_size, data.sizes: found 700, \[480, 800\]"),
        (dict(crop_resize=[0]), r"data.crop_resize: found \[0\]; expected .* or \[\] for no crop"),
        (dict(crop_sizes=[384]), r"data.crop_sizes: found \[384\]; expected the least and the largest side"),
        (dict(crop_sizes=[600, 384]), r"data.crop_sizes: found \[600, 384\]"),
        (dict(crop_sizes=[0, 384]), r"data.crop_sizes: found \[0, 384\]"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(UsageError, match=message):
        DataConfig(**setting)


def test_config_defaults_are_published_and_fit_omegaconf():
    config = OmegaConf.to_object(OmegaConf.structured(DataConfig))
    assert config == DataConfig()
    assert config.sizes == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert (config.max_size, config.crop_resize, config.crop_sizes) == (1333, [400, 500, 600], [384, 600])
    names = {field.name for field in fields(DataConfig)}
    assert {"train", "val", "labels", "order", "tail", "workers", "max_bad", "sizes", "max_size"} <= names


def test_training_without_data_or_whole_micro_batches_is_refused(shards, tmp_path):
    with pytest.raises(UsageError, match=r"data.train: found null; expected a shard folder"):
        TrainLoader(DataConfig(), seed=0, global_batch=2, micro_batch=2, rank=0, world=1)
    for global_batch, micro_batch, world in ((8, 3, 1), (8, 2, 3), (0, 2, 1), (8, 0, 1), (-8, 2, 1)):
        message = rf"train.global_batch, train.micro_batch: found {global_batch}, {micro_batch} on {world} ranks"
        with pytest.raises(UsageError, match=message):
            train_loader(shards, world=world, global_batch=global_batch, micro_batch=micro_batch)


def test_too_few_images_are_refused(shards, tmp_path):
    empty = write_shards(tmp_path / "empty", [])
    with pytest.raises(InputError, match=r"empty: holds no images; expected at least one"):
        train_loader(empty, tail="mask")
    with pytest.raises(InputError, match=r"holds 23 images, too few for a step of train.global_batch=24; .*tail=mask"):
        train_loader(shards, global_batch=24)
    assert train_loader(shards, global_batch=24, tail="mask").steps_per_epoch == 1
    with pytest.raises(InputError, match=r"empty: holds no images"):
        EvalLoader(empty, DataConfig(), batch_size=1, rank=0, world=1)


# Training


@pytest.mark.parametrize("order", ["full", "block"])
def test_an_epoch_is_every_image_once_over_the_ranks(shards, order):
    for tail, steps, tail_slots in (("drop", 2, 0), ("mask", 3, 1)):
        loaders = [train_loader(shards, rank, world=2, order=order, tail=tail) for rank in range(2)]
        assert [loader.steps_per_epoch for loader in loaders] == [steps, steps]
        ids = [image_ids(loader) for loader in loaders]
        assert [len(part) for part in ids] == [steps * 4] * 2
        found = [i for part in ids for i in part if i != -1]
        assert len(found) == len(set(found)) == steps * 8 - tail_slots
        assert set(found) <= set(range(1000, 1000 + NUM_IMAGES))


def test_images_of_alike_shapes_share_micro_batches(shards):
    """As they are after augmentation, which crops half of them; and each is in the same step as without it."""
    loaders = [train_loader(shards, global_batch=16, group_by_shape=grouped) for grouped in (True, False)]
    by_shape, as_they_come = ([batch for batch in next(loader.epoch(0))] for loader in loaders)
    masks = [[batch.inputs("cpu")[1] for batch in step] for step in (by_shape, as_they_come)]
    padding = [sum(mask.sum().item() for mask in step if mask is not None) for step in masks]
    assert 0 < padding[0] < 0.6 * padding[1]
    assert sorted(i for b in by_shape for i in b.image_ids) == sorted(i for b in as_they_come for i in b.image_ids)
    ranks = [next(train_loader(shards, rank, 4, global_batch=16, group_by_shape=True).epoch(0)) for rank in range(4)]
    assert [digest(batch) for step in ranks for batch in step] == [digest(batch) for batch in by_shape]


def test_tail_slots_are_masked_without_a_message(shards):
    *_, last = train_loader(shards, tail="mask").epoch(0)
    batch = last[-1]
    assert batch.image_ids[-1] == -1 and batch.bad == []
    assert batch.targets.valid_B.tolist() == [True, False] and batch.targets.counts_B[-1] == 0
    assert batch.sizes_hw[-1] == (32, 32) and not images_in(batch.pixels_P, batch.sizes_hw)[-1].any()


@pytest.mark.filterwarnings("ignore:This DataLoader will create . worker processes")
def test_the_same_batches_for_any_number_of_workers(shards):
    expected = digests(train_loader(shards, tail="mask"))
    assert len(expected) == 3 and all(len(step) == 4 for step in expected)
    for workers in (1, 4, 8):
        assert digests(train_loader(shards, workers=workers, tail="mask")) == expected


@pytest.mark.parametrize("world", [2, 4])
def test_the_same_batches_for_any_number_of_ranks(shards, world):
    expected = digests(train_loader(shards, tail="mask"))
    ranks = [digests(train_loader(shards, rank, world, tail="mask")) for rank in range(world)]
    assert [[micro for rank in ranks for micro in rank[step]] for step in range(3)] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_epoch_is_the_rest_of_the_uninterrupted_one(shards, workers):
    expected = digests(train_loader(shards, tail="mask"), epoch=4)
    for first_step in (1, 2, 3):
        found = digests(train_loader(shards, workers=workers, tail="mask"), epoch=4, first_step=first_step)
        assert found == expected[first_step:]


def test_killed_anywhere_and_resumed_on_any_number_of_ranks():
    """200 trials over more than two epochs: what is trained on before and after is what an uninterrupted run takes.

    In integers: the plans that the loaders follow, of every rank, with what the checkpoint keeps.
    """
    draw = np.random.default_rng(0)
    for _ in range(200):
        micro_batch, accumulated, images = (int(draw.integers(1, most)) for most in (5, 4, 100))
        worlds = [int(world) for world in 2 ** draw.integers(0, 7, size=2)]
        global_batch = micro_batch * accumulated * max(worlds)
        images += global_batch
        mode, tail = draw.choice([("full", "drop"), ("block", "mask"), ("full", "mask")])
        sizes_hw = draw.integers(30, 100, (images, 2))
        size_hw_of = draw.choice([None, lambda i, sizes_hw=sizes_hw: (32, 32) if i == MASKED else tuple(sizes_hw[i])])
        per_epoch, shard_N = steps_per_epoch(images, global_batch, tail), np.sort(draw.integers(0, 9, images))

        def train(state, world, steps, micro_batch=micro_batch, mode=mode, per_epoch=per_epoch, shard_N=shard_N,
                  size_hw_of=size_hw_of):  # fmt: skip
            """The micro-batches of each step from `state` on, and the state after them."""
            done = []
            for _ in range(steps):
                if not done or state.samples_consumed == 0:
                    order = epoch_order(len(shard_N), state.seed, state.epoch, mode, shard_N)
                first, sizes = state.samples_consumed // state.global_batch, (state.global_batch, micro_batch)
                steps_of = [training_plan(order, range(first, first + 1), *sizes, rank, world, size_hw_of)
                            for rank in range(world)]  # fmt: skip
                done.append([micro.tolist() for plan in steps_of for micro in plan])
                state = replace(state, samples_consumed=state.samples_consumed + state.global_batch)
                if first + 1 == per_epoch:
                    state = replace(state, epoch=state.epoch + 1, samples_consumed=0)
            return done, state

        begin, total = DataState("", int(draw.integers(1 << 40)), 0, 0, global_batch), 2 * per_epoch + 1
        killed_at = int(draw.integers(0, total + 1))
        before, state = train(begin, worlds[0], killed_at)
        after, _ = train(DataState(**json.loads(json.dumps(asdict(state)))), worlds[1], total - killed_at)
        assert before + after == train(begin, 1, total)[0]
        epoch = [i for step in (before + after)[:per_epoch] for micro in step for i in micro if i != MASKED]
        assert len(epoch) == len(set(epoch)) == (images if tail == "mask" else per_epoch * global_batch)


def test_epochs_and_seeds_differ_and_repeat(shards):
    assert digests(train_loader(shards), epoch=1) == digests(train_loader(shards), epoch=1)
    assert image_ids(train_loader(shards), epoch=1) != image_ids(train_loader(shards), epoch=2)
    assert image_ids(train_loader(shards), epoch=1) != image_ids(train_loader(shards, seed=6), epoch=1)


def test_pixels_depend_on_epoch_and_image_alone(shards):
    def pixels(epoch, **loader):
        found = {}
        for step in train_loader(shards, tail="mask", **loader).epoch(epoch):
            for batch in step:
                for image, image_id in zip(images_in(batch.pixels_P, batch.sizes_hw), batch.image_ids, strict=True):
                    found[image_id] = hashlib.sha256(image.numpy().tobytes()).digest()
        return found

    expected = pixels(0)
    # Other neighbours, other padding, another process: the same pixels.
    assert pixels(0, micro_batch=3, global_batch=9, order="block", workers=2) == expected
    other_epoch = pixels(1)
    assert sum(other_epoch[i] != expected[i] for i in range(1000, 1000 + NUM_IMAGES)) > NUM_IMAGES // 2


def test_labels_follow_the_setting(shards):
    def labels(kind):
        return torch.cat([b.targets.labels_N for step in train_loader(shards, labels=kind).epoch(0) for b in step])

    contiguous, category_ids = labels("contiguous"), labels("category_id")
    assert contiguous.numel() > 5
    assert torch.equal(torch.tensor([3, 7, 90])[contiguous], category_ids)


def test_loading_leaves_the_global_random_state_alone(shards):
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(train_loader(shards, workers=workers).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


# Bad samples


def test_bad_samples_are_masked_and_named_on_any_rank(damaged):
    batches = [b for step in train_loader(damaged, tail="mask").epoch(0) for b in step]
    masked = {}
    for batch in batches:
        for b, image_id in enumerate(batch.image_ids):
            if not batch.targets.valid_B[b]:
                masked[image_id] = (
                    images_in(batch.pixels_P, batch.sizes_hw)[b].any().item(),
                    batch.sizes_hw[b],
                    batch.targets.counts_B[b],
                )
    assert masked == dict.fromkeys(BAD_IDS | {-1}, (False, (32, 32), 0))
    messages = sorted(message for batch in batches for message in batch.bad)
    assert [message.partition(" in ")[0] for message in messages] == [f"image {i}" for i in sorted(BAD_IDS)]
    for message, shard, reason in zip(
        messages,
        (shard_of(damaged, i) for i in (3, 8, 15, 22)),
        ("crc32 of the index", "crc32 of the index", "not a readable image", "not a sample's JSON"),
        strict=True,
    ):
        assert f"{shard} at offset " in message and reason in message
    alone = [[digest(batch) for batch in batches[start : start + 4]] for start in range(0, 12, 4)]
    ranks = [digests(train_loader(damaged, rank, 2, workers=1, tail="mask")) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == alone


def test_bad_image_stays_in_the_ground_truth(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "copy")
    overwrite(folder, 3, "image", b"\x00\x00", fix_crc=False)
    loader = EvalLoader(folder, DataConfig(**SMALL, workers=0), batch_size=4, rank=0, world=1)
    first = next(iter(loader))
    assert first.image_ids == [1000, 1001, 1002, 1003]
    assert first.targets.valid_B.tolist() == [True, True, True, False]
    assert len(first.bad) == 1 and "image 1003 in" in first.bad[0]
    assert first.original_sizes_hw[3] == (49, 60)
    truth = loader.ground_truth()
    assert [image["id"] for image in truth["images"]] == list(range(1000, 1000 + NUM_IMAGES))
    assert sum(annotation["image_id"] == 1003 for annotation in truth["annotations"]) == 3


# Evaluation


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_sees_every_image_once_in_fixed_groups(shards, world, batch_size):
    config = DataConfig(**SMALL, workers=0, labels="category_id")
    groups = []
    for rank in range(world):
        loader = EvalLoader(shards, config, batch_size=batch_size, rank=rank, world=world)
        found = [tuple(batch.image_ids) for batch in loader]
        assert len(loader) == len(found)
        groups += found
    in_order = [1000 + i for i in range(NUM_IMAGES)]
    assert sorted(groups) == [tuple(in_order[i : i + batch_size]) for i in range(0, NUM_IMAGES, batch_size)]


def test_ranks_without_images_end(shards):
    config = DataConfig(**SMALL, workers=1)
    loader = EvalLoader(shards, config, batch_size=16, rank=2, world=3)
    assert len(loader) == 0 and list(loader) == []


def test_evaluation_images_are_resized_only(shards):
    loader = EvalLoader(shards, DataConfig(**SMALL, workers=0), batch_size=1, rank=0, world=1)
    batch = next(batch for batch in loader if batch.image_ids == [1001])
    image, sample = make_sample(1001, boxes=1, height=43, width=60)
    assert batch.original_sizes_hw == [(43, 60)] and batch.sizes_hw == [(80, 111)]
    x1, y1, x2, y2 = sample.boxes_xyxy_px[0]
    expected = [(x1 + x2) / 120, (y1 + y2) / 86, (x2 - x1) / 60, (y2 - y1) / 43]
    assert batch.targets.boxes_cxcywh_N4[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_ground_truth_is_coco(shards):
    truth = EvalLoader(shards, DataConfig(), batch_size=2, rank=1, world=2).ground_truth()
    assert truth["categories"] == [
        {"id": 3, "name": "fish"}, {"id": 7, "name": "starfish"}, {"id": 90, "name": "stingray"}
    ]  # fmt: skip
    assert truth["images"][3] == {"id": 1003, "file_name": "1003.jpg", "height": 49, "width": 60}
    assert [a["id"] for a in truth["annotations"]] == list(range(1, 1 + len(truth["annotations"])))
    _, sample = make_sample(1003, boxes=3, height=49, width=60)
    crowd = [a for a in truth["annotations"] if a["image_id"] == 1003][2]
    x1, y1, x2, y2 = sample.boxes_xyxy_px[2]
    assert crowd["bbox"] == [x1, y1, x2 - x1, y2 - y1] and crowd["iscrowd"] == 1
    assert (crowd["category_id"], crowd["area"]) == (sample.category_ids[2], sample.areas[2])


# Worker processes


def workers_now() -> list:
    return multiprocessing.active_children()


def test_workers_are_deaf_to_schedulers_and_obey_their_parent(shards, monkeypatch):
    def start_worker(*arguments):
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()  # as torch does, where it has several
        start(*arguments)

    start = loader_module._start_worker
    monkeypatch.setattr(loader_module, "_start_worker", start_worker)
    steps = train_loader(shards, workers=2, global_batch=2, micro_batch=1).epoch(0)
    next(steps)
    workers = workers_now()
    assert len(workers) == 2
    pids = " ".join(str(worker.pid) for worker in workers)
    for name in ("INT", "TERM", "USR2"):  # many, so that each thread gets one
        subprocess.run(f"for i in $(seq 100); do kill -{name} {pids}; done", shell=True, check=True)
    assert len([batch for step in steps for batch in step]) == 2 * 10
    assert np.all([not worker.is_alive() for worker in workers])

    steps = train_loader(shards, workers=1, global_batch=2, micro_batch=1).epoch(0)
    next(steps)
    (worker,) = workers_now()
    worker.terminate()  # what Python does to what is left when the training process fails
    worker.join(timeout=10)
    assert worker.exitcode == 0


@pytest.mark.parametrize("stage", ["read", "decode"])
def test_a_worker_that_dies_is_told_with_its_sample(shards, stage, monkeypatch):
    def killed(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    if stage == "read":
        monkeypatch.setattr(loader_module.IndexedSource, "read", killed)
    else:
        monkeypatch.setattr(loader_module, "augment", killed)
    said = r"^a data worker has died; last worked on: image 10\d\d in .*/shard-\d+.tar at offset \d+.* data.workers$"
    with pytest.raises(InputError, match=said):
        list(train_loader(shards, workers=2).epoch(0))


def test_a_worker_that_dies_while_the_step_is_computed_is_told_too(shards):
    """torch raises where the main thread is: in most of the time of a run not where it waits for data."""
    steps = train_loader(shards, workers=1, global_batch=2, micro_batch=1).epoch(0)
    said = r"^a data worker has died; last worked on: .*Killed.* lower data.workers$"
    with pytest.raises(InputError, match=said), dead_workers_told():
        next(steps)
        os.kill(workers_now()[0].pid, signal.SIGKILL)
        for _ in range(1000):
            time.sleep(0.01)


def test_leaving_an_epoch_ends_its_workers(shards):
    steps = train_loader(shards, workers=2).epoch(0)
    next(steps)
    assert len(workers_now()) == 2
    steps.close()
    assert workers_now() == []
