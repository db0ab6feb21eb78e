"""Slow, readable twins of the C++ core, written from the specification; tests hold the core to them."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

Text = TypeVar("Text", bytes, str)

# ------------------------------------------------------------------------------------------- bpe


def bpe_split(
    word: bytes, codes: list[tuple[bytes, bytes]], vocabulary: set[bytes] | None = None
) -> bytes:
    """fastBPE on one word: best merge first, everywhere; then undone until the vocabulary has every piece."""
    ranks = {pair: rank for rank, pair in enumerate(codes)}
    pieces = re.findall(rb"(?s)(?:^[\x80-\xbf]|[^\x80-\xbf])[\x80-\xbf]*", word)
    pieces[-1] += b"</w>"
    while ranked := [ranks[pair] for pair in itertools.pairwise(pieces) if pair in ranks]:
        pieces = _merge_everywhere(pieces, codes[min(ranked)], b"")
    if vocabulary:
        parts = {left + right: (left, right) for left, right in codes}
        *inside, last = pieces
        pieces = [p for piece in inside for p in _allowed(piece, parts, vocabulary, last=False)]
        pieces += _allowed(last, parts, vocabulary, last=True)
    return b"@@ ".join(pieces).removesuffix(b"</w>")


def _merge_everywhere(pieces: Sequence[Text], pair: tuple[Text, Text], empty: Text) -> list[Text]:
    merged: list[Text] = []
    at = 0
    while at < len(pieces):
        width = 2 if tuple(pieces[at : at + 2]) == pair else 1
        merged.append(empty.join(pieces[at : at + width]))
        at += width
    return merged


def _allowed(
    piece: bytes, parts: dict[bytes, tuple[bytes, bytes]], vocabulary: set[bytes], *, last: bool
) -> list[bytes]:
    shown = piece.removesuffix(b"</w>") if last else piece + b"@@"
    if shown in vocabulary or piece not in parts:
        return [piece]
    left, right = parts[piece]
    return [
        *_allowed(left, parts, vocabulary, last=False),
        *_allowed(right, parts, vocabulary, last=last),
    ]


def bpe_apply(
    text: bytes, codes: list[tuple[bytes, bytes]], vocabulary: set[bytes] | None = None
) -> bytes:
    """fastBPE applybpe on a text: words end at 0x20 and 0x0A, which are copied."""
    return re.sub(rb"[^ \n]+", lambda word: bpe_split(word[0], codes, vocabulary), text)


def bpe_replay(words: dict[str, int], merges: list[tuple[str, str]]) -> list[tuple[int, int, int]]:
    """What learning looks like when it is done by counting everything again before each of the merges.

    `words`: word -> count. For each merge: how often its pair is there, how often the most frequent pair is there, how
    often the merge is applied.
    """
    split = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    history = []
    for pair in merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in split.items():
            for neighbours in itertools.pairwise(symbols):
                pairs[neighbours] += words[word]
        applied = 0
        for word, symbols in split.items():
            merged = _merge_everywhere(symbols, pair, "")
            applied += words[word] * (len(symbols) - len(merged))
            split[word] = tuple(merged)
        history.append((pairs[pair], max(pairs.values(), default=0), applied))
    return history
