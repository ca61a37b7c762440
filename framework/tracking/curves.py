"""Runs as curves: a score at every evaluation, with the epochs, images and hours that it took."""

import json
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from framework.errors import InputError, UsageError
from framework.tracking.events import Scalars, read_scalars

log = logging.getLogger("tenfold")

Point = dict[str, float | None]


@dataclass(frozen=True)
class Curve:
    """One run. points: of each evaluation step, epoch, images, hours, AP, APs, APm, APl; None where nothing says so.

    APs are 0 to 1. common: what compared runs have to have in common, by name; None where nothing says it. cut: why
    this is no complete schedule, as far as its files tell.
    """

    label: str
    folder: str
    named: bool  # by somebody, not after its folder
    points: list[Point]
    drop_epoch: float | None  # of the learning rate, the first time
    common: dict[str, str | None]
    cut: str | None

    def first(self, axis: str, ap: float) -> float | None:
        """Where AP is first at least so high; None: nowhere, or nothing says where."""
        return next((p[axis] for p in self.points if p["AP"] is not None and p["AP"] >= ap), None)

    @property
    def best(self) -> float:
        return max(float(p["AP"] or 0) for p in self.points)

    @property
    def last(self) -> Point:
        return self.points[-1]


def read_curve(text: str, tags: Sequence[str] = ("val/AP",), epoch_tags: Sequence[str] = ("epoch",)) -> Curve | None:
    """A run, [LABEL=]FOLDER, by the first of the tags that it has; or None, with a line that says why."""
    label, separator, path = ("", "", "") if Path(text).is_dir() else text.partition("=")
    folder = Path(path if separator else text)
    label = label if separator else folder.name.rpartition("-seed")[0] or folder.name
    try:
        scalars = read_scalars(folder)
    except (InputError, UsageError) as error:
        log.warning("%s is left out: %s", label, error)
        return None
    tag = first_of(tags, scalars)
    if tag is None:
        log.warning("%s is left out: %s: no %s (--tag) in it, only %s", label, folder, " or ".join(tags),
                    ", ".join(scalars.values)[:200])  # fmt: skip
        return None
    values = scalars.values[tag]
    finite = {step: ap for step, ap in values.items() if math.isfinite(ap) and ap >= 0}
    if not finite:
        log.warning("%s is left out: %s: %s is NaN or -1 at all of its steps", label, folder, tag)
        return None
    if len(finite) < len(values):
        log.warning("%s: %s is NaN or -1 at %d of its %d steps, which are passed over", label, tag,
                    len(values) - len(finite), len(values))  # fmt: skip
    if repeated := sorted(scalars.repeated.get(tag, ())):
        log.warning("%s: steps from %d on stand there more than once; the later values count", label, repeated[0])
    unit = 1.0
    if max(finite.values()) > 1:
        unit = 100.0
        log.warning("%s: %s goes up to %g, so that it is taken as percent", label, tag, max(finite.values()))
    epoch_tag = first_of(epoch_tags, scalars)
    points = [point_of(step, scalars, tag, unit, epoch_tag) for step in finite]
    say_gaps(label, points)
    config = config_of(folder)
    cut = cut_of(config, points) if max(values) in finite else "its last evaluation has no AP"
    if points[0]["epoch"] == 0:
        log.warning("%s: %s begins at 0; epochs are taken as numbers of epochs that are over", label, epoch_tag)
    return Curve(
        label, str(folder), bool(separator), points, drop_epoch(scalars, epoch_tag), common_of(folder, config), cut
    )


def first_of(tags: Sequence[str], scalars: Scalars) -> str | None:
    return next((tag for tag in tags if scalars.values.get(tag)), None)


def point_of(step: int, scalars: Scalars, tag: str, unit: float, epoch_tag: str | None) -> Point:
    """unit: what stands there for an AP of 1."""

    def at(name: str) -> float | None:
        value = scalars.values.get(name, {}).get(step)
        return value if value is not None and math.isfinite(value) and value >= 0 else None

    aps = {f"AP{size}": at(f"{tag}{size}") for size in ("", *"sml")}  # COCO says -1 where no object has that size
    scores = {name: None if ap is None else ap / unit for name, ap in aps.items()}
    epoch = None if epoch_tag is None else at_or_before(step, scalars.values[epoch_tag])
    return {"step": float(step), "epoch": epoch, "images": at("images_seen"), "hours": scalars.hours[step]} | scores


def at_or_before(step: int, values: dict[int, float]) -> float | None:
    """Others log epochs at steps of training, between which they evaluate."""
    return next((value for at, value in reversed(values.items()) if at <= step), None)


def say_gaps(label: str, points: Sequence[Point]) -> None:
    steps = [float(p["step"] or 0) for p in points]
    between = [later - earlier for earlier, later in zip(steps, steps[1:], strict=False)]
    usual = statistics.median(between) if between else 0
    for earlier, gap in zip(steps, between, strict=False):
        if gap > 1.5 * usual:
            log.warning("%s: nothing between steps %d and %d, where usually %d lie between two points", label, earlier,
                        earlier + gap, usual)  # fmt: skip


def drop_epoch(scalars: Scalars, epoch_tag: str | None) -> float | None:
    """Where the learning rate first falls to less than half."""
    rates = scalars.values.get("lr/rest", {})
    steps = list(rates)
    for earlier, later in zip(steps, steps[1:], strict=False):
        if rates[later] < rates[earlier] / 2:
            return None if epoch_tag is None else scalars.values[epoch_tag].get(earlier)
    return None


def config_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The sections of a run's own configuration, as they stand there; empty where there is none that can be read."""
    for place in (folder, folder.parent):
        if (file := place / "config.yaml").is_file():
            try:
                found = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            except Exception as error:  # of another program's file, whatever it is
                log.warning("%s cannot be read: %s", file, error)
                break
            sections = found.items() if isinstance(found, dict) else ()
            return {str(name): section for name, section in sections if isinstance(section, dict)}
    return {}


def cut_of(config: dict[str, dict[str, Any]], points: Sequence[Point]) -> str | None:
    epochs, end = config.get("train", {}).get("epochs"), points[-1]["epoch"]
    if isinstance(epochs, int) and end is not None and end < epochs:
        return f"it ended at epoch {end:g} of {epochs}"
    return None


def common_of(folder: Path, config: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    found, evaluation = environment_of(folder), config.get("eval", {})
    data = {f"data.{split}": found.get(key) for split, key in (("train", "fingerprint"), ("val", "val_fingerprint"))}
    return data | {"eval.image_side": str(evaluation["image_side"]) if "image_side" in evaluation else None}


def environment_of(folder: Path) -> dict[str, str]:
    for place in (folder, folder.parent):
        if (file := place / "environment.json").is_file():
            try:
                found = json.loads(file.read_text())
                return {key: value for key, value in found.items() if isinstance(value, str)}
            except (ValueError, AttributeError):
                log.warning("%s does not say which data the run was trained on", file)
                break
    return {}
