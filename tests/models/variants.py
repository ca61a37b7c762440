"""The seven published models as configurations, and the weights that reference/README.md defines for them."""

import hashlib

import torch
from torch import Tensor

from framework.models.backbone import BackboneConfig
from framework.models.build import ModelConfig
from framework.models.detector import Detector
from framework.models.weights import published_names, to_published

DC5 = BackboneConfig(dilation=True)
DETR = dict(attention="dense", classification="softmax", num_feature_levels=1, num_queries=100, ffn_width=2048)

VARIANTS = {
    "base": ModelConfig(num_classes=91),
    "box_refine": ModelConfig(num_classes=91, refine_boxes=True),
    "two_stage": ModelConfig(num_classes=91, refine_boxes=True, queries="proposals"),
    "single_scale": ModelConfig(num_classes=91, num_feature_levels=1),
    "single_scale_dc5": ModelConfig(num_classes=91, num_feature_levels=1, backbone=DC5),
    "detr": ModelConfig(num_classes=91, **DETR),
    "detr_dc5": ModelConfig(num_classes=91, backbone=DC5, **DETR),
    "base_r101": ModelConfig(num_classes=91, backbone=BackboneConfig("resnet101")),
    "detr_r101": ModelConfig(num_classes=91, backbone=BackboneConfig("resnet101"), **DETR),
}


def reference_state_dict(model: Detector, keys: dict[str, list[int]]) -> dict[str, Tensor]:
    """The reference's weights under the published names, `keys` in the order of the published state dict."""
    source: dict[int, str] = {}
    tensors = to_published(model)
    return {k: _values(source.setdefault(tensors[k].data_ptr(), k), shape) for k, shape in keys.items()}


def _values(key: str, shape: list[int]) -> Tensor:
    seed = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
    r = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if key.endswith("running_var"):
        return 1 + 0.1 * r.abs()
    if key.endswith("running_mean"):
        return 0.1 * r
    if key.endswith("sampling_offsets.bias"):
        return 2 * r
    if r.dim() >= 2:
        return r / r[0].numel() ** 0.5 * (1.5 if "sampling_offsets" in key else 1.0)
    return 1 + 0.1 * r if key.endswith(".weight") else 0.1 * r


def published_gradients(model: Detector) -> dict[str, Tensor | None]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        n: parameters[key].grad for key, names in published_names(model).items() for n in names if key in parameters
    }
