"""ZeRO 1 in few operations: what DeepSpeed 0.19.8 does for each weight in Python is done for all of them at once.

After the last backward pass of a step gradients are put side by side as DeepSpeed has put the weights: a flat tensor
for each parameter group, of which each rank updates a part of equal length.
"""

from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 18  # numbers whose squares a CPU sums in a row; of more, float32 loses digits


class GradientsAtOnce:
    """Takes the place of `reduce_gradients` and `step` of `zero`, DeepSpeed's optimizer at stage 1.

    Gradients are sent as float32 and scattered: in lower precision as many bytes as DeepSpeed sends, which all-reduces
    most of them in 16 bits; in float32 half. torch's fused AdamW is told on the device that a gradient is not finite
    and then does nothing, so that a GPU updates weights and sends them while the processor still waits to hear of it;
    other AdamWs are called afterwards.
    """

    def __init__(self, zero: Any) -> None:
        import deepspeed.comm as dist

        assert not zero.round_robin_gradients and not zero.parameter_alignment  # weights would lie otherwise
        self.zero, self.group = zero, zero.dp_process_group
        self.world, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.scattered = torch.distributed.get_backend(self.group) != "gloo"  # whose reduce-scatter is an all-reduce
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
        whole.div_(self.world)
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
        own, self.own = self.own, []
        norm = self._norm(own)
        zero._global_grad_norm = norm / zero.loss_scale
        divisor = zero.loss_scale * ((zero._global_grad_norm + 1e-6) / zero.clip_grad).clamp(min=1.0)
        finite = norm.isfinite()
        told = _Told(finite)
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # as torch.amp.GradScaler asks and does
            optimizer.grad_scale, optimizer.found_inf = divisor, 1.0 - finite.float()
            try:
                self._update(own)
            finally:  # it may end for want of memory, which a rehearsal survives
                del optimizer.grad_scale, optimizer.found_inf
        elif told:
            torch._foreach_div_(own, divisor)
            self._update(own)
        zero.overflow = not told
        zero._update_scale(zero.overflow)

    def _norm(self, own: list[Tensor]) -> Tensor:
        """Of all gradients of all ranks."""
        import deepspeed.comm as dist

        pieces = own if own[0].is_cuda else [piece for one in own for piece in one.split(PIECE)]
        norm = torch.nn.utils.get_total_norm(pieces)
        if self.world == 1:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    def _update(self, own: list[Tensor]) -> None:
        import deepspeed.comm as dist

        zero = self.zero
        for weights, gradients in zip(zero.single_partition_of_fp32_groups, own, strict=True):
            weights.grad = gradients
        zero.optimizer.step()
        zero.optimizer.zero_grad()
        groups = zip(zero.bit16_groups_flat, zero.parallel_partitioned_bit16_groups,
                     zero.single_partition_of_fp32_groups, strict=True)  # fmt: skip
        for whole, parts, updated in groups:
            parts[self.rank].copy_(updated)
            if self.world > 1:
                dist.all_gather_into_tensor(whole, parts[self.rank], group=self.group)


class _Told:
    """A truth of the device on its way to the processor, which waits for it where it asks."""

    def __init__(self, there: Tensor) -> None:
        self.here, self.event = there, None
        if there.is_cuda:
            self.here = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(there, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def __bool__(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return bool(self.here.item())
