"""YOLO's text labels: a folder of .txt files, each named like its image, a line an object.

    class cx cy w h        class: place in the list of names, from 0; the others: fractions of the image's size

An image without such a file, or with an empty one, is an image without objects. Lines with more columns are polygons,
key points or scores, and a fault. So is a number outside of 0 to 1, also with --drop-bad-boxes: it may be pixels.

Image ids: 1, 2, ... by file name. Annotation ids: 1, 2, ... over all lines in that order. Category ids: YOLO's + 1,
so that they begin at 1 like COCO's.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.annotations import Box, DataSet, Fault, new_sample, short
from data_tools.classes import numbered, read_names
from data_tools.files import IMAGE_SUFFIXES, by_stem, files_in, read_text
from data_tools.images import upright_size
from data_tools.sample import Sample
from framework.errors import InputError, UsageError
from framework.tracking.console import logger, progress

COLUMNS = "class cx cy w h"
NAMES_FILES = ("classes.txt", "data.yaml")
ROUNDING = 0.01  # by so much a number may lie outside of 0 to 1, as Ultralytics has it


@dataclass(frozen=True)
class _Object:
    where: str
    label: int
    cxcywh: list[float]
    annotation_id: int


def read_yolo(path: Path, images: Path, names: list[str] | None = None, drop_bad_boxes: bool = False) -> DataSet:
    """Read a folder of labels and the sizes of the images; names: of the classes, None looks for a file of them.

    Raises:
        UsageError: no labels, no images, some of them in folders below, or no names of the classes.
    """
    files = [file for file in files_in(path, [".txt"], "--annotations") if file.name not in NAMES_FILES]
    photos = files_in(images, IMAGE_SUFFIXES, "--images")
    data = DataSet(path, drop_bad_boxes, numbered(read_names(find_names(path)) if names is None else names))
    _tell_unread(data, images)
    file_of = _match_names(data, files, images, photos)
    annotation_ids = itertools.count(1)
    with progress(len(photos), description="read labels") as bar:
        for image_id, photo in enumerate(photos, 1):
            things = _objects(data, file_of[photo.stem], annotation_ids) if photo.stem in file_of else []
            _add(data, image_id, photo, things)
            bar.update()
    data.refuse_empty()
    return data


def find_names(labels: Path) -> Path:
    """The file of class names nearest to the labels: in their folder or the two above. Raises UsageError."""
    folder = labels.resolve()
    for candidate in (above / name for above in (folder, *folder.parents[:2]) for name in NAMES_FILES):
        if candidate.is_file():
            logger.info("class names from %s", candidate)
            return candidate
    raise UsageError(
        f"--annotations {labels}: no {' or '.join(NAMES_FILES)} in it or the two folders above, and labels are "
        "numbers only; name the classes with --classes FILE (one name a line, or YOLO's data.yaml)"
    )


def _tell_unread(data: DataSet, images: Path) -> None:
    """What lies among the images and is none by its suffix."""
    suffixes = Counter(path.suffix.lower() for path in images.iterdir() if path.is_file())
    for suffix in sorted(suffixes.keys() - {*IMAGE_SUFFIXES, ".txt"}):
        kind = f"with suffix {suffix}" if suffix else "without suffix"
        data.dropped.append(f"{images}: {suffixes[suffix]} file(s) {kind}; images have {' '.join(IMAGE_SUFFIXES)}")


def _match_names(data: DataSet, files: list[Path], images: Path, photos: list[Path]) -> dict[str, Path]:
    """Stem -> labels; where labels do not have exactly one image, that is a fault."""
    named_like = by_stem([*files, *photos])
    for file in files:
        others = [name for name in named_like[file.stem] if name != file.name]
        with data.collecting(f"{file}:"):
            if not others:
                raise Fault(f"has no image of its name in --images {images}")
            if len(others) > 1:
                raise Fault(f"has the name of more than one file: {', '.join(others)}")
    return {file.stem: file for file in files}


def _objects(data: DataSet, file: Path, annotation_ids: Iterator[int]) -> list[_Object]:
    objects: list[_Object] = []
    with data.collecting(f"{file}:"):
        for number, line in enumerate(read_text(file).split("\n"), 1):
            where = f"{file}: line {number}"
            if line.strip():
                with data.collecting(where):
                    objects.append(_Object(where, *_parsed(line.split(), len(data.classes)), next(annotation_ids)))
    return objects


def _parsed(columns: list[str], num_classes: int) -> tuple[int, list[float]]:
    """Class and cxcywh of a line. Raises Fault."""
    if len(columns) != 5:
        hint = " (polygons, key points and scores are not read)" if len(columns) > 5 else ""
        raise Fault(f"has {len(columns)} columns, expected 5: {COLUMNS}{hint}")
    try:
        label, *cxcywh = map(float, columns)
    except ValueError:
        raise Fault(f"has {short(' '.join(columns))}, expected five numbers: {COLUMNS}") from None
    if label not in range(num_classes):
        raise Fault(f"has class {columns[0]}, expected 0 to {num_classes - 1}, a place in the list of class names")
    if not all(-ROUNDING <= value <= 1 + ROUNDING for value in cxcywh):
        raise Fault(f"has cx cy w h {' '.join(columns[1:])}, expected fractions of the image, 0 to 1, not pixels")
    return int(label), cxcywh


def _add(data: DataSet, image_id: int, photo: Path, things: list[_Object]) -> None:
    """A sample with its boxes, unless the image cannot be read."""
    try:
        sample = new_sample(image_id, photo.name, *upright_size(photo))
    except InputError as error:
        data.faults.append(str(error))
        return
    for thing in things:
        with data.collecting(thing.where):
            data.place(sample, _box(sample, thing))
    data.samples.append(sample)


def _box(sample: Sample, thing: _Object) -> Box:
    cx, cy, w, h = thing.cxcywh
    xywh_px = [(cx - w / 2) * sample.width, (cy - h / 2) * sample.height, w * sample.width, h * sample.height]
    return Box(xywh_px, thing.label, thing.annotation_id, "cx cy w h {:g} {:g} {:g} {:g}".format(*thing.cxcywh))
