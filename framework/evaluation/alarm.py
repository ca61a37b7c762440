"""An AP near 0 that should not be: said in the log, with what the detections show of its causes.

# N box of the ground truth, T detection, both of one image
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask

FALLEN, NOTEWORTHY = 0.5, 0.02  # below half of a best AP that was worth something
FLOOR = 0.002
IMAGES_TO_LEARN = {"deformable": 60_000, "dense": 600_000}  # DETR has a long floor, see docs/convergence.md
LOOKED_AT = 200  # images
BEST = 10  # detections of each


def collapse(
    ap: float, best_ap: float, images_seen: int, attention: str, ground_truth: Callable[[], dict[str, Any]],
    detections: Callable[[], Sequence[dict[str, Any]]],
) -> list[str]:  # fmt: skip
    """What is wrong, and then its likely causes; nothing where AP is what it may be.

    Args:
        best_ap: of the evaluations before this one, 0 if there was none.
        attention: model.attention.
        ground_truth, detections: in COCO's formats, read when there is something to say.
    """
    if best_ap >= NOTEWORTHY and ap < FALLEN * best_ap:
        trouble = f"AP has fallen from {best_ap:.3f} to {ap:.3f}"
    elif 0 <= ap < FLOOR and images_seen >= IMAGES_TO_LEARN[attention]:  # -1: there are no boxes to find
        trouble = (
            f"AP is {ap:.4f} after {images_seen} images, by which {attention} attention has usually learnt something"
        )
    else:
        return []
    return [trouble, *(causes(ground_truth(), detections()) or ["nothing in the detections says why"])]


def causes(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]]) -> list[str]:
    wanted, found = by_image(ground_truth["annotations"]), by_image(detections)
    images = {one["id"]: one for one in ground_truth["images"]}
    chosen = [image for image in wanted if image in found][:LOOKED_AT]
    best = {i: sorted(found[i], key=lambda d: -d["score"])[:BEST] for i in chosen}
    scores = [d["score"] for one in best.values() for d in one]
    said = []
    if not scores:
        return ["there are no detections: weights or images are not finite, or no label has a category (data.labels)"]
    if max(scores) < 0.05:
        said.append(f"no score is above {max(scores):.3f}: everything is background; too few steps yet, or optim.lr is "
                    "too high for the global batch (2e-4 is for 32 images)")  # fmt: skip
    if spread(best, images) < 0.02:
        said.append("the best boxes of an image are all alike: the queries have collapsed into one; lower optim.lr or "
                    "optim.clip_norm, or add optim.warmup_steps")  # fmt: skip
    classes = {a["category_id"] for a in ground_truth["annotations"]}
    predicted = {d["category_id"] for one in best.values() for d in one}
    if len(classes) > 2 and len(predicted) == 1:
        said.append(f"only category {predicted.pop()} is predicted, of {len(classes)} in the ground truth")
    located, named = recalls(wanted, best)
    if located > 0.3 and named < located / 4:
        said.append(
            f"{located:.0%} of the boxes are found, {named:.0%} with their class: the labels of training and "
            "of evaluation are not the same; compare data.train's classes with data.val's, and data.labels"
        )
    return said


def by_image(records: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    images: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        images[record["image_id"]].append(record)
    return images


def spread(best: dict[int, list[dict[str, Any]]], images: dict[int, dict[str, Any]]) -> float:
    """How far the best boxes of an image are apart, as a fraction of it, in the mean over images."""
    spreads = []
    for image, detections in best.items():
        sides = [images[image]["width"], images[image]["height"]] * 2
        if len(detections) > 1:
            spreads.append((np.array([d["bbox"] for d in detections]) / sides).std(0).mean())
    return float(np.mean(spreads)) if spreads else 1.0


def recalls(wanted: dict[int, list[dict[str, Any]]], best: dict[int, list[dict[str, Any]]]) -> tuple[float, float]:
    """The shares of boxes that a detection covers by an IoU of 0.5: of any class, of their own."""
    located = named = total = 0
    for image, detections in best.items():
        boxes = ([one["bbox"] for one in detections], [one["bbox"] for one in wanted[image]])
        covers_TN = np.asarray(mask.iou(*boxes, [0] * len(boxes[1]))) >= 0.5
        of_T, of_N = (np.array([one["category_id"] for one in records]) for records in (detections, wanted[image]))
        located += int(covers_TN.any(0).sum())
        named += int((covers_TN & (of_T[:, None] == of_N)).any(0).sum())
        total += len(of_N)
    return located / max(1, total), named / max(1, total)
