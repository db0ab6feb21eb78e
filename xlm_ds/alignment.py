"""Two texts whose lines translate each other: which lines have no translation, and binarized text without them.

found = compare_lengths(Path("en.lengths"), Path("fr.lengths"))      # of their lines in tokens, eos included
found.refusal("train.en-fr.en", "train.en-fr.fr")                    # a sentence, or "" if nothing is wrong
removed = remove_lines(Path("en.bin"), Path("en.lengths"), found.without_partner(0), np.dtype("u2"))
"""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xlm_ds.files import naming, read_lines
from xlm_ds.log import InputError

_LENGTH = np.dtype("=u4")  # as the core writes them while it encodes
_EMPTY = 1  # an eos alone
_COPY_BYTES = 1 << 20


class Unaligned(NamedTuple):
    """What is wrong between two texts."""

    lines: tuple[int, int]
    empty: tuple[
        NDArray[np.int64], NDArray[np.int64]
    ]  # numbers of empty lines, of those that both texts have

    @property
    def _either_empty(self) -> NDArray[np.int64]:
        return np.union1d(*self.empty)

    @property
    def left_out(self) -> int:
        """Pairs of lines, a line alone at the end counting as one."""
        return len(self._either_empty) + max(self.lines) - min(self.lines)

    @property
    def first(self) -> int:
        """The number of the first, from 1 on as editors show it."""
        return 1 + int(next(iter(self._either_empty), min(self.lines)))

    def without_partner(self, side: int) -> NDArray[np.int64]:
        """Numbers, ascending from 0, of the lines of a text that cannot be used."""
        surplus = np.arange(min(self.lines), self.lines[side])
        return np.concatenate([self._either_empty, surplus])

    def refusal(self, first: str, second: str) -> str:
        """What is to be said of texts of these names, in a sentence, or "" if all is well."""
        if found := unequal(self.lines, first, second):
            return f"{found}; align them again, or give --unaligned skip if only the end is missing"
        if not self.left_out:
            return ""
        name, other = (first, second) if self.first - 1 in self.empty[0] else (second, first)
        return (
            f"{name}, line {self.first}: is empty, so line {self.first} of {other} has no translation "
            f"({self.left_out} such in all); --unaligned skip leaves such lines out"
        )


def unequal(lines: tuple[int, int], first: str, second: str) -> str:
    """What is wrong between two texts of these names and so many lines, or "" if they have as many."""
    if lines[0] == lines[1]:
        return ""
    longer = first if lines[0] > lines[1] else second
    return (
        f"{first} has {lines[0]} lines and {second} {lines[1]}, but each must translate that of the same number: line "
        f"{min(lines) + 1} of {longer} is the first without one, or one is lost before, in which case all lines after "
        "it are paired wrongly"
    )


def check_as_many_lines(first: Path, second: Path) -> None:
    """Reads two raw texts whole, some lines at a time. Raises InputError if one has more lines, or is not UTF-8."""
    lines = (sum(map(len, read_lines(first))), sum(map(len, read_lines(second))))
    for path, count in zip((first, second), lines, strict=True):
        if count == 0:
            raise InputError(f"{path}: is empty")
    if found := unequal(lines, str(first), str(second)):
        raise InputError(
            f"{found}; align them again, or if only the end is missing, cut the longer one (head -n {min(lines)})"
        )


def compare_lengths(first: Path, second: Path) -> Unaligned:
    """Of texts of which these files have the lines' lengths. O(lines), four bytes of memory a line."""
    lengths = [_read(path) for path in (first, second)]
    both = min(map(len, lengths))
    empty = [np.flatnonzero(lines[:both] == _EMPTY) for lines in lengths]
    return Unaligned((len(lengths[0]), len(lengths[1])), (empty[0], empty[1]))


def remove_lines(
    data: Path, lengths: Path, numbers: NDArray[np.int64], dtype: np.dtype[np.generic]
) -> list[NDArray[np.generic]]:
    """Takes lines (ascending, from 0) out of binarized text and its lengths, in place; returns their stored ids."""
    sizes = _read(lengths)
    ends = np.cumsum(sizes, dtype=np.int64)
    starts = ends - sizes
    removed: list[NDArray[np.generic]] = []
    with naming(data), data.open("r+b") as file:
        for number in numbers.tolist():
            file.seek(int(starts[number]) * dtype.itemsize)
            removed.append(np.frombuffer(file.read(int(sizes[number]) * dtype.itemsize), dtype))
        borders = [-1, *numbers.tolist(), len(sizes)]
        runs = [(a + 1, b) for a, b in pairwise(borders) if a + 1 < b]
        _keep(
            file,
            ((int(starts[a]) * dtype.itemsize, int(ends[b - 1]) * dtype.itemsize) for a, b in runs),
        )
    with naming(lengths):
        np.delete(sizes, numbers).tofile(lengths)
    return removed


def _read(lengths: Path) -> NDArray[np.uint32]:
    with naming(lengths):
        return np.fromfile(lengths, _LENGTH)


def _keep(file: BinaryIO, stretches: Iterable[tuple[int, int]]) -> None:
    """Moves these bytes, ascending, to the front of a file and cuts off the rest."""
    end = 0
    for begin, stop in stretches:
        if begin == end:  # nothing before is missing yet
            end = stop
            continue
        for at in range(begin, stop, _COPY_BYTES):
            file.seek(at)
            content = file.read(min(_COPY_BYTES, stop - at))
            file.seek(end)
            end += file.write(content)
    file.truncate(end)
