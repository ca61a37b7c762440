"""COCO's instances format, read with mistrust; what becomes of it, and of its faults, is told in annotations.py."""

import itertools
import json
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.annotations import LARGEST, Box, DataSet, Fault, check_has_pixels, new_sample, short
from data_tools.big_json import NotAnObject, members
from data_tools.sample import Category, Sample
from data_tools.spill import Spill
from framework.errors import InputError

MADE_ID = "annotation id made"
FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "annotations": {"image_id": int, "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}

Record = dict[str, Any]


def read_coco(path: Path, drop_bad_boxes: bool = False) -> DataSet:
    """Read an annotation file, twice: annotations may come before what they refer to. A box without area inside its
    image is a fault, or dropped if so wished.

    Raises:
        InputError: it is not COCO's instances format at all, or it is empty.
    """
    data = DataSet(path, drop_bad_boxes)
    images, largest_id = _read_images_and_categories(data)
    _place_boxes(data, images, largest_id)
    data.refuse_empty()
    return data


def _read_images_and_categories(data: DataSet) -> tuple[dict[int, Sample], int]:
    """The usable images by their id, without boxes; the classes go into the data set. And the largest id of an
    annotation."""
    expected = "expected COCO's instances format: an object with the lists " + ", ".join(FIELDS)
    images: dict[int, Sample] = {}
    categories: dict[int, str] = {}
    kinds: dict[str, str] = {}  # of all members
    empty: list[str] = []
    largest_id = 0
    try:
        for name, place, record in members(data.path):
            if name in FIELDS and name in kinds and place in (None, 0):
                raise InputError(f"{data.path}: has the list '{name}' twice; {expected}")
            kinds[name] = "no list" if type(record) is not list and place is None else "list"
            if name == "annotations" and isinstance(record, dict) and type(record.get("id")) is int:
                largest_id = max(largest_id, record["id"])
            if name in ("images", "categories") and place is not None:
                with data.collecting(f"{data.path}: {name}[{place}]"):
                    _add_head(name, record, images, categories)
            if name in FIELDS and place is None and record == []:
                empty.append(name)
    except InputError:
        raise
    except NotAnObject as error:
        raise InputError(f"{data.path}: a JSON {error}; {expected}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{data.path}: not JSON ({error}); {expected}") from error
    for name in FIELDS:
        if kinds.get(name) != "list":
            raise InputError(f"{data.path}: no list '{name}' (found: {short(', '.join(kinds))}); {expected}")
    for name in empty:
        raise InputError(f"{data.path}: an empty set, its list '{name}' has no entry; expected at least one")
    data.classes.extend(Category(categories[n], n) for n in sorted(categories))
    _warn_of_one_name(data)
    return images, largest_id


def _warn_of_one_name(data: DataSet) -> None:
    ids: dict[str, list[int]] = {}
    for one in data.classes:
        ids.setdefault(one.name, []).append(one.category_id)
    for name, same in ids.items():
        if len(same) > 1:
            listed = f"{', '.join(map(str, same[:-1]))} and {same[-1]}"
            data.warnings.append(f"the categories {listed} have one name, {short(name)}; they stay different classes")


def _add_head(name: str, record: Any, images: dict[int, Sample], categories: dict[int, str]) -> None:
    """An entry of 'images' or 'categories'. Raises Fault."""
    _check_fields(record, FIELDS[name])
    if name == "images":
        _check_image(record)
    if record["id"] in (images if name == "images" else categories):
        raise Fault(f"has id {record['id']} like one before it")
    if name == "images":
        images[record["id"]] = new_sample(record["id"], record["file_name"], record["width"], record["height"])
    else:
        categories[record["id"]] = record["name"]


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


def _place_boxes(data: DataSet, images: dict[int, Sample], largest_id: int) -> None:
    """The usable boxes into the samples, in the order of the file, and these into the data set, by their id."""
    label_of = {category.category_id: label for label, category in enumerate(data.classes)}
    new_ids = itertools.count(largest_id + 1)
    taken_ids: set[int] = set()
    placed, image_of = Spill(), array("q")  # boxes in the order of the file
    for name, place, record in members(data.path):
        if name != "annotations":
            continue
        with data.collecting(f"{data.path}: annotations[{place}]"):
            _check_annotation(record, images, label_of)
            annotation_id = next(new_ids) if record.get("id") is None else record["id"]
            if annotation_id in taken_ids:
                raise Fault(f"has id {annotation_id} like one before it")
            taken_ids.add(annotation_id)
            image = images[record["image_id"]]
            alone = new_sample(image.image_id, image.file_name, image.width, image.height)
            data.place(alone, _box(record, label_of[record["category_id"]], annotation_id))
            try:
                placed.append(json.dumps([[[_columns(alone)]]]).encode())  # as deep as it will be in a sample, and more
            except RecursionError:
                raise Fault("has a segmentation that is nested too deeply") from None
            image_of.append(image.image_id)
            if record.get("id") is None:
                data.repairs[MADE_ID] += 1
    image_N, ids = np.array(image_of, dtype=np.int64), np.array(sorted(images), dtype=np.int64)
    by_image = np.argsort(image_N, kind="stable")
    starts, stops = (np.searchsorted(image_N[by_image], ids, side) for side in ("left", "right"))
    for image_id, start, stop in zip(ids.tolist(), starts.tolist(), stops.tolist(), strict=True):
        sample = images.pop(image_id)
        for n in by_image[start:stop].tolist():
            for column, values in zip(_columns(sample), json.loads(placed[n])[0][0][0], strict=True):
                column.extend(values)
        data.samples.append(sample)


def _columns(sample: Sample) -> list[list[Any]]:
    """All that it has of each box."""
    return [sample.boxes_xyxy_px, sample.labels, sample.category_ids, sample.areas, sample.iscrowd,
            sample.annotation_ids, sample.segmentation]  # fmt: skip


def _check_annotation(record: Any, images: dict[int, Sample], label_of: dict[int, int]) -> None:
    _check_fields(record, FIELDS["annotations"])
    if record["image_id"] not in images:
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
