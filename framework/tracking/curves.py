"""Runs as curves: a score at every evaluation, with the epochs, images and hours that it took."""

import json
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from framework.errors import InputError, UsageError
from framework.tracking.events import Scalars, read_scalars

log = logging.getLogger("tenfold")


@dataclass(frozen=True)
class Curve:
    """One run. points: of each evaluation step, epoch, images, hours, AP, APs, APm, APl; None where nothing says so."""

    label: str
    folder: str
    points: list[dict[str, float | None]]
    drop_epoch: float | None  # of the learning rate, the first time
    fingerprint: str | None  # of the training data

    def first(self, axis: str, ap: float) -> float | None:
        """Where AP is first at least so high; None: nowhere, or nothing says where."""
        return next((p[axis] for p in self.points if p["AP"] is not None and p["AP"] >= ap), None)

    @property
    def best(self) -> float:
        return max(float(p["AP"] or 0) for p in self.points)

    @property
    def last(self) -> dict[str, float | None]:
        return self.points[-1]


def read_curve(text: str, tag: str) -> Curve | None:
    """A run, or None with a line that says why it cannot be drawn."""
    label, separator, path = ("", "", "") if Path(text).is_dir() else text.partition("=")
    folder = Path(path if separator else text)
    label = label if separator else folder.name.rpartition("-seed")[0] or folder.name
    try:
        scalars = read_scalars(folder)
    except (InputError, UsageError) as error:
        log.warning("%s is left out: %s", label, error)
        return None
    values = scalars.values.get(tag, {})
    finite = {step: ap for step, ap in values.items() if math.isfinite(ap) and ap >= 0}
    if not finite:
        others = ", ".join(scalars.values)[:200]
        why = f"{tag} is NaN or -1 at all of its steps" if values else f"no {tag} (--tag) in it, only {others}"
        log.warning("%s is left out: %s: %s", label, folder, why)
        return None
    if len(finite) < len(values):
        log.warning("%s: %s is NaN or -1 at %d of its %d steps, which are passed over", label, tag,
                    len(values) - len(finite), len(values))  # fmt: skip
    if repeated := sorted(scalars.repeated.get(tag, ())):
        log.warning("%s: steps from %d on stand there more than once; the later values count", label, repeated[0])
    points = [point_of(step, ap, scalars, tag) for step, ap in finite.items()]
    say_gaps(label, points)
    return Curve(label, str(folder), points, drop_epoch(scalars), fingerprint_of(folder))


def point_of(step: int, ap: float, scalars: Scalars, tag: str) -> dict[str, float | None]:
    def at(name: str) -> float | None:
        value = scalars.values.get(name, {}).get(step)
        return value if value is not None and math.isfinite(value) and value >= 0 else None

    sizes = {f"AP{size}": at(f"{tag}{size}") for size in "sml"}  # COCO says -1 where no object has that size
    where = {"step": float(step), "epoch": at("epoch"), "images": at("images_seen"), "hours": scalars.hours.get(step)}
    return where | {"AP": ap} | sizes


def say_gaps(label: str, points: Sequence[dict[str, float | None]]) -> None:
    steps = [float(p["step"] or 0) for p in points]
    between = [later - earlier for earlier, later in zip(steps, steps[1:], strict=False)]
    usual = statistics.median(between) if between else 0
    for earlier, gap in zip(steps, between, strict=False):
        if gap > 1.5 * usual:
            log.warning("%s: nothing between steps %d and %d, where usually %d lie between two points", label, earlier,
                        earlier + gap, usual)  # fmt: skip


def drop_epoch(scalars: Scalars) -> float | None:
    """Where the learning rate first falls to less than half."""
    rates, epochs = scalars.values.get("lr/rest", {}), scalars.values.get("epoch", {})
    steps = list(rates)
    for earlier, later in zip(steps, steps[1:], strict=False):
        if rates[later] < rates[earlier] / 2:
            return epochs.get(earlier)
    return None


def fingerprint_of(folder: Path) -> str | None:
    for place in (folder, folder.parent):
        if (file := place / "environment.json").is_file():
            try:
                found = json.loads(file.read_text())["fingerprint"]
            except (ValueError, KeyError, TypeError):
                log.warning("%s does not say which data the run was trained on", file)
                return None
            return found if isinstance(found, str) else None
    return None
