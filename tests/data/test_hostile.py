"""Shard sets that somebody wrote to do harm, or that time has damaged: nothing but our own errors, nothing executed,
nothing opened outside the set. TENFOLD_FUZZ=5000 tries so many of each kind, others each time (30, the same)."""

import contextlib
import io
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools import big_json, check, index
from data_tools.coco import read_coco
from data_tools.sample import INDEX, MANIFEST, Manifest, read_manifest
from framework.data.loader import DataConfig, EvalLoader, TrainLoader
from framework.errors import InputError, UsageError
from tests.data.shards import CLASSES, commit, make_sample, write_raw_shard, write_shards
from tests.data_tools.sets import coco

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

fuzz = hypothesis.settings(
    max_examples=int(os.environ.get("TENFOLD_FUZZ", "30")),
    derandomize="TENFOLD_FUZZ" not in os.environ, deadline=None, database=None,
    suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
)  # fmt: skip

# What happens in this process while a hostile set is used. An audit hook stays for ever; it looks while one is watched.

FORBIDDEN = {
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect",
    "socket.getaddrinfo", "urllib.Request", "ctypes.dlopen", "os.remove", "os.rename", "shutil.rmtree",
}  # fmt: skip
_watched: list[str] = []
_seen: list[str] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in FORBIDDEN:
        _seen.append(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path, writes = os.path.abspath(os.fsdecode(arguments[0])), arguments[2] & (os.O_WRONLY | os.O_RDWR)
        read_only = () if writes else (f"{sys.prefix}/", f"{sys.base_prefix}/", "/proc/", "/sys/")
        if not f"{path}/".startswith((f"{_watched[0]}/", "/dev/null/", *read_only)):
            _seen.append(f"open {path}")


@pytest.fixture(scope="module", autouse=True)
def hook(tmp_path_factory):
    use(write_shards(tmp_path_factory.mktemp("warm"), [make_sample(1)]))  # what is imported late is imported now
    sys.addaudithook(_hook)


@contextlib.contextmanager
def watched(folder: Path, may: str = "nothing"):
    """Nothing forbidden happens inside, but events of this name in the folder."""
    _seen.clear()
    _watched.append(str(folder))
    try:
        yield
    finally:
        _watched.clear()
    assert not [one for one in _seen if not (one.startswith(may) and str(folder) in one)]


def use(folder: Path) -> None:
    """All that one does with a set; only our own errors may come of it."""
    settings = dict(train=str(folder), workers=0, sizes=[16, 24], max_size=32, crop_resize=[20], crop_sizes=[8, 16])
    config = DataConfig(**settings, max_bad=99, tail="mask", group_by_shape=True)
    for run in (lambda: list(TrainLoader(config, seed=0, global_batch=4, micro_batch=2, rank=0, world=1).epoch(0)),
                lambda: list(EvalLoader(folder, config, batch_size=2, rank=0, world=1)),
                lambda: EvalLoader(folder, config, batch_size=2, rank=0, world=1).ground_truth()):  # fmt: skip
        try:
            run()
        except (InputError, UsageError) as error:
            assert "\n" not in str(error)
    list(check.set_faults(folder))


def use_watched(folder: Path) -> None:
    with watched(folder):
        use(folder)


# Values that have done harm somewhere.
words = st.sampled_from([
    "../../etc/passwd", "/etc/passwd", "pipe:touch owned", "http://127.0.0.1:1/x", "s3://a/b", "a\x00b", "\ud800", "..",
    ".", "", "shard-000000.tar/../x.tar", "CON", "~root/.tar", "a" * 300 + ".tar", "index.npy", "x\n.tar", "\u202e.tar",
])  # fmt: skip
numbers = st.sampled_from(
    [0, -1, 1, 2**31, 2**32 - 1, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]
)
leaves = st.one_of(st.none(), st.booleans(), numbers, words, st.integers(), st.floats(), st.text(max_size=8))
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=5
)
deep = st.sampled_from(["[" * 100_000, '{"a":' * 50_000, "[" * 500 + "]" * 500])


@st.composite
def changed_json(draw, document: Any) -> bytes:
    """The document with some of its values replaced, dropped, or said twice."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        at = document
        while isinstance(at, (dict, list)) and at:
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if not isinstance(at[key], (dict, list)) or draw(st.booleans()):
                if draw(st.integers(0, 4)) == 0:
                    del at[key]
                else:
                    at[key] = draw(values)
                break
            at = at[key]
    return json.dumps(document).encode()


@st.composite
def changed_bytes(draw, data: bytes) -> bytes:
    """Some bytes overwritten, put in, taken out; the rest may be missing."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        new = draw(
            st.binary(max_size=16) | st.sampled_from([b"\xff" * 8, b"\x00" * 600, b"\x80", b"../../x", b"L", b"2"])
        )
        end = draw(st.sampled_from([at, at + len(new), at + 512, len(changed)]))
        changed[at:end] = new
    return bytes(changed)


def json_bytes(document: Any) -> Any:
    return st.one_of(changed_json(document), changed_bytes(json.dumps(document).encode()), deep.map(str.encode))


