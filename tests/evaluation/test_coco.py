"""The twelve numbers: cocoapi's own example, both packages alike, no matter the order or the ids."""

import copy
import json
import random

import pytest

from framework.errors import UsageError
from framework.evaluation.coco import METRICS, EvalConfig, area_ranges, coco_metrics, report, table
from framework.evaluation.detections import from_rows
from tests.paths import data_folder

PACKAGES = ("pycocotools", "hotcoco")


def random_set(seed, side=640, images=12, tied=False):
    """Ground truth with crowds, and detections: near ones, strangers, equal scores."""
    draw = random.Random(seed)

    def box():
        width, height = (side * draw.choice((0.02, 0.08, 0.3)) * draw.uniform(0.6, 1.6) for _ in range(2))
        return [draw.uniform(0, side - width), draw.uniform(0, side - height), width, height]

    truth = {
        "images": [{"id": 10 * n, "width": side, "height": side} for n in range(images)],
        "categories": [{"id": c, "name": str(c)} for c in (1, 5, 9)],
        "annotations": [],
    }
    found = []
    for image in truth["images"][:-1]:  # the last one is empty
        for _ in range(draw.randint(1, 9)):
            x, y, w, h = box()
            kind = {"image_id": image["id"], "category_id": draw.choice((1, 5, 9))}
            truth["annotations"].append(
                {"id": len(truth["annotations"]), "bbox": [x, y, w, h], "area": w * h * draw.uniform(0.5, 1),
                 "iscrowd": int(draw.random() < 0.15), **kind}
            )  # fmt: skip
            for _ in range(draw.randint(0, 3)):
                near = [x + w * draw.gauss(0, 0.1), y + h * draw.gauss(0, 0.1), w, h * draw.uniform(0.8, 1.2)]
                found.append({"bbox": near, **kind})
        found += [{"bbox": box(), "image_id": image["id"], "category_id": draw.choice((1, 5, 9))} for _ in range(4)]
    for one in found:
        one["score"] = draw.choice((0.2, 0.5, 0.8)) if tied else draw.random()
    return truth, found


def metrics_of(truth, found, image_side=None, **others):
    return coco_metrics(truth, from_rows(found), image_side, **others)


@pytest.mark.data
@pytest.mark.parametrize("package", PACKAGES)
def test_published_numbers_of_cocoapi(package):
    folder = data_folder("coco_open/eval_parity")
    names = "instances_val2014_100", "instances_val2014_fakebbox100_results", "expected_bbox"
    truth, found, expected = (json.loads((folder / f"{name}.json").read_text()) for name in names)
    metrics = metrics_of(truth, found, package=package)
    assert metrics == pytest.approx(expected["pycocotools_2_0_11"], abs=1e-9)
    assert {name: f"{value:.3f}" for name, value in metrics.items()} == {
        name: f"{value:.3f}" for name, value in expected["published"].items()
    }


@pytest.mark.parametrize("image_side", [None, 128])
@pytest.mark.parametrize("tied", [False, True])
def test_both_packages_give_the_same_numbers(image_side, tied):
    for seed in range(3):
        truth, found = random_set(seed, side=image_side or 640, tied=tied)
        slow, fast = (metrics_of(truth, found, image_side, package=package) for package in PACKAGES)
        assert fast == slow
        assert all(0 < slow[name] < 1 for name in METRICS)  # every number is put to the test


@pytest.mark.parametrize("package", PACKAGES)
def test_the_order_of_detections_is_nothing(package):
    truth, found = random_set(4, tied=True)
    first = metrics_of(truth, found, package=package)
    for seed in range(5):
        random.Random(seed).shuffle(found)
        assert metrics_of(truth, found, package=package) == first


