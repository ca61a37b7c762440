"""YOLO's text labels: fractions become pixels; what cannot be read is a fault with file and line."""

import json

import pytest
from PIL import Image

from data_tools import check, convert
from data_tools.sample import Category, read_manifest
from framework.errors import InputError, UsageError
from tests.data_tools.sets import arguments, pixels, samples


@pytest.fixture
def source(tmp_path):
    """Images a and b of 40x20 and c of 10x10, labels of a and b, two classes."""
    source = tmp_path / "set" / "part" / "source"
    for name in ("images", "labels"):
        (source / name).mkdir(parents=True)
    for name, size in (("a", (40, 20)), ("b", (40, 20)), ("c", (10, 10))):
        pixels(*size).save(source / "images" / f"{name}.jpg")
    (source / "labels" / "a.txt").write_text("1 0.5 0.5 0.25 0.5\n\n0 0.1 0.2 0.2 0.4 \r\n")
    (source / "labels" / "b.txt").write_text("")
    (source / "labels" / "classes.txt").write_text("fish\nray\n")
    return source


def yolo(source, tmp_path, *more):
    return ["--format", "yolo", *arguments(source, tmp_path / "out", *more, name="labels")]


def converted(source, tmp_path, *more):
    assert convert.main(yolo(source, tmp_path, *more)) == 0
    assert check.main([str(tmp_path / "out")]) == 0
    return [sample for _, sample in samples(tmp_path / "out")]


def write(source, text, name="a"):
    (source / "labels" / f"{name}.txt").write_text(text)


def test_fractions_become_pixels(source, tmp_path):
    a, b, c = converted(source, tmp_path)
    assert a.boxes_xyxy_px == [pytest.approx([15, 5, 25, 15]), pytest.approx([0, 0, 8, 8])]
    assert (a.labels, a.category_ids, a.annotation_ids, a.areas) == ([1, 0], [2, 1], [1, 2], pytest.approx([100, 64]))
    assert (a.image_id, a.file_name, a.width, a.height) == (1, "a.jpg", 40, 20)
    assert [(one.image_id, one.width, one.height, one.labels) for one in (b, c)] == [(2, 40, 20, []), (3, 10, 10, [])]
    assert read_manifest(tmp_path / "out").classes == [Category("fish", 1), Category("ray", 2)]


def test_boxes_that_stick_out_are_clipped_and_counted(source, tmp_path):
    write(source, "0 0 0.5 0.5 1\n0 0.999 0.5 0.00200001 1.005\n0.0 1 1 0.5 0.5\n")
    a, *_ = converted(source, tmp_path)
    assert a.boxes_xyxy_px[0] == [0, 0, 10, 20]
    assert a.boxes_xyxy_px[1] == pytest.approx([39.92, 0, 40, 20], abs=1e-3)
    assert a.boxes_xyxy_px[2] == [30, 15, 40, 20]
    assert read_manifest(tmp_path / "out").repairs == {"box clipped to the image": 3}


def test_boxes_without_area_are_dropped_when_asked_for(source, tmp_path):
    write(source, "0 0.5 0.5 0 0.5\n0 0.5 0.5 0.5 0.5")
    message = r"a\.txt: line 1 has cx cy w h 0\.5 0\.5 0 0\.5, without area inside its image of 40x20.*--drop-bad-boxes"
    with pytest.raises(InputError, match=message):
        convert.main(yolo(source, tmp_path))
    assert converted(source, tmp_path, "--drop-bad-boxes")[0].boxes_xyxy_px == [[10, 5, 30, 15]]
    assert read_manifest(tmp_path / "out").repairs == {"box dropped": 1}


def test_labels_may_lie_among_the_images(source, tmp_path):
    for name in ("a.txt", "b.txt", "classes.txt"):
        (source / "labels" / name).rename(source / "images" / name)
    assert convert.main(["--format", "yolo", *arguments(source, tmp_path / "out", name="images")]) == 0
    assert [len(sample.labels) for _, sample in samples(tmp_path / "out")] == [2, 0, 0]


def test_other_files_among_the_images_are_told(source, tmp_path, capsys):
    for name in ("d.heic", "e.heic", "Thumbs.db"):
        (source / "images" / name).write_bytes(b"x")
    converted(source, tmp_path)
    dropped = json.loads((tmp_path / "out" / "report.json").read_text())["dropped"]
    told = [line.partition("images: ")[2].partition(";")[0] for line in dropped]
    assert told == ["1 file(s) with suffix .db", "2 file(s) with suffix .heic"]
    assert "dropped: " in capsys.readouterr().out


# Class names.


@pytest.mark.parametrize("folder", ["labels", ".", ".."])
def test_class_names_are_found_near_the_labels(folder, source, tmp_path):
    (source / "labels" / "classes.txt").unlink()
    (source / folder / "data.yaml").write_text("nc: 2\nnames: [perch, ray]\n")
    converted(source, tmp_path)
    assert [one.name for one in read_manifest(tmp_path / "out").classes] == ["perch", "ray"]


