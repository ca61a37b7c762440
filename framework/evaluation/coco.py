"""COCO's twelve numbers: from detections, and from a model over all ranks.

pycocotools is the measure. hotcoco gives the same numbers many times faster and does the work where it is
installed; a test holds the two equal.

# N detection
"""

import contextlib
import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from framework.errors import InputError, UsageError
from framework.evaluation.detections import category_ids, joined, to_coco, top_detections
from framework.models.detector import Predictions
from framework.processes import without_collector

if TYPE_CHECKING:
    from framework.data.loader import EvalLoader
    from framework.engine.ranks import Ranks

_ROWS = (  # name, what, IoU thresholds, areas, most detections of an image: in cocoapi's order
    ("AP", "Precision", "0.50:0.95", "all", 100),
    ("AP50", "Precision", "0.50", "all", 100),
    ("AP75", "Precision", "0.75", "all", 100),
    ("APs", "Precision", "0.50:0.95", "small", 100),
    ("APm", "Precision", "0.50:0.95", "medium", 100),
    ("APl", "Precision", "0.50:0.95", "large", 100),
    ("AR1", "Recall", "0.50:0.95", "all", 1),
    ("AR10", "Recall", "0.50:0.95", "all", 10),
    ("AR100", "Recall", "0.50:0.95", "all", 100),
    ("ARs", "Recall", "0.50:0.95", "small", 100),
    ("ARm", "Recall", "0.50:0.95", "medium", 100),
    ("ARl", "Recall", "0.50:0.95", "large", 100),
)
METRICS = tuple(row[0] for row in _ROWS)
COCO_SIDE = 640  # the image side that COCO's size thresholds of 32 and 96 px belong to
SMALL_PX, LARGE_PX, HUGE_PX = 32.0, 96.0, 1e5

logger = logging.getLogger("tenfold")


@dataclass(frozen=True)
class EvalConfig:
    """When and how the validation set is evaluated.

    every: epochs between two evaluations, 0 for never. batch: images padded and predicted together; part of
    the result, since padding changes a prediction a little. image_side: scales the thresholds of small,
    medium and large for images of this side; null for COCO's own. max_detections: kept of each image.
    """

    every: int = 1
    batch: int = 1
    image_side: int | None = None
    max_detections: int = 100

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UsageError(f"eval.every is {self.every}, expected epochs of 1 or more, or 0 for never")
        if self.batch < 1:
            raise UsageError(f"eval.batch is {self.batch}, expected 1 or more")
        if self.image_side is not None and self.image_side < 1:
            raise UsageError(f"eval.image_side is {self.image_side}, expected pixels of 1 or more, or null")
        if not 1 <= self.max_detections <= 100:
            raise UsageError(f"eval.max_detections is {self.max_detections}, expected 1 to 100 (AR100 takes no more)")


class Progress(Protocol):
    def update(self, n: int = 1) -> Any: ...


