"""COCO's instances format, read with mistrust: what can be repaired is repaired and counted, the rest is a fault.

Faults are collected, so that one run tells all of them; each is one line: where, what was found, what to do.
"""

import itertools
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.sample import Category, Sample
from framework.errors import InputError

CLIPPED, MADE_ID, DROPPED = "box clipped to the image", "annotation id made", "box dropped"
# By so much a box may stick out without being counted as clipped: the rounding of tools that write two decimals.
ROUNDING_PX = 0.01
LARGEST = 1e9  # of any coordinate or area that makes sense; infinity and NaN are not below it
FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "annotations": {"image_id": int, "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}

Record = dict[str, Any]


@dataclass(frozen=True)
class DataSet:
    """What an annotation file says, and what is wrong with it.

    classes: by category id. samples: by image id. repairs: how often each was made. dropped: a line for each
    box left out. faults: a line each; the set can be used when there are none.
    """

    path: Path
    classes: list[Category] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    repairs: Counter[str] = field(default_factory=Counter)
    dropped: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Box:
    xyxy_px: list[float]
    category_id: int
    area: float
    iscrowd: int
    annotation_id: int
    segmentation: Any


class _Fault(ValueError):
    """What is wrong with a record of the file."""


class _NoArea(_Fault):
    """A box that shows nothing of its image."""


def read_coco(path: Path, drop_bad_boxes: bool = False) -> DataSet:
    """Read an annotation file. A box without area inside its image is a fault, or dropped if so wished.

    Raises:
        InputError: it is not COCO's instances format at all, or it is empty.
    """
    raw, data = _load(path), DataSet(path)
    images, categories = _by_id(data, "images", raw), _by_id(data, "categories", raw)
    data.classes.extend(Category(categories[n]["name"], n) for n in sorted(categories))
    boxes_of = _boxes_by_image(data, raw["annotations"], images, categories, drop_bad_boxes)
    label_of = {category.category_id: label for label, category in enumerate(data.classes)}
    data.samples.extend(_sample(images[n], boxes_of[n], label_of) for n in sorted(images))
    if not data.faults and not any(boxes_of.values()):
        data.faults.append(f"{path}: an empty set, no box is left; expected at least one")
    return data


def _load(path: Path) -> dict[str, list[Any]]:
    expected = "expected COCO's instances format: an object with the lists " + ", ".join(FIELDS)
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {expected}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a JSON {type(raw).__name__}; {expected}")
    for name in FIELDS:
        if not isinstance(raw.get(name), list):
            raise InputError(f"{path}: no list '{name}' (found: {_short(', '.join(raw))}); {expected}")
    for name in FIELDS:
        if not raw[name]:
            raise InputError(f"{path}: an empty set, its list '{name}' has no entry; expected at least one")
    return raw


def _by_id(data: DataSet, name: str, raw: dict[str, list[Any]]) -> dict[int, Record]:
    """The usable records of a list by their id."""
    found: dict[int, Record] = {}
    for place, record in enumerate(raw[name]):
        try:
            _check_fields(record, FIELDS[name])
            if name == "images":
                _check_image(record)
            if record["id"] in found:
                raise _Fault(f"has id {record['id']} like one before it")
            found[record["id"]] = record
        except _Fault as fault:
            data.faults.append(f"{data.path}: {name}[{place}] {fault}; correct it or take it out")
    return found


def _check_fields(record: Any, fields: dict[str, type]) -> None:
    if not isinstance(record, dict):
        raise _Fault(f"is {_short(record)}, expected an object")
    for name, kind in fields.items():
        value = record.get(name)
        if type(value) is not kind:  # not isinstance: true is no number
            raise _Fault(f"has {name} {_short(value)}, expected {kind.__name__}")
        if type(value) is int and not 0 <= value < 2**63:
            raise _Fault(f"has {name} {_short(value)}, expected 0 to 2^63 - 1")


def _check_image(record: Record) -> None:
    path = Path(record["file_name"])
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise _Fault(f"has file_name {_short(record['file_name'])}, expected a file inside the folder of images")
    if not (0 < record["width"] < LARGEST and 0 < record["height"] < LARGEST):
        raise _Fault(f"(id {record['id']}) has the size {_size(record)}, expected a pixel at least")


def _boxes_by_image(
    data: DataSet,
    records: list[Any],
    images: dict[int, Record],
    categories: dict[int, Record],
    drop_bad_boxes: bool,
) -> dict[int, list[_Box]]:
    """The usable boxes of each image, in the order of the file."""
    boxes_of: dict[int, list[_Box]] = defaultdict(list)
    given_ids = [one["id"] for one in records if isinstance(one, dict) and type(one.get("id")) is int]
    new_ids = itertools.count(max(given_ids, default=0) + 1)
    taken_ids: set[int] = set()
    for place, record in enumerate(records):
        where, advice = f"{data.path}: annotations[{place}]", "correct it or take it out"
        try:
            _check_annotation(record, images, categories)
            annotation_id = next(new_ids) if record.get("id") is None else record["id"]
            if annotation_id in taken_ids:
                raise _Fault(f"has id {annotation_id} like one before it")
            taken_ids.add(annotation_id)
            boxes_of[record["image_id"]].append(_box(data, record, images[record["image_id"]], annotation_id))
        except _NoArea as fault:
            if drop_bad_boxes:
                data.dropped.append(f"{where} {fault}")
                data.repairs[DROPPED] += 1
            else:
                data.faults.append(f"{where} {fault}; {advice}, or drop such boxes with --drop-bad-boxes")
        except _Fault as fault:
            data.faults.append(f"{where} {fault}; {advice}")
    return boxes_of


def _check_annotation(record: Any, images: dict[int, Record], categories: dict[int, Record]) -> None:
    _check_fields(record, FIELDS["annotations"])
    if record["image_id"] not in images:
        raise _Fault(f"has image_id {record['image_id']}, which no usable entry of 'images' has")
    if record["category_id"] not in categories:
        raise _Fault(f"has category_id {record['category_id']}, which no usable entry of 'categories' has")
    if record.get("id") is not None:
        _check_fields(record, {"id": int})
    if len(record["bbox"]) != 4 or not all(_is_number(value) for value in record["bbox"]):
        raise _Fault(f"has bbox {_short(record['bbox'])}, expected the numbers x, y, width, height")
    if record.get("iscrowd") not in (None, 0, 1):
        raise _Fault(f"has iscrowd {_short(record['iscrowd'])}, expected 0 or 1")
    area = record.get("area")
    if area is not None and not (_is_number(area) and 0 <= area < LARGEST):
        raise _Fault(f"has area {_short(area)}, expected square pixels")


def _box(data: DataSet, record: Record, image: Record, annotation_id: int) -> _Box:
    """A checked annotation as a box inside its image; counts repairs. Raises _NoArea."""
    xyxy_px = _clipped(record["bbox"], image)
    if xyxy_px is None:
        of = f"of {_size(image)} (image_id {image['id']})"
        raise _NoArea(f"has bbox {_short(record['bbox'])}, without area inside its image {of}")
    x, y, width, height = record["bbox"]
    box_area = (xyxy_px[2] - xyxy_px[0]) * (xyxy_px[3] - xyxy_px[1])
    area = record["area"] if record.get("area") is not None else box_area
    moved_px = max(abs(a - b) for a, b in zip(xyxy_px, (x, y, x + width, y + height), strict=True))
    if moved_px > ROUNDING_PX:
        data.repairs[CLIPPED] += 1
        area = min(area, box_area)
    if record.get("id") is None:
        data.repairs[MADE_ID] += 1
    segmentation = record["segmentation"] if record.get("segmentation") is not None else []
    iscrowd = int(record.get("iscrowd") or 0)
    return _Box(xyxy_px, record["category_id"], float(area), iscrowd, annotation_id, segmentation)


def _clipped(bbox_xywh_px: list[float], image: Record) -> list[float] | None:
    """The box as xyxy inside its image; None when that has no area."""
    if not all(abs(value) < LARGEST for value in bbox_xywh_px):
        return None
    x, y, width, height = map(float, bbox_xywh_px)
    x1, x2 = (min(max(value, 0.0), float(image["width"])) for value in (x, x + width))
    y1, y2 = (min(max(value, 0.0), float(image["height"])) for value in (y, y + height))
    return [x1, y1, x2, y2] if x1 < x2 and y1 < y2 else None


def _sample(image: Record, boxes: list[_Box], label_of: dict[int, int]) -> Sample:
    return Sample(
        image_id=image["id"],
        file_name=image["file_name"],
        width=image["width"],
        height=image["height"],
        boxes_xyxy_px=[box.xyxy_px for box in boxes],
        labels=[label_of[box.category_id] for box in boxes],
        category_ids=[box.category_id for box in boxes],
        areas=[box.area for box in boxes],
        iscrowd=[box.iscrowd for box in boxes],
        annotation_ids=[box.annotation_id for box in boxes],
        segmentation=[box.segmentation for box in boxes],
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _size(image: Record) -> str:
    return f"{image['width']}x{image['height']}"


def _short(value: Any) -> str:
    """Somebody else's value on one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
