import pytest
import torch

from framework.boxes import cxcywh_to_xyxy, generalized_iou, xyxy_to_cxcywh
from tests.oracles.matching import giou


def random_boxes(*shape: int) -> torch.Tensor:
    """cxcywh: some apart, some overlapping, some one in another."""
    torch.manual_seed(sum(shape))
    return torch.cat([torch.rand(*shape, 2), 0.05 + 0.6 * torch.rand(*shape, 2)], dim=-1).double()


def test_conversions_undo_each_other():
    assert cxcywh_to_xyxy(torch.tensor([5.0, 7.0, 2.0, 6.0])).tolist() == [4.0, 4.0, 6.0, 10.0]
    assert xyxy_to_cxcywh(torch.tensor([4.0, 4.0, 6.0, 10.0])).tolist() == [5.0, 7.0, 2.0, 6.0]
    boxes = random_boxes(3, 5)
    assert torch.allclose(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes, atol=1e-12)


def test_generalized_iou_is_that_of_the_oracle():
    a, b = random_boxes(7), random_boxes(9)
    found = generalized_iou(cxcywh_to_xyxy(a)[:, None], cxcywh_to_xyxy(b))
    expected = [[giou(one, other) for other in b.tolist()] for one in a.tolist()]
    assert found.tolist() == [pytest.approx(row, abs=1e-12) for row in expected]
    assert (found < 0).any() and (found > 0.3).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_boxes_are_finite(dtype):
    point, line, box = [0.5, 0.5, 0.5, 0.5], [0.2, 0.5, 0.8, 0.5], [0.4, 0.4, 0.6, 0.6]
    inverted = [0.9, 0.9, 0.1, 0.1]
    boxes = torch.tensor([point, line, box, inverted, [0.0] * 4], dtype=dtype, requires_grad=True)
    values = generalized_iou(boxes[:, None], boxes)
    assert values.isfinite().all() and (values.abs() <= 1).all()
    values.sum().backward()
    assert boxes.grad.isfinite().all()
