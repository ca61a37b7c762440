import hashlib
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest

from data_tools.sample import INDEX, MANIFEST, read_manifest
from framework.data import source as source_module
from framework.data.source import BadSample, IndexedSource
from framework.errors import InputError
from tests.data.conftest import NUM_IMAGES
from tests.data.shards import commit, make_sample, overwrite, shard_of, write_shards


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def test_reads_what_was_written(shards):
    source = IndexedSource(shards)
    assert len(source) == NUM_IMAGES
    for i in (22, 0, 13):
        image, sample = make_sample(1000 + i, boxes=i % 4, height=40 + 3 * i, width=60)
        assert source.read(i) == (image, sample)
        assert source.image_id(i) == sample.image_id
        assert source.size_hw(i) == (sample.height, sample.width)


def test_more_shards_than_open_files(shards, monkeypatch):
    monkeypatch.setattr(source_module, "MAX_OPEN_FILES", 2)
    source = IndexedSource(shards)
    for i in [0, 8, 16, 22, 1, 9]:
        assert source.read(i)[1].image_id == 1000 + i
    assert len(source._files) == 2


def test_empty_set_opens(tmp_path):
    assert len(IndexedSource(write_shards(tmp_path / "empty", []))) == 0


def test_unfinished_set_is_refused(copy):
    (copy / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"no manifest.json; expected a finished shard set"):
        IndexedSource(copy)


def test_missing_shard_is_refused(copy):
    (copy / "shard-000002.tar").unlink()
    with pytest.raises(InputError, match=r"shard-000002.tar: missing, the manifest names it"):
        IndexedSource(copy)


def test_truncated_shard_is_refused(copy):
    path = copy / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    size = path.stat().st_size
    with pytest.raises(InputError, match=rf"shard-000001.tar: {size} bytes, the manifest says {size + 512}"):
        IndexedSource(copy)


@pytest.mark.parametrize("key, value", [
    *(("name", name) for name in ("../shard-000000.tar", "/etc/passwd", "..", "a\0b.tar", "a\nb.tar", "\ud800.tar",
                                  "x" * 300 + ".tar", "index.npy", "shard-000000.tar.lock", 7, None)),
    *(("bytes", number) for number in (-5, "30720", None, 1e30, 10**30, True)), ("samples", -1),
])  # fmt: skip
def test_hostile_manifests_are_refused(copy, key, value):
    raw = json.loads((copy / MANIFEST).read_text())
    raw["shards"][0][key] = value
    (copy / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"manifest.json: shard .*(is not a plain file name|is no count)") as error:
        IndexedSource(copy)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_index_of_another_set_is_refused(copy):
    index = np.load(copy / INDEX)
    index["image_id"] += 1
    np.save(copy / INDEX, index)
    with pytest.raises(InputError, match=r"index.npy: not the index that the manifest was written with"):
        IndexedSource(copy)


def test_manifest_of_another_set_is_refused(copy, tmp_path):
    samples = [IndexedSource(copy).read(i) for i in range(NUM_IMAGES)]
    others = [(image, replace(sample, image_id=sample.image_id + 1000)) for image, sample in samples]
    shutil.copy(write_shards(tmp_path / "other", others) / MANIFEST, copy / MANIFEST)
    with pytest.raises(InputError, match=r"index.npy: not the index that the manifest was written with"):
        IndexedSource(copy)


def test_records_outside_their_shard_are_refused(copy):
    index, manifest = np.load(copy / INDEX), read_manifest(copy)
    for field, value in (("image_offset", 2**64 - 1), ("json_length", 2**32 - 1), ("json_offset", 2**40)):
        hostile = index.copy()
        hostile[field][4] = value
        commit(copy, hostile, manifest)
        with pytest.raises(InputError, match=r"image 1004 lies beyond the end of its shard"):
            IndexedSource(copy)


def test_what_the_fuzz_found(copy):
    """tests/data/test_hostile.py, 2026-11-26: each ended in another error than ours."""
    index, manifest = np.load(copy / INDEX), read_manifest(copy)
    flat = index.copy()
    flat["height"][4] = 0
    commit(copy, flat, manifest)
    with pytest.raises(InputError, match=r"index.npy: image 1004 has no pixels"):
        IndexedSource(copy)
    header = (copy / INDEX).read_bytes()
    for changed in (header.replace(b"'shard', ", b"'shar\x00\x00, "), header.replace(b"'<i8')", b"'<i8'(")):
        commit(copy, index, manifest, changed)
        with pytest.raises(InputError, match=r"index.npy: not an index"):
            IndexedSource(copy)
    for wrong in (dict(boxes=[1, 2]), dict(images=None)):
        raw = replace(manifest, **wrong)
        (copy / MANIFEST).write_text(json.dumps(asdict(replace(raw, fingerprint=raw.computed_fingerprint()))))
        with pytest.raises(InputError, match=r"manifest.json: \w+ .* is no count"):
            IndexedSource(copy)


@pytest.mark.parametrize("shard", [1, 4_000_000_000])
def test_records_of_other_shards_are_refused(copy, shard):
    index = np.load(copy / INDEX)
    index["shard"][0] = shard
    commit(copy, index, read_manifest(copy))
    with pytest.raises(InputError, match=r"samples per shard differ from the manifest's"):
        IndexedSource(copy)


def test_edited_manifest_is_refused(copy):
    manifest = asdict(read_manifest(copy)) | {"index_sha256": hashlib.sha256(b"").hexdigest()}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"its fingerprint .* does not fit its content"):
        IndexedSource(copy)


@pytest.mark.parametrize("member", ["image", "json"])
def test_damaged_bytes_are_named(copy, member):
    overwrite(copy, 9, member, b"\x00\x01", fix_crc=False)
    source = IndexedSource(copy)
    offset = source.index[9][f"{member}_offset"]
    where = rf"image 1009 in .*{shard_of(copy, 9)} at offset {offset}: "
    with pytest.raises(BadSample, match=where + rf"the {member} bytes do not have the crc32 of the index"):
        source.read(9)
    assert source.read(8)[1].image_id == 1008


def test_wrong_annotations_are_named(copy, tmp_path):
    overwrite(copy, 9, "json", b"nonsense", fix_crc=True)
    with pytest.raises(BadSample, match=r"image 1009 in .*: not a sample's JSON"):
        IndexedSource(copy).read(9)

    image, sample = make_sample(5)
    folder = write_shards(tmp_path / "labels", [(image, replace(sample, labels=[0, 3]))])
    with pytest.raises(BadSample, match=r"image 5 in .*: label 3 with category id \d+ is no class of the manifest"):
        IndexedSource(folder).read(0)

    folder = write_shards(tmp_path / "categories", [(image, replace(sample, labels=[0, 1], category_ids=[3, 90]))])
    with pytest.raises(BadSample, match=r"image 5 in .*: label 1 with category id 90 is no class of the manifest"):
        IndexedSource(folder).read(0)

    folder = write_shards(tmp_path / "ids", [(image, sample)])
    index = np.load(folder / INDEX)
    index["image_id"] = 6
    commit(folder, index, read_manifest(folder))
    with pytest.raises(BadSample, match=r"image 6 in .*: the JSON is of image 5"):
        IndexedSource(folder).read(0)
