"""The compiled kernels of every instruction set against loops, the plain-torch operators and finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import ops
from ops import compiled, reference
from tests.ops import cases
from tests.ops.cases import MODES, Case, make
from tests.ops.conftest import GPU
from tests.oracles import ms_deform_attn as oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
HALF = pytest.param(torch.float16, marks=GPU)  # on a CPU it is refused
# In units of the last place; float64 is compared with itself.
SLACK = {torch.float32: 1, torch.bfloat16: 0.1, torch.float16: 0.1, torch.float64: 10}
# Wide enough for a head to be copied, and for the paths that are specialised for a width.
WIDTHS = [1, 5, 16, 32, 37, 64, 70]


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_same(found, expected) -> None:
    """To the bit, but on a GPU, where the order of sums is free."""
    near = dict(rtol=0, atol=0) if cases.device == "cpu" else dict(rtol=1e-4, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **near, equal_nan=True)


def error(found, expected) -> float:
    """Relative, over the whole tensor."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("width", [5, 16, 64])
@pytest.mark.parametrize("mode", MODES)
def test_equal_the_loops(kernels, mode, width):
    case = make(mode, Q=3, M=2, E=width, P=3)
    torch.testing.assert_close(case.run(compiled), case.run(oracle), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [3, 16])
@pytest.mark.parametrize("mode", MODES)
def test_gradients(kernels, mode, width):
    case = make(mode, Q=4, E=width, P=3, seed=3)
    inputs = tuple(t.requires_grad_() for t in case.tensors)
    # On a GPU sums are added in any order, so that two backwards differ in their last bits.
    assert gradcheck(
        lambda *t: Case(mode, case.sizes_hw, list(t)).run(compiled), inputs, fast_mode=True, nondet_tol=1e-12
    )


@pytest.mark.parametrize("dtype", [*DTYPES, HALF])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mode", MODES)
def test_error_is_at_most_twice_that_of_the_reference(kernels, mode, width, dtype):
    if dtype == torch.float16 and kernels != "cuda":
        pytest.skip("float16 is for GPUs")
    for queries in (2, 19):  # few: value is read in place; many: each head's part is copied together
        case = make(mode, E=width, Q=queries, dtype=dtype)
        exact = case.to(torch.float64).results(reference)
        for found, plain, truth in zip(case.results(compiled), case.results(reference), exact, strict=True):
            assert found.dtype == plain.dtype and found.shape == plain.shape
            slack = SLACK[plain.dtype] * torch.finfo(plain.dtype).eps
            assert error(found, truth) <= 2 * error(plain, truth) + slack


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_costs_no_more_than_rounding_value_and_weights(kernels, mode):
    case = make(mode, B=1, Q=200, M=4, E=32, sizes_hw=[(20, 31), (10, 17)])
    exact = case.run(reference)
    value, *others = case.tensors
    if mode == "locations":
        others[1] = others[1].bfloat16().double()
    rounded = Case(mode, case.sizes_hw, [value.bfloat16().double(), *others]).run(reference).bfloat16()
    assert error(case.to(torch.bfloat16).run(compiled), exact) <= 1.5 * error(rounded, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 32])
