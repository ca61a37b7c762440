"""Which query explains which target: the assignment of least total cost, per decoder layer and image.

# B image, K decoder layer, Q query, C class, N target boxes of the batch, concatenated
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from framework.boxes import cxcywh_to_xyxy, generalized_iou
from framework.data.batch import Targets
from framework.errors import UsageError
from ops.assignment import assign


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms, in the loss and in the matching. Defaults: Zhu et al. 2021 (DETR: class_weight 1).

    auxiliary: every decoder layer has losses of its own; false: the last one only.
    """

    class_weight: float = 2.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    no_object_weight: float = 0.1  # of the no-object class under softmax
    auxiliary: bool = True

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if not value >= 0:
                raise UsageError(f"loss.{key}: found {value}, expected at least 0")


class TooManyBoxes(ValueError):
    """An image has more target boxes than the model has queries."""


@dataclass
class Stage:
    """Predictions to be matched: logits (K, B, Q, C), boxes (K, B, Q, 4) in cxcywh fractions, and their targets."""

    logits_KBQC: Tensor
    boxes_KBQ4: Tensor
    targets: Targets


@torch.no_grad()
def match(stage: Stage, *, classification: Literal["focal", "softmax"], config: LossConfig) -> Tensor:
    """Assign each target box to one query at least total cost, per layer and image. On a GPU nothing waits for it.

    Returns:
        query_KN: int64 on the device of the logits; in layer k, query query_KN[k, n] explains target n. -1 for all
        targets of an image some of whose costs are not finite.
    Raises:
        TooManyBoxes: an image has more targets than there are queries.
    Source: Carion et al. 2020, section 3.1; focal class cost of Zhu et al. 2021.
    """
    queries = stage.logits_KBQC.shape[2]
    for image, count in enumerate(stage.targets.counts_B):
        if count > queries:
            raise TooManyBoxes(
                f"image {image} of the batch has {count} boxes and the model {queries} queries: raise model.num_queries"
            )
    return assign(pair_costs(stage, classification, config), stage.targets.image_N, stage.targets.counts_B)


def pair_costs(stage: Stage, classification: str, config: LossConfig) -> Tensor:
    """Cost of explaining target n by query q of its own image: (K, N, Q). No pair crosses images."""
    targets, image_N = stage.targets, stage.targets.image_N
    if classification == "focal":
        class_KNQ = _focal_cost(stage.logits_KBQC[:, image_N, :, targets.labels_N].permute(1, 0, 2), config)
    else:
        class_KNQ = -stage.logits_KBQC.softmax(-1)[:, image_N, :, targets.labels_N].permute(1, 0, 2)
    predicted_KNQ4 = stage.boxes_KBQ4[:, image_N]
    wanted_N14 = targets.boxes_cxcywh_N4[:, None]
    box_KNQ = (predicted_KNQ4 - wanted_N14).abs().sum(-1)
    giou_KNQ = generalized_iou(cxcywh_to_xyxy(predicted_KNQ4), cxcywh_to_xyxy(wanted_N14))
    return config.class_weight * class_KNQ + config.box_weight * box_KNQ - config.giou_weight * giou_KNQ


def _focal_cost(logits: Tensor, config: LossConfig) -> Tensor:
    """What the focal loss of this logit falls by when its target turns from 0 to 1, with the published 1e-8."""
    p, alpha, gamma = logits.sigmoid(), config.focal_alpha, config.focal_gamma
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return positive - negative
