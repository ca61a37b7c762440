"""The public operators and the attention module of Deformable DETR.

Both functions run the kernels of `ops.compiled`. With TENFOLD_OP=reference in the environment they run
`ops.reference` instead: plain torch, many times slower, on every device torch has.
"""

# B image, L level, S = sum of H*W over levels, D model width, M head, E head width, Q query, P point, K = L*P

import math

import torch
from torch import Tensor, nn

from ops import chosen, reference
from ops.linear import Linear, cast_once
from ops.reference import SpatialShapes

MAX_POINTS = 512  # L*P, as in csrc/problem.h


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum bilinear samples of every level's map, weighted, for each query and head: the published op.

    Args:
        value: (B, S, M, E), levels one after the other, rows first; float32, bfloat16, float64, on GPUs also
            float16.
        spatial_shapes: (H, W) of each level: host integers, or a tensor (L, 2), which a GPU has to wait for.
        sampling_locations: (B, Q, M, L, P, 2), x then y, in [0, 1] over the level; outside there are zeros.
        attention_weights: (B, Q, M, L, P).
    Returns:
        (B, Q, M*E) in value's dtype. Coordinates and sums are float32 (float64 when value is), whatever the
        dtypes of the arguments, which may differ; autocast changes nothing here.
    Raises:
        ValueError: an argument does not fit; names it, what was found and what was expected.
    """
    sizes_hw = _checked_sizes(spatial_shapes)
    B, L, M = _check_value(value, sizes_hw)
    _check("sampling_locations", sampling_locations, value, B=B, Q=None, M=M, L=L, P=None, xy=2)
    Q, P = sampling_locations.shape[1], sampling_locations.shape[4]
    _check("attention_weights", attention_weights, value, B=B, Q=Q, M=M, L=L, P=P)
    _check_points("sampling_locations", L, P)
    return chosen.implementation.ms_deform_attn(value, sizes_hw, sampling_locations, attention_weights)


def fused_ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn` with the sampling locations and the softmax inside.

    Args:
        value, spatial_shapes: as in `ms_deform_attn`.
        reference_points: (B, Q, L, 2) points x, y or (B, Q, L, 4) boxes cx, cy, w, h, as fractions of each
            level's padded map, that is already times the valid ratios; float32 (float64 when value is).
        sampling_offsets: (B, Q, M, L, P, 2), x then y: around a point in pixels of each level, around a box
            the sample lies at xy + offset / P * wh * 0.5.
        attention_logits: (B, Q, M, L*P), before the softmax over L*P.
    Returns:
        (B, Q, M*E) in value's dtype; dtypes are treated as in `ms_deform_attn`.
    Raises:
        ValueError: an argument does not fit; names it, what was found and what was expected.
    """
    sizes_hw = _checked_sizes(spatial_shapes)
    B, L, M = _check_value(value, sizes_hw)
    _check("sampling_offsets", sampling_offsets, value, B=B, Q=None, M=M, L=L, P=None, xy=2)
    Q, P = sampling_offsets.shape[1], sampling_offsets.shape[4]
    _check_references("reference_points", reference_points, value, B, Q, L)
    _check("attention_logits", attention_logits, value, B=B, Q=Q, M=M, LP=L * P)
    _check_points("sampling_offsets", L, P)
    return chosen.implementation.fused_ms_deform_attn(
        value, sizes_hw, reference_points, sampling_offsets, attention_logits
    )


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention: each query looks at a few points of every level, around a reference.

    Source: Zhu et al. 2021, section 4.1. Parameter names, the order (M, L, P, xy) of their rows and the
    initialisation are the published ones.
    """

    def __init__(self, width: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        for name, number in dict(
            width=width, num_levels=num_levels, num_heads=num_heads, num_points=num_points
        ).items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name}: {number!r}, expected an integer of at least 1")
        if width % num_heads:
            raise ValueError(f"width: {width}, expected a multiple of num_heads ({num_heads})")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = Linear(width, num_heads * num_levels * num_points * 2)
        self.attention_weights = Linear(width, num_heads * num_levels * num_points)
        self.value_proj = Linear(width, width)
        self.output_proj = Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each head starts by looking in a direction of its own, at 1..P pixels, with equal weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(self._star())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query_BQD: Tensor,
        references_BQLN: Tensor,
        memory_BSD: Tensor,
        spatial_shapes: SpatialShapes,
        padding_mask_BS: Tensor | None = None,
    ) -> Tensor:
        """Attend from queries to the maps in memory.

        Args:
            query_BQD: with its position embedding added.
            references_BQLN: points (N=2: x, y) or boxes (N=4: cx, cy, w, h), fractions of each level's padded
                map, that is already times the valid ratios; float32, also under autocast.
            memory_BSD: the maps, levels one after the other, rows first.
            spatial_shapes: (H, W) of each level, host integers.
            padding_mask_BS: True on padding, which then reads as zeros.
        Returns:
            (B, Q, D).
        Raises:
            ValueError: an argument does not fit; names it, what was found and what was expected.
        """
        M, L, D = self.num_heads, self.num_levels, self.value_proj.in_features
        _check("query", query_BQD, None, B=None, Q=None, D=D)
        B, Q, _ = query_BQD.shape
        _check("memory", memory_BSD, query_BQD, B=B, S=None, D=D)
        _check_references("references", references_BQLN, query_BQD, B, Q, L)
        sizes_hw = _checked_sizes(spatial_shapes)
        if len(sizes_hw) != L:
            raise ValueError(f"spatial_shapes: {len(sizes_hw)} levels, expected num_levels = {L}")
        value_BSD = self.value_proj(memory_BSD)
        if padding_mask_BS is not None:
            _check_mask(padding_mask_BS, memory_BSD)
            value_BSD = value_BSD.masked_fill(padding_mask_BS[..., None], 0)
        value_BSME = value_BSD.unflatten(-1, (M, D // M))
        wanted = self._offsets_and_logits(query_BQD)
        return self.output_proj(fused_ms_deform_attn(value_BSME, sizes_hw, references_BQLN, *wanted))

    def sampling(
        self, query_BQD: Tensor, references_BQLN: Tensor, spatial_shapes: SpatialShapes
    ) -> tuple[Tensor, Tensor]:
        """Where `forward` looks, and with what weights, of the same arguments: to be shown, not trained on.

        Returns:
            The sampling_locations (B, Q, M, L, P, 2) and attention_weights (B, Q, M, L, P) of `ms_deform_attn`,
            float32 (float64 when the query is).
        """
        offsets_xy, logits = self._offsets_and_logits(query_BQD)
        dtype = reference.compute_dtype(query_BQD)
        return reference.sampling(references_BQLN, offsets_xy, logits, spatial_shapes, dtype)

    def _offsets_and_logits(self, query_BQD: Tensor) -> tuple[Tensor, Tensor]:
        """sampling_offsets (B, Q, M, L, P, 2) and attention_logits (B, Q, M, L*P) of `fused_ms_deform_attn`."""
        M, L, P = self.num_heads, self.num_levels, self.num_points
        query_BQD = cast_once(query_BQD)
        offsets_xy = self.sampling_offsets(query_BQD).unflatten(-1, (M, L, P, 2))
        return offsets_xy, self.attention_weights(query_BQD).unflatten(-1, (M, L * P))

    def _star(self) -> Tensor:
        """Offsets (M*L*P*2): M directions, a circle stretched to a square, times 1..P, at every level."""
        angles_M = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions_M2 = torch.stack([angles_M.cos(), angles_M.sin()], dim=-1)
        directions_M2 = directions_M2 / directions_M2.abs().amax(dim=-1, keepdim=True)
        steps_P1 = torch.arange(1, self.num_points + 1, dtype=torch.float32)[:, None]
        star_MLP2 = (directions_M2[:, None, None] * steps_P1).expand(-1, self.num_levels, -1, -1)
        return star_MLP2.flatten()


def _check_value(value: Tensor, sizes_hw: list[tuple[int, int]]) -> tuple[int, int, int]:
    """Batch size, levels and heads, once value and the levels fit each other."""
    _check("value", value, None, B=None, S=None, M=None, E=None)
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    if value.device.type != "cpu":
        dtypes.append(torch.float16)
    if value.dtype not in dtypes:
        raise ValueError(f"value: {value.dtype} on {value.device.type}, expected one of {dtypes}")
    tokens = sum(height * width for height, width in sizes_hw)
    if value.shape[1] != tokens:
        raise ValueError(f"value: S = {value.shape[1]}, expected {tokens}, the sum of H*W over {sizes_hw}")
    return value.shape[0], len(sizes_hw), value.shape[2]


def _checked_sizes(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    try:
        sizes_hw = reference.level_sizes(spatial_shapes)
    except (TypeError, ValueError):
        sizes_hw = []
    if not sizes_hw or min(min(size) for size in sizes_hw) < 1:
        found = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
        raise ValueError(f"spatial_shapes: {found}, expected integers (H, W) >= 1 for each level")
    return sizes_hw


def _check_points(name: str, L: int, P: int) -> None:
    if L * P > MAX_POINTS:
        raise ValueError(f"{name}: L*P = {L} * {P} points, expected at most {MAX_POINTS}")


def _check_references(name: str, references: Tensor, like: Tensor, B: int, Q: int, L: int) -> None:
    _check(name, references, like, B=B, Q=Q, L=L, N=None)
    numbers = references.shape[-1]
    if numbers not in (2, 4):
        raise ValueError(f"{name}: {numbers} numbers each, expected 2 (x, y) or 4 (cx, cy, w, h)")


def _check_mask(padding_mask: Tensor, memory: Tensor) -> None:
    expected = f"expected torch.bool of shape {tuple(memory.shape[:2])} on {memory.device}"
    if not isinstance(padding_mask, Tensor):
        raise ValueError(f"padding_mask: {type(padding_mask).__name__}, {expected}")
    if (padding_mask.dtype, padding_mask.shape, padding_mask.device) != (torch.bool, memory.shape[:2], memory.device):
        found = f"{padding_mask.dtype} of shape {tuple(padding_mask.shape)} on {padding_mask.device}"
        raise ValueError(f"padding_mask: {found}, {expected}")


def _check(name: str, tensor: Tensor, like: Tensor | None, **axes: int | None) -> None:
    """Raise ValueError unless tensor is floating, on the device of `like` and of these axes.

    An axis of None may have any size; only images and queries may be none at all.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: {found}, expected a floating-point tensor")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: on {tensor.device}, expected {like.device} like the arguments before it")
    fits = tensor.ndim == len(axes) and all(
        found == size if size is not None else (found > 0 or axis in ("B", "Q"))
        for found, (axis, size) in zip(tensor.shape, axes.items(), strict=True)
    )
    if not fits:
        expected = ", ".join(axis if size is None else f"{axis}={size}" for axis, size in axes.items())
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected ({expected})")
