"""From a configuration to a detector: the one place that knows both. A variant is a choice of parts.

| variant                | attention  | queries   | refine_boxes | num_feature_levels | dilation | classification |
|------------------------|------------|-----------|--------------|--------------------|----------|----------------|
| Deformable DETR        | deformable | learned   | false        | 4                  | false    | focal          |
| + iterative refinement | deformable | learned   | true         | 4                  | false    | focal          |
| ++ two-stage           | deformable | proposals | true         | 4                  | false    | focal          |
| single scale (DC5)     | deformable | learned   | false        | 1                  | (true)   | focal          |
| DETR (DC5)             | dense      | learned   | false        | 1                  | (true)   | softmax        |
| dense and refined      | dense      | learned   | true         | 1                  | (true)   | focal          |

The last one is no published model: Deformable DETR with refinement, whose attention alone is taken away.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from framework.errors import UsageError
from framework.models.attention import DeformableAttention, DenseAttention
from framework.models.backbone import BackboneConfig, FrozenBatchNorm2d, ResNet, group_norm
from framework.models.decoder import BoxHead, Decoder, DecoderLayer
from framework.models.detector import Detector, LevelCodes
from framework.models.encoder import Encoder, EncoderLayer
from framework.models.queries import EncoderProposals, LearnedEmbeddings, LearnedPoints
from ops.linear import Linear
from ops.ms_deform_attn import MAX_POINTS


@dataclass(frozen=True)
class ModelConfig:
    """Defaults: the published Deformable DETR R50. num_classes null: as many as the shards have classes.

    classification: focal (a sigmoid for each class) or softmax (one more logit, "no object", is added).
    init: a published or own checkpoint to start from; what does not fit is listed.
    """

    attention: Literal["deformable", "dense"] = "deformable"
    queries: Literal["learned", "proposals"] = "learned"
    refine_boxes: bool = False
    classification: Literal["focal", "softmax"] = "focal"
    num_feature_levels: int = 4
    num_queries: int = 300
    width: int = 256
    num_heads: int = 8
    num_points: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_width: int = 1024
    dropout: float = 0.1
    num_classes: int | None = None
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    init: str | None = None

    def __post_init__(self) -> None:
        def refuse(keys: str, found: str, expected: str) -> None:
            raise UsageError(f"{keys}: found {found}; {expected}")

        for key in ("num_feature_levels", "num_queries", "width", "num_heads", "num_points", "decoder_layers",
                    "ffn_width"):  # fmt: skip
            if getattr(self, key) < 1:
                refuse(f"model.{key}", str(getattr(self, key)), "expected at least 1")
        if self.encoder_layers < 0:
            refuse("model.encoder_layers", str(self.encoder_layers), "expected at least 0")
        if not 0 <= self.dropout < 1:
            refuse("model.dropout", str(self.dropout), "expected 0 <= dropout < 1")
        if self.num_classes is not None and self.num_classes < 1:
            refuse(
                "model.num_classes",
                str(self.num_classes),
                "expected at least 1, or null for the shards' count",
            )
        if self.width % self.num_heads or self.width % 32:
            refuse("model.width, model.num_heads", f"{self.width}, {self.num_heads}",
                   "expected a width that both 32 (group norm) and the number of heads divide")  # fmt: skip
        if self.queries == "proposals" and not self.refine_boxes:
            refuse("model.queries, model.refine_boxes", "proposals, false", "proposals are boxes to be refined: set "
                   "model.refine_boxes=true or model.queries=learned")  # fmt: skip
        if self.queries == "proposals" and self.classification != "focal":
            refuse("model.classification, model.queries", f"{self.classification}, proposals",
                   "proposals are ranked by a focal logit: set model.classification=focal or "
                   "model.queries=learned")  # fmt: skip
        if self.attention == "deformable" and self.num_points * self.num_feature_levels > MAX_POINTS:
            refuse("model.num_points, model.num_feature_levels", f"{self.num_points}, {self.num_feature_levels}",
                   f"the operator takes at most {MAX_POINTS} points of all levels together")  # fmt: skip
        if self.attention == "dense":
            if self.num_feature_levels != 1:
                refuse("model.attention, model.num_feature_levels", f"dense, {self.num_feature_levels}",
                       "dense attention looks at one level: set model.num_feature_levels=1")  # fmt: skip
            if self.queries == "proposals":
                refuse("model.attention, model.queries", "dense, proposals",
                       "proposals are made by tokens of several levels: set model.queries=learned")  # fmt: skip


def build_detector(config: ModelConfig) -> Detector:
    """A freshly initialised Detector; loads no file. Raises UsageError when num_classes is still null."""
    if config.num_classes is None:
        raise UsageError("model.num_classes: found null, expected the number of classes (a training run reads it "
                         "from its shards)")  # fmt: skip
    parts = _Dense(config) if config.attention == "dense" and not config.refine_boxes else _Deformable(config)
    backbone = _backbone(config)
    encoder_layers = [
        EncoderLayer(parts.attention(), config.width, config.ffn_width, config.dropout)
        for _ in range(config.encoder_layers)
    ]
    decoder_layers = [
        DecoderLayer(parts.attention(), config.width, config.num_heads, config.ffn_width, config.dropout)
        for _ in range(config.decoder_layers)
    ]
    class_heads, box_heads = parts.heads()
    queries = parts.queries(class_heads, box_heads)
    return Detector(
        backbone,
        parts.projections(backbone),
        parts.level_codes(),
        Encoder([_xavier(layer) for layer in encoder_layers]),
        queries,
        Decoder([_xavier(layer) for layer in decoder_layers], class_heads, box_heads, parts.output_norm(),
                refine=config.refine_boxes, cast_tokens=config.attention == "deformable"),
        width=config.width,
        position_offset=parts.position_offset,
    )  # fmt: skip


def num_logits(config: ModelConfig) -> int:
    assert config.num_classes is not None
    return config.num_classes + (config.classification == "softmax")


def _backbone(config: ModelConfig) -> ResNet:
    frozen = config.backbone.norm == "frozen"
    return ResNet(
        config.backbone.name,
        num_maps=min(config.num_feature_levels, 3),
        dilation=config.backbone.dilation,
        norm=FrozenBatchNorm2d if frozen else group_norm,
        freeze_stem=frozen,
        width=config.backbone.width,
    )


class _Deformable:
    """The parts of Deformable DETR. Initial values: Zhu et al. 2021, A.3 and A.4, and the published code.

    Dense attention among them does not use the reference boxes, which the heads still refine.
    """

    position_offset = -0.5

    def __init__(self, config: ModelConfig):
        self.config = config

    def attention(self) -> nn.Module:
        c = self.config
        if c.attention == "dense":
            return DenseAttention(c.width, c.num_heads, c.dropout)
        return DeformableAttention(c.width, c.num_feature_levels, c.num_heads, c.num_points)

    def projections(self, backbone: ResNet) -> list[nn.Module]:
        c = self.config
        extra = c.num_feature_levels - len(backbone.channels)
        ins = [(channels, 1, 1) for channels in backbone.channels]
        ins += [(channels, 3, 2) for channels in [backbone.channels[-1], *[c.width] * extra][:extra]]
        layers: list[nn.Module] = []
        for channels, kernel, stride in ins:
            conv = nn.Conv2d(channels, c.width, kernel, stride, padding=kernel // 2)
            nn.init.xavier_uniform_(conv.weight)
            conv.bias.data.zero_()  # type: ignore[union-attr]
            layers.append(nn.Sequential(conv, nn.GroupNorm(32, c.width)))
        return layers

    def level_codes(self) -> LevelCodes:
        return LevelCodes(self.config.num_feature_levels, self.config.width)

    def heads(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Plain boxes: one head tied over all layers. Refined ones: a head for each layer, copies of one at first."""
        c = self.config
        count = c.decoder_layers if c.refine_boxes else 1
        class_head, box_head = _class_head(c), _constant_box_head(c.width)
        class_heads: list[nn.Module] = [copy.deepcopy(class_head) for _ in range(count)]
        box_heads: list[nn.Module] = [copy.deepcopy(box_head) for _ in range(count)]
        if c.queries == "learned":  # without proposals the first boxes start at 0.12 of the image's sides
            _last_layer(box_heads[0]).bias.data[2:] = -2.0
        tied = c.decoder_layers // count
        return class_heads * tied, box_heads * tied

    def queries(self, class_heads: Sequence[nn.Module], box_heads: Sequence[nn.Module]) -> nn.Module:
        """Proposals start with copies of the decoder's heads."""
        c = self.config
        if c.queries == "learned":
            return LearnedPoints(c.num_queries, c.width)
        heads = copy.deepcopy((class_heads[0], box_heads[0]))
        proposals = EncoderProposals(c.num_queries, c.width, *heads)
        for linear in (proposals.token_projection, proposals.code_projection):
            nn.init.xavier_uniform_(linear.weight)
        return proposals

    def output_norm(self) -> nn.Module:
        return nn.Identity()


