"""Pascal VOC: pixels from 1, the last one inside; what cannot be read is a fault with the name of the file."""

import pytest

from data_tools import check, convert
from data_tools.sample import Category, read_manifest
from framework.errors import InputError, UsageError
from tests.data_tools.sets import arguments, pixels, samples

DOG = "<object><name>dog</name><difficult>0</difficult>{}</object>"
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def dog(*corners):
    return DOG.format(BOX.format(*corners))


def annotation(*objects, filename="a.jpg", width=40, height=30):
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation><filename>{filename}</filename>{size}{''.join(objects)}</annotation>"


@pytest.fixture
def source(tmp_path):
    """Two images of 40x30 and their XML."""
    source = tmp_path / "source"
    for name in ("images", "Annotations"):
        (source / name).mkdir(parents=True)
    for name in ("a", "b"):
        pixels(40, 30).save(source / "images" / f"{name}.jpg")
        (source / "Annotations" / f"{name}.xml").write_text(annotation(dog(1, 1, 10, 20), filename=f"{name}.jpg"))
    return source


def voc(source, tmp_path, *more):
    return ["--format", "voc", *arguments(source, tmp_path / "out", *more, name="Annotations")]


def converted(source, tmp_path, *more):
    assert convert.main(voc(source, tmp_path, *more)) == 0
    assert check.main([str(tmp_path / "out")]) == 0
    return [sample for _, sample in samples(tmp_path / "out")]


def write(source, text, name="a"):
    (source / "Annotations" / f"{name}.xml").write_text(text)


def test_pixels_count_from_1_and_the_last_is_inside(source, tmp_path):
    cat = dog(40, 30, 40, 30).replace("dog", "cat")
    write(source, annotation(dog(1, 1, 40, 30), dog(11, 5, 20, 5), cat))
    first, second = converted(source, tmp_path)
    assert first.boxes_xyxy_px == [[0, 0, 40, 30], [10, 4, 20, 5], [39, 29, 40, 30]]
    assert (first.areas, first.labels, first.category_ids) == ([1200, 10, 1], [1, 1, 0], [2, 2, 1])
    assert (first.image_id, first.file_name, first.annotation_ids) == (1, "a.jpg", [1, 2, 3])
    assert (second.image_id, second.boxes_xyxy_px, second.annotation_ids) == (2, [[0, 0, 10, 20]], [4])
    assert read_manifest(tmp_path / "out").classes == [Category("cat", 1), Category("dog", 2)]
    assert read_manifest(tmp_path / "out").repairs == {}


def test_a_tool_that_counts_from_0_is_noticed(source, tmp_path):
    write(source, annotation(dog(0, 3, 10, 20), dog(2, 0.5, 10, 20), dog(1, 1, 45, 20)))
    first, _ = converted(source, tmp_path)
    assert first.boxes_xyxy_px == [[0, 2, 10, 20], [1, 0, 10, 20], [0, 0, 40, 20]]
    assert read_manifest(tmp_path / "out").repairs == {
        "box clipped to the image": 3,
        "box with xmin or ymin 0, where VOC counts from 1": 2,
    }


def test_difficult_objects_are_ordinary_and_counted(source, tmp_path):
    write(source, annotation(dog(1, 1, 10, 20).replace("<difficult>0", "<difficult>1")))
    first, _ = converted(source, tmp_path)
    assert first.iscrowd == [0]
    assert read_manifest(tmp_path / "out").repairs == {"difficult object kept as an ordinary one": 1}


def test_parts_of_an_object_are_no_objects(source, tmp_path):
    part = f"<part><name>head</name>{BOX.format(1, 1, 4, 4)}</part>"
    write(source, annotation(DOG.format(part + BOX.format(3, 3, 10, 20))))
    assert converted(source, tmp_path)[0].boxes_xyxy_px == [[2, 2, 10, 20]]
    assert read_manifest(tmp_path / "out").classes == [Category("dog", 1)]


