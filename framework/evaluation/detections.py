"""From a model's predictions to the boxes it stands for: scores, labels, pixels, and COCO's result format.

# B image, K decoder layer, Q query, C class, T detection of an image, N of many
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from data_tools.sample import Category
from framework.boxes import cxcywh_to_xyxy
from framework.models.detector import Predictions

# COCO's result format as a record of an array: of a whole set that is a tenth of the time and memory of dictionaries.
# bbox: x, y, width, height in pixels of the original image. query: -1 where nobody recorded it.
COCO_RESULT = np.dtype(
    [("image_id", "i8"), ("category_id", "i8"), ("bbox", "f8", (4,)), ("score", "f8"), ("query", "i8")]
)


@dataclass(frozen=True)
class Detections:
    """What one image shows, highest score first, on the CPU.

    scores_T: float32 in [0, 1]. labels_T: int64, the model's class indices. queries_T: int64, who found it.
    boxes_xyxy_px_T4: float32 pixels of the original image; a box may stick out of it, as published.
    """

    scores_T: Tensor
    labels_T: Tensor
    boxes_xyxy_px_T4: Tensor
    queries_T: Tensor


def top_detections(
    predictions: Predictions,
    original_sizes_hw: Sequence[tuple[int, int]],
    classification: Literal["focal", "softmax"],
    limit: int = 100,
) -> list[Detections]:
    """The `limit` best detections of each image, read from the last decoder layer.

    Focal: every (query, class) pair is a candidate; a query may appear under several classes. Softmax: each
    query stands for its best class, no-object left out. Equal scores keep the order of the queries.

    Source: post-processing of Zhu et al. 2021 (top 100 of queries x classes) and of Carion et al. 2020.
    """
    boxes_BQ4 = predictions.boxes_KBQ4[-1].float()
    scores_BQC = class_scores(predictions.logits_KBQC[-1], classification)
    if classification == "focal":
        num_classes = scores_BQC.shape[-1]
        scores_BT, pair_BT = _best(scores_BQC.flatten(1), limit)
        query_BT, labels_BT = pair_BT // num_classes, pair_BT % num_classes
    else:
        scores_BQ, labels_BQ = scores_BQC.max(-1)
        scores_BT, query_BT = _best(scores_BQ, limit)
        labels_BT = labels_BQ.gather(1, query_BT)
    scale_B14 = boxes_BQ4.new_tensor([[w, h, w, h] for h, w in original_sizes_hw])[:, None]
    boxes_BT4 = cxcywh_to_xyxy(boxes_BQ4.gather(1, query_BT[..., None].expand(-1, -1, 4))) * scale_B14
    columns = (scores_BT.cpu(), labels_BT.cpu(), boxes_BT4.cpu(), query_BT.cpu())
    return [Detections(*one) for one in zip(*columns, strict=True)]


def class_scores(logits: Tensor, classification: Literal["focal", "softmax"]) -> Tensor:
    """The score (..., C) of each class, float32; no-object is left out."""
    return logits.float().sigmoid() if classification == "focal" else logits.float().softmax(-1)[..., :-1]


def _best(scores_BN: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    # A stable sort and not topk, whose order of equal scores differs between devices.
    scores_BN, index_BN = scores_BN.sort(dim=1, descending=True, stable=True)
    return scores_BN[:, :limit], index_BN[:, :limit]


def category_ids(classes: Sequence[Category], labels: str) -> dict[int, int]:
    """The COCO category id of each label, for `data.labels` = contiguous or category_id."""
    if labels == "category_id":
        return {c.category_id: c.category_id for c in classes}
    return {label: c.category_id for label, c in enumerate(classes)}


def to_coco(detections: Detections, image_id: int, ids: dict[int, int]) -> np.ndarray:
    """COCO_RESULT (T,) of an image.

    Left out: labels without a category (COCO's 91 logits hold 80 classes; cocoapi ignores them too), and
    numbers that are not finite, which a model that diverged puts out and JSON cannot hold.
    """
    scores_T, boxes_T4 = detections.scores_T.double().numpy(), detections.boxes_xyxy_px_T4.double().numpy()
    known_T = np.array([label in ids for label in detections.labels_T.tolist()], bool)
    kept = np.flatnonzero(known_T & np.isfinite(scores_T) & np.isfinite(boxes_T4).all(1))
    results_T = np.empty(len(kept), COCO_RESULT)
    results_T["image_id"] = image_id
    results_T["category_id"] = [ids[label] for label in detections.labels_T[kept].tolist()]
    results_T["bbox"][:, :2] = boxes_T4[kept, :2]
    results_T["bbox"][:, 2:] = boxes_T4[kept, 2:] - boxes_T4[kept, :2]
    results_T["score"] = scores_T[kept]
    results_T["query"] = detections.queries_T[kept]
    return results_T


def joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    """One array of COCO_RESULT of several, or of none."""
    return np.concatenate([np.empty(0, COCO_RESULT), *parts])


def from_rows(rows: Iterable[dict[str, Any]]) -> np.ndarray:
    """COCO_RESULT (N,) of rows as a file of COCO's results has them; other keys are not read, a query neither."""
    records = [(row["image_id"], row["category_id"], tuple(row["bbox"]), row["score"], -1) for row in rows]
    return np.array(records, COCO_RESULT)


def to_rows(results_N: np.ndarray) -> list[dict[str, Any]]:
    """COCO_RESULT as the rows of a file of COCO's results."""
    columns = [results_N[name].tolist() for name in COCO_RESULT.names or ()]
    return [dict(zip(COCO_RESULT.names or (), row, strict=True)) for row in zip(*columns, strict=True)]


def placeholder_classes(num_classes: int) -> list[Category]:
    """Classes for a model whose names nobody recorded: 'category 17' has COCO id 17."""
    return [Category(f"category {number}", number) for number in range(num_classes)]
