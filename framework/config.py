"""The configuration of a run: dataclasses own the defaults, a YAML lists departures, key=value wins.

Each section's dataclass stands above the code it configures; here they meet, with the checks that cross sections.
"""

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.data.loader import DataConfig
from framework.engine.ds_config import EngineConfig
from framework.engine.guard import GuardConfig
from framework.engine.optimizer import OptimConfig
from framework.errors import UsageError
from framework.evaluation.coco import EvalConfig
from framework.losses.criterion import LossConfig
from framework.models.build import ModelConfig
from framework.tracking.console import TrackingConfig


@dataclass(frozen=True)
class TrainConfig:
    """The course of a run. Defaults: the paper's (16 GPUs x 2 images, 50 epochs, learning rate / 10 at 40).

    run_dir: null means runs/<name of the config file>. max_steps: stop early after so many optimizer steps.
    checkpoint_every: optimizer steps; 0 means at the end of each epoch only, which always saves.
    keep_checkpoints: the newest so many stay. keep_best: that of the highest AP too. keep_every_epochs: and those of
        every so many epochs; 0: none of them.
    ema_decay: keep an exponential moving average of the weights, which is evaluated and saved in their place; 0.9997,
        say; 0: none.
    rehearse: on GPUs, forward and backward of the largest batch of the epoch come first: if memory runs out, then.
    resume: go on from what run_dir holds; false refuses a run_dir that holds a checkpoint.
    meet_minutes: when a rank has not come after so long, the run does not begin.
    hang_minutes: a rank for which no step ends, no checkpoint and no batch of an evaluation, for so long writes where
        it stands, and leaves with exit code 86; 0: never.
    """

    run_dir: str | None = None
    global_batch: int = 32
    micro_batch: int = 2
    epochs: int = 50
    max_steps: int | None = None
    lr_drop_epochs: list[int] = field(default_factory=lambda: [40])
    seed: int = 42
    resume: bool = True
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    keep_best: bool = True
    keep_every_epochs: int = 0
    ema_decay: float = 0.0
    rehearse: bool = True
    meet_minutes: float = 5.0
    hang_minutes: float = 30.0

    def __post_init__(self) -> None:
        for key in ("global_batch", "micro_batch", "epochs", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise UsageError(f"train.{key}: found {getattr(self, key)}, expected at least 1")
        if self.checkpoint_every < 0:
            raise UsageError(f"train.checkpoint_every: found {self.checkpoint_every}, expected steps, or 0 for epochs")
        if self.keep_every_epochs < 0:
            raise UsageError(f"train.keep_every_epochs: found {self.keep_every_epochs}, expected epochs, or 0 for none")
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"train.ema_decay: found {self.ema_decay}, expected a decay below 1, or 0 for no average")
        if not all(epoch > 0 for epoch in self.lr_drop_epochs):
            raise UsageError(f"train.lr_drop_epochs: found {self.lr_drop_epochs}, expected epochs of at least 1, or []")
        if not 0 <= self.hang_minutes < math.inf:
            raise UsageError(f"train.hang_minutes: found {self.hang_minutes}, expected minutes, or 0 for never")
        if not 0 < self.meet_minutes < math.inf:
            raise UsageError(f"train.meet_minutes: found {self.meet_minutes}, expected minutes above 0")
        if self.max_steps is not None and self.max_steps < 1:
            raise UsageError(f"train.max_steps: found {self.max_steps}, expected at least 1, or null")
        if self.global_batch % self.micro_batch:
            raise UsageError(
                f"train.global_batch, train.micro_batch: found {self.global_batch} and {self.micro_batch}; "
                "expected a global batch that whole micro-batches make up"
            )


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.model.backbone.norm == "frozen" and not (self.model.backbone.weights or self.model.init):
            raise UsageError(
                "model.backbone.norm, model.backbone.weights: found frozen without weights, which would train on "
                "random statistics that never change; set model.backbone.weights=PATH (the README says how to get "
                "it), model.init=PATH, or model.backbone.norm=group"
            )
        if self.model.refine_boxes and not self.loss.auxiliary:
            raise UsageError(
                "model.refine_boxes, loss.auxiliary: found true and false; boxes are refined by heads that only "
                "auxiliary losses train: set loss.auxiliary=true or model.refine_boxes=false"
            )
        if self.optim.impl == "apex" and self.engine.offload_optimizer:
            raise UsageError(
                "optim.impl, engine.offload_optimizer: found apex and true; its FusedAdam is for GPUs: set "
                "optim.impl=auto or engine.offload_optimizer=false"
            )
        if self.data.labels == "category_id" and self.model.num_classes is None:
            raise UsageError(
                "data.labels, model.num_classes: found category_id and null; raw COCO ids need "
                "model.num_classes above the largest one (91 for COCO)"
            )


