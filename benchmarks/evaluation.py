"""COCO's size of an evaluation without the model: 5000 images, 100 detections each, gathered from two processes.

    python -m benchmarks.evaluation

Drawn boxes, 36,000 in 80 classes, and detections near to them. What each part takes: from tensors to COCO's format
(each process its half), order and gathering, and the twelve numbers, which one process computes, with hotcoco and with
pycocotools.
Writes docs/results/evaluation.{json,md}.
"""

import argparse
import os
import statistics
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.results import write
from framework.engine.ranks import Ranks
from framework.evaluation import coco
from framework.evaluation.detections import Detections, joined, to_coco
from tests.distributed import run_ranks

IMAGES, DETECTIONS, BOXES, CLASSES, WORLD, TURNS = 5000, 100, 36_000, 80, 2, 3


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    runs = run_ranks(WORLD, evaluate_drawn)
    parts = {part: statistics.median(max(one[i][part] for one in runs) for i in range(TURNS)) for part in runs[0][0]}
    others = sum(parts.values()) - parts["hotcoco"] - parts["pycocotools"]
    result: dict[str, Any] = {"parts": [{"part": part, "s": s} for part, s in parts.items()]}
    result |= {f"in all, with {package}, s": others + parts[package] for package in ("hotcoco", "pycocotools")}
    result["load"] = os.getloadavg()[0]
    for key, value in result.items():
        print(key, value)
    write("evaluation", "Evaluation without the model", f"{IMAGES} images x {DETECTIONS} detections, {WORLD} processes",
          result, "python -m benchmarks.evaluation")  # fmt: skip
    return 0


def evaluate_drawn(ranks: Ranks) -> list[dict[str, float]]:
    truth, detections = drawn()
    mine = {image: one for image, one in detections.items() if image % ranks.world == ranks.rank}
    ids = {label: label for label in range(CLASSES)}
    times = []
    for _ in range(TURNS):
        ranks.barrier()
        clock = [time.perf_counter()]
        own_N = joined(to_coco(one, image, ids) for image, one in mine.items())
        clock.append(time.perf_counter())
        found_N, _ = coco.everywhere(ranks, own_N, [])
        clock.append(time.perf_counter())
        numbers = ranks.from_main(partial(coco.coco_metrics, truth, found_N, package="hotcoco"))
        clock.append(time.perf_counter())
        names = ("to COCO's format", "order and gathering", "hotcoco")
        times.append({name: clock[i + 1] - clock[i] for i, name in enumerate(names)})
    began = time.perf_counter()
    assert len(found_N) == IMAGES * DETECTIONS
    if ranks.is_main:  # once: it takes long
        assert numbers == coco.coco_metrics(truth, found_N, package="pycocotools")
    for one in times:
        one["pycocotools"] = time.perf_counter() - began
    return times


def drawn() -> tuple[dict[str, Any], dict[int, Detections]]:
    """Ground truth in COCO's format; of each image detections: its boxes, moved a little, and others."""
    rng = np.random.default_rng(0)
    xy, wh = rng.uniform(0, 500, (BOXES, 2)), rng.uniform(10, 140, (BOXES, 2))
    image, label = rng.integers(IMAGES, size=BOXES), rng.integers(CLASSES, size=BOXES)
    truth = {"images": [{"id": i} for i in range(IMAGES)], "categories": [{"id": i} for i in range(CLASSES)],
             "annotations": [{"image_id": int(image[i]), "category_id": int(label[i]), "bbox": [*xy[i], *wh[i]]}
                             for i in range(BOXES)]}  # fmt: skip
    detections = {}
    for i in range(IMAGES):
        own = np.flatnonzero(image == i)[:DETECTIONS]
        others = rng.integers(BOXES, size=DETECTIONS - len(own))
        from_box = np.concatenate([own, others])
        x1y1 = xy[from_box] + rng.normal(0, 4, (DETECTIONS, 2))
        boxes = np.concatenate([x1y1, x1y1 + wh[from_box]], axis=1).astype(np.float32)
        scores = -np.sort(-rng.uniform(0, 1, DETECTIONS)).astype(np.float32)
        detections[i] = Detections(*map(torch.from_numpy, (scores, label[from_box], boxes, from_box)))
    return truth, detections


if __name__ == "__main__":
    raise SystemExit(main())
