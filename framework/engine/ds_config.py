"""DeepSpeed's engine and its configuration, computed from ours, so that no number is written twice."""

import importlib
import logging
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from framework.engine.zero_1 import GradientsAtOnce
from framework.errors import UsageError
from framework.models.backbone import ScalableConv2d
from ops.linear import Linear

# Layers that compute in autocast's dtype and whose weights and gradients DeepSpeed sends in it: these classes, not
# those derived from them. (float32 ones: framework/models/linear.py.)
SENT_IN_LOWER_PRECISION = (Linear, nn.Conv2d, ScalableConv2d)
BUCKET = 1 << 24  # gradients reduced at once, and room for as many: DeepSpeed's default holds 2 GB


@dataclass(frozen=True)
class EngineConfig:
    """zero_stage: 0 (replicated), 1 (moments sharded), 2 (gradients too), 3 (weights too).

    precision auto: bf16 where the device is good at it, else fp32. fp16: GPUs only; the loss is scaled so that
        gradients neither vanish nor overflow: by 2^16 first, half when they overflow, twice after 2000 steps without.
    cuda_graphs: launch forward and backward as one graph each, for a GPU that waits for the processor (few images at a
        time); batches are padded to multiples of 64 pixels. Not with stage 3 or activation_checkpointing.
    compile_layers: of encoder and decoder, by torch.compile, for the graphs: a start of about a minute, then faster.
        Needs a C compiler on every node.
    activation_checkpointing: keep only the inputs of transformer layers, compute the rest again in backward.
    keep_products: with it, keep what sampling and matrix products gave, but for wide ones: more memory, and less is
        computed again. A CPU keeps what sampling gave. Not with stage 3, which gathers weights in between.
    offload_optimizer: moments and a copy of the fp32 weights in host memory, Adam there too.
    overlap_comm: at stages 1 and 2 send gradients while backward computes the next ones, not after it: for several GPUs
        without cuda_graphs; two sets of buckets. Stage 3 always does so.
    secondary_partition: of ZeRO++ (Wang et al. 2023), for stage 3 over several nodes: a second copy of the weights
        shared among so many neighbouring ranks (GPUs of a node), so that backward does not gather over the network;
        1: none.
    quantized_weights, quantized_gradients: also of ZeRO++, and refused: DeepSpeed 0.19.8 reads float32 and bf16
        gradients as if they were halves, and sends weights as int8 that have to stay float32 (boxes, reference points).
    """

    zero_stage: int = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    cuda_graphs: bool = False
    compile_layers: bool = False
    activation_checkpointing: bool = False
    keep_products: bool = False
    offload_optimizer: bool = False
    overlap_comm: bool = False
    secondary_partition: int = 1
    quantized_weights: bool = False
    quantized_gradients: bool = False

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise UsageError(f"engine.zero_stage: found {self.zero_stage}, expected 0, 1, 2 or 3")
        if self.secondary_partition < 1:
            raise UsageError(f"engine.secondary_partition: found {self.secondary_partition}, expected ranks, or 1 for "
                             "none")  # fmt: skip
        if self.zero_stage != 3 and self.secondary_partition > 1:
            raise UsageError(f"engine.secondary_partition, engine.zero_stage: found {self.secondary_partition} and "
                             f"{self.zero_stage}; ZeRO++ is for stage 3")  # fmt: skip
        if self.quantized_gradients:
            raise UsageError("engine.quantized_gradients: found true; DeepSpeed 0.19.8 takes the bits of float32 "
                             "and bf16 gradients for halves: set it to false")  # fmt: skip
        if self.quantized_weights:
            raise UsageError("engine.quantized_weights: found true; DeepSpeed would send as int8 what has to stay "
                             "float32 (boxes, reference points): set it to false")  # fmt: skip
        if self.zero_stage == 0 and self.precision in ("bf16", "fp16"):
            raise UsageError(
                f"engine.zero_stage, engine.precision: found 0 and {self.precision}; DeepSpeed keeps fp32 weights "
                "beside a lower precision from stage 1 on: set engine.zero_stage=1"
            )
        if self.cuda_graphs and (self.zero_stage == 3 or self.activation_checkpointing):
            raise UsageError(
                f"engine.cuda_graphs, engine.zero_stage, engine.activation_checkpointing: found true, {self.zero_stage}"
                f" and {str(self.activation_checkpointing).lower()}; graphs need weights and activations that stay"
                " where they are: set engine.cuda_graphs=false, or a stage below 3 without activation_checkpointing"
            )
        if self.compile_layers and not self.cuda_graphs:
            raise UsageError("engine.compile_layers, engine.cuda_graphs: found true and false; compiled kernels gain "
                             "nothing where the processor launches each: set engine.cuda_graphs=true")  # fmt: skip
        if self.keep_products and (self.zero_stage == 3 or not self.activation_checkpointing):
            raise UsageError(
                f"engine.keep_products, engine.activation_checkpointing, engine.zero_stage: found true, "
                f"{str(self.activation_checkpointing).lower()} and {self.zero_stage}; expected true, true and a stage "
                "below 3: set engine.keep_products=false, or the others"
            )
        if self.overlap_comm and (self.zero_stage not in (1, 2) or self.cuda_graphs):
            raise UsageError(
                f"engine.overlap_comm, engine.zero_stage, engine.cuda_graphs: found true, {self.zero_stage} and "
                f"{str(self.cuda_graphs).lower()}; stage 0 and graphs have all gradients at the end of backward, stage "
                "3 overlaps anyway: set engine.overlap_comm=false, or the others to 1 or 2 and false"
            )
        if self.zero_stage == 0 and self.offload_optimizer:
            raise UsageError("engine.zero_stage, engine.offload_optimizer: found 0 and true; set engine.zero_stage=1")


