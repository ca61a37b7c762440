"""Multi-scale deformable attention: `from ops import MSDeformAttn` works in anybody's model."""

from ops.assignment import assign
from ops.ms_deform_attn import MSDeformAttn, fused_ms_deform_attn, ms_deform_attn

__all__ = ["MSDeformAttn", "assign", "fused_ms_deform_attn", "ms_deform_attn"]
