"""The feed-forward layer: the same in pieces, which a CPU computes it in, and at once."""

import pytest
import torch

from framework.models import encoder
from framework.models.encoder import FeedForward


def outputs_and_gradients(layer, x_BSD, wanted_BSD):
    layer.zero_grad()
    x_BSD = x_BSD.clone().requires_grad_()
    y_BSD = layer(x_BSD)
    y_BSD.backward(wanted_BSD)
    return [y_BSD.detach(), x_BSD.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("tokens_at_once, calls", [(4, 6), (11, 2), (22, 1)])
def test_pieces_are_the_whole(tokens_at_once, calls, monkeypatch):
    torch.manual_seed(0)
    layer = FeedForward(8, 16, dropout=0.0).train()
    x_BSD, wanted_BSD = torch.randn(2, 2, 11, 8)
    sizes = []
    layer.linear1.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    whole = outputs_and_gradients(layer, x_BSD, wanted_BSD)
    monkeypatch.setattr(encoder, "PIECE", tokens_at_once * 16)
    pieces = outputs_and_gradients(layer, x_BSD, wanted_BSD)
    assert len(sizes) == 1 + calls
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_pieces_drop_different_tokens(monkeypatch):
    torch.manual_seed(0)
    layer = FeedForward(32, 64, dropout=0.5).train()
    monkeypatch.setattr(encoder, "PIECE", 64)
    y_BSD = layer(torch.ones(1, 50, 32))
    assert len(y_BSD.unique(dim=1)[0]) == 50  # one seed for all pieces would make all tokens alike
