"""Every kind of damage to a shard set is found and named."""

import json
import os
from dataclasses import asdict, replace

import numpy as np
import pytest

from data_tools import check, convert
from data_tools.sample import INDEX, MANIFEST, Category, Sample, read_index, read_manifest
from framework.errors import InputError, UsageError
from framework.files import sha256_of
from tests.data.shards import write_shards
from tests.data_tools.sets import SIZES_WH, arguments, write_set

CLASSES = [Category("fish", 3), Category("starfish", 7)]


@pytest.fixture
def shards(tmp_path):
    convert.main(arguments(write_set(tmp_path / "source"), tmp_path / "out"))
    return tmp_path / "out"


def faults(folder, capsys):
    """The lines of a check that fails, without the last."""
    capsys.readouterr()
    assert check.main([str(folder)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert f"{len(lines)} fault(s)" in last
    return lines


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_sound_set(shards, capsys):
    capsys.readouterr()
    assert check.main([str(shards)]) == 0
    assert "sound; 4 images, 4 boxes, 3 classes, 1 shard(s)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["image", "json"])
def test_a_flipped_byte_is_found(shards, capsys, kind):
    record = read_index(shards, read_manifest(shards))[2]
    flip(shards / "shard-000000.tar", int(record[f"{kind}_offset"]) + 5)
    digest, sample = faults(shards, capsys)
    assert digest.endswith("shard-000000.tar: its sha256 is not the manifest's")
    what = "JSON" if kind == "json" else kind
    assert f"image 12 at offset {record['image_offset']}: the {what} bytes do not have the crc32" in sample


def test_a_flipped_byte_in_a_header_is_found(shards, capsys):
    flip(shards / "shard-000000.tar", 3)
    assert any("sha256" in fault for fault in faults(shards, capsys))


def test_a_truncated_shard_is_found(shards, capsys):
    path = shards / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[: int(read_index(shards, read_manifest(shards))[3]["image_offset"]) + 10])
    found = "\n".join(faults(shards, capsys))
    assert "bytes, the manifest says" in found
    assert "image 13 at offset" in found
    assert "image 12 at offset" not in found


def test_missing_and_stray_shards_are_found(shards, capsys):
    os.rename(shards / "shard-000000.tar", shards / "shard-000007.tar")
    found = faults(shards, capsys)
    assert [line.rpartition("/")[2] for line in found] == [
        "shard-000007.tar: not in the manifest",
        "shard-000000.tar: missing",
    ]


def edit_index(shards, field, value):
    """Change a record, and let the manifest vouch for it."""
    index = np.array(read_index(shards, read_manifest(shards)))
    index[field][1] = value
    np.save(shards / INDEX, index)
    vouch(shards, index_sha256=sha256_of(shards / INDEX))


def vouch(shards, **values):
    manifest = replace(read_manifest(shards), **values)
    manifest = replace(manifest, fingerprint=manifest.computed_fingerprint())
    (shards / MANIFEST).write_text(json.dumps(asdict(manifest)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_offset", 512, "the index says members of"),
        ("image_offset", 2**63, "the image bytes do not have the crc32"),
        ("json_length", 3, "the JSON bytes do not have the crc32"),
        ("width", 31, "the image is 30x40, the index says 31x40"),
        ("image_id", 10, "an image id occurs twice"),
        ("image_id", 77, "its JSON has id, width, height, boxes (11, 30, 40, 0), the index (77, 30, 40, 0)"),
        ("boxes", 9, "13 boxes, the manifest says 4"),
        ("shard", 1, "samples per shard [3], the manifest says [4]"),
        ("shard", 2**32 - 1, "1 record(s) of a shard that the manifest does not name"),
    ],
)
def test_an_index_that_does_not_fit_is_found(shards, capsys, field, value, message):
    edit_index(shards, field, value)
    assert any(message in fault for fault in faults(shards, capsys))


def test_an_exchanged_index_is_found(shards, capsys):
    np.save(shards / INDEX, np.array(read_index(shards, read_manifest(shards))[::-1]))
    assert any("index.npy: its sha256 is not the manifest's" in fault for fault in faults(shards, capsys))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"boxes_xyxy_px": [[1.0, 1.0, 41.0, 5.0]]}, "box [1.0, 1.0, 41.0, 5.0] is not inside the image"),
        ({"boxes_xyxy_px": [[5.0, 1.0, 5.0, 5.0]]}, "or has no area"),
        ({"boxes_xyxy_px": [[1.0, float("nan"), 4.0, 5.0]]}, "is not inside the image"),
        ({"boxes_xyxy_px": [[1, 2, 3]]}, "not a sample's JSON: a box does not have 4 numbers"),
        ({"boxes_xyxy_px": [[1, 2, 3, "4"]]}, "not a sample's JSON: a box or an area is not a number"),
        ({"labels": [2]}, "label 2 with category id 3 is no class of the manifest"),
        ({"labels": [-1]}, "label -1 with category id 3 is no class"),
        ({"labels": [0.0]}, "not a sample's JSON: an id, a size, a label or iscrowd is not an integer"),
        ({"category_ids": [7]}, "label 0 with category id 7 is no class"),
        ({"iscrowd": [2]}, "iscrowd 2"),
        ({"areas": [float("inf")]}, "area inf"),
        ({"areas": []}, "not a sample's JSON: its lists differ in length"),
        ({"areas": {}}, "not a sample's JSON: what should be a list is none"),
        ({"file_name": 3}, "not a sample's JSON: file_name is no text"),
        ({"annotation_ids": [1]}, "annotation id 1 occurs twice"),
        ({"width": 39}, "the image is 40x30, the index says 39x30"),
    ],
)
def test_bad_annotations_are_found(tmp_path, capsys, values, message):
    source, (width, height) = write_set(tmp_path / "source"), SIZES_WH[0]
    sound = Sample(
        image_id=1, file_name="a", width=width, height=height, boxes_xyxy_px=[[1.0, 1.0, 5.0, 5.0]], labels=[0],
        category_ids=[3], areas=[16.0], iscrowd=[0], annotation_ids=[1], segmentation=[[]],
    )  # fmt: skip
    jpeg = (source / "images" / "photo.0.jpg").read_bytes()
    other = replace(sound, **({"image_id": 2, "annotation_ids": [2]} | values))
    write_shards(tmp_path / "out", [(jpeg, sound), (jpeg, other)], classes=CLASSES)
    found = faults(tmp_path / "out", capsys)
    assert all("image 2 at offset" in fault for fault in found)
    assert any(message in fault for fault in found)


