"""Which query explains which target: the assignment of least total cost, per decoder layer and image.

# B image, K decoder layer, Q query, C class, N target boxes of the batch, concatenated
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from framework.boxes import cxcywh_to_xyxy, generalized_iou
from framework.data.batch import Targets
from framework.errors import UsageError


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
    """Predictions to be matched: logits (K, B, Q, C), boxes (K, B, Q, 4) in cxcywh fractions, and their targets.

    name: what its K layers are called in messages.
    """

    name: str
    logits_KBQC: Tensor
    boxes_KBQ4: Tensor
    targets: Targets


@torch.no_grad()
def match(stages: Sequence[Stage], *, classification: Literal["focal", "softmax"], config: LossConfig) -> list[Tensor]:
    """Assign each target box to one query at least total cost, per stage, layer and image.

    All costs come to the host in one copy.

    Returns:
        For each stage query_KN: int64 on the device of the logits; in layer k, query query_KN[k, n] explains target n.
    Raises:
        TooManyBoxes: an image has more targets than there are queries.
        FloatingPointError: a cost is not finite; names the layer and the image.
    Source: Carion et al. 2020, section 3.1; focal class cost of Zhu et al. 2021.
    """
    for stage in stages:
        queries = stage.logits_KBQC.shape[2]
        for image, count in enumerate(stage.targets.counts_B):
            if count > queries:
                raise TooManyBoxes(
                    f"image {image} of the batch has {count} boxes and the model {queries} queries: raise "
                    "model.num_queries"
                )
    costs = [pair_costs(stage, classification, config) for stage in stages]
    device = stages[0].logits_KBQC.device
    return [
        _on_device(_assign(stage, cost_KNQ.numpy()), device)
        for stage, cost_KNQ in zip(stages, on_host(costs), strict=True)
    ]


def on_host(costs: Sequence[Tensor]) -> list[Tensor]:
    """The same in one copy, the only thing of a step's forward and backward that the processor waits for."""
    copied = torch.cat([cost.flatten() for cost in costs]).cpu()
    return [part.view_as(cost) for part, cost in zip(copied.split([c.numel() for c in costs]), costs, strict=True)]


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _assign(stage: Stage, cost_KNQ: np.ndarray) -> Tensor:
    query_KN = np.empty(cost_KNQ.shape[:2], dtype=np.int64)
    starts = np.cumsum([0, *stage.targets.counts_B])
    for layer in range(len(cost_KNQ)):
        for image, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            cost_nQ = cost_KNQ[layer, start:stop]
            if not np.isfinite(cost_nQ).all():
                raise FloatingPointError(
                    f"matching: a cost is not finite in {stage.name} {layer}, image {image} of the batch"
                )
            rows, columns = linear_sum_assignment(cost_nQ)
            query_KN[layer, start:stop][rows] = columns
    return torch.from_numpy(query_KN)


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