def test_the_nearest_class_names_count_and_a_flag_more(source, tmp_path):
    (source / "data.yaml").write_text("names: [far, away]\n")
    converted(source, tmp_path)
    assert [one.name for one in read_manifest(tmp_path / "out").classes] == ["fish", "ray"]
    (tmp_path / "my.yaml").write_text("names: {1: b, 0: a, 2: c}\n")
    assert convert.main(yolo(source, tmp_path / "more", "--classes", str(tmp_path / "my.yaml"))) == 0
    assert [one.name for one in read_manifest(tmp_path / "more" / "out").classes] == ["a", "b", "c"]


def test_without_class_names_the_flag_is_named(source, tmp_path):
    (source / "labels" / "classes.txt").unlink()
    with pytest.raises(UsageError, match=r"labels: no classes\.txt or data\.yaml in it or .*--classes FILE"):
        convert.main(yolo(source, tmp_path))


# What is refused.

BAD_LINES = {
    "a polygon": ("0 0.1 0.1 0.2 0.1 0.2 0.2", r"has 7 columns, expected 5: class cx cy w h \(polygons, key points"),
    "a score": ("0 0.5 0.5 0.5 0.5 0.9", "has 6 columns, expected 5"),
    "four columns": ("0 0.5 0.5 0.5", "has 4 columns, expected 5: class cx cy w h; correct it"),
    "a name": ("fish 0.5 0.5 0.5 0.5", "has 'fish 0.5 0.5 0.5 0.5', expected five numbers"),
    "commas": ("0 0,5 0,5 0,5 0,5", "has '0 0,5 0,5 0,5 0,5', expected five numbers"),
    "an unknown class": ("2 0.5 0.5 0.5 0.5", "has class 2, expected 0 to 1, a place in the list of class names"),
    "a negative class": ("-1 0.5 0.5 0.5 0.5", "has class -1, expected 0 to 1"),
    "half a class": ("0.5 0.5 0.5 0.5 0.5", "has class 0.5, expected 0 to 1"),
    "pixels": ("0 20 10 40 20", "has cx cy w h 20 10 40 20, expected fractions of the image, 0 to 1, not pixels"),
    "a little too much": ("0 0.5 0.5 1.02 0.5", "has cx cy w h 0.5 0.5 1.02 0.5, expected fractions of the image"),
    "a negative size": ("0 0.5 0.5 -0.5 0.5", "has cx cy w h 0.5 0.5 -0.5 0.5, expected fractions of the image"),
    "nan": ("0 0.5 nan 0.5 0.5", "has cx cy w h 0.5 nan 0.5 0.5, expected fractions of the image"),
    "infinity": ("0 0.5 0.5 inf 0.5", "has cx cy w h 0.5 0.5 inf 0.5, expected fractions"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines_are_refused(kind, source, tmp_path):
    line, message = BAD_LINES[kind]
    write(source, f"0 0.5 0.5 0.5 0.5\n\n{line}\n")
    with pytest.raises(InputError, match=rf"a\.txt: line 3 {message}"):
        convert.main(yolo(source, tmp_path, "--drop-bad-boxes"))
    assert {path.name for path in tmp_path.iterdir()} == {"set"}


def remove(source):
    (source / "images" / "a.jpg").unlink()


def other_encoding(source):
    (source / "labels" / "a.txt").write_bytes(b"0 0.5 0.5 0.5 0.5\n# \xe4\n")


def second_image(source):
    pixels(40, 20).save(source / "images" / "a.png")


def turn(source):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels(40, 20).save(source / "images" / "a.jpg", exif=exif)


def no_image(source):
    (source / "images" / "a.jpg").write_text("<html>")


def no_box(source):
    (source / "labels" / "a.txt").write_text("\n")


BAD_FILES = {
    remove: r"a\.txt: has no image of its name in --images .*images; correct it or take it out",
    other_encoding: r"a\.txt: is not UTF-8: byte 0xe4 in line 2",
    second_image: r"a\.txt: has the name of more than one file: a\.jpg, a\.png",
    turn: r"a\.jpg: EXIF would turn it, and its annotations do not say which way they mean; save it upright",
    no_image: r"a\.jpg: not an image that Pillow reads; mend it",
    no_box: r"labels: an empty set, no box is left; expected at least one",
}


@pytest.mark.parametrize("damage", BAD_FILES)
def test_bad_files_are_refused(damage, source, tmp_path):
    damage(source)
    with pytest.raises(InputError, match=BAD_FILES[damage]):
        convert.main(yolo(source, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"set"}


def test_all_faults_are_told_at_once(source, tmp_path):
    write(source, "0 1\n5 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0\n")
    write(source, "0 0.5 0.5 0.5 0.5", "gone")
    no_image_at = source / "images" / "c.jpg"
    no_image_at.write_bytes(b"")
    with pytest.raises(InputError) as refusal:
        convert.main(yolo(source, tmp_path))
    head, *lines = str(refusal.value).split("\n")
    assert head == "5 faults, nothing was written:"
    parts = ("gone.txt: has no image", "a.txt: line 1", "a.txt: line 2", "a.txt: line 3", "c.jpg: an empty file")
    assert all(part in line for part, line in zip(parts, lines, strict=True))
