"""XLM's binarized text, TEXT.pth, read without running anything in it.

    text = load_xlm_text(Path("valid.en.pth"))
    text.words, text.sentences, text.positions

Source of the format: XLM cd281d3, xlm/data/dictionary.py and preprocess.py. What reads the file: torch_file.py.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xlm_ds.log import InputError
from xlm_ds.torch_file import PickledArray, PickledObject, load_torch_file

XLM_SPECIALS = ("<s>", "</s>", "<pad>", "<unk>", *(f"<special{i}>" for i in range(10)))
XLM_EOS, XLM_UNK = 1, 3


class XlmText(NamedTuple):
    """What a .pth holds, checked."""

    words: tuple[str, ...]  # in the order of their ids, from len(XLM_SPECIALS) on
    counts: tuple[int, ...]  # of the words
    sentences: NDArray[Any]  # (tokens,) ids, each sentence ended by XLM_EOS
    positions: NDArray[np.int64]  # (lines, 2): where a sentence begins, and where its eos is
    unknown_words: dict[str, int]


def load_xlm_text(path: Path) -> XlmText:
    """Maps `path`. Raises InputError for anything but a .pth of XLM's preprocess.py, naming what was found; OSError."""
    content = load_torch_file(path)
    keys = ("dico", "sentences", "positions", "unk_words")
    if not isinstance(content, dict) or not all(key in content for key in keys):
        raise InputError(f"{path}: has not {', '.join(keys)}, so it is no binarized text of XLM")
    words, counts = _words_of(content["dico"], path)
    sentences, positions = (_array_of(content[key], key, path) for key in keys[1:3])
    if positions.size == 0:
        positions = positions.reshape(0, 2)
    if sentences.ndim != 1 or positions.ndim != 2 or positions.shape[1] != 2:
        raise InputError(
            f"{path}: sentences of shape {sentences.shape} and positions of shape {positions.shape}, "
            "expected (tokens,) and (lines, 2)"
        )
    if sentences.dtype.kind not in "iu" or positions.dtype != np.int64:
        raise InputError(
            f"{path}: sentences of {sentences.dtype} and positions of {positions.dtype}, expected integers and int64"
        )
    unknown = content["unk_words"]
    if not isinstance(unknown, dict) or not all(type(n) is int for n in unknown.values()):
        raise InputError(f"{path}: unk_words is not counts of words")
    return XlmText(words, counts, sentences, positions, unknown)


def _words_of(dico: Any, path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if not isinstance(dico, PickledObject) or dico.kind != "Dictionary":
        raise InputError(f"{path}: dico is not XLM's Dictionary")
    words, counts = dico.attributes.get("id2word"), dico.attributes.get("counts")
    if not isinstance(words, dict) or not isinstance(counts, dict):
        raise InputError(f"{path}: its Dictionary has no id2word or no counts")
    symbols = [words.get(i) for i in range(len(words))]
    if not all(isinstance(s, str) and type(counts.get(s)) is int for s in symbols):
        raise InputError(
            f"{path}: its Dictionary does not give every id a word and every word a count"
        )
    if tuple(symbols[: len(XLM_SPECIALS)]) != XLM_SPECIALS:
        raise InputError(
            f"{path}: its Dictionary begins with {symbols[: len(XLM_SPECIALS)]!r:.120}, not with XLM's special words"
        )
    plain = tuple(str(symbol) for symbol in symbols[len(XLM_SPECIALS) :])
    for word in plain:
        if word.split() != [word]:
            raise InputError(f"{path}: {word!r:.100} in its Dictionary is not one word")
    return plain, tuple(int(counts[word]) for word in plain)


def _array_of(value: Any, key: str, path: Path) -> NDArray[Any]:
    if not isinstance(value, PickledArray) or value.array is None:
        raise InputError(f"{path}: {key} is not an array")
    return value.array
