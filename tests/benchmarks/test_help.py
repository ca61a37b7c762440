"""Every benchmark tells what it measures before it starts to."""

import importlib
import sys
from pathlib import Path

import pytest

import benchmarks.results

COMMANDS = [path.stem for path in sorted(Path(benchmarks.results.__file__).parent.glob("*.py"))
            if "__main__" in path.read_text() and path.stem != "slurm_rank"]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_its_docstring(name, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as exit:
        module.main()
    assert exit.value.code == 0 and module.__doc__.strip() in capsys.readouterr().out
