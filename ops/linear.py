"""Linear layers whose products on a CPU are oneDNN's, which torch leaves to MKL: slow on AMD's cores.

# N row, K features in, M features out
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.overrides import has_torch_function

from ops import chosen, compiled

MANY_ROWS = 1024  # of a piece


class Linear(nn.Linear):
    """torch's, its results too but for their last bits. In float32 and bfloat16 by oneDNN on CPUs with AVX-512, but for
    what ZeRO 3 gathers, under torch.compile, which has ways of its own, and with TENFOLD_OP=reference."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or torch.compiler.is_compiling() or not self._by_onednn(x):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        y_NM: Tensor = _Product.apply(x.to(dtype).reshape(-1, self.in_features), self.weight.to(dtype), bias)
        return y_NM.view(*x.shape[:-1], self.out_features)

    def _by_onednn(self, x: Tensor) -> bool:
        if chosen.implementation is not compiled or not has_onednn():
            return False
        found = {x.dtype, self.weight.dtype}
        if torch.is_autocast_enabled("cpu"):
            fits = torch.get_autocast_dtype("cpu") == torch.bfloat16 and found <= {torch.float32, torch.bfloat16}
        else:
            fits = found in ({torch.float32}, {torch.bfloat16})
        return fits and not has_torch_function((x,)) and not hasattr(self.weight, "ds_id")


def cast_once(x: Tensor) -> Tensor:
    """x in the dtype that autocast, where it is on, casts it to for a linear layer: for several of them at once."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def has_onednn() -> bool:
    """Where its products were found to be faster than MKL's."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x weight^T + bias of x (..., K). By oneDNN it takes a sixth to two fifths less time on AMD in float32, a seventh
    in bfloat16 with a bias."""
    if not has_onednn():
        return linear(x, weight_MK, bias_M)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_MK, bias_M, "none", [], "")
    return y


def tall_product(grad_NM: Tensor, x_NK: Tensor) -> Tensor:
    """grad^T x, the gradient of a weight. Of many rows in pieces that cores compute side by side, which takes a tenth
    less time than one product that they share."""
    count = pieces()
    rows = len(grad_NM) // count
    if rows < MANY_ROWS or not has_onednn():
        return grad_NM.t() @ x_NK
    grad_PNM, x_PNK = (side[: rows * count].unflatten(0, (count, rows)) for side in (grad_NM, x_NK))
    weight_MK = (grad_PNM.mT @ x_PNK).sum(0)
    return weight_MK.addmm_(grad_NM[rows * count :].t(), x_NK[rows * count :])


def pieces() -> int:
    return max(4, torch.get_num_threads())


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NK, weight_MK)
        return product(x_NK, weight_MK, bias_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor | None, ...]:
        x_NK, weight_MK = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(grad_NM, weight_MK.t()) if of_x else None,
            tall_product(grad_NM, x_NK) if of_weight else None,
            grad_NM.sum(0) if of_bias else None,
        )
