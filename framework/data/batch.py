"""What travels from the loader to the training step: uint8 pixels and their targets.

Padding, its mask, float and normalisation are made on the device: less than a quarter of the bytes cross the bus.

# B image of the micro-batch, N box of the micro-batch (image after image), P its bytes, H W padded pixels
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

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
        self.image_N = torch.from_numpy(np.repeat(np.arange(len(self.counts_B)), self.counts_B))

    def to(self, device: torch.device | str) -> "Targets":
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Targets":
        return self._changed(Tensor.pin_memory)

    def of_one_class(self) -> "Targets":
        """The same with every label 0."""
        changed = self._changed(lambda tensor: tensor)
        changed.labels_N = torch.zeros_like(self.labels_N)
        return changed

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        changed = Targets.__new__(Targets)
        for name, value in vars(self).items():
            setattr(changed, name, change(value) if isinstance(value, Tensor) else value)
        return changed

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_arrays, (Targets, *_arrays(self))


@dataclass
class Batch:
    """A micro-batch.

    pixels_P: uint8, image after image, each (height, width, 3) without padding, as decoders and resizers leave them.
    sizes_hw: of the images after augmentation. original_sizes_hw: of the files.
    image_ids: -1 for the slots that fill up the tail of an epoch.
    bad: one message for each masked slot that a damaged sample caused.
    """

    pixels_P: Tensor
    sizes_hw: list[tuple[int, int]]
    original_sizes_hw: list[tuple[int, int]]
    image_ids: list[int]
    targets: Targets
    bad: list[str]

    def inputs(self, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        """What the model takes: normalised float32 images (B, 3, H, W) and a bool mask (B, H, W), True on padding; None
        instead of the mask where there is no padding, which saves the model work.

        H and W are the largest of the micro-batch; each image is in the upper left corner, zeros beside and below it.
        """
        height, width = (max(side) for side in zip(*self.sizes_hw, strict=True))
        images_B3HW = torch.zeros(len(self.sizes_hw), 3, height, width, device=device)
        mask_BHW = None
        if len(set(self.sizes_hw)) > 1:
            mask_BHW = torch.ones(len(self.sizes_hw), height, width, dtype=torch.bool, device=device)
        mean_311, std_311 = _normalisation(images_B3HW.device)
        pixels = self.pixels_P.to(device, non_blocking=True)
        for i, (padded, image_HW3) in enumerate(zip(images_B3HW, images_in(pixels, self.sizes_hw), strict=True)):
            h, w = image_HW3.shape[:2]
            padded[:, :h, :w].copy_(image_HW3.permute(2, 0, 1)).div_(255).sub_(mean_311).div_(std_311)
            if mask_BHW is not None:
                mask_BHW[i, :h, :w] = False
        return images_B3HW, mask_BHW

    def pin_memory(self) -> "Batch":
        """In memory that a GPU reads by itself, while the processor goes on."""
        return replace(self, pixels_P=self.pixels_P.pin_memory(), targets=self.targets.pin_memory())

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_arrays, (Batch, *_arrays(self))


@functools.cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3, 1, 1), copied to the device once: the processor waits for such a copy."""
    mean, std = (torch.tensor(numbers, device=device).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


# Between processes tensors travel as arrays: torch would open a piece of shared memory, and a file, for each of them.


def _arrays(record: Targets | Batch) -> list[Any]:
    values = [getattr(record, f.name) for f in fields(record) if f.init]
    return [value.numpy() if isinstance(value, Tensor) else value for value in values]


def _from_arrays(kind: Any, *values: Any) -> Any:
    return kind(*[torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values])


def images_in(pixels_P: Any, sizes_hw: Sequence[tuple[int, int]]) -> list[Any]:
    """Views of a tensor or array of pixels: each image (height, width, 3)."""
    ends = np.cumsum([3 * height * width for height, width in sizes_hw]).tolist()
    return [pixels_P[end - 3 * h * w : end].reshape(h, w, 3) for end, (h, w) in zip(ends, sizes_hw, strict=True)]


def padded_side(side: int, grain: int) -> int:
    """The next multiple of grain."""
    return -(-side // grain) * grain


def padded_pixels(sizes_hw: Sequence[tuple[int, int]], grain: int) -> int:
    """Of a micro-batch of images of these sizes, whose sides are padded to multiples of grain."""
    height, width = (padded_side(max(sides), grain) for sides in zip(*sizes_hw, strict=True))
    return len(sizes_hw) * height * width


def blank_batch(sizes_hw: Sequence[tuple[int, int]], boxes: int) -> Batch:
    """Black images of these sizes, with so many boxes in the first one."""
    box_14 = np.array([[0.5, 0.5, 0.5, 0.5]], dtype=np.float32)
    counts = [boxes] + [0] * (len(sizes_hw) - 1)
    return collate([
        Example(np.zeros((*size_hw, 3), np.uint8), -1, size_hw, box_14.repeat(count, 0), np.zeros(count, np.int64))
        for size_hw, count in zip(sizes_hw, counts, strict=True)
    ])  # fmt: skip


def bytes_of(examples: Sequence[Example]) -> int:
    """That their pixels take."""
    return sum(example.image_HW3.size for example in examples)


def collate(examples: Sequence[Example], buffer_P: np.ndarray | None = None) -> Batch:
    """All pixels and all boxes one after another; the pixels in the buffer (uint8, of `bytes_of`) if there is one."""
    sizes_hw = [(example.image_HW3.shape[0], example.image_HW3.shape[1]) for example in examples]
    pixels_P = np.empty(bytes_of(examples), np.uint8) if buffer_P is None else buffer_P
    for place_HW3, example in zip(images_in(pixels_P, sizes_hw), examples, strict=True):
        place_HW3[:] = example.image_HW3
    targets = Targets(
        labels_N=torch.from_numpy(np.concatenate([e.labels_N for e in examples])),
        boxes_cxcywh_N4=torch.from_numpy(np.concatenate([e.boxes_cxcywh_N4 for e in examples])),
        counts_B=[len(e.labels_N) for e in examples],
        valid_B=torch.tensor([e.valid for e in examples]),
    )
    return Batch(
        torch.from_numpy(pixels_P),
        sizes_hw,
        [e.original_size_hw for e in examples],
        [e.image_id for e in examples],
        targets,
        [e.bad for e in examples if e.bad is not None],
    )
