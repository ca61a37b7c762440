"""The detector: backbone, projections to one width, encoder, queries, decoder. It holds finished parts.

# B image, L level, S = sum of H*W over levels, D model width, K decoder layer, Q query, C class
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framework.models.attention import Pyramid
from framework.models.decoder import Decoder
from framework.models.encoder import Encoder
from framework.models.position import sine_position
from framework.models.recompute import dear_parts_kept, recomputed


@dataclass
class Predictions:
    """logits_KBQC: float32, before sigmoid or softmax. boxes_KBQ4: float32 cxcywh, fractions of the unpadded image.

    K decoder layers, the last one last. proposals: the same over all tokens (K = 1, Q = S) of a two-stage model.
    """

    logits_KBQC: Tensor
    boxes_KBQ4: Tensor
    proposals: "Predictions | None" = None


class Detector(nn.Module):
    """backbone: images -> maps, finest first. projections: one for each level; those beyond the backbone's maps
    take its last map, then each other's result. position_offset: see sine_position.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projections: Sequence[nn.Module],
        level_codes: "LevelCodes | None",
        encoder: Encoder,
        queries: nn.Module,
        decoder: Decoder,
        *,
        width: int,
        position_offset: float,
    ):
        super().__init__()
        self.width, self.position_offset = width, position_offset
        self.backbone = backbone
        self.projections = nn.ModuleList(projections)
        self.level_codes = level_codes
        self.encoder = encoder
        self.queries = queries
        self.decoder = decoder

    def forward(self, images_B3HW: Tensor, padding_BHW: Tensor | None = None) -> Predictions:
        """images: float32, normalised, zero padded; padding: bool, True on padding; None: there is none."""
        tokens_BSD, pyramid = self._flatten(self._maps(images_B3HW), padding_BHW)
        tokens_BSD = self.encoder(tokens_BSD, pyramid)
        queries = self.queries(tokens_BSD, pyramid)
        logits_KBQC, boxes_KBQ4 = self.decoder(queries, tokens_BSD, pyramid)
        proposals = None
        if queries.proposal_logits_BSC is not None:
            proposals = Predictions(queries.proposal_logits_BSC.float()[None], queries.proposal_boxes_BS4[None])
        return Predictions(logits_KBQC, boxes_KBQ4, proposals)

    def recompute_activations(self, *, keep_products: bool = False) -> None:
        """Keep only each layer's input for backward: less memory, about a third more time. keep_products: keep
        what `recompute.dear_parts_kept` says, too, and compute less again."""
        self.encoder.run = self.decoder.run = dear_parts_kept if keep_products else recomputed

    def _maps(self, images_B3HW: Tensor) -> list[Tensor]:
        features = self.backbone(images_B3HW)
        maps = [project(x) for project, x in zip(self.projections, features, strict=False)]
        coarsest = features[-1]
        for project in list(self.projections)[len(features) :]:
            coarsest = project(coarsest)
            maps.append(coarsest)
        return maps

    def _flatten(self, maps: list[Tensor], padding_BHW: Tensor | None) -> tuple[Tensor, Pyramid]:
        shapes_hw, paddings, positions, ratios = [], [], [], []
        for level, x in enumerate(maps):
            shape_hw = (int(x.shape[-2]), int(x.shape[-1]))
            if padding_BHW is None:
                padding = torch.zeros(len(x), *shape_hw, dtype=torch.bool, device=x.device)
            else:
                padding = nn.functional.interpolate(padding_BHW[:, None].float(), size=shape_hw)[:, 0].bool()
            position = sine_position(padding, self.width, offset=self.position_offset)
            if self.level_codes is not None:
                position = position + self.level_codes(level)
            shapes_hw.append(shape_hw)
            paddings.append(padding.flatten(1))
            positions.append(position.flatten(1, 2))
            inside = (~padding).float()
            ratios.append(torch.stack([inside[:, 0].mean(1), inside[:, :, 0].mean(1)], dim=-1))
        tokens_BSD = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        padding_BS = None if padding_BHW is None else torch.cat(paddings, 1)
        pyramid = Pyramid(shapes_hw, torch.cat(positions, 1), padding_BS, torch.stack(ratios, 1))
        return tokens_BSD, pyramid


class LevelCodes(nn.Module):
    """A learnt code for each level, added to the position. Source: Zhu et al. 2021, A.2."""

    def __init__(self, num_levels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_levels, width))

    def forward(self, level: int) -> Tensor:
        return self.weight[level]
