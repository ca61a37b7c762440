"""What event files say, those of killed and resumed runs too."""

import gzip
import math
import shutil

import pytest
from torch.utils.tensorboard import SummaryWriter

from framework.errors import InputError, UsageError
from framework.tracking.events import read_scalars
from framework.tracking.sink import open_sink


def write(folder, points, *, purge_step=None, start=1e9, suffix=""):
    """points: step -> value of val/AP, a minute apart."""
    writer = SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=suffix)
    for minute, (step, value) in enumerate(points.items()):
        writer.add_scalar("val/AP", value, step, walltime=start + 60 * minute)
    writer.close()


def test_what_a_run_recorded_comes_back(tmp_path):
    sink = open_sink(tmp_path, is_main=True)
    for step in (10, 20):
        sink.scalars({"val/AP": step / 100, "lr/rest": 1e-4}, step, epoch=step / 10)
    sink.scalars({"loss/total": 1.0}, 20, epoch=2.0)  # an evaluation stands at the step of a record
    sink.close()
    found = read_scalars(tmp_path)
    assert found.values["val/AP"] == pytest.approx({10: 0.1, 20: 0.2})
    assert found.values["epoch"] == {10: 1.0, 20: 2.0} and "val/AP" not in found.repeated
    assert 0 <= found.hours[10] <= found.hours[20] < 0.1


def test_a_resumed_run_forgets_what_it_goes_back_over(tmp_path):
    """As the sink does: three points, killed, and on from the second."""
    for resume, values in ((None, {10: 0.1, 20: 0.2, 30: 0.9}), (20, {30: 0.3, 40: 0.4})):
        sink = open_sink(tmp_path, is_main=True, resume_step=resume)
        for step, value in values.items():
            sink.scalars({"val/AP": value}, step, epoch=step / 10)
        sink.close()
    found = read_scalars(tmp_path)
    assert found.values["val/AP"] == pytest.approx({10: 0.1, 20: 0.2, 30: 0.3, 40: 0.4})
    assert not found.repeated


def test_repeated_steps_of_files_that_say_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.tensorboard.writer.time.time", lambda: 1e9)
    write(tmp_path, {1: 0.1, 2: 0.2}, suffix=".a")
    write(tmp_path, {2: 0.3, 3: 0.4}, suffix=".b")
    found = read_scalars(tmp_path)
    assert found.values["val/AP"] == pytest.approx({1: 0.1, 2: 0.3, 3: 0.4}) and found.repeated == {"val/AP": {2}}


def test_files_of_one_second_stand_in_the_order_of_their_counter(tmp_path):
    for counter, value in (("9", 0.1), ("10", 0.2)):
        folder = tmp_path / counter
        write(folder, {1: value})
        [file] = folder.iterdir()
        file.rename(tmp_path / f"events.out.tfevents.1000.host.7.{counter}")
    assert read_scalars(tmp_path).values["val/AP"] == pytest.approx({1: 0.2})


def test_gzipped_files_and_nan(tmp_path):
    write(tmp_path / "plain", {1: 0.5, 2: math.nan})
    [file] = (tmp_path / "plain").iterdir()
    packed = tmp_path / "packed" / f"{file.name}.gz"
    packed.parent.mkdir()
    with open(file, "rb") as plain, gzip.open(packed, "wb") as target:
        shutil.copyfileobj(plain, target)
    found = read_scalars(tmp_path / "packed").values["val/AP"]
    assert found[1] == 0.5 and math.isnan(found[2])


def test_what_is_no_event_file(tmp_path):
    with pytest.raises(UsageError, match="found no event file"):
        read_scalars(tmp_path)
    (tmp_path / "events.out.tfevents.1").write_bytes(b"not one")
    with pytest.raises(InputError, match="not an event file of TensorBoard, or cut off"):
        read_scalars(tmp_path)
    (tmp_path / "events.out.tfevents.1").unlink()
    (tmp_path / "events.out.tfevents.1.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="not a whole gzip file"):
        read_scalars(tmp_path)
