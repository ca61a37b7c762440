"""Multi-scale deformable attention: `from ops import MSDeformAttn` works in anybody's model."""

from ops.ms_deform_attn import MSDeformAttn, fused_ms_deform_attn, ms_deform_attn

__all__ = ["MSDeformAttn", "fused_ms_deform_attn", "ms_deform_attn"]
