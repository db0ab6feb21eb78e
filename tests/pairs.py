"""Writes small .bin/.idx pairs for tests, from the formats' description and not by the code under test."""

import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

DTYPE_CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "u2": 8, "u4": 9, "u8": 10}


def write_mmap_index(path: Path, lengths: Sequence[int], dtype: str = "u2") -> None:
    width = np.dtype(dtype).itemsize
    header = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, DTYPE_CODES[dtype], len(lengths))
    starts = [width * start for start in accumulate(lengths, initial=0)][:-1]
    path.write_bytes(header + struct.pack(f"<{len(lengths)}i{len(lengths)}q", *lengths, *starts))


def write_mmap(prefix: Path, lines: Sequence[Sequence[int]], dtype: str = "u2") -> None:
    write_mmap_index(Path(f"{prefix}.idx"), [len(line) for line in lines], dtype)
    ids = [token for line in lines for token in line]
    Path(f"{prefix}.bin").write_bytes(np.array(ids, f"<{dtype}").tobytes())


def write_lazy_index(path: Path, lengths: Sequence[int]) -> None:
    count = len(lengths)
    header = b"TNTIDX\0\0" + struct.pack("<5Q", 1, 4, 4, count, count)
    columns = [*range(count + 1), *accumulate(lengths, initial=0), *lengths]
    path.write_bytes(header + struct.pack(f"<{len(columns)}q", *columns))


def write_lazy(prefix: Path, lines: Sequence[Sequence[int]]) -> None:
    write_lazy_index(Path(f"{prefix}.idx"), [len(line) for line in lines])
    ids = [token + 1 for line in lines for token in line]
    Path(f"{prefix}.bin").write_bytes(np.array(ids, "<i4").tobytes())


def write_megatron_index(
    path: Path,
    lengths: Sequence[int],
    dtype: str = "u2",
    document_starts: Sequence[int] | None = None,
) -> None:
    """fairseq's magic, version and columns; the documents' first sequences after them, their number before."""
    write_mmap_index(path, lengths, dtype)
    fairseqs = path.read_bytes()
    starts = range(len(lengths) + 1) if document_starts is None else document_starts
    documents = struct.pack(f"<{len(starts)}q", *starts)
    path.write_bytes(fairseqs[:26] + struct.pack("<Q", len(starts)) + fairseqs[26:] + documents)


def write_megatron(
    prefix: Path,
    lines: Sequence[Sequence[int]],
    dtype: str = "u2",
    document_starts: Sequence[int] | None = None,
) -> None:
    write_mmap(prefix, lines, dtype)
    lengths = [len(line) for line in lines]
    write_megatron_index(Path(f"{prefix}.idx"), lengths, dtype, document_starts)
