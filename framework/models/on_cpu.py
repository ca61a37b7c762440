"""What a CPU trains with instead of a row of torch's operators: functions whose gradients are written by hand.

Memory that is touched for the first time costs a CPU as much as computing what is written there. So results go where
they belong, gradients add up in place, and backward writes to memory that it has read for the last time or computes
again what one pass over memory gives.

# B image, S token, Q query, D model width, F hidden width, M head, E head width
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import has_torch_function

from ops.dropout import Mode, has_kernel, new_seed, run, used_up
from ops.linear import product, tall_product

EPSILON = nn.LayerNorm(1).eps
norm_backward = torch.ops.aten.native_layer_norm_backward
softmax_backward = torch.ops.aten._softmax_backward_data


def has_kernel_here(x: Tensor) -> bool:
    """And nobody takes the place of torch's functions, as who counts what a GPU would keep does."""
    return has_kernel(x, x.dtype) and not has_torch_function((x,))


def trains_on_cpu(layer: nn.Module, x: Tensor) -> bool:
    """With weights and in the float32 that one sees: not under autocast, where nothing is gained, nor under ZeRO 3,
    where weights are there only while the module that has them computes."""
    return (
        layer.training
        and torch.is_grad_enabled()
        and x.dtype == torch.float32
        and has_kernel_here(x)
        and not torch.is_autocast_enabled("cpu")
        and not any(hasattr(weight, "ds_id") for weight in layer.parameters())
    )


class AfterAttention(torch.autograd.Function):
    """What follows attention in an encoder layer.

    norm2(y + dropout(linear2(dropout(relu(linear1(y)))))) of y = norm1(tokens + dropout(looked)), in float32.
    Weights come as the formula is computed, each before its bias. The memory of looked is used up.
    """

    @staticmethod
    def forward(ctx: Any, looked_BSD: Tensor, tokens_BSD: Tensor, p: float, *weights: Tensor) -> Tensor:
        norm1, bias_norm1, linear1, bias1, linear2, bias2, norm2, bias_norm2 = weights
        looked_BSD, tokens_BSD = looked_BSD.contiguous(), tokens_BSD.contiguous()
        ctx.p, ctx.seeds = p, [new_seed() for _ in range(3)]
        x_BSD = run(Mode.ADD, looked_BSD, tokens_BSD, ctx.seeds[0], p, out=used_up(looked_BSD))
        y_BSD, *of_x = torch.native_layer_norm(x_BSD, norm1.shape, norm1, bias_norm1, EPSILON)
        hidden_BSF = product(y_BSD, linear1, bias1)
        run(Mode.RELU, hidden_BSF, None, ctx.seeds[1], p, out=hidden_BSF)
        z_BSD = product(hidden_BSF, linear2, bias2)
        run(Mode.ADD, z_BSD, y_BSD, ctx.seeds[2], p, out=z_BSD)
        out_BSD, *of_z = torch.native_layer_norm(z_BSD, norm2.shape, norm2, bias_norm2, EPSILON)
        ctx.save_for_backward(x_BSD, *of_x, y_BSD, hidden_BSF, z_BSD, *of_z, *weights)
        return out_BSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor | None, ...]:
        x_BSD, mean_x, scale_x, y_BSD, hidden_BSF, z_BSD, mean_z, scale_z, *weights = ctx.saved_tensors
        norm1, bias_norm1, linear1, bias1, linear2, bias2, norm2, bias_norm2 = weights
        grad_y_BSD, *grads_norm2 = norm_backward(
            grad_BSD.contiguous(), z_BSD, norm2.shape, mean_z, scale_z, norm2, bias_norm2, [True] * 3
        )
        grad_ND = run(Mode.PLAIN, grad_y_BSD, None, ctx.seeds[2], ctx.p, out=used_up(z_BSD)).flatten(0, 1)
        hidden_NF = hidden_BSF.flatten(0, 1)
        grads_linear2 = tall_product(grad_ND, hidden_NF), grad_ND.sum(0)
        grad_NF = product(grad_ND, linear2.t())
        run(Mode.GATE, grad_NF, hidden_NF, ctx.seeds[1], ctx.p, out=grad_NF)
        grads_linear1 = tall_product(grad_NF, y_BSD.flatten(0, 1)), grad_NF.sum(0)
        grad_y_BSD += product(grad_NF, linear1.t()).view_as(grad_y_BSD)
        grad_x_BSD, *grads_norm1 = norm_backward(
            grad_y_BSD, x_BSD, norm1.shape, mean_x, scale_x, norm1, bias_norm1, [True] * 3
        )
        grad_looked_BSD = run(Mode.PLAIN, grad_x_BSD, None, ctx.seeds[0], ctx.p, out=used_up(x_BSD))
        return grad_looked_BSD, grad_x_BSD, None, *grads_norm1, *grads_linear1, *grads_linear2, *grads_norm2


class Attend(torch.autograd.Function):
    """dropout(softmax(query key^T)) value, of whose matrices (B, M, Q, S) the softmax alone is kept.

    query: (B, M, Q, E), scaled; key and value: (B, M, S, E); float32. padding: None or bool (B, S), True on what is not
    seen.
    """

    @staticmethod
    def forward(
        ctx: Any, query_BMQE: Tensor, key_BMSE: Tensor, value_BMSE: Tensor, padding_BS: Tensor | None, p: float
    ) -> Tensor:
        looks_BMQS = query_BMQE @ key_BMSE.transpose(-2, -1)
        if padding_BS is not None:
            looks_BMQS.masked_fill_(padding_BS[:, None, None], -torch.inf)
        torch.softmax(looks_BMQS, -1, out=looks_BMQS)
        ctx.p, ctx.seed = p, new_seed()
        ctx.save_for_backward(query_BMQE, key_BMSE, value_BMSE, looks_BMQS)
        return _dropped(ctx, looks_BMQS, torch.empty_like(looks_BMQS)) @ value_BMSE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BMQE: Tensor) -> tuple[Tensor | None, ...]:
        query_BMQE, key_BMSE, value_BMSE, looks_BMQS = ctx.saved_tensors
        memory_BMQS = torch.empty_like(looks_BMQS)
        grad_value_BMSE = _dropped(ctx, looks_BMQS, memory_BMQS).transpose(-2, -1) @ grad_BMQE
        grad_BMQS = torch.matmul(grad_BMQE, value_BMSE.transpose(-2, -1), out=memory_BMQS)
        _dropped(ctx, grad_BMQS, grad_BMQS)
        softmax_backward(grad_BMQS, looks_BMQS, -1, torch.float32, grad_input=grad_BMQS)
        return grad_BMQS @ key_BMSE, grad_BMQS.transpose(-2, -1) @ query_BMQE, grad_value_BMSE, None, None


def _dropped(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
    return run(Mode.PLAIN, x, None, ctx.seed, ctx.p, out)
