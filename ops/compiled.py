"""Multi-scale deformable attention by the kernels in csrc/: the same functions as in `ops.reference`.

Coordinates, weights and sums are float32 (float64 when value is): arguments in other dtypes are converted on their
way, so that autocast may mix them. Deterministic; no number depends on how many threads there are.
"""

import torch
from torch import Tensor

from ops import library
from ops.reference import SpatialShapes, compute_dtype, level_sizes


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    library.check(value.device)
    prepared = _prepared(value, sampling_locations, attention_weights)
    return torch.ops.tenfold.ms_deform_attn(prepared[0], _flat(spatial_shapes), *prepared[1:])


def fused_ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    library.check(value.device)
    prepared = _prepared(value, reference_points, sampling_offsets, attention_logits)
    return torch.ops.tenfold.fused_ms_deform_attn(prepared[0], _flat(spatial_shapes), *prepared[1:])


def _prepared(value: Tensor, *others: Tensor) -> list[Tensor]:
    """Contiguous, as the kernels read them: here, where torch itself says when its memory does not suffice."""
    dtype = compute_dtype(value)
    return [value.contiguous(), *(tensor.to(dtype).contiguous() for tensor in others)]


def _flat(spatial_shapes: SpatialShapes) -> list[int]:
    return [side for size_hw in level_sizes(spatial_shapes) for side in size_hw]
