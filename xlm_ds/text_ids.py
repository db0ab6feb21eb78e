"""Raw text to ids, as the text was treated that a model was trained on.

    to_ids = TextToIds.load(Path("run/checkpoint_best"))     # or the folder that binarize wrote
    to_ids("Ça va?", "fr")                                   # (n,) int64, without the eos of a line
    to_ids.masked("Ça <mask>?", "fr")
    rows_of_texts([("Ça va?",)], "fr", to_ids, 256, str)     # [(2 + n,)], as a model reads them

What decides the ids lies in that folder: dict.txt, and where the text came from `prepare` or was split with
--bpe-codes, prepare.json (the tokenisation), codes and bpe_vocab. A line's ids are those that `prepare` and `binarize`
make of it.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from xlm_ds import _core
from xlm_ds.dictionary import EOS, MASK, PAD, SPECIAL_SYMBOLS, UNK, Dictionary
from xlm_ds.log import InputError, logger
from xlm_ds.merges import load_bpe
from xlm_ds.prepare_record import RECORD
from xlm_ds.tokenisation import Tokenisation, installed_sacremoses, tokenise_line

Ids: TypeAlias = NDArray[np.int64]
Row: TypeAlias = NDArray[np.int32]  # eos, ids and eos, as a model reads them

_LINE_ENDS = re.compile(r"[\r\n]+")


class TextToIds:
    """A run's own way from a line of raw text to ids."""

    def __init__(
        self, dictionary: Dictionary, tokenisation: Tokenisation | None, bpe: _core.Bpe | None
    ) -> None:
        """Without a tokenisation, texts are words between blanks already; without codes, pieces of words."""
        self.dictionary = dictionary
        self.tokenisation = tokenisation
        self._bpe = bpe
        self._ids = {symbol: number for number, symbol in enumerate(dictionary.symbols)}

    @classmethod
    def load(cls, folder: Path, dictionary: Dictionary | None = None) -> "TextToIds":
        """From a checkpoint's folder or binarize's; says what texts must be already. Raises InputError, OSError.

        `dictionary`: the folder's, if it has been read.
        """
        dictionary = dictionary or Dictionary.load(folder / "dict.txt")
        tokenisation = _load_tokenisation(folder / RECORD)
        codes, vocab = folder / "codes", folder / "bpe_vocab"
        bpe = load_bpe(codes, vocab if vocab.exists() else None) if codes.exists() else None
        if bpe is None and tokenisation is not None:
            raise InputError(
                f"{codes}: missing, although {RECORD} beside it says how text is split"
            )
        if bpe is None:
            logger.warning(
                f"{folder}: has neither {RECORD} nor codes, so texts are taken as tokenised and split already"
            )
        elif tokenisation is None:
            logger.warning(f"{folder}: has no {RECORD}, so texts are taken as tokenised already")
        return cls(dictionary, tokenisation, bpe)

    def __call__(self, text: str, language: str) -> Ids:
        """(n,): the line's ids without its eos; several lines are one. UNK where a piece is not in the dictionary."""
        return self._ids_of(self._words(text, language))

    def masked(self, text: str, language: str) -> Ids:
        """(n,): the same, with MASK wherever the text has `<mask>`, which stands for a word."""
        # Begins with a capital: Moses takes a point before a small letter for that of an abbreviation.
        stand_in = "Qzmaskqz"
        while stand_in.lower() in text.lower():
            stand_in += "q"
        words = self._words(text.replace(SPECIAL_SYMBOLS[MASK], stand_in), language)
        parts = [self._ids_of(part) for part in re.split(stand_in, words, flags=re.IGNORECASE)]
        mask = np.array([MASK], np.int64)
        return np.concatenate([piece for part in parts for piece in (part, mask)][:-1])

    def _words(self, text: str, language: str) -> str:
        if self.tokenisation is not None:
            return tokenise_line(text, language, self.tokenisation)
        return _LINE_ENDS.sub(" ", text)

    def _ids_of(self, words: str) -> Ids:
        if self._bpe is not None:
            words = self._bpe.apply_line(words.encode()).decode()
        # str.split knows the same 29 blanks as binarize. A word spelt as padding is none: padding is known by its id.
        ids = (self._ids.get(piece, UNK) for piece in words.split())
        return np.array([UNK if number == PAD else number for number in ids], np.int64)


def _load_tokenisation(path: Path) -> Tokenisation | None:
    """What prepare wrote down, or None; says if this machine's tokeniser or Unicode is another."""
    if not path.exists():
        return None
    try:
        settings = Tokenisation(**json.loads(path.read_text(encoding="utf-8"))["tokenisation"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: not a record of this prepare; bring back the run's own"
        ) from error
    here = {"sacremoses": installed_sacremoses(), "unicode": unicodedata.unidata_version}
    for name, version in here.items():
        if getattr(settings, name) != version:
            logger.warning(
                f"{path}: the text was tokenised with {name} {getattr(settings, name)}, here is {version}; some words "
                "may become others"
            )
    return settings


# ------------------------------------------------------------------------------------ rows of ids


def joined_row(parts: Sequence[Ids], longest: int | None) -> tuple[Row, bool]:
    """eos, the text and eos, and of a pair the second text and eos, as one row; whether it was cut to `longest`.

    Of a pair the longer text loses what is too much, down to half of the room.
    """
    room = None if longest is None else longest - len(parts) - 1
    was_cut = room is not None and sum(map(len, parts)) > room
    if room is not None and was_cut:
        first = min(len(parts[0]), max(room - sum(map(len, parts[1:])), -(-room // len(parts))))
        parts = [parts[0][:first], *(part[: room - first] for part in parts[1:])]
    eos = np.array([EOS])
    row = np.concatenate([eos, *(piece for part in parts for piece in (part, eos))])
    return row.astype(np.int32), was_cut


def rows_of_texts(
    examples: Sequence[Sequence[str]],
    language: str,
    to_ids: TextToIds,
    longest: int | None,
    where: Callable[[int], str],
) -> list[Row]:
    """Of each example, which is one text or two, its row; says how many are cut.

    `where` says of an example's number where it is from. Raises InputError for a text without a word.
    """
    rows = []
    cut = 0
    for number, texts in enumerate(examples):
        parts = [to_ids(text, language) for text in texts]
        if any(len(part) == 0 for part in parts):
            which = "the text" if len(parts) == 1 else "a text"
            raise InputError(f"{where(number)}: {which} has no word; take it out")
        row, was_cut = joined_row(parts, longest)
        rows.append(row)
        cut += was_cut
    if cut:
        what = "texts" if len(examples[0]) == 1 else "pairs of texts"
        logger.warning(
            f"{cut} of {len(rows)} {what} in {language} are longer than the {longest} positions of the model and are "
            "cut"
        )
    return rows
