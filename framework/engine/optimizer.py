"""AdamW over three parameter groups, and the learning rate of each step."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from framework.errors import UsageError

log = logging.getLogger("tenfold")

PAPER_BATCH = 32
GROUPS = ("rest", "backbone", "sampling")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. Defaults: the published recipe.

    lr: of the group `rest`; `backbone` and `sampling` (sampling offsets, reference points) take a share of it.
    lr_scaling: by global batch / 32: not at all, by its square root, or linearly (the authors advise against).
    warmup_steps: optimizer steps of linear warm-up from 0. clip_norm: gradient norm over all parameters.
    impl: auto is torch's fused AdamW, which is there wherever torch is; which one is used is logged.
    """

    impl: Literal["auto", "torch", "deepspeed", "apex"] = "auto"
    lr: float = 2e-4
    backbone_lr_scale: float = 0.1
    sampling_lr_scale: float = 0.1
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for key in ("lr", "clip_norm"):
            if not getattr(self, key) > 0:
                raise UsageError(f"optim.{key}: found {getattr(self, key)}, expected above 0")
        for key in ("backbone_lr_scale", "sampling_lr_scale", "weight_decay", "warmup_steps"):
            if not getattr(self, key) >= 0:
                raise UsageError(f"optim.{key}: found {getattr(self, key)}, expected at least 0")


def group_of(name: str) -> str:
    if name.startswith("backbone."):
        return "backbone"
    return "sampling" if "sampling_offsets" in name or "reference_points" in name else "rest"


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters by group, in the order of GROUPS; empty groups are left out."""
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[group_of(name)].append(parameter)
    return [{"name": name, "params": params, "lr": config.lr} for name, params in groups.items() if params]


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (decoupled weight decay, on norms and biases too) by the chosen implementation.

    Raises UsageError: the named implementation is not installed, or not for this device.
    """
    groups = parameter_groups(model, config)
    impl = "torch" if config.impl == "auto" else config.impl  # torch's fused AdamW exists wherever torch does
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
    }
    log.info("optimizer: AdamW, %s implementation", impl)
    if impl == "torch":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if impl == "apex":
        return _apex_adam(device)(groups, adam_w_mode=True, **settings)
    try:
        return _deepspeed_adam(device)(groups, settings)
    except (ImportError, RuntimeError, OSError) as error:  # it compiles itself at the first use
        raise UsageError(f"optim.impl: found deepspeed, whose Adam cannot be built here ({type(error).__name__}: "
                         f"{str(error).splitlines()[0]}); it needs ninja and a compiler (apt-get install g++, pip "
                         "install ninja), or set optim.impl=auto") from error  # fmt: skip


def _deepspeed_adam(device: torch.device) -> Callable[[Any, dict[str, Any]], torch.optim.Optimizer]:
    if device.type == "cuda":
        from deepspeed.ops.adam import FusedAdam

        return lambda groups, settings: FusedAdam(groups, adam_w_mode=True, **settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return lambda groups, settings: DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)


def _apex_adam(device: torch.device) -> Any:
    """NVIDIA's FusedAdam. PyPI's `apex` is another project and holds no optimizers."""
    if device.type != "cuda":
        raise UsageError("optim.impl: found apex on a machine without GPU; its FusedAdam is for GPUs: set "
                         "optim.impl=auto")  # fmt: skip
    how = "install NVIDIA apex from its repository (https://github.com/NVIDIA/apex), or set optim.impl=auto"
    try:
        import apex
    except ImportError as error:
        raise UsageError(f"optim.impl: found apex, which is not installed; {how}") from error
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UsageError(f"optim.impl: found apex at {apex.__file__} without optimizers: PyPI's 'apex' is another "
                         f"project; pip uninstall apex, then {how}") from error  # fmt: skip
    return FusedAdam


def learning_rates(
    config: OptimConfig, step: int, *, global_batch: int, steps_per_epoch: int, drop_epochs: list[int]
) -> dict[str, float]:
    """The learning rate of every group for optimizer step `step`, counted from 0."""
    ratio = global_batch / PAPER_BATCH
    lr = config.lr * {"none": 1.0, "sqrt": ratio**0.5, "linear": ratio}[config.lr_scaling]
    lr *= 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in drop_epochs)
    if step < config.warmup_steps:
        lr *= (step + 1) / config.warmup_steps
    return {"rest": lr, "backbone": lr * config.backbone_lr_scale, "sampling": lr * config.sampling_lr_scale}


def unreached_drops(drop_epochs: list[int], epochs: int) -> str | None:
    """What to say of a schedule whose drops do not all come."""
    late = [epoch for epoch in drop_epochs if epoch >= epochs]
    if not late:
        return None
    return (f"train.lr_drop_epochs: found {drop_epochs} in a run of {epochs} epochs (train.epochs); the rate does not "
            f"drop at {', '.join(map(str, late))}")  # fmt: skip


def other_batch(config: OptimConfig, global_batch: int) -> str | None:
    """What to say of a batch that the recipe's rates are not for, and that they are not scaled to."""
    if global_batch == PAPER_BATCH or config.lr_scaling != "none":
        return None
    return (f"the recipe is for {PAPER_BATCH} images a step, not {global_batch}, and optim.lr_scaling=none keeps its "
            "rates")  # fmt: skip


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: dict[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]
