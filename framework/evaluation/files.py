"""Files in COCO's formats as evaluation reads them; a fault is one line that names the file and the entry."""

import json
import math
from pathlib import Path
from typing import Any

from framework.errors import InputError


def read_ground_truth(path: str | Path) -> dict[str, Any]:
    """An annotation file in COCO's format, as far as evaluation needs it; InputError says what is wrong."""
    truth = _read_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(truth, dict) or not isinstance(truth.get(key), list):
            raise InputError(f"{path}: not a COCO annotation file: expected an object with a list {key!r}")
    try:
        images = {_integer(image["id"]) for image in truth["images"]}
        categories = {_integer(category["id"]) for category in truth["categories"]}
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"{path}: not a COCO annotation file: an image or category has no integer id of 64 bits"
        ) from error
    for place, annotation in enumerate(truth["annotations"]):
        _check_box(annotation, f"{path}: annotation {place}", images, categories, "its own list")
    return truth


def read_detections(path: str | Path, ground_truth: dict[str, Any]) -> list[dict[str, Any]]:
    """A result file in COCO's format that fits the ground truth; InputError names the first misfit."""
    detections = _read_json(path)
    if not isinstance(detections, list):
        raise InputError(f"{path}: not COCO results: expected a list of detections, found {_kind(detections)}")
    images = {image["id"] for image in ground_truth["images"]}
    categories = {category["id"] for category in ground_truth["categories"]}
    for place, detection in enumerate(detections):
        where = f"{path}: detection {place}"
        _check_box(detection, where, images, categories, "the annotations")
        if not _is_number(detection.get("score")):
            raise InputError(f"{where}: score is {detection.get('score')!r}, expected a finite number")
    return detections


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error


def _check_box(box: Any, where: str, images: set[int], categories: set[int], known_from: str) -> None:
    if not isinstance(box, dict):
        raise InputError(f"{where}: expected an object with image_id, category_id and bbox, found {_kind(box)}")
    for key, known in (("image_id", images), ("category_id", categories)):
        if not isinstance(box.get(key), int) or box[key] not in known:
            raise InputError(f"{where}: {key} {box.get(key)!r} is not in {known_from}")
    if not _is_number(box.get("area", 0)):
        raise InputError(f"{where}: area is {box['area']!r}, expected a finite number")
    bbox = box.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise InputError(f"{where}: bbox is {bbox!r}, expected 4 finite numbers: x, y, width, height in pixels")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise ValueError(f"{value!r} is not an integer of 64 bits")
    return value


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null"}.get(type(value), repr(value))