def evaluate(
    predict: Callable[[Tensor, Tensor | None], Predictions],
    loader: "EvalLoader",
    *,
    ranks: "Ranks",
    config: EvalConfig,
    labels: str,
    classification: Literal["focal", "softmax"],
    progress: Progress | None = None,
) -> tuple[dict[str, float], np.ndarray]:
    """Predict every image of the loader and score the whole set; collective: every rank gets the same.

    Images are gathered by id and counted once, whatever another rank repeats; one that could not be read
    stays in the ground truth and has no detections.

    Args:
        predict: normalised images_B3HW and padding_mask_BHW (or None) on the rank's device -> Predictions.
        labels, classification: data.labels and model.classification.
        progress: is told the number of images of each batch done on this rank.
    Returns:
        METRICS -> value, and all detections, COCO_RESULT (N,), in order.
    Raises:
        InputError: more unusable images than data.max_bad, on every rank.
    """
    ids = category_ids(loader.manifest.classes, labels)
    found: dict[int, np.ndarray] = {}
    bad: list[str] = []
    for batch in loader:
        with torch.no_grad():
            predictions = predict(*batch.inputs(ranks.device))
        best = top_detections(predictions, batch.original_sizes_hw, classification, config.max_detections)
        for image_id, valid, one in zip(batch.image_ids, batch.targets.valid_B.tolist(), best, strict=True):
            if valid:
                found[image_id] = to_coco(one, image_id, ids)
        for message in batch.bad:
            logger.warning("evaluation without %s", message)
        bad += batch.bad
        if progress is not None:
            progress.update(len(batch.image_ids))
    detections_N, bad = everywhere(ranks, joined(found.values()), bad)
    if len(bad) > loader.config.max_bad:
        allowed = loader.config.max_bad
        raise InputError(f"{len(bad)} unusable images in the evaluation, data.max_bad is {allowed}: {bad[0]}")
    metrics = ranks.from_main(lambda: coco_metrics(loader.ground_truth(), detections_N, config.image_side))
    return metrics, detections_N


def everywhere(ranks: "Ranks", found_N: np.ndarray, bad: list[str]) -> tuple[np.ndarray, list[str]]:
    """What was found on all ranks, in order, and each message; of an image that several have seen, one's."""
    parts = ranks.all_gather_objects((in_order(found_N), bad))
    kept: list[np.ndarray] = []
    images = np.empty(0, np.int64)
    for found_N, _ in parts:
        kept.append(found_N[~np.isin(found_N["image_id"], images)])
        images = np.union1d(images, found_N["image_id"])
    together_N = joined(kept)
    by_image = np.argsort(together_N["image_id"], kind="stable")
    return together_N[by_image], sorted({message for _, bad in parts for message in bad})


def in_order(detections_N: np.ndarray) -> np.ndarray:
    """Detections by image, score and category, in an order that depends on nothing but themselves.

    cocoapi takes equal scores of one image and class as they come, which moves AP. Here the larger box comes
    first: so stand the ties of cocoapi's published example, and its numbers come out to the last digit.
    """
    x, y, w, h = detections_N["bbox"].T
    with np.errstate(over="ignore"):  # of a file's numbers
        area_N = w * h
    keys = (h, w, y, x, -area_N, detections_N["category_id"], -detections_N["score"], detections_N["image_id"])
    return detections_N[np.lexsort(keys)]


def area_ranges(image_side: int | None = None) -> dict[str, tuple[float, float]]:
    """Name -> (lowest, highest) area in px^2, in cocoapi's order; for images of `image_side` scaled to it."""
    scale = 1.0 if image_side is None else (image_side / COCO_SIDE) ** 2
    small, large, huge = SMALL_PX**2 * scale, LARGE_PX**2 * scale, HUGE_PX**2
    return {"all": (0.0, huge), "small": (0.0, small), "medium": (small, large), "large": (large, huge)}


def coco_metrics(
    ground_truth: dict[str, Any],
    detections_N: np.ndarray,
    image_side: int | None = None,
    *,
    package: str | None = None,
) -> dict[str, float]:
    """COCO's twelve box numbers, 0 to 1, or -1 where the ground truth has no object of that kind.

    Args:
        ground_truth: COCO's annotation format; image sizes, segmentation and the annotations' own ids are not
            used, `area` is w * h and `iscrowd` 0 where missing.
        detections_N: COCO_RESULT, in any order, all of images and categories of the ground truth; may be empty.
        image_side: see area_ranges.
        package: "pycocotools" or "hotcoco"; by default the faster one where it is installed.
    """
    if package is None:
        package = "hotcoco" if importlib.util.find_spec("hotcoco") else "pycocotools"
    coco_class, evaluator_class = _evaluator(package)
    images, categories = (
        np.unique(np.array([one["id"] for one in ground_truth[kind]], np.int64)) for kind in ("images", "categories")
    )
    shared = {
        "images": [{"id": place} for place in range(len(images))],
        "categories": [{"id": place, "name": str(place)} for place in range(len(categories))],
    }
    # Both packages print; hotcoco warns of sizes that are not COCO's, of which `table` tells.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), without_collector():
        warnings.filterwarnings("ignore", "hotcoco: area range bounds")
        truth, found = coco_class(), coco_class()
        truth.dataset = shared | {"annotations": _objects(ground_truth["annotations"], images, categories)}
        found.dataset = shared | {"annotations": _found(in_order(detections_N), images, categories)}
        truth.createIndex()
        found.createIndex()
        evaluator = evaluator_class(truth, found, "bbox")
        evaluator.params.areaRng = [list(limits) for limits in area_ranges(image_side).values()]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return {name: float(value) for name, value in zip(METRICS, evaluator.stats, strict=True)}


