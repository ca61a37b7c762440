import io
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from framework.data import transforms
from framework.data.order import uniform_draws
from framework.data.transforms import (
    Geometry,
    augment,
    decode,
    decode_rgb,
    evaluation_geometry,
    resized_hw,
    training_geometry,
    warp_boxes,
    warp_image,
)
from framework.errors import InputError
from tests.data.shards import make_sample

PUBLISHED = dict(sizes=range(480, 801, 32), max_size=1333, crop_resize=[400, 500, 600], crop_sizes=[384, 600])
SMALL = dict(sizes=[48, 64, 80], max_size=120, crop_resize=[50, 60], crop_sizes=[32, 55])


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# Sizes


@pytest.mark.parametrize(
    ("size_hw", "short_side", "expected_hw"),
    [
        ((480, 640), 800, (800, 1066)),  # 1066.67 is cut, not rounded
        ((640, 480), 800, (1066, 800)),
        ((427, 640), 800, (800, 1199)),
        ((500, 500), 480, (480, 480)),
        ((300, 1200), 800, (333, 1332)),  # bound by max_size: the short side is rounded, the long one cut
        ((1200, 301), 800, (1331, 334)),
        ((480, 640), 480, (480, 640)),
        ((1, 5000), 800, (1, 5000)),  # as published it would be 0 high
    ],
)
def test_resize_rule(size_hw, short_side, expected_hw):
    assert resized_hw(size_hw, short_side, 1333) == expected_hw


def test_resize_rule_equals_published_code():
    """Against get_size_with_aspect_ratio of the published datasets/transforms.py, line by line."""

    def published(height, width, size, max_size):
        low, high = float(min((width, height))), float(max((width, height)))
        if high / low * size > max_size:
            size = int(round(max_size * low / high))
        if (width <= height and width == size) or (height <= width and height == size):
            return height, width
        return (int(size * height / width), size) if width < height else (size, int(size * width / height))

    rng = np.random.default_rng(0)
    for height, width, size, max_size in rng.integers([30, 30, 100, 400], [900, 900, 800, 1400], (2000, 4)).tolist():
        assert resized_hw((height, width), size, max_size) == published(height, width, size, max_size)


# Geometry


def test_draws_never_change_their_meaning():
    """A resumed run must see the pixels that the stopped one would have seen."""
    assert geometries(4, (480, 640), **PUBLISHED)[2:] == [
        Geometry(flip=True, before_crop_hw=(480, 640), crop_tlhw=None, size_hw=(736, 981)),
        Geometry(flip=False, before_crop_hw=(600, 800), crop_tlhw=(108, 135, 391, 517), size_hw=(672, 888)),
    ]


def geometries(count: int, size_hw: tuple[int, int], **settings) -> list[Geometry]:
    return [training_geometry(size_hw, uniform_draws(8, 1, 2, n), **settings) for n in range(count)]


def test_published_choices_are_all_drawn():
    drawn = geometries(2000, (480, 640), **PUBLISHED)
    crops = [g for g in drawn if g.crop_tlhw is not None]
    assert 0.45 < np.mean([g.flip for g in drawn]) < 0.55
    assert 0.45 < len(crops) / len(drawn) < 0.55
    assert {min(g.size_hw) for g in drawn if g.crop_tlhw is None} == set(PUBLISHED["sizes"])
    assert {min(g.before_crop_hw) for g in crops} == {400, 500, 600}
    assert {g.flip for g in crops} == {True, False}
    for geometry in crops:
        top, left, height, width = geometry.crop_tlhw
        assert 384 <= height <= min(600, geometry.before_crop_hw[0])
        assert 384 <= width <= min(600, geometry.before_crop_hw[1])
        assert 0 <= top <= geometry.before_crop_hw[0] - height
        assert 0 <= left <= geometry.before_crop_hw[1] - width
        assert max(geometry.size_hw) <= 1333
    at_600 = [g for g in crops if g.before_crop_hw[0] == 600]
    assert min(g.crop_tlhw[2] for g in at_600) < 390 and max(g.crop_tlhw[2] for g in at_600) > 594
    assert any(g.crop_tlhw[0] + g.crop_tlhw[2] == 600 for g in at_600)  # the last row can be reached
    assert any(g.crop_tlhw[:2] != (0, 0) for g in at_600)


def test_images_below_the_least_crop_keep_their_side():
    for geometry in geometries(50, (20, 90), sizes=[48], max_size=300, crop_resize=[24], crop_sizes=[32, 40]):
        if geometry.crop_tlhw is not None:
            assert geometry.crop_tlhw[0] == 0 and geometry.crop_tlhw[2] == 24
            assert 32 <= geometry.crop_tlhw[3] <= 40


def test_empty_crop_resize_turns_cropping_off():
    assert all(g.crop_tlhw is None for g in geometries(50, (60, 80), **SMALL | {"crop_resize": []}))