def test_images_are_found_by_filename_and_else_by_the_name_of_the_xml(source, tmp_path):
    (source / "images" / "b.jpg").rename(source / "images" / "b.JPG")
    for name, filename in (("a", "/home/somebody/a.jpg"), ("b", "../images/a.jpg"), ("first", "z.jpg")):
        write(source, annotation(dog(1, 1, 2, 2), filename=filename), name)
    pixels(40, 30).save(source / "images" / "z.jpg")
    found = [(sample.image_id, sample.file_name) for sample in converted(source, tmp_path)]
    assert found == [(1, "a.jpg"), (2, "b.JPG"), (3, "z.jpg")]


def test_image_ids_follow_the_file_names_of_the_images(source, tmp_path):
    write(source, annotation(dog(1, 1, 2, 2), filename="b.jpg"), "a")
    write(source, annotation(dog(1, 1, 3, 3), filename="a.jpg"), "b")
    first, second = converted(source, tmp_path)
    assert [(first.image_id, first.file_name, first.boxes_xyxy_px), second.file_name] == [
        (1, "a.jpg", [[0, 0, 3, 3]]), "b.jpg"
    ]  # fmt: skip


def test_classes_keeps_the_list_of_another_set(source, tmp_path):
    (tmp_path / "voc.names").write_text("cat\ndog\nzebra\n")
    assert converted(source, tmp_path, "--classes", str(tmp_path / "voc.names"))[0].labels == [1]
    classes = read_manifest(tmp_path / "out").classes
    assert classes == [Category("cat", 1), Category("dog", 2), Category("zebra", 3)]


