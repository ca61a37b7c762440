"""Sine position codes: of the pixels of a map, and of boxes.

# B image, H and W height and width, D code width, Q query
"""

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def sine_position(padding_BHW: Tensor, width: int, *, offset: float) -> Tensor:
    """Code of each pixel's place within the unpadded part of its image.

    Args:
        padding_BHW: bool, True on padding.
        width: D, a multiple of 4: one half codes y, the other x.
        offset: added to the 1-based pixel count before normalising: -0.5 (pixel centres) in Deformable DETR,
            0 in DETR.
    Returns:
        float32 (B, H, W, D).
    Source: Carion et al. 2020, section 3.2; Vaswani et al. 2017, section 3.5.
    """
    inside = (~padding_BHW).float()
    y, x = inside.cumsum(1), inside.cumsum(2)
    y = (y + offset) / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = (x + offset) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    return torch.cat([_waves(y, width // 2), _waves(x, width // 2)], dim=-1)


def sine_box_code(boxes_BQ4: Tensor, width: int) -> Tensor:
    """Code of boxes (fractions, in [0, 1]): (B, Q, 4) -> (B, Q, 4 * width). Source: Zhu et al. 2021, A.4."""
    return _waves(boxes_BQ4 * (2 * math.pi), width).flatten(-2)


def _waves(angles: Tensor, width: int) -> Tensor:
    """(...) -> (..., width): sine and cosine in turn, at wavelengths from 2 pi to 2 pi * TEMPERATURE."""
    exponent = torch.arange(width, device=angles.device) // 2 * (2 / width)
    phase = angles[..., None] / TEMPERATURE**exponent
    return torch.stack([phase[..., 0::2].sin(), phase[..., 1::2].cos()], dim=-1).flatten(-2)
