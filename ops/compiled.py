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
    dtype = compute_dtype(value)
    return torch.ops.tenfold.ms_deform_attn(
        value, _flat(spatial_shapes), sampling_locations.to(dtype), attention_weights.to(dtype)
    )


def fused_ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    library.check(value.device)
    dtype = compute_dtype(value)
    return torch.ops.tenfold.fused_ms_deform_attn(
        value,
        _flat(spatial_shapes),
        reference_points.to(dtype),
        sampling_offsets.to(dtype),
        attention_logits.to(dtype),
    )


def _flat(spatial_shapes: SpatialShapes) -> list[int]:
    return [side for size_hw in level_sizes(spatial_shapes) for side in size_hw]
