"""Scalars out of TensorBoard's event files, those of runs that were killed and went on included."""

import gzip
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.util.tensor_util import make_ndarray

from framework.errors import InputError, UsageError
from framework.files import by_numbers


@dataclass
class Scalars:
    """What the event files of a run say: tag -> step -> value, steps in their order.

    hours: step -> hours spent since the run began, without the time when nothing wrote. repeated: tag -> steps that
    it was written at again, where no session said that it goes back.
    """

    values: dict[str, dict[int, float]] = field(default_factory=dict)
    hours: dict[int, float] = field(default_factory=dict)
    repeated: dict[str, set[int]] = field(default_factory=dict)


def read_scalars(folder: str | Path) -> Scalars:
    """All scalars of the event files in a folder and below it, gzipped ones (*.gz) too.

    Files are read in the order of their names, which begin with the time they were made at. A session that starts at a
    step forgets what earlier ones wrote from there on; where files say nothing of it, the later value of a step counts.

    Raises:
        UsageError: there is no such folder, or no event file in it.
        InputError: a file is not an event file, or ends inside its first record.
    """
    paths = sorted(Path(folder).rglob("*tfevents*"), key=lambda path: (by_numbers(path.name), str(path)))
    if not paths:
        raise UsageError(f"{folder}: found no event file (*tfevents*) in it, expected a run folder or TensorBoard's")
    merged = Scalars()
    times: dict[int, float] = {}
    spans: list[tuple[float, float]] = []  # of each file, from its first event to its last number
    for path in paths:
        first_time = last_time = None
        for event in _events(path):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                _forget_from(merged, event.step)
            if first_time is None:
                first_time = event.wall_time
            for value in event.summary.value if event.HasField("summary") else ():
                number = _number(value)
                if number is not None:
                    steps = merged.values.setdefault(value.tag, {})
                    if event.step in steps:
                        merged.repeated.setdefault(value.tag, set()).add(event.step)
                    steps[event.step] = number
                    times[event.step] = last_time = event.wall_time
        if first_time is None:
            raise InputError(f"{path}: not an event file of TensorBoard, or cut off in its first record")
        if last_time is not None:
            spans.append((first_time, last_time))
    merged.hours = _hours(times, spans)
    for tag, steps in merged.values.items():
        merged.values[tag] = dict(sorted(steps.items()))
    return merged


def _hours(times: dict[int, float], spans: list[tuple[float, float]]) -> dict[int, float]:
    """Of each step, in hours: how much of the spans lies before it. Where they overlap, it counts once: some write
    training and validation into two files at once."""
    apart: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if apart and begin <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
        else:
            apart.append((begin, end))
    return {step: sum(max(0.0, min(end, time) - begin) for begin, end in apart) / 3600 for step, time in times.items()}


def _forget_from(scalars: Scalars, step: int) -> None:
    for steps in scalars.values.values():
        for later in [at for at in steps if at >= step]:
            del steps[later]


def _events(path: Path) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        if path.suffix == ".gz":
            unpacked = Path(folder, path.stem)
            try:
                with gzip.open(path, "rb") as packed, open(unpacked, "wb") as plain:
                    shutil.copyfileobj(packed, plain)
            except (OSError, EOFError) as error:
                raise InputError(f"{path}: not a whole gzip file ({error})") from error
            path = unpacked
        yield from EventFileLoader(str(path)).Load()


def _number(value: Any) -> float | None:
    """Of a scalar summary, as written today or, in simple_value, long ago; None of any other."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.metadata.plugin_data.plugin_name != "scalars":
        return None
    return float(make_ndarray(value.tensor).reshape(-1)[0])
