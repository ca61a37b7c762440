"""Weights in and out: published detectors, torchvision ResNets, our own checkpoints.

A name here is translated in one direction only, from ours to the published ones; a tied or aliased head has
several published names.
"""

import argparse
import pickletools
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from framework.errors import InputError
from framework.files import sha256_of
from framework.models.attention import DenseAttention
from framework.models.detector import Detector
from framework.models.queries import EncoderProposals

WEIGHTS_FILE = "weights.safetensors"  # of our own checkpoints
WRAPPER = "module."  # before every name that was saved from inside DistributedDataParallel

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
    """What became of a file's tensors; names as in the file, but `missing` as in the model.

    conflicting: names of one tensor of the model that hold different values in the file; the last one counts.
    settings: where file and model differ, as configuration keys. sha256: of the file; None of a state dict.
    """

    source: str
    sha256: str | None = None
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    conflicting: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen or self.conflicting)

    def lines(self) -> list[str]:
        """For people: what differs in settings, then what follows from it, layers counted together."""
        lines = [f"{len(self.loaded)} tensors fit", *self.settings]
        for what in ("misshapen", "missing", "unexpected", "conflicting"):
            names = getattr(self, what)
            if names:
                lines.append(f"{len(names)} {what}: {', '.join(_together(names))}")
        return lines


def load_published(
    model: Detector,
    path_or_state_dict: str | Path | dict[str, Tensor],
    *,
    strict: bool = True,
    expected: Literal["detector", "backbone"] | None = None,
) -> Report:
    """Copy the tensors of a published detector, a torchvision ResNet or one of our checkpoints into `model`.

    strict=False loads what fits and lists the rest. `expected` refuses the other kind of file. Nothing is copied
    when an error is raised.
    Raises InputError: the file is not readable without running code from it, of the other kind, holds NaN, or
    (strict) does not fit. Heads of dense attention show in no shape: a file of another number of them fits.
    """
    if isinstance(path_or_state_dict, dict):
        report, tensors = Report("the state dict"), path_or_state_dict
    else:
        file = _file(path_or_state_dict)
        tensors = read_tensors(file)
        report = Report(str(path_or_state_dict), sha256_of(file))
    _refuse_other_kind(report.source, tensors, expected)
    names, ignored = _names_for(model, tensors)
    wanted = {name: key for key, aliases in names.items() for name in aliases}
    own = model.state_dict()

    report.unexpected = [name for name in tensors if name not in wanted and not re.fullmatch(ignored, name)]
    report.missing = [key for key, aliases in names.items() if not any(name in tensors for name in aliases)]
    for name in (name for name in tensors if name in wanted):
        found, target = _shape(tensors[name]), _shape(own[wanted[name]])
        fits = found == target
        (report.loaded if fits else report.misshapen).append(
            name if fits else f"{name}: found {found}, expected {target}"
        )
    _refuse_no_numbers(report.source, {name: tensors[name] for name in report.loaded})
    report.conflicting = _conflicting(tensors, {name: own[wanted[name]].data_ptr() for name in report.loaded})
    if report.loaded or report.misshapen:  # a file whose names mean something
        report.settings = _differing_settings(tensors, to_published(model))
    if not report.loaded or (strict and not report.exact):
        raise InputError(f"{report.source} does not fit the model: {'; '.join(report.lines())}")
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


def _is_resnet(tensors: dict[str, Tensor]) -> bool:
    return "conv1.weight" in tensors


def _is_own(tensors: dict[str, Tensor]) -> bool:
    return any(name.startswith("decoder.class_heads") for name in tensors)


def _refuse_other_kind(source: str, tensors: dict[str, Tensor], expected: str | None) -> None:
    if expected == "detector" and _is_resnet(tensors):
        raise InputError(f"{source}: found a ResNet alone, expected a whole detector; a file to start the backbone "
                         "from belongs in model.backbone.weights")  # fmt: skip
    if expected == "backbone" and not _is_resnet(tensors):
        raise InputError(f"{source}: found no torchvision ResNet (no conv1.weight), expected one; a detector to "
                         "start from belongs in model.init")  # fmt: skip


def _names_for(model: Detector, tensors: dict[str, Tensor]) -> tuple[dict[str, list[str]], str]:
    """The names a file of this kind uses for our keys, and a pattern of what may be left over."""
    if _is_resnet(tensors):  # the backbone only, its classifier is not needed
        ours = [f"backbone.{key}" for key in model.backbone.state_dict()]
        return {key: [key.removeprefix("backbone.")] for key in ours}, r"fc\..*|.*num_batches_tracked"
    if _is_own(tensors):
        untied = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        return {key: [key] for key in untied}, r"(?!)"
    return published_names(model), r".*num_batches_tracked"


def _shape(tensor: Tensor) -> str:
    """[256, 64]; and what it is besides, if not dense floating-point numbers."""
    kinds = [] if tensor.is_floating_point() else [str(tensor.dtype).removeprefix("torch.")]
    kinds += [] if tensor.layout == torch.strided else [str(tensor.layout).removeprefix("torch.")]
    return " ".join([*kinds, str(list(tensor.shape))])


