"""Shard sets behind http(s):// and s3:// URLs: each file is downloaded once a node, verified, into a bounded cache.

    <cache>/<last part of the URL>-<hash of the whole URL>/     a set: its manifest, index and the shards of late use

Processes of a node share the cache: who wants a file locks it, downloads what is missing under another name, compares
size and sha256 with the manifest's and only then renames it. When the files of all sets outgrow the bound, the shards
used longest ago go; what is being downloaded has its room reserved. S3: through boto3 (pip install 'tenfold[s3]'), with
its credentials and its AWS_ENDPOINT_URL.
"""

import contextlib
import fcntl
import hashlib
import http.client
import json
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from data_tools.sample import INDEX, INDEX_DTYPE, MANIFEST, Manifest, Shard, read_manifest
from framework.errors import InputError, UsageError
from framework.files import sha256_of, sync

log = logging.getLogger("tenfold")

SCHEMES = ("http", "https", "s3")
TRIES = 5
FIRST_PAUSE_S = 0.5  # doubled after each try, and up to twice as long by chance: not all nodes at once
TIMEOUT_S = 30.0  # without a byte
PIECE_BYTES = 2**20
MOST_MANIFEST_BYTES, MOST_HEADER_BYTES = 2**26, 2**12
LOCK_SUFFIX, PARTIAL_SUFFIX, HASH_SUFFIX = ".lock", ".partial", ".sha256"
CACHE_LOCK = "cache.lock"


class _Again(Exception):
    """What may succeed when it is tried again."""


def is_remote(location: str | Path) -> bool:
    return str(location).lower().startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


@dataclass(frozen=True)
class Cache:
    """folder: local to the node. most_bytes: of all files in it together, less what a process still has open."""

    folder: Path
    most_bytes: int


class RemoteSet:
    """A set behind a URL; manifest and index are there once this is made, shards when they are asked for.

    Raises:
        InputError: a file is missing, stays unreachable after TRIES tries, or is not what the manifest says; the cache
            cannot be written.
        UsageError: not such a URL; s3 without boto3; a shard that is larger than the cache may be.
    """

    def __init__(self, url: str, cache: Cache) -> None:
        self.url, self.cache = _checked(url), cache
        name = urlsplit(self.url).path.rpartition("/")[2][:80] or "set"
        self.folder = cache.folder / f"{name}-{hashlib.sha256(self.url.encode()).hexdigest()[:16]}"
        with self._writing(), self._locked(MANIFEST):
            self._download(MANIFEST, MOST_MANIFEST_BYTES, _is_json)  # each time: the set may have been replaced
            try:
                self.manifest: Manifest = read_manifest(self.folder)
            except InputError as error:
                raise InputError(str(error).replace(str(self.folder), self.url)) from error
        with self._writing():
            self._ensure(INDEX, self.manifest.index_sha256, None)

    def open(self, shard: Shard) -> int:
        """A descriptor of the shard's file, which stays readable when the cache drops it."""
        if shard.bytes > self.cache.most_bytes:
            raise UsageError(f"data.cache_gib: found {self.cache.most_bytes / 2**30:.3g}, expected at least the "
                             f"{shard.bytes / 2**30:.3g} of {self.url}/{shard.name}")  # fmt: skip
        with self._writing():
            while True:
                path = self._ensure(shard.name, shard.sha256, shard.bytes)
                with contextlib.suppress(FileNotFoundError):  # dropped since
                    descriptor = os.open(path, os.O_RDONLY)
                    self.used(descriptor)
                    return descriptor

    def used(self, descriptor: int) -> None:
        """Just now, so that it is not the first to go."""
        with contextlib.suppress(OSError):  # somebody else's file
            os.utime(descriptor)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise InputError(f"{self.folder}: the cache of {self.url} cannot be used ({error.strerror or error}); "
                             "data.cache names a folder on a local disk with room") from error  # fmt: skip

    def _ensure(self, name: str, sha256: str, size: int | None) -> Path:
        """The file, downloaded by one process while the others wait. size: of a shard."""
        path, known = self.folder / name, self.folder / f"{name}{HASH_SUFFIX}"
        with self._locked(name):
            # What has its name is whole; but the set may have been replaced at its URL.
            whole = path.exists() and known.exists() and known.read_text() == sha256
            if not whole or (size is not None and path.stat().st_size != size):
                path.unlink(missing_ok=True)
                if size is not None:
                    self._make_room(size, self.folder / f"{name}{PARTIAL_SUFFIX}")
                most = size if size is not None else MOST_HEADER_BYTES + self.manifest.images * INDEX_DTYPE.itemsize
                known.write_text(sha256)  # of what is renamed next
                self._download(name, most, lambda found: _verify(found, sha256, size))
        return path

    def _download(self, name: str, most: int, verify: Callable[[Path], None]) -> None:
        url, partial = f"{self.url}/{quote(name, safe='')}", self.folder / f"{name}{PARTIAL_SUFFIX}"
        try:
            for attempt in range(1, TRIES + 1):
                try:
                    _fetch(url, partial, most)
                    verify(partial)
                    sync(partial)
                    os.replace(partial, self.folder / name)
                    return
                except _Again as error:
                    said = " ".join(str(error).split())
                    if attempt == TRIES:
                        raise InputError(f"{url}: {said}, {TRIES} times") from error
                    log.warning("%s: %s; trying again (%d of %d)", url, said, attempt, TRIES)
                    time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(1, 2))
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int, partial: Path) -> None:
        """Drop the shards used longest ago until one of this size fits beside the others, and reserve its room."""
        with _lock(self.cache.folder / CACHE_LOCK):
            files = []
            for path in self.cache.folder.glob("*/*"):
                with contextlib.suppress(FileNotFoundError):
                    if path.suffix == PARTIAL_SUFFIX and path != partial and _left_behind(path):
                        path.unlink()
                    elif path.suffix != LOCK_SUFFIX:
                        found = path.stat()
                        files.append((found.st_mtime, found.st_size, path))
            total = sum(held for _, held, _ in files)
            for _, held, path in sorted(files):
                if total + size <= self.cache.most_bytes:
                    break
                if path.name not in (INDEX, MANIFEST) and path.suffix not in (PARTIAL_SUFFIX, HASH_SUFFIX):
                    path.unlink(missing_ok=True)
                    total -= held
            with open(partial, "wb") as file:
                file.truncate(size)

    def _locked(self, name: str) -> "contextlib.AbstractContextManager[None]":
        return _lock(self.folder / f"{name}{LOCK_SUFFIX}")


