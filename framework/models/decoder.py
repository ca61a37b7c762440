"""The decoder: queries look at each other and at the pyramid; a box and class logits after every layer.

# B image, Q query, D model width, K decoder layer, C class,
# n = 0 (no reference), 2 (point) or 4 (box)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from framework.models.attention import MultiheadAttention, Pyramid
from framework.models.encoder import FeedForward
from framework.models.linear import Float32Linear
from framework.models.queries import QueryState
from framework.models.recompute import Layer, run
from ops.dropout import add_dropout_
from ops.linear import cast_once


class BoxHead(nn.Module):
    """A perceptron of three layers: (..., D) -> (..., 4), box offsets before the sigmoid, float32."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList([Float32Linear(width, wide) for wide in (width, width, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class DecoderLayer(nn.Module):
    def __init__(self, cross_attention: nn.Module, width: int, num_heads: int, ffn_width: int, dropout: float):
        super().__init__()
        self.self_attention = MultiheadAttention(width, num_heads, dropout)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = cross_attention
        self.cross_norm = nn.LayerNorm(width)
        self.dropout = dropout
        self.ffn = FeedForward(width, ffn_width, dropout)

    def forward(self, x_BQD: Tensor, position_BQD: Tensor, references_BQn: Tensor, tokens_BSD: Tensor,
                pyramid: Pyramid) -> Tensor:  # fmt: skip
        query_BQD = x_BQD + position_BQD
        attended = self.self_attention(query_BQD, query_BQD, x_BQD)[0]
        x_BQD = self.self_norm(add_dropout_(attended, x_BQD, self.dropout, self.training))
        looked = self.cross_attention(x_BQD + position_BQD, references_BQn, tokens_BSD, pyramid)
        return self.ffn(self.cross_norm(add_dropout_(looked, x_BQD, self.dropout, self.training)))


class Decoder(nn.Module):
    """layers, class_heads, box_heads: K each; heads may be one module K times (tied).

    output_norm: applied to every layer's output before the heads. refine: every layer's boxes, detached, are
    the next one's references (Zhu et al. 2021, A.4); otherwise all layers keep the first references.
    cast_tokens: for autocast once, not in each layer; for cross-attention that adds nothing to them before.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        class_heads: Sequence[nn.Module],
        box_heads: Sequence[nn.Module],
        output_norm: nn.Module,
        *,
        refine: bool,
        cast_tokens: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.class_heads = nn.ModuleList(class_heads)
        self.box_heads = nn.ModuleList(box_heads)
        self.output_norm = output_norm
        self.refine, self.cast_tokens = refine, cast_tokens
        self.run: Layer = run

    def forward(self, queries: QueryState, tokens_BSD: Tensor, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """Returns logits (K, B, Q, C) and boxes (K, B, Q, 4: cxcywh, fractions of the unpadded image), float32."""
        x_BQD, references_BQn = queries.content_BQD, queries.references_BQn
        if self.cast_tokens:
            tokens_BSD = cast_once(tokens_BSD)
        logits, boxes = [], []
        for layer, class_head, box_head in zip(self.layers, self.class_heads, self.box_heads, strict=True):
            x_BQD = self.run(layer, x_BQD, queries.position_BQD, references_BQn, tokens_BSD, pyramid)
            out_BQD = self.output_norm(x_BQD)
            logits.append(class_head(out_BQD).float())
            boxes.append(offset_boxes(box_head(out_BQD), references_BQn))
            if self.refine:
                references_BQn = boxes[-1].detach()
        return torch.stack(logits), torch.stack(boxes)


def offset_boxes(offsets_BQ4: Tensor, references_BQn: Tensor) -> Tensor:
    """Boxes in [0, 1] from offsets in the space before the sigmoid, to the n numbers that a reference has."""
    n = references_BQn.shape[-1]
    start = nn.functional.pad(references_BQn.logit(eps=1e-5), (0, 4 - n))
    return (offsets_BQ4 + start).sigmoid()
