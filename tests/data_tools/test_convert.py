"""What goes in comes out again through plain webdataset; what is wrong is told in one line; all or nothing."""

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_tools import check, convert, pack, shards
from data_tools.commit import partial_folder
from data_tools.sample import Category, Sample, read_manifest
from data_tools.shards import sample_key, write_shard
from framework.errors import InputError, UsageError
from tests.data.shards import make_sample
from tests.data_tools.sets import SIZES_WH, arguments, coco, content, pixels, samples, write_set
from tests.paths import data_folder


@pytest.fixture
def source(tmp_path):
    return write_set(tmp_path / "source")


def converted(source, tmp_path, *more):
    assert convert.main(arguments(source, tmp_path / "out", *more)) == 0
    assert check.main([str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def test_shards_are_to_the_bit_what_webdataset_would_have_written(tmp_path):
    samples = [make_sample(n, height=20 + 13 * n, boxes=n) for n in range(7)]
    written = write_shard(tmp_path, 0, ((sample, image) for image, sample in samples))
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), encoder=False, mtime=0, user="tenfold",
                              group="tenfold") as tar:  # fmt: skip
        for image, sample in samples:
            tar.write({"__key__": sample_key(sample.image_id), "jpg": image, "json": sample.to_json()})
    assert (tmp_path / written.shard.name).read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_webdataset_reads_what_was_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "MIB", 4096)  # bytes: several shards
    out = converted(source, tmp_path, "--shard-mib", "1")
    shards = sorted(str(path) for path in out.glob("*.tar"))
    assert len(shards) > 1
    assert all(os.path.getsize(shard) % 512 == 0 for shard in shards)
    found = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [one["__key__"] for one in found] == ["000000000010", "000000000011", "000000000012", "000000000013"]
    for n, one in enumerate(found):
        assert one["jpg"] == (source / "images" / f"photo.{n}.jpg").read_bytes()
        assert (json.loads(one["json"])["width"], json.loads(one["json"])["height"]) == SIZES_WH[n]
    assert [(one["jpg"], Sample.from_json(one["json"])) for one in found] == list(samples(out))


def test_annotations_keep_their_meaning(source, tmp_path):
    out = converted(source, tmp_path)
    assert read_manifest(out).classes == [Category("fish", 3), Category("starfish", 7), Category("stingray", 90)]
    first, empty, bare, _ = [sample for _, sample in samples(out)]
    assert first == Sample(
        image_id=10, file_name="photo.0.jpg", width=40, height=30,
        boxes_xyxy_px=[[1.0, 2.0, 11.5, 22.0], [0.0, 0.0, 40.0, 30.0]], labels=[1, 0], category_ids=[7, 3],
        areas=[150.0, 1200.0], iscrowd=[0, 1], annotation_ids=[5, 6],
        segmentation=[[[1, 2, 11.5, 2, 11.5, 22]], []],
    )  # fmt: skip
    assert empty.labels == []
    assert (bare.areas, bare.iscrowd, bare.labels) == ([64.0], [0], [2])


def test_the_same_input_gives_the_same_bytes(source, tmp_path, monkeypatch):
    convert.main(arguments(source, tmp_path / "one"))
    monkeypatch.setattr("time.time", lambda: 1e9)
    shuffled = coco() | {"images": coco()["images"][::-1]}
    (source / "instances.json").write_text(json.dumps(shuffled))
    convert.main(arguments(source, tmp_path / "two"))
    assert content(tmp_path / "one") == content(tmp_path / "two")


# What is repaired, and counted.


