"""Boxes: conversions, intersection over union, generalised IoU. The format stands in every name.

cxcywh: centre and size; xyxy: two corners. Both float, last axis 4, in one unit for all four numbers.
"""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    centre, size = boxes_cxcywh.chunk(2, dim=-1)
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    low, high = boxes_xyxy.chunk(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def area(boxes_xyxy: Tensor) -> Tensor:
    return _span(*boxes_xyxy.chunk(2, dim=-1))


def generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU of boxes that broadcast against each other: (..., 4), (..., 4) -> (...), in [-1, 1].

    Degenerate boxes (zero area) give finite values. Source: Rezatofighi et al. 2019, algorithm 1.
    """
    (a_low, a_high), (b_low, b_high) = a_xyxy.chunk(2, dim=-1), b_xyxy.chunk(2, dim=-1)
    overlap = _span(torch.maximum(a_low, b_low), torch.minimum(a_high, b_high))
    hull = _span(torch.minimum(a_low, b_low), torch.maximum(a_high, b_high))
    union = _span(a_low, a_high) + _span(b_low, b_high) - overlap
    tiny = torch.finfo(union.dtype).tiny
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _span(low: Tensor, high: Tensor) -> Tensor:
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height
