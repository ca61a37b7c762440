"""Multi-scale deformable attention as loops over plain floats: too slow to use, too plain to be wrong."""

import math

import torch
from torch import Tensor

Size = tuple[int, int]  # height, width


def ms_deform_attn(value: Tensor, sizes_hw: list[Size], locations: Tensor, weights: Tensor) -> Tensor:
    """value (B, S, M, E), locations (B, Q, M, L, P, 2), weights (B, Q, M, L, P) -> (B, Q, M*E) float64."""
    B, _, M, E = value.shape
    _, Q, _, L, P, _ = locations.shape
    levels = _split(value.tolist(), sizes_hw)
    at, weight = locations.tolist(), weights.tolist()
    out = [[[0.0] * (M * E) for _ in range(Q)] for _ in range(B)]
    for b in range(B):
        for q in range(Q):
            for m in range(M):
                for level in range(L):
                    for p in range(P):
                        x, y = at[b][q][m][level][p]
                        for e in range(E):
                            sample = _bilinear(levels[b][level], sizes_hw[level], x, y, m, e)
                            out[b][q][m * E + e] += weight[b][q][m][level][p] * sample
    return torch.tensor(out, dtype=torch.float64)


def fused_ms_deform_attn(
    value: Tensor, sizes_hw: list[Size], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """references (B, Q, L, 2 or 4), offsets (B, Q, M, L, P, 2), logits (B, Q, M, L*P) -> (B, Q, M*E)."""
    locations = torch.zeros(offsets.shape, dtype=torch.float64)
    weights = torch.zeros(offsets.shape[:-1], dtype=torch.float64)
    B, Q, M, L, P, _ = offsets.shape
    for b in range(B):
        for q in range(Q):
            for m in range(M):
                exponentials = [math.exp(logit) for logit in logits[b, q, m].tolist()]
                for level in range(L):
                    center, span = _center_and_span(references[b, q, level].tolist(), sizes_hw[level], P)
                    for p in range(P):
                        weights[b, q, m, level, p] = exponentials[level * P + p] / sum(exponentials)
                        for axis in (0, 1):
                            offset = offsets[b, q, m, level, p, axis].item()
                            locations[b, q, m, level, p, axis] = center[axis] + offset * span[axis]
    return ms_deform_attn(value, sizes_hw, locations, weights)


def _center_and_span(reference: list[float], size_hw: Size, num_points: int) -> tuple[list[float], list[float]]:
    """Where offsets start, and how far an offset of 1 leads in x and y."""
    if len(reference) == 2:
        return reference, [1 / size_hw[1], 1 / size_hw[0]]
    return reference[:2], [reference[2] / num_points / 2, reference[3] / num_points / 2]


def _split(value: list, sizes_hw: list[Size]) -> list:
    """maps[b][level][row * width + column][m][e]"""
    maps = []
    for image in value:
        start, levels = 0, []
        for height, width in sizes_hw:
            levels.append(image[start : start + height * width])
            start += height * width
        maps.append(levels)
    return maps


def _bilinear(tokens: list, size_hw: Size, x: float, y: float, m: int, e: int) -> float:
    """The map at x, y in [0, 1]: pixel centres are at (i + 0.5) / size; outside the map there are zeros."""
    height, width = size_hw
    column, row = x * width - 0.5, y * height - 0.5
    total = 0.0
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(column), math.floor(column) + 1):
            if 0 <= r < height and 0 <= c < width:
                total += (1 - abs(row - r)) * (1 - abs(column - c)) * tokens[r * width + c][m][e]
    return total