def memory_savers(config: EngineConfig) -> str:
    """What to set where a batch does not fit, as words of a sentence."""
    keys = {
        "engine.zero_stage=1": config.zero_stage == 0,
        "engine.precision=bf16": config.precision == "fp32" and config.zero_stage > 0,
        "engine.cuda_graphs=false" + " engine.compile_layers=false" * config.compile_layers: config.cuda_graphs,
        "engine.activation_checkpointing=true": not config.activation_checkpointing and not config.cuda_graphs,
        "engine.keep_products=false": config.keep_products,
    }
    return " or ".join(["a smaller train.micro_batch", "data.max_size", *(key for key, helps in keys.items() if helps)])


def precision_for(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products."""
    if config.precision == "auto":
        return torch.bfloat16 if _good_at_bf16(device) and config.zero_stage > 0 else torch.float32
    if config.precision == "fp16" and device.type != "cuda":
        raise UsageError("engine.precision: found fp16 on a machine without GPU; set bf16 or fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]


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
    on_gpu = device.type == "cuda"
    if config.cuda_graphs and not on_gpu:
        raise UsageError("engine.cuda_graphs: found true on a machine without GPU; set it to false")
    world = global_batch // (micro_batch * accumulation)
    if world % config.secondary_partition:
        raise UsageError(f"engine.secondary_partition: found {config.secondary_partition} with {world} processes; "
                         "expected a number that divides them, the GPUs of a node")  # fmt: skip
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": BUCKET}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if config.zero_stage < 3:
        zero["overlap_comm"] = config.overlap_comm
    if config.zero_stage == 3:  # with stage3_max_reuse_distance=0, which would keep less, losses come out wrong
        zero["zero_hpz_partition_size"] = config.secondary_partition
    return {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": dtype != torch.float32,
            "dtype": str(dtype).removeprefix("torch."),
            "lower_precision_safe_modules": [f"{one.__module__}.{one.__name__}" for one in SENT_IN_LOWER_PRECISION],
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,  # our own console and TensorBoard report
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # which waits for the device before and after each micro-batch
    }


def start_engine(model: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any]) -> Any:
    """DeepSpeed's engine over `model`, which it moves to this rank's device."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # of a step that is skipped, and of what ZeRO 3 cannot see, we say more
    # Of DeepSpeed's own calls into torch; nothing that a user of ours could change.
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor", category=FutureWarning)
    _import_without_compiling("deepspeed.runtime.zero.muon.muon_optimizer")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    zero = ds_config["zero_optimization"]
    if zero["stage"] == 0:
        skip_where_told(engine.optimizer)
    elif at_once(zero["stage"], zero.get("overlap_comm", False), "offload_optimizer" in zero):
        engine.optimizer.gradients_at_once = GradientsAtOnce(engine.optimizer)
    elif zero["stage"] < 3:
        spare_the_processor(engine.optimizer)
    if ds_config["torch_autocast"]["dtype"] == "float16":
        scale_losses(engine.optimizer)
    return engine


def at_once(stage: int, overlap_comm: bool, offload_optimizer: bool) -> bool:
    """Whether zero_1.py handles gradients."""
    return stage == 1 and not overlap_comm and not offload_optimizer


def _import_without_compiling(module: str) -> None:
    """DeepSpeed's engines import an optimizer of which functions are handed to torch.compile: whose own import takes
    every rank 2 s of its start and 42 MiB, for functions that are not called."""
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    compile_, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        importlib.import_module(module)
    finally:
        compiler.compile = compile_


def skip_where_told(optimizer: Any) -> None:
    """Without ZeRO DeepSpeed takes every step: this one is not taken where `optimizer.overflow` is true."""
    step, optimizer.overflow = optimizer.step, False

    def step_unless_told(*args: Any, **kwargs: Any) -> Any:
        return None if optimizer.overflow else step(*args, **kwargs)

    optimizer.step = step_unless_told


def spare_the_processor(zero: Any) -> None:
    """ZeRO 1 and 2 with less to do between the gradients and the next step (DeepSpeed 0.19.8).

    The norm of gradients is computed a few hundred at a time, in float32, where DeepSpeed launches two operations for
    each and waits for the device. Weights are views of what has been gathered already, and need not be made so again
    (but where DeepSpeed takes states off the device, which nothing here does). Memory that nobody asked about is not
    reported for every weight.
    """
    import deepspeed.comm as dist

    def norm(gradients: list[Tensor], *_: Any) -> Tensor:
        own = torch.nn.utils.get_total_norm([one for one in gradients if not getattr(one, "_zero_padding", False)])
        square = own.to(zero.device).square()
        dist.all_reduce(square, group=zero.dp_process_group)
        return square.sqrt()

    zero.get_grad_norm_direct = norm
    zero._update_model_bit16_weights = zero.report_ipg_memory_usage = lambda *_, **__: None


def loss_scaler(engine: Any) -> Any | None:
    """What scales the loss in fp16; None in other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if scaler is not None and scaler.dynamic else None


def scale_losses(zero: Any) -> None:
    """Let ZeRO's own dynamic scaler do it: torch's, which torch_autocast brings for fp16, is unscaled after gradients
    are clipped, and never learns of an overflow (DeepSpeed 0.19.8)."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    zero.torch_autocast_gradscaler = None
    zero.loss_scaler, zero.dynamic_loss_scale = DynamicLossScaler(
        init_scale=2.0**16, scale_window=2000, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
    ), True  # fmt: skip
