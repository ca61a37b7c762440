"""Curves, ratios and charts from event files that are written here."""

import json
import math
import re
import time

import pytest
from matplotlib import pyplot
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from framework import convergence
from framework.errors import InputError, UsageError
from framework.tracking import charts
from framework.tracking.console import setup_logging
from framework.tracking.curves import read_curve

STEPS_AN_EPOCH = 10


def write_run(folder, aps, *, drop=None, tag="val/AP", fingerprint="a", epochs="epoch", config=None):
    """An AP after every epoch, a minute each; the learning rate drops after epoch `drop`. epochs: their tag or None."""
    writer = SummaryWriter(str(folder / "tensorboard"))
    start = time.time()
    for epoch, ap in enumerate(aps, 1):
        step, at = epoch * STEPS_AN_EPOCH, start + 60 * epoch
        values = {tag: ap, f"{tag}s": ap / 2, "images_seen": 8 * step}
        values |= {"lr/rest": 1e-4 if drop is None or epoch <= drop else 1e-5}
        for name, value in (values | ({epochs: epoch} if epochs else {})).items():
            writer.add_scalar(name, value, step, walltime=at)
    writer.close()
    (folder / "environment.json").write_text(json.dumps({"fingerprint": fingerprint}))
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


@pytest.fixture
def runs(tmp_path):
    """A method that has 0.4 after 4 epochs, and a baseline with schedules of 4, 20 and 40 epochs."""
    for seed in (1, 2):
        more = seed / 1000
        write_run(tmp_path / f"fast-seed{seed}", [0.1, 0.2, 0.3, 0.4 + more], drop=3)
        write_run(tmp_path / f"slow4-seed{seed}", [0.0, 0.01, 0.02, 0.03], drop=3)
        write_run(tmp_path / f"slow20-seed{seed}", [0.015 * epoch for epoch in range(1, 21)], drop=16)
        write_run(tmp_path / f"slow40-seed{seed}", [0.0105 * epoch for epoch in range(1, 41)], drop=32)
    return tmp_path


def run(runs, *flags):
    """What the command finds, without its charts."""
    setup_logging(None, is_main=True)
    arguments = convergence.parse([*map(str, sorted(runs.glob("*-seed*"))), "--out", "unused", *flags])
    return convergence.compared(convergence.read_lines(arguments), arguments)


def by_protocol(runs, method, *schedules):
    arguments = convergence.parse([*map(str, sorted(runs.glob("*-seed*"))), "--out", "unused"])
    lines = convergence.read_lines(arguments)
    return convergence.protocol(lines[method], [lines[label] for label in schedules])


PROTOCOL = ("--method", "fast", "--schedules", "slow40", "slow4", "slow20")


def test_ratio_of_the_protocol(runs, tmp_path):
    found = by_protocol(runs, "fast", "slow40", "slow4", "slow20")
    assert [(row["label"], row["times"]) for row in found["schedules"]] == [("slow4", 1), ("slow20", 5), ("slow40", 10)]
    assert (found["ratio"], found["valid"]) == (10, True)
    assert found["in words"] == "more than 5, at most 10 times as many epochs; preliminary, with 2 of 3 seeds"
    alone = by_protocol(runs, "fast", "slow40")
    assert alone["in words"].startswith("at most 10 times as many epochs (no shorter schedule is there)")
    for name, epochs in (("fast", 4), ("slow40", 40)):
        write_run(tmp_path / f"{name}-seed3", [0.41] * epochs, drop=3)
    whole = by_protocol(runs, "fast", "slow40")
    assert whole["in words"] == "at most 10 times as many epochs (no shorter schedule is there)"


def test_a_baseline_that_never_reaches_it(runs, tmp_path):
    for seed in (3, 4):  # further: the method's mean is out of reach
        write_run(tmp_path / f"fast-seed{seed}", [0.1, 0.2, 0.3, 0.48], drop=3)
    found = by_protocol(runs, "fast", "slow40", "slow4", "slow20")
    assert (found["ratio"], found["valid"]) == (None, True)  # within 90 %
    assert found["in words"].startswith("> 10 times as many epochs, not reached")


def test_a_baseline_that_has_not_converged_proves_nothing(runs, tmp_path):
    found = by_protocol(runs, "fast", "slow4", "slow20")
    assert found["in words"].startswith("the baseline has not converged: no ratio") and not found["valid"]
    assert found["ratio"] is None
    assert found["gain of the longest over the last fifth before its drop"] == pytest.approx([0.06, 0.06])


