"""Multi-scale deformable attention in plain torch: what kernels are measured against, what runs without them.

Differentiable in every floating argument, on every device torch has. Arguments have the names, shapes and
dtypes of those in `ops.ms_deform_attn` and are not checked here: the functions there do that.
"""

# B image, L level, T = H*W, S = sum of T over levels, M head, E head width, Q query, P point, N = 2 or 4
# numbers of a reference; G = B*M, grid_sample's batch, since each head of each image has a map of its own

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SpatialShapes = Sequence[tuple[int, int]] | Tensor


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum bilinear samples of every level's map, weighted, for each query and head.

    Source: Zhu et al. 2021, equation 3. x in [0, 1] is pixel x*W - 0.5, as in the published kernel.
    """
    B, _, M, E = value.shape
    _, Q, _, _, P, _ = sampling_locations.shape
    sizes_hw = level_sizes(spatial_shapes)
    dtype = compute_dtype(value)
    # Level by level, with points before queries so that their sum runs over whole rows: about 1.7 times as
    # fast as stacking all levels (24x24 to 3x3, one CPU thread). One gather or embedding_bag over all corners
    # takes 3 times as long there: its backward scatters or sorts 4*L*P rows for each query and head.
    with torch.autocast(value.device.type, enabled=False):
        levels_BTME = value.to(dtype).split([height * width for height, width in sizes_hw], dim=1)
        # NaN and infinity are outside, as for the kernels; grid_sample would make NaN of them.
        grid_xy_BQMLP2 = (2 * sampling_locations.to(dtype) - 1).nan_to_num(nan=1e9, posinf=1e9, neginf=-1e9)
        weights_BQMLP = attention_weights.to(dtype)
        out_GEQ = value.new_zeros(B * M, E, Q, dtype=dtype)
        for level, (H, W) in enumerate(sizes_hw):
            map_GEHW = levels_BTME[level].permute(0, 2, 3, 1).reshape(B * M, E, H, W)
            grid_GPQ2 = grid_xy_BQMLP2[:, :, :, level].permute(0, 2, 3, 1, 4).reshape(B * M, P, Q, 2)
            weights_G1PQ = weights_BQMLP[:, :, :, level].permute(0, 2, 3, 1).reshape(B * M, 1, P, Q)
            samples_GEPQ = F.grid_sample(map_GEHW, grid_GPQ2, padding_mode="zeros", align_corners=False)
            out_GEQ = out_GEQ + (samples_GEPQ * weights_G1PQ).sum(dim=2)
        return out_GEQ.view(B, M * E, Q).transpose(1, 2).to(value.dtype)


def fused_ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn` with the sampling locations and the softmax over levels and points computed here."""
    sampled = sampling(reference_points, sampling_offsets, attention_logits, spatial_shapes, compute_dtype(value))
    return ms_deform_attn(value, spatial_shapes, *sampled)


def sampling(
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    spatial_shapes: SpatialShapes,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Where to sample and how much each sample counts: sampling_locations, attention_weights of `ms_deform_attn`."""
    with torch.autocast(reference_points.device.type, enabled=False):
        locations = sampling_locations(reference_points.to(dtype), sampling_offsets.to(dtype), spatial_shapes)
        return locations, attention_logits.to(dtype).softmax(dim=-1).reshape(locations.shape[:-1])


def sampling_locations(references_BQLN: Tensor, offsets_xy_BQMLP2: Tensor, spatial_shapes: SpatialShapes) -> Tensor:
    """Where to sample, (B, Q, M, L, P, 2), as x, y in [0, 1] over the level.

    Around a point, offsets are pixels of the level. Around a box, an offset of P is half its width or height:
    the initial offsets 1..P reach from its centre to its edge.
    """
    references_BQ1L1N = references_BQLN[:, :, None, :, None]
    if references_BQLN.shape[-1] == 2:
        sizes_wh = [(width, height) for height, width in level_sizes(spatial_shapes)]
        return references_BQ1L1N + offsets_xy_BQMLP2 / references_BQLN.new_tensor(sizes_wh)[:, None]
    num_points = offsets_xy_BQMLP2.shape[4]
    return references_BQ1L1N[..., :2] + offsets_xy_BQMLP2 / num_points * references_BQ1L1N[..., 2:] * 0.5


def level_sizes(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    """(H, W) of each level as host integers; for a tensor on a GPU the host has to wait."""
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return [(_integer(height), _integer(width)) for height, width in rows]


def _integer(side: Any) -> Any:
    # operator.index would fix a size that torch.compile keeps symbolic, and compile again for every other one.
    return side if isinstance(side, int | torch.SymInt) else operator.index(side)


def compute_dtype(value: Tensor) -> torch.dtype:
    """Of coordinates, weights and sums: coordinates in bfloat16 would be off by pixels."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32
