"""Sine codes against loops."""

import pytest
import torch

from framework.models.position import sine_box_code, sine_position
from tests.oracles import positions


def test_code_of_boxes():
    """As published: 128 numbers for each of cx, cy, w, h."""
    boxes_BQ4 = torch.rand(2, 3, 4)
    boxes_BQ4[1, 2] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    expected = [[positions.box_code(box, 128) for box in image] for image in boxes_BQ4.tolist()]
    torch.testing.assert_close(sine_box_code(boxes_BQ4, 128), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("offset", [-0.5, 0.0])  # Deformable DETR, DETR
def test_code_of_pixels(offset):
    padding_BHW = torch.ones(2, 5, 7, dtype=torch.bool)
    unpadded_hw = [(5, 4), (3, 7)]
    for mask_HW, (height, width) in zip(padding_BHW, unpadded_hw, strict=True):
        mask_HW[:height, :width] = False
    code_BHWD = sine_position(padding_BHW, 16, offset=offset)
    for image, size_hw in enumerate(unpadded_hw):
        for row in range(size_hw[0]):
            for column in range(size_hw[1]):
                expected = positions.pixel_code(row, column, size_hw, 16, offset)
                assert code_BHWD[image, row, column].tolist() == pytest.approx(expected, abs=1e-5)
