"""Decoding and augmentation of one image, as published: its geometry, its pixels, its boxes.

The geometry is drawn from numbers and the image's size alone, before a pixel is touched: whatever warps the
pixels, the boxes are the same.

Sizes are (height, width). Pillow's BILINEAR, which filters when it shrinks, is the published resize and the exact
backend. The fast one decodes JPEG by simplejpeg, to the same bits; enlarges by cv2 and shrinks by torch, which filters
too, each within a grey level of Pillow, two in the crop branch that resizes twice. EXIF rotation is ignored, as
published: COCO's boxes lie on the unrotated pixels.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError

from data_tools.pixels import FORMATS, to_8_bit
from data_tools.sample import Sample
from framework.data.batch import Example
from framework.errors import InputError

Backend = Literal["fast", "pillow"]

JPEG_MAGIC = b"\xff\xd8\xff"

cv2.setNumThreads(0)  # the loader's workers are what runs in parallel

# The published crop branch has no bound on the long side. No COCO image reaches this one; without it a strip
# of pixels would be enlarged to gigabytes.
CROP_BRANCH_MAX_SIZE = 10_000


@dataclass(frozen=True)
class Geometry:
    """What happens to an image, in this order: a flip; resize and crop, or neither; resize.

    crop_tlhw: top, left, height, width, in pixels after the resize to before_crop_hw.
    """

    flip: bool
    before_crop_hw: tuple[int, int]
    crop_tlhw: tuple[int, int, int, int] | None
    size_hw: tuple[int, int]


GeometryOf = Callable[[int, tuple[int, int]], Geometry]  # by image id and size


def training_geometry(
    size_hw: tuple[int, int],
    draws: Sequence[float],
    sizes: Sequence[int],
    max_size: int,
    crop_resize: Sequence[int],
    crop_sizes: Sequence[int],
) -> Geometry:
    """With p = 0.5 a flip; with p = 0.5 resize to one of `crop_resize` and crop; resize to one of `sizes`.

    Args:
        draws: 8 numbers in [0, 1).
        crop_resize: short sides before the crop; none: no image is cropped.
        crop_sizes: least and largest side of the crop; an image smaller than the least keeps its side.
    Source: make_coco_transforms of the published code (datasets/coco.py, datasets/transforms.py).
    """
    flip, crops, short_before, crop_h, crop_w, crop_top, crop_left, short_after = draws
    if not crop_resize or crops < 0.5:
        return Geometry(flip < 0.5, size_hw, None, resized_hw(size_hw, _choice(short_after, sizes), max_size))
    before_hw = resized_hw(size_hw, _choice(short_before, crop_resize), CROP_BRANCH_MAX_SIZE)
    height, width = (
        _integer(draw, min(crop_sizes[0], side), min(crop_sizes[1], side))
        for draw, side in zip((crop_h, crop_w), before_hw, strict=True)
    )
    top, left = _integer(crop_top, 0, before_hw[0] - height), _integer(crop_left, 0, before_hw[1] - width)
    size_after_hw = resized_hw((height, width), _choice(short_after, sizes), max_size)
    return Geometry(flip < 0.5, before_hw, (top, left, height, width), size_after_hw)


def evaluation_geometry(size_hw: tuple[int, int], short_side: int, max_size: int) -> Geometry:
    return Geometry(False, size_hw, None, resized_hw(size_hw, short_side, max_size))


def resized_hw(size_hw: tuple[int, int], short_side: int, max_size: int) -> tuple[int, int]:
    """Short side to `short_side`, or to less where the long side would pass `max_size`; the ratio is kept.

    Rounds as published (get_size_with_aspect_ratio), except that no side falls below 1.
    """
    low, high = min(size_hw), max(size_hw)
    if high / low * short_side > max_size:
        short_side = max(1, round(max_size * low / high))
    long_side = int(short_side * high / low)
    return (short_side, long_side) if size_hw[0] <= size_hw[1] else (long_side, short_side)


def _choice(draw: float, values: Sequence[int]) -> int:
    return values[int(draw * len(values))]


def _integer(draw: float, low: int, high: int) -> int:
    """Uniform over low..high, both included."""
    return low + int(draw * (high - low + 1))


def warp_image(image_HW3: np.ndarray, geometry: Geometry, backend: Backend = "fast") -> np.ndarray:
    """uint8 RGB to uint8 RGB."""
    resize = _resize_fast if backend == "fast" else _resize_exactly
    if geometry.flip:
        image_HW3 = cv2.flip(image_HW3, 1)
    if geometry.crop_tlhw is not None:
        top, left, height, width = geometry.crop_tlhw
        image_HW3 = resize(image_HW3, geometry.before_crop_hw)[top : top + height, left : left + width]
    return resize(image_HW3, geometry.size_hw)


def _resize_exactly(image_HW3: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image_HW3).resize(size_hw[::-1], Image.Resampling.BILINEAR))


def _resize_fast(image_HW3: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    height, width = image_HW3.shape[:2]
    if size_hw == (height, width):
        return image_HW3
    if size_hw[0] >= height and size_hw[1] >= width:
        return cv2.resize(image_HW3, size_hw[::-1], interpolation=cv2.INTER_LINEAR)
    # cv2 does not filter when it shrinks by INTER_LINEAR, and its INTER_AREA is another filter than Pillow's.
    image_13HW = torch.from_numpy(np.require(image_HW3, requirements=["C", "W"])).permute(2, 0, 1)[None]
    shrunk_13HW = torch.nn.functional.interpolate(image_13HW, size_hw, mode="bilinear", antialias=True)
    return shrunk_13HW[0].permute(1, 2, 0).numpy()


def warp_boxes(
    boxes_xyxy_px_N4: np.ndarray, size_hw: tuple[int, int], geometry: Geometry
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of an image of size_hw after the geometry, clipped; and which of the N have area left (bool)."""
    x1, y1, x2, y2 = boxes_xyxy_px_N4.T
    if geometry.flip:
        x1, x2 = size_hw[1] - x2, size_hw[1] - x1
    boxes = np.stack([x1, y1, x2, y2], axis=1)
    if geometry.crop_tlhw is not None:
        top, left, *crop_hw = geometry.crop_tlhw
        boxes = boxes * _scale(size_hw, geometry.before_crop_hw) - np.array([left, top, left, top])
        size_hw = (crop_hw[0], crop_hw[1])
    boxes = boxes.clip(0, np.array([size_hw[1], size_hw[0]] * 2))
    return boxes * _scale(size_hw, geometry.size_hw), np.all(boxes[:, 2:] > boxes[:, :2], axis=1)


