"""Files that are not what they should be: one line that says which entry and what was found."""

import copy
import json

import pytest

from framework.errors import InputError
from framework.evaluation.files import read_detections, read_ground_truth

TRUTH = {
    "images": [{"id": 3}, {"id": 4}],
    "categories": [{"id": 1, "name": "disc"}],
    "annotations": [{"id": 1, "image_id": 3, "category_id": 1, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0}],
}
FOUND = [
    {"image_id": 3, "category_id": 1, "bbox": [0, 0, 5.5, 5], "score": 0.5},
    {"image_id": 4, "category_id": 1, "bbox": [1, 1, 5, 5], "score": 1, "file_name": "extra.jpg"},
]


def written(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_good_files_are_read_as_they_are(tmp_path):
    assert read_ground_truth(written(tmp_path, TRUTH)) == TRUTH
    assert read_detections(written(tmp_path, FOUND), TRUTH) == FOUND
    assert read_detections(written(tmp_path, []), TRUTH) == []


@pytest.mark.parametrize("content, message", [
    ('{"images": [', r"file.json: not JSON \(Expecting"),
    ("\x00\x01", "file.json: not JSON"),
    (FOUND, "not a COCO annotation file: expected an object with a list 'images'"),
    ({"images": [], "annotations": []}, "expected an object with a list 'categories'"),
    (TRUTH | {"images": [{"id": "3"}]}, "an image or category has no integer id"),
    (TRUTH | {"images": [{"id": 2**63}]}, "an image or category has no integer id of 64 bits"),
    (TRUTH | {"categories": [5]}, "an image or category has no integer id"),
    (TRUTH | {"images": [{"id": 4}]}, "annotation 0: image_id 3 is not in its own list"),
    (TRUTH | {"annotations": [None]}, "annotation 0: expected an object with .*, found null"),
    (TRUTH | {"annotations": [TRUTH["annotations"][0] | {"area": None}]}, "annotation 0: area is None"),
])  # fmt: skip
def test_bad_annotations(content, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_ground_truth(written(tmp_path, content))


@pytest.mark.parametrize("key, value, message", [
    ("image_id", 5, "detection 1: image_id 5 is not in the annotations"),
    ("image_id", [4], r"detection 1: image_id \[4\] is not in the annotations"),
    ("category_id", 2, "detection 1: category_id 2 is not in the annotations"),
    ("bbox", [1, 2, 3], r"detection 1: bbox is \[1, 2, 3\], expected 4 finite numbers"),
    ("bbox", [1, 2, 3, float("nan")], "detection 1: bbox is .*nan"),
    ("bbox", "1 2 3 4", "detection 1: bbox is '1 2 3 4'"),
    ("score", None, "detection 1: score is None, expected a finite number"),
    ("score", True, "detection 1: score is True"),
])  # fmt: skip
def test_bad_detections(key, value, message, tmp_path):
    found = copy.deepcopy(FOUND)
    found[1][key] = value
    with pytest.raises(InputError, match=message):
        read_detections(written(tmp_path, found), TRUTH)


@pytest.mark.parametrize("content, message", [
    ({"annotations": FOUND}, "not COCO results: expected a list of detections, found an object"),
    (["box"], "detection 0: expected an object with image_id, category_id and bbox, found text"),
])  # fmt: skip
def test_no_list_of_detections(content, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_detections(written(tmp_path, content), TRUTH)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="missing.json: no such file"):
        read_ground_truth(tmp_path / "missing.json")