def test_utf_8_with_or_without_its_signature(source, tmp_path):
    text = '<?xml version="1.0" encoding="utf-8"?>' + annotation(dog(1, 1, 9, 9)).replace("dog", "水母")
    (source / "Annotations" / "a.xml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    converted(source, tmp_path)
    assert read_manifest(tmp_path / "out").classes == [Category("dog", 1), Category("水母", 2)]


def test_boxes_without_area_are_dropped_when_asked_for(source, tmp_path):
    bad = dog(5, 5, 4, 9), dog(50, 5, 60, 9), dog("nan", 1, 2, 3), dog(1, 1, "inf", 3)
    write(source, annotation(*bad, dog(2, 2, 5, 5)))
    with pytest.raises(InputError, match="4 faults, nothing was written") as refusal:
        convert.main(voc(source, tmp_path))
    first = str(refusal.value).split("\n")[1]
    assert "a.xml: object 1 (dog) has xmin 5, ymin 5, xmax 4, ymax 9, without area inside its image of 40x30" in first
    assert "drop such boxes with --drop-bad-boxes" in first
    assert converted(source, tmp_path, "--drop-bad-boxes")[0].boxes_xyxy_px == [[1, 1, 5, 5]]
    assert read_manifest(tmp_path / "out").repairs == {"box dropped": 4}


BOMB = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]>'
BAD_XML = {
    "broken": (annotation(dog(1, 1, 2, 2))[:-9], r"a\.xml: is not XML \(.*line 1, column"),
    "empty": ("", r"a\.xml: is not XML"),
    "a DOCTYPE": (BOMB + annotation(dog(1, 1, 2, 2)), r"a\.xml: has a DOCTYPE, expected elements only; correct it"),
    "another format": ("<kml></kml>", r"a\.xml: is <kml>, expected Pascal VOC's <annotation>"),
    "no image": (annotation(dog(1, 1, 2, 2), filename="c.jpg"), r"gone\.xml: has the filename 'c.jpg', .*: none;"),
    "the image of another": (annotation(filename="b.jpg"), r"b\.xml: is about the image b\.jpg like .*a\.xml"),
    "another size": (annotation(dog(1, 1, 2, 2), width=41), r"a\.jpg: is 40x30, the annotations say 41x30"),
    "size 0": (annotation(dog(1, 1, 2, 2), width=0), r"a\.xml: has the size 0x30, expected a pixel at least"),
    "half a pixel": (annotation(dog(1, 1, 2, 2), width=40.5), r"a\.xml: has size/width 40\.5, expected whole pixels"),
    "no size": ("<annotation></annotation>", r"a\.xml: has size/width None, expected a number"),
    "no name": (annotation(dog(1, 1, 2, 2).replace("dog", " ")), r"a\.xml: object 1 \(\) has no name"),
    "no box": (annotation(DOG.format("")), r"a\.xml: object 1 \(dog\) has bndbox/xmin None, expected a number"),
    "a text in a box": (annotation(dog(1, 1, "x", 2)), r"object 1 \(dog\) has bndbox/xmax 'x', expected a number"),
    "no area": (annotation(dog(1, 1, 2, 2), dog(9, 9, 8, 9)), r"a\.xml: object 2 \(dog\) has xmin 9, .*--drop-bad"),
    "outside": (annotation(dog(41, 1, 50, 2)), r"without area inside its image of 40x30 \(image_id 1\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_XML)
def test_bad_files_are_refused(kind, source, tmp_path):
    text, message = BAD_XML[kind]
    write(source, text)
    if kind == "no image":
        (source / "Annotations" / "a.xml").rename(source / "Annotations" / "gone.xml")
    with pytest.raises(InputError, match=message):
        convert.main(voc(source, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_other_encodings_are_refused(source, tmp_path):
    text = '<?xml version="1.0" encoding="latin-1"?>\n' + annotation(dog(1, 1, 2, 2)).replace("dog", "chien à pois")
    (source / "Annotations" / "a.xml").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.xml: is not UTF-8: byte 0xe0 in line 2; correct it"):
        convert.main(voc(source, tmp_path))
    (source / "Annotations" / "a.xml").write_bytes((BOMB + annotation()).encode("utf-16"))
    with pytest.raises(InputError, match=r"a\.xml: is not UTF-8"):
        convert.main(voc(source, tmp_path))


def test_two_images_of_the_name_of_an_xml_are_refused(source, tmp_path):
    write(source, annotation(filename="elsewhere.jpg"))
    pixels(40, 30).save(source / "images" / "a.png")
    with pytest.raises(InputError, match=r"a\.xml: .*named like a\.xml: more than one: a\.jpg, a\.png"):
        convert.main(voc(source, tmp_path))


def test_a_class_that_is_not_listed_is_refused(source, tmp_path):
    (tmp_path / "voc.names").write_text("cat\n")
    with pytest.raises(InputError, match=r"a\.xml: object 1 \(dog\) has the name 'dog', which the file of --classes"):
        convert.main(voc(source, tmp_path, "--classes", str(tmp_path / "voc.names")))


def test_all_faults_are_told_at_once(source, tmp_path):
    write(source, annotation(dog(1, 1, "x", 2), dog(1, "y", 2, 2), width=0))
    write(source, "", "b")
    with pytest.raises(InputError) as refusal:
        convert.main(voc(source, tmp_path))
    head, *lines = str(refusal.value).split("\n")
    assert head == "4 faults, nothing was written:"
    parts = ("a.xml: object 1", "a.xml: object 2", "a.xml: has the size 0x30", "b.xml: is not XML")
    assert all(part in line for part, line in zip(parts, lines, strict=True))


def test_a_split_reads_the_files_it_lists(source, tmp_path, capsys):
    (source / "val.txt").write_text("b\n\n")
    [only] = converted(source, tmp_path, "--split", str(source / "val.txt"))
    assert (only.image_id, only.file_name) == (1, "b.jpg")
    assert "dropped" not in capsys.readouterr().out  # the other image is of another split


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a\nc\n", "names 'c', and --annotations .* has no c.xml"),
        (b"a 1\nb -1\n", "has the line 'a 1', expected one name of an XML file"),
        (b"a\n\xff\n", "is not UTF-8: byte 0xff in line 2"),
    ],
)
def test_splits_that_cannot_be_read(source, tmp_path, content, message):
    (source / "val.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"val.txt: {message}"):
        convert.main(voc(source, tmp_path, "--split", str(source / "val.txt")))
    assert not (tmp_path / "out").exists()


def test_split_is_of_voc_only(source, tmp_path):
    for more, message in (
        (["--split", "absent.txt"], "--split absent.txt: not a file"),
        (["--split", "absent.txt", "--format", "coco"], "--split absent.txt: read with --format voc only"),
    ):
        with pytest.raises(UsageError, match=message):
            convert.main(voc(source, tmp_path, *more))


def test_images_without_an_xml_file_are_told(source, tmp_path, capsys):
    (source / "Annotations" / "a.xml").unlink()
    assert len(converted(source, tmp_path)) == 1
    assert "1 image(s) without an XML file, a.jpg the first" in capsys.readouterr().out