SAMPLES = [make_sample(10 + n, boxes=n) for n in range(4)]


class Files(dict[str, bytes]):
    def __repr__(self) -> str:  # hypothesis shows it when a test fails
        return "the files of a sound set"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Files:
    folder = write_shards(tmp_path_factory.mktemp("sets") / "whole", SAMPLES, shard_bytes=8000)
    return Files({path.name: path.read_bytes() for path in folder.iterdir()})


def restored(folder: str, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        Path(folder, name).write_bytes(data)
    return Path(folder)


@fuzz
@hypothesis.given(data=st.data(), vouched=st.booleans())
def test_manifests(whole, data, vouched):
    """vouched: whoever wrote it knows how a fingerprint is made."""
    text = data.draw(json_bytes(json.loads(whole[MANIFEST])))
    if vouched:
        try:
            raw = json.loads(text)
            raw["fingerprint"] = Manifest(**raw).computed_fingerprint()
            text = json.dumps(raw).encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
    with tempfile.TemporaryDirectory() as folder:
        use_watched(restored(folder, whole | {MANIFEST: text}))


@fuzz
@hypothesis.given(data=st.data())
def test_indices(whole, data):
    """The manifest vouches for each of them."""
    with tempfile.TemporaryDirectory() as folder:
        restored(folder, whole)
        records, manifest = np.load(Path(folder, INDEX)), read_manifest(folder)
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(records.dtype.names))
            most = int(np.iinfo(records[name].dtype).max)
            number = data.draw(st.sampled_from([0, 1, most, most - 1]) | st.integers(0, most) | st.integers(0, 20_000))
            records[name][data.draw(st.integers(0, len(records) - 1))] = number
        commit(Path(folder), records, manifest)
        if data.draw(st.booleans()):
            text = data.draw(changed_bytes(Path(folder, INDEX).read_bytes()))
            commit(Path(folder), records, manifest, text)
        use_watched(Path(folder))


@fuzz
@hypothesis.given(data=st.data())
def test_annotations(data):
    _, sample = SAMPLES[2]
    text = data.draw(json_bytes(json.loads(sample.to_json())))
    with tempfile.TemporaryDirectory() as folder:
        use_watched(write_raw_shard(Path(folder), [(SAMPLES[2][0], text, sample), raw(SAMPLES[1])]))


def raw(one: tuple[bytes, Any]) -> tuple[bytes, bytes, Any]:
    return one[0], one[1].to_json(), one[1]


@fuzz
@hypothesis.given(data=st.data())
def test_images(data):
    image, sample = SAMPLES[3]
    with tempfile.TemporaryDirectory() as folder:
        changed = data.draw(changed_bytes(image))
        use_watched(write_raw_shard(Path(folder), [(changed, sample.to_json(), sample), raw(SAMPLES[1])]))


@fuzz
@hypothesis.given(data=st.data(), names=st.lists(words, max_size=2), kind=st.sampled_from("0125673LSgxX"))
def test_tar_files_of_others(whole, data, names, kind):
    """Indexed, checked, read: members of any name and kind beside the samples, and bytes changed after that."""
    buffer = io.BytesIO(whole["shard-000000.tar"])
    with tarfile.open(fileobj=buffer, mode="a:", format=tarfile.GNU_FORMAT, errors="surrogatepass") as tar:
        for name in names:
            member = tarfile.TarInfo(name.replace("\x00", "") + ".jpg")
            member.type, member.linkname = kind.encode(), "/etc/passwd"
            tar.addfile(member)
    shard = buffer.getvalue()
    if data.draw(st.booleans()):
        shard = data.draw(changed_bytes(shard))
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "set")
        folder.mkdir()
        restored(str(folder), {"a.tar": shard, "classes.json": CATEGORIES})
        with watched(folder, may="os.rename"), contextlib.suppress(InputError, UsageError):
            index.main([str(folder), "--categories", str(folder / "classes.json")])
        assert [path.name for path in Path(outer).iterdir()] == ["set"]
        use_watched(folder)


@fuzz
@hypothesis.given(data=st.data(), chunk_bytes=st.sampled_from([1, 50, 2**22]))
def test_annotation_files(data, chunk_bytes):
    """COCO's, which convert reads; in chunks of any size."""
    text = data.draw(json_bytes(coco()))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(big_json, "CHUNK_BYTES", chunk_bytes)
        path = Path(folder, "instances.json")
        path.write_bytes(text)
        with contextlib.suppress(InputError), watched(Path(tempfile.gettempdir()), may="os.remove"):
            list(read_coco(path).samples)


CATEGORIES = json.dumps({"categories": [{"id": c.category_id, "name": c.name} for c in CLASSES]}).encode()


@pytest.mark.parametrize(
    "code", ["open('/etc/hostname')", "__import__('os').system('true')", "open(str(tmp_path) + 'x', 'w')"]
)
def test_what_watches_does_see(code, tmp_path):
    with pytest.raises(AssertionError), watched(tmp_path):
        exec(code)
