"""Weights in and out: published detectors, torchvision ResNets, our own checkpoints.

A name here is translated in one direction only, from ours to the published ones; a tied or aliased head has
several published names.
"""

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from framework.errors import InputError
from framework.models.attention import DenseAttention
from framework.models.detector import Detector
from framework.models.queries import EncoderProposals

WEIGHTS_FILE = "weights.safetensors"  # of our own checkpoints

COMMON = [
    (r"backbone\.(.*)", r"backbone.0.body.\1"),
    (r"level_codes\.weight", r"transformer.level_embed"),
    (
        r"encoder\.layers\.(\d+)\.attention\.(?:sample|attend)\.(.*)",
        r"transformer.encoder.layers.\1.self_attn.\2",
    ),
    (r"encoder\.layers\.(\d+)\.norm\.(.*)", r"transformer.encoder.layers.\1.norm1.\2"),
    (r"encoder\.layers\.(\d+)\.ffn\.norm\.(.*)", r"transformer.encoder.layers.\1.norm2.\2"),
    (r"(en|de)coder\.layers\.(\d+)\.ffn\.(linear\d\..*)", r"transformer.\1coder.layers.\2.\3"),
    (r"decoder\.layers\.(\d+)\.self_attention\.(.*)", r"transformer.decoder.layers.\1.self_attn.\2"),
    (r"decoder\.layers\.(\d+)\.ffn\.norm\.(.*)", r"transformer.decoder.layers.\1.norm3.\2"),
]
DEFORMABLE = [
    (r"projections\.(.*)", r"input_proj.\1"),
    (
        r"decoder\.layers\.(\d+)\.cross_attention\.sample\.(.*)",
        r"transformer.decoder.layers.\1.cross_attn.\2",
    ),
    (r"decoder\.layers\.(\d+)\.cross_norm\.(.*)", r"transformer.decoder.layers.\1.norm1.\2"),
    (r"decoder\.layers\.(\d+)\.self_norm\.(.*)", r"transformer.decoder.layers.\1.norm2.\2"),
    (r"queries\.embedding\.weight", r"query_embed.weight"),
    (r"queries\.reference_points\.(.*)", r"transformer.reference_points.\1"),
    (r"queries\.token_projection\.(.*)", r"transformer.enc_output.\1"),
    (r"queries\.token_norm\.(.*)", r"transformer.enc_output_norm.\1"),
    (r"queries\.code_projection\.(.*)", r"transformer.pos_trans.\1"),
    (r"queries\.code_norm\.(.*)", r"transformer.pos_trans_norm.\1"),
]
DENSE = [
    (r"projections\.0\.(.*)", r"input_proj.\1"),
    (
        r"decoder\.layers\.(\d+)\.cross_attention\.attend\.(.*)",
        r"transformer.decoder.layers.\1.multihead_attn.\2",
    ),
    (r"decoder\.layers\.(\d+)\.self_norm\.(.*)", r"transformer.decoder.layers.\1.norm1.\2"),
    (r"decoder\.layers\.(\d+)\.cross_norm\.(.*)", r"transformer.decoder.layers.\1.norm2.\2"),
    (r"decoder\.output_norm\.(.*)", r"transformer.decoder.norm.\1"),
    (r"queries\.position\.weight", r"query_embed.weight"),
    (r"decoder\.class_heads\.\d+\.(.*)", r"class_embed.\1"),
    (r"decoder\.box_heads\.\d+\.(.*)", r"bbox_embed.\1"),
]


