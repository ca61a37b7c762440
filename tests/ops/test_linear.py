"""Linear layers against torch's, whichever library computes their products."""

import pytest
import torch
from torch import nn
from torch.overrides import BaseTorchFunctionMode

from ops import MSDeformAttn, chosen, linear, reference
from ops.linear import Linear, product, tall_product

K, M = 48, 32


REAL = torch.backends.cpu.get_cpu_capability()


@pytest.fixture(params=["AVX2", "AVX512"])
def capability(request, monkeypatch):
    """Of which a machine without AVX-512 feigns the other: oneDNN's float32 runs there too."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return request.param


@pytest.fixture
def avx512(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def results(layer, x, dtype=torch.float32):
    """Its output, and the gradients of its input and weights."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
    assert y.dtype == dtype
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    return [y, x.grad, *(weight.grad.clone() for weight in layer.parameters())]


def is_ours(layer, x):
    y = layer(x)
    return type((y._base if y._base is not None else y).grad_fn).__name__ == "_ProductBackward"


def twins(bias=True):
    torch.manual_seed(0)
    ours, plain = Linear(K, M, bias=bias), nn.Linear(K, M, bias=bias)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize("shape", [(K,), (7, K), (2, 3, K), (0, K), (2, 0, K), (2, 3, 4, K), (8197, K)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_torchs(capability, dtype, bias, shape):
    if dtype == torch.bfloat16 and capability == "AVX512" != REAL:
        pytest.skip("no AVX-512, and oneDNN has no bfloat16 without")
    ours, plain = twins(bias)
    x = torch.randn(shape)
    atol, rtol = (1e-5, 1e-5) if dtype == torch.float32 else (0.02, 0.02)
    of_weights = max(x.numel() // K, 1) ** 0.5  # as large as sums of so many are
    for i, (one, other) in enumerate(zip(results(ours, x, dtype), results(plain, x, dtype), strict=True)):
        torch.testing.assert_close(one, other, atol=atol * (of_weights if i > 1 else 1), rtol=rtol)
    assert is_ours(ours, x) == (capability == "AVX512")


def test_inputs_in_any_order_of_memory(capability):
    ours, plain = twins()
    x = torch.randn(K, 5, 3).permute(2, 1, 0)
    for one, other in zip(results(ours, x), results(plain, x), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_gradients_that_are_not_asked_for(capability):
    ours, plain = twins()
    for layer in (ours, plain):
        layer.weight.requires_grad_(False)
    x = torch.randn(5, K)
    for layer in (ours, plain):
        layer(x).square().sum().backward()
    assert ours.weight.grad is None
    torch.testing.assert_close(ours.bias.grad, plain.bias.grad)


def test_where_torchs_layer_stays(avx512, monkeypatch):
    layer, x = Linear(K, M), torch.randn(2, K)
    assert is_ours(layer, x)
    assert not is_ours(Linear(K, M).double(), x.double())
    with torch.autocast("cpu", torch.float16):
        assert not is_ours(layer, x)
    with pytest.raises(RuntimeError, match="dtype"):  # torch's words
        layer(x.bfloat16())
    with BaseTorchFunctionMode():
        assert not is_ours(layer, x)
    layer.weight.ds_id = 0  # ZeRO 3
    assert not is_ours(layer, x)
    del layer.weight.ds_id
    monkeypatch.setattr(chosen, "implementation", reference)
    assert not is_ours(layer, x)


def test_products_are_linear_layers(capability):
    x, weight, bias = torch.randn(2, 5, K), torch.randn(M, K), torch.randn(M)
    expected = nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(product(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-4)
    turned = torch.randn(K, M).t()
    torch.testing.assert_close(product(x, turned).double(), x.double() @ turned.t().double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 3, 4 * linear.MANY_ROWS, 4 * linear.MANY_ROWS + 3])
def test_tall_products(rows, capability):
    grad, x = torch.randn(rows, M), torch.randn(rows, K)
    torch.testing.assert_close(tall_product(grad, x).double(), grad.double().t() @ x.double(), rtol=1e-4, atol=1e-3)


def test_an_attention_module_compiles_as_one_graph(avx512):
    module = MSDeformAttn(32, 2, 4, 2)
    sizes_hw, tokens = [(3, 4), (2, 2)], torch.randn(2, 16, 32)
    references = torch.rand(2, 16, 2, 2)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    found = compiled(tokens, references, tokens, sizes_hw)
    torch.testing.assert_close(found, module(tokens, references, tokens, sizes_hw), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, autocast, expected", [
    (torch.float32, True, torch.bfloat16), (torch.float32, False, torch.float32),
    (torch.bfloat16, True, torch.bfloat16), (torch.float64, True, torch.float64),
])  # fmt: skip
def test_what_is_cast_once(dtype, autocast, expected):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert linear.cast_once(torch.ones(3, dtype=dtype)).dtype == expected
