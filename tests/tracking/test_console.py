"""Lines and bars: the right one of the two, on the right ranks, in the right places."""

import io
import json
import logging
import sys

import pytest
from tqdm import tqdm

from framework.errors import UsageError
from framework.tracking import console
from framework.tracking.console import PlainProgress, TrackingConfig, progress, publish, setup_logging


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_main_rank_logs_to_stderr_and_file(tmp_path, capsys):
    logger = setup_logging(tmp_path / "run", is_main=True)
    logger.info("step %d", 7)
    logger.debug("for the file only")
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("step 7\n") and err.count("\n") == 1
    logged = (tmp_path / "run" / "log.txt").read_text()
    assert "INFO step 7\n" in logged and logged.endswith("DEBUG for the file only\n")


def test_setting_up_again_does_not_double_lines_and_appends_to_the_file(tmp_path, capsys):
    setup_logging(tmp_path, is_main=True).info("first attempt")
    logging.getLogger().addHandler(logging.StreamHandler())  # a library that configures the root logger
    try:
        setup_logging(tmp_path, is_main=True).info("resumed")
    finally:
        logging.getLogger().handlers.pop()
    assert capsys.readouterr().err.count("resumed") == 1
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        "attempt",
        "resumed",
    ]


def test_other_ranks_are_quiet_but_for_warnings(tmp_path, capsys):
    logger = setup_logging(tmp_path / "run", is_main=False)
    logger.info("everybody says this")
    logger.warning("bad sample 12")
    err = capsys.readouterr().err
    assert "everybody" not in err and "[process " in err and err.endswith("bad sample 12\n")
    assert not (tmp_path / "run").exists()


def test_plain_lines_without_a_terminal(monkeypatch, capsys):
    setup_logging(None, is_main=True)
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with progress(total=400, initial=100, description="train") as bar:
        assert isinstance(bar, PlainProgress)
        bar.update(10)
        assert capsys.readouterr().err == ""  # too early for a line
        now += console.LINE_EVERY_S
        bar.set_postfix(loss=1.23456, images=3)
        bar.update(50)
        line = capsys.readouterr().err
        # 60 done in 30 s: 2/s, 240 left
        assert line.endswith("train: 160/400, 2.00/s, 02:00 left, loss=1.235, images=3\n")
        bar.update(240)
    assert capsys.readouterr().err.endswith("train: 400/400, 10.00/s, 00:00 left, loss=1.235, images=3\n")


def test_a_bar_and_no_lines_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    logger = setup_logging(None, is_main=True)
    with progress(total=4, initial=1, description="train") as bar:
        assert isinstance(bar, tqdm)
        bar.update(1)
        logger.info("saved")
        bar.refresh()
    text = sys.stderr.getvalue()
    assert "2/4" in text and "<" in text  # tqdm's elapsed<left
    assert [part for part in text.split("\r") if "saved" in part and "train" in part] == []  # the line stands alone


def test_a_result_that_cannot_be_written_is_told_all_the_same(tmp_path, capsys):
    setup_logging(None, is_main=True)
    publish("two", {"n": 2}, tmp_path / "new" / "out.json")
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == {"n": 2}
    with pytest.raises(UsageError, match="^--out: .*/new is a folder; expected the name of a file"):
        publish("three", {"n": 3}, tmp_path / "new")
    assert capsys.readouterr().out == 'two\n{"n": 2}\nthree\n{"n": 3}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["new"]  # no .tmp
    setup_logging(None, is_main=False)
    publish("four", {}, tmp_path)
    assert capsys.readouterr().out == ""


def test_quiet_ranks_draw_no_bar(monkeypatch, capsys):
    setup_logging(None, is_main=False)
    with progress(total=4, description="train") as bar:
        bar.update(4)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(total=4, description="train") as bar:
        bar.update(4)
    assert sys.stderr.getvalue() == "" and capsys.readouterr().err == ""


@pytest.mark.parametrize("values, message", [({"log_every": 0}, "tracking.log_every is 0"),
                                             ({"pictures": -1}, "tracking.pictures is -1"),
                                             ({"attention": -1}, "tracking.attention is -1")])  # fmt: skip
def test_impossible_values_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        TrackingConfig(**values)
