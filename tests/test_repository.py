"""What a stranger relies on: commands that start anywhere and explain themselves, names that hide nothing."""

import importlib
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "framework.train",
    "framework.evaluate",
    "framework.predict",
    "data_tools.synth",
    "data_tools.convert",
    "data_tools.check",
    "data_tools.index",
    "framework.convergence",
]


@pytest.mark.parametrize("arguments", [[str(ROOT / "framework" / "train.py")], ["-m", "framework.train"]])
def test_training_starts_from_another_folder(arguments, tmp_path):
    run = subprocess.run(
        [sys.executable, *arguments, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "--config" in run.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(name).main(["--help"])
    assert exit.value.code == 0
    example = capsys.readouterr().out.lower().partition("example")[2]
    assert name in example or f"{name.replace('.', '/')}.py" in example


@pytest.mark.parametrize("name", COMMANDS)
def test_misuse_exits_with_2(name, capsys):
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(name).main(["--no-such-flag"])
    assert exit.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_modules_of_framework_hide_no_other():
    """`deepspeed framework/train.py` puts framework/ on sys.path: a logging.py there would be `logging`."""
    ours = {path.stem for path in (ROOT / "framework").iterdir() if path.suffix == ".py" or path.is_dir()}
    ours -= {"__init__", "__pycache__"}
    assert "train" in ours
    installed = {name for name, owners in packages_distributions().items() if set(owners) != {"tenfold"}}
    assert not ours & sys.stdlib_module_names
    # A project called evaluate exists; nothing that Tenfold imports needs it.
    assert not (ours - {"evaluate"}) & installed