def test_evaluation_only_resizes():
    assert evaluation_geometry((480, 640), 800, 1333) == Geometry(False, (480, 640), None, (800, 1066))


# Pixels and boxes


CROPPED = Geometry(True, (75, 100), (10, 20, 40, 50), (51, 64))


def pillows(image: Image.Image) -> np.ndarray:
    """What the published pipeline makes of CROPPED."""
    cropped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((100, 75), Image.Resampling.BILINEAR)
    return np.asarray(cropped.crop((20, 10, 70, 50)).resize((64, 51), Image.Resampling.BILINEAR))


def test_pixels_of_the_exact_backend_are_pillows():
    data = make_sample(3)[0]
    found = warp_image(decode_rgb(data, "pillow"), CROPPED, "pillow")
    assert np.array_equal(found, pillows(decode(data)))


def test_fast_pixels_are_within_two_grey_levels_of_pillows():
    """Within one where it resizes once; on noise, which is the worst there is for a resize."""
    rng = np.random.default_rng(0)
    worst = {False: 0, True: 0}
    for n in range(60):
        height, width = rng.integers(50, 130, 2).tolist()
        noise_HW3 = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        geometry = training_geometry((height, width), uniform_draws(8, 0, 0, n), **SMALL)
        fast, exact = (warp_image(noise_HW3, geometry, backend).astype(int) for backend in ("fast", "pillow"))
        crops = geometry.crop_tlhw is not None
        worst[crops] = max(worst[crops], int(abs(fast - exact).max()))
    assert worst[False] == 1 and 1 <= worst[True] <= 2


def test_boxes_stay_on_their_objects():
    rng = np.random.default_rng(0)
    seen = {"flip": 0, "crop": 0, "gone": 0}
    for n in range(150):
        height, width = rng.integers(60, 120, 2).tolist()
        (x1, y1), (w, h) = rng.integers(0, 40, 2).tolist(), rng.integers(12, 40, 2).tolist()
        x2, y2 = min(x1 + w, width), min(y1 + h, height)
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[y1:y2, x1:x2] = 255
        geometry = training_geometry((height, width), uniform_draws(8, 0, 0, n), **SMALL)
        warped = warp_image(pixels, geometry)
        assert warped.shape[:2] == geometry.size_hw
        boxes, keep = warp_boxes(np.array([[x1, y1, x2, y2]], dtype=float), (height, width), geometry)
        rows, columns = np.nonzero(warped[..., 0] >= 128)
        if len(rows) and keep[0]:
            seen_box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(boxes[0] - seen_box).max() < 2.0, (n, geometry)
        else:
            assert np.prod(boxes[0, 2:] - boxes[0, :2]) < 0.01 * np.prod(geometry.size_hw), (n, geometry)
        seen["flip"] += geometry.flip
        seen["crop"] += geometry.crop_tlhw is not None
        seen["gone"] += not keep[0]
    assert min(seen.values()) >= 5, seen  # each case was there to be tested


def test_boxes_are_clipped_and_lost_ones_marked():
    boxes = np.array([[10, 10, 30, 30], [-5, 20, 90, 40], [50, 50, 60, 60], [0, 0, 15, 10]], dtype=float)
    geometry = Geometry(True, (120, 160), (20, 40, 60, 80), (30, 40))  # of 60 x 80, twice as large, half of it
    warped, keep = warp_boxes(boxes, (60, 80), geometry)
    # Flipped x1 = 80 - x2; doubled; minus (40, 20); clipped to 80 x 60; halved.
    assert warped[0].tolist() == [(100 - 40) / 2, 0, 40, (60 - 20) / 2]
    assert warped[1].tolist() == [0, (40 - 20) / 2, 40, 30]
    assert keep.tolist() == [True, True, False, False]


# Decoding


@pytest.mark.parametrize("size_wh", [(64, 48), (33, 17), (1, 1), (8, 200)])
@pytest.mark.parametrize("settings", [dict(), dict(subsampling=0), dict(subsampling=1), dict(progressive=True),
                                      dict(quality=5), dict(optimize=True, quality=100)])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_fast_decoding_gives_pillows_bits(size_wh, settings, mode):
    noise = np.random.default_rng(0).integers(0, 256, (size_wh[1], size_wh[0], 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise).convert(mode), "JPEG", **settings)
    assert np.array_equal(decode_rgb(data), np.asarray(decode(data)))


def test_what_simplejpeg_has_no_name_for_goes_to_pillow():
    """Luma sampled 1 x 4: legal, and Pillow reads it."""
    data = encoded(Image.new("L", (16, 16), 90).convert("RGB"), "JPEG", subsampling=0)
    at = data.index(b"\xff\xc0") + 11
    assert data[at] == 0x11
    odd = data[:at] + b"\x14" + data[at + 1 :]
    with pytest.raises(KeyError):
        simplejpeg.decode_jpeg_header(odd)
    try:
        expected = np.asarray(decode(odd))
    except InputError:
        with pytest.raises(InputError, match="not a readable image"):
            decode_rgb(odd)
    else:
        assert np.array_equal(decode_rgb(odd), expected)


