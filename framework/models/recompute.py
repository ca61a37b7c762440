"""How a layer of encoder or decoder runs: with all activations kept for backward, none, or those dear to compute.

Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from framework.models.on_cpu import has_kernel_here

Layer = Callable[..., Tensor]

SAMPLING = frozenset({"tenfold::fused_ms_deform_attn"})
PRODUCTS = frozenset({"aten::mm", "aten::addmm"})


def run(layer: Layer, *inputs: object) -> Tensor:
    return layer(*inputs)


def recomputed(layer: Layer, *inputs: object) -> Tensor:
    """Keep no activations of the layer but its inputs; compute them again in backward."""
    return checkpoint(layer, *inputs, use_reentrant=False)


def dear_parts_kept(layer: Layer, x: Tensor, *inputs: object) -> Tensor:
    """Keep what the operator and matrix products gave, but for products wider than what they are made of. The rest is
    computed again: norms, dropout, sums, casts, and the wide half of a feed-forward layer, a third of the layer's
    products. Dense attention too: its dropout draws numbers inside, and those after it would be others without.

    On a CPU, whose kernels use the memory of products up, only what the operator gave is kept.
    """
    kept = SAMPLING if has_kernel_here(x) else SAMPLING | PRODUCTS
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
    return checkpoint(layer, x, *inputs, use_reentrant=False, context_fn=contexts)


def _policy(kept: frozenset[str], _context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name()
    wider = name in PRODUCTS and args[-1].shape[1] > args[-1].shape[0]  # weights come last: (in, out)
    return CheckpointPolicy.MUST_SAVE if name in kept and not wider else CheckpointPolicy.PREFER_RECOMPUTE
