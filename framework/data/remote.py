"""Shard sets behind http(s):// and s3:// URLs: each file is downloaded once a node, verified, into a bounded cache.

    <cache>/<last part of the URL>-<hash of the whole URL>/     a set: its manifest, index and the shards of late use

Processes of a node share the cache: who wants a file locks it, downloads what is missing under another name, compares
size and sha256 with the manifest's and only then renames it. When the shards of all sets outgrow the bound, those used
longest ago go. S3: through boto3 (pip install 'tenfold[s3]'), with its credentials and its AWS_ENDPOINT_URL.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

from data_tools.sample import INDEX, MANIFEST, Manifest, Shard, read_manifest
from framework.errors import InputError, UsageError
from framework.files import sha256_of

log = logging.getLogger("tenfold")

SCHEMES = ("http", "https", "s3")
TRIES = 5
FIRST_PAUSE_S = 0.5  # doubled after each try, and up to twice as long by chance: not all nodes at once
TIMEOUT_S = 30.0  # without a byte
PIECE_BYTES = 2**20
LOCK_SUFFIX, PARTIAL_SUFFIX, HASH_SUFFIX = ".lock", ".partial", ".sha256"


class _Again(Exception):
    """What may succeed when it is tried again."""


def is_remote(location: str | Path) -> bool:
    return urlsplit(str(location)).scheme in SCHEMES and "://" in str(location)


@dataclass(frozen=True)
class Cache:
    """folder: local to the node. most_bytes: of all shards in it together; a shard in use may be beyond it."""

    folder: Path
    most_bytes: int


class RemoteSet:
    """A set behind a URL; manifest and index are there once this is made, shards when they are asked for.

    Raises:
        InputError: a file is missing, stays unreachable after TRIES tries, or is not what the manifest says.
        UsageError: s3 without boto3; a shard that is larger than the cache may be.
    """

    def __init__(self, url: str, cache: Cache) -> None:
        self.url, self.cache = url.rstrip("/"), cache
        name = urlsplit(self.url).path.rpartition("/")[2] or "set"
        self.folder = cache.folder / f"{name}-{hashlib.sha256(self.url.encode()).hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f"{MANIFEST}{LOCK_SUFFIX}"):
            self._download(MANIFEST, lambda path: None)  # each time: the set may have been replaced
            self.manifest: Manifest = read_manifest(self.folder)
        self._ensure(INDEX, self.manifest.index_sha256)

    def open(self, shard: Shard) -> int:
        """A descriptor of the shard's file, which stays readable when the cache drops it."""
        if shard.bytes > self.cache.most_bytes:
            raise UsageError(f"data.cache_gib: found {self.cache.most_bytes / 2**30:.3g}, expected at least the "
                             f"{shard.bytes / 2**30:.3g} of {self.url}/{shard.name}")  # fmt: skip
        while True:
            path = self._ensure(shard.name, shard.sha256, shard.bytes)
            with contextlib.suppress(FileNotFoundError):  # dropped since
                descriptor = os.open(path, os.O_RDONLY)
                os.utime(descriptor)  # used just now
                return descriptor

    def _ensure(self, name: str, sha256: str, size: int = 0) -> Path:
        """The file, downloaded by one process while the others wait."""
        path = self.folder / name
        with _locked(self.folder / f"{name}{LOCK_SUFFIX}"):
            # What has its name is whole; but the set may have been replaced at its URL.
            known = self.folder / f"{name}{HASH_SUFFIX}"
            if not path.exists() or not known.exists() or known.read_text() != sha256:
                path.unlink(missing_ok=True)
                if size:
                    self._make_room(size)
                self._download(name, lambda found: _verify(found, sha256, size))
                known.write_text(sha256)
        return path

    def _download(self, name: str, verify: Callable[[Path], None]) -> None:
        url, path = f"{self.url}/{name}", self.folder / name
        partial = self.folder / f"{name}{PARTIAL_SUFFIX}"
        try:
            for attempt in range(1, TRIES + 1):
                try:
                    _fetch(url, partial)
                    verify(partial)
                    os.replace(partial, path)
                    return
                except _Again as error:
                    if attempt == TRIES:
                        raise InputError(f"{url}: {error}, {TRIES} times") from error
                    log.warning("%s: %s; trying again (%d of %d)", url, error, attempt, TRIES)
                    time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(1, 2))
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); data.cache needs room on a local disk"
                             ) from error  # fmt: skip
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Drop the shards used longest ago until one of this size fits beside the others."""
        with _locked(self.cache.folder / f"cache{LOCK_SUFFIX}"):
            shards = []
            for known in self.cache.folder.glob(f"*/*{HASH_SUFFIX}"):
                path = known.with_suffix("")
                with contextlib.suppress(FileNotFoundError):
                    if path.name != INDEX:
                        shards.append((path.stat().st_mtime, path.stat().st_size, path))
            total = sum(held for _, held, _ in shards)
            for _, held, path in sorted(shards):
                if total + size <= self.cache.most_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= held


def _verify(path: Path, sha256: str, size: int) -> None:
    found = path.stat().st_size
    if size and found != size:
        raise _Again(f"{found} bytes, the manifest says {size}")
    if sha256_of(path) != sha256:
        raise _Again("not the bytes that the manifest was written with")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Against the other processes of this node, while it is held."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fetch(url: str, path: Path) -> None:
    """Raises _Again, or InputError where trying again is of no use."""
    with _opened(url) as (stream, length), open(path, "wb") as file:
        while piece := _read(stream):
            file.write(piece)
    if length is not None and path.stat().st_size != length:
        raise _Again(f"{path.stat().st_size} of {length} bytes")


def _read(stream: BinaryIO) -> bytes:
    try:
        return stream.read(PIECE_BYTES)
    except Exception as error:  # whatever a client library makes of a body that ends early
        raise _Again(f"the connection was lost ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def _opened(url: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """The body, and how long it will be."""
    opened = _opened_s3(url) if url.startswith("s3://") else _opened_http(url)
    with contextlib.closing(opened[0]) as stream:
        yield stream, opened[1]


def _opened_http(url: str) -> tuple[Any, int | None]:
    parts = urlsplit(url)
    # What is quoted stays quoted. Redirections to files are refused by urllib.
    request = urllib.request.Request(parts._replace(path=quote(parts.path, safe="/%")).geturl())
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        message = f"the server answers {error.code} {error.reason}"
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _Again(message) from error
        raise InputError(f"{url}: {message}") from error
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise _Again(f"cannot be reached ({getattr(error, 'reason', error)})") from error
    length = response.headers.get("Content-Length")
    return response, int(length) if length else None


def _opened_s3(url: str) -> tuple[Any, int | None]:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    except ImportError as error:
        raise UsageError(f"{url}: s3 needs boto3: pip install 'tenfold[s3]'") from error
    bucket, _, key = url.removeprefix("s3://").partition("/")
    # A client of its own for each file: one that is shared does not survive a fork.
    config = Config(connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S, retries={"total_max_attempts": 1})
    try:
        response = boto3.session.Session().client("s3", config=config).get_object(Bucket=bucket, Key=key)
    except NoCredentialsError as error:
        raise InputError(f"{url}: no credentials; boto3 takes AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
                         ) from error  # fmt: skip
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        message = f"the store answers {status} {error.response.get('Error', {}).get('Code', '')}"
        if status in (408, 429) or status >= 500:
            raise _Again(message) from error
        raise InputError(f"{url}: {message}") from error
    except (BotoCoreError, ValueError) as error:
        raise _Again(f"cannot be reached ({error})") from error
    return response["Body"], response["ContentLength"]
