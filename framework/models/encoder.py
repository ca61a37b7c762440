"""The encoder: every token of the pyramid looks at the pyramid.

# B image, S token, D model width
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from framework.models.attention import Pyramid
from ops.dropout import add_dropout_, relu_dropout_

PIECE = 1 << 21  # hidden numbers of a feed-forward layer that a CPU computes at a time: 8 MB in float32


class FeedForward(nn.Module):
    """Linear, ReLU, linear, with its residual and norm (post-norm).

    On a CPU so many tokens at a time that what is hidden stays in the cache: a fifth less time, forward and backward,
    than a map of all tokens, for which backward needs two more of its size. Against that, gradients of weights are sums
    of sums, other in their last bits, and dropout draws anew for every piece.
    """

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.dropout = dropout
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        pieces = x_BSD.flatten(0, 1).split(max(1, PIECE // self.linear1.out_features)) if x_BSD.is_cpu else ()
        if len(pieces) <= 1:
            return self._forward(x_BSD)
        return torch.cat([self._forward(piece) for piece in pieces]).view_as(x_BSD)

    def _forward(self, x: Tensor) -> Tensor:
        y = self.linear2(relu_dropout_(self.linear1(x), self.dropout, self.training))
        return self.norm(add_dropout_(y, x, self.dropout, self.training))


class EncoderLayer(nn.Module):
    def __init__(self, attention: nn.Module, width: int, ffn_width: int, dropout: float):
        super().__init__()
        self.attention = attention
        self.norm = nn.LayerNorm(width)
        self.dropout = dropout
        self.ffn = FeedForward(width, ffn_width, dropout)

    def forward(self, tokens_BSD: Tensor, centres_BS2: Tensor, pyramid: Pyramid) -> Tensor:
        looked = self.attention(tokens_BSD + pyramid.position_BSD, centres_BS2, tokens_BSD, pyramid)
        return self.ffn(self.norm(add_dropout_(looked, tokens_BSD, self.dropout, self.training)))


class Encoder(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.run = run

    def forward(self, tokens_BSD: Tensor, pyramid: Pyramid) -> Tensor:
        centres_BS2 = pyramid.centres_BS2()
        for layer in self.layers:
            tokens_BSD = self.run(layer, tokens_BSD, centres_BS2, pyramid)
        return tokens_BSD


def run(layer: Callable[..., Tensor], *inputs: object) -> Tensor:
    return layer(*inputs)


def recomputed(layer: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Keep no activations of the layer; compute them again in backward."""
    return checkpoint(layer, *inputs, use_reentrant=False)
