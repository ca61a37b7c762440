"""The work of a forward pass, counted by hand."""

import pytest

from benchmarks.flops import macs, sampling_macs
from framework.models.backbone import BackboneConfig
from framework.models.build import ModelConfig
from ops import MSDeformAttn

SMALL = dict(width=32, num_heads=2, encoder_layers=1, decoder_layers=1, ffn_width=48, num_queries=5, num_classes=3,
             backbone=BackboneConfig("resnet18", norm="group"))  # fmt: skip


def test_sampling():
    # 10 queries x 2 heads x 3 levels x 4 points, of 16 channels with 4 corners each
    assert sampling_macs(MSDeformAttn(32, 3, 2, 4), 10) == 240 * (64 + 16)


@pytest.mark.parametrize("dense", [False, True])
def test_parts(dense):
    """One level of 2 x 3 tokens (64 x 96 pixels at stride 32)."""
    changes = dict(attention="dense", classification="softmax") if dense else {}
    parts = macs(ModelConfig(**SMALL | changes, num_feature_levels=1), (64, 96))
    tokens, queries, width, ffn = 6, 5, 32, 48
    assert parts["projections"] == tokens * 512 * width
    feed_forward = 2 * width * ffn
    if dense:
        attention = tokens * 4 * width**2 + 2 * tokens * tokens * width
        assert parts["sampling"] == 0
    else:
        offsets_and_weights = width * 2 * 4 * 3
        attention = tokens * (2 * width**2 + offsets_and_weights)
        assert parts["sampling"] == (tokens + queries) * 2 * 4 * (4 * 16 + 16)
    assert parts["encoder"] == attention + tokens * feed_forward
    assert parts["decoder"] > queries * feed_forward