@pytest.mark.parametrize("ap, valid", [(0.21, True), (0.19, False), (0.0, False)])
def test_a_flat_baseline_is_valid_if_it_has_learnt_something(tmp_path, ap, valid):
    write_run(tmp_path / "fast-seed1", [0.1, 0.4], drop=1)
    write_run(tmp_path / "flat-seed1", [ap] * 20, drop=16)
    assert by_protocol(tmp_path, "fast", "flat")["valid"] is valid


def test_milestones_and_their_spread(runs, tmp_path):
    result = run(runs, "--baseline", "slow40")
    rows = {(row["share"], row["label"]): row for row in result["milestones"]}
    half = rows[0.5, "fast"]
    assert half["AP"] == pytest.approx(0.21) and half["epoch"] == [3, 3, 3]
    assert half["epoch, times sooner"] == pytest.approx([20 / 3] * 3)
    assert half["images"] == [240, 240, 240] and half["hours"][1] == pytest.approx(0.05, abs=0.01)
    assert rows[1.0, "slow40"]["epoch"] == [40, 40, 40] and rows[0.5, "slow4"]["epoch"] is None


def test_pictures_and_tensorboards_layout(runs, tmp_path):
    out = tmp_path / "out"
    assert convergence.main([*map(str, sorted(runs.glob("*-seed*"))), "--out", str(out), *PROTOCOL]) == 0
    assert json.loads((out / "convergence.json").read_text())["protocol"]["ratio"] == 10
    text = (out / "convergence.md").read_text()
    assert "**more than 5, at most 10 times as many epochs; preliminary" in text
    assert "| slow40 | slow40-seed2 | 40 |" in text
    for name in ("ap-epoch", "ap-images", "ap-step", "ap-hours", "sizes", "published"):
        with Image.open(out / f"{name}.png") as picture:
            colours = picture.convert("RGB").getcolors(maxcolors=2**20)
            assert picture.width > 800 and len(colours) > 50
        assert "<svg" in (out / f"{name}.svg").read_text()[:1000]
    [layout] = (out / "tensorboard").iterdir()
    assert b"^val/APs$" in layout.read_bytes()


def warnings_of(capsys):
    return capsys.readouterr().err


def test_what_cannot_be_compared_is_left_out_with_a_line(runs, tmp_path, capsys):
    write_run(tmp_path / "other-seed1", [0.5, 0.6], fingerprint="b")
    write_run(tmp_path / "theirs-seed1", [0.5], tag="eval/mAP")
    write_run(tmp_path / "nan-seed1", [math.nan, math.nan])
    write_run(tmp_path / "holes-seed1", [0.1, math.nan, 0.2])
    (tmp_path / "empty-seed1").mkdir()
    write_run(tmp_path / "small-seed1", [0.5, 0.6], config="eval: {image_side: 288}")
    for path in tmp_path.glob("slow*"):
        (path / "config.yaml").write_text("eval: {image_side: null}")
    (tmp_path / "holes-seed1" / "environment.json").unlink()
    result = run(runs)
    said = warnings_of(capsys)
    assert {run["label"] for run in result["runs"]} == {"fast", "slow4", "slow20", "slow40", "holes"}
    assert "other is left out" in said and "other-seed1 has data.train b, 9 of the other runs a" in said
    assert "small is left out" in said and "has eval.image_side 288, 6 of the other runs None" in said
    assert "holes: " in said and "holes-seed1 does not say what data it was trained on" in said
    assert "theirs is left out" in said and "no val/AP (--tag) in it, only eval/mAP" in said
    assert "nan is left out" in said and "val/AP is NaN or -1 at all of its steps" in said
    assert "empty is left out" in said and "found no event file" in said
    assert "holes: val/AP is NaN or -1 at 1 of its 3 steps, which are passed over" in said


def test_sizes_that_no_object_has_are_not_drawn(tmp_path):
    """COCO says -1."""
    curve = read_curve(str(write_run(tmp_path / "run-seed1", [0.1, -2.0])))
    assert [point["AP"] for point in curve.points] == pytest.approx([0.1])
    writer = SummaryWriter(str(tmp_path / "run-seed1" / "tensorboard"))
    writer.add_scalar("val/APs", -1.0, STEPS_AN_EPOCH)
    writer.close()
    curve = read_curve(str(tmp_path / "run-seed1"))
    assert curve.last["APs"] is None
    assert "| run | run-seed1 | 1 | 10.0 |  |" in convergence.markdown({"run": [curve]}, {})


