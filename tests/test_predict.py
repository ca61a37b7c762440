"""framework.predict: boxes in the pixels of the file, pictures to look at, and every bad image named."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.sample import Category
from framework import predict
from framework.config import load
from framework.errors import UsageError
from framework.tracking.pictures import colour_of
from framework.trained import Trained
from tests.colours import FindsColours, painted
from tests.evaluation.test_attention import CLASSES, DETR, made


@pytest.fixture
def model(monkeypatch):
    config = load(None, ["model.num_classes=2", "model.backbone.norm=group", "data.sizes=[100]"])
    trained = Trained(FindsColours(2, 0, 1), config, [Category("disc", 3), Category("ring", 7)], Path("unused"))
    monkeypatch.setattr(predict, "load_trained", lambda args, overrides: trained)


def run(tmp_path, *arguments, out="out"):
    code = predict.main([*map(str, arguments), "--run", "unused", "--out", str(tmp_path / out)])
    return code, json.loads((tmp_path / out / "detections.json").read_text())


def test_boxes_are_in_the_pixels_of_the_file(model, tmp_path):
    painted((300, 200), red=(30, 20, 120, 100), blue=(200, 110, 290, 190)).save(tmp_path / "a.png")
    painted((80, 160), red=(8, 16, 40, 80)).save(tmp_path / "b.jpg", quality=98)
    code, found = run(tmp_path, tmp_path / "a.png", tmp_path / "b.jpg")
    assert code == 0
    kinds = [(one["image_id"], one["category_id"], one["file_name"][-5:]) for one in found]
    assert kinds == [(0, 3, "a.png"), (0, 7, "a.png"), (1, 3, "b.jpg")]
    assert found[0]["bbox"] == pytest.approx([30, 20, 90, 80], abs=3)
    assert found[1]["bbox"] == pytest.approx([200, 110, 90, 80], abs=3)
    assert found[2]["bbox"] == pytest.approx([8, 16, 32, 64], abs=3)
    assert found[0]["score"] == pytest.approx(0.9526, abs=1e-3) and found[1]["score"] == pytest.approx(0.5)

    picture = np.asarray(Image.open(tmp_path / "out" / "00000_a.png"))
    rows, columns = np.nonzero((picture == colour_of(0)).all(-1))
    assert picture.shape == (427, 640, 3)  # enlarged by 640 / 300
    assert columns.min() == pytest.approx(64, abs=7) and rows.max() == pytest.approx(213, abs=7)


def test_score_and_top_keep_the_best(model, tmp_path):
    painted((100, 100), (10, 10, 40, 40), (60, 60, 90, 90)).save(tmp_path / "a.png")
    for out, (arguments, found) in enumerate([
        (["--score", "0.6"], [3]), (["--score", "0", "--top", "3"], [3, 7, 7]), (["--score", "1"], []),
    ]):  # fmt: skip
        rows = run(tmp_path, tmp_path / "a.png", *arguments, out=str(out))[1]
        assert [one["category_id"] for one in rows] == found


def test_a_folder_gives_its_images_in_order(model, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.png", "a.JPG", "notes.txt"):
        painted((50, 50), red=(5, 5, 30, 30)).save(folder / name, format="PNG")
    painted((50, 50), red=(5, 5, 30, 30)).save(tmp_path / "b.png")
    code, found = run(tmp_path, folder, tmp_path / "b.png", "--score", "0.9")
    assert code == 0 and [one["file_name"] for one in found] == [
        str(folder / "a.JPG"), str(folder / "b.png"), str(tmp_path / "b.png")
    ]  # fmt: skip
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000_a.png", "00001_b.png", "00002_b.png", "detections.json"]


def test_bad_images_are_named_and_the_others_done(model, tmp_path, capsys):
    good = painted((120, 90), red=(10, 10, 60, 60))
    good.save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:120])
    (tmp_path / "text.jpg").write_text("no image at all")
    (tmp_path / "empty.jpg").touch()
    names = ["missing.jpg", "cut.png", "text.jpg", "empty.jpg", "good.png"]
    code, found = run(tmp_path, *(tmp_path / name for name in names), "--score", "0.9")
    assert code == 1
    assert [(one["image_id"], one["category_id"]) for one in found] == [(4, 3)]
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 4
    for name, line in zip(names, lines, strict=False):
        assert f"error: {tmp_path / name}: " in line
    assert "no such file" in lines[0] and all("not a readable image" in line for line in lines[1:])


@pytest.mark.parametrize("mode", ["L", "CMYK", "I;16", "P", "RGBA", "1"])
def test_images_of_other_modes_are_read(model, tmp_path, mode):
    image = Image.new("I;16", (60, 40), 30000) if mode == "I;16" else painted((60, 40), (5, 5, 30, 30)).convert(mode)
    image.save(tmp_path / "a.tif")
    assert run(tmp_path, tmp_path / "a.tif")[0] == 0


@pytest.mark.parametrize("arguments, message", [
    (["--score", "1.5"], "--score 1.5: expected 0 to 1"),
    (["--score", "nan"], "--score nan: expected 0 to 1"),
    (["--top", "0"], "--top 0: expected at least 1"),
    (["empty"], "empty: no image in this folder"),
])  # fmt: skip
def test_misuse(model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=message):
        predict.main([*arguments, "a.png", "--run", "unused", "--out", "out"])
    assert not (tmp_path / "out").exists()


def with_layers(monkeypatch, *overrides):
    """An untrained detector, which finds something everywhere at a score of 0."""
    trained = Trained(*made("model.decoder_layers=3", *overrides), CLASSES, Path("unused"))
    monkeypatch.setattr(predict, "load_trained", lambda args, overrides: trained)


def pictures(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("overrides", [[], DETR])
def test_attention_is_drawn_for_the_most_certain_object(tmp_path, monkeypatch, overrides):
    with_layers(monkeypatch, *overrides)
    painted((120, 90), (10, 10, 60, 60)).save(tmp_path / "a.png")
    painted((60, 90), (10, 10, 40, 60)).save(tmp_path / "b.png")
    code, found = run(tmp_path, tmp_path / "a.png", tmp_path / "b.png", "--attention", "--score", "0")
    best = [next(one["query"] for one in found if one["image_id"] == image_id) for image_id in (0, 1)]
    assert code == 0 and pictures(tmp_path) == [
        "00000_a.png", f"00000_a_query{best[0]}.png", "00001_b.png", f"00001_b_query{best[1]}.png"
    ]  # fmt: skip
    figure = np.asarray(Image.open(tmp_path / "out" / f"00000_a_query{best[0]}.png"))
    assert (figure.shape[1] > 2000) == (not overrides)  # a column for each level and one for all


def test_attention_of_chosen_queries_in_a_chosen_layer(tmp_path, monkeypatch):
    with_layers(monkeypatch)
    painted((120, 90), (10, 10, 60, 60)).save(tmp_path / "a.png")
    both = [tmp_path / "a.png", "--attention", "--query", "5", "--query", "0"]
    assert run(tmp_path, *both, "--score", "1")[1] == []  # chosen ones need no score
    assert pictures(tmp_path) == ["00000_a.png", "00000_a_query0.png", "00000_a_query5.png"]
    last = Image.open(tmp_path / "out" / "00000_a_query5.png")
    run(tmp_path, *both, "--layer", "2", out="again")
    again = Image.open(tmp_path / "again" / "00000_a_query5.png")
    assert again.height < 0.6 * last.height  # the encoder has one layer: no row of it


def test_no_object_no_attention_and_it_says_so(tmp_path, monkeypatch, capsys):
    with_layers(monkeypatch)
    painted((120, 90), (10, 10, 60, 60)).save(tmp_path / "a.png")
    assert run(tmp_path, tmp_path / "a.png", "--attention", "--score", "0.999") == (0, [])
    assert pictures(tmp_path) == ["00000_a.png"]
    assert "a: no box with a score of 0.999 or more, so no attention is drawn" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--attention", "--query", "6"], "--query 6: expected 0 to 5"),
    (["--attention", "--query", "-1"], "--query -1: expected 0 to 5"),
    (["--attention", "--layer", "9"], "--layer 9: expected 1 to 3 (layers of the encoder: 1, of the decoder: 3)"),
    (["--attention", "--layer", "0"], "--layer 0: expected 1 to 3"),
    (["--query", "2"], "--query: chooses what --attention draws; expected --attention too"),
    (["--layer", "2"], "--layer: chooses what --attention draws"),
])  # fmt: skip
def test_misuse_of_attention(tmp_path, monkeypatch, arguments, message):
    with_layers(monkeypatch)
    painted((120, 90), (10, 10, 60, 60)).save(tmp_path / "a.png")
    with pytest.raises(UsageError) as error:
        run(tmp_path, tmp_path / "a.png", *arguments)
    assert str(error.value).startswith(message) and not (tmp_path / "out").exists()


def test_out_must_be_a_folder(model, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="^--out: .*/out is a file; expected a folder"):
        predict.main(["a.png", "--run", "unused", "--out", str(tmp_path / "out")])


def test_results_of_an_earlier_call_are_refused_and_stay(model, tmp_path):
    for name in ("a.png", "b.png"):
        painted((50, 50), red=(5, 5, 30, 30)).save(tmp_path / name)
    (tmp_path / "out").mkdir()
    for name in ("notes.txt", "2024_holiday.png", "20240612_143000.png"):
        (tmp_path / "out" / name).touch()
    run(tmp_path, tmp_path / "a.png")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UsageError) as error:
        run(tmp_path, tmp_path / "b.png")
    assert str(error.value) == (
        f"--out: {tmp_path / 'out'} holds results of an earlier call (00000_a.png, detections.json); remove "
        "detections.json and the pictures NNNNN_*.png beside it, or choose another folder"
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "detections.json").unlink()  # of a call that was killed there are pictures alone
    with pytest.raises(UsageError, match=r"earlier call \(00000_a.png\)"):
        run(tmp_path, tmp_path / "b.png")
    (tmp_path / "out" / "00000_a.png").unlink()
    assert run(tmp_path, tmp_path / "b.png")[0] == 0
