"""What a CPU computes by functions of its own while it trains, against the same layers in torch's operators."""

import pytest
import torch
from torch import nn
from torch.overrides import BaseTorchFunctionMode

from framework.models import encoder, recompute
from framework.models.attention import MultiheadAttention, Pyramid
from framework.models.encoder import EncoderLayer
from framework.models.on_cpu import Attend

B, S, D = 2, 23, 8


class Looking(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(D, D)

    def forward(self, query_BSD, centres_BS2, tokens_BSD, pyramid):
        return self.project(query_BSD) + self.project(tokens_BSD)


def encoder_layer(p):
    torch.manual_seed(0)
    return EncoderLayer(Looking(), D, 16, p).train()


def run(layer, tokens_BSD):
    return layer(tokens_BSD, None, Pyramid([], torch.ones(B, S, D), None, torch.ones(B, 1, 2)))


def is_ours(y_BSD):
    return type(y_BSD.grad_fn).__name__ == "AfterAttentionBackward"


def functions(y):
    """The names of all that y was computed by."""
    nodes, names = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [before for before, _ in node.next_functions if before is not None]
    return names


def outputs_and_gradients(layer, call, *inputs):
    torch.manual_seed(1)
    layer.zero_grad()
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = call(layer, *inputs)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    return [y, *(x.grad for x in inputs), *(weight.grad.clone() for weight in layer.parameters())]


def assert_same(ours, plain, atol=1e-5, rtol=1e-5):
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=rtol)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_an_encoder_layer_trains_as_in_torchs_operators(p, monkeypatch):
    """The same draws of dropout, too."""
    layer, tokens_BSD = encoder_layer(p), torch.randn(B, S, D)
    ours = outputs_and_gradients(layer, run, tokens_BSD)
    assert is_ours(ours[0])
    monkeypatch.setattr(encoder, "trains_on_cpu", lambda *_: False)
    assert_same(ours, outputs_and_gradients(layer, run, tokens_BSD))


def gradients(call):
    """Of two passes, added up; some weights frozen, the attention's result in another order of memory."""
    torch.manual_seed(1)
    layer = encoder_layer(0.3)
    layer.ffn.linear1.requires_grad_(False)
    layer.attention.register_forward_hook(
        lambda module, inputs, y_BSD: y_BSD.transpose(0, 1).contiguous().transpose(0, 1)
    )
    pyramid = Pyramid([], torch.ones(B, S, D), None, torch.ones(B, 1, 2))
    for _ in range(2):
        call(layer, torch.randn(B, S, D), None, pyramid).square().sum().backward()
    return [weight.grad for weight in layer.parameters() if weight.requires_grad]


def test_frozen_weights_recomputed_layers_and_sums_of_gradients(monkeypatch):
    ways = recompute.run, recompute.recomputed, recompute.dear_parts_kept
    ours, again, cheaply = map(gradients, ways)
    monkeypatch.setattr(encoder, "trains_on_cpu", lambda *_: False)
    plain = gradients(recompute.run)
    for found in (ours, again, cheaply):
        assert_same(found, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_dense_attention_is_torchs(padded, dtype, monkeypatch):
    """Where next to nothing is dropped."""
    layer = MultiheadAttention(D, 4, 1e-9).to(dtype).train()
    inputs = torch.randn(B, 7, D, dtype=dtype), *torch.randn(2, B, S, D, dtype=dtype)
    padding_BS = torch.zeros(B, S, dtype=torch.bool)
    padding_BS[1, 15:] = padded

    def call(layer, *inputs):
        return layer(*inputs, padding_BS if padded else None)[0]

    ours = outputs_and_gradients(layer, call, *inputs)
    monkeypatch.setattr(layer, "dropout", 0.0)
    plain = outputs_and_gradients(layer, call, *inputs)
    assert "AttendBackward" in functions(ours[0])
    assert "AttendBackward" not in functions(plain[0])
    assert_same(ours, plain, **({} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}))


def test_where_torchs_attention_stays():
    layer = MultiheadAttention(D, 4, 0.1).train()
    inputs = torch.randn(3, B, S, D)

    def ours(**settings):
        return "AttendBackward" in functions(layer(*inputs, **settings)[0])

    assert ours()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours()
    assert not ours(need_weights=True)
    with BaseTorchFunctionMode():
        assert not ours()
    layer.eval()
    assert not ours()


def test_dense_attention_errs_no_more_than_torchs_under_autocast():
    """With weights that differ much: logits of a spread of about 10."""
    layer, inputs = MultiheadAttention(32, 4, 0.0).train(), torch.randn(3, B, 40, 32)
    with torch.no_grad():
        layer.in_proj_weight[:64] *= 3.0

    def error(dropout):
        layer.dropout = dropout
        with torch.autocast("cpu", torch.bfloat16):
            return (layer(*inputs)[0].float() - exact).norm().item()

    exact = layer(*inputs)[0]
    assert 0 < error(1e-9) < 1.2 * error(0.0)


def test_gradients_of_dense_attention_are_of_what_it_dropped():
    inputs = [x.requires_grad_() for x in torch.randn(3, 2, 2, 5, 4)]

    def attend(query, key, value):
        torch.manual_seed(3)
        return Attend.apply(query, key, value, None, 0.4)

    kept = attend(*inputs[:2], torch.eye(5).expand(2, 2, 5, 5)) > 0
    assert not kept.all()
    query, key, value = inputs
    plain = ((query @ key.transpose(-2, -1)).softmax(-1) * kept / 0.6) @ value
    grad = torch.randn(plain.shape)
    ours = torch.autograd.grad(attend(*inputs), inputs, grad)
    assert_same(ours, torch.autograd.grad(plain, inputs, grad))


def test_dense_attention_drops_looks():
    """One that sees itself in all others alike gives back what was not dropped, scaled."""
    layer = MultiheadAttention(D, 4, 0.25).train()
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    nn.init.ones_(layer.in_proj_bias)
    nn.init.eye_(layer.out_proj.weight)
    seen = layer(*torch.randn(3, B, 400, D))[0].detach()
    assert seen.mean().item() == pytest.approx(1, abs=0.01)
    assert seen.var().item() == pytest.approx(0.25 / 0.75 / 400, rel=0.2)


def test_where_torchs_operators_stay():
    layer, tokens_BSD = encoder_layer(0.1), torch.randn(B, S, D)
    weight = layer.ffn.linear1.weight

    def ours():
        return is_ours(run(layer, tokens_BSD))

    assert ours()
    with torch.autocast("cpu", torch.bfloat16):
        assert not ours()
    with BaseTorchFunctionMode():
        assert not ours()
    weight.ds_id = 0  # ZeRO 3
    assert not ours()
    del weight.ds_id
    layer.eval()
    assert not ours()


def test_backward_uses_its_memory_up():
    y_BSD = run(encoder_layer(0.1), torch.randn(B, S, D))
    y_BSD.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y_BSD.sum().backward()
