"""Gradients are the same whatever is computed again in backward, and it is what was said."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from framework.models.recompute import SAMPLING
from ops import chosen, reference
from tests.models.test_build import small

WAYS = {"kept": None, "recomputed": {}, "products kept": {"keep_products": True}}
PRODUCTS = ("aten::addmm",)  # of backward itself: aten::mm


@pytest.fixture(autouse=True)
def torchs_linear(monkeypatch):
    """Stage 3 in an earlier test of this process leaves its own, which adds biases in place."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        wide = operator.name() in PRODUCTS and args[-1].shape[1] > args[-1].shape[0]
        self.calls[operator.name() + " wide" * wide] += 1
        return operator(*args, **(kwargs or {}))


def step(kind, dropout, way, device="cpu", dtype=torch.float32, **settings):
    """The gradient of all weights, and the operators that backward called. dtype: of autocast."""
    model = small(kind, dropout=dropout, **settings).train().to(device)
    padding = torch.zeros(2, 96, 128, dtype=torch.bool, device=device)
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0)).to(device)
    torch.manual_seed(5)
    if WAYS[way] is not None:
        model.recompute_activations(**WAYS[way])
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = model(images, padding).logits_KBQC.square().sum()
    with Counted() as counted:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), counted.calls


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["base", "detr"])
@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_gradients_stay_the_same(way, kind, dropout):
    whole, again = step(kind, dropout, "kept")[0], step(kind, dropout, way)[0]
    assert torch.equal(whole, again)


def test_what_sampling_gave_is_kept():
    (name,) = SAMPLING
    calls = {way: step("base", 0.3, way)[1] for way in WAYS}
    assert calls["kept"][name] == calls["products kept"][name] == 0
    assert calls["recomputed"][name] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ffn_width", [32, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["base", "detr"])
def test_narrow_products_are_kept_where_no_kernel_uses_them_up(kind, dropout, ffn_width, dtype, monkeypatch):
    """ffn_width 32: of a layer's own width, so that both of its products are kept."""
    monkeypatch.setattr(chosen, "implementation", reference)
    (whole, all_kept), (_, none_kept), (cheaply, narrow_kept) = (
        step(kind, dropout, way, dtype=dtype, width=32, ffn_width=ffn_width) for way in WAYS
    )
    assert torch.equal(whole, cheaply)
    assert all_kept["aten::addmm"] == narrow_kept["aten::addmm"] < none_kept["aten::addmm"]
    assert all_kept["aten::addmm wide"] <= narrow_kept["aten::addmm wide"] == none_kept["aten::addmm wide"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("way", list(WAYS)[1:])
@pytest.mark.parametrize("kind", ["base", "detr"])
def test_gradients_stay_the_same_on_a_gpu(kind, way, dtype, rel):
    whole, again = (step(kind, 0.3, way, device="cuda", dtype=dtype)[0] for way in ("kept", way))
    torch.testing.assert_close(whole, again, rtol=1e-3, atol=rel * whole.abs().max().item())