class _Dense:
    """The parts of DETR."""

    position_offset = 0.0

    def __init__(self, config: ModelConfig):
        self.config = config

    def attention(self) -> nn.Module:
        return DenseAttention(self.config.width, self.config.num_heads, self.config.dropout)

    def projections(self, backbone: ResNet) -> list[nn.Module]:
        return [nn.Conv2d(backbone.channels[-1], self.config.width, 1)]

    def level_codes(self) -> None:
        return None

    def heads(self) -> tuple[list[nn.Module], list[nn.Module]]:
        c = self.config
        return [_class_head(c)] * c.decoder_layers, [BoxHead(c.width)] * c.decoder_layers

    def queries(self, class_heads: Sequence[nn.Module], box_heads: Sequence[nn.Module]) -> nn.Module:
        return LearnedEmbeddings(self.config.num_queries, self.config.width)

    def output_norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.width)


def _class_head(config: ModelConfig) -> nn.Linear:
    """Under the focal loss every class starts at probability 0.01."""
    head = Linear(config.width, num_logits(config))
    if config.classification == "focal":
        nn.init.constant_(head.bias, -math.log(99))
    return head


def _constant_box_head(width: int) -> BoxHead:
    """A head that moves no box at first."""
    head = BoxHead(width)
    nn.init.zeros_(_last_layer(head).weight)
    nn.init.zeros_(_last_layer(head).bias)
    return head


def _last_layer(box_head: nn.Module) -> nn.Linear:
    assert isinstance(box_head, BoxHead)
    last = box_head.layers[-1]
    assert isinstance(last, nn.Linear)
    return last


def _xavier(layer: nn.Module) -> nn.Module:
    """Xavier on every matrix of a transformer layer but those of the sampling, which have a start of their own."""
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 1 and "sampling_offsets" not in name and "attention_weights" not in name:
            nn.init.xavier_uniform_(parameter)
    return layer
