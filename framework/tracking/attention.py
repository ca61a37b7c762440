"""Figures of what a detector looks at: sampling points in the colour of their weight, or a heat map (DETR).

A row for the encoder, one for the decoder; in it all levels together, then each alone, in the same colours. After
figure 6 of Zhu et al. 2021.

# L level, M head, P point, N = M * L * P
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_tools.sample import Category
from framework.evaluation.attention import Inspection
from framework.models.look import Look
from framework.tracking.pictures import BLACK, WHITE

IMAGE_PX, MARGIN_PX = 420, 45  # long side of the image in a panel, and what is seen around it on each side
POINT_PX = 5  # radius
HEADING_PX, TEXT_PX, GAP_PX = 20, 15, 16
BAR_PX, NUMBERS_PX = 18, 72
COLUMN_PX = 270  # a panel's title needs as much
AROUND, GREY = (215, 215, 215), (128, 128, 128)
HEAT_SHARE = 0.65  # of a heat map's colour in a pixel; the rest is the image
# From dark to light in even steps, for the colour-blind too: matplotlib's "plasma" (van der Walt and Smith, CC0).
RAMP = np.array([
    (13, 8, 135), (84, 2, 163), (139, 10, 165), (185, 50, 137), (219, 92, 104), (244, 136, 73), (254, 188, 43),
    (240, 249, 33),
])  # fmt: skip


def draw_attention(image: Image.Image, found: Inspection, classes: Sequence[Category]) -> Image.Image:
    """The figure of one object; `image` may have any size: its long side is shown as IMAGE_PX."""
    name = next(category.name for category in classes if category.category_id == found.category_id)
    base = _base(image)
    rows = [_row(base, found, look, name) for look in found.looks]
    figure = Image.new("RGB", (max(row.width for row in rows) + GAP_PX, sum(row.height for row in rows)), WHITE)
    for number, row in enumerate(rows):
        figure.paste(row, (GAP_PX, number * row.height))
    return figure


def ramp(shares: np.ndarray) -> np.ndarray:
    """uint8 RGB (..., 3) for numbers from 0 to 1."""
    steps = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(shares, steps, channel) for channel in RAMP.T], axis=-1).round().astype(np.uint8)


def panel_px(xy: np.ndarray, panel_size: tuple[int, int]) -> np.ndarray:
    """Where points (..., 2: x, y), fractions of the image, are in a panel of this width and height."""
    return MARGIN_PX + xy * (np.array(panel_size) - 2 * MARGIN_PX)


def _base(image: Image.Image) -> Image.Image:
    """The image with less colour and contrast, so that what is drawn on it stands out, within its margin."""
    factor = IMAGE_PX / max(image.size)
    width, height = (max(1, round(factor * side)) for side in image.size)
    shown = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    shown = Image.blend(shown, shown.convert("L").convert("RGB"), 0.6)
    shown = Image.blend(shown, Image.new("RGB", shown.size, GREY), 0.3)
    base = Image.new("RGB", (width + 2 * MARGIN_PX, height + 2 * MARGIN_PX), AROUND)
    base.paste(shown, (MARGIN_PX, MARGIN_PX))
    return base


def _row(base: Image.Image, found: Inspection, look: Look, name: str) -> Image.Image:
    """Heading; a panel for all levels and one for each, under its title; the colours' numbers."""
    levels = list(range(len(look.shapes_hw)))
    largest = float(_drawn_weights(look).max())
    columns = []
    for some in [levels, *([level] for level in levels)] if len(levels) > 1 else [levels]:
        panel = base.copy()
        if look.xy_MLP2 is None:
            _draw_heat(panel, look, largest)
        _draw_object(panel, found, look)
        if look.xy_MLP2 is not None:
            _draw_points(panel, look, some, largest)
        columns.append(_under(_title(found, look, some), panel, COLUMN_PX))
    share = HEAT_SHARE if look.xy_MLP2 is None else 1.0
    columns.append(_under(["", "", "weight"], _colour_bar(base.height, largest, share), 0))
    row = Image.new("RGB", (sum(column.width + GAP_PX for column in columns), columns[0].height + GAP_PX), WHITE)
    left = 0
    for column in columns:
        row.paste(column, (left, 0))
        left += column.width + GAP_PX
    return _under(["", *_heading(found, look, name)], row, 0, HEADING_PX)


def _drawn_weights(look: Look) -> Tensor:
    """(M, L, P) of sampling points; (1, 1, P), the mean of the heads, of a heat map."""
    return look.weights_MLP.mean(dim=0, keepdim=True) if look.xy_MLP2 is None else look.weights_MLP


def _heading(found: Inspection, look: Look, name: str) -> list[str]:
    where = f"{look.part.capitalize()}, layer {look.layer} of {look.layers}"
    squares = "; squares: points farther out" if look.xy_MLP2 is not None else ""
    if look.part == "encoder":
        return [f"{where}: the token at the cross", f"box: query {found.query}'s prediction{squares}"]
    stands = {0: "", 2: "; cross: reference point", 4: "; dashes: reference box"}[len(look.reference_n)]
    return [f"{where}: query {found.query}, {name} {found.score:.2f}", f"box: its prediction{stands}{squares}"]


def _title(found: Inspection, look: Look, levels: list[int]) -> list[str]:
    """Which level, its width and height in places, its share of the weight, and how much of it lies outside."""
    heads = len(look.weights_MLP)
    height, width = look.shapes_hw[levels[0]]
    map_of = f"level {levels[0] + 1}: {width} x {height}, stride {found.strides[levels[0]]}"
    if look.xy_MLP2 is None:
        return [map_of, f"every place, mean of {heads} heads", ""]
    outside = ((look.xy_MLP2[:, levels] < 0) | (look.xy_MLP2[:, levels] > 1)).any(dim=-1)
    weights = look.weights_MLP[:, levels]
    points = f"{heads} heads x {len(look.shapes_hw)} levels x {weights.shape[-1]} points"
    return [
        map_of if len(levels) == 1 else f"all levels: {points}",
        f"{weights.sum() / heads:.1%} of the weight",
        f"{weights[outside].sum() / heads:.1%} outside the image ({outside.sum()} of {outside.numel()})",
    ]