def test_formats_that_start_programs_are_not_read(monkeypatch):
    eps = encoded(Image.new("RGB", (9, 9)), "EPS")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(InputError, match="not a readable image"):
        decode_rgb(eps)


def test_fast_decoding_is_simplejpegs(monkeypatch):
    """And Pillow's where simplejpeg does not take a file: a PNG, CMYK, a damaged or a huge one."""
    image, png = make_sample(3)[0], encoded(Image.new("RGB", (9, 9)))
    cmyk = encoded(Image.new("CMYK", (9, 9)), "JPEG")
    monkeypatch.setattr(transforms, "decode", lambda data: Image.new("RGB", (3, 3), (1, 2, 3)))
    assert decode_rgb(image).shape == (60, 80, 3)
    assert decode_rgb(png).shape == decode_rgb(cmyk).shape == decode_rgb(image[:-400]).shape == (3, 3, 3)
    assert decode_rgb(image, "pillow").shape == (3, 3, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode_rgb(image).shape == (3, 3, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_kind_of_image_becomes_rgb(mode):
    grey = np.tile(np.array([0, 100, 255], dtype=np.uint8), (8, 1)).repeat(8, axis=1)
    image = Image.fromarray(grey)
    image = Image.fromarray(grey.astype(np.uint16) * 256 + 77) if mode == "I;16" else image.convert("RGB").convert(mode)
    assert image.mode == mode
    found = np.asarray(decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG")))
    assert found.shape == (8, 24, 3) and found.dtype == np.uint8
    columns = [0, 20] if mode == "1" else [0, 12, 20]
    assert np.abs(found[4, columns].astype(int) - grey[4, columns, None]).max() <= 3


def test_grey_and_cmyk_jpegs():
    colour = Image.new("RGB", (16, 16), (200, 40, 90))
    assert np.abs(np.asarray(decode(encoded(colour.convert("CMYK"), "JPEG"))) - [200, 40, 90]).max() <= 4
    grey = np.asarray(decode(encoded(colour.convert("L"), "JPEG")))
    assert grey.shape == (16, 16, 3) and np.ptp(grey) == 0


def test_rotation_in_exif_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decode(encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)).size == (30, 20)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff\xe0 no more", make_sample(1)[0][:-400], b"\x89PNG\r\n\x1a\n" * 4])
def test_unreadable_images_are_input_errors(data):
    for backend in ("fast", "pillow"):
        with pytest.raises(InputError, match="not a readable image"):
            decode_rgb(data, backend)


def test_bombs_are_input_errors(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"not a readable image \(DecompressionBombError"):
        decode_rgb(encoded(Image.new("RGB", (100, 100)), "JPEG"))


# A whole sample


def whole(image_id, size_hw) -> Geometry:
    return evaluation_geometry(size_hw, 30, 100)


def test_augment_gives_fractions_without_crowds():
    image, sample = make_sample(8, boxes=3)  # the last is a crowd
    example = augment(image, sample, whole, "contiguous")
    assert example.image_HW3.shape == (30, 40, 3) and example.image_HW3.dtype == np.uint8
    assert (example.image_id, example.original_size_hw, example.valid, example.bad) == (
        8,
        (60, 80),
        True,
        None,
    )
    assert example.labels_N.tolist() == sample.labels[:2] and example.labels_N.dtype == np.int64
    x1, y1, x2, y2 = np.array(sample.boxes_xyxy_px[:2]).T
    expected = np.stack([(x1 + x2) / 160, (y1 + y2) / 120, (x2 - x1) / 80, (y2 - y1) / 60], axis=1)
    assert example.boxes_cxcywh_N4 == pytest.approx(expected, abs=1e-6)
    assert example.boxes_cxcywh_N4.dtype == np.float32


def test_augment_takes_category_ids():
    image, sample = make_sample(8, boxes=2)
    assert augment(image, sample, whole, "category_id").labels_N.tolist() == sample.category_ids


def test_augment_without_boxes():
    image, sample = make_sample(8, boxes=0)
    example = augment(image, sample, whole, "contiguous")
    assert example.boxes_cxcywh_N4.shape == (0, 4) and example.labels_N.shape == (0,)


def test_augment_refuses_annotations_of_another_image():
    image, sample = make_sample(8)
    with pytest.raises(InputError, match=r"the image is 80 x 60 pixels, its annotations are for 80 x 61"):
        augment(image, replace(sample, height=61), whole, "contiguous")
    with pytest.raises(InputError, match=r"its annotations are not numbers"):
        augment(image, replace(sample, boxes_xyxy_px=[["a", 0, 1, 1]] * 2), whole, "contiguous")