def test_folders_with_an_equals_sign_and_broken_notes(tmp_path, capsys):
    setup_logging(None, is_main=True)
    folder = write_run(tmp_path / "lr=1e-4-seed1", [0.1])
    (folder / "environment.json").write_text("[")
    (folder / "config.yaml").write_text("train: {epochs: '${oc.env:NOWHERE}'}\neval: {image_side: '${else:1}'}")
    assert read_curve(str(folder)).cut is None
    (folder / "config.yaml").write_text("[")
    curve = read_curve(str(folder))
    assert (curve.label, set(curve.common.values()), curve.cut) == ("lr=1e-4", {None}, None)
    said = warnings_of(capsys)
    assert "environment.json does not say which data" in said and "config.yaml cannot be read" in said
    assert read_curve(f"mine={folder}").label == "mine"


def test_gaps_are_named(tmp_path, capsys):
    write_run(tmp_path / "run-seed1", [0.1, 0.2, *[math.nan] * 3, 0.3, 0.4])
    run(tmp_path)
    assert "run: nothing between steps 20 and 60, where usually 10 lie between two points" in warnings_of(capsys)


def test_repeated_steps_are_named_and_the_later_ones_count(tmp_path, capsys):
    setup_logging(None, is_main=True)
    write_run(tmp_path / "run-seed1", [0.1, 0.2])
    with SummaryWriter(str(tmp_path / "run-seed1" / "tensorboard"), filename_suffix=".later") as writer:
        writer.add_scalar("val/AP", 0.3, 2 * STEPS_AN_EPOCH)
    curve = read_curve(str(tmp_path / "run-seed1"))
    assert curve.last["AP"] == pytest.approx(0.3)
    assert "run: steps from 20 on stand there more than once; the later values count" in warnings_of(capsys)


def test_percents_are_taken_as_such(tmp_path, capsys):
    setup_logging(None, is_main=True)
    curve = read_curve(str(write_run(tmp_path / "run", [0.5, 40.0])))
    assert [point["AP"] for point in curve.points] == pytest.approx([0.005, 0.4])
    assert curve.last["APs"] == pytest.approx(0.2)
    assert "run: val/AP goes up to 40, so that it is taken as percent" in warnings_of(capsys)


def test_only_complete_schedules_are_compared_by_the_protocol(tmp_path):
    write_run(tmp_path / "fast-seed1", [0.1, 0.4], config="train: {epochs: 2}")
    slow = write_run(tmp_path / "slow-seed1", [0.1, 0.4, 0.4], config="train: {epochs: 4}")
    with pytest.raises(InputError, match="slow: .*slow-seed1 is no complete schedule: it ended at epoch 3 of 4"):
        by_protocol(tmp_path, "fast", "slow")
    (slow / "config.yaml").write_text("train: {epochs: 3}")
    assert by_protocol(tmp_path, "fast", "slow")["ratio"] == 1.5
    write_run(tmp_path / "nan-seed1", [0.1, 0.4, math.nan])
    with pytest.raises(InputError, match="nan-seed1 is no complete schedule: its last evaluation has no AP"):
        by_protocol(tmp_path, "fast", "nan")


def lines_of(folders):
    return convergence.by_label([read_curve(str(folder)) for folder in folders])


def test_charts_hold_all_of_their_lines(runs):
    """Panels share an axis: none may cut off what is higher than the first one's lines."""
    lines = lines_of(sorted(runs.glob("*-seed*")))
    for curves in lines.values():
        for point in (point for curve in curves for point in curve.points):
            point["APm"], point["APl"] = point["AP"], 1.5 * point["AP"]
    figure = charts.figure_of_sizes(lines)
    assert figure.axes[0].get_ylim()[0] == 0 and figure.axes[0].get_ylim()[1] >= 1.5 * 42
    pyplot.close(figure)


