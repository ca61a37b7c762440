"""Drawn sets are what the description promises, measured on what was drawn, and the same every time."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
from PIL import Image

from data_tools import synth
from data_tools.commit import partial_folder
from framework.errors import UsageError
from tests.data_tools.sets import content

SIDE = 160


def draw(out, *more):
    assert synth.main(["--out", str(out), "--size", str(SIDE), *more]) == 0
    return out


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn") / "set", "--images", "150", "--val", "10")


def annotations(folder, split="train"):
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def test_composition(drawn):
    coco = annotations(drawn)
    objects = coco["annotations"]
    assert len({one["category_id"] for one in objects}) == len(coco["categories"]) == 6
    counts = np.bincount([one["image_id"] for one in objects], minlength=151)[1:]
    assert counts.min() >= 1 and counts.max() <= 20 and counts.mean() > 5
    size = np.sqrt([one["area"] for one in objects]) / SIDE * 640
    shares = np.histogram(size, [0, 32, 96, 640])[0] / len(size)
    assert shares == pytest.approx([0.41, 0.34, 0.24], abs=0.06)
    assert size.min() >= 0.035 * 640
    hidden = np.array([one["hidden"] for one in objects])
    assert (hidden >= 0.05).mean() >= 0.3
    assert hidden.max() <= 0.6


def test_zoomed_objects_have_the_same_shares_of_larger_sizes(tmp_path):
    folder = draw(tmp_path / "set", "--images", "150", "--val", "1", "--zoom", "2")
    size = np.sqrt([one["area"] for one in annotations(folder)["annotations"]]) / SIDE * 640
    shares = np.histogram(size, [0, 64, 192, 640])[0] / len(size)
    assert shares == pytest.approx([0.41, 0.34, 0.24], abs=0.08) and size.min() >= 2 * 0.035 * 640
    report = json.loads((folder / "report.json").read_text())
    assert report["composition"]["train"]["small"] == pytest.approx(shares[0], abs=0.001)


def test_boxes_and_areas_are_of_what_is_visible():
    side = 40
    rng = np.random.default_rng(1)
    whole = synth.place(rng, synth.CLASSES[1], side, 0.4, np.array([20.0, 20.0]))
    owner_HW = np.full((side, side), -1)
    owner_HW[whole.window][whole.mask] = 0
    rows = np.flatnonzero((owner_HW == 0).any(axis=1))
    owner_HW[:20] = 1  # another object covers the upper half of the image
    left = np.argwhere(owner_HW == 0)
    seen = synth.seen(owner_HW, 0, 1, whole)
    (top, first), (bottom, last) = left.min(axis=0), left.max(axis=0)
    assert rows[0] < 20 == top
    assert seen.box_xywh_px == [first, top, last - first + 1, bottom - top + 1]
    assert seen.area_px == len(left)
    assert seen.hidden == pytest.approx(1 - len(left) / whole.area_px)


def test_boxes_lie_on_coloured_pixels(drawn):
    coco = annotations(drawn)
    ratios = []
    for one in coco["annotations"]:
        if one["hidden"] == 0 and one["area"] > 400:
            image = Image.open(drawn / "images" / f"{one['image_id']:012d}.jpg").convert("HSV")
            x, y, width, height = one["bbox"]
            coloured = np.asarray(image)[y : y + height, x : x + width, 1] > 128
            ratios.append(coloured.sum() / one["area"])
    assert len(ratios) > 50
    assert np.median(ratios) == pytest.approx(1, abs=0.1)


def test_grounds_and_distractors_are_pale():
    rng = np.random.default_rng(0)
    canvas_HW3 = synth.draw_ground(rng, SIDE)
    before = canvas_HW3.copy()
    synth.draw_distractors(rng, canvas_HW3, 6, zoom=1.0)
    spread = (canvas_HW3.max(axis=2) - canvas_HW3.min(axis=2)) / canvas_HW3.max(axis=2).clip(0.01)
    assert (spread > 0.5).mean() < 0.02  # the lines
    assert (abs(canvas_HW3 - before).max(axis=2) > 0.05).mean() > 0.005
    assert before.std() > 0.02


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    arguments = ("--images", "4", "--val", "2", "--seed", "3")
    one, two = (content(draw(tmp_path / n, *arguments, "--workers", n)) for n in ("1", "2"))
    assert one == two
    other = content(draw(tmp_path / "other", "--images", "4", "--val", "2", "--seed", "4"))
    assert one["images/000000000001.jpg"] != other["images/000000000001.jpg"]


def test_more_images_extend_a_set(tmp_path):
    few, more = (content(draw(tmp_path / n, "--images", n, "--val", "1")) for n in ("2", "3"))
    assert all(few[f"images/{n:012d}.jpg"] == more[f"images/{n:012d}.jpg"] for n in (1, 2))
    assert few["images/000000000003.jpg"] == more["images/000000000004.jpg"]  # the validation image


def test_validation_images_are_others(drawn):
    files = [path.read_bytes() for path in (drawn / "images").iterdir()]
    assert len(set(files)) == len(files) == 160
    train, val = ({image["id"] for image in annotations(drawn, split)["images"]} for split in ("train", "val"))
    assert (len(train), len(val), train & val) == (150, 10, set())


def test_a_finished_set_is_left_alone(tmp_path, capsys):
    draw(tmp_path / "set", "--images", "2")
    before = content(tmp_path / "set")
    capsys.readouterr()
    draw(tmp_path / "set", "--images", "2")
    assert "already there" in capsys.readouterr().out
    with pytest.raises(UsageError, match="exists, drawn with .*'train': 2.*remove it or choose another --out"):
        draw(tmp_path / "set", "--images", "3")
    assert content(tmp_path / "set") == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a drawn set"):
        draw(tmp_path, "--images", "2")


def test_remains_of_something_else_are_refused(tmp_path):
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "thesis.txt").write_text("mine")
    for name in (".data_tools.convert", None):  # and those of the other command
        with pytest.raises(UsageError, match=r"set\.partial: exists with .*without the file \.data_tools\.synth that"):
            draw(tmp_path / "set", "--images", "2")
        assert content(tmp_path)["set.partial/thesis.txt"] == b"mine"
        if name:
            (tmp_path / "set.partial" / name).touch()


def test_a_killed_drawing_is_drawn_again(tmp_path):
    def drawing():
        synth.composition = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        draw(tmp_path / "set", "--images", "2")

    process = multiprocessing.get_context("fork").Process(target=drawing)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "set.partial").iterdir()} == {"images", "annotations", synth.MARK}
    draw(tmp_path / "set", "--images", "2")
    assert {path.name for path in tmp_path.iterdir()} == {"set"}
    assert {path.name for path in (tmp_path / "set").iterdir()} == {"images", "annotations", "report.json"}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "set", "/proc/set"):
        with pytest.raises(UsageError, match=f"--out {out}: .* cannot be made .*choose another --out"):
            draw(out, "--images", "2")


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synth, "commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "set", "--images", "2")
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_killed_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "draw_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildProcessError, match="a process that draws images was killed"):
        draw(tmp_path / "set", "--images", "2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value"), [("--workers", "0"), ("--images", "0"), ("--val", "0"), ("--size", "8"), ("--classes", "99")]
)
def test_impossible_values_are_refused(tmp_path, flag, value):
    with pytest.raises(UsageError, match=f"{flag} {value}: expected 1 to|{flag} {value}: expected 64 to"):
        draw(tmp_path / "set", "--images", "2", flag, value)


def test_what_is_not_found_while_a_folder_is_written_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"), partial_folder(tmp_path / "out", ".mark"):
        raise FileNotFoundError("gone")
    assert not list(tmp_path.iterdir())
