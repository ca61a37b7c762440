"""Published GPU kernels of the same operator, behind the arguments of ops.fused_ms_deform_attn, to measure beside it.

None of them is part of Tenfold. Each is imported from a folder in which somebody built it, named by a flag of
benchmarks.op_gpu:

    --published   Deformable-DETR, models/ops: the module MultiScaleDeformableAttention
    --mmcv        mmcv with its CUDA extension
    --dcnv4       DCNv4_op: FlashDeformAttn, which has the softmax inside and rounds locations to float16
    --triton      msda-triton, without its fall-back to grid_sample
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.op import SIZES_HW, P
from framework.errors import UsageError
from ops import reference

Run = Callable[[list[Tensor]], Tensor]


def published(device: torch.device) -> Run:
    extension = importlib.import_module("MultiScaleDeformableAttention")

    class Published(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return extension.ms_deform_attn_forward(*tensors, 64)

        @staticmethod
        def backward(ctx, grad):
            grads = extension.ms_deform_attn_backward(*ctx.saved_tensors, grad.contiguous(), 64)
            return grads[0], None, None, *grads[1:]

    return sampled(Published.apply, device)


def mmcv(device: torch.device) -> Run:
    function = importlib.import_module("mmcv.ops.multi_scale_deform_attn").MultiScaleDeformableAttnFunction
    return sampled(lambda *tensors: function.apply(*tensors, 64), device)


def triton(device: torch.device) -> Run:
    function = importlib.import_module("msda_triton.frontend").triton_multiscale_deformable_attention

    def run(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return function(value, shapes, locations, weights, "zeros", False).flatten(2)

    return sampled(run, device)


def dcnv4(device: torch.device) -> Run:
    function = importlib.import_module("DCNv4.functions").FlashDeformAttnFunction
    levels = shapes_and_starts(device)

    def run(tensors: list[Tensor]) -> Tensor:
        value, references, offsets, logits = tensors
        locations = reference.sampling_locations(references, offsets, SIZES_HW)
        both = torch.cat([locations.flatten(-3).half(), logits.half()], dim=-1)
        return function.apply(value, *levels, both, 64, P)

    return run


def sampled(function: Callable[..., Tensor], device: torch.device) -> Run:
    """function(value, shapes, starts, locations, weights) behind a softmax and locations in torch."""
    levels = shapes_and_starts(device)

    def run(tensors: list[Tensor]) -> Tensor:
        value, *others = tensors
        locations, weights = reference.sampling(*others, SIZES_HW, torch.float32)
        return function(value, *levels, locations.to(value.dtype), weights.to(value.dtype))

    return run


def shapes_and_starts(device: torch.device) -> tuple[Tensor, Tensor]:
    shapes = torch.tensor(SIZES_HW, device=device)
    return shapes, torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])


# How each is made, and of which dtypes its values may be.
RIVALS: dict[str, tuple[Callable[[torch.device], Run], tuple[torch.dtype, ...]]] = {
    "published": (published, (torch.float32,)),
    "mmcv": (mmcv, (torch.float32, torch.float16)),
    "dcnv4": (dcnv4, (torch.float16,)),
    "triton": (triton, (torch.float32,)),
}


def load(folders: dict[str, Path], device: torch.device) -> dict[str, tuple[Run, tuple[torch.dtype, ...]]]:
    """Those whose folders are named: how to run them, and in which dtypes.

    Raises:
        UsageError: what a folder holds cannot be imported.
    """
    loaded = {}
    for name, folder in folders.items():
        make, dtypes = RIVALS[name]
        sys.path.insert(0, str(folder))
        try:
            loaded[name] = make(device), dtypes
        except (ImportError, AttributeError, NotImplementedError) as error:
            raise UsageError(f"--{name} {folder}: not built there, or for another torch: {error}") from error
    return loaded