@pytest.mark.parametrize("axis, where", [("epoch", [1, 3]), ("step", [10, 30]), ("hours", [1.5 / 60, 4 / 60])])
def test_lines_are_means_of_seeds_where_all_have_been_evaluated(tmp_path, axis, where):
    """The second seed takes twice as long and lacks an evaluation."""
    write_run(tmp_path / "run-seed1", [0.1, 0.2, 0.3])
    write_run(tmp_path / "run-seed2", [0.2, math.nan, 0.5])
    lines = lines_of(sorted(tmp_path.glob("run-*")))
    for curve, minutes in zip(lines["run"], (1, 2), strict=True):
        for point in curve.points:
            point["hours"] = minutes * point["epoch"] / 60
    figure, panel = pyplot.subplots()
    charts.draw_lines(panel, lines, axis, "AP")
    [line], [band] = panel.lines, panel.collections
    assert line.get_xdata() == pytest.approx([1.5 / 60, 4.5 / 60] if axis == "hours" else where)
    assert line.get_ydata() == pytest.approx([15, 40]) and line.get_label() == "run, 2 seeds"
    assert {round(y) for _, y in band.get_paths()[0].vertices} == {10, 20, 30, 50}
    pyplot.close(figure)


def test_a_set_without_small_objects(tmp_path):
    run = write_run(tmp_path / "run", [0.1, 0.2])
    lines = lines_of([run])
    for point in lines["run"][0].points:
        point |= {"APs": None, "APm": 0.5}
    charts.draw_sizes(lines, tmp_path / "sizes")
    assert (tmp_path / "sizes.png").exists()


def test_hours_of_two_writers_at_once_count_once(tmp_path):
    for name, tag in (("train", "loss"), ("val", "val/AP")):
        write_run(tmp_path / "run" / name, [0.1, 0.2], tag=tag)
    assert read_curve(str(tmp_path / "run")).points[-1]["hours"] == pytest.approx(2 / 60, abs=0.5 / 60)


def test_runs_of_others(tmp_path, capsys):
    theirs = write_run(tmp_path / "theirs", [0.1, 0.2], tag="eval/mAP", epochs=None)
    curve = read_curve(f"Their DETR={theirs}", ["val/AP", "eval/mAP"])
    assert curve.label == "Their DETR" and curve.last["AP"] == pytest.approx(0.2) and curve.last["epoch"] is None
    ours = write_run(tmp_path / "ours", [0.1, 0.3])
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--tag", "val/AP", "--tag", "eval/mAP", f"x={theirs}"]
    assert convergence.main([*arguments, str(ours)]) == 0
    assert (out / "ap-epoch.png").exists()
    assert "x is not in the chart ap-epoch: its runs share no step at which they know epochs" in warnings_of(capsys)
    assert convergence.main([*arguments, f"y={theirs}"]) == 0
    drawn = {path.name for path in out.glob("*.png")}
    assert drawn == {"ap-images.png", "ap-step.png", "ap-hours.png", "published.png"}  # they say no epochs
    with pytest.raises(InputError, match="x: expected seeds that say their epochs and end at the same"):
        convergence.main([*arguments, f"y={theirs}", "--method", "x", "--schedules", "y", "--baseline", "y"])
    text = (out / "convergence.md").read_text()  # is there all the same
    assert re.search(r"\| 90% \| 18.0 \| x \| unknown \| unknown \| [0-9.]+ \| 1 \|", text)
    write_run(tmp_path / "lightning", [0.1, 0.2], epochs="trainer/epoch")
    curve = read_curve(str(tmp_path / "lightning"), epoch_tags=["epoch", "trainer/epoch"])
    assert curve.last["epoch"] == 2


def test_runs_that_are_no_seeds_are_not_averaged(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name / "logs", [0.1, 0.2])
    with pytest.raises(UsageError, match="all of them would be called logs; expected LABEL=FOLDER"):
        lines_of([tmp_path / "a" / "logs", tmp_path / "b" / "logs"])
    with pytest.raises(UsageError, match="logs: expected another folder for each seed; found .*a/logs more than once"):
        lines_of([tmp_path / "a" / "logs", tmp_path / "a" / "logs"])
    assert len(lines_of([f"logs={tmp_path / 'a' / 'logs'}", f"logs={tmp_path / 'b' / 'logs'}"])["logs"]) == 2


def test_misuse(runs, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="no run is left to draw"):
        convergence.main([str(tmp_path / "nowhere"), *out])
    with pytest.raises(UsageError, match="--method, --schedules: expected both or neither"):
        convergence.main([str(runs / "fast-seed1"), *out, "--method", "fast"])
    with pytest.raises(UsageError, match="--baseline detr: expected one of fast"):
        convergence.main([str(runs / "fast-seed1"), *out, "--baseline", "detr"])
    (tmp_path / "file").touch()
    for name in ("file", "file/out"):
        with pytest.raises(UsageError, match="^--out: .*/file is a file; expected a folder"):
            convergence.main([str(runs / "fast-seed1"), "--out", str(tmp_path / name)])
