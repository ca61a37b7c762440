"""Boxes drawn on images so that a person can read them, small images enlarged."""

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_tools.sample import Category

Colour = tuple[int, int, int]

LONG_SIDE_PX = 640  # pictures are at least this large, so that text fits
TEXT_PX, MARGIN_PX = 13, 2
BLACK, WHITE, GREY = (0, 0, 0), (255, 255, 255), (48, 48, 48)
# Far apart in hue and lightness, after Trubetskoy's list; more classes go round the colour circle.
PALETTE: tuple[Colour, ...] = (
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (67, 99, 216), (245, 130, 49), (66, 212, 244),
    (240, 50, 230), (191, 239, 69), (250, 190, 212), (0, 140, 140), (220, 190, 255), (154, 99, 36),
    (255, 250, 200), (145, 20, 40), (170, 255, 195), (128, 128, 0),
)  # fmt: skip


def colour_of(label: int) -> Colour:
    """The colour of a class, the same in every picture."""
    if 0 <= label < len(PALETTE):
        return PALETTE[label]
    red, green, blue = colorsys.hsv_to_rgb((label * 0.618034) % 1.0, 0.55 + 0.4 * (label % 2), 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: Image.Image | np.ndarray,
    boxes_xyxy_px: Sequence[Sequence[float]],
    texts: Sequence[str],
    colours: Sequence[Colour],
) -> Image.Image:
    """The image with N boxes and their texts; a small one is enlarged until its long side is LONG_SIDE_PX.

    image: PIL or uint8 (H, W, 3). boxes_xyxy_px: in its pixels; what sticks out is cut off.
    The first box lies on top: give the most certain ones first.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    factor = max(1.0, LONG_SIDE_PX / max(picture.size))
    size = (round(picture.width * factor), round(picture.height * factor))
    picture = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_text_px(picture))
    corners = [_inside(box, factor, size) for box in boxes_xyxy_px]
    drawn = list(zip(corners, texts, colours, strict=True))[::-1]
    for box, _, colour in drawn:
        draw.rectangle(box, outline=colour, width=max(2, max(size) // 400))
    for box, text, colour in drawn:  # after all boxes, so that no line crosses a text
        _plate(draw, box, text, colour, font, size[0])
    return picture


def draw_coco(
    image: Image.Image | np.ndarray, boxes: Sequence[Mapping[str, Any]], classes: Sequence[Category]
) -> Image.Image:
    """COCO annotations or results of one image, drawn with class names and, where there is one, the score."""
    label_of = {category.category_id: label for label, category in enumerate(classes)}
    boxes = sorted(boxes, key=lambda box: -box.get("score", 0.0))
    corners = [(x, y, x + w, y + h) for x, y, w, h in (box["bbox"] for box in boxes)]
    labels = [label_of[box["category_id"]] for box in boxes]
    texts = [
        classes[label].name + (f" {box['score']:.2f}" if "score" in box else "")
        for label, box in zip(labels, boxes, strict=True)
    ]
    return draw_boxes(image, corners, texts, [colour_of(label) for label in labels])


def _text_px(picture: Image.Image) -> int:
    return max(TEXT_PX, max(picture.size) // 60)


def _inside(box_xyxy_px: Sequence[float], factor: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last pixel of the box in the enlarged picture."""
    (x1, x2), (y1, y2) = (
        sorted(min(max(round(factor * end) - past, 0), limit - 1) for end, past in ((low, 0), (high, 1)))
        for low, high, limit in (
            (box_xyxy_px[0], box_xyxy_px[2], size[0]),
            (box_xyxy_px[1], box_xyxy_px[3], size[1]),
        )
    )
    return x1, y1, x2, y2


def _plate(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    text: str,
    colour: Colour,
    font: Any,
    right_edge: int,
) -> None:
    """The text on a plate of the box's colour: above the box where there is room, else inside its top."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 2 * MARGIN_PX, bottom - top + 2 * MARGIN_PX
    x = max(0, min(box[0], right_edge - width))
    y = box[1] - height if box[1] >= height else box[1]
    if text:
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        draw.text((x + MARGIN_PX - left, y + MARGIN_PX - top), text, fill=_readable_on(colour), font=font)


def _readable_on(colour: Colour) -> Colour:
    red, green, blue = colour
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else WHITE


def side_by_side(left: Image.Image, right: Image.Image, titles: tuple[str, str]) -> Image.Image:
    """Two pictures of one size beside each other, each under its title."""
    font = ImageFont.load_default(_text_px(left))
    bar = 2 * _text_px(left)
    joined = Image.new("RGB", (left.width + MARGIN_PX + right.width, bar + max(left.height, right.height)), GREY)
    draw = ImageDraw.Draw(joined)
    for x, picture, title in ((0, left, titles[0]), (left.width + MARGIN_PX, right, titles[1])):
        joined.paste(picture, (x, bar))
        draw.text((x + bar // 3, bar // 2), title, fill=WHITE, font=font, anchor="lm")
    return joined
