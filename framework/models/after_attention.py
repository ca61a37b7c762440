"""What follows attention in an encoder layer that trains on a CPU in float32: one function, its gradients by hand.

EncoderLayer says what it computes. Memory that is touched for the first time costs a CPU as much as computing what is
written there. So results go where they belong, gradients add up within products of matrices, and backward writes to
memory that it has read for the last time.

# B image, S token, D model width, F hidden width
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.overrides import has_torch_function

from ops.dropout import Mode, has_kernel, new_seed, run, used_up

EPSILON = nn.LayerNorm(1).eps
norm_backward = torch.ops.aten.native_layer_norm_backward


def has_kernel_here(x: Tensor) -> bool:
    """And nobody takes the place of torch's functions, as who counts what a GPU would keep does."""
    return has_kernel(x, x.dtype) and not has_torch_function((x,))


def trains_on_cpu(layer: nn.Module, x: Tensor) -> bool:
    """With weights and in the float32 that one sees: not under autocast, nor under ZeRO 3, where weights are there only
    while the module that has them computes."""
    return (
        layer.training
        and torch.is_grad_enabled()
        and x.dtype == torch.float32
        and has_kernel_here(x)
        and not torch.is_autocast_enabled("cpu")
        and not any(hasattr(weight, "ds_id") for weight in layer.parameters())
    )


class AfterAttention(torch.autograd.Function):
    """norm2(y + dropout(linear2(dropout(relu(linear1(y)))))) of y = norm1(tokens + dropout(looked)).

    Weights come as the formula is computed, each before its bias. The memory of looked is used up.
    """

    @staticmethod
    def forward(ctx: Any, looked_BSD: Tensor, tokens_BSD: Tensor, p: float, *weights: Tensor) -> Tensor:
        norm1, bias_norm1, linear1, bias1, linear2, bias2, norm2, bias_norm2 = weights
        looked_BSD, tokens_BSD = looked_BSD.contiguous(), tokens_BSD.contiguous()
        ctx.p, ctx.seeds = p, [new_seed() for _ in range(3)]
        x_BSD = run(Mode.ADD, looked_BSD, tokens_BSD, ctx.seeds[0], p, out=used_up(looked_BSD))
        y_BSD, *of_x = torch.native_layer_norm(x_BSD, norm1.shape, norm1, bias_norm1, EPSILON)
        hidden_BSF = linear(y_BSD, linear1, bias1)
        run(Mode.RELU, hidden_BSF, None, ctx.seeds[1], p, out=hidden_BSF)
        z_BSD = linear(hidden_BSF, linear2, bias2)
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
        grads_linear2 = grad_ND.t() @ hidden_NF, grad_ND.sum(0)
        grad_NF = grad_ND @ linear2
        run(Mode.GATE, grad_NF, hidden_NF, ctx.seeds[1], ctx.p, out=grad_NF)
        grads_linear1 = grad_NF.t() @ y_BSD.flatten(0, 1), grad_NF.sum(0)
        grad_y_BSD.flatten(0, 1).addmm_(grad_NF, linear1)
        grad_x_BSD, *grads_norm1 = norm_backward(
            grad_y_BSD, x_BSD, norm1.shape, mean_x, scale_x, norm1, bias_norm1, [True] * 3
        )
        grad_looked_BSD = run(Mode.PLAIN, grad_x_BSD, None, ctx.seeds[0], ctx.p, out=used_up(x_BSD))
        return grad_looked_BSD, grad_x_BSD, None, *grads_norm1, *grads_linear1, *grads_linear2, *grads_norm2
