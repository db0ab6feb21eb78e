"""A run that begins with the weights of another model: what is the same is copied, the rest begins anew and is counted.

    taken = take_weights(model, shape, open_model(path).network, dictionary, languages)
    taken.report()          # sentences: words, languages, positions, layers; what begins anew, what is left out

Rows are found by what they stand for: a word by its symbol, a language by its name, a position by its number.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlm_ds.architectures import ModelShape
from xlm_ds.dictionary import SPECIAL_SYMBOLS, Dictionary
from xlm_ds.exchange import Hints, Network
from xlm_ds.log import InputError
from xlm_ds.model import XlmEncoder
from xlm_ds.peers import open_model

_BY_WORD = ("token_embedding.weight", "head.output_bias")
_LANGUAGES, _POSITIONS = "language_embedding.weight", "position_embedding.weight"


@dataclasses.dataclass(frozen=True)
class Taken:
    """What has become of the weights of a model that a run begins with."""

    where: str
    words: NDArray[np.bool_]  # (V,): which rows of the run's dictionary are the model's
    sentences: tuple[str, ...]

    def report(self, counts: NDArray[np.uint64]) -> list[str]:
        """`counts` (V,): of the run's training text."""
        known, used = self.words[len(SPECIAL_SYMBOLS) :], counts[len(SPECIAL_SYMBOLS) :]
        covered = used[known].sum() / max(int(used.sum()), 1)
        return [
            f"begins with the weights of {self.where}",
            f"words: {known.sum():,} of {len(known):,} are its words, {covered:.1%} of those in the training text; "
            f"{(~known).sum():,} begin anew",
            *self.sentences,
        ]


def open_source(path: Path, languages: Sequence[str]) -> Network:
    """The model of --init-from; `languages`: what it is told that its languages are if it names none.

    Raises InputError, OSError.
    """
    try:
        return open_model(path, Hints(otherwise=languages, parts=True)).network
    except InputError as error:
        more = "--dict" in str(error) or "--langs" in str(error)
        how = " to xlm-ds convert, and begin with what it writes" if more else ""
        raise InputError(f"--init-from {error}{how}") from error


@torch.no_grad()
def take_weights(
    model: XlmEncoder,
    shape: ModelShape,
    source: Network,
    dictionary: Dictionary,
    languages: Sequence[str],
    where: str,
) -> Taken:
    """Copies into `model`, which has been initialised and has `shape`, what `source` has of it.

    Raises InputError if no part fits: another width, or no word in common.
    """
    words = fitting_rows(shape, source, dictionary, where)
    known = [language for language in languages if language in source.languages]
    before = model.head.output_bias.clone()
    copies: dict[str, Callable[[Tensor, Tensor], None]] = {
        **dict.fromkeys(_BY_WORD, lambda to, given: _copy_rows(to, given, words)),
        _LANGUAGES: lambda to, given: _copy_rows(
            to, given, _places(len(to), languages, source.languages)
        ),
        _POSITIONS: lambda to, given: _copy_positions(to, given, shape, source.shape),
    }
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name in source.weights:
            copies.get(name, Tensor.copy_)(parameter, source.weights[name])
    if "head.output_bias" in source.weights:
        _level_bias(model.head.output_bias, before, words)
    anew = sorted({_part(name) for name in parameters if name not in source.weights})
    left_out = sorted({_part(name) for name in source.weights if name not in parameters})
    sentences = [
        f"layers: {min(shape.layers, source.shape.layers)} of {shape.layers} are its {source.shape.layers}",
        *_positions_said(shape, source.shape),
        *_languages_said(shape, source.shape, languages, known),
        *([f"begins anew: {', '.join(anew)}"] if anew else []),
        *([f"left out: {', '.join(left_out)}"] if left_out else []),
        *([_NORM_LOST] if "embedding_norm" in left_out else []),
        *_marker_said(source.dictionary),
        *_differences(shape, source.shape),
        *source.remarks,
    ]
    return Taken(where, words >= 0, tuple(sentences))


_NORM_LOST = (
    "its embeddings were normalised, and here they are not, which changes all that follows; --encoder-normalize-before "
    "or --arch xlm keeps it"
)


def fitting_rows(
    shape: ModelShape, source: Network, dictionary: Dictionary, where: str
) -> NDArray[np.int64]:
    """(V,): of each of the run's words the row of `source`, or -1. Raises InputError as take_weights."""
    _check_widths(shape, source.shape, where)
    words = _rows_by_symbol(dictionary, source.dictionary)
    if not (words[len(SPECIAL_SYMBOLS) :] >= 0).any():
        raise InputError(
            f"--init-from {where}: has no word of the run's dictionary ({source.dictionary.symbols[-1]!r} is one of "
            f"its own, {dictionary.symbols[-1]!r} of the run's); prepare the text with its codes and vocabulary"
        )
    return words


