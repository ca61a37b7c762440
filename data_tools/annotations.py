"""What every annotation format becomes: samples, and what is wrong with them.

A reader (coco.py, voc.py, yolo.py) makes a DataSet, places boxes in samples and adds those. What can be repaired is
repaired and counted, the rest is a fault: one line that says where, what was found, what to do. Faults are
collected, so that one run tells all of them.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.sample import Category, Sample
from data_tools.spill import Samples

CLIPPED, DROPPED = "box clipped to the image", "box dropped"
# By so much a box may stick out without being counted as clipped: the rounding of tools that write two decimals.
ROUNDING_PX = 0.01
LARGEST = 1e9  # of any coordinate or area that makes sense; infinity and NaN are not below it


class Fault(ValueError):
    """What is wrong with a record or a file of annotations."""


class NoArea(Fault):
    """A box that shows nothing of its image."""


@dataclass(frozen=True)
class Box:
    """An object as its file gives it; the box may still stick out of its image.

    label: place in the data set's classes. found: what the file says, for errors. area: None means the box's.
    """

    xywh_px: list[float]
    label: int
    annotation_id: int
    found: str
    area: float | None = None
    iscrowd: int = 0
    segmentation: Any = field(default_factory=list)


@dataclass(frozen=True)
class DataSet:
    """What annotations say, and what is wrong with them.

    path: the file or folder of annotations. classes: by category id. samples: by image id. repairs: how often each
    was made. dropped: a line for each box, or kind of file, left out. warnings: what is usable and odd, a line each.
    faults: a line each; the set can be used when there are none.
    """

    path: Path
    drop_bad_boxes: bool = False
    classes: list[Category] = field(default_factory=list)
    samples: Samples = field(default_factory=Samples)
    repairs: Counter[str] = field(default_factory=Counter)
    dropped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def collecting(self, where: str) -> Iterator[None]:
        """Turn a Fault raised inside into a line; a box without area is dropped if so wished."""
        advice = "correct it or take it out"
        try:
            yield
        except NoArea as fault:
            if self.drop_bad_boxes:
                self.dropped.append(f"{where} {fault}")
                self.repairs[DROPPED] += 1
            else:
                self.faults.append(f"{where} {fault}; {advice}, or drop such boxes with --drop-bad-boxes")
        except Fault as fault:
            self.faults.append(f"{where} {fault}; {advice}")

    def place(self, sample: Sample, box: Box) -> None:
        """Add to the sample what of the box is inside its image; counts clipping. Raises NoArea."""
        xyxy_px = _clipped(box.xywh_px, sample)
        if xyxy_px is None:
            of = f"of {sample.width}x{sample.height} (image_id {sample.image_id})"
            raise NoArea(f"has {box.found}, without area inside its image {of}")
        x, y, width, height = box.xywh_px
        box_area = (xyxy_px[2] - xyxy_px[0]) * (xyxy_px[3] - xyxy_px[1])
        area = box_area if box.area is None else box.area
        moved_px = max(abs(a - b) for a, b in zip(xyxy_px, (x, y, x + width, y + height), strict=True))
        if moved_px > ROUNDING_PX:
            self.repairs[CLIPPED] += 1
            area = min(area, box_area)
        sample.boxes_xyxy_px.append(xyxy_px)
        sample.labels.append(box.label)
        sample.category_ids.append(self.classes[box.label].category_id)
        sample.areas.append(float(area))
        sample.iscrowd.append(box.iscrowd)
        sample.annotation_ids.append(box.annotation_id)
        sample.segmentation.append(box.segmentation)

    def refuse_empty(self) -> None:
        if not self.faults and not any(sample.labels for sample in self.samples):
            self.faults.append(f"{self.path}: an empty set, no box is left; expected at least one")


def new_sample(image_id: int, file_name: str, width: int, height: int) -> Sample:
    """Without boxes."""
    return Sample(image_id, file_name, width, height, [], [], [], [], [], [], [])


def check_has_pixels(width: int, height: int, whose: str = "") -> None:
    if not (0 < width < LARGEST and 0 < height < LARGEST):
        raise Fault(f"{whose}has the size {width}x{height}, expected a pixel at least")


def short(value: Any) -> str:
    """Somebody else's value on one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _clipped(xywh_px: list[float], sample: Sample) -> list[float] | None:
    """The box as xyxy inside its image; None when that has no area."""
    if not all(abs(value) < LARGEST for value in xywh_px):
        return None
    x, y, width, height = map(float, xywh_px)
    x1, x2 = (min(max(value, 0.0), float(sample.width)) for value in (x, x + width))
    y1, y2 = (min(max(value, 0.0), float(sample.height)) for value in (y, y + height))
    return [x1, y1, x2, y2] if x1 < x2 and y1 < y2 else None
