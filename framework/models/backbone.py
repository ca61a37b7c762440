"""ResNet 18/34/50/101 with torchvision's parameter names, frozen batch norm or group norm.

# B image, C channel, H and W height and width of a map
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from framework.errors import UsageError

NormLayer = Callable[[int], nn.Module]


@dataclass(frozen=True)
class BackboneConfig:
    """name: which ResNet. dilation: DC5, the last stage at stride 16 with dilation 2 instead of stride 32.

    width: channels of the stem, of which all others are multiples; 64 as published, 16 or 32 for small experiments.
    norm: frozen (batch norm whose statistics and affine never change; stem and first stage do not train
    either, as published) or group (32 groups, fewer for narrow maps; everything trains: for training from scratch).
    weights: a torchvision ResNet file to start from.
    """

    name: Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    dilation: bool = False
    norm: Literal["frozen", "group"] = "frozen"
    width: int = 64
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.width != 16 and (self.width < 32 or self.width % 32):
            raise UsageError(f"model.backbone.width: found {self.width}, expected 16 or a multiple of 32 (group norm)")


class ScalableConv2d(nn.Conv2d):
    """A convolution without bias that may be told a scale (C_out) of its weights and a shift (C_out) of its result."""

    def __init__(self, c_in: int, c_out: int, side: int, stride: int = 1, dilation: int = 1):
        super().__init__(c_in, c_out, side, stride, padding=side // 2 * dilation, dilation=dilation, bias=False)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        weight = self.weight if scale is None else self.weight * scale[:, None, None, None]
        return nn.functional.conv2d(x, weight, shift, self.stride, self.padding, self.dilation)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and affine, all four of them buffers: a scale and a shift of every channel."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


def normed(x_BCHW: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
    """norm(conv(x)), into which a frozen norm goes as weights: maps are large, weights are not."""
    return conv(x_BCHW, *norm()) if isinstance(norm, FrozenBatchNorm2d) else norm(conv(x_BCHW))


def group_norm(channels: int) -> nn.Module:
    """32 groups; of narrow maps groups of 4 channels, since one channel for itself would lose its strength."""
    return nn.GroupNorm(32 if channels >= 64 else channels // 4, channels)


def shortcut(x: Tensor, downsample: nn.Module) -> Tensor:
    return normed(x, *downsample) if isinstance(downsample, nn.Sequential) else x


@wrap_torch_function(lambda images, grouped: (images,))
def convolved_format(images: Tensor, grouped: bool) -> torch.memory_format:
    """The order of a map's numbers in memory that convolutions are fast with, where images are. grouped: group norms
    come between.

    Channels last on GPUs and on CPUs with AVX-512: forward takes a seventh less time; with AVX2, backward half as much
    again. Not on CPUs where group norms come between: their backward takes up to 30 times as long so in bfloat16, in
    float32 up to 3 times."""
    last = images.is_cuda or (torch.backends.cpu.get_cpu_capability() == "AVX512" and not grouped)
    return torch.channels_last if last else torch.contiguous_format


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, c_in: int, c: int, stride: int, dilation: int, norm: NormLayer, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = ScalableConv2d(c_in, c, 3, stride, dilation)
        self.bn1 = norm(c)
        self.conv2 = ScalableConv2d(c, c, 3, 1, dilation)
        self.bn2 = norm(c)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(normed(x, self.conv1, self.bn1))
        y = normed(y, self.conv2, self.bn2)
        return self.relu(y.add_(shortcut(x, self.downsample)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in: int, c: int, stride: int, dilation: int, norm: NormLayer, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = ScalableConv2d(c_in, c, 1)
        self.bn1 = norm(c)
        self.conv2 = ScalableConv2d(c, c, 3, stride, dilation)
        self.bn2 = norm(c)
        self.conv3 = ScalableConv2d(c, c * self.expansion, 1)
        self.bn3 = norm(c * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(normed(x, self.conv1, self.bn1))
        y = self.relu(normed(y, self.conv2, self.bn2))
        y = normed(y, self.conv3, self.bn3)
        return self.relu(y.add_(shortcut(x, self.downsample)))


BLOCKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
}


class ResNet(nn.Module):
    """images (B, 3, H, W) -> the maps of its last `num_maps` stages, finest first.

    strides and channels list what each returned map has. Source: He et al. 2016; layout of torchvision.
    """

    def __init__(
        self, name: str, *, num_maps: int, dilation: bool, norm: NormLayer, freeze_stem: bool, width: int = 64
    ):
        super().__init__()
        block, depths = BLOCKS[name]
        self.num_maps = num_maps
        c = [width * 2**i for i in range(4)]
        ins = [width, *(channels * block.expansion for channels in c)]
        self.conv1 = ScalableConv2d(3, width, 7, stride=2)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(block, ins[0], c[0], depths[0], 1, 1, norm)
        self.layer2 = _stage(block, ins[1], c[1], depths[1], 2, 1, norm)
        self.layer3 = _stage(block, ins[2], c[2], depths[2], 2, 1, norm)
        self.layer4 = _stage(block, ins[3], c[3], depths[3], *((1, 2) if dilation else (2, 1)), norm)
        self.strides = [8, 16, 16 if dilation else 32][-num_maps:]
        self.channels = ins[-num_maps:]
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if freeze_stem:
            for frozen in (self.conv1, self.layer1):
                frozen.requires_grad_(False)

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        # CPUs pool maps with the channels last five times as fast, also those that convolve others faster.
        last, inner = torch.channels_last, convolved_format(images_B3HW, isinstance(self.bn1, nn.GroupNorm))
        x = self.relu(normed(images_B3HW.contiguous(memory_format=inner), self.conv1, self.bn1))
        x = self.maxpool(x.contiguous(memory_format=last)).contiguous(memory_format=inner)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps[-self.num_maps :]


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    c_in: int,
    c: int,
    depth: int,
    stride: int,
    dilation: int,
    norm: NormLayer,
) -> nn.Sequential:
    """The first of several blocks keeps dilation 1, as torchvision does when it trades stride for dilation."""
    c_out = c * block.expansion
    downsample = None
    if stride != 1 or c_in != c_out:
        downsample = nn.Sequential(ScalableConv2d(c_in, c_out, 1, stride), norm(c_out))
    first = block(c_in, c, stride, dilation if depth == 1 else 1, norm, downsample)
    rest = [block(c_out, c, 1, dilation, norm, None) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)
