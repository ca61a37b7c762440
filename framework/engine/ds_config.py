"""DeepSpeed's engine and its configuration, computed from ours, so that no number is written twice."""

import logging
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from framework.errors import UsageError


@dataclass(frozen=True)
class EngineConfig:
    """zero_stage: 0 (replicated), 1 (moments sharded), 2 (gradients too).

    precision auto: bf16 where the device is good at it, else fp32.
    activation_checkpointing: keep only the inputs of transformer layers, compute the rest again in backward.
    offload_optimizer: moments and fp32 weights in host memory (GPUs only).
    """

    zero_stage: int = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    activation_checkpointing: bool = False
    offload_optimizer: bool = False

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2):
            raise UsageError(f"engine.zero_stage: found {self.zero_stage}, expected 0, 1 or 2")
        if self.precision == "fp16":
            # DeepSpeed 0.19.8 under torch_autocast clips gradients that are still scaled, and never lowers the scale.
            raise UsageError(
                "engine.precision: found fp16, whose loss scaling DeepSpeed gets wrong here; set bf16 or fp32"
            )
        if self.zero_stage == 0 and self.precision == "bf16":
            raise UsageError(
                f"engine.zero_stage, engine.precision: found 0 and {self.precision}; DeepSpeed keeps fp32 weights "
                "beside a lower precision from stage 1 on: set engine.zero_stage=1"
            )
        if self.zero_stage == 0 and self.offload_optimizer:
            raise UsageError("engine.zero_stage, engine.offload_optimizer: found 0 and true; set engine.zero_stage=1")


def precision_for(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products."""
    if config.precision == "auto":
        return torch.bfloat16 if _good_at_bf16(device) and config.zero_stage > 0 else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]


def _good_at_bf16(device: torch.device) -> bool:
    """GPUs from sm_80 on; CPUs with instructions for it (AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(config: EngineConfig, device: torch.device) -> torch.autocast:
    """Evaluation in the precision of training, without the engine."""
    dtype = precision_for(config, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def deepspeed_config(
    config: EngineConfig, *, device: torch.device, global_batch: int, micro_batch: int, accumulation: int,
    clip_norm: float,
) -> dict[str, Any]:  # fmt: skip
    """The dict for deepspeed.initialize. The optimizer is ours, the schedule too."""
    dtype = precision_for(config, device)
    if config.offload_optimizer and device.type != "cuda":
        raise UsageError("engine.offload_optimizer: found true on a machine without GPU; set it to false")
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": dtype != torch.float32, "dtype": str(dtype).removeprefix("torch.")},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,  # our own console and TensorBoard report
        "wall_clock_breakdown": False,
    }


def start_engine(model: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any]) -> Any:
    """DeepSpeed's engine over `model`, which it moves to this rank's device."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Of DeepSpeed's own calls into torch; nothing that a user of ours could change.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    return engine