def _draw_points(panel: Image.Image, look: Look, levels: list[int], largest: float) -> None:
    """Each head's points, the heaviest on top; those beyond the margin as squares at its edge."""
    assert look.xy_MLP2 is not None
    xy_px_N2 = panel_px(look.xy_MLP2[:, levels].reshape(-1, 2).numpy(), panel.size)
    weights_N = look.weights_MLP[:, levels].reshape(-1).numpy()
    inside_px_N2 = xy_px_N2.clip(POINT_PX, np.array(panel.size) - 1 - POINT_PX)
    draw = ImageDraw.Draw(panel)
    for i in weights_N.argsort(kind="stable"):
        x, y = inside_px_N2[i]
        shape = draw.ellipse if (inside_px_N2[i] == xy_px_N2[i]).all() else draw.rectangle
        red, green, blue = ramp(weights_N[i] / largest).tolist()
        shape((x - POINT_PX, y - POINT_PX, x + POINT_PX, y + POINT_PX), fill=(red, green, blue), outline=BLACK)


def _draw_heat(panel: Image.Image, look: Look, largest: float) -> None:
    """The mean weight of each place as a colour over the image."""
    shares_HW = (_drawn_weights(look).view(look.shapes_hw[0]) / largest).numpy()
    size = (panel.width - 2 * MARGIN_PX, panel.height - 2 * MARGIN_PX)
    enlarged_HW = np.asarray(Image.fromarray(shares_HW).resize(size, Image.Resampling.BILINEAR))
    inside = (MARGIN_PX, MARGIN_PX, MARGIN_PX + size[0], MARGIN_PX + size[1])
    panel.paste(Image.blend(panel.crop(inside), Image.fromarray(ramp(enlarged_HW)), HEAT_SHARE), inside)


def _draw_object(panel: Image.Image, found: Inspection, look: Look) -> None:
    """The object's box, and where query or token stands: dashes along a box, a cross on a point."""
    draw = ImageDraw.Draw(panel)
    x1, y1, x2, y2 = _corners(found.box_cxcywh, panel.size)
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=BLACK, width=4)
    draw.rectangle((x1, y1, x2, y2), outline=WHITE, width=2)
    reference = look.reference_n.tolist()
    if len(reference) == 4:
        _dashes(draw, _corners(reference, panel.size))
    if len(reference) == 2:
        x, y = panel_px(np.array(reference), panel.size)
        for colour, reach, width in ((BLACK, 15, 5), (WHITE, 14, 3)):
            draw.line((x - reach, y, x + reach, y), fill=colour, width=width)
            draw.line((x, y - reach, x, y + reach), fill=colour, width=width)


def _corners(box_cxcywh: Sequence[float], size: tuple[int, int]) -> list[float]:
    """x1, y1, x2, y2 in pixels of the panel; what sticks out of it is cut off."""
    x, y, w, h = box_cxcywh
    corners = panel_px(np.array([[x - w / 2, y - h / 2], [x + w / 2, y + h / 2]]), size)
    return corners.clip(0, np.array(size) - 1).flatten().tolist()


def _dashes(draw: ImageDraw.ImageDraw, corners: list[float]) -> None:
    x1, y1, x2, y2 = corners
    for x in np.arange(x1, x2, 12):
        for y in (y1, y2):
            draw.line((x, y, min(x + 6, x2), y), fill=WHITE, width=2)
    for y in np.arange(y1, y2, 12):
        for x in (x1, x2):
            draw.line((x, y, x, min(y + 6, y2)), fill=WHITE, width=2)


def _colour_bar(height: int, largest: float, share_of_colour: float) -> Image.Image:
    """The ramp from 0, at the bottom, to the largest weight, with numbers; mixed with grey as with the image."""
    bar = Image.new("RGB", (BAR_PX + NUMBERS_PX, height), WHITE)
    colours_H13 = ramp(np.linspace(1, 0, height))[:, None]
    colours = Image.fromarray(colours_H13).resize((BAR_PX, height))
    bar.paste(Image.blend(Image.new("RGB", colours.size, GREY), colours, share_of_colour), (0, 0))
    draw, font = ImageDraw.Draw(bar), ImageFont.load_default(TEXT_PX)
    for share, anchor in ((0.0, "ls"), (0.25, "lm"), (0.5, "lm"), (0.75, "lm"), (1.0, "lt")):
        place = (BAR_PX + 5, (1 - share) * (height - 1))
        draw.text(place, f"{share * largest:.2g}", fill=BLACK, font=font, anchor=anchor)
    return bar


def _under(lines: list[str], picture: Image.Image, least_width: int, text_px: int = TEXT_PX) -> Image.Image:
    """The picture below lines of text, on white and as wide as the wider of them."""
    font, line_px = ImageFont.load_default(text_px), round(1.3 * text_px)
    width = max(least_width, picture.width, *(round(font.getlength(line)) for line in lines))
    whole = Image.new("RGB", (width, len(lines) * line_px + GAP_PX // 2 + picture.height), WHITE)
    for number, line in enumerate(lines):
        ImageDraw.Draw(whole).text((0, number * line_px), line, fill=BLACK, font=font)
    whole.paste(picture, (0, whole.height - picture.height))
    return whole
