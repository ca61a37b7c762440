"""Points stand where they were sampled, in the colour of their weight; nothing that lies outside is hidden."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.sample import Category
from framework.evaluation.attention import Inspection
from framework.models.look import Look
from framework.tracking.attention import AROUND, IMAGE_PX, MARGIN_PX, draw_attention, ramp

CLASSES = [Category("disc", 3), Category("ring", 7)]
GREY = Image.new("RGB", (200, 100), (100, 100, 100))  # drawn at 420 x 210
PANEL_HW = (IMAGE_PX // 2 + 2 * MARGIN_PX, IMAGE_PX + 2 * MARGIN_PX)


def inspection(*looks, box=(0.5, 0.5, 0.02, 0.04)):
    return Inspection(4, 7, 0.875, box, [8, 16], list(looks))


def points(xy, weights, reference=(), part="decoder"):
    """One head, two levels of one point each unless more are given: (L, P, 2) and (L, P)."""
    return Look(part, 1, 2, [(13, 25), (7, 13)][: len(xy)], torch.tensor(reference),
                torch.tensor([xy], dtype=torch.float32), torch.tensor([weights], dtype=torch.float32))  # fmt: skip


def panels(figure):
    """The panels, by their grey margins, as arrays in reading order."""
    around = (np.asarray(figure) == AROUND).all(-1)
    lines = np.flatnonzero(around.sum(1) > PANEL_HW[1] * 0.9)
    tops = [line for line in lines if line - 1 not in lines and around[line : line + 10].any(0).sum() > 400]
    found = []
    for top in tops:
        if found and top < found[-1][0] + PANEL_HW[0]:
            continue
        lefts = [x for x in np.flatnonzero(around[top]) if not around[top, x - 1]]
        found += [(top, left) for left in lefts]
    return [np.asarray(figure)[top : top + PANEL_HW[0], left : left + PANEL_HW[1]] for top, left in found]


def centre_of(panel, colour):
    """x, y, of the pixels of this colour, in fractions of the image, and how many they are."""
    rows, columns = np.nonzero((panel == colour).all(-1))
    x, y = (columns.mean() - MARGIN_PX) / IMAGE_PX, (rows.mean() - MARGIN_PX) / (IMAGE_PX / 2)
    return x, y, len(rows)


def test_points_lie_where_they_were_sampled_in_the_colour_of_their_weight():
    figure = draw_attention(GREY, inspection(points([[(0.25, 0.5)], [(0.75, 0.1)]], [[0.8], [0.2]])), CLASSES)
    both, first, second = panels(figure)
    heavy, light = ramp(np.float64(1.0)), ramp(np.float64(0.25))  # of the largest, in all panels
    for panel in (both, first):
        x, y, count = centre_of(panel, heavy)
        assert (x, y) == pytest.approx((0.25, 0.5), abs=0.005) and 50 < count < 90  # a disc of 11 pixels
    for panel in (both, second):
        x, y, count = centre_of(panel, light)
        assert (x, y) == pytest.approx((0.75, 0.1), abs=0.005) and 50 < count < 90
    assert not (first == light).all(-1).any() and not (second == heavy).all(-1).any()


def test_the_heavier_point_lies_on_top():
    for order in ([0.9, 0.1], [0.1, 0.9]):
        figure = draw_attention(GREY, inspection(points([[(0.3, 0.3), (0.3, 0.3)]], [order])), CLASSES)
        (panel,) = panels(figure)
        assert (panel == ramp(np.float64(1.0))).all(-1).any()
        assert not (panel == ramp(np.float64(1 / 9))).all(-1).any()


def test_points_outside_are_in_the_margin_or_squares_at_its_edge():
    figure = draw_attention(GREY, inspection(points([[(1.05, 0.5), (-3.0, 0.25)]], [[0.75, 0.25]])), CLASSES)
    (panel,) = panels(figure)
    x, y, _ = centre_of(panel, ramp(np.float64(1.0)))
    assert (x, y) == pytest.approx((1.05, 0.5), abs=0.005)
    rows, columns = np.nonzero((panel == ramp(np.float64(1 / 3))).all(-1))
    assert columns.min() == 1 and len(rows) == 9 * 9  # a square within its black line
    assert rows.mean() == pytest.approx(MARGIN_PX + 0.25 * IMAGE_PX / 2, abs=1)


def test_the_map_of_dense_attention_is_bright_where_the_weight_is():
    weights_MHW = torch.zeros(2, 4, 8)
    weights_MHW[0, 1, 6], weights_MHW[1, 1, 6], weights_MHW[1, 3, 0] = 1.0, 0.5, 0.5
    look = Look("encoder", 2, 2, [(4, 8)], torch.zeros(0), None, weights_MHW.view(2, 1, 32))
    (panel,) = panels(draw_attention(GREY, inspection(look), CLASSES))
    inside = panel[MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX].astype(int)
    brightness = inside.sum(-1)

    def at(line, column):  # of the map
        return brightness[round((line + 0.5) / 4 * len(inside)), round((column + 0.5) / 8 * inside.shape[1])]

    assert brightness[:90].max() - 5 <= at(1, 6) > at(3, 0) + 50 > at(0, 2) + 100 and at(0, 2) == at(2, 3)


def test_box_and_reference_are_marked():
    box = (0.5, 0.5, 0.5, 0.5)
    plain, cross, dashes = (
        panels(draw_attention(GREY, inspection(points([[(0.9, 0.9)]], [[1.0]], reference), box=box), CLASSES))[0]
        for reference in ((), (0.3, 0.2), (0.2, 0.5, 0.2, 0.8))
    )
    white = (255, 255, 255)
    rows, columns = np.nonzero((plain == white).all(-1))
    left, top = MARGIN_PX + 0.25 * IMAGE_PX, MARGIN_PX + 0.25 * IMAGE_PX / 2
    assert (columns.min(), rows.min()) == pytest.approx((left, top), abs=1)
    assert (columns.max(), rows.max()) == pytest.approx((left + 210, top + 105), abs=1)
    differs = (cross != plain).any(-1)
    x, y = (np.flatnonzero(differs.any(axis)).mean() for axis in (0, 1))
    assert (x, y) == pytest.approx((MARGIN_PX + 0.3 * IMAGE_PX, MARGIN_PX + 0.2 * IMAGE_PX / 2), abs=1)
    rows, columns = np.nonzero((dashes != plain).any(-1))
    assert (columns.min(), rows.min()) == pytest.approx((MARGIN_PX + 0.1 * IMAGE_PX, MARGIN_PX + 21), abs=1)


def test_a_row_for_each_part_and_the_image_of_any_size():
    encoder = points([[(0.5, 0.5)], [(0.5, 0.5)]], [[0.5], [0.5]], (0.5, 0.5), "encoder")
    decoder = points([[(0.5, 0.5)], [(0.5, 0.5)]], [[0.5], [0.5]])
    whole = draw_attention(GREY, inspection(encoder, decoder), CLASSES)
    alone = draw_attention(GREY.resize((1000, 500)), inspection(decoder), CLASSES)
    assert len(panels(whole)) == 6 and len(panels(alone)) == 3
    assert np.array_equal(panels(whole)[3], panels(alone)[0])
    assert draw_attention(Image.new("L", (3, 900)), inspection(decoder), CLASSES).height < 800


def test_the_ramp_gets_lighter_all_the_way():
    brightness = ramp(np.linspace(0, 1, 50)).astype(float) @ [0.299, 0.587, 0.114]
    assert (np.diff(brightness) > 0).all() and brightness[0] < 40 and brightness[-1] > 200
