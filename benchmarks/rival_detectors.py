"""Other people's Deformable DETR, to measure a training step beside ours: same sizes, same images, random weights.

Neither is part of Tenfold; benchmarks.train_step asks for them by a flag:

    --published FOLDER   a checkout of the published code (Zhu et al. 2021), with torchvision installed. On a CPU, for
                         which it has no kernel, its own `ms_deform_attn_core_pytorch` (`grid_sample`) does the work;
                         on a GPU its own kernel, built there (models/ops, on the PYTHONPATH). Under autocast with the
                         work-arounds that people use: the kernel, which has no bfloat16, and the loss in float32
    --transformers       the transformers library's model, which uses `grid_sample` everywhere
"""

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.config import Config
from framework.data.batch import Targets
from framework.errors import UsageError

Rival = tuple[nn.Module, Callable[[Tensor, Any], Any], Callable[[Any, Targets], Tensor]]


def published(folder: Path, config: Config, device: torch.device) -> Rival:
    """The model, its forward, and the loss of what that returns."""
    refuse(config, "--published", one_level=True)
    torchvision: Any = importlib.import_module("torchvision")
    torchvision.__version__ = "1.0"  # it compares three characters of it as a number: 0.29 would be older than 0.5
    resnet50 = torchvision.models.resnet50
    torchvision.models.resnet50 = lambda pretrained, **settings: resnet50(**settings)  # which would be downloaded
    if device.type == "cpu":  # in the place of its extension, which has CUDA kernels only
        sys.modules["MultiScaleDeformableAttention"] = types.ModuleType("MultiScaleDeformableAttention")
    sys.path.insert(0, str(folder))
    args = importlib.import_module("main").get_args_parser().parse_args([])
    m = config.model
    args.device, args.aux_loss = device.type, config.loss.auxiliary
    args.two_stage, args.with_box_refine = m.queries == "proposals", m.refine_boxes
    args.dropout, args.num_queries, args.num_feature_levels = m.dropout, m.num_queries, m.num_feature_levels
    args.dilation, args.enc_layers, args.dec_layers = m.backbone.dilation, m.encoder_layers, m.decoder_layers
    args.hidden_dim, args.dim_feedforward, args.nheads = m.width, m.ffn_width, m.num_heads
    args.enc_n_points = args.dec_n_points = m.num_points
    model, criterion, _ = importlib.import_module("models").build_model(args)
    functions = importlib.import_module("models.ops.functions.ms_deform_attn_func")
    if device.type == "cpu":

        class OnCPU:
            @staticmethod
            def apply(value: Tensor, shapes: Tensor, starts: Tensor, *others: Any) -> Tensor:
                return functions.ms_deform_attn_core_pytorch(value, shapes, *others[:2])

        importlib.import_module("models.ops.modules.ms_deform_attn").MSDeformAttnFunction = OnCPU
    else:
        kernel, settings = functions.MSDeformAttnFunction, {"device_type": device.type}
        kernel.forward = staticmethod(torch.amp.custom_fwd(kernel.forward, **settings, cast_inputs=torch.float32))
        kernel.backward = staticmethod(torch.amp.custom_bwd(kernel.backward, **settings))
    nested = importlib.import_module("util.misc").NestedTensor

    def loss_of(outputs: Any, targets: Targets) -> Tensor:
        losses = criterion(_float32(outputs), _by_image(targets, "labels"))
        return sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)  # type: ignore[return-value]

    return model, lambda images, padding: model(nested(images, padding)), loss_of


def transformers(config: Config, targets: Targets) -> Rival:
    """Its forward computes the loss too, for which it needs the targets: both are counted as forward."""
    refuse(config, "--transformers", one_level=False)
    library: Any = importlib.import_module("transformers")
    m = config.model
    settings = library.DeformableDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=library.ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
        two_stage=m.queries == "proposals", with_box_refine=m.refine_boxes, num_labels=m.num_classes,
        num_queries=m.num_queries, d_model=m.width, encoder_layers=m.encoder_layers, decoder_layers=m.decoder_layers,
        encoder_ffn_dim=m.ffn_width, decoder_ffn_dim=m.ffn_width, encoder_attention_heads=m.num_heads,
        decoder_attention_heads=m.num_heads, num_feature_levels=m.num_feature_levels, dropout=m.dropout,
        activation_dropout=m.dropout,
        encoder_n_points=m.num_points, decoder_n_points=m.num_points, auxiliary_loss=config.loss.auxiliary,
    )  # fmt: skip
    model = library.DeformableDetrForObjectDetection(settings)
    for name, parameter in model.named_parameters():
        if ".stages." in name and ".stages.0." not in name:  # 5.24 means to train them and, by a name, freezes them
            parameter.requires_grad_(True)

    labels = _by_image(targets, "class_labels")

    def forward(images: Tensor, padding: Tensor) -> Tensor:
        return model(images, pixel_mask=(~padding).long(), labels=labels).loss

    return model, forward, lambda loss, targets: loss


def refuse(config: Config, flag: str, *, one_level: bool) -> None:
    """Raises UsageError where the other code has no such model."""
    m = config.model
    if m.attention != "deformable" or (not one_level and (m.num_feature_levels < 3 or m.backbone.dilation)):
        raise UsageError(f"{flag}: not for {m.attention} attention with {m.num_feature_levels} levels; expected "
                         "configs/coco_r50_deformable.yaml or another of its kind")  # fmt: skip
    if m.backbone.name != "resnet50":
        raise UsageError(f"{flag}: not with model.backbone.name={m.backbone.name}; expected resnet50")


def _float32(outputs: Any) -> Any:
    """The tensors of its dictionaries and lists of them."""
    if isinstance(outputs, dict):
        return {name: _float32(output) for name, output in outputs.items()}
    return outputs.float() if isinstance(outputs, Tensor) else [_float32(output) for output in outputs]


def _by_image(targets: Targets, labels: str) -> list[dict[str, Tensor]]:
    parts = zip(targets.labels_N.split(targets.counts_B), targets.boxes_cxcywh_N4.split(targets.counts_B), strict=True)
    return [{labels: of_labels, "boxes": boxes} for of_labels, boxes in parts]
