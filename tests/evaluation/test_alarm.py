import pytest

from framework.evaluation.alarm import collapse

IMAGES = [{"id": i, "width": 100, "height": 100} for i in range(4)]
WANTED = [{"image_id": i, "category_id": 1 + i % 3, "bbox": [20 * i, 10, 30, 30]} for i in range(4)]
TRUTH = {"images": IMAGES, "annotations": WANTED}


def alarm(detections, ap=0.0, best=0.0, images=60_000, attention="deformable"):
    return collapse(ap, best, images, attention, lambda: TRUTH, lambda: detections)


def found(category_of=lambda wanted: wanted["category_id"], score=0.5, move=0.0):
    """Of each image its box, and a second one away from it."""
    return [
        {"image_id": w["image_id"], "category_id": category_of(w), "score": score / n,
         "bbox": [w["bbox"][0] + move + 40 * (n - 1), w["bbox"][1], 30, 30]}
        for w in WANTED for n in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "numbers, expected",
    [
        (dict(ap=0.001, images=59_999), None),
        (dict(ap=0.001), "AP is 0.0010 after 60000 images, by which deformable"),
        (dict(ap=-1.0), None),
        (dict(ap=0.001, images=599_999, attention="dense"), None),
        (dict(ap=0.001, images=600_000, attention="dense"), "AP is 0.0010 after 600000 images"),
        (dict(ap=0.003), None),
        (dict(ap=0.09, best=0.2, images=10), "AP has fallen from 0.200 to 0.090"),
        (dict(ap=0.11, best=0.2), None),
        (dict(ap=0.004, best=0.01), None),
    ],
)
def test_when_it_is_raised(numbers, expected):
    said = alarm(found(), **numbers)
    assert said[0].startswith(expected) if expected else said == []


@pytest.mark.parametrize(
    "detections, expected",
    [
        ([], "there are no detections"),
        (found(score=0.04), "no score is above 0.040: everything is background"),
        (found(category_of=lambda _: 2), "only category 2 is predicted, of 3"),
        (found(category_of=lambda w: w["category_id"] % 3 + 1), "100% of the boxes are found, 0% with their class"),
        ([d | {"bbox": [30, 30, 20, 20]} for d in found()], "the best boxes of an image are all alike"),
        (found(move=60), "nothing in the detections says why"),
    ],
)
def test_what_the_detections_show(detections, expected):
    _, *causes = alarm(detections)
    assert any(cause.startswith(expected) for cause in causes) and len(causes) == 1