@dataclass
class Report:
    """What became of a file's tensors; names as in the file, but `missing` as in the model."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("misshapen", "missing", "unexpected"):
            names = getattr(self, what)
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                parts.append(f"{len(names)} {what} ({', '.join(names[:5])}{more})")
        return "; ".join(parts)


def load_published(
    model: Detector, path_or_state_dict: str | Path | dict[str, Tensor], *, strict: bool = True
) -> Report:
    """Copy the tensors of a published detector, a torchvision ResNet or one of our checkpoints into `model`.

    strict=False loads what fits and lists the rest. Nothing is copied when an error is raised.
    Raises InputError: the file is not readable without running code from it, or (strict) does not fit.
    """
    source = "the state dict" if isinstance(path_or_state_dict, dict) else str(path_or_state_dict)
    tensors = path_or_state_dict if isinstance(path_or_state_dict, dict) else read_tensors(path_or_state_dict)
    names, ignored = _names_for(model, tensors)
    wanted = {name: key for key, aliases in names.items() for name in aliases}
    own = model.state_dict()

    report = Report()
    report.unexpected = [name for name in tensors if name not in wanted and not re.fullmatch(ignored, name)]
    report.missing = [key for key, aliases in names.items() if not any(name in tensors for name in aliases)]
    for name in (name for name in tensors if name in wanted):
        target = own[wanted[name]]
        fits = target.shape == tensors[name].shape
        (report.loaded if fits else report.misshapen).append(
            name if fits else f"{name}: found {list(tensors[name].shape)}, expected {list(target.shape)}"
        )
    if not report.loaded or (strict and not report.exact):
        raise InputError(f"{source} does not fit the model: {report}")
    with torch.no_grad():
        for name in report.loaded:
            own[wanted[name]].copy_(tensors[name])
    return report


def to_published(model: Detector) -> dict[str, Tensor]:
    """The model's tensors under every published name they have: the inverse of load_published."""
    own = model.state_dict()
    return {name: own[key] for key, aliases in published_names(model).items() for name in aliases}


def published_names(model: Detector) -> dict[str, list[str]]:
    """Our key -> the published ones."""
    dense = isinstance(model.decoder.layers[0].cross_attention, DenseAttention)
    rules = COMMON + (DENSE if dense else DEFORMABLE)
    return {key: _translate(key, rules) or _head_names(key, model) for key in model.state_dict()}


def _translate(key: str, rules: list[tuple[str, str]]) -> list[str]:
    for pattern, template in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return [match.expand(template)]
    return []


def _head_names(key: str, model: Detector) -> list[str]:
    """Names of class and box heads; those of proposals count as the ones after the last layer's."""
    match = re.fullmatch(r"(?:decoder\.(class|box)_heads\.(\d+)|queries\.(class|box)_head)\.(.+)", key)
    assert match, key
    layer, leaf = match[2] or len(model.decoder.layers), match[4]
    if (match[1] or match[3]) == "class":
        name, under_decoder = f"class_embed.{layer}.{leaf}", isinstance(model.queries, EncoderProposals)
    else:
        name, under_decoder = f"bbox_embed.{layer}.{leaf}", model.decoder.refine
    return [name, f"transformer.decoder.{name}"] if under_decoder else [name]


def _names_for(model: Detector, tensors: dict[str, Tensor]) -> tuple[dict[str, list[str]], str]:
    """The names a file of this kind uses for our keys, and a pattern of what may be left over."""
    if "conv1.weight" in tensors:  # a torchvision ResNet: the backbone only, its classifier is not needed
        ours = [f"backbone.{key}" for key in model.backbone.state_dict()]
        return {key: [key.removeprefix("backbone.")] for key in ours}, r"fc\..*|.*num_batches_tracked"
    if any(name.startswith("decoder.class_heads") for name in tensors):  # our own
        untied = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        return {key: [key] for key in untied}, r"(?!)"
    return published_names(model), r".*num_batches_tracked"


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth file, a .safetensors file, or one of our checkpoint folders. Runs no code from it."""
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a .pth or .safetensors file, or a checkpoint folder")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise whatever damaged bytes make them stumble over
        raise InputError(f"{path}: cannot be loaded safely, or is damaged: {_reason(error)}") from error
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: holds no state dict; expected name -> tensor, or that under 'model'")
    return content


def _reason(error: Exception) -> str:
    """One line: the global that a pickle wanted to call, or what the reader said first."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"it holds a pickle that wants {refused[1]}"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