def load(path: str | Path | None, overrides: list[str]) -> Config:
    """Merge the dataclasses' defaults, the YAML at `path` and `overrides` (key=value), in this order.

    Raises UsageError: an unknown key (with the nearest known one), a value that is missing (???), of the wrong type
    or a reference to nothing, an impossible combination, a file that is not there or not YAML.
    """
    merged = _writable(OmegaConf.structured(Config))
    known = set(_leaf_names(merged))
    for source, departures in _departures(path, overrides):
        for name in _leaf_names(departures):
            if name not in known:
                raise UsageError(f"{source}: {_unknown(name, known)}")
        try:
            for name in _leaf_names(departures):  # a merge would pass over what is missing
                OmegaConf.select(departures, name, throw_on_missing=True, throw_on_resolution_failure=False)
            merged.merge_with(departures)
        except OmegaConfBaseException as error:
            raise UsageError(f"{source}: {_reason(error)}") from error
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # references to other keys are followed here
        raise UsageError(_reason(error)) from error
    assert isinstance(config, Config)
    if config.train.run_dir is None:
        name = Path(path).stem if path else "default"
        config = replace(config, train=replace(config.train, run_dir=f"runs/{name}"))
    return config


def save(config: Config, path: str | Path) -> None:
    """Write the whole configuration, defaults included, as YAML that `load` reads back."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def flatten(config: Config) -> dict[str, Any]:
    """Full key -> value."""
    tree = OmegaConf.structured(config)
    return {name: OmegaConf.select(tree, name) for name in _leaf_names(tree)}


def _departures(path: str | Path | None, overrides: list[str]) -> Iterator[tuple[str, DictConfig]]:
    if path is not None:
        try:
            content = OmegaConf.load(path)
        except OSError as error:
            raise UsageError(f"--config {path}: {error.strerror or error}") from error
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            raise UsageError(f"--config {path}: not YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(content, DictConfig):
            raise UsageError(f"--config {path}: found a list, expected keys and values")
        yield str(path), content
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UsageError(f"{override!r}: expected key=value")
        if not value:
            raise UsageError(f"{override!r}: found no value; none is {key}=null")
        try:
            yield override, OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UsageError(f"{override!r}: the value is not YAML: {str(error).splitlines()[0]}") from error


def _reason(error: OmegaConfBaseException) -> str:
    said, value = str(error).strip().splitlines()[0], getattr(error, "value", None)
    if "is not a ListConfig" in said:
        said = f"found {value}, expected a list, as in [{value}]"
    return f"{getattr(error, 'full_key', None) or 'a key'}: {said}"


def _leaf_names(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Full names of all leaves; a section given no value counts as one."""
    for key in node:
        child = node._get_node(key)
        name = f"{prefix}{key!s}"
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _leaf_names(child, name + ".")
        else:
            yield name


def _unknown(name: str, known: set[str]) -> str:
    within = sorted(key for key in known if key.startswith(f"{name}."))
    if within:
        return f"{name!r} is a section: set its keys, such as {within[0]}"
    return f"unknown key {name!r}{_nearest(name, known)}"


def _nearest(name: str, known: set[str]) -> str:
    leaf = {key.rsplit(".", 1)[-1]: key for key in known}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    close = close or [leaf[k] for k in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaf, n=1, cutoff=0.5)]
    return f"; did you mean {close[0]!r}?" if close else ""


def _writable(node: DictConfig) -> DictConfig:
    """OmegaConf makes configs of frozen dataclasses read-only; merging comes before freezing."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _writable(child)
    return node