def _scale(from_hw: tuple[int, int], to_hw: tuple[int, int]) -> np.ndarray:
    return np.array([to_hw[1] / from_hw[1], to_hw[0] / from_hw[0]] * 2)


def decode_rgb(data: bytes, backend: Backend = "fast") -> np.ndarray:
    """Any image file as uint8 RGB (H, W, 3), the same bits by either backend. Raises InputError."""
    if backend == "fast" and data[:3] == JPEG_MAGIC:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in ("YCbCr", "RGB", "Gray") and height * width <= (Image.MAX_IMAGE_PIXELS or math.inf):
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except (ValueError, KeyError, RuntimeError):
            pass  # damaged, or of a kind that it does not take: Pillow decides, and says what is wrong
    return np.asarray(decode(data))


def decode(data: bytes) -> Image.Image:
    """Any image file as 8-bit RGB, by Pillow. Raises InputError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return to_8_bit(image).convert("RGB")
    except UnidentifiedImageError as error:  # its own words name an address in memory: not the same on all ranks
        raise InputError("not a readable image (of no known format)") from error
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes make them stumble over
        raise InputError(f"not a readable image ({type(error).__name__}: {error})") from error


def augment(
    data: bytes,
    sample: Sample,
    geometry_of: GeometryOf,
    labels: str,
    backend: Backend = "fast",
) -> Example:
    """An encoded image and its annotations as an Example: crowds are left out, and boxes with no area left.

    Args:
        geometry_of: by image id and size.
        labels: 'contiguous' or 'category_id': which number of its class a box gets.
    Raises:
        InputError: not an image, not of the size that its annotations were made for, or no numbers in them.
    """
    image_HW3 = decode_rgb(data, backend)
    height, width = image_HW3.shape[:2]
    if (height, width) != (sample.height, sample.width):
        raise InputError(
            f"the image is {width} x {height} pixels, its annotations are for {sample.width} x {sample.height}"
        )
    geometry = geometry_of(sample.image_id, (height, width))
    boxes_cxcywh_N4, labels_N = warped_annotations(sample, labels, geometry)
    pixels_HW3 = warp_image(image_HW3, geometry, backend)
    return Example(pixels_HW3, sample.image_id, (height, width), boxes_cxcywh_N4, labels_N)


def warped_annotations(sample: Sample, labels: str, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as fractions of the warped image (cxcywh, float32) and their labels (int64). Raises InputError."""
    boxes_xyxy_px_N4, labels_N = _annotations(sample, labels)
    boxes_xyxy_px_N4, keep_N = warp_boxes(boxes_xyxy_px_N4, (sample.height, sample.width), geometry)
    return _fractions(boxes_xyxy_px_N4[keep_N], geometry.size_hw), labels_N[keep_N]


def evaluation_example(
    image: Image.Image, image_id: int, sizes: Sequence[int], max_size: int, backend: Backend = "fast"
) -> Example:
    """An RGB image without annotations, resized as for evaluation."""
    size_hw = (image.height, image.width)
    geometry = evaluation_geometry(size_hw, max(sizes), max_size)
    return Example(warp_image(np.asarray(image), geometry, backend), image_id, size_hw)


def _annotations(sample: Sample, labels: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        boxes_xyxy_px_N4 = np.array(sample.boxes_xyxy_px, dtype=np.float64).reshape(-1, 4)
        labels_N = np.array(sample.category_ids if labels == "category_id" else sample.labels, dtype=np.int64)
        alone_N = np.array(sample.iscrowd, dtype=np.int64) == 0
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"its annotations are not numbers ({error})") from error
    return boxes_xyxy_px_N4[alone_N], labels_N[alone_N]


def _fractions(boxes_xyxy_px_N4: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """cxcywh, float32, as fractions of the image."""
    low_N2, high_N2 = np.split(boxes_xyxy_px_N4 * _scale(size_hw, (1, 1)), 2, axis=1)
    return np.concatenate([(low_N2 + high_N2) / 2, high_N2 - low_N2], axis=1, dtype=np.float32)
