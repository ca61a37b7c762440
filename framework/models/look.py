"""What the attention layers look at, recorded while the detector runs; what it computes stays as it is.

# B image, L level, S = sum of H*W over levels, D model width, M head, Q query, P point,
# n = 0 (no reference), 2 (point) or 4 (box)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from framework.models.attention import Pyramid
from framework.models.detector import Detector


@dataclass
class Recording:
    """An attention layer and what it was last called with: query_BQD, references_BQn, tokens_BSD, pyramid.

    part: "encoder" or "decoder". layer: its number, from 1 to `layers`.
    """

    part: str
    layer: int
    layers: int
    attention: nn.Module
    inputs: tuple[Any, ...] = field(default=(), init=False)

    @property
    def pyramid(self) -> Pyramid:
        return self.inputs[3]

    def keep(self, attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.inputs = inputs


@dataclass(frozen=True)
class Look:
    """What one query, or one token of the encoder, looks at in one layer, in one image: float32, on the CPU.

    part, layer, layers: as in Recording. shapes_hw: of the L maps, padding cut off.
    reference_n: where it stands: a point (x, y), a box (cx, cy, w, h) or nothing; fractions of the image.
    xy_MLP2: sampling points, fractions of the image, outside [0, 1] too; None: it looks at every pixel of its map.
    weights_MLP: sum to 1 over L and P for each head; without points P runs over the pixels, rows first.
    """

    part: str
    layer: int
    layers: int
    shapes_hw: list[tuple[int, int]]
    reference_n: Tensor
    xy_MLP2: Tensor | None
    weights_MLP: Tensor


@contextmanager
def recorded(detector: Detector, layer: int | None = None) -> Iterator[list[Recording]]:
    """Record encoder and decoder at a layer (None: the last of each); a part that has no such layer is left out.

    Kept are the tensors that the layer is called with, and nothing is computed or copied.
    """
    stacks = {
        "encoder": [one.get_submodule("attention") for one in detector.encoder.layers],
        "decoder": [one.get_submodule("cross_attention") for one in detector.decoder.layers],
    }
    recordings = [
        Recording(part, number, len(stack), attention)
        for part, stack in stacks.items()
        for number, attention in enumerate(stack, start=1)
        if number == (layer or len(stack))
    ]
    hooks = [recording.attention.register_forward_pre_hook(recording.keep) for recording in recordings]
    try:
        yield recordings
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def look(recording: Recording, row: int) -> Look:
    """What query (in the encoder: token) `row` of the batch's first image looked at.

    Call it under the autocast of the forward, so that it computes in the same precision.
    """
    query_BQD, references_BQn, tokens_BSD, pyramid = recording.inputs
    row_of_Q = slice(row, row + 1)
    xy_BQMLP2, weights_BQMLP = recording.attention.looks(  # type: ignore[operator]
        query_BQD[:, row_of_Q], references_BQn[:, row_of_Q], tokens_BSD, pyramid
    )
    xy_MLP2, weights_MLP, shapes_hw = None, weights_BQMLP[0, 0].cpu(), unpadded_shapes_hw(pyramid)
    if xy_BQMLP2 is None:
        height, width = shapes_hw[0]
        weights_MLP = weights_MLP.unflatten(-1, pyramid.shapes_hw[0])[..., :height, :width].flatten(-2)
    else:
        xy_MLP2 = (xy_BQMLP2[0, 0] / pyramid.valid_ratios_BL2[0, :, None]).cpu()
    reference_n = references_BQn[0, row].float().cpu()
    return Look(recording.part, recording.layer, recording.layers, shapes_hw, reference_n, xy_MLP2, weights_MLP)


def unpadded_shapes_hw(pyramid: Pyramid) -> list[tuple[int, int]]:
    """Rows and columns that the first image has of each level."""
    ratios = pyramid.valid_ratios_BL2[0].tolist()
    return [
        (round(y * height), round(x * width)) for (x, y), (height, width) in zip(ratios, pyramid.shapes_hw, strict=True)
    ]


def token_at(pyramid: Pyramid, x: float, y: float) -> int:
    """The token of the finest level that covers the point, in fractions of the first image."""
    height, width = unpadded_shapes_hw(pyramid)[0]
    column, line = (min(max(int(at * side), 0), side - 1) for at, side in ((x, width), (y, height)))
    return line * pyramid.shapes_hw[0][1] + column
