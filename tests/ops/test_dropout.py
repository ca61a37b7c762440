"""Dropout with what stands beside it: kept shares, gradients, seeds; against torch's own."""

import pytest
import torch

from ops import dropout, library
from ops.dropout import Mode, add_dropout_, relu_dropout_

P = 0.3
SCALE = 1 / (1 - round(P * 2**16) / 2**16)
DTYPES = [torch.float32, torch.bfloat16]


def plain(mode, x, p, seed=5, other=None):
    return dropout.run(mode, x, other, torch.tensor(seed), p, torch.empty_like(x))


def kept(count, seed=5, p=P, isa_of=torch.float32):
    return plain(Mode.PLAIN, torch.ones(count, dtype=isa_of), p, seed) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 63, 64, 16384, 40_001])
def test_every_kind_follows_from_what_is_kept(isa, count, dtype):
    x, other = torch.randn(2, count).to(dtype)
    scaled = (x.float() * kept(count) * SCALE).to(dtype)
    torch.testing.assert_close(plain(Mode.PLAIN, x, P), scaled)
    torch.testing.assert_close(plain(Mode.RELU, x, P), scaled.relu())
    near = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else {}  # one rounding instead of two
    torch.testing.assert_close(plain(Mode.ADD, x, P, other=other), other + scaled, **near)
    torch.testing.assert_close(plain(Mode.GATE, x, P, other=other), torch.where(other > 0, x * SCALE, 0))


def test_what_is_kept_depends_on_the_seed_alone():
    try:
        of_isas = []
        for isa in library.ISAS:
            try:
                library.choose_cpu_isa(isa)
            except ValueError:
                continue
            of_isas.append(kept(100_003))
        assert all(torch.equal(of_isas[0], one) for one in of_isas)
    finally:
        library.choose_cpu_isa()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(of_isas[0], kept(100_003))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(of_isas[0][:70], kept(70)) and torch.equal(of_isas[0], kept(100_003, isa_of=torch.bfloat16))


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9])
def test_the_share_that_is_dropped(p):
    """To 2^-16, and never everything: what is kept is scaled by so much that the mean stays."""
    count = 1_000_000
    share = min(round(p * 2**16), 2**16 - 1) / 2**16
    near = 4 * (share * (1 - share) / count) ** 0.5
    assert (~kept(count, p=p)).double().mean().item() == pytest.approx(share, abs=near)
    scales = plain(Mode.PLAIN, torch.ones(count), p).unique()
    assert scales[-1].item() == pytest.approx(1 / (1 - share), rel=1e-6) and (scales[:-1] == 0).all()


@pytest.mark.parametrize("other_seed", [6, 5 + 2**32, -1, 2**62])
def test_no_element_tells_of_another(other_seed):
    """Correlations of a million elements with their neighbours, and with those of another seed: standard normal."""
    count = 2**20
    one, other = ((kept(count, seed).float() - (1 - P)) / (P * (1 - P)) ** 0.5 for seed in (5, other_seed))
    together = [one[lag:] @ one[:-lag] for lag in (1, 2, 8, 16, 256, 1024, 2**16)] + [one @ other]
    assert max(abs(x.item()) for x in together) / count**0.5 < 4.5


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_forward_and_gradients(dtype):
    """float64 takes torch's dropout."""
    x, residual = (torch.randn(50, 41, dtype=dtype, requires_grad=True) for _ in range(2))
    y = relu_dropout_(x * 1, P, True)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    on = y > 0
    assert 0.55 * 0.5 < on.double().mean() < 0.85 * 0.5
    scale = 1 / (1 - P) if dtype == torch.float64 else SCALE
    torch.testing.assert_close(grad, (on * scale).to(dtype))
    torch.testing.assert_close(y[on], (x * scale)[on])

    z = add_dropout_(x * 1, residual, P, True)
    grad, grad_residual = torch.autograd.grad(z, [x, residual], torch.ones_like(z))
    assert torch.equal(grad_residual, torch.ones_like(z))
    assert set(grad.unique().tolist()) == {0.0, torch.tensor(scale, dtype=dtype).item()}
    near = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(z, residual + x * grad, **near)


def test_seeds_come_from_torchs_generator_and_are_not_repeated():
    def draw():
        return [relu_dropout_(torch.ones(200), P, True), add_dropout_(torch.ones(200), torch.zeros(200), P, True)]

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    for one, again, other in zip(first, draw(), second, strict=True):
        assert torch.equal(one, again) and not torch.equal(one, other)


def test_mixed_dtypes_promote_as_a_sum_does():
    x = torch.ones(4000, dtype=torch.bfloat16)
    for residual in (torch.zeros(4000), torch.zeros(4000, dtype=torch.bfloat16)):
        z = add_dropout_(x.clone(), residual, P, True)
        assert z.dtype == residual.dtype
        assert z.unique().tolist() == pytest.approx([0, 1 / (1 - P)], rel=4e-3)
    x, residual = torch.ones(4000), torch.zeros(4000, dtype=torch.bfloat16)
    assert add_dropout_(x, residual, P, True).dtype == torch.float32


@pytest.mark.parametrize("training, p", [(False, P), (True, 0.0)])
def test_nothing_is_dropped(training, p):
    x, residual = torch.randn(2, 100)
    assert torch.equal(relu_dropout_(x.clone(), p, training), x.relu())
    assert torch.equal(add_dropout_(x.clone(), residual, p, training), residual + x)


def test_whoever_needs_the_used_up_memory_is_told():
    weight = torch.ones(30, requires_grad=True)
    for use in (lambda x: relu_dropout_(x, P, True), lambda x: add_dropout_(x, torch.ones(30), P, True)):
        kept_for_backward = weight.exp()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            use(kept_for_backward).sum().backward()


def test_nan_and_infinity_are_not_hidden():
    x = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(1000)
    y = relu_dropout_(x.clone(), P, True).view(-1, 3)
    assert y[:, 0].isnan().double().mean() > 0.5 and y[:, 1].isinf().double().mean() > 0.5 and (y[:, 2] == 0).all()


@pytest.mark.parametrize("arguments, said", [
    (dict(mode=4), "mode: 4, expected 0 to 3"),
    (dict(mode=Mode.ADD), "other: expected in mode 2"),
    (dict(mode=Mode.PLAIN, other=torch.ones(3)), "other: not expected in mode 0"),
    (dict(p=1.0), "p: 1, expected 0 <= p < 1"),
    (dict(x=torch.ones(3).double()), "x: Double, expected"),
    (dict(out=torch.ones(4)), r"out: shape \\(4\\), expected \\(3\\)"),
    (dict(x=torch.ones(6)[::2]), "x: expected contiguous"),
    (dict(seed=torch.ones(())), "seed: Float, expected Long"),
])  # fmt: skip
def test_what_a_kernel_could_not_bear_is_refused(arguments, said):
    usual = dict(x=torch.ones(3), other=None, seed=torch.tensor(1), p=P, mode=Mode.PLAIN, out=torch.ones(3))
    with pytest.raises(RuntimeError, match=said.replace("\\\\", "\\")):
        torch.ops.tenfold.dropout(*(usual | arguments).values())