def _level_bias(bias: Tensor, before: Tensor, words: NDArray[np.int64]) -> None:
    """New words' biases are of the run's own start, and the others the model's: puts them on one level."""
    known = torch.from_numpy(words >= 0)
    known[: len(SPECIAL_SYMBOLS)] = False
    new = torch.from_numpy(words < 0)
    bias[new] += (bias[known] - before[known]).mean()


def _check_widths(shape: ModelShape, source: ModelShape, where: str) -> None:
    flags = {
        "embed_dim": "--encoder-embed-dim",
        "ffn_embed_dim": "--encoder-ffn-embed-dim",
        "attention_heads": "--encoder-attention-heads",
    }
    wrong = [
        f"{flag} {getattr(source, name)}"
        for name, flag in flags.items()
        if getattr(source, name) != getattr(shape, name)
    ]
    if wrong:
        raise InputError(
            f"--init-from {where}: has other widths than the run, so none of it fits; give {' '.join(wrong)}"
        )


def _rows_by_symbol(dictionary: Dictionary, source: Dictionary) -> NDArray[np.int64]:
    """(V,): of each of the run's words the model's row, or -1. A word that is there twice counts where it is first.

    Where the model's pieces are marked at the begin of a word, a word is the piece that has the mark.
    """
    place: dict[str, int] = {}
    for number, symbol in enumerate(source.symbols):
        place.setdefault(symbol, number)
    mark = word_mark(source)
    special = len(SPECIAL_SYMBOLS)
    rows = [place.get(mark + symbol, -1) for symbol in dictionary.symbols[special:]]
    return np.array([*range(special), *rows], np.int64)


def word_mark(dictionary: Dictionary) -> str:
    """What its pieces begin with where a word begins, of SentencePiece or GPT-2's BPE; "" where nothing marks it."""
    marks = ("\u2581", "\u0120")
    pieces = dictionary.symbols[len(SPECIAL_SYMBOLS) :]
    return next((mark for mark in marks if any(p.startswith(mark) for p in pieces)), "")


def _marker_said(source: Dictionary) -> list[str]:
    mark = word_mark(source)
    return (
        [f"its pieces are marked {mark} where a word begins: x here is its {mark}x"] if mark else []
    )


def _places(rows: int, names: Sequence[str], source: Sequence[str]) -> NDArray[np.int64]:
    """(rows,): the same of names; a table may have more rows than names."""
    found = [source.index(name) if name in source else -1 for name in names]
    return np.array(found + [-1] * (rows - len(found)), np.int64)


def _copy_rows(to: Tensor, given: Tensor, places: NDArray[np.int64]) -> None:
    (rows,) = np.nonzero(places >= 0)
    to[torch.from_numpy(rows)] = given[torch.from_numpy(places[rows])]


def _copy_positions(to: Tensor, given: Tensor, shape: ModelShape, source: ModelShape) -> None:
    both = min(shape.max_positions, source.max_positions)
    begin, theirs = shape.first_position_row, source.first_position_row
    to[begin : begin + both] = given[theirs : theirs + both]


def _positions_said(shape: ModelShape, source: ModelShape) -> list[str]:
    if not (shape.token_positions and source.token_positions):
        return []
    both = min(shape.max_positions, source.max_positions)
    return [f"positions: {both} of {shape.max_positions} are of its {source.max_positions}"]


def _languages_said(
    shape: ModelShape, source: ModelShape, languages: Sequence[str], known: Sequence[str]
) -> list[str]:
    if not (shape.num_segment and source.num_segment):
        return []
    new = [language for language in languages if language not in known]
    said = f"languages: {', '.join(known) or 'none'} as they are there"
    return [said + (f"; {', '.join(new)} begin anew" if new else "")]


def _differences(shape: ModelShape, source: ModelShape) -> list[str]:
    return [
        f"{name} is {getattr(shape, name)} here and was {getattr(source, name)} there"
        for name in ("activation_fn", "layer_norm_eps")
        if getattr(shape, name) != getattr(source, name)
    ]


def _part(name: str) -> str:
    """A parameter's module, and of layers the layer."""
    parts = name.split(".")
    return (
        ".".join(parts[:2])
        if parts[0] == "layers" or name == "head.output_bias"
        else ".".join(parts[:-1])
    )
