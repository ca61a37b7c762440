"""Pascal VOC: a folder of XML files, one an image.

    <annotation> <filename>, <size><width> <height>, <object>... each <name>, <bndbox><xmin> <ymin> <xmax> <ymax>

The devkit counts pixels from 1 and includes the last: its box (xmin, ymin, xmax, ymax) covers xmin - 1 to xmax and
ymin - 1 to ymax in px from the image's left and top edge, which is what is written. Many tools count from 0 all the
same; their files cannot be told from the devkit's, and their boxes come out up to a pixel too far left and up. An
xmin or ymin of 0 gives such a tool away: that box is clipped like any that sticks out, and counted as a repair.

`<difficult>` objects are ordinary ones, which is counted as well: a crowd of COCO is an area to ignore, they are
objects. `<part>`, `<pose>`, `<truncated>` and `<occluded>` say nothing about the box of the object and are not read.

Image ids: 1, 2, ... by image file name. Annotation ids: 1, 2, ... over all objects in that order.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from data_tools.annotations import Box, DataSet, Fault, check_has_pixels, new_sample, short
from data_tools.classes import numbered
from data_tools.files import IMAGE_SUFFIXES, by_stem, files_in, read_text
from framework.errors import InputError

DIFFICULT = "difficult object kept as an ordinary one"
FROM_0 = "box with xmin or ymin 0, where VOC counts from 1"
CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class _Object:
    where: str
    name: str
    corners: list[float]
    is_difficult: bool


@dataclass(frozen=True)
class _Annotation:
    """An XML file. image: its file name, below the folder of images."""

    file: Path
    image: str
    width: int
    height: int
    objects: list[_Object]


def read_voc(
    path: Path,
    images: Path,
    names: list[str] | None = None,
    drop_bad_boxes: bool = False,
    split: Path | None = None,
) -> DataSet:
    """Read a folder of XML files; names: of the classes in their order, None takes those there are, sorted.

    split: a file with the stems of the XML files to read, one a line (VOC's ImageSets/Main/train.txt); None: all.

    Raises:
        UsageError: the folder holds no XML files, or some in folders below.
        InputError: the split is not such a file.
    """
    data = DataSet(path, drop_bad_boxes)
    files = files_in(path, [".xml"], "--annotations")
    annotations = _read_files(data, files if split is None else _of_split(data, files, split), images)
    if split is None:
        _tell_unread(data, images, {one.image for one in annotations})
    found = {thing.name for one in annotations for thing in one.objects}
    data.classes.extend(numbered(sorted(found) if names is None else names))
    label_of = {category.name: label for label, category in enumerate(data.classes)}
    annotation_ids = itertools.count(1)
    for image_id, one in enumerate(annotations, 1):
        sample = new_sample(image_id, one.image, one.width, one.height)
        for thing in one.objects:
            with data.collecting(thing.where):
                data.place(sample, _box(thing, label_of, next(annotation_ids)))
                _count_oddities(data, thing)
        data.samples.append(sample)
    data.refuse_empty()
    return data


def _of_split(data: DataSet, files: list[Path], split: Path) -> list[Path]:
    """The files of the split; one that there is not is a fault."""
    try:
        stems = [line.strip() for line in read_text(split).split("\n") if line.strip()]
    except Fault as fault:
        raise InputError(f"{split}: {fault}") from None
    columns = next((line for line in stems if len(line.split()) > 1), None)
    if columns:
        raise InputError(
            f"{split}: has the line {short(columns)}, expected one name of an XML file, without .xml, a line"
        )
    known = {file.stem: file for file in files}
    for stem in stems:
        with data.collecting(f"{split}:"):
            if stem not in known:
                raise Fault(f"names {short(stem)}, and --annotations {data.path} has no {stem}.xml")
    return [known[stem] for stem in dict.fromkeys(stems) if stem in known]


def _tell_unread(data: DataSet, images: Path, read: set[str]) -> None:
    """Images that no XML file is about: other than in YOLO, these are not images without objects."""
    left = [path.name for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name not in read]
    if left:
        data.dropped.append(f"{images}: {len(left)} image(s) without an XML file, {min(left)} the first")


def _read_files(data: DataSet, files: list[Path], images: Path) -> list[_Annotation]:
    """The usable files; the others, and what cannot be used of them, become faults."""
    candidates = by_stem(path for path in sorted(images.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES)
    annotation_of: dict[str, _Annotation] = {}
    for file in files:
        with data.collecting(f"{file}:"):
            root = _root(file)
            objects = _objects(data, file, root)
            image = _image_name(root, images, candidates.get(file.stem, []), file.stem)
            if image in annotation_of:
                raise Fault(f"is about the image {image} like {annotation_of[image].file}")
            width, height = (_whole(root, f"size/{side}") for side in ("width", "height"))
            check_has_pixels(width, height)
            annotation_of[image] = _Annotation(file, image, width, height, objects)
    return [annotation_of[image] for image in sorted(annotation_of)]


def _root(file: Path) -> ElementTree.Element:
    text = read_text(file)
    if "<!DOCTYPE" in text:  # where entities are defined, which grow to gigabytes or name other files
        raise Fault("has a DOCTYPE, expected elements only")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise Fault(f"is not XML ({error})") from None
    if root.tag != "annotation":
        raise Fault(f"is <{root.tag}>, expected Pascal VOC's <annotation>")
    return root


def _image_name(root: ElementTree.Element, images: Path, same_stem: list[str], stem: str) -> str:
    """<filename> if it is in the folder of images, else the image named like the XML file."""
    given = (root.findtext("filename") or "").strip()
    path = Path(given)
    if given and not path.is_absolute() and ".." not in path.parts and (images / path).is_file():
        return path.as_posix()
    if len(same_stem) != 1:
        found = f"more than one: {', '.join(same_stem)}" if same_stem else "none"
        raise Fault(
            f"has the filename {short(given)}, not in --images {images}; of images named like {stem}.xml: {found}"
        )
    return same_stem[0]


def _objects(data: DataSet, file: Path, root: ElementTree.Element) -> list[_Object]:
    objects: list[_Object] = []
    for place, element in enumerate(root.findall("object"), 1):
        name = " ".join((element.findtext("name") or "").split())
        where = f"{file}: object {place} ({name})"
        with data.collecting(where):
            if not name:
                raise Fault("has no name")
            corners = [_number(element, f"bndbox/{corner}") for corner in CORNERS]
            objects.append(_Object(where, name, corners, (element.findtext("difficult") or "").strip() == "1"))
    return objects


def _box(thing: _Object, label_of: dict[str, int], annotation_id: int) -> Box:
    if thing.name not in label_of:
        raise Fault(f"has the name {short(thing.name)}, which the file of --classes does not list")
    xmin, ymin, xmax, ymax = thing.corners
    found = ", ".join(f"{corner} {value:g}" for corner, value in zip(CORNERS, thing.corners, strict=True))
    return Box([xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1], label_of[thing.name], annotation_id, found)


def _count_oddities(data: DataSet, thing: _Object) -> None:
    if thing.is_difficult:
        data.repairs[DIFFICULT] += 1
    if any(0 <= value < 1 for value in thing.corners[:2]):
        data.repairs[FROM_0] += 1


def _number(element: ElementTree.Element, name: str) -> float:
    text = element.findtext(name)
    try:
        return float(text or "")
    except ValueError:
        raise Fault(f"has {name} {short(text)}, expected a number") from None


def _whole(element: ElementTree.Element, name: str) -> int:
    number = _number(element, name)
    if not number.is_integer():
        raise Fault(f"has {name} {number:g}, expected whole pixels")
    return int(number)