@pytest.mark.parametrize("broken", ["manifest.json", "index.npy"])
def test_an_unfinished_split_is_found(shards, tmp_path, capsys, broken):
    for split in ("train", "val"):
        (tmp_path / "both" / split).mkdir(parents=True)
        for path in shards.iterdir():
            os.link(path, tmp_path / "both" / split / path.name)
    assert check.main([str(tmp_path / "both")]) == 0
    os.remove(tmp_path / "both" / "val" / broken)
    (fault,) = faults(tmp_path / "both", capsys)
    assert str(tmp_path / "both" / "val") in fault


def test_splits_of_other_classes_are_found(shards, tmp_path, capsys):
    write_shards(tmp_path / "both" / "val", [], classes=CLASSES)
    os.rename(shards, tmp_path / "both" / "train")
    (fault,) = faults(tmp_path / "both", capsys)
    assert "its classes differ" in fault


def test_no_folder(tmp_path):
    with pytest.raises(UsageError, match="not a folder; expected a shard set"):
        check.main([str(tmp_path / "none")])


def test_an_empty_folder_is_no_set(tmp_path, capsys):
    (fault,) = faults(tmp_path, capsys)
    assert "no manifest.json; expected a finished shard set" in fault


def test_from_json_refuses_what_is_not_a_sample():
    with pytest.raises(InputError, match="not a sample's JSON"):
        Sample.from_json(b'{"image_id": 1}')