@pytest.mark.parametrize("package", PACKAGES)
def test_a_crowd_is_neither_missed_nor_a_false_alarm(package):
    disc = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50]}
    crowd = {"image_id": 1, "category_id": 1, "bbox": [100, 0, 200, 90], "iscrowd": 1}
    truth = {"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [disc, crowd]}
    found = [disc | {"score": 0.5}, disc | {"bbox": [150, 10, 30, 30], "score": 0.9}]
    assert metrics_of(truth, found, package=package)["AP"] == pytest.approx(1.0)
    crowd["iscrowd"] = 0
    assert metrics_of(truth, found, package=package)["AP"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("package", PACKAGES)
def test_an_annotation_with_id_zero_can_be_found(package):
    truth = {"images": [{"id": 0}], "categories": [{"id": 0}],
             "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": [0, 0, 50, 50]}]}  # fmt: skip
    found = [{"image_id": 0, "category_id": 0, "bbox": [0, 0, 50, 50], "score": 0.5}]
    assert metrics_of(truth, found, package=package)["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("package", PACKAGES)
def test_ids_may_be_any_integers(package):
    truth, found = random_set(6)
    expected = metrics_of(truth, found, package=package)
    for one in truth["images"]:
        one["id"] = 2**62 - one["id"]
    for one in truth["categories"]:
        one["id"] = -one["id"]
    for one in truth["annotations"] + found:
        one["image_id"], one["category_id"] = 2**62 - one["image_id"], -one["category_id"]
    assert metrics_of(truth, found, package=package) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_found_is_zero_and_nothing_to_find_is_minus_one(package, capfd):
    truth, found = random_set(1)
    assert set(metrics_of(truth, [], package=package).values()) == {0.0}
    assert set(metrics_of(truth | {"annotations": []}, found, package=package).values()) == {-1.0}
    assert capfd.readouterr() == ("", "")  # cocoapi's prints stay inside


def test_inputs_are_left_as_they_were():
    truth, found = random_set(2)
    before = copy.deepcopy((truth, found))
    metrics_of(truth, found)
    assert (truth, found) == before


def test_sizes_scale_with_the_image():
    truth, found = random_set(3)
    small_truth, small_found = copy.deepcopy((truth, found))
    for one in small_truth["annotations"] + small_found:
        one["bbox"] = [value / 5 for value in one["bbox"]]
        if "area" in one:
            one["area"] /= 25
    assert metrics_of(small_truth, small_found, 128) == pytest.approx(metrics_of(truth, found), abs=1e-9)
    assert area_ranges(128)["medium"] == pytest.approx((6.4**2, 19.2**2))
    assert area_ranges() == {
        "all": (0, 1e10),
        "small": (0, 1024),
        "medium": (1024, 9216),
        "large": (9216, 1e10),
    }


def test_table_reads_like_cocoapi_and_says_which_sizes():
    metrics = {name: n / 100 + 0.0004 for n, name in enumerate(METRICS)}
    lines = table(metrics, None).splitlines()
    assert lines[1] == "AP50   Average Precision @[ IoU=0.50      | area=   all | maxDets=100 ] = 0.010"
    assert lines[7] == "AR10   Average Recall    @[ IoU=0.50:0.95 | area=   all | maxDets= 10 ] = 0.070"
    assert lines[5].split()[0] == "APl" and "area= large" in lines[5] and lines[5].endswith("0.050")
    assert lines[12:] == ["size thresholds of COCO: small < 32^2 px, medium < 96^2 px, large above"]
    assert table(metrics, 128).endswith(
        "scaled by (128 / 640)^2 to images of side 128 px: small < 6.4^2 px, medium < 19.2^2 px, large above"
    )
    assert report(metrics, 128, images=3) == metrics | {
        "image_side": 128, "images": 3,
        "size_thresholds_px2": {name: area_ranges(128)[name] for name in ("small", "medium", "large")},
    }  # fmt: skip


@pytest.mark.parametrize("values, message", [
    ({"every": -1}, "eval.every is -1"), ({"batch": 0}, "eval.batch is 0"),
    ({"image_side": 0}, "eval.image_side is 0"),
    ({"max_detections": 101}, "eval.max_detections is 101, expected 1 to 100"),
])  # fmt: skip
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        EvalConfig(**values)
