"""A detector of a few thousand weights and its batches, for engines in real processes."""

import numpy as np
import torch

from framework.data.batch import Batch, Example, collate
from framework.models.backbone import BackboneConfig
from framework.models.build import ModelConfig, build_detector
from framework.models.detector import Detector

TINY = ModelConfig(
    num_classes=3, width=32, num_heads=2, encoder_layers=1, decoder_layers=2, ffn_width=32, num_queries=12,
    backbone=BackboneConfig("resnet10", norm="group", width=16),
)  # fmt: skip


def tiny_detector(seed: int = 0, config: ModelConfig = TINY) -> Detector:
    torch.manual_seed(seed)
    return build_detector(config)


def batch_of(number: int) -> Batch:
    """Two images, of ids 2 * number and the next, with two boxes each; the same for the same number."""
    generator = np.random.default_rng(number)
    return collate([
        Example(
            generator.integers(0, 255, (*size_hw, 3), dtype=np.uint8), 2 * number + i, size_hw,
            generator.uniform(0.2, 0.4, (2, 4)).astype(np.float32), generator.integers(0, 3, 2),
        )
        for i, size_hw in enumerate([(80, 96), (96, 72)])
    ])  # fmt: skip
