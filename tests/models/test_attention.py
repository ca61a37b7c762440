"""References on their way to the sampling."""

import pytest
import torch

from framework.models.attention import DeformableAttention
from tests.models.pyramids import SIZES_HW, UNPADDED_HW, make_pyramid
from tests.oracles import positions


def test_centres_against_loops():
    for image, centres_S2 in enumerate(make_pyramid().centres_BS2()):
        expected = [box[:2] for box, _ in positions.proposals(SIZES_HW, UNPADDED_HW[image])]
        torch.testing.assert_close(centres_S2, torch.tensor(expected))


@pytest.mark.parametrize("numbers", [2, 4])
def test_references_are_scaled_to_each_padded_map(numbers):
    """Those of points and of boxes; the sampling takes fractions of the padded map (tests/ops)."""
    pyramid, references_BQn, given = make_pyramid(), torch.rand(2, 5, numbers), []
    attention = DeformableAttention(width=8, num_levels=3, num_heads=2, num_points=4)
    attention.sample.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1]))
    attention(torch.randn(2, 5, 8), references_BQn, torch.randn(2, 53, 8), pyramid)
    for image in range(2):
        for query in range(5):
            for level in range(3):
                sides = zip(UNPADDED_HW[image][level], SIZES_HW[level], strict=True)
                y, x = (unpadded / padded for unpadded, padded in sides)
                reference = references_BQn[image, query].tolist()
                expected = [number * scale for number, scale in zip(reference, [x, y, x, y], strict=False)]
                assert given[0][image, query, level].tolist() == pytest.approx(expected)
