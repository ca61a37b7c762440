"""A trained detector for the commands that use one: from a run, or from weights and a configuration."""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.sample import MANIFEST, Category
from framework import config as configuration
from framework.config import Config
from framework.data.loader import manifest_of
from framework.data.remote import is_remote
from framework.engine import checkpoint
from framework.errors import UsageError
from framework.evaluation.detections import placeholder_classes
from framework.models.build import build_detector
from framework.models.detector import Detector
from framework.models.weights import load_published
from framework.tracking.run_folder import best_evaluation


@dataclass(frozen=True)
class Trained:
    """model: in evaluation mode, on the CPU. classes: None where nobody recorded them."""

    model: Detector
    config: Config
    classes: list[Category] | None
    weights: Path

    @property
    def names(self) -> list[Category]:
        """The classes, or numbered stand-ins, one for each label."""
        assert self.config.model.num_classes is not None
        return self.classes or placeholder_classes(self.config.model.num_classes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="RUN", help="run folder of a training: its newest whole checkpoint is used")
    parser.add_argument(
        "--best", action="store_true", help="of --run the checkpoint with the highest AP (train.keep_best)"
    )
    parser.add_argument("--weights", metavar="FILE", help="published checkpoint (.pth) or one of a run; needs --config")
    parser.add_argument("--config", metavar="FILE", help="configuration of the weights")


def load_trained(args: argparse.Namespace, overrides: list[str], data: str | None = None) -> Trained:
    """The model that --run, or --weights and --config, name.

    Args:
        data: a shard folder whose classes the model has, if the configuration names none.
    Raises:
        UsageError: none or both of these, no run there, no checkpoint in it, unknown number of classes.
        InputError: a file that cannot be read, or weights of another model.
    """
    if bool(args.run) == bool(args.weights) or bool(args.weights) != bool(args.config):
        raise UsageError("expected either --run RUN, or --weights FILE with --config FILE")
    if args.best and not args.run:
        raise UsageError("--best: found --weights, which name one checkpoint; expected --run RUN, or leave --best out")
    if args.run:
        weights, config = _of_run(Path(args.run), overrides, args.best)
    else:
        weights = Path(args.weights)
        if not weights.exists():
            raise UsageError(f"--weights {weights}: no such file; expected a .pth or .safetensors file, "
                             "or a checkpoint folder")  # fmt: skip
        # These weights stand in for the ones that a frozen backbone would otherwise miss.
        config = configuration.load(args.config, [*overrides, f"model.init={json.dumps(str(weights))}"])
    classes = _classes(weights, config, data)
    if config.model.num_classes is None and classes:
        config = replace(config, model=replace(config.model, num_classes=len(classes)))
    if config.model.num_classes is None:
        raise UsageError(f"model.num_classes: found null, and no classes beside {weights}; "
                         "give model.num_classes=N, or the shards in data.val")  # fmt: skip
    model = build_detector(config.model)
    load_published(model, weights, expected="detector")
    return Trained(model.eval(), config, classes, weights)


def _of_run(run: Path, overrides: list[str], best: bool) -> tuple[Path, Config]:
    if not (run / "config.yaml").is_file():
        raise UsageError(f"--run {run}: no config.yaml; expected the folder of a training run")
    weights = best_checkpoint(run) if best else checkpoint.newest(run)
    if weights is None:
        raise UsageError(f"--run {run}: no whole checkpoint in {run / 'checkpoints'}; train it first, or longer")
    return weights, configuration.load(run / "config.yaml", overrides)


def best_checkpoint(run: Path) -> Path:
    """Raises UsageError: nothing was evaluated, or its checkpoint is not there."""
    found = best_evaluation(run)
    if found is None:
        raise UsageError(
            f"--best: {run / 'evaluation'} holds no evaluation; leave --best out, or train with eval.every=1"
        )
    weights = checkpoint.folder_of(run, found[0])
    if (fault := checkpoint.fault_of(weights)) is not None:
        raise UsageError(f"--best: {weights}, of AP {found[1]:.3f}, is not whole ({fault}); leave --best out; "
                         "train.keep_best=true keeps it")  # fmt: skip
    return weights


def _classes(weights: Path, config: Config, data: str | None) -> list[Category] | None:
    """From the checkpoint if it is one of ours, else from the first shard set there is."""
    if (weights / checkpoint.STATE_FILE).is_file():
        return [Category(**one) for one in checkpoint.read_state(weights)["classes"]]
    for location in (config.data.train, config.data.val, data):
        if location is not None and (is_remote(location) or (Path(location) / MANIFEST).is_file()):
            return manifest_of(location, config.data).classes
    return None