def test_odd_images_are_repaired_and_counted(source, tmp_path):
    images = source / "images"
    pixels(40, 30).convert("L").save(images / "photo.0.jpg")
    pixels(30, 40).convert("CMYK").save(images / "photo.1.jpg", "JPEG")
    deep = np.linspace(0, 65535, 24 * 24).astype(np.uint16).reshape(24, 24)
    Image.fromarray(deep).save(images / "photo.2.jpg", "PNG")
    pixels(64, 20).convert("P").save(images / "photo.3.jpg", "GIF")
    kept = [(images / f"photo.{n}.jpg").read_bytes() for n in (0, 1)]
    with pytest.raises(InputError, match="2 faults, nothing was written") as error:
        convert.main(arguments(source, tmp_path / "out"))
    assert "is PNG, shards hold JPEG; --reencode" in str(error.value) and "is GIF" in str(error.value)
    out = converted(source, tmp_path, "--reencode")
    assert read_manifest(out).repairs == {
        "16-bit image scaled to 8 bit": 1,
        "CMYK JPEG to be read as RGB": 1,
        "GIF re-encoded as JPEG": 1,
        "PNG re-encoded as JPEG": 1,
        "greyscale JPEG to be read as RGB": 1,
    }
    found = [image for image, _ in samples(out)]
    assert found[:2] == kept
    decoded = [Image.open(io.BytesIO(image)) for image in found]
    assert [(image.format, image.size) for image in decoded] == [("JPEG", size) for size in SIZES_WH]
    assert np.abs(np.asarray(decoded[2], dtype=int) - deep // 256).max() <= 4


def test_boxes_that_stick_out_are_clipped_and_counted(source, tmp_path):
    damaged = coco()
    damaged["annotations"] = [
        {"image_id": 10, "category_id": 3, "bbox": [-5, -6, 20, 20], "area": 400},
        {"image_id": 10, "category_id": 3, "bbox": [30, 20, 100, 100], "area": 7},
        {"image_id": 11, "category_id": 3, "bbox": [0, 0, 30.004, 40]},
        {"id": 8, "image_id": 11, "category_id": 3, "bbox": [1, 1, 2, 2]},
    ]
    write_set(source, damaged)
    out = converted(source, tmp_path)
    first, second, *_ = [sample for _, sample in samples(out)]
    assert first.boxes_xyxy_px == [[0, 0, 15, 14], [30, 20, 40, 30]]
    assert first.areas == [15 * 14, 7]
    assert second.boxes_xyxy_px == [[0, 0, 30, 40], [1, 1, 3, 3]]
    assert [*first.annotation_ids, *second.annotation_ids] == [9, 10, 11, 8]
    assert read_manifest(out).repairs == {"box clipped to the image": 2, "annotation id made": 3}


def test_bad_boxes_are_dropped_when_asked_for(source, tmp_path, capsys):
    damaged = coco()
    damaged["annotations"] += [
        {"id": 100 + n, "image_id": 11, "category_id": 3, "bbox": bbox} for n, bbox in enumerate(BAD_BOXES)
    ]
    write_set(source, damaged)
    out = converted(source, tmp_path, "--drop-bad-boxes")
    assert read_manifest(out).repairs == {"box dropped": len(BAD_BOXES)}
    assert [len(sample.labels) for _, sample in samples(out)] == [2, 0, 1, 1]
    report = json.loads((out / "report.json").read_text())
    assert len(report["dropped"]) == capsys.readouterr().out.count("dropped: ") == len(BAD_BOXES)


def test_two_categories_of_one_name_are_told(tmp_path, capsys):
    twice = coco()
    twice["categories"] += [{"id": 1, "name": "disc"}, {"id": 55, "name": "disc"}]
    twice["annotations"][0]["category_id"] = 1
    out = converted(write_set(tmp_path / "source", twice), tmp_path)
    warning = "the categories 1 and 55 have one name, 'disc'; they stay different classes"
    report = json.loads((out / "report.json").read_text())
    assert report["warnings"] == [warning] and f"\n  warning: {warning}\n" in capsys.readouterr().out
    assert report["boxes_by_class"] == {"disc (id 1)": 1, "fish": 2, "starfish": 0, "disc (id 55)": 0, "stingray": 1}
    assert len(read_manifest(out).classes) == 5


# What is refused: exit code 1, a line for each fault, nothing written.

BAD_BOXES = [[50, 1, 5, 5], [1, 1, 0, 5], [9, 9, -4, 5], [1, float("nan"), 4, 4], [1, 1, float("inf"), 4]]


def edited(entries, place, /, **values):
    damaged = coco()
    damaged[entries][place] |= values
    return damaged


def without(name):
    damaged = coco()
    del damaged[name]
    return damaged


BAD_ANNOTATIONS = {
    "deep": ("[" * 100_000, r"instances\.json: not JSON"),
    "not JSON": ("{'images'", r"instances\.json: not JSON .*expected COCO's instances format"),
    "a list": ([1], "a JSON list; expected COCO's"),
    "predictions": ([{"image_id": 1, "score": 0.5}], "a JSON list; expected COCO's"),
    "another format": ({"shapes": []}, r"no list 'images' \(found: 'shapes'\)"),
    "no categories": (without("categories"), "no list 'categories'"),
    "no images": (coco() | {"images": []}, "an empty set, its list 'images' has no entry"),
    "no boxes": (coco() | {"annotations": []}, "an empty set, its list 'annotations' has no entry"),
    "an entry of another type": (coco() | {"images": ["photo.jpg"]}, r"images\[0\] is 'photo.jpg', expected an object"),
    "a text as id": (edited("images", 0, id="10"), r"images\[0\] has id '10', expected int"),
    "zero size": (edited("images", 1, width=0), r"images\[1\] \(id 11\) has the size 0x40, expected a pixel"),
    "a name that no file has": (edited("images", 1, file_name="a\0b.jpg"), "expected a file inside"),
    "a name of half a character": (edited("images", 1, file_name="\ud800.jpg"), "expected a file inside"),
    "a name outside": (edited("images", 1, file_name="../x.jpg"), r"file_name '../x.jpg', expected a file inside"),
    "an image id twice": (edited("images", 1, id=10), r"images\[1\] has id 10 like one before it; correct it"),
    "a category id twice": (edited("categories", 1, id=7), r"categories\[1\] has id 7 like one before it"),
    "an annotation id twice": (edited("annotations", 1, id=5), r"annotations\[1\] has id 5 like one before it"),
    "an unknown class": (edited("annotations", 2, category_id=4), r"annotations\[2\] has category_id 4, which no"),
    "an unknown image": (edited("annotations", 3, image_id=99), r"annotations\[3\] has image_id 99, which no"),
    "three numbers": (edited("annotations", 0, bbox=[1, 2, 3]), r"has bbox \[1, 2, 3\], expected the numbers"),
    "texts in a box": (edited("annotations", 0, bbox=[1, 2, 3, "4"]), "expected the numbers x, y, width, height"),
    "a strange crowd": (edited("annotations", 0, iscrowd="no"), "has iscrowd 'no', expected 0 or 1"),
    "a negative area": (edited("annotations", 0, area=-1), "has area -1, expected square pixels"),
    **{
        f"the box {bbox}": (edited("annotations", 0, bbox=bbox), "without area inside its image of 40x30.*--drop-bad")
        for bbox in BAD_BOXES
    },
}


@pytest.mark.parametrize("kind", BAD_ANNOTATIONS)
def test_bad_annotations_are_refused(kind, tmp_path):
    damaged, message = BAD_ANNOTATIONS[kind]
    source = write_set(tmp_path / "source", damaged)
    with pytest.raises(InputError, match=message) as refusal:
        convert.main(arguments(source, tmp_path / "out"))
    assert "instances.json" in str(refusal.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_set_whose_boxes_were_all_dropped_is_empty(tmp_path):
    damaged = coco()
    for annotation in damaged["annotations"]:
        annotation["bbox"] = [0, 0, 0, 0]
    with pytest.raises(InputError, match="an empty set, no box is left"):
        convert.main(arguments(write_set(tmp_path, damaged), tmp_path / "out", "--drop-bad-boxes"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


BAD_IMAGES = {
    "missing": (os.remove, r"photo\.2\.jpg: missing; mend it, or take image 12 out"),
    "empty": (lambda path: path.write_bytes(b""), r"photo\.2\.jpg: an empty file, 0 bytes; mend"),
    "no image": (lambda path: path.write_text("<html>"), r"photo\.2\.jpg: not an image that Pillow reads; mend"),
    "truncated": (cut, r"photo\.2\.jpg: .*truncated.*; mend it, or take image 12 out"),
    "of another size": (lambda path: pixels(24, 25).save(path), "is 24x25, the annotations say 24x24; mend"),
    "of floats": (lambda path: Image.new("F", (24, 24)).save(path, "TIFF"), "has floating-point pixels, expected"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_are_refused(kind, source, tmp_path):
    damage, message = BAD_IMAGES[kind]
    damage(source / "images" / "photo.2.jpg")
    with pytest.raises(InputError, match=message):
        convert.main(arguments(source, tmp_path / "out", "--reencode"))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_turned_image_is_explained(source, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels(30, 40).save(source / "images" / "photo.0.jpg", exif=exif)
    with pytest.raises(InputError, match=r"is 30x40 \(EXIF would turn it.*the annotations say 40x30"):
        convert.main(arguments(source, tmp_path / "out"))


def test_images_can_be_trusted(source, tmp_path):
    cut(source / "images" / "photo.2.jpg")
    assert convert.main(arguments(source, tmp_path / "out", "--verify", "none")) == 0
    assert check.main([str(tmp_path / "out")]) == 1


def test_all_faults_are_told_at_once(source, tmp_path):
    write_set(source, edited("annotations", 0, category_id=4))
    for n in (1, 3):
        os.remove(source / "images" / f"photo.{n}.jpg")
    with pytest.raises(InputError) as refusal:
        convert.main(arguments(source, tmp_path / "out"))
    head, *lines = str(refusal.value).split("\n")
    assert head == "3 faults, nothing was written:"
    assert ["category_id 4" in lines[0], "photo.1.jpg: missing" in lines[1], "photo.3.jpg" in lines[2]] == [True] * 3


def test_many_faults_are_cut_short(source, tmp_path):
    write_set(source, coco() | {"annotations": [{"id": n} for n in range(70)]})
    with pytest.raises(InputError) as refusal:
        convert.main(arguments(source, tmp_path / "out"))
    lines = str(refusal.value).split("\n")
    assert (len(lines), lines[-1].strip()) == (22, "... and 50 more")


@pytest.mark.parametrize(("more", "code"), [((), 1), (("--shard-mib", "0"), 2)])
def test_exit_codes_and_one_line(source, tmp_path, more, code):
    os.remove(source / "images" / "photo.1.jpg")
    command = [sys.executable, "-m", "data_tools.convert", *arguments(source, tmp_path / "out", *more)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == code
    assert [line.startswith("error: ") for line in run.stderr.splitlines() if "images/s" not in line][-1:] == [True]
    assert "Traceback" not in run.stderr


# A folder of annotations.


def both(source, val):
    (source / "annotations").mkdir()
    (source / "annotations" / "instances_train.json").write_text(json.dumps(coco()))
    (source / "annotations" / "instances_val.json").write_text(json.dumps(val))


def test_a_folder_becomes_train_and_val(source, tmp_path):
    both(source, coco() | {"annotations": coco()["annotations"][:1]})
    assert convert.main(arguments(source, tmp_path / "out", name="annotations")) == 0
    train, val = (read_manifest(tmp_path / "out" / split) for split in ("train", "val"))
    assert (train.boxes, val.boxes) == (4, 1)
    assert train.classes == val.classes
    assert check.main([str(tmp_path / "out")]) == 0


def test_other_classes_in_val_are_refused(source, tmp_path):
    both(source, edited("categories", 0, name="seastar"))
    with pytest.raises(InputError, match=r"instances_val\.json: its categories differ .*seastar.*starfish"):
        convert.main(arguments(source, tmp_path / "out", name="annotations"))


def test_a_folder_without_val_is_refused(source, tmp_path):
    both(source, coco())
    os.remove(source / "annotations" / "instances_val.json")
    with pytest.raises(UsageError, match=r"no instances_val\.json in it; expected instances_train\.json and"):
        convert.main(arguments(source, tmp_path / "out", name="annotations"))


# All or nothing.


def test_a_finished_set_is_left_alone(source, tmp_path, capsys):
    out = converted(source, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / convert.MARK).touch()  # as when it was killed at the very end
    assert convert.main(arguments(source, out)) == 0
    assert "already there with the same content" in capsys.readouterr().out
    write_set(source, edited("annotations", 0, bbox=[1, 2, 3, 4]))
    with pytest.raises(UsageError, match=f"{out}: exists with other content"):
        convert.main(arguments(source, out))
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not (tmp_path / "out.partial").exists()


def test_a_folder_of_something_else_is_refused(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a finished shard set; remove it or choose another --out"):
        convert.main(arguments(source, tmp_path / "out"))


@pytest.mark.parametrize("name", ["instances.json", "annotations"])
def test_remains_of_something_else_are_refused(name, source, tmp_path):
    both(source, coco())
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"out\.partial: exists with 'thesis\.txt', and without the file .*move or"):
        convert.main(arguments(source, tmp_path / "out", name=name))
    assert content(tmp_path / "out.partial") == {"thesis.txt": b"mine"} and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused(source, tmp_path):
    with pytest.raises(UsageError, match=r"--out /proc/set: /proc/set.partial cannot be made .*choose another --out"):
        convert.main(arguments(source, "/proc/set"))


def killed_in(module, name, call, *arguments):
    """Run a conversion that is killed, as by kill -9, where it calls `name` for the `call`th time."""

    def run():
        function, calls = getattr(module, name), []

        def deadly(*args, **named):
            calls.append(name)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **named)

        setattr(module, name, deadly)
        convert.main(list(arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout=60)
    return process.exitcode


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [(pack, "read_image", 2), (pack, "_write_note", 2), (pack, "_write_note", 3), (shards, "sync", 2),
     (convert, "write_manifest", 1), (convert, "remove", 1), (convert, "commit", 1), (os, "rename", 1)],
)  # fmt: skip
def test_a_killed_conversion_goes_on(module, name, call, source, tmp_path, monkeypatch):
    """Nothing that passes for a set is there before, and the bytes are the undisturbed ones after."""
    monkeypatch.setattr(convert, "MIB", 4096)  # bytes: a shard for each image
    out = tmp_path / "out"
    asked = arguments(source, out, "--shard-mib", "1", "--workers", "1")
    assert killed_in(module, name, call, *asked) == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir()
    (tmp_path / "out.partial" / "old.tmp").write_text("left by something else")
    finished = {path.name for path in (tmp_path / "out.partial").glob("*.note.json")}
    assert len(finished) == {"read_image": 1, "_write_note": call - 1, "sync": 1, "rename": 0}.get(name, 4)
    written = []
    write = pack.write_shard
    monkeypatch.setattr(pack, "write_shard", lambda *args: written.append(args[1]) or write(*args))
    if name == "commit":
        (tmp_path / "out.partial" / "shard-000000.tar").write_bytes(b"damaged by the crash")
    assert convert.main(asked) == 0
    assert len(written) == (1 if name == "commit" else 4 - len(finished))
    convert.main(arguments(source, tmp_path / "undisturbed", "--shard-mib", "1"))
    assert content(out) == content(tmp_path / "undisturbed")
    assert not (tmp_path / "out.partial").exists()


def test_what_changed_meanwhile_is_converted_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "MIB", 4096)
    asked = arguments(source, tmp_path / "out", "--shard-mib", "1", "--workers", "1")
    assert killed_in(convert, "write_manifest", 1, *asked) == -signal.SIGKILL
    note = tmp_path / "out.partial" / "shard-000003.tar.note.json"
    note.write_text(note.read_text()[:-9])  # and one that a crash cut off
    pixels(*SIZES_WH[1], seed=99).save(source / "images" / "photo.1.jpg")
    written = []
    write = pack.write_shard
    monkeypatch.setattr(pack, "write_shard", lambda *args: written.append(args[1]) or write(*args))
    assert convert.main(asked) == 0 and check.main([str(tmp_path / "out")]) == 0
    assert written == [1, 3]
    assert [jpeg for jpeg, _ in samples(tmp_path / "out")][1] == (source / "images" / "photo.1.jpg").read_bytes()


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_change_no_byte(workers, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "MIB", 4096)
    pixels(*SIZES_WH[2]).convert("L").save(source / "images" / "photo.2.jpg")  # a repair, counted in a worker
    for out, count in (("one", 1), ("many", workers)):
        assert convert.main(arguments(source, tmp_path / out, "--shard-mib", "1", "--workers", str(count))) == 0
    assert content(tmp_path / "one") == content(tmp_path / "many")
    assert read_manifest(tmp_path / "many").repairs == {"greyscale JPEG to be read as RGB": 1}
    for n in (0, 3):
        (source / "images" / f"photo.{n}.jpg").write_bytes(b"no image")
    capsys.readouterr()
    kept = rf"no set was made; 2 finished shard\(s\) are kept in {tmp_path / 'bad.partial'} for the next try"
    with pytest.raises(InputError, match=f"2 faults, {kept}") as error:
        convert.main(arguments(source, tmp_path / "bad", "--shard-mib", "1", "--workers", str(workers)))
    assert "stays in" not in capsys.readouterr().err  # it is told once
    assert str(error.value).index("photo.0.jpg") < str(error.value).index("photo.3.jpg")
    assert not (tmp_path / "bad").exists() and len(list((tmp_path / "bad.partial").glob("*.note.json"))) == 2
    for n in (0, 3):
        pixels(*SIZES_WH[n], seed=n).save(source / "images" / f"photo.{n}.jpg")
    written = []
    write = pack.write_shard
    monkeypatch.setattr(pack, "write_shard", lambda *args: written.append(args[1]) or write(*args))
    assert convert.main(arguments(source, tmp_path / "bad", "--shard-mib", "1", "--workers", "1")) == 0
    assert written == [0, 3] and content(tmp_path / "bad").keys() == content(tmp_path / "one").keys()


def test_a_killed_worker_is_told_and_its_command_goes_on(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "MIB", 4096)
    asked = arguments(source, tmp_path / "out", "--shard-mib", "1", "--workers", "2")
    read = pack.read_image

    def deadly(path, *args):
        if path.name == "photo.2.jpg":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, *args)

    monkeypatch.setattr(pack, "read_image", deadly)
    with pytest.raises(ChildProcessError, match="a process that reads images was killed"):
        convert.main(asked)
    assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
    monkeypatch.setattr(pack, "read_image", read)
    assert convert.main(asked) == 0 and check.main([str(tmp_path / "out")]) == 0


def test_workers_do_not_outlive_a_killed_conversion(source, tmp_path):
    """They would write into the folder of the command that goes on."""
    code = (
        "import os, sys, time\nfrom data_tools import convert, pack\nconvert.MIB = 4096\n"
        "read = pack.read_image\n"
        "def slow(*args):\n    os.write(1, b'reading\\n')\n    time.sleep(60)\n    return read(*args)\n"
        "pack.read_image = slow\nconvert.main(sys.argv[1:])"
    )
    asked = arguments(source, tmp_path / "out", "--shard-mib", "1", "--workers", "2")
    process = subprocess.Popen([sys.executable, "-c", code, *asked], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "reading\n"
    process.kill()
    process.wait()
    assert process.stdout.read().count("reading") <= 1  # ends only when the workers, who hold it too, are gone


def test_a_full_disk_loses_nothing(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "MIB", 4096)
    asked = arguments(source, tmp_path / "out", "--shard-mib", "1", "--workers", "1")
    write = pack.write_shard

    def full(folder, number, images):
        if number == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, number, images)

    monkeypatch.setattr(pack, "write_shard", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*out.partial/shard-000002.tar'"):
        convert.main(asked)
    assert "stays in" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.partial").glob("*.tar"))) == 2
    monkeypatch.setattr(pack, "write_shard", write)
    assert convert.main(asked) == 0 and check.main([str(tmp_path / "out")]) == 0


def test_an_interrupted_conversion_goes_on(source, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "read_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert.main(arguments(source, tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}  # nothing was finished
    monkeypatch.undo()
    assert convert.main(arguments(source, tmp_path / "out")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_two_conversions_do_not_share_a_folder(source, tmp_path):
    with partial_folder(tmp_path / "out", convert.MARK) as folder:
        with pytest.raises(UsageError, match="another process is writing it"):
            convert.main(arguments(source, tmp_path / "out"))
        assert folder.is_dir()


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "boxes", "repairs"),
    [("coco_open", (657, 510), (1, 0)), ("aquarium", (1435, 424), (0, 0)), ("deeppcb", (1123, 316), (154, 43))],
)
def test_real_sets(name, boxes, repairs, tmp_path):
    out, folder = tmp_path / "out", data_folder(name)
    assert convert.main(arguments(folder, out, "--verify", "none", name="annotations")) == 0
    manifests = [read_manifest(out / split) for split in ("train", "val")]
    assert tuple(manifest.boxes for manifest in manifests) == boxes
    assert tuple(m.repairs.get("greyscale JPEG to be read as RGB", 0) for m in manifests) == repairs
    assert all(set(m.repairs) <= {"greyscale JPEG to be read as RGB"} for m in manifests)
