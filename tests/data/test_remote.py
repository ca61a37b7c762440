"""Shard sets behind a real HTTP server and a real S3-compatible one, both on loopback, that misbehave when told to."""

import shutil
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_tools.sample import read_manifest
from framework.data import remote
from framework.data.loader import DataConfig, TrainLoader, manifest_of
from framework.data.remote import Cache
from framework.data.source import IndexedSource
from framework.errors import InputError, UsageError
from tests.data.conftest import NUM_IMAGES
from tests.data.shards import make_sample, write_shards
from tests.data.test_loader import SMALL, digests, train_loader
from tests.disk import fill, small_disk
from tests.paths import REPOSITORY

ROOM = 10**9


class Server(ThreadingHTTPServer):
    """Serves a folder. `faults`: what the next answers for a file are, one after the other, before good ones."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.faults = folder, Counter(), defaultdict(list)
        self.url = f"http://127.0.0.1:{self.server_port}/a set/train"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.asked[name] += 1
        fault = self.server.faults[name].pop(0) if self.server.faults[name] else None
        path = self.server.folder / name
        if self.path != f"/a%20set/train/{name}" or not path.is_file():
            fault = 404
        if fault in ("nothing", "garbage"):
            self.wfile.write(b"" if fault == "nothing" else b"abc\r\n\r\n")
            self.close_connection = True
            return
        body = path.read_bytes() if path.is_file() else b""
        self.send_response(fault if isinstance(fault, int) else 302 if fault == "elsewhere" else 200)
        if fault == "elsewhere":
            self.send_header("Location", "file:///etc/passwd")
        if fault != "too much":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = b"x" * len(body) if fault == "other bytes" else body
        body += b"x" * (fault == "too much")
        self.wfile.write(body[: len(body) // 2] if fault == "half" else body)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    with Server(shutil.copytree(shards, tmp_path / "served")) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache", ROOM)


def test_the_same_batches_as_from_a_folder(server, shards, tmp_path):
    there = dict(cache=str(tmp_path / "cache"), workers=2)
    assert digests(train_loader(server.url, **there)) == digests(train_loader(shards))
    assert digests(train_loader(server.url + "/", **there)) == digests(train_loader(shards))
    manifest = read_manifest(shards)
    assert server.asked == {"manifest.json": 2, "index.npy": 1} | {shard.name: 1 for shard in manifest.shards}


@pytest.mark.parametrize("fault", [500, 503, 429, "half", "nothing", "other bytes"])
def test_what_may_pass_is_tried_again(server, shards, cache, fault, caplog):
    first = read_manifest(shards).shards[0].name
    server.faults |= {first: [fault] * 4, "index.npy": [fault]}
    source = IndexedSource(server.url, cache)
    assert source.read(0) == IndexedSource(shards).read(0)
    assert server.asked[first] == 5 and caplog.text.count("trying again") == 5


@pytest.mark.parametrize("fault, tries, message", [
    (404, 1, "the server answers 404"), (403, 1, "the server answers 403"), (500, 5, "the server answers 500"),
    ("half", 5, r"\d+ of \d+ bytes"), ("other bytes", 5, "not the bytes"), ("nothing", 5, "cannot be reached"),
    ("too much", 5, r"more than the \d+ bytes that are expected"), ("garbage", 5, "cannot be reached"),
])  # fmt: skip
def test_what_stays_is_told_in_a_line(server, shards, cache, fault, tries, message):
    source, last = IndexedSource(server.url, cache), read_manifest(shards).shards[-1]
    server.faults[last.name] = [fault] * 9
    with pytest.raises(InputError, match=message) as error:
        source.read(NUM_IMAGES - 1)
    assert "\n" not in str(error.value) and f"{server.url}/{last.name}" in str(error.value)
    assert server.asked[last.name] == tries
    assert not list(source.folder.glob("*.partial")) and not (source.folder / last.name).exists()


def test_a_worker_tells_it_in_a_line_too(server, tmp_path):
    for shard in read_manifest(server.folder).shards:
        server.faults[shard.name] = [404] * 9
    loader = train_loader(server.url, cache=str(tmp_path / "cache"), workers=1)
    with pytest.raises(InputError, match=rf"^{server.url}/shard-00000.\.tar: the server answers 404") as error:
        list(loader.epoch(0))
    assert "\n" not in str(error.value)


def test_no_redirection_leads_to_a_file(server, cache):
    server.faults["manifest.json"] = ["elsewhere"]
    with pytest.raises(InputError, match=r"the server answers 302 .*'file:///etc/passwd' is not allowed"):
        IndexedSource(server.url, cache)


def test_the_cache_keeps_what_was_used_last_within_its_bound(server, shards, tmp_path):
    held = [shard.bytes for shard in read_manifest(shards).shards]
    cache = Cache(tmp_path / "cache", sum(held) - 1)
    source = IndexedSource(server.url, cache)
    first_of = [int((source.index["shard"] == n).argmax()) for n in range(len(held))]
    descriptors = [source._file(n) for n in range(len(held) - 1)]
    source.remote.open(source.manifest.shards[0])  # used again: the second is now the oldest
    expected = IndexedSource(shards)
    assert source.read(first_of[-1]) == expected.read(first_of[-1])
    assert [(source.folder / shard.name).exists() for shard in source.manifest.shards] == [True, False, True, True]
    assert source.read(first_of[1]) == expected.read(first_of[1]) and descriptors  # open, so that it is still read
    assert IndexedSource(server.url, cache).read(first_of[1]) == expected.read(first_of[1])  # downloaded once more
    assert server.asked[source.manifest.shards[1].name] == 2

    with pytest.raises(UsageError, match=r"data.cache_gib: found .*, expected at least"):
        IndexedSource(server.url, Cache(tmp_path / "cache", min(held) - 1)).read(0)
    settings = DataConfig(train=server.url, cache=str(tmp_path / "cache"), cache_gib=max(held) / 2**30, **SMALL)
    assert len(TrainLoader(settings, seed=0, global_batch=8, micro_batch=8, rank=0, world=1).source) == NUM_IMAGES


def test_processes_of_a_node_download_once(server, shards, cache):
    """Four that start together, and one download of each file."""
    code = (
        "import sys; from pathlib import Path; from framework.data.remote import Cache\n"
        "from framework.data.source import IndexedSource\n"
        f"source = IndexedSource({server.url!r}, Cache(Path({str(cache.folder)!r}), {ROOM}))\n"
        f"assert len([source.read(i) for i in range({NUM_IMAGES})]) == {NUM_IMAGES}\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert server.asked["index.npy"] == 1
    assert {server.asked[shard.name] for shard in read_manifest(shards).shards} == {1}


def test_a_replaced_set_is_noticed(server, shards, cache, tmp_path):
    IndexedSource(server.url, cache).read(0)
    other = write_shards(tmp_path / "other", [make_sample(5000 + n) for n in range(9)])
    shutil.rmtree(server.folder)
    shutil.copytree(other, server.folder)
    assert IndexedSource(server.url, cache).read(0) == IndexedSource(other).read(0)


@pytest.mark.parametrize("body", [b"<html>log in", b'{"format": "tenf', b"[" * 200_000])
def test_what_is_no_manifest_is_told_by_its_url(server, cache, body):
    (server.folder / "manifest.json").write_bytes(body)
    with pytest.raises(InputError, match=f"^{server.url}/manifest.json: not JSON") as error:
        IndexedSource(server.url, cache)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", [
    "https://user:secret@host/set", "https://host/set?token=secret", "https:///set", "http://host:secret/set",
    "http://[::1/secret", "s3:///secret",
])  # fmt: skip
def test_bad_urls_are_refused_without_their_secrets(url, cache):
    with pytest.raises(UsageError, match=r"data.train, data.val: ") as error:
        IndexedSource(url, cache)
    assert "secret" not in str(error.value) or ":secret/" in url


def test_a_cache_that_cannot_be_used_ends_the_run(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"the cache of .* cannot be used \(Not a directory\); data.cache"):
        IndexedSource(server.url, Cache(tmp_path / "file", ROOM))
    source = IndexedSource(server.url, Cache(tmp_path / "cache", ROOM))
    shutil.rmtree(source.folder)
    source.folder.touch()
    with pytest.raises(InputError, match="cannot be used") as error:  # not BadSample, which would be masked
        source.read(0)
    assert type(error.value) is InputError


def test_a_full_disk_ends_the_run(server, tmp_path):
    """There is room for the first shard, then for half of the next."""
    first, second = read_manifest(server.folder).shards[:2]
    with small_disk(tmp_path / "disk") as disk:
        source = IndexedSource(server.url, Cache(disk / "cache", ROOM))
        source.read(0)
        fill(disk, left=second.bytes // 2)
        with pytest.raises(InputError, match=r"cannot be used \(No space left on device\); data.cache names") as error:
            source.read(first.samples)
        assert type(error.value) is InputError and not list(source.folder.glob("*.partial"))
        assert not (source.folder / second.name).exists() and source.read(0)


def test_room_is_reserved_and_taken_back_from_the_killed(server, tmp_path):
    held = [shard.bytes for shard in read_manifest(server.folder).shards]
    source = IndexedSource(server.url, Cache(tmp_path / "cache", sum(held) + 10_000))
    killed = source.folder / "shard-000009.tar.partial"
    killed.write_bytes(b"x" * 20_000)
    source.read(0)
    assert not killed.exists()
    killed.write_bytes(b"x" * 20_000)
    with remote._lock(source.folder / "shard-000009.tar.lock"):  # somebody downloads it
        for i in range(NUM_IMAGES):
            source.read(i)
    assert killed.exists() and not (source.folder / source.manifest.shards[0].name).exists()


def test_evaluation_reads_the_classes_there(server, shards, tmp_path):
    settings = DataConfig(cache=str(tmp_path / "cache"))
    assert manifest_of(server.url, settings) == manifest_of(shards, settings) == read_manifest(shards)


def test_damage_in_the_cache_is_masked_like_any_other(server, cache):
    source = IndexedSource(server.url, cache)
    source.read(0)
    path = source.folder / source.manifest.shards[0].name
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(InputError, match=f"image 1000 in {server.url}/shard-000000.tar at offset .*crc32"):
        source.read(0)


def test_from_an_s3_store(shards, tmp_path, monkeypatch):
    pytest.importorskip("moto.server", reason="moto is not installed")
    import boto3
    from moto.server import ThreadedMotoServer

    for key, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    store.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*store.get_host_and_port()))
        client = boto3.client("s3")
        client.create_bucket(Bucket="sets")
        for path in shards.iterdir():
            client.upload_file(str(path), "sets", f"some/train/{path.name}")
        there = dict(cache=str(tmp_path / "cache"))
        assert digests(train_loader("s3://sets/some/train", workers=1, **there)) == digests(train_loader(shards))
        with pytest.raises(InputError, match=r"s3://sets/none/manifest.json: the store answers 404 NoSuchKey"):
            train_loader("s3://sets/none", **there)
    finally:
        store.stop()
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    with pytest.raises(InputError, match=r"manifest.json: cannot be reached .*, 5 times"):
        train_loader("s3://sets/some/train", **there)


def test_s3_without_its_library(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UsageError, match=r"pip install 'tenfold\[s3\]'"):
        IndexedSource("s3://bucket/set", cache)
