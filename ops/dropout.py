"""Dropout fused with what stands before or after it: `relu` before, or a residual to add.

On a CPU a kernel of csrc/ does both in one pass over memory, in place, and keeps no mask: an element is kept or not by
a hash of its index and of a seed that torch's generator gives, and the backward computes it again. (torch's own draws
one number after the other, on one core.) Elsewhere, in other dtypes than float32 and bfloat16, and with
TENFOLD_OP=reference torch's dropout is used. The kernel's probabilities are multiples of 2^-16, and what it keeps is
scaled by so much that the mean stays.
"""

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import wrap_torch_function

from ops import chosen, compiled, library


class Mode(IntEnum):
    """As in csrc/cpu/kernels_of.h."""

    PLAIN, RELU, ADD, GATE = range(4)


@wrap_torch_function(lambda x, p, training: (x,))
def relu_dropout_(x: Tensor, p: float, training: bool) -> Tensor:
    """dropout(relu(x)), of which backward needs nothing but the result. x: any shape; its memory may be used up."""
    if not training:
        return x.relu_()
    if p == 0:
        return x.relu()
    if chosen.implementation is not compiled:
        return torch.nn.functional.dropout(x.relu(), p)
    return _ReluDropout.apply(x, p)


@wrap_torch_function(lambda x, residual, p, training: (x, residual))
def add_dropout_(x: Tensor, residual: Tensor, p: float, training: bool) -> Tensor:
    """residual + dropout(x), in the dtype that both promote to. Shapes are equal; the memory of x is used up."""
    if not training or p == 0:
        return residual + x
    dtype = torch.promote_types(x.dtype, residual.dtype)
    if has_kernel(x, dtype):
        return _AddDropout.apply(x.to(dtype).contiguous(), residual.to(dtype).contiguous(), p)
    return residual + torch.nn.functional.dropout(x, p)


def has_kernel(x: Tensor, dtype: torch.dtype) -> bool:
    return chosen.implementation is compiled and x.is_cpu and dtype in (torch.float32, torch.bfloat16)


def run(mode: Mode, x: Tensor, other: Tensor | None, seed: Tensor, p: float, out: Tensor) -> Tensor:
    library.check(x.device)
    torch.ops.tenfold.dropout(x, other, seed, p, int(mode), out)
    return out


def used_up(x: Tensor) -> Tensor:
    """Another tensor with its memory: whoever keeps x for backward is told so by torch.

    Not `mark_dirty`: a linear layer returns a view, of which autograd would then copy whole gradients.
    """
    torch.autograd.graph.increment_version(x)
    return x.detach()


def new_seed() -> Tensor:
    return torch.randint(torch.iinfo(torch.int64).max, ())


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        if has_kernel(x, x.dtype) and x.is_contiguous():
            kept = run(Mode.RELU, x, None, new_seed(), p, out=used_up(x))
        else:
            kept = torch.native_dropout(x.relu(), p, True)[0]
        ctx.save_for_backward(kept)
        ctx.p = p
        return kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        if has_kernel(kept, kept.dtype) and kept.is_contiguous():
            grad = grad.contiguous()
            return run(Mode.GATE, grad, kept, torch.zeros((), dtype=torch.int64), ctx.p, torch.empty_like(grad)), None
        return torch.ops.aten.threshold_backward(grad, kept, 0) / (1 - ctx.p), None


class _AddDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, p: float) -> Tensor:
        ctx.seed, ctx.p = new_seed(), p
        return run(Mode.ADD, x, residual, ctx.seed, p, out=used_up(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad = grad.contiguous()
        return run(Mode.PLAIN, grad, None, ctx.seed, ctx.p, torch.empty_like(grad)), grad, None