def _evaluator(package: str) -> tuple[Any, Any]:
    """The classes COCO and COCOeval of a package."""
    if package == "hotcoco":
        import hotcoco

        return hotcoco.COCO, hotcoco.COCOeval
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def _objects(annotations: list[dict[str, Any]], images: np.ndarray, categories: np.ndarray) -> list[dict[str, Any]]:
    """What cocoapi needs of each object: ids from 1, since it takes an annotation with id 0 for 'not matched', and of
    image and category their places, since hotcoco knows no negative ids."""
    image_of, category_of = ({one: place for place, one in enumerate(ids.tolist())} for ids in (images, categories))
    return [
        {
            "id": number,
            "image_id": image_of[one["image_id"]],
            "category_id": category_of[one["category_id"]],
            "bbox": (bbox := one["bbox"]),
            "area": one.get("area", bbox[2] * bbox[3]),
            "iscrowd": int(bool(one.get("iscrowd", 0))),
        }
        for number, one in enumerate(annotations, 1)
    ]


def _found(detections_N: np.ndarray, images: np.ndarray, categories: np.ndarray) -> list[dict[str, Any]]:
    """What cocoapi needs of each detection."""
    columns = [
        np.searchsorted(images, detections_N["image_id"]), np.searchsorted(categories, detections_N["category_id"]),
        detections_N["bbox"], detections_N["score"],
    ]  # fmt: skip
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": bbox,
            "area": bbox[2] * bbox[3],
            "iscrowd": 0,
            "score": score,
        }
        for number, (image, category, bbox, score) in enumerate(zip(*(c.tolist() for c in columns), strict=True), 1)
    ]


def size_thresholds(image_side: int | None) -> str:
    """One line that says what small, medium and large mean."""
    ranges = area_ranges(image_side)
    small_px, large_px = math.sqrt(ranges["small"][1]), math.sqrt(ranges["large"][0])
    limits = f"small < {small_px:g}^2 px, medium < {large_px:g}^2 px, large above"
    if image_side is None:
        return f"size thresholds of COCO: {limits}"
    scaling = f"({image_side} / {COCO_SIDE})^2"
    return f"size thresholds scaled by {scaling} to images of side {image_side} px: {limits}"


def table(metrics: dict[str, float], image_side: int | None) -> str:
    """The twelve numbers as cocoapi prints them, with their short names, and what the sizes mean."""
    line = "{:<6} Average {:<9} @[ IoU={:<9} | area={:>6s} | maxDets={:>3d} ] = {:0.3f}"
    return "\n".join([*(line.format(*row, metrics[row[0]]) for row in _ROWS), size_thresholds(image_side)])


def report(metrics: dict[str, float], image_side: int | None, **more: Any) -> dict[str, Any]:
    """The JSON of an evaluation: the twelve numbers, the size thresholds, and what else the caller knows."""
    areas = {name: limits for name, limits in area_ranges(image_side).items() if name != "all"}
    return dict(metrics) | {"image_side": image_side, "size_thresholds_px2": areas} | more
