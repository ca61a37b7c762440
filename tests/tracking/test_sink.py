"""What is recorded can be read back; what a resumed run would repeat is gone."""

import json
import math

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from framework.errors import InputError
from framework.tracking.sink import NullSink, open_sink, read_lines


@pytest.fixture(autouse=True)
def counted_from_zero(monkeypatch):
    """TensorBoard sorts files by name, and one process numbers those of one second: 10 would come before 9. A run that
    goes on is another process, and seconds later."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def points(run_dir, tag):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def test_scalars_stand_under_their_names_in_both_places(tmp_path):
    sink = open_sink(tmp_path, is_main=True)
    sink.scalars({"loss/total": 2.5, "lr/backbone": 1e-5}, step=3, epoch=0.5)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line.pop("time") > 1e9
    assert line == {"loss/total": 2.5, "lr/backbone": 1e-5, "step": 3, "epoch": 0.5}
    sink.close()
    assert points(tmp_path, "lr/backbone")[0] == (3, pytest.approx(1e-5))
    assert points(tmp_path, "epoch") == [(3, 0.5)]


def test_every_point_is_on_disk_before_the_sink_is_closed(tmp_path):
    sink = open_sink(tmp_path, is_main=True)
    for step in (1, 2, 3):
        sink.scalars({"loss/total": 1.0}, step, epoch=0.0)
        assert points(tmp_path, "loss/total")[-1] == (step, 1.0)  # a process killed now would lose nothing
        assert list(read_lines(tmp_path / "metrics.jsonl"))[-1]["step"] == step
    sink.close()


def test_what_is_not_finite_is_nan_and_null(tmp_path):
    sink = open_sink(tmp_path, is_main=True)
    sink.scalars({"grad_norm": math.inf, "loss/total": math.nan}, step=1, epoch=0.0)
    sink.close()
    assert math.isnan(points(tmp_path, "grad_norm")[0][1])
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["grad_norm"] is None and line["loss/total"] is None


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path):
    first = open_sink(tmp_path, is_main=True)
    for step in (2, 4, 6, 8):
        first.scalars({"loss/total": float(step)}, step, epoch=0.0)
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as lines:
        lines.write('{"loss/total": 9.0, "st')  # killed while writing

    again = open_sink(tmp_path, is_main=True, resume_step=4)
    for step in (6, 10):
        again.scalars({"loss/total": 100.0 + step}, step, epoch=0.0)
    again.close()

    expected = [(2, 2.0), (4, 4.0), (6, 106.0), (10, 110.0)]
    assert points(tmp_path, "loss/total") == expected
    assert [(line["step"], line["loss/total"]) for line in read_lines(tmp_path / "metrics.jsonl")] == expected


def test_a_picture_comes_back_with_its_size(tmp_path):
    sink = open_sink(tmp_path, is_main=True)
    sink.picture("val/pictures/0", lambda: np.zeros((7, 11, 3), np.uint8), step=5)
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (picture,) = events.Images("val/pictures/0")
    assert (picture.step, picture.width, picture.height) == (5, 11, 7)


def test_a_start_without_a_checkpoint_forgets_everything(tmp_path):
    for value in (1.0, 2.0):
        sink = open_sink(tmp_path, is_main=True)
        sink.scalars({"loss/total": value}, step=1, epoch=0.0)
        sink.close()
    assert points(tmp_path, "loss/total") == [(1, 2.0)]
    assert [line["loss/total"] for line in read_lines(tmp_path / "metrics.jsonl")] == [2.0]


def test_a_document_is_whole_or_not_there(tmp_path):
    sink = open_sink(tmp_path, is_main=True)
    sink.document("evaluation/step-00000003.json", {"AP": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        sink.document("evaluation/step-00000004.json", {"AP": math.nan})
    sink.close()
    (written,) = (tmp_path / "evaluation").iterdir()
    assert json.loads(written.read_text()) == {"AP": 0.5}


def test_other_ranks_write_nothing(tmp_path):
    sink = open_sink(tmp_path / "run", is_main=False)
    sink.scalars({"loss/total": 1.0}, step=1, epoch=0.0)
    sink.picture("val/pictures/0", lambda: 1 / 0, step=1)
    sink.document("evaluation/step-00000001.json", {})
    sink.close()
    assert isinstance(sink, NullSink) and list(tmp_path.iterdir()) == []


def test_resuming_drops_later_evaluations(tmp_path):
    sink = open_sink(tmp_path, is_main=True, resume_step=0)
    for step in (3, 6):
        sink.document(f"evaluation/step-{step:08d}.json", {"AP": 0.5})
    sink.close()
    open_sink(tmp_path, is_main=True, resume_step=3).close()
    assert [p.name for p in (tmp_path / "evaluation").iterdir()] == ["step-00000003.json"]


def test_a_start_that_was_overtaken_leaves_the_records_of_the_other_alone(tmp_path):
    def refuse():
        raise InputError("taken over")

    sink = open_sink(tmp_path, is_main=True)
    sink.scalars({"loss/total": 2.5}, step=3, epoch=0.5)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="taken over"):
        open_sink(tmp_path, is_main=True, resume_step=0, refuse=refuse)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
