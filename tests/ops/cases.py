"""Arguments for the operators, and both operators behind one signature."""

from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ["locations", "points", "boxes"]
# All sizes differ, and no level is square: a transposition cannot hide.
SIZES_HW = [(6, 4), (3, 8)]
# Where operators run; their results come back to the CPU. A fixture of conftest.py changes it.
device = "cpu"


@dataclass
class Case:
    """What `mode` takes, in the order of the arguments; spatial_shapes stands apart."""

    mode: str
    sizes_hw: list[tuple[int, int]]
    tensors: list[Tensor]

    def to(self, dtype: torch.dtype) -> "Case":
        """value in dtype, the rest in what it is computed with."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        value, *others = self.tensors
        return Case(self.mode, self.sizes_hw, [value.to(dtype), *(t.to(compute) for t in others)])

    def run(self, implementation) -> Tensor:
        value, *others = self.tensors if device == "cpu" else (tensor.to(device) for tensor in self.tensors)
        name = "ms_deform_attn" if self.mode == "locations" else "fused_ms_deform_attn"
        return getattr(implementation, name)(value, self.sizes_hw, *others).to(self.tensors[0].device)

    def results(self, implementation) -> list[Tensor]:
        """The output, and the gradients of a loss that weighs it at random."""
        leaves = [t.detach().clone().requires_grad_() for t in self.tensors]
        out = Case(self.mode, self.sizes_hw, leaves).run(implementation)
        draw = torch.Generator().manual_seed(9)
        grad = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def make(
    mode: str, *, B=2, Q=7, M=3, E=5, P=4, sizes_hw=None, seed=0, dtype: torch.dtype = torch.float64, spread=2.0
) -> Case:
    """A case of random numbers, a good part of the points outside."""
    sizes_hw = sizes_hw or SIZES_HW
    L, S = len(sizes_hw), sum(height * width for height, width in sizes_hw)
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, dtype=torch.float64)

    value = normal(B, S, M, E)
    if mode == "locations":
        others = [uniform(B, Q, M, L, P, 2) * 1.6 - 0.3, uniform(B, Q, M, L, P)]
    else:
        references = uniform(B, Q, L, 2 if mode == "points" else 4)
        others = [references, normal(B, Q, M, L, P, 2) * spread, normal(B, Q, M, L * P)]
    return Case(mode, sizes_hw, [value, *others]).to(dtype)
