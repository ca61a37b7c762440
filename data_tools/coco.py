"""COCO's instances format, read with mistrust; what becomes of it, and of its faults, is told in annotations.py."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

from data_tools.annotations import LARGEST, Box, DataSet, Fault, check_has_pixels, new_sample, short
from data_tools.sample import Category, Sample
from framework.errors import InputError

MADE_ID = "annotation id made"
FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "annotations": {"image_id": int, "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}

Record = dict[str, Any]


def read_coco(path: Path, drop_bad_boxes: bool = False) -> DataSet:
    """Read an annotation file. A box without area inside its image is a fault, or dropped if so wished.

    Raises:
        InputError: it is not COCO's instances format at all, or it is empty.
    """
    raw, data = _load(path), DataSet(path, drop_bad_boxes)
    images, categories = _by_id(data, "images", raw), _by_id(data, "categories", raw)
    data.classes.extend(Category(categories[n]["name"], n) for n in sorted(categories))
    data.samples.extend(_sample(images[n]) for n in sorted(images))
    _place_boxes(data, raw["annotations"])
    data.refuse_empty()
    return data


def _load(path: Path) -> dict[str, list[Any]]:
    expected = "expected COCO's instances format: an object with the lists " + ", ".join(FIELDS)
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); {expected}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a JSON {type(raw).__name__}; {expected}")
    for name in FIELDS:
        if not isinstance(raw.get(name), list):
            raise InputError(f"{path}: no list '{name}' (found: {short(', '.join(raw))}); {expected}")
    for name in FIELDS:
        if not raw[name]:
            raise InputError(f"{path}: an empty set, its list '{name}' has no entry; expected at least one")
    return raw


def _by_id(data: DataSet, name: str, raw: dict[str, list[Any]]) -> dict[int, Record]:
    """The usable records of a list by their id."""
    found: dict[int, Record] = {}
    for place, record in enumerate(raw[name]):
        with data.collecting(f"{data.path}: {name}[{place}]"):
            _check_fields(record, FIELDS[name])
            if name == "images":
                _check_image(record)
            if record["id"] in found:
                raise Fault(f"has id {record['id']} like one before it")
            found[record["id"]] = record
    return found


def _check_fields(record: Any, fields: dict[str, type]) -> None:
    if not isinstance(record, dict):
        raise Fault(f"is {short(record)}, expected an object")
    for name, kind in fields.items():
        value = record.get(name)
        if type(value) is not kind:  # not isinstance: true is no number
            raise Fault(f"has {name} {short(value)}, expected {kind.__name__}")
        if type(value) is int and not 0 <= value < 2**63:
            raise Fault(f"has {name} {short(value)}, expected 0 to 2^63 - 1")


def _check_image(record: Record) -> None:
    path = Path(record["file_name"])
    if path.is_absolute() or ".." in path.parts or not path.name or not _is_file_name(record["file_name"]):
        raise Fault(f"has file_name {short(record['file_name'])}, expected a file inside the folder of images")
    check_has_pixels(record["width"], record["height"], whose=f"(id {record['id']}) ")


def _is_file_name(name: str) -> bool:
    """Whether the system can be asked for it."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _sample(image: Record) -> Sample:
    return new_sample(image["id"], image["file_name"], image["width"], image["height"])


def _place_boxes(data: DataSet, records: list[Any]) -> None:
    """The usable boxes into the samples, in the order of the file."""
    sample_of = {sample.image_id: sample for sample in data.samples}
    label_of = {category.category_id: label for label, category in enumerate(data.classes)}
    given_ids = [one["id"] for one in records if isinstance(one, dict) and type(one.get("id")) is int]
    new_ids = itertools.count(max(given_ids, default=0) + 1)
    taken_ids: set[int] = set()
    for place, record in enumerate(records):
        with data.collecting(f"{data.path}: annotations[{place}]"):
            _check_annotation(record, sample_of, label_of)
            annotation_id = next(new_ids) if record.get("id") is None else record["id"]
            if annotation_id in taken_ids:
                raise Fault(f"has id {annotation_id} like one before it")
            taken_ids.add(annotation_id)
            data.place(sample_of[record["image_id"]], _box(record, label_of[record["category_id"]], annotation_id))
            if record.get("id") is None:
                data.repairs[MADE_ID] += 1


def _check_annotation(record: Any, sample_of: dict[int, Sample], label_of: dict[int, int]) -> None:
    _check_fields(record, FIELDS["annotations"])
    if record["image_id"] not in sample_of:
        raise Fault(f"has image_id {record['image_id']}, which no usable entry of 'images' has")
    if record["category_id"] not in label_of:
        raise Fault(f"has category_id {record['category_id']}, which no usable entry of 'categories' has")
    if record.get("id") is not None:
        _check_fields(record, {"id": int})
    if len(record["bbox"]) != 4 or not all(_is_number(value) for value in record["bbox"]):
        raise Fault(f"has bbox {short(record['bbox'])}, expected the numbers x, y, width, height")
    if record.get("iscrowd") not in (None, 0, 1):
        raise Fault(f"has iscrowd {short(record['iscrowd'])}, expected 0 or 1")
    area = record.get("area")
    if area is not None and not (_is_number(area) and 0 <= area < LARGEST):
        raise Fault(f"has area {short(area)}, expected square pixels")


def _box(record: Record, label: int, annotation_id: int) -> Box:
    """A checked annotation."""
    return Box(
        xywh_px=record["bbox"],
        label=label,
        annotation_id=annotation_id,
        found=f"bbox {short(record['bbox'])}",
        area=record.get("area"),
        iscrowd=int(record.get("iscrowd") or 0),
        segmentation=record["segmentation"] if record.get("segmentation") is not None else [],
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
