"""What travels from the loader to the training step: uint8 images, zero padded, with their targets.

Padding mask, float and normalisation are made on the device: a quarter of the bytes cross the bus.

# B image of the micro-batch, N box of the micro-batch (image after image), H W padded pixels
"""

import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

MASKED_SIDE_PX = 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Example:
    """One augmented image: uint8 RGB (H, W, 3), its boxes as fractions of it, its labels.

    A masked slot (valid False) is a black image without boxes; `bad` says why when the sample was damaged.
    """

    image_HW3: np.ndarray
    image_id: int
    original_size_hw: tuple[int, int]
    boxes_cxcywh_N4: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), dtype=np.float32))
    labels_N: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    valid: bool = True
    bad: str | None = None


def masked_example(image_id: int, original_size_hw: tuple[int, int], bad: str | None = None) -> Example:
    image_HW3 = np.zeros((MASKED_SIDE_PX, MASKED_SIDE_PX, 3), dtype=np.uint8)
    return Example(image_HW3, image_id, original_size_hw, valid=False, bad=bad)


@dataclass
class Targets:
    """The boxes of a micro-batch: labels_N int64, boxes float32, image after image.

    counts_B: how many of the N belong to each image.
    valid_B: bool, False for a masked slot, whose predictions must not enter the loss.
    """

    labels_N: Tensor
    boxes_cxcywh_N4: Tensor
    counts_B: list[int]
    valid_B: Tensor

    image_N: Tensor = field(init=False)  # int64: the place in the batch of each box's image

    def __post_init__(self) -> None:
        self.image_N = torch.arange(len(self.counts_B)).repeat_interleave(torch.tensor(self.counts_B))

    def to(self, device: torch.device | str) -> "Targets":
        moved = copy.copy(self)
        for name in ("labels_N", "boxes_cxcywh_N4", "valid_B", "image_N"):
            setattr(moved, name, getattr(self, name).to(device, non_blocking=True))
        return moved


@dataclass
class Batch:
    """A micro-batch.

    images_BHW3: uint8, each image in the upper left corner, zeros beside and below it; channels last, as decoders and
        resizers leave them: the device moves them first, for less than a worker would take.
    sizes_hw: of the images after augmentation, without padding. original_sizes_hw: of the files.
    image_ids: -1 for the slots that fill up the tail of an epoch.
    bad: one message for each masked slot that a damaged sample caused.
    """

    images_BHW3: Tensor
    sizes_hw: list[tuple[int, int]]
    original_sizes_hw: list[tuple[int, int]]
    image_ids: list[int]
    targets: Targets
    bad: list[str]

    def inputs(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """What the model takes: normalised float32 images, zero on padding; bool mask, True on padding."""
        images = self.images_BHW3.to(device, non_blocking=True).permute(0, 3, 1, 2)
        images = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        mask = padding_mask(self.sizes_hw, images.shape[-2:]).to(device, non_blocking=True)
        return images.sub_(mean).div_(std).masked_fill_(mask[:, None], 0.0), mask


def padding_mask(sizes_hw: list[tuple[int, int]], padded_hw: tuple[int, ...]) -> Tensor:
    """(B, H, W) bool, True outside each image's own size."""
    mask_BHW = torch.ones(len(sizes_hw), *padded_hw, dtype=torch.bool)
    for mask_HW, (height, width) in zip(mask_BHW, sizes_hw, strict=True):
        mask_HW[:height, :width] = False
    return mask_BHW


def collate(examples: list[Example]) -> Batch:
    """Pad to the largest image of the micro-batch and put all boxes into one tensor."""
    sizes_hw = [(example.image_HW3.shape[0], example.image_HW3.shape[1]) for example in examples]
    height, width = (max(side) for side in zip(*sizes_hw, strict=True))
    images_BHW3 = np.zeros((len(examples), height, width, 3), dtype=np.uint8)
    for image_HW3, example, (h, w) in zip(images_BHW3, examples, sizes_hw, strict=True):
        image_HW3[:h, :w] = example.image_HW3
    targets = Targets(
        labels_N=torch.from_numpy(np.concatenate([e.labels_N for e in examples])),
        boxes_cxcywh_N4=torch.from_numpy(np.concatenate([e.boxes_cxcywh_N4 for e in examples])),
        counts_B=[len(e.labels_N) for e in examples],
        valid_B=torch.tensor([e.valid for e in examples]),
    )
    return Batch(
        torch.from_numpy(images_BHW3),
        sizes_hw,
        [e.original_size_hw for e in examples],
        [e.image_id for e in examples],
        targets,
        [e.bad for e in examples if e.bad is not None],
    )
