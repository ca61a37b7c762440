"""Shards of others get a manifest and an index, or a list of what is wrong with them."""

import io
import json
import os
import tarfile

import pytest

from data_tools import check, convert, index
from data_tools.sample import INDEX, MANIFEST
from framework.errors import InputError, UsageError
from tests.data_tools.sets import COCO, arguments, content, samples, write_set


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """A set of our own, a shard for each image."""
    monkeypatch.setattr(convert, "MIB", 4096)
    assert convert.main(arguments(write_set(tmp_path / "source"), tmp_path / "ours", "--shard-mib", "1")) == 0
    return tmp_path / "ours"


@pytest.fixture
def theirs(ours, tmp_path):
    """The same samples as tar files of another tool: two shards, other names, members in another order."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    found = list(samples(ours))
    for n, part in ((9, found[:3]), (10, found[3:])):
        with tarfile.open(folder / f"part-{n}.tar", "w") as tar:
            for image, sample in part:
                add(tar, f"./photos/{sample.image_id}.json", sample.to_json())
                add(tar, f"./photos/{sample.image_id}.jpg", image)
    return folder


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def indexed(folder, tmp_path):
    return index.main([str(folder), "--categories", str(tmp_path / "source" / "instances.json")])


def test_our_own_shards_get_the_files_they_had(ours, tmp_path):
    before = content(ours)
    for name in (MANIFEST, INDEX):
        os.remove(ours / name)
    assert indexed(ours, tmp_path) == 0
    assert content(ours) == before


def test_shards_of_others(theirs, ours, tmp_path):
    assert indexed(theirs, tmp_path) == 0
    assert check.main([str(theirs)]) == 0
    assert list(samples(theirs)) == list(samples(ours))  # part-9 before part-10
    with pytest.raises(UsageError, match="has a manifest.json already"):
        indexed(theirs, tmp_path)


def test_all_faults_are_told_and_nothing_is_written(theirs, ours, tmp_path):
    (image, sample), *_ = samples(ours)
    with tarfile.open(theirs / "part-10.tar", "a") as tar:
        add(tar, "20.jpg", image)
        add(tar, "21.json", sample.to_json())
        add(tar, "22.txt", b"a caption")
        add(tar, "23.jpg", image[:100])
        add(tar, "23.json", sample.to_json().replace(b'"image_id":10', b'"image_id":23'))
        add(tar, "24.jpg", image)
        add(tar, "24.json", sample.to_json())
        add(tar, "25.jpg", image)
        add(tar, "25.json", b"{}")
        add(tar, "25.jpg", image)
        link = tarfile.TarInfo("26.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (theirs / "part-11.tar").write_bytes((theirs / "part-9.tar").read_bytes()[:700])
    (theirs / "part-12.tar").write_bytes(b"")
    with pytest.raises(InputError, match="nothing was written") as error:
        indexed(theirs, tmp_path)
    told = str(error.value)
    for fault in ("20 has no JSON", "21 has no image", "22.txt is neither an image", "23: not a whole image",
                  "24: image_id 10 is in part-9.tar too", "25: not a sample's JSON", "25.jpg is the second image of 25",
                  "26.jpg is a link", "part-11.tar: not a whole tar file (cut off in",
                  "part-12.tar: not a whole tar file"):  # fmt: skip
        assert fault in told, fault
    assert not (theirs / MANIFEST).exists() and not (theirs / INDEX).exists()


def flipped(data):
    """A bit in the header of the third member."""
    at = data.index(b"./photos/11.json")
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def resized(size):
    """The third member's size, as a number of base 256, with its checksum."""

    def damage(data):
        at = data.index(b"./photos/11.json")
        header = bytearray(data[at : at + 512])
        header[124:136] = (size % 2**96).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return data[:at] + bytes(header) + data[at + 512 :]

    return damage


@pytest.mark.parametrize(
    "damage",
    [flipped, lambda data: data[: data.index(b"./photos/11.json")], lambda data: data + data,
     lambda data: data[:-10240], lambda data: data.rstrip(b"\0"), resized(-1), resized(-512), resized(-1024),
     resized(2**33), resized(2**70)],
)  # fmt: skip
def test_samples_do_not_vanish_behind_damage(theirs, tmp_path, damage):
    """tarfile ends in silence, for ever, or with any error there."""
    path = theirs / "part-9.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"part-9.tar: (not a whole tar file|.*has no)"):
        indexed(theirs, tmp_path)
    assert not (theirs / MANIFEST).exists()


def test_folders_and_capitals(theirs, tmp_path):
    with tarfile.open(theirs / "part-11.tar", "w") as tar:
        folder = tarfile.TarInfo("photos")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        (image, sample), *_ = samples(tmp_path / "ours")
        add(tar, "photos/77.JPG", image)
        renamed = sample.to_json().replace(b'"image_id":10', b'"image_id":77')
        add(tar, "photos/77.JSON", renamed.replace(b'"annotation_ids":[5,6]', b'"annotation_ids":[71,72]'))
    assert indexed(theirs, tmp_path) == 0
    assert check.main([str(theirs)]) == 0


def test_labels_that_are_no_class(theirs, tmp_path):
    categories = {"categories": [{"id": 7, "name": "starfish"}, {"id": 90, "name": "stingray"}]}
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    with pytest.raises(InputError, match="label 2 with category id 90 is no class of the manifest"):
        index.main([str(theirs), "--categories", str(tmp_path / "categories.json")])


@pytest.mark.parametrize("text", ["", "[]", '{"categories": []}', '{"categories": [{"id": 1}]}', '{"categories": 3}',
                                  '{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}'])  # fmt: skip
def test_bad_categories(theirs, tmp_path, text):
    (tmp_path / "categories.json").write_text(text)
    with pytest.raises(InputError, match="categories.json"):
        index.main([str(theirs), "--categories", str(tmp_path / "categories.json")])


def test_misuse(theirs, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a\nb.tar").touch()
    with pytest.raises(UsageError, match=r"shard name 'a\\nb.tar': expected printable letters"):
        indexed(tmp_path / "odd", write_source(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \*.tar in it"):
        indexed(tmp_path / "empty", write_source(tmp_path))
    with pytest.raises(UsageError, match="not a folder"):
        indexed(tmp_path / "nowhere", tmp_path)
    with pytest.raises(UsageError, match="--categories"):
        index.main([str(theirs), "--categories", str(tmp_path / "nowhere.json")])


def write_source(folder):
    (folder / "source").mkdir(exist_ok=True)
    (folder / "source" / "instances.json").write_text(json.dumps(COCO))
    return folder
