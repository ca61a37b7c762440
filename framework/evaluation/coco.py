"""COCO's twelve numbers: from files, from detections, and from a model over all ranks.

pycocotools is the measure. faster-coco-eval gives the same numbers about nine times faster and does the work
where it is installed; a test holds the two equal.
"""

import contextlib
import importlib.util
import io
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from framework.errors import InputError, UsageError
from framework.evaluation.detections import category_ids, to_coco, top_detections
from framework.models.detector import Predictions

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
MOST_DETECTIONS = (1, 10, 100)
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
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Predict every image of the loader and score the whole set; collective: every rank gets the same.

    Images are gathered by id and counted once, whatever another rank repeats; one that could not be read
    stays in the ground truth and has no detections.

    Args:
        predict: normalised images_B3HW and padding_mask_BHW (or None) on the rank's device -> Predictions.
        labels, classification: data.labels and model.classification.
        progress: is told the number of images of each batch done on this rank.
    Returns:
        METRICS -> value, and all detections in COCO's result format, in a fixed order.
    Raises:
        InputError: more unusable images than data.max_bad, on every rank.
    """
    ids = category_ids(loader.manifest.classes, labels)
    found: dict[int, list[dict[str, Any]]] = {}
    bad: list[str] = []
    for batch in loader:
        with torch.no_grad():
            predictions = predict(*batch.inputs(ranks.device))
        best = top_detections(predictions, batch.original_sizes_hw, classification, config.max_detections)
        for image_id, valid, one in zip(batch.image_ids, batch.targets.valid_B.tolist(), best, strict=True):
            found[image_id] = to_coco(one, image_id, ids) if valid else []
        for message in batch.bad:
            logger.warning("evaluation without %s", message)
        bad += batch.bad
        if progress is not None:
            progress.update(len(batch.image_ids))
    found, bad = everywhere(ranks, found, bad)
    if len(bad) > loader.config.max_bad:
        allowed = loader.config.max_bad
        raise InputError(f"{len(bad)} unusable images in the evaluation, data.max_bad is {allowed}: {bad[0]}")
    detections = in_order([one for image in found.values() for one in image])
    return coco_metrics(loader.ground_truth(), detections, config.image_side, ranks=ranks), detections


def everywhere(ranks: "Ranks", found: dict[int, Any], bad: list[str]) -> tuple[dict[int, Any], list[str]]:
    """What was found on all ranks, each image once, and each message."""
    parts = ranks.all_gather_objects((found, bad))
    images = {image_id: found for found, _ in parts for image_id, found in found.items()}
    return images, sorted({message for _, bad in parts for message in bad})


def in_order(detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Detections in an order that depends on nothing but themselves.

    cocoapi takes equal scores of one image and class as they come, which moves AP. Here the larger box comes
    first: so stand the ties of cocoapi's published example, and its numbers come out to the last digit.
    """

    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        area = one["bbox"][2] * one["bbox"][3]
        return one["image_id"], -one["score"], one["category_id"], -area, one["bbox"]

    return sorted(detections, key=key)


def area_ranges(image_side: int | None = None) -> dict[str, tuple[float, float]]:
    """Name -> (lowest, highest) area in px^2, in cocoapi's order; for images of `image_side` scaled to it."""
    scale = 1.0 if image_side is None else (image_side / COCO_SIDE) ** 2
    small, large, huge = SMALL_PX**2 * scale, LARGE_PX**2 * scale, HUGE_PX**2
    return {"all": (0.0, huge), "small": (0.0, small), "medium": (small, large), "large": (large, huge)}