def _checked(url: str) -> str:
    """Raises UsageError. What may hold a secret is not repeated."""
    try:
        parts = urlsplit(url.rstrip("/"))
        fine = parts.hostname and parts.port != 0 and not any(ord(letter) <= 32 for letter in url.replace(" ", ""))
    except ValueError as error:
        raise UsageError(f"data.train, data.val: not a URL ({error})") from error
    if not fine or parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError("data.train, data.val: found a URL with a user, a password, a query or no host; expected "
                         "https://host/folder or s3://bucket/folder, with credentials in the environment")  # fmt: skip
    return parts._replace(scheme=parts.scheme.lower()).geturl()


def _is_json(path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _Again(f"not JSON ({error})") from error


def _verify(path: Path, sha256: str, size: int | None) -> None:
    found = path.stat().st_size
    if size is not None and found != size:
        raise _Again(f"{found} bytes, the manifest says {size}")
    if sha256_of(path) != sha256:
        raise _Again("not the bytes that the manifest was written with")


@contextlib.contextmanager
def _lock(path: Path, blocking: bool = True) -> Iterator[None]:
    """Against the other processes of this node, while it is held. Raises BlockingIOError."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == path.stat().st_ino:  # not removed by somebody who cleans up
                    yield
                    return
        finally:
            os.close(descriptor)


def _left_behind(partial: Path) -> bool:
    """By a process that was killed: nobody holds the lock."""
    try:
        with _lock(partial.with_suffix(LOCK_SUFFIX), blocking=False):
            return True
    except OSError:
        return False


def _fetch(url: str, path: Path, most: int) -> None:
    """Into the file, at most so many bytes. Raises _Again, or InputError where trying again is of no use."""
    opened = _opened_s3(url) if url.startswith("s3://") else _opened_http(url)
    with contextlib.closing(opened[0]) as stream, open(path, "r+b" if path.exists() else "wb") as file:
        while piece := _read(stream):
            if file.tell() + len(piece) > most:
                raise _Again(f"more than the {most} bytes that are expected")
            file.write(piece)
        written = file.tell()
        file.truncate()
    if opened[1] is not None and written != opened[1]:
        raise _Again(f"{written} of {opened[1]} bytes")


def _read(stream: Any) -> bytes:
    try:
        piece: bytes = stream.read(PIECE_BYTES)
        return piece
    except Exception as error:  # whatever a client library makes of a body that ends early
        raise _Again(f"the connection was lost ({type(error).__name__}: {error})") from error


def _opened_http(url: str) -> tuple[Any, int | None]:
    """The body, and how long it will be. What is quoted stays quoted. urllib refuses redirections to files."""
    parts = urlsplit(url)
    try:
        request = urllib.request.Request(parts._replace(path=quote(parts.path, safe="/%")).geturl())
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        message = f"the server answers {error.code} {error.reason}"
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _Again(message) from error
        raise InputError(f"{url}: {' '.join(message.split())}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        raise _Again(f"cannot be reached ({getattr(error, 'reason', error)})") from error
    return response, response.length


def _opened_s3(url: str) -> tuple[Any, int | None]:
    try:
        import boto3
        from botocore import exceptions
        from botocore.config import Config
    except ImportError as error:
        raise UsageError(f"{url}: s3 needs boto3: pip install 'tenfold[s3]'") from error
    bucket, _, key = url.removeprefix("s3://").partition("/")
    # A client of its own for each file: one that is shared does not survive a fork.
    config = Config(connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S, retries={"total_max_attempts": 1})
    passing = (exceptions.HTTPClientError, exceptions.EndpointConnectionError, exceptions.ConnectionError)
    try:
        response = boto3.session.Session().client("s3", config=config).get_object(Bucket=bucket, Key=key)
    except exceptions.ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        message = f"the store answers {status} {error.response.get('Error', {}).get('Code', '')}"
        if status in (408, 429) or status >= 500:
            raise _Again(message) from error
        raise InputError(f"{url}: {message}") from error
    except passing as error:
        raise _Again(f"cannot be reached ({error})") from error
    except (exceptions.BotoCoreError, ValueError) as error:  # no credentials, no region, not a bucket
        raise InputError(f"{url}: {' '.join(str(error).split())}") from error
    return response["Body"], response["ContentLength"]
