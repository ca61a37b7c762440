"""Lists of class names: text or YAML, in the order of the file."""

import pytest

from data_tools.classes import read_names
from framework.errors import InputError


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("obj.names", "sea star\nray\n\n"),
        ("classes.txt", "\ufeffsea star \r\nray"),
        ("data.yaml", "names: ['sea star', ray]"),
        ("data.yml", "nc: 2\nnames:\n  1: ray\n  0: sea star\n"),
    ],
)
def test_names_in_their_order(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_names(tmp_path / name) == ["sea star", "ray"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.names", b"", "has no class name, expected at least one"),
        ("a.names", b"fish\n\nray\n", r"has no name for class 1 \(an empty line\?\)"),
        ("a.names", b"fish\nray\nfish", "has the class name 'fish' twice; correct it, or name another file with --cl"),
        ("a.names", b"fish\nr\xe4y", "is not UTF-8: byte 0xe4 in line 2"),
        ("a.yaml", b"names: [fish", "is not YAML"),
        ("a.yaml", b"fish\nray", "has names None, expected a list, or a dict of place and name"),
        ("a.yaml", b"names: 2", "has names 2, expected a list"),
        ("a.yaml", b"names: []", "has no class name"),
        ("a.yaml", b"names: {}", "has no class name"),
        ("a.yaml", b"names: {1: fish, 2: ray}", r"has names with the keys \[1, 2\], expected 0 to 1"),
        ("a.yaml", b"names: [yes, no]", "has a bool as name of class 0, expected text: put it in quotes"),
    ],
)
def test_bad_lists_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: {message}"):
        read_names(tmp_path / name)