def _refuse_no_numbers(source: str, tensors: dict[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(f"{source}: {len(broken)} tensors hold NaN or infinity: {', '.join(_together(broken))}; "
                         "expected the weights of a training that did not diverge")  # fmt: skip


def _conflicting(tensors: dict[str, Tensor], targets: dict[str, int]) -> list[str]:
    """Heads that the model ties and the file does not. targets: name in the file -> address in the model."""
    last = {address: name for name, address in targets.items()}
    return [
        f"{name}: not the same in all layers, one tensor in the model; the last one counts"
        for name, address in targets.items()
        if not torch.equal(tensors[name], tensors[last[address]])
    ]


def _differing_settings(file: dict[str, Tensor], model: dict[str, Tensor]) -> list[str]:
    theirs, ours = _settings(file), _settings(model)
    return [
        f"{key}: {theirs[key]} in the file, {ours[key]} in the model"
        for key in theirs
        if theirs[key] != ours[key] and None not in (theirs[key], ours[key])
    ]


def _settings(tensors: dict[str, Tensor]) -> dict[str, object]:
    """The settings that names (published or ours) and shapes give away; None for one that does not apply."""
    bottleneck, stage3 = _has(tensors, r"layer1\.0\.conv3"), _count(tensors, r"layer3\.(\d+)\.")
    resnets = {(False, 2): "resnet18", (False, 6): "resnet34", (True, 6): "resnet50", (True, 23): "resnet101"}
    settings: dict[str, object] = {
        "model.backbone.name": resnets.get((bottleneck, stage3), f"a ResNet with {stage3} blocks in stage 3"),
        "model.backbone.norm": "frozen" if _has(tensors, r"running_mean") else "group",
    }
    if _is_resnet(tensors):
        return settings
    proposals = _has(tensors, r"enc_output\.|token_projection\.")
    return settings | {
        "model.attention": "dense" if _has(tensors, r"multihead_attn\.|attention\.attend\.") else "deformable",
        "model.queries": "proposals" if proposals else "learned",
        "model.refine_boxes": proposals or _has(tensors, r"^transformer\.decoder\.bbox_embed|^decoder\.box_heads\.1"),
        "model.num_feature_levels": _rows(tensors, r"level_embed|level_codes\.weight") or 1,
        "model.num_heads x model.num_points": _heads_x_points(tensors),
        "model.num_queries": _rows(tensors, r"query_embed\.weight|queries\.(embedding|position)\.weight"),
        "model.width": _rows(tensors, r"encoder\.layers\.0\.(ffn\.)?linear2\.weight"),
        "model.ffn_width": _rows(tensors, r"encoder\.layers\.0\.(ffn\.)?linear1\.weight"),
        "model.encoder_layers": _count(tensors, r"encoder\.layers\.(\d+)\."),
        "model.decoder_layers": _count(tensors, r"decoder\.layers\.(\d+)\."),
        "model.num_classes, as class logits": _rows(tensors, r"(class_embed|decoder\.class_heads)(\.0)?\.weight"),
    }


def _heads_x_points(tensors: dict[str, Tensor]) -> int | None:
    """Of deformable attention; the heads of dense attention do not show in its shapes."""
    weights = _rows(tensors, r"attention_weights\.weight")
    return weights and weights // (_rows(tensors, r"level_embed|level_codes\.weight") or 1)


def _has(tensors: dict[str, Tensor], pattern: str) -> bool:
    return any(re.search(pattern, name) for name in tensors)


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """How many layers, numbered in the pattern's group, there are."""
    return 1 + max((int(m[1]) for m in (re.search(pattern, name) for name in tensors) if m), default=-1)


def _rows(tensors: dict[str, Tensor], pattern: str) -> int | None:
    return next((len(tensor) for name, tensor in tensors.items() if re.search(pattern, name)), None)


def _together(names: list[str], shown: int = 3) -> list[str]:
    """What differs in a layer's number only, once, with the count; at most `shown` of them."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\.\d+(?=[.:])", ".*", name), []).append(name)
    lines = [f"{kind} ({len(alike)})" if len(alike) > 1 else alike[0] for kind, alike in kinds.items()]
    return lines[:shown] + ([f"and {len(lines) - shown} more"] if len(lines) > shown else [])


def _file(path: str | Path) -> Path:
    """The file with the tensors: the one named, or that in the checkpoint folder named. Raises InputError."""
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a .pth or .safetensors file, or a checkpoint folder")
    return path


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth file, a .safetensors file, or one of our checkpoint folders. Runs no code from it."""
    path = _file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it all
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise whatever damaged bytes make them stumble over
        raise InputError(f"{path}: cannot be loaded safely, or is damaged: {_reason(error, path)}") from error
    found = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        what = f"the keys {', '.join(map(str, content))[:80]}" if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path}: holds no state dict; found {what}, expected name -> tensor, or that under 'model'")
    wrapped = all(name.startswith(WRAPPER) for name in found)
    return {name.removeprefix(WRAPPER): tensor for name, tensor in found.items()} if wrapped else found


def _reason(error: Exception, path: Path) -> str:
    """One line: the global that a pickle wants to call, or what kind of file it is not."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    wanted = named[1] if named else _first_global(path)
    if wanted:
        return f"it holds a pickle that wants {wanted}"
    first = str(error).strip().splitlines()[0][:100] if str(error).strip() else "no reason given"
    writer = "safetensors" if path.suffix == ".safetensors" else "torch.save"
    return f"not a file that {writer} wrote, or cut short ({first})"


def _first_global(path: Path) -> str | None:
    """What a bare pickle, of any protocol, imports first; None: it is no pickle, or imports nothing."""
    strings: list[str] = []
    try:
        for opcode, value, _ in pickletools.genops(path.read_bytes()):
            if opcode.name == "GLOBAL":
                return str(value).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(value, str):
                strings.append(value)
    except ValueError:
        pass
    return None
