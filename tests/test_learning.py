"""Loader's batches, model, loss, optimizer and post-processing together: can they learn four images?"""

import numpy as np
import torch

from framework.boxes import generalized_iou
from framework.data.batch import Example, collate
from framework.engine.optimizer import OptimConfig, build_optimizer
from framework.evaluation.detections import top_detections
from framework.losses.criterion import Criterion, LossConfig
from framework.models.backbone import BackboneConfig
from framework.models.build import ModelConfig, build_detector
from tests.colours import painted

BOXES_PX = [((2, 4, 30, 26), (34, 30, 60, 60)), ((8, 30, 26, 60), (36, 2, 62, 20)),
            ((20, 20, 50, 44), (2, 2, 14, 30)), ((30, 6, 60, 40), (4, 40, 24, 62))]  # fmt: skip


def test_four_images_are_learnt():
    torch.manual_seed(0)
    config = ModelConfig(queries="proposals", refine_boxes=True, width=64, num_heads=4, encoder_layers=1,
                         decoder_layers=2, ffn_width=64, num_queries=8, num_feature_levels=2, num_classes=2,
                         dropout=0.0, backbone=BackboneConfig("resnet18", norm="group"))  # fmt: skip
    model, criterion = build_detector(config), Criterion(LossConfig(), "focal")
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3), torch.device("cpu"))
    batch = collate([example(i, red, blue) for i, (red, blue) in enumerate(BOXES_PX)])
    for step in range(120):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 if step < 90 else 1e-4
        optimizer.zero_grad()
        criterion.total(criterion(model(*batch.inputs("cpu")), batch.targets, num_boxes=8.0)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    found = top_detections(model(*batch.inputs("cpu")), [(64, 64)] * 4, "focal", limit=2)
    assert [sorted(image.labels_T.tolist()) for image in found] == [[0, 1]] * 4
    overlaps = [
        generalized_iou(image.boxes_xyxy_px_T4, torch.tensor(boxes, dtype=torch.float32)[image.labels_T])
        for boxes, image in zip(BOXES_PX, found, strict=True)
    ]
    assert torch.cat(overlaps).mean() > 0.6, overlaps  # 0.0 or less before training


def example(image_id, red, blue):
    boxes = np.array([red, blue], dtype=np.float32) / 64
    cxcywh = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
    return Example(np.asarray(painted((64, 64), red, blue)), image_id, (64, 64), cxcywh, np.array([0, 1]))
