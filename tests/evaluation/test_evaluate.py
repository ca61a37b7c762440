"""Evaluation over ranks: what one rank gives, to the last bit, whoever had which image."""

import numpy as np
import pytest
import torch

from data_tools.sample import Category
from framework.data.batch import IMAGENET_MEAN, IMAGENET_STD, Example, collate, masked_example
from framework.data.loader import DataConfig
from framework.engine.ranks import Ranks
from framework.errors import InputError
from framework.evaluation.coco import METRICS, EvalConfig, evaluate
from framework.evaluation.detections import to_rows
from framework.models.detector import Predictions
from tests.distributed import run_ranks

CLASSES = [Category("disc", 3), Category("ring", 7)]
SIDE = 64


class Loader:
    """`images` images, each rank the batches g with g % world == rank; `repeats` are seen by every rank."""

    def __init__(self, images, rank, world, batch_size=1, repeats=(), bad=(), max_bad=0):
        groups = [list(range(start, min(start + batch_size, images))) for start in range(0, images, batch_size)]
        self.groups = groups[rank::world] + [[image] for image in repeats]
        self.images, self.bad, self.config = images, bad, DataConfig(max_bad=max_bad)
        self.manifest = type("Manifest", (), {"classes": CLASSES, "images": images})

    def __iter__(self):
        for group in self.groups:
            yield collate([self.example(image) for image in group])

    def example(self, image):
        if image in self.bad:
            return masked_example(10 * image, (SIDE, SIDE), f"image {10 * image}")
        return Example(np.full((SIDE, SIDE, 3), image, np.uint8), 10 * image, (SIDE, SIDE))

    def ground_truth(self):
        boxes = [(image, k, truth_xywh(image, k)) for image in range(self.images) for k in range(3)]
        return {
            "images": [{"id": 10 * image} for image in range(self.images)],
            "categories": [{"id": c.category_id, "name": c.name} for c in CLASSES],
            "annotations": [
                {"id": n, "image_id": 10 * image, "category_id": CLASSES[k % 2].category_id, "bbox": box}
                for n, (image, k, box) in enumerate(boxes)
            ],
        }


def truth_xywh(image, k):
    return [4.0 + 2 * k, 3.0 + image, 6.0 + 9 * k, 12.0]


def predict(images_B3HW, mask_BHW):
    """Boxes near the truth, some wrong, decided by the content of the image alone; many equal scores."""
    logits, boxes = [], []
    pixels_B = images_B3HW[:, 0, 0, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    for image in pixels_B.mul(255).round().int().tolist():
        for k in range(3):
            x, y, w, h = truth_xywh(image, k)
            shift = (7 * image + 3 * k) % 5
            boxes.append([(x + w / 2 + shift) / SIDE, (y + h / 2) / SIDE, w / SIDE, h / SIDE])
            logits.append([2.0 - shift, -4.0] if (k + image // 3) % 2 == 0 else [-4.0, 1.0])
    count = len(images_B3HW)
    return Predictions(torch.tensor(logits).view(1, count, 3, 2), torch.tensor(boxes).view(1, count, 3, 4))


def run(loader, rank=0, world=1, progress=None):
    metrics, detections = evaluate(
        predict, loader, ranks=Ranks(rank, world, rank, torch.device("cpu")),
        config=EvalConfig(image_side=SIDE), labels="contiguous", classification="focal", progress=progress,
    )  # fmt: skip
    return metrics, to_rows(detections)


def test_one_rank_gives_numbers_worth_comparing():
    metrics, detections = run(Loader(7, 0, 1))
    assert set(metrics) == set(METRICS) and 0.1 < metrics["AP"] < metrics["AP50"] < 1
    assert {one["image_id"] for one in detections} == set(range(0, 70, 10))
    assert {one["category_id"] for one in detections} == {3, 7}


def test_an_image_seen_twice_counts_once():
    assert run(Loader(7, 0, 1, repeats=[2, 5, 5])) == run(Loader(7, 0, 1))


def test_an_unreadable_image_is_missed_and_said(caplog, monkeypatch):
    monkeypatch.setattr("framework.evaluation.coco.logger.propagate", True)
    metrics, detections = run(Loader(7, 0, 1, bad=[4], max_bad=1))
    assert 40 not in {one["image_id"] for one in detections}
    assert metrics["AR100"] < run(Loader(7, 0, 1))[0]["AR100"]
    assert "evaluation without image 40" in caplog.text


def test_too_many_unreadable_images_are_an_error():
    with pytest.raises(InputError, match="2 unusable images in the evaluation, data.max_bad is 1: image 20"):
        run(Loader(7, 0, 1, bad=[4, 2], max_bad=1))


def test_progress_counts_images():
    class Bar:
        n = 0

        def update(self, n=1):
            self.n += n

    bar = Bar()
    run(Loader(7, 0, 1, batch_size=2), progress=bar)
    assert bar.n == 7


@pytest.mark.parametrize("images, batch_size, repeats", [(7, 2, [3]), (1, 1, [])], ids=["uneven", "one rank has none"])
def test_two_processes_equal_one(images, batch_size, repeats):
    expected = run(Loader(images, 0, 1, batch_size))
    assert run_ranks(2, evaluated, images, batch_size, repeats) == [expected] * 2


def test_an_error_of_the_numbers_is_raised_on_all():
    assert run_ranks(2, evaluated_without_boxes) == ["KeyError: 'bbox'"] * 2


def evaluated_without_boxes(ranks):
    loader = Loader(3, ranks.rank, ranks.world)
    truth = loader.ground_truth()
    del truth["annotations"][0]["bbox"]
    loader.ground_truth = lambda: truth
    with pytest.raises(KeyError) as raised:
        run(loader, ranks.rank, ranks.world)
    return f"KeyError: {raised.value}"


def evaluated(ranks, images, batch_size, repeats):
    return run(Loader(images, ranks.rank, ranks.world, batch_size, repeats), ranks.rank, ranks.world)
