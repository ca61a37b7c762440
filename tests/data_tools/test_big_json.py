import json
import tracemalloc

import pytest

from data_tools import big_json, spill
from data_tools.big_json import NotAnObject, members
from data_tools.coco import read_coco
from framework.errors import InputError
from tests.data_tools.sets import coco

DOCUMENT = {
    "info": {"year": 2017, "list": [1, 2]}, "empty": [], "number": -1.5e3,
    "images": [{"id": 1, "name": "ä, ]}\"\n"}, 12, 0.5],
    "nested": [[1, [2, []]], "x" * 50], "": [True], "last": 123,
}  # fmt: skip


def whole(path) -> dict:
    """What json.loads would have made of it."""
    found = {}
    for name, place, value in members(path):
        if place is None:
            found[name] = value
        else:
            assert place == len(found.setdefault(name, []))
            found[name].append(value)
    return found


@pytest.mark.parametrize("chunk_bytes", [1, 3, 16, 2**20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_members_are_those_of_json(tmp_path, monkeypatch, chunk_bytes, indent, encoding):
    monkeypatch.setattr(big_json, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "some.json"
    path.write_bytes(json.dumps(DOCUMENT, indent=indent, ensure_ascii=False).encode(encoding))
    assert whole(path) == DOCUMENT
    path.write_text("  {  }\n")
    assert whole(path) == {}


@pytest.mark.parametrize("chunk_bytes", [4, 2**20])
@pytest.mark.parametrize(
    "text",
    ["", "{", "nonsense", '{"a"', '{"a":', '{"a": [1', '{"a": [1,', '{"a": [1,]}', '{"a": [1 2]}', '{"a": 1,}',
     '{"a": 1} x', '{"a": [{"b": 1,, }]}', "{1: 2}", '{"a": "\n"}', '{"a": tru}', '{"a": [}', '{"a": 1]',
     '{"list": [12', '{"list": ["some text", "cut off'],
)  # fmt: skip
def test_what_is_no_json_is_told_with_its_place(tmp_path, monkeypatch, text, chunk_bytes):
    monkeypatch.setattr(big_json, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "some.json"
    path.write_text(f"\n\n{text}")
    with pytest.raises(ValueError) as theirs:
        json.loads(f"\n\n{text}")
    place = theirs.value.pos + ("trailing comma" in theirs.value.msg)  # Python 3.13 names the comma, not what follows
    with pytest.raises(ValueError, match=rf"line {theirs.value.lineno} \(char {place}\)$") as ours:
        whole(path)
    assert not isinstance(ours.value, NotAnObject)


@pytest.mark.parametrize(("text", "kind"), [("[1, 2]", "list"), (' "a"', "str"), ("12", "int"), ("null", "NoneType")])
def test_other_kinds_are_told(tmp_path, text, kind):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(NotAnObject, match=kind):
        whole(path)


def test_memory_does_not_grow_with_the_polygons(tmp_path, monkeypatch):
    """Each object here takes 64 KB as a list of numbers; all of them would be 2.6 MB."""
    monkeypatch.setattr(big_json, "CHUNK_BYTES", 2**14)
    monkeypatch.setattr(spill, "WRITTEN_BYTES", 2**14)
    many = coco()
    many["images"] = [many["images"][0] | {"id": n} for n in range(40)]
    one = many["annotations"][0]
    many["annotations"] = [one | {"id": n, "image_id": n, "segmentation": [[0.25] * 2000]} for n in range(40)]
    path = tmp_path / "many.json"
    path.write_text(json.dumps(many))
    tracemalloc.start()
    data = read_coco(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(len(sample.segmentation) for sample in data.samples) == 40
    assert peak < 0.6e6  # 0.33 MB; 1.07 with what is spilled in memory


def test_bytes_that_are_no_text_are_told_with_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(big_json, "CHUNK_BYTES", 7)
    path = tmp_path / "some.json"
    path.write_bytes(b'{"a": ["' + "äöü".encode() * 5 + b'", "\xff"]}')
    with pytest.raises(ValueError, match=r"invalid start byte \(byte 42, utf-8\)"):
        whole(path)


def test_nothing_is_read_on_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(big_json, "CHUNK_BYTES", 100)
    path = tmp_path / "some.json"
    path.write_text('{"a": [{"b": 1,, "c": "' + "x" * 50 + '"}' + ", 1" * 10_000 + "]}")
    text = big_json._Text(path.open("rb"))
    text.buffer, text.at = path.read_text()[:100], 7
    with pytest.raises(ValueError, match="Expecting property name"):
        text.value()
    assert len(text.buffer) == 100


def test_a_full_temporary_disk_is_named(monkeypatch):
    full = spill.Spill()
    full._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    full.append(b"x")
    with pytest.raises(OSError, match=r"No space left on device: '.* \(TMPDIR names"):
        full.flush()


def test_deep_segmentations_are_faults(tmp_path):
    deep = coco()
    path = tmp_path / "deep.json"
    for depth in range(900, 1000, 7):
        deep["annotations"][0]["segmentation"] = "here"
        path.write_text(json.dumps(deep).replace('"here"', "[" * depth + "]" * depth))
        try:
            data = read_coco(path)
        except InputError as error:
            assert "recursion" in str(error)
        else:
            assert len(list(data.samples)) == 4 or "nested too deeply" in data.faults[0]


def test_members_given_twice_are_refused(tmp_path):
    text = json.dumps(coco())
    path = tmp_path / "twice.json"
    path.write_text(text[:-1] + ', "images": ' + json.dumps(coco()["images"]) + "}")
    with pytest.raises(InputError, match=r"has the list 'images' twice"):
        read_coco(path)
