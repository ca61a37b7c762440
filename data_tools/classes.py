"""Lists of class names: a text file with one a line, or the `names` of a YOLO data.yaml."""

from pathlib import Path
from typing import Any

import yaml

from data_tools.annotations import Fault, short
from data_tools.files import read_text
from data_tools.sample import Category
from framework.errors import InputError


def numbered(names: list[str]) -> list[Category]:
    """Classes with the ids 1, 2, ... of their places: COCO's ids begin at 1 too."""
    return [Category(name, place) for place, name in enumerate(names, 1)]


def read_names(path: Path) -> list[str]:
    """Class names in their order.

    Raises:
        InputError: not UTF-8, not YAML with `names`, a name that is empty or no text or occurs twice, no name.
    """
    try:
        text = read_text(path)
        names = _yaml_names(text) if path.suffix.lower() in (".yaml", ".yml") else _lines(text)
        _check_names(names)
    except Fault as fault:
        raise InputError(f"{path}: {fault}; correct it, or name another file with --classes") from None
    return names


def _lines(text: str) -> list[Any]:
    return [line.strip() for line in text.rstrip().split("\n")]


def _yaml_names(text: str) -> list[Any]:
    """The list `names`, or the values of the dict {0: name, 1: name, ...}."""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date like 2024-99-99
        raise Fault(f"is not YAML ({' '.join(str(error).split())})") from None
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise Fault(f"has names with the keys {short(list(names))}, expected 0 to {len(names) - 1}")
        names = [names[place] for place in range(len(names))]
    if not isinstance(names, list):
        raise Fault(f"has names {short(names)}, expected a list, or a dict of place and name")
    return names


def _check_names(names: list[Any]) -> None:
    if names in ([], [""]):
        raise Fault("has no class name, expected at least one")
    for place, name in enumerate(names):
        if not isinstance(name, str):
            raise Fault(f"has a {type(name).__name__} as name of class {place}, expected text: put it in quotes")
        if not name.strip():
            raise Fault(f"has no name for class {place} (an empty line?)")
        if name in names[:place]:
            raise Fault(f"has the class name {short(name)} twice")
