"""The encoder: every token of the pyramid looks at the pyramid.

# B image, S token, D model width
"""

from collections.abc import Sequence

from torch import Tensor, nn

from framework.models.attention import Pyramid
from framework.models.on_cpu import AfterAttention, trains_on_cpu
from framework.models.recompute import Layer, run
from ops.dropout import add_dropout_, relu_dropout_
from ops.linear import Linear


class FeedForward(nn.Module):
    """Linear, ReLU, linear, with its residual and norm (post-norm)."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.linear1 = Linear(width, hidden)
        self.linear2 = Linear(hidden, width)
        self.dropout = dropout
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = self.linear2(relu_dropout_(self.linear1(x_BSD), self.dropout, self.training))
        return self.norm(add_dropout_(y_BSD, x_BSD, self.dropout, self.training))


class EncoderLayer(nn.Module):
    def __init__(self, attention: nn.Module, width: int, ffn_width: int, dropout: float):
        super().__init__()
        self.attention = attention
        self.norm = nn.LayerNorm(width)
        self.dropout = dropout
        self.ffn = FeedForward(width, ffn_width, dropout)

    def forward(self, tokens_BSD: Tensor, centres_BS2: Tensor, pyramid: Pyramid) -> Tensor:
        looked_BSD = self.attention(tokens_BSD + pyramid.position_BSD, centres_BS2, tokens_BSD, pyramid)
        if trains_on_cpu(self, looked_BSD):
            return self._on_cpu(looked_BSD, tokens_BSD)
        return self.ffn(self.norm(add_dropout_(looked_BSD, tokens_BSD, self.dropout, self.training)))

    def _on_cpu(self, looked_BSD: Tensor, tokens_BSD: Tensor) -> Tensor:
        parts = (self.norm, self.ffn.linear1, self.ffn.linear2, self.ffn.norm)
        weights = (weight for part in parts for weight in (part.weight, part.bias))
        return AfterAttention.apply(looked_BSD, tokens_BSD, self.dropout, *weights)


class Encoder(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.run: Layer = run

    def forward(self, tokens_BSD: Tensor, pyramid: Pyramid) -> Tensor:
        centres_BS2 = pyramid.centres_BS2()
        for layer in self.layers:
            tokens_BSD = self.run(layer, tokens_BSD, centres_BS2, pyramid)
        return tokens_BSD
