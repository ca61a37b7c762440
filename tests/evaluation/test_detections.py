"""Post-processing: the published numbers, and COCO's format with the right category ids."""

import json
import math

import pytest
import torch

from data_tools.sample import Category
from framework.evaluation.detections import (
    Detections,
    category_ids,
    from_rows,
    placeholder_classes,
    to_coco,
    to_rows,
    top_detections,
)
from framework.models.detector import Predictions
from tests.paths import reference_file

ORIGINAL_SIZES_HW = [(480, 560), (375, 640)]


@pytest.mark.data
@pytest.mark.parametrize("variant, classification", [("base", "focal"), ("detr", "softmax")])
def test_published_numbers(variant, classification):
    expected = torch.load(reference_file("outputs.pt"), weights_only=True)[variant]
    wrong_layer = torch.zeros_like(expected["pred_logits"])
    found = top_detections(
        Predictions(
            torch.stack([wrong_layer, expected["pred_logits"]]),
            torch.stack([torch.zeros_like(expected["pred_boxes"]), expected["pred_boxes"]]),
        ),
        ORIGINAL_SIZES_HW,
        classification,
    )
    for image, one in enumerate(found):
        # DETR's own post-processing keeps the order of the queries; ours is by score.
        order = expected["scores"][image].sort(descending=True, stable=True).indices
        torch.testing.assert_close(one.scores_T, expected["scores"][image][order], atol=1e-6, rtol=0)
        assert torch.equal(one.labels_T, expected["labels"][image][order])
        torch.testing.assert_close(one.boxes_xyxy_px_T4, expected["boxes"][image][order], atol=0.05, rtol=0)


def predictions(logits_QC, boxes_Q4):
    return Predictions(torch.tensor([[logits_QC]]), torch.tensor([[boxes_Q4]]))


def test_focal_takes_a_query_under_several_classes():
    (one,) = top_detections(
        predictions([[2.0, 0.0, 1.0], [-9.0, -9.0, 3.0]], [[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]),
        [(100, 200)], "focal", limit=3,
    )  # fmt: skip
    assert one.labels_T.tolist() == [2, 0, 2] and one.queries_T.tolist() == [1, 0, 0]
    assert one.scores_T.tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (3, 2, 1)])
    expected = [[0.0, 0.0, 100.0, 100.0], [80.0, 30.0, 120.0, 70.0], [80.0, 30.0, 120.0, 70.0]]
    torch.testing.assert_close(one.boxes_xyxy_px_T4, torch.tensor(expected), atol=1e-4, rtol=0)


def test_softmax_leaves_no_object_out():
    (one,) = top_detections(
        predictions([[1.0, 0.0, 5.0], [0.0, 2.0, 0.0]], [[0.5, 0.5, 1.0, 1.0]] * 2),
        [(10, 10)],
        "softmax",
        limit=100,
    )
    assert one.labels_T.tolist() == [1, 0] and one.queries_T.tolist() == [1, 0]
    assert one.scores_T.tolist() == pytest.approx([
        math.exp(2) / (math.exp(2) + 2), math.exp(1) / (math.exp(1) + 1 + math.exp(5))
    ])  # fmt: skip


def test_equal_scores_keep_the_order_of_the_queries():
    boxes = [[0.5, 0.5, 0.01 * width, 0.5] for width in range(1, 101)]
    (one,) = top_detections(predictions([[0.0, 0.0]] * 100, boxes), [(100, 100)], "focal", limit=6)
    assert one.labels_T.tolist() == [0, 1] * 3
    widths = one.boxes_xyxy_px_T4[:, 2] - one.boxes_xyxy_px_T4[:, 0]
    assert widths.tolist() == pytest.approx([1, 1, 2, 2, 3, 3], abs=1e-4)


CLASSES = [Category("disc", 3), Category("ring", 7)]


@pytest.mark.parametrize("labels, expected", [("contiguous", [7, 3]), ("category_id", [3])])
def test_categories_follow_the_labels_setting(labels, expected):
    found = Detections(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 0, 3, 8]), torch.zeros(4, 4),
                       torch.arange(4))  # fmt: skip
    assert to_coco(found, 5, category_ids(CLASSES, labels))["category_id"].tolist() == expected


def test_result_rows_are_coco_and_json():
    found = Detections(
        torch.tensor([0.75, math.nan, 0.5]), torch.tensor([0, 0, 1]),
        torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0], [math.inf, 0.0, 0.0, 0.0]]), torch.tensor([9, 0, 1]),
    )  # fmt: skip
    rows = to_rows(to_coco(found, 42, category_ids(CLASSES, "contiguous")))
    assert rows == [{"image_id": 42, "category_id": 3, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.75, "query": 9}]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert to_rows(from_rows([rows[0] | {"more": 1}])) == [rows[0] | {"query": -1}] and to_rows(from_rows([])) == []


def test_classes_nobody_named_keep_their_numbers():
    classes = placeholder_classes(3)
    assert [c.name for c in classes] == ["category 0", "category 1", "category 2"]
    assert category_ids(classes, "contiguous") == category_ids(classes, "category_id") == {0: 0, 1: 1, 2: 2}
