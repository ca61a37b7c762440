"""A JSON object whose lists are larger than memory should be: read item by item, by json's own scanner."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 2**22
MOST_DIGITS, LONGEST_WORD = 100, 16
_SPACE = " \t\n\r"
_decoder = json.JSONDecoder()


class NotAnObject(ValueError):
    """JSON of another kind."""


def members(path: Path) -> Iterator[tuple[str, int | None, Any]]:
    """Name, place and value of each item of the lists in the object that the file holds, in their order; of a member
    that is no list, or an empty one, its value at place None.

    Raises:
        NotAnObject: JSON, but something else; its text is the type. ValueError: not JSON.
        RecursionError: nested too deeply.
    """
    with path.open("rb") as file:
        text = _Text(file)
        if text.next() != "{":
            value = text.value()
            text.end()
            raise NotAnObject(type(value).__name__)
        text.at += 1
        if text.next() == "}":
            text.at += 1
        else:
            while True:
                if text.next() != '"':
                    raise text.error("Expecting property name enclosed in double quotes")
                name = text.value()
                text.skip(":")
                yield from ((name, place, value) for place, value in _items(text))
                if text.skip(",", "}") == "}":
                    break
        text.end()


def _items(text: "_Text") -> Iterator[tuple[int | None, Any]]:
    if text.next() != "[":
        yield None, text.value()
        return
    text.at += 1
    if text.next() == "]":
        text.at += 1
        yield None, []
        return
    place = 0
    while True:
        yield place, text.value()
        if text.skip(",", "]") == "]":
            return
        place += 1


class _Text:
    """The text of the file from what was read last to what was not yet needed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.buffer, self.at = file, "", 0
        self.passed, self.lines = 0, 0  # before the buffer: characters, line breaks
        start = file.read(4)
        file.seek(0)
        self.decoder = codecs.getincrementaldecoder(json.detect_encoding(start))("surrogatepass")

    def more(self) -> bool:
        """Read on, at least as much as there is: what is tried again and again takes no longer than once."""
        start = self.file.tell()
        data = self.file.read(max(CHUNK_BYTES, len(self.buffer) - self.at))
        try:
            new = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            left = len(error.object) - len(data)  # bytes of a character that the read before cut
            raise ValueError(f"{error.reason} (byte {start - left + error.start}, {error.encoding})") from error
        self.passed += self.at
        self.lines += self.buffer.count("\n", 0, self.at)
        self.buffer, self.at = self.buffer[self.at :] + new, 0
        return bool(data)

    def next(self) -> str:
        """The next character that is no space, where reading goes on; empty at the end."""
        while True:
            while self.at < len(self.buffer):
                if self.buffer[self.at] not in _SPACE:
                    return self.buffer[self.at]
                self.at += 1
            if not self.more():
                return ""

    def skip(self, *expected: str) -> str:
        found = self.next()
        if not found or found not in expected:
            raise self.error(f"Expecting {' or '.join(map(repr, expected))}")
        self.at += 1
        return found

    def value(self) -> Any:
        self.next()
        while True:
            try:
                value, end = _decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.buffer) - LONGEST_WORD
                ahead = error.pos - self.at  # more() moves both
                if cut and self.more():  # what is missing may come
                    continue
                self.at += ahead
                raise self.error(error.msg) from error
            rest = (
                self.buffer[end : end + MOST_DIGITS].lstrip("0123456789.eE+-") if type(value) in (int, float) else "."
            )
            length = end - self.at
            if rest or not self.more():  # a number may go on
                self.at += length
                return value

    def end(self) -> None:
        if self.next():
            raise self.error("Extra data")

    def error(self, message: str) -> ValueError:
        line = self.lines + self.buffer.count("\n", 0, self.at) + 1
        return ValueError(f"{message}: line {line} (char {self.passed + self.at})")
