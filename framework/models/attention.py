"""Where queries look: at a few learnt points of every level, or at every pixel of one level.

Both kinds take the same arguments, so that encoder and decoder do not know which one they hold.

# B image, L level, S = sum of H*W over levels, Q query, D model width, M head, E head width, P point,
# n = 2 (x, y) or 4 (cx, cy, w, h)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from framework.models.on_cpu import Attend, has_kernel_here
from ops import MSDeformAttn


@dataclass
class Pyramid:
    """The geometry of L feature maps, flattened and concatenated into S tokens.

    shapes_hw: L pairs of host integers. position_BSD: float32. padding_BS: bool, True on padding; None: there is none.
    valid_ratios_BL2: float32, share (x, y) of each level's map that is not padding.
    """

    shapes_hw: list[tuple[int, int]]
    position_BSD: Tensor
    padding_BS: Tensor | None
    valid_ratios_BL2: Tensor

    def centres_BS2(self) -> Tensor:
        """Centre (x, y) of each token, as fractions of the unpadded image."""
        centres = []
        for level, (height, width) in enumerate(self.shapes_hw):
            device = self.valid_ratios_BL2.device
            y = torch.arange(height, device=device, dtype=torch.float32) + 0.5
            x = torch.arange(width, device=device, dtype=torch.float32) + 0.5
            grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).view(1, -1, 2)
            ratios_B2 = self.valid_ratios_BL2[:, level]
            size_B2 = torch.stack([ratios_B2[:, 0] * width, ratios_B2[:, 1] * height], dim=-1)
            centres.append(grid / size_B2[:, None])
        return torch.cat(centres, dim=1)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention. Source: Zhu et al. 2021, section 4.1."""

    def __init__(self, width: int, num_levels: int, num_heads: int, num_points: int):
        super().__init__()
        self.sample = MSDeformAttn(width, num_levels, num_heads, num_points)

    def forward(self, query_BQD: Tensor, references_BQn: Tensor, tokens_BSD: Tensor, pyramid: Pyramid) -> Tensor:
        """query already holds its position; references are fractions of the unpadded image. Returns (B, Q, D)."""
        references_BQLn = _on_padded_maps(references_BQn, pyramid)
        return self.sample(query_BQD, references_BQLn, tokens_BSD, pyramid.shapes_hw, pyramid.padding_BS)

    def looks(self, query_BQD: Tensor, references_BQn: Tensor, tokens_BSD: Tensor,
              pyramid: Pyramid) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Where `forward` looks: points (B, Q, M, L, P, 2: x, y, fractions of the padded maps) and their weights
        (B, Q, M, L, P), whose sum over L and P is 1; float32."""
        return self.sample.sampling(query_BQD, _on_padded_maps(references_BQn, pyramid), pyramid.shapes_hw)


class MultiheadAttention(nn.MultiheadAttention):
    """torch's. Training on a CPU, torch would draw the numbers of its dropout one by one, on one core, and keep three
    matrices of weights. These are float32 under autocast, too."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__(width, num_heads, dropout=dropout, batch_first=True)

    def forward(  # type: ignore[override]
        self,
        query_BQD: Tensor,
        key_BSD: Tensor,
        value_BSD: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, Q, D), and, where needed, the weights of every head (B, M, Q, S)."""
        if need_weights or not (self.training and self.dropout and has_kernel_here(query_BQD)):
            return super().forward(
                query_BQD, key_BSD, value_BSD, key_padding_mask, need_weights, average_attn_weights=False
            )
        D, M = self.embed_dim, self.num_heads
        inputs = query_BQD, key_BSD, value_BSD
        weights, biases = self.in_proj_weight.split(D), self.in_proj_bias.split(D)
        projected = map(linear, inputs, weights, biases)
        query_BMQE, *others = (x.unflatten(-1, (M, D // M)).transpose(1, 2).float() for x in projected)
        with torch.autocast("cpu", enabled=False):
            seen_BMQE = Attend.apply(query_BMQE * (D // M) ** -0.5, *others, key_padding_mask, self.dropout)
        return self.out_proj(seen_BMQE.transpose(1, 2).flatten(2).to(query_BQD.dtype)), None


class DenseAttention(nn.Module):
    """Attention to every token, as in DETR; references are not used. Source: Carion et al. 2020, section 3.2."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.attend = MultiheadAttention(width, num_heads, dropout)

    def forward(self, query_BQD: Tensor, references_BQn: Tensor | None, tokens_BSD: Tensor, pyramid: Pyramid) -> Tensor:
        """query already holds its position. Returns (B, Q, D)."""
        key_BSD = tokens_BSD + pyramid.position_BSD
        return self.attend(query_BQD, key_BSD, tokens_BSD, pyramid.padding_BS)[0]

    def looks(self, query_BQD: Tensor, references_BQn: Tensor | None, tokens_BSD: Tensor,
              pyramid: Pyramid) -> tuple[None, Tensor]:  # fmt: skip
        """How `forward` weighs every token of the one level: no points, and weights (B, Q, M, 1, S), float32, whose
        sum over S is 1. While training they are those after dropout."""
        key_BSD = tokens_BSD + pyramid.position_BSD
        weights_BMQS = self.attend(query_BQD, key_BSD, tokens_BSD, pyramid.padding_BS, need_weights=True)[1]
        return None, weights_BMQS.transpose(1, 2)[:, :, :, None].float()


def _on_padded_maps(references_BQn: Tensor, pyramid: Pyramid) -> Tensor:
    """(B, Q, L, n): the references as fractions of each level's padded map."""
    ratios = pyramid.valid_ratios_BL2.repeat(1, 1, references_BQn.shape[-1] // 2)
    return references_BQn[:, :, None] * ratios[:, None]
