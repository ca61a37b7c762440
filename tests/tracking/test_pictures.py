"""Boxes stand where they belong, in the colour of their class, and text is there to be read."""

import numpy as np
from PIL import Image

from data_tools.sample import Category
from framework.tracking.pictures import LONG_SIDE_PX, PALETTE, colour_of, draw_boxes, draw_coco, side_by_side

RED = (255, 0, 0)


def coloured(picture, colour):
    """Rows and columns of the pixels that have exactly this colour."""
    return np.nonzero((np.asarray(picture) == colour).all(-1))


def test_a_small_image_is_enlarged_and_its_box_with_it():
    grey = np.full((80, 160, 3), 100, np.uint8)
    picture = draw_boxes(grey, [(20, 30, 60, 50)], [""], [RED])
    assert picture.size == (LONG_SIDE_PX, LONG_SIDE_PX // 2)
    rows, columns = coloured(picture, RED)
    # factor 4: pixels [80, 240) x [120, 200), outline only
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (80, 239, 120, 199)
    assert picture.getpixel((160, 160)) == (100, 100, 100) and grey.min() == 100


def test_a_large_image_keeps_its_size_and_a_box_outside_is_cut():
    picture = draw_boxes(
        Image.new("L", (900, 700), 50), [(-40, 600, 100, 720), (950, 10, 990, 20)], ["", ""], [RED] * 2
    )
    assert picture.size == (900, 700) and picture.mode == "RGB"
    rows, columns = coloured(picture, RED)
    assert (rows.max(), columns.min()) == (699, 0) and {600, 699} <= set(rows.tolist())
    assert columns.max() == 899  # the box beside the image clings to its edge instead of failing


def test_text_stands_on_a_plate_of_the_colour_inside_the_picture():
    boxes = [(0, 0, 30, 30), (600, 300, 640, 340)]
    empty = draw_boxes(Image.new("RGB", (640, 640)), boxes, ["", ""], [RED, RED])
    named = draw_boxes(Image.new("RGB", (640, 640)), boxes, ["disc 0.98", "a class with a long name 0.51"], [RED, RED])
    more = (np.asarray(named) == RED).all(-1) & ~(np.asarray(empty) == RED).all(-1)
    rows, columns = np.nonzero(more)
    assert more[:40, :120].sum() > 300  # the box touches the top: its plate is inside it
    assert more[270:300].sum() > 1000 and columns.max() <= 639 and rows.min() >= 0  # above, pushed left to fit
    assert len(coloured(named, (255, 255, 255))[0]) > 50  # white letters on red


def test_the_most_certain_box_lies_on_top():
    picture = draw_coco(
        Image.new("RGB", (640, 640)),
        [{"category_id": 7, "bbox": [100, 100, 200, 200], "score": 0.4},
         {"category_id": 3, "bbox": [100, 100, 200, 200], "score": 0.9}],
        [Category("disc", 3), Category("ring", 7)],
    )  # fmt: skip
    assert picture.getpixel((100, 200)) == colour_of(0)
    assert coloured(picture, colour_of(1))[0].max() < 100  # nothing but the end of a longer plate


def test_colours_of_classes_differ_and_stay():
    assert [colour_of(label) for label in range(len(PALETTE))] == list(PALETTE)
    assert len({colour_of(label) for label in range(91)}) == 91


def test_side_by_side_keeps_both_pictures():
    left, right = Image.new("RGB", (640, 480), RED), Image.new("RGB", (640, 480), (0, 0, 255))
    joined = side_by_side(left, right, ("predictions", "ground truth"))
    bar = joined.height - 480
    assert np.array_equal(np.asarray(joined)[bar:, :640], np.asarray(left))
    assert np.array_equal(np.asarray(joined)[bar:, -640:], np.asarray(right))
    assert (np.asarray(joined)[:bar, :320] > 200).any() and (np.asarray(joined)[:bar, 642:] > 200).any()