def test_copied_heads_give_the_bits_of_heads_read_in_place(isa, width, dtype):
    case = make("points", B=1, Q=40, E=width, dtype=dtype)
    value, references, offsets, logits = case.tensors
    few = Case("points", case.sizes_hw, [value, references[:, :1], offsets[:, :1], logits[:, :1]])
    assert torch.equal(case.run(compiled)[:, :1], few.run(compiled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height", [9, 99], ids=["copied", "in place"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_bits_do_not_depend_on_the_number_of_threads(isa, mode, heads, height, dtype, threads):
    """More threads than heads cut the queries, the heads and the levels; enough work that each gets a part."""
    case = make(mode, B=1, Q=350, M=heads, E=32, sizes_hw=[(height, 31), (11, 5), (2, 3)], dtype=dtype)
    threads(1)
    expected = case.results(compiled)
    for count in (2, 3, 7):
        threads(count)
        for _ in range(7):
            assert all(map(torch.equal, case.results(compiled), expected))


@pytest.mark.parametrize("queries", [2, 40], ids=["in place", "copied"])
def test_a_value_that_is_no_number_shows_only_where_it_is_seen(isa, queries, threads):
    """Six points fill no vector. Its last lanes read nothing that no point does: not where the offsets of the next
    query would lead from the reference of this one, which is the corner of the map here."""
    sizes_hw = [(6, 4), (3, 8)]
    case = make("points", B=1, Q=queries, M=1, P=3, sizes_hw=sizes_hw, dtype=torch.float32)
    value, references, offsets, _ = case.tensors
    references[:, ::2], references[:, 1::2] = 0.8, 1.8
    offsets.zero_()
    offsets[:, 1::2] = -torch.tensor(sizes_hw, dtype=torch.float32).flip(-1)[:, None]
    value[:, 0], value[:, 24] = float("nan"), float("inf")
    for count in (1, 2, 3):
        threads(count)
        assert all(t.isfinite().all() for t in case.results(compiled))


@pytest.mark.parametrize("far", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e9, 7.0, -7.0])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [5, 32])
def test_points_far_outside_count_nothing(kernels, width, mode, axis, far):
    case = make(mode, E=width, dtype=torch.float32)
    value, *others = case.tensors
    places = others[-2]  # locations, or offsets
    if mode == "boxes":
        others[0][..., 2:].clamp_(min=0.1)
    if mode != "locations" and abs(far) == 7.0:
        far *= 100  # to leave these boxes and the map
    places[:, :, :, 0, 1, axis] = far
    found = case.results(compiled)
    if mode != "boxes" or math.isfinite(far):  # an infinite offset of a box makes NaN of the reference's gradient
        for one, other in zip(found, case.results(reference), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if mode == "locations":
        others[-1][:, :, :, 0, 1] = 0
    places[:, :, :, 0, 1, axis] = -100.0 if mode == "locations" else -1e4
    expected = case.results(reference)
    grad_places, grad_weights = found[-2], found[-1]
    assert not grad_places[:, :, :, 0, 1].any()
    assert all(t.isfinite().all() for t in found)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_weights, expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("width", [5, 32])
def test_references_that_are_no_numbers_count_nothing(kernels, width, numbers):
    case = make("points" if numbers == 2 else "boxes", E=width, dtype=torch.float32)
    for bad in (float("nan"), float("inf"), -1e38):
        case.tensors[1][:] = bad
        found = case.results(compiled)
        assert not any(t.any() for t in found)


@pytest.mark.parametrize("mode", MODES)
def test_edges(kernels, mode):
    """Points exactly on pixel centres, half way, and on the edge of the zeros around."""
    case = make(mode, Q=50, P=5)
    places = case.tensors[-2]
    if mode != "locations":
        case.tensors[1][:] = 0.5
        places.copy_((places * 2).round() / 2)
    else:
        places.copy_((places * 24).round() / 24)
    torch.testing.assert_close(case.run(compiled), case.run(reference), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "shape",
    [
        dict(sizes_hw=[(1, 1)]),
        dict(sizes_hw=[(1, 1), (1, 1), (1, 2)]),
        dict(sizes_hw=[(5, 3)], P=1),
        dict(M=1, Q=30),
        dict(P=9, sizes_hw=[(2, 3)] * 5),
        dict(P=256),
        dict(B=65, Q=2, M=2),
        dict(B=0),
        dict(Q=0),
        dict(B=0, Q=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [5, 32])
def test_shapes_at_the_limits(kernels, width, mode, shape):
    case = make(mode, **shape, E=width, dtype=torch.float32)
    for found, expected in zip(case.results(compiled), case.results(reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [5, 32])
def test_every_number_is_written(kernels, width, mode, queries):
    """Memory that torch hands out is full of NaN here."""
    case = make(mode, Q=queries, E=width, dtype=torch.float32)
    expected = case.results(compiled)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = case.results(compiled)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_strides_and_alignment_do_not_matter(kernels, mode):
    case = make(mode, Q=19, E=16, dtype=torch.float32)
    expected = case.results(compiled)

    def strided(tensor):
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    def misaligned(tensor):
        return torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    for change in (strided, misaligned):
        changed = Case(mode, case.sizes_hw, [change(t) for t in case.tensors])
        assert_same([changed.run(compiled), *gradients(changed)], [expected[0], *gradients(case)])
    expanded = Case(mode, case.sizes_hw, [t[:1].expand_as(t) for t in case.tensors])
    copied = Case(mode, case.sizes_hw, [t.contiguous() for t in expanded.tensors])
    assert_same(gradients(expanded), gradients(copied))


def gradients(case: Case):
    """Of the sum: its gradient is one number, expanded."""
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    return torch.autograd.grad(Case(case.mode, case.sizes_hw, leaves).run(compiled).sum(), leaves)


@pytest.mark.parametrize("width", [5, 32])
def test_softmax_of_large_and_of_infinite_logits(kernels, width):
    case = make("points", E=width, dtype=torch.float32)
    logits = case.tensors[-1]
    logits.mul_(1e4)
    logits[..., ::3] = -float("inf")
    found, expected = case.results(compiled), case.results(reference)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    logits[0, 0, 0] = float("nan")
    out = case.run(compiled)
    assert out[0, 0, :width].isnan().all() and out[0, 0, width:].isfinite().all() and out[:, 1:].isfinite().all()


@pytest.mark.parametrize("mode", ["points", "boxes"])
def test_reference_points_get_a_gradient_only_where_asked(kernels, mode):
    case = make(mode, dtype=torch.float32)
    expected = case.results(compiled)
    leaves = [t.clone() for t in case.tensors]
    leaves[2].requires_grad_()
    Case(mode, case.sizes_hw, leaves).run(compiled)
    wanted = [leaves[0], leaves[2], leaves[3]]
    for tensor in wanted:
        tensor.requires_grad_()
    out = Case(mode, case.sizes_hw, leaves).run(compiled)
    draw = torch.Generator().manual_seed(9)
    grads = torch.autograd.grad(out, wanted, torch.randn(out.shape, generator=draw, dtype=torch.float64).float())
    assert_same(grads, [expected[1], expected[3], expected[4]])


def test_the_public_functions_run_the_kernels(kernels):
    for mode in MODES:
        case = make(mode, dtype=torch.float32)
        assert torch.equal(case.run(ops), case.run(compiled))
