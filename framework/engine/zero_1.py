"""ZeRO 1 in few operations: what DeepSpeed 0.19.8 does for each weight in Python is done for all of them at once.

Gradients are summed over micro-batches by autograd, without DeepSpeed's hooks, and then put side by side as DeepSpeed
has put the weights: a flat tensor for each parameter group, of which each rank updates a part of equal length.
"""

from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 18  # numbers whose squares are summed in a row; of more, float32 on a CPU loses digits


class GradientsAtOnce:
    """Takes the place of `reduce_gradients` and `step` of `zero`, DeepSpeed's optimizer at stage 1.

    Gradients are sent as float32 and scattered: as many bytes as DeepSpeed sends, which all-reduces most of them in 16
    bits. torch's fused AdamW is told on the device that a gradient is not finite and then does nothing, so that a GPU
    updates weights and sends them while the processor still waits to hear of it; other AdamWs are called afterwards.
    """

    def __init__(self, zero: Any) -> None:
        import deepspeed.comm as dist

        self.zero, self.group = zero, zero.dp_process_group
        self.world, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        backend = torch.distributed.get_backend(self.group)
        self.scattered = backend != "gloo"  # which all-reduces in half the time
        self.own: list[Tensor] = []  # of each parameter group the gradients of this rank's part
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero.reduce_gradients, zero.step = self.reduce, self.step

    @torch.no_grad()
    def reduce(self, **_: Any) -> None:
        """After the last backward pass of a step: the mean over all ranks."""
        zero = self.zero
        sizes = zip(zero.bit16_groups, zero.bit16_groups_flat, zero.partition_size, strict=True)
        self.own = [self._reduced(weights, len(flat), size) for weights, flat, size in sizes]

    def _reduced(self, weights: list[Tensor], whole_size: int, own_size: int) -> Tensor:
        import deepspeed.comm as dist

        found = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        padding = weights[0].new_zeros(whole_size - sum(map(Tensor.numel, weights)))
        whole = torch.cat([*(one.reshape(-1) for one in found), padding])
        del found
        for weight in weights:
            weight.grad = None
        if self.world == 1:
            return whole
        whole.div_(self.world)  # first, or sums might not fit fp16's scaled gradients
        if not self.scattered:
            dist.all_reduce(whole, group=self.group)
            return whole[self.rank * own_size :][:own_size]
        own = whole.new_empty(own_size)
        dist.reduce_scatter_tensor(own, whole, group=self.group)
        return own

    @torch.no_grad()
    def step(self) -> None:
        """Clip the gradients, update this rank's part of the weights, and gather everybody's. Nothing changes where a
        gradient of any rank is not finite: `zero.overflow` tells."""
        zero, optimizer = self.zero, self.zero.optimizer
        norm = self._norm()
        zero._global_grad_norm = norm / zero.loss_scale
        divisor = zero.loss_scale * ((zero._global_grad_norm + 1e-6) / zero.clip_grad).clamp(min=1.0)
        finite = _Told(norm.isfinite())
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if fused:  # as torch.amp.GradScaler does
            optimizer.grad_scale, optimizer.found_inf = divisor, 1.0 - finite.there.float()
        elif finite:
            torch._foreach_div_(self.own, divisor)
        if fused or finite:
            for weights, gradients in zip(zero.single_partition_of_fp32_groups, self.own, strict=True):
                weights.grad = gradients
            optimizer.step()
            self._gather()
        optimizer.zero_grad()
        self.own = []
        zero.overflow = not finite
        zero._update_scale(zero.overflow)

    def _norm(self) -> Tensor:
        """Of all gradients of all ranks."""
        import deepspeed.comm as dist

        norm = torch.nn.utils.get_total_norm([piece for one in self.own for piece in one.split(PIECE)])
        if self.world == 1:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    def _gather(self) -> None:
        import deepspeed.comm as dist

        zero = self.zero
        groups = zip(zero.bit16_groups_flat, zero.parallel_partitioned_bit16_groups,
                     zero.single_partition_of_fp32_groups, strict=True)  # fmt: skip
        for whole, parts, updated in groups:
            parts[self.rank].copy_(updated)
            if self.world > 1:
                dist.all_gather_into_tensor(whole, parts[self.rank], group=self.group)


class _Told:
    """A truth that the device knows, on its way to the processor: waited for where it is asked."""

    def __init__(self, there: Tensor) -> None:
        self.there = self.here = there
        self.event: Any = None
        if there.is_cuda:
            self.here = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(there, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def __bool__(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return bool(self.here.item())
