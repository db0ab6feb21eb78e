"""Symbols and ids by fairseq's rules for masked language models: five special symbols, then the file's rows.

    dictionary = Dictionary.load(Path("OUT/dict.txt"))
    len(dictionary)          # rows of the model's embedding
    dictionary.sha256        # what data and checkpoints are compared by

Source of the rules: fairseq 3d262bb, data/dictionary.py and legacy/masked_lm_dictionary.py, as run.
"""

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xlm_ds import _core
from xlm_ds.log import InputError, logger

BOS, PAD, EOS, UNK, MASK = _core.BOS, _core.PAD, _core.EOS, _core.UNK, _core.MASK
SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
OVERWRITE = "#fairseq:overwrite"
GOES_ON = "@@"  # at the end of a symbol: its word goes on in the next one (fastBPE and subword-nmt)


@dataclass(frozen=True)
class Dictionary:
    """`symbols[id]`, special ones included, and their counts. Two rows may have one symbol: the later has its id."""

    symbols: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def load(
        cls, path: Path, *, on_duplicate: str = "error", max_vocab: int | None = None
    ) -> "Dictionary":
        """Reads lines `symbol count` or `symbol count #fairseq:overwrite`.

        on_duplicate: "error", or "skip" a row whose symbol is there already (no id is used up, as in XLM).
        max_vocab: keep the first rows only, so that len() is at most this.
        Raises: InputError with file and line; OSError.
        """
        symbols, counts = list(SPECIAL_SYMBOLS), [1] * len(SPECIAL_SYMBOLS)
        known, skipped = set(symbols), []
        for number, line in enumerate(_lines(path), start=1):
            symbol, count, overwrite = _parse(line, path, number)
            if symbol in known and not overwrite:
                if on_duplicate == "error":
                    raise InputError(
                        f"{path}, line {number}: {symbol!r} is in the dictionary already; delete the row, add "
                        f"{OVERWRITE} at its end, or binarize with --on-duplicate skip"
                    )
                skipped.append(number)
                continue
            known.add(symbol)
            symbols.append(symbol)
            counts.append(count)
        if skipped:
            logger.info(
                f"{path}: skipped {len(skipped)} rows whose symbol was there already, the first in line {skipped[0]}"
            )
        if max_vocab is not None and len(symbols) > max_vocab:
            logger.info(
                f"{path}: kept the first {max_vocab - len(SPECIAL_SYMBOLS)} rows of "
                f"{len(symbols) - len(SPECIAL_SYMBOLS)}: {max_vocab} with the special symbols"
            )
            del symbols[max_vocab:], counts[max_vocab:]
        return cls(tuple(symbols), tuple(counts))

    def truncated(self, size: int) -> "Dictionary":
        """The first rows only, so that len() is at most `size`."""
        return Dictionary(self.symbols[:size], self.counts[:size])

    def save(self, path: Path) -> None:
        """Writes what `load` reads back as an equal dictionary."""
        path.write_text(self.text, encoding="utf-8", newline="")

    def __len__(self) -> int:
        return len(self.symbols)

    @cached_property
    def text(self) -> str:
        """The file. Unlike fairseq's, it keeps the overwrite flag, without which it could not be read back."""
        seen = set(SPECIAL_SYMBOLS)
        rows = []
        for symbol, count in zip(self.symbols, self.counts, strict=True):
            rows.append(
                f"{symbol} {count} {OVERWRITE}\n" if symbol in seen else f"{symbol} {count}\n"
            )
            seen.add(symbol)
        return "".join(rows[len(SPECIAL_SYMBOLS) :])

    @cached_property
    def word_goes_on(self) -> NDArray[np.uint64]:
        """A bit per id, whether it ends with GOES_ON: of id i, bit i % 64 of number i // 64."""
        bits = np.packbits([symbol.endswith(GOES_ON) for symbol in self.symbols], bitorder="little")
        return np.pad(bits, (0, -len(bits) % 8)).view("<u8").astype(np.uint64, copy=False)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def build_dictionary(
    words: Mapping[str, int], *, threshold: int = 0, nwords: int = -1, padding_factor: int = 8
) -> Dictionary:
    """The dictionary fairseq builds from counted words: most frequent first, equal counts by code point.

    threshold: leave out words seen less often. nwords: at most so many symbols, special ones included (<= 0: all).
    padding_factor: fill up to a multiple of it with madeupword0000, madeupword0001, …
    """
    ranked = sorted(
        (item for item in words.items() if item[0] not in SPECIAL_SYMBOLS),
        key=lambda item: (-item[1], item[0]),
    )
    if nwords > 0:
        ranked = ranked[: max(nwords - len(SPECIAL_SYMBOLS), 0)]
    kept = [(symbol, count) for symbol, count in ranked if count >= threshold]
    missing = -(len(SPECIAL_SYMBOLS) + len(kept)) % padding_factor
    present = {symbol for symbol, _ in kept}
    fillers = (f"madeupword{i:04d}" for i in itertools.count())
    kept += [(f, 0) for f in itertools.islice((f for f in fillers if f not in present), missing)]
    symbols = (*SPECIAL_SYMBOLS, *(symbol for symbol, _ in kept))
    counts = (*[1] * len(SPECIAL_SYMBOLS), *(count for _, count in kept))
    return Dictionary(symbols, counts)


def _lines(path: Path) -> Iterable[str]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(_split_lines(content[: error.start].decode("utf-8")))
        raise InputError(
            f"{path}, line {line}, byte {error.start}: 0x{content[error.start]:02x} is not UTF-8; "
            "convert the dictionary to UTF-8"
        ) from error
    lines = _split_lines(text)
    return lines[:-1] if lines[-1] == "" else lines


def _split_lines(text: str) -> list[str]:
    """At Python's universal newlines and nothing else (str.splitlines knows more)."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _parse(line: str, path: Path, number: int) -> tuple[str, int, bool]:
    """(symbol, count, whether it may overwrite). The count is after the last U+0020, so a symbol may hold blanks."""
    symbol, blank, field = line.rstrip().rpartition(" ")
    overwrite = field == OVERWRITE
    if overwrite:
        symbol, blank, field = symbol.rpartition(" ")
    try:
        # Python's int, as fairseq's: 1_000, +5 and other scripts' digits are counts.
        count = int(field)
    except ValueError as error:
        raise InputError(
            f"{path}, line {number}: expected `symbol count`, found {line[:80]!r}; "
            "the count must be a whole number after a single blank"
        ) from error
    if not blank:
        raise InputError(
            f"{path}, line {number}: expected `symbol count`, found {line[:80]!r}; there is no blank before a count"
        )
    return symbol, count, overwrite
