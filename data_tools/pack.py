"""Images into shards by several processes: each shard is the work of one, and the same bytes whoever does it.

    jobs -> worker: read, check, write one shard, note what became of it (<shard>.note.json) -> results in their order

A conversion that was killed goes on: a shard whose note fits its job and whose bytes fit the note is kept.
"""

import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL

from data_tools.images import read_image
from data_tools.sample import FORMAT, Sample, Shard
from data_tools.shards import WrittenShard, sample_bytes, shard_bounds, shard_name, write_shard
from data_tools.spill import Samples
from framework.errors import InputError
from framework.files import sha256_of, sync
from framework.processes import worker_pool

TOLD_EVERY_S = 0.5
NOTE = ".note.json"  # ends the name of what tells that a shard is finished


@dataclass(frozen=True)
class Job:
    """A shard to be written: number `number` of the set in `folder`. write: false checks the images only."""

    folder: Path
    number: int
    samples: Samples
    images: Path
    verify: bool
    reencode: bool
    write: bool

    @property
    def note(self) -> Path:
        return self.folder / f"{shard_name(self.number)}{NOTE}"


@dataclass(frozen=True)
class Packed:
    """What became of a job. written: None where there were faults, or nothing was to be written."""

    written: WrittenShard | None
    repairs: Counter[str]
    faults: list[str]


def jobs_of(
    folder: Path,
    samples: Samples,
    images: Path,
    *,
    shard_bytes: int,
    verify: bool,
    reencode: bool,
    write: bool,
) -> list[Job]:
    """The shards of a set, cut by the sizes of the image files as they are: re-encoded images, which may be larger or
    smaller, do not move a bound."""
    sizes = (sample_bytes(_file_bytes(images / sample.file_name), json_bytes)
             for sample, json_bytes in zip(samples, samples.json_bytes(), strict=True))  # fmt: skip
    bounds = shard_bounds(sizes, shard_bytes)
    return [
        Job(folder, number, samples[bound.start : bound.stop], images, verify, reencode, write)
        for number, bound in enumerate(bounds)
    ]


def pack_all(jobs: Sequence[Job], workers: int, done: Callable[[int], Any]) -> list[Packed]:
    """Do all jobs, in this process if one is enough. done: told of so many more images.

    Raises OSError: what the file system says, a full disk for one, or that a worker was killed.
    """
    workers = min(workers, len(jobs))
    if workers < 2:
        return [pack(job, lambda: done(1)) for job in jobs]
    counter = multiprocessing.get_context("fork").Value("Q", 0)
    told = 0
    with worker_pool(workers, "reads images", _start_worker, jobs, counter) as pool:
        futures: list[Future[Packed]] = [pool.submit(_pack_numbered, n) for n in range(len(jobs))]
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, TOLD_EVERY_S, FIRST_COMPLETED)
            count = counter.get_obj().value  # without the lock, which a worker that is killed may hold
            done(count - told)
            told = count
            for future in finished:
                future.result()  # its error ends all of it, now
        return [future.result() for future in futures]


def pack(job: Job, done: Callable[[], Any]) -> Packed:
    """Read and check the images of a shard and write it, unless an earlier attempt did."""
    source = _source(job)
    kept = _finished_before(job, source)
    if kept is not None:
        for _ in range(len(job.samples)):
            done()
        return kept
    repairs: Counter[str] = Counter()
    faults: list[str] = []

    def images() -> Iterator[tuple[Sample, bytes]]:
        for sample in job.samples:
            try:
                path = job.images / sample.file_name
                yield sample, read_image(path, sample, job.verify, job.reencode, repairs)
            except InputError as error:
                faults.append(str(error))
            done()

    if not job.write:
        for _ in images():
            pass
        return Packed(None, repairs, faults)
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        written = write_shard(job.folder, job.number, images())
    except OSError as error:  # of writing; it does not name its file
        raise OSError(error.errno, error.strerror, str(job.folder / shard_name(job.number))) from error
    if faults:
        return Packed(None, repairs, faults)
    _write_note(job, source, written, repairs)
    return Packed(written, repairs, faults)


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # a fault, of which its reader tells


def _source(job: Job) -> str:
    """Names what the shard is made of, and how: annotations, and place, sizes and times of the files."""
    how = (FORMAT, job.verify, job.reencode, PIL.__version__ if job.reencode else "", str(job.images.resolve()))
    found = hashlib.sha256(repr(how).encode())
    for sample in job.samples:
        try:
            state = (job.images / sample.file_name).stat()
            found.update(f"{state.st_size} {state.st_mtime_ns} ".encode())
        except OSError:
            pass
        found.update(sample.to_json())
    return found.hexdigest()


def _write_note(job: Job, source: str, written: WrittenShard, repairs: Counter[str]) -> None:
    note = {"source": source, "shard": asdict(written.shard), "records": written.records, "repairs": repairs}
    unfinished = job.note.with_suffix(".tmp")
    unfinished.write_text(json.dumps(note))
    sync(unfinished)
    os.replace(unfinished, job.note)


def _finished_before(job: Job, source: str) -> Packed | None:
    try:
        note = json.loads(job.note.read_bytes())
        shard = Shard(**note["shard"])
        if not job.write or note["source"] != source or sha256_of(job.folder / shard.name) != shard.sha256:
            return None
        written = WrittenShard(shard, [tuple(record) for record in note["records"]])
        return Packed(written, Counter(note["repairs"]), [])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # none, or the remains of one


# Worker processes. They are forked: the jobs, and the file with all annotations, are there without being sent.

_jobs: Sequence[Job] = ()
_count: Any = None


def _start_worker(jobs: Sequence[Job], counter: Any) -> None:
    global _jobs, _count
    _jobs, _count = jobs, counter


def _pack_numbered(number: int) -> Packed:
    def done() -> None:
        with _count.get_lock():
            _count.value += 1

    return pack(_jobs[number], done)
