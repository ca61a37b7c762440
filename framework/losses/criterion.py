"""The loss: classification, L1 and generalised IoU of matched boxes, over all decoder layers at once.

# B image, K decoder layer, Q query, C class, N target boxes of the batch, concatenated
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from framework.boxes import cxcywh_to_xyxy, generalized_iou
from framework.data.batch import Targets
from framework.losses.matcher import LossConfig, Stage, match
from framework.models.detector import Predictions


class Criterion:
    """Maps predictions and targets to named scalars, unweighted; `total` weighs and adds them.

    Names: class, box, giou, with /layer<k> for every decoder layer k but the last (unless auxiliary losses are off),
    /proposals for the first stage.
    """

    def __init__(self, config: LossConfig, classification: Literal["focal", "softmax"]):
        self.config = config
        self.classification = classification
        self.weights = {"class": config.class_weight, "box": config.box_weight, "giou": config.giou_weight}

    def __call__(self, predictions: Predictions, targets: Targets, num_boxes: float | Tensor) -> dict[str, Tensor]:
        """num_boxes: targets a micro-batch has on average over the global batch, at least 1.

        Where costs of matching are not finite, the losses of their layer and stage are NaN. Raises what `match` raises.
        """
        first = 0 if self.config.auxiliary else -1
        decoder = Stage(predictions.logits_KBQC[first:], predictions.boxes_KBQ4[first:], targets)
        suffixes = [f"/layer{layer}" for layer in range(len(decoder.logits_KBQC) - 1)] + [""]
        losses = self._losses(decoder, num_boxes, suffixes)
        if predictions.proposals is not None:  # proposals know objects only: every target is class 0
            proposals, objects = predictions.proposals, targets.of_one_class()
            losses |= self._losses(
                Stage(proposals.logits_KBQC, proposals.boxes_KBQ4, objects), num_boxes, ["/proposals"]
            )
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        of_terms: dict[str, list[Tensor]] = {}
        for name, loss in losses.items():
            of_terms.setdefault(name.split("/")[0], []).append(loss)
        return torch.stack([self.weights[term] * torch.stack(terms).sum() for term, terms in of_terms.items()]).sum()

    def _losses(self, stage: Stage, num_boxes: float | Tensor, suffixes: list[str]) -> dict[str, Tensor]:
        query_KN = match(stage, classification=self.classification, config=self.config)
        if self.classification == "focal":
            class_K = self._focal(stage.logits_KBQC, stage.targets, query_KN) / num_boxes
        else:
            class_K = self._cross_entropy(stage.logits_KBQC, stage.targets, query_KN)
        box_K, giou_K = matched_box_losses(stage.boxes_KBQ4, stage.targets, query_KN)
        terms_3K = torch.stack([class_K, box_K / num_boxes, giou_K / num_boxes])
        terms_3K = terms_3K * torch.where((query_KN < 0).any(1), torch.nan, 1.0)
        return {
            term + suffix: loss
            for term, loss_K in zip(("class", "box", "giou"), terms_3K.unbind(), strict=True)
            for suffix, loss in zip(suffixes, loss_K.unbind(), strict=True)
        }

    def _focal(self, logits_KBQC: Tensor, targets: Targets, query_KN: Tensor) -> Tensor:
        """Sum over queries and classes, (K,). Source: Lin et al. 2017, equation 5."""
        layer_K1 = torch.arange(len(query_KN), device=query_KN.device)[:, None]
        wanted_KBQC = torch.zeros_like(logits_KBQC)
        hit_KN = torch.ones_like(query_KN, dtype=wanted_KBQC.dtype)  # for a bare 1.0 the processor would wait
        wanted_KBQC[layer_K1, targets.image_N, query_KN, targets.labels_N] = hit_KN
        cross_entropy = F.binary_cross_entropy_with_logits(logits_KBQC, wanted_KBQC, reduction="none")
        p = logits_KBQC.sigmoid()
        missed = p + wanted_KBQC - 2 * p * wanted_KBQC  # 1 - probability given to the truth
        alpha, gamma = self.config.focal_alpha, self.config.focal_gamma
        weight = alpha * wanted_KBQC + (1 - alpha) * (1 - wanted_KBQC)
        loss_KBQC = weight * cross_entropy * missed**gamma
        return (loss_KBQC * targets.valid_B[:, None, None]).sum((1, 2, 3))

    def _cross_entropy(self, logits_KBQC: Tensor, targets: Targets, query_KN: Tensor) -> Tensor:
        """Weighted mean over queries, (K,); unmatched ones are no object. Source: Carion et al. 2020, section 3.1."""
        K, B, Q, C = logits_KBQC.shape
        layer_K1 = torch.arange(K, device=query_KN.device)[:, None]
        wanted_KBQ = torch.full((K, B, Q), C - 1, dtype=torch.int64, device=query_KN.device)
        wanted_KBQ[layer_K1, targets.image_N, query_KN] = targets.labels_N.expand(K, -1)
        loss_KBQ = F.cross_entropy(logits_KBQC.flatten(0, 2), wanted_KBQ.flatten(), reduction="none").view(K, B, Q)
        weight_KBQ = torch.where(wanted_KBQ == C - 1, self.config.no_object_weight, 1.0) * targets.valid_B[:, None]
        return (loss_KBQ * weight_KBQ).sum((1, 2)) / weight_KBQ.sum((1, 2)).clamp(min=1e-6)


def matched_box_losses(boxes_KBQ4: Tensor, targets: Targets, query_KN: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over matched pairs of L1 and of 1 - GIoU: two of (K,)."""
    layer_K1 = torch.arange(len(query_KN), device=query_KN.device)[:, None]
    predicted_KN4 = boxes_KBQ4[layer_K1, targets.image_N, query_KN]
    wanted_N4 = targets.boxes_cxcywh_N4
    box_K = (predicted_KN4 - wanted_N4).abs().sum((1, 2))
    giou_KN = generalized_iou(cxcywh_to_xyxy(predicted_KN4), cxcywh_to_xyxy(wanted_N4))
    return box_K, (1 - giou_KN).sum(1)
