"""The contract of the C++ core: every entry of csrc/bindings/module.cpp, with shapes, dtypes and errors.

Every function releases the interpreter's lock. A file that cannot be opened raises OSError; wrong content
raises InputError with one sentence.
"""

from collections.abc import Sequence
from pathlib import Path

class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence, to be shown as it is."""

class Bpe:
    """Byte pair encoding as fastBPE applies it; words end at 0x20 and 0x0A only.

    Immutable: any number of threads may use one.
    """

    def __init__(self, codes_path: Path | str, vocab_path: Path | str | None = None) -> None:
        """Reads codes (lines `left right count`) and a vocabulary (lines `word count`).

        With a vocabulary, merges are undone until every piece is in it.
        Raises InputError for a malformed or repeated line.
        """

    def apply_line(self, line: bytes) -> bytes:
        """`line` with every word split into pieces joined by `@@ `; blanks are copied unchanged. Keeps the lock."""

    def apply_file(self, input_path: Path | str, output_path: Path | str, threads: int = 1) -> None:
        """`apply_line` on a whole file, written in place; the bytes do not depend on `threads`."""

def count_words(paths: Sequence[Path | str], output_path: Path | str) -> int:
    """Writes lines `word count` of all files together, most frequent first, then by bytes; returns how many."""
