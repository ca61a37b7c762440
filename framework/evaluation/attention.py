"""What a detector looks at for an object that it finds in an image.

# Q query, C class
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from data_tools.sample import Category
from framework.config import Config
from framework.data.batch import collate
from framework.data.transforms import evaluation_example
from framework.engine.ds_config import autocast
from framework.evaluation.detections import category_ids, class_scores
from framework.models.detector import Detector
from framework.models.look import Look, Recording, look, recorded, token_at


@dataclass(frozen=True)
class Inspection:
    """An object, and what was looked at for it.

    category_id, score: of the query's best class. box_cxcywh: fractions of the image.
    strides: of the levels, in pixels of the image as the detector saw it.
    looks: of the encoder's token in the middle of the box, and of the query in the decoder.
    """

    query: int
    category_id: int
    score: float
    box_cxcywh: tuple[float, ...]
    strides: list[int]
    looks: list[Look]


@torch.no_grad()
def look_inside(
    detector: Detector,
    image: Image.Image,
    config: Config,
    classes: Sequence[Category],
    *,
    queries: Sequence[int] | None = None,
    min_score: float = 0.0,
    layer: int | None = None,
) -> list[Inspection]:
    """Run the detector, which is in evaluation mode, as evaluation does, and see where its attention goes.

    Args:
        queries: whose; None: the one with the highest score, if that is `min_score` or more. A query that there is
            not (proposals of a small image may be fewer) or that is not finite is left out.
        layer: from 1; None: the last of the encoder and of the decoder. A part without such a layer is left out.
    """
    device = next(detector.parameters()).device
    data = config.data
    batch = collate([evaluation_example(image, 0, data.sizes, data.max_size, data.backend)])
    ids = category_ids(classes, config.data.labels)
    with autocast(config.engine, device), recorded(detector, layer) as recordings:
        predictions = detector(*batch.inputs(device))
        boxes_Q4 = predictions.boxes_KBQ4[-1, 0].cpu()
        scores_QC = class_scores(predictions.logits_KBQC[-1, 0], config.model.classification).cpu()[:, sorted(ids)]
        scores_Q, best_Q = scores_QC.max(dim=-1)
        finite_Q = scores_Q.isfinite() & boxes_Q4.isfinite().all(-1)
        if queries is None:
            first = int(scores_Q.sort(descending=True, stable=True).indices[0])
            queries = [first] if scores_Q[first] >= min_score else []
        return [
            Inspection(
                query,
                ids[sorted(ids)[int(best_Q[query])]],
                float(scores_Q[query]),
                tuple(boxes_Q4[query].tolist()),
                strides(detector, len(recordings[0].pyramid.shapes_hw)),
                [look(recording, row_of(recording, query, boxes_Q4[query])) for recording in recordings],
            )
            for query in queries
            if query < len(boxes_Q4) and finite_Q[query]
        ]


def row_of(recording: Recording, query: int, box_4: Tensor) -> int:
    """Who looks: in the decoder the query, in the encoder the finest token in the middle of its box."""
    return query if recording.part == "decoder" else token_at(recording.pyramid, *box_4[:2].tolist())


def strides(detector: Detector, levels: int) -> list[int]:
    """Of each level: the backbone's, then each twice the one before."""
    known: list[int] = list(detector.backbone.strides)  # type: ignore[arg-type]
    while len(known) < levels:
        known.append(2 * known[-1])
    return known