def coco_metrics(
    ground_truth: dict[str, Any],
    detections: list[dict[str, Any]],
    image_side: int | None = None,
    *,
    package: str | None = None,
    ranks: "Ranks | None" = None,
) -> dict[str, float]:
    """COCO's twelve box numbers, 0 to 1, or -1 where the ground truth has no object of that kind.

    Args:
        ground_truth: COCO's annotation format; image sizes, segmentation and the annotations' own ids are not
            used, `area` is w * h and `iscrowd` 0 where missing.
        detections: COCO's result format, in any order, all of images of the ground truth; may be empty.
        image_side: see area_ranges.
        package: "pycocotools" or "faster_coco_eval"; by default the faster one where it is installed.
        ranks: share the categories among these, all of which call with the same and get the same numbers.
    """
    if package is None:
        package = "faster_coco_eval" if importlib.util.find_spec("faster_coco_eval") else "pycocotools"
    rank, world = (0, 1) if ranks is None else (ranks.rank, ranks.world)
    categories = sorted({category["id"] for category in ground_truth["categories"]})
    own, problem = None, None
    try:
        own = _of_categories(ground_truth, detections, categories[rank::world], image_side, package)
    except Exception as error:
        problem = error
    parts, problems = zip(
        *([(own, problem)] if ranks is None else ranks.all_gather_objects((own, problem))), strict=True
    )
    for one in filter(None, [problem, *problems]):
        raise one  # on all ranks, of which none waits for the others
    precision, recall = (np.full((*shape, len(categories), 4, 3), -1.0) for shape in ((10, 101), (10,)))
    for start, part in enumerate(parts):
        if part is not None:
            precision[:, :, start::world], recall[:, start::world] = part
    return {row[0]: _mean(precision if row[1] == "Precision" else recall[:, None], *row[2:]) for row in _ROWS}


def _of_categories(
    ground_truth: dict[str, Any], detections: list[dict[str, Any]], categories: list[int], image_side: int | None,
    package: str,
) -> tuple[np.ndarray, np.ndarray] | None:  # fmt: skip
    """Precision (T, R, K, A, M) and recall (T, K, A, M) of K categories, which do not depend on the others: T IoU
    thresholds, R recalls, A areas, M most detections; -1 where there are no objects. None: there are no categories."""
    if not categories:
        return None
    known = set(categories)
    coco_class, evaluator_class = _evaluator(package)
    shared = {"images": [{"id": image["id"]} for image in ground_truth["images"]],
              "categories": [{"id": category} for category in categories]}  # fmt: skip
    annotations = [one for one in ground_truth["annotations"] if one["category_id"] in known]
    found_here = [one for one in detections if one["category_id"] in known]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth, found = coco_class(), coco_class()
        truth.dataset = shared | {"annotations": _numbered(annotations, detected=False)}
        found.dataset = shared | {"annotations": _numbered(in_order(found_here), detected=True)}
        truth.createIndex()
        found.createIndex()
        evaluator = evaluator_class(truth, found, "bbox")
        evaluator.params.areaRng = [list(limits) for limits in area_ranges(image_side).values()]
        evaluator.evaluate()
        evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"])


def _mean(values_TRKAM: np.ndarray, iou: str, area: str, most: int) -> float:
    """Over thresholds, recalls and categories that have objects, as cocoapi's `summarize`; -1 where none has."""
    thresholds = slice(None) if ":" in iou else [round((float(iou) - 0.5) / 0.05)]
    of_area = values_TRKAM[thresholds, :, :, list(area_ranges()).index(area), MOST_DETECTIONS.index(most)]
    counted = of_area[of_area > -1]
    return float(np.mean(counted)) if len(counted) else -1.0


def _evaluator(package: str) -> tuple[Any, Any]:
    """The classes COCO and COCOeval of a package."""
    if package == "faster_coco_eval":
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def _numbered(boxes: Iterable[dict[str, Any]], *, detected: bool) -> list[dict[str, Any]]:
    """What cocoapi needs of each box, with ids from 1: it takes an annotation with id 0 for 'not matched'.

    An area or crowd flag of a detection's own counts nothing, as cocoapi reads results.
    """
    return [
        {
            "id": number,
            "image_id": box["image_id"],
            "category_id": box["category_id"],
            "bbox": (bbox := box["bbox"]),
            "area": bbox[2] * bbox[3] if detected or "area" not in box else box["area"],
            "iscrowd": 0 if detected else box.get("iscrowd", 0),
            "score": box["score"] if detected else 0.0,
        }
        for number, box in enumerate(boxes, 1)
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
