"""The same objects give the same boxes, whichever format tells them; flags that do not go together are refused."""

import json
import subprocess
import sys

import numpy as np
import pytest

from data_tools import check, convert
from data_tools.sample import read_manifest
from framework.errors import UsageError
from tests.data_tools.sets import COCO, arguments, samples, write_set, write_voc, write_yolo
from tests.paths import data_folder

WITHIN_PX = 0.01  # six decimals of YOLO on a side of 1024 px, and half the width on top


def objects(out):
    """Per image its file name, size, class names and boxes."""
    names = [category.name for category in read_manifest(out).classes]
    return {
        sample.file_name: (
            (sample.width, sample.height),
            [names[label] for label in sample.labels],
            np.array(sample.boxes_xyxy_px).reshape(-1, 4),
        )
        for _, sample in samples(out)
    }


def assert_same_objects(out, expected):
    found, wanted = objects(out), objects(expected)
    assert sorted(found) == sorted(wanted)
    for name, (size, classes, boxes) in found.items():
        assert (size, classes) == wanted[name][:2]
        np.testing.assert_allclose(boxes, wanted[name][2], atol=WITHIN_PX, rtol=0)


def convert_all(images, annotations, folder):
    """The set in three formats, converted; classes are given to VOC, which may lack one."""
    (folder / "annotations.json").write_text(json.dumps(annotations))
    write_voc(folder / "voc", annotations)
    write_yolo(folder / "yolo", annotations)
    formats = {"coco": ["annotations.json"], "voc": ["voc", "--classes", str(folder / "yolo" / "classes.txt")],
               "yolo": ["yolo"]}  # fmt: skip
    for name, (given, *more) in formats.items():
        flags = ["--images", str(images), "--annotations", str(folder / given), "--out", str(folder / f"{name}.shards")]
        assert convert.main([*flags, "--format", name, "--verify", "none", *more]) == 0
    return [folder / f"{name}.shards" for name in formats]


def test_three_formats_give_the_same_boxes(tmp_path):
    coco, voc, yolo = convert_all(write_set(tmp_path) / "images", COCO, tmp_path)
    assert_same_objects(voc, coco)
    assert_same_objects(yolo, coco)
    for out in (voc, yolo):
        assert check.main([str(out)]) == 0
        assert [one.category_id for one in read_manifest(out).classes] == [1, 2, 3]
        assert [sample.image_id for _, sample in samples(out)] == [1, 2, 3, 4]
        assert [n for _, sample in samples(out) for n in sample.annotation_ids] == [1, 2, 3, 4]
        assert [sample.iscrowd for _, sample in samples(out)] == [[0, 0], [], [0], [0]]


@pytest.mark.data
def test_a_real_set_gives_the_same_boxes(tmp_path):
    folder = data_folder("aquarium")
    annotations = json.loads((folder / "annotations" / "instances_val.json").read_bytes())
    (tmp_path / "images").mkdir()
    for image in annotations["images"]:  # YOLO takes all the images of a folder
        (tmp_path / "images" / image["file_name"]).symlink_to(folder / "images" / image["file_name"])
    coco, voc, yolo = convert_all(tmp_path / "images", annotations, tmp_path)
    assert read_manifest(coco).boxes == 424
    assert read_manifest(coco).classes == read_manifest(voc).classes == read_manifest(yolo).classes
    assert_same_objects(voc, coco)
    assert_same_objects(yolo, coco)


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        ("instances.json", ["--classes", "instances.json"], "--classes instances.json: COCO's file names its classes"),
        ("instances.json", ["--format", "voc"], r"instances\.json: not a folder, which --format voc reads"),
        ("no-such-folder", ["--format", "yolo"], "no-such-folder: not a folder, which --format yolo reads"),
        ("images", ["--format", "voc"], r"--annotations .*images: no \.xml files in it; expected \.xml"),
        ("images", ["--format", "yolo"], r"--annotations .*images: no \.txt files in it"),
        ("images", ["--format", "voc", "--classes", "x.names"], "--classes x.names: not a file; expected one with"),
        ("images", [], "or name one annotation file, or the --format of the folder"),
    ],
)
def test_misuse_is_refused(given, more, message, tmp_path):
    source = write_set(tmp_path / "source")
    with pytest.raises(UsageError, match=message):
        convert.main(arguments(source, tmp_path / "out", *more, name=given))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_files_in_folders_below_are_not_left_out(kind, tmp_path):
    source = write_set(tmp_path / "source")
    (write_voc if kind == "voc" else write_yolo)(source / "labels", COCO)
    below = source / "labels" / "train"
    below.mkdir()
    file = next(path for path in sorted((source / "labels").iterdir()) if path.name.startswith("photo.3."))
    file.rename(below / file.name)
    with pytest.raises(UsageError, match=rf"train/photo\.3\..* lies in a folder below; .*give {below}"):
        convert.main(arguments(source, tmp_path / "out", "--format", kind, name="labels"))


@pytest.mark.parametrize(("damage", "code"), [("fault", 1), ("no class names", 2)])
def test_exit_codes_and_one_line(damage, code, tmp_path):
    source = write_set(tmp_path / "source")
    write_yolo(source / "labels", COCO)
    if damage == "fault":
        (source / "labels" / "photo.2.txt").write_text("0 0.5 0.5 0.5")
    else:
        (source / "labels" / "classes.txt").unlink()
    run = subprocess.run(
        [sys.executable, "-m", "data_tools.convert", "--format", "yolo",
         *arguments(source, tmp_path / "out", name="labels")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == code
    assert len([line for line in run.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()
