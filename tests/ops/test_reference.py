"""The plain-torch op against nested loops and finite differences."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from ops import fused_ms_deform_attn, ms_deform_attn
from tests.oracles import ms_deform_attn as oracle

# All sizes differ, and no level is square: a transposition cannot hide.
B, Q, M, E, P = 2, 7, 3, 5, 4
SIZES_HW = [(6, 4), (3, 8)]
S, L = 48, 2


def arguments(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """value, locations (a good part of them outside) and weights."""
    draw = torch.Generator().manual_seed(seed)
    value = torch.randn(B, S, M, E, generator=draw, dtype=dtype)
    locations = torch.rand(B, Q, M, L, P, 2, generator=draw, dtype=dtype) * 1.6 - 0.3
    return value, locations, torch.rand(B, Q, M, L, P, generator=draw, dtype=dtype)


def fused_arguments(numbers: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """value, references (2 or 4 numbers), offsets and logits."""
    draw = torch.Generator().manual_seed(seed)
    value = torch.randn(B, S, M, E, generator=draw, dtype=torch.float64)
    references = torch.rand(B, Q, L, numbers, generator=draw, dtype=torch.float64)
    offsets = torch.randn(B, Q, M, L, P, 2, generator=draw, dtype=torch.float64) * 2
    return value, references, offsets, torch.randn(B, Q, M, L * P, generator=draw, dtype=torch.float64)


def test_equals_the_loops():
    value, locations, weights = arguments()
    expected = oracle.ms_deform_attn(value, SIZES_HW, locations, weights)
    found = ms_deform_attn(value, SIZES_HW, locations, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("numbers", [2, 4])
def test_fused_equals_the_loops(numbers):
    value, references, offsets, logits = fused_arguments(numbers)
    expected = oracle.fused_ms_deform_attn(value, SIZES_HW, references, offsets, logits)
    found = fused_ms_deform_attn(value, SIZES_HW, references, offsets, logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("numbers", [2, 4])
def test_every_level_has_a_reference_of_its_own(numbers):
    value, references, offsets, logits = fused_arguments(numbers)
    shifted = references.clone()
    shifted[:, :, 1] += 0.1
    expected = oracle.fused_ms_deform_attn(value, SIZES_HW, shifted, offsets, logits)
    found = fused_ms_deform_attn(value, SIZES_HW, shifted, offsets, logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, fused_ms_deform_attn(value, SIZES_HW, references, offsets, logits))


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0.25, 0.5, 2.0),  # the centre of the left pixel
        (0.5, 0.5, 3.0),  # between both
        (0.0, 0.5, 1.0),  # the left edge: half of the pixel, half of the zeros around the map
        (1.0, 0.5, 2.0),  # the right edge
        (0.25, 0.0, 1.0),  # the upper edge
        (0.0, 0.0, 0.5),  # a corner
        (-0.25, 0.5, 0.0),  # one pixel outside
        (1.25, 0.5, 0.0),
        (7.0, -9.0, 0.0),
    ],
)
def test_edges_of_a_map_of_two_pixels(x, y, expected):
    value = torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
    locations = torch.tensor([x, y]).view(1, 1, 1, 1, 1, 2)
    found = ms_deform_attn(value, [(1, 2)], locations, torch.ones(1, 1, 1, 1, 1))
    assert found.item() == pytest.approx(expected)


def test_gradients_of_the_op():
    inputs = tuple(t.requires_grad_() for t in arguments(seed=2))
    assert gradcheck(lambda *a: ms_deform_attn(a[0], SIZES_HW, *a[1:]), inputs, fast_mode=True)


@pytest.mark.parametrize("numbers", [2, 4])
def test_gradients_of_the_fused_op(numbers):
    inputs = tuple(t.requires_grad_() for t in fused_arguments(numbers, seed=3))
    assert gradcheck(lambda *a: fused_ms_deform_attn(a[0], SIZES_HW, *a[1:]), inputs, fast_mode=True)


def test_level_sizes_as_a_tensor():
    value, locations, weights = arguments()
    found = ms_deform_attn(value, torch.tensor(SIZES_HW), locations, weights)
    assert torch.equal(found, ms_deform_attn(value, SIZES_HW, locations, weights))


def test_strides_do_not_matter():
    value, locations, weights = arguments()
    expected = ms_deform_attn(value, SIZES_HW, locations, weights)
    strided = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (locations, weights))
    expanded = value[:1].expand(B, -1, -1, -1)
    assert torch.equal(ms_deform_attn(value, SIZES_HW, *strided), expected)
    assert torch.equal(ms_deform_attn(expanded, SIZES_HW, locations, weights)[0], expected[0])


def test_bf16_value_keeps_its_dtype_and_exact_coordinates():
    value, locations, weights = arguments(dtype=torch.float32)
    low = value.bfloat16()
    found = ms_deform_attn(low, SIZES_HW, locations, weights)
    expected = ms_deform_attn(low.double(), SIZES_HW, locations.double(), weights.double())
    assert found.dtype == torch.bfloat16
    # Only the result is rounded (2^-9); coordinates in bf16 would be off by some per cent.
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)


def test_autocast_changes_nothing():
    value, references, offsets, logits = fused_arguments(4)
    inputs = (references.float(), offsets.bfloat16(), logits.bfloat16())
    expected = fused_ms_deform_attn(value.bfloat16(), SIZES_HW, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused_ms_deform_attn(value.bfloat16(), SIZES_HW, *inputs)
    assert torch.equal(found, expected)


def test_gradients_keep_the_dtypes_of_their_inputs():
    value, references, offsets, logits = (t.float() for t in fused_arguments(2))
    inputs = [value.bfloat16(), references, offsets.bfloat16(), logits]
    for tensor in inputs:
        tensor.requires_grad_()
    fused_ms_deform_attn(inputs[0], SIZES_HW, *inputs[1:]).float().sum().backward()
    assert [t.grad.dtype for t in inputs] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(("images", "queries"), [(0, 5), (2, 0), (0, 0)])
def test_no_images_or_no_queries(images, queries):
    value = torch.randn(images, S, M, E, requires_grad=True)
    locations = torch.rand(images, queries, M, L, P, 2, requires_grad=True)
    found = ms_deform_attn(value, SIZES_HW, locations, torch.rand(images, queries, M, L, P))
    assert found.shape == (images, queries, M * E)
    found.sum().backward()
    assert value.grad.shape == value.shape and not value.grad.any()
