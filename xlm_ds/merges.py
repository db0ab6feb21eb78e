"""Learning BPE merges, in the form fastBPE reads, from a sample balanced between languages."""

import functools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from xlm_ds import _core
from xlm_ds.dictionary import SPECIAL_SYMBOLS
from xlm_ds.files import read_lines
from xlm_ds.log import InputError

WORD_END = "</w>"

# The last character of a word is told from the same one inside a word by moving it up four planes of Unicode; planes 4
# to 7 are empty. tokenizers' own way (end_of_word_suffix) hands out the ids of last characters in the order of a hash
# table that differs from run to run, and equal counts are decided by id: other codes every time (0.23.3, 2026-11).
WORD_END_SHIFT = 0x40000
_BEYOND_SHIFT = re.compile(f"[{chr(WORD_END_SHIFT)}-{chr(sys.maxunicode)}]")


def sample_copies(sizes: Mapping[str, int], alpha: float, sample_bytes: int) -> dict[str, float]:
    """How often each language's text goes into the sample (0.25: every fourth line), so that shares are ∝ size^alpha.

    The sample has `sample_bytes` in all, but no more than there is text. Source: XLM paper, section 3.1, alpha 0.5.
    """
    total = min(sample_bytes, sum(sizes.values()))
    weights = {lang: size**alpha for lang, size in sizes.items()}
    share = total / sum(weights.values())
    return {lang: share * weights[lang] / size for lang, size in sizes.items()}


def load_bpe(codes: Path, vocab: Path | None) -> _core.Bpe:
    """Raises as _core.Bpe does, and InputError for an empty vocabulary, which fastBPE takes for none."""
    if vocab is not None and vocab.stat().st_size == 0:
        raise InputError(
            f"{vocab}: is empty, expected lines `word count`; give a vocabulary, or none"
        )
    return _core.Bpe(codes, vocab)


def learn_merges(sample: Path, count: int) -> list[tuple[str, str]]:
    """At most `count` merges, best first, of symbols as in a codes file. Equal for equal samples.

    Fewer if no other pair is there twice. Equal counts are decided by the order in which symbols came to be.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    marked = ([_mark_word_ends(line) for line in lines] for lines in read_lines(sample))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    trainer = trainers.BpeTrainer(
        vocab_size=_count_characters(sample) + count, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(marked, trainer)
    return _for_fastbpe(json.loads(tokenizer.to_str())["model"]["merges"])[:count]


def _count_characters(sample: Path) -> int:
    characters: set[str] = set()
    for lines in read_lines(sample):
        for line in lines:
            characters.update(_mark_word_ends(line))
    return len(characters)


def _mark_word_ends(line: str) -> str:
    return " ".join(map(_mark_word_end, line.split()))


@functools.lru_cache(maxsize=1 << 18)
def _mark_word_end(word: str) -> str:
    if _BEYOND_SHIFT.search(
        word
    ):  # nothing but private and unassigned characters: nothing to learn
        return ""
    return word[:-1] + chr(ord(word[-1]) + WORD_END_SHIFT)


def _symbol(marked: str) -> str:
    last = ord(marked[-1])
    return marked if last < WORD_END_SHIFT else marked[:-1] + chr(last - WORD_END_SHIFT) + WORD_END


def _for_fastbpe(merges: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """The merges that fastBPE can read, which wants no symbol made twice.

    Left out too is what would put a symbol of the dictionary such as `<unk>` into the text, what makes a `</w>` that is
    none, and what is made of such.
    """
    kept: dict[str, tuple[str, str]] = {}
    for marked_left, marked_right in merges:
        left, right = _symbol(marked_left), _symbol(marked_right)
        made = left + right
        pretends = made.endswith(WORD_END) and _symbol(marked_right) == marked_right
        special = made.removesuffix(WORD_END) in SPECIAL_SYMBOLS
        exist = all(part in kept or len(part.removesuffix(WORD_END)) == 1 for part in (left, right))
        if exist and made not in kept and not pretends and not special:
            kept[made] = (left, right)
    return list(kept.values())


def count_merges(
    codes: Path, sample: Path, merges: Sequence[tuple[str, str]], scratch: Path
) -> list[int]:
    """How often each merge is applied to the sample: the symbols it leaves there, and those that later merges took.

    `codes` is a file of these merges; files beside `scratch`, with other suffixes, are made and removed.
    """
    split, counted = scratch.with_suffix(".bpe"), scratch.with_suffix(".counts")
    try:
        return _count_merges(codes, sample, merges, split, counted)
    finally:
        split.unlink(missing_ok=True)
        counted.unlink(missing_ok=True)


def _count_merges(
    codes: Path, sample: Path, merges: Sequence[tuple[str, str]], split: Path, counted: Path
) -> list[int]:
    threads = len(os.sched_getaffinity(0))
    _core.Bpe(codes).apply_file(sample, split, threads=threads)
    _core.count_words([split], counted, threads=threads)
    counts: Counter[str] = Counter()
    with counted.open(encoding="utf-8", newline="\n") as file:
        for piece, count in (line.split(" ") for line in file):
            symbol = piece.removesuffix("@@") if piece.endswith("@@") else piece + WORD_END
            counts[symbol] += int(count)
    for left, right in reversed(merges):
        counts[left] += counts[left + right]
        counts[right] += counts[left + right]
    return [counts[left + right] for left, right in merges]
