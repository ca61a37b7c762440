"""What a large data set's annotations would fill the memory with: in a temporary file (TMPDIR says where; one that is
itself memory, a tmpfs, gains little)."""

import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from typing import overload

from data_tools.sample import Sample

WRITTEN_BYTES = 2**20  # at a time


class Spill:
    """Pieces of bytes by number. Forks of this process read them too."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (gone with the last reference to it)
        self._ends = array("q", [0])
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    def append(self, data: bytes) -> None:
        """Raises OSError: a full disk for one."""
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        self._ends.append(self._ends[-1] + len(data))
        if self._waiting_bytes > WRITTEN_BYTES:
            self.flush()

    def flush(self) -> None:
        left = memoryview(b"".join(self._waiting))
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:  # it does not name its file, which has no name
            where = f"{tempfile.gettempdir()} (TMPDIR names another folder for what does not fit in memory)"
            raise OSError(error.errno, error.strerror, where) from error
        self._waiting, self._waiting_bytes = [], 0

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> bytes:
        if self._waiting:
            self.flush()
        return os.pread(self._file.fileno(), self.size(i), self._ends[i])

    def size(self, i: int) -> int:
        return self._ends[i + 1] - self._ends[i]


class Samples(Sequence[Sample]):
    """Samples, kept as the JSON that shards will have of them; a part of them shares their file."""

    def __init__(self, spill: Spill | None = None, places: range | None = None) -> None:
        self._spill = Spill() if spill is None else spill
        self._places = places  # None: all

    def append(self, sample: Sample) -> None:
        self._spill.append(sample.to_json())

    def json_bytes(self) -> Iterator[int]:
        """Of each."""
        return (self._spill.size(i) for i in self._range())

    def _range(self) -> range:
        return range(len(self._spill)) if self._places is None else self._places

    def __len__(self) -> int:
        return len(self._range())

    def __iter__(self) -> Iterator[Sample]:
        return (Sample.from_json(self._spill[i]) for i in self._range())

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> "Samples": ...
    def __getitem__(self, i: int | slice) -> "Sample | Samples":
        if isinstance(i, slice):
            self._spill.flush()  # whoever forks has parts
            return Samples(self._spill, self._range()[i])
        return Sample.from_json(self._spill[self._range()[i]])
