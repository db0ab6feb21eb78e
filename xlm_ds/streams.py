"""What samples are drawn from: languages, and pairs of languages whose lines translate each other (TLM).

    chosen = choose((), ("en", "de", "en-de"), Path("OUT"))       # what --mlm-steps lists
    streams = open_streams(Path("OUT"), "train", chosen, tokens_per_sample=256, break_mode="none",
                           vocab_size=len(dictionary), dictionary_sha256=dictionary.sha256)
    streams[2].name, streams[2].languages, streams[2].blocks       # "en-de", (0, 1), its pairs of lines

A pair is SPLIT.en-de.en.{bin,idx} and SPLIT.en-de.de.{bin,idx}: line i of one translates line i of the other.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xlm_ds import _core
from xlm_ds.config import check_languages
from xlm_ds.dataset import TokenDataset, languages_in, open_split
from xlm_ds.dictionary import EOS
from xlm_ds.log import InputError

SHORTEST_ROW = 6  # tokens of a pair: eos, word, eos, eos, word, eos


class Choice(NamedTuple):
    """What a run reads."""

    languages: tuple[str, ...]  # by id
    streams: tuple[tuple[str, ...], ...]  # ("en",) by id, then ("en", "de") as listed

    def ids(self, stream: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.languages.index(language) for language in stream)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The blocks of a language, or pairs of lines of two, on one split."""

    languages: tuple[int, ...]  # ids: one, or those of the first and the second half of a row
    sides: tuple[TokenDataset, ...]  # as many
    core: _core.Stream = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        (first, *second), (language, *other) = self.sides, self.languages
        if second:
            core = _core.Stream(first.core, language, second[0].core, other[0])
        else:
            core = _core.Stream(first.core, language)
        object.__setattr__(self, "core", core)

    @property
    def name(self) -> str:
        return "-".join(side.language for side in self.sides)

    @property
    def is_pair(self) -> bool:
        return len(self.sides) == 2

    @property
    def blocks(self) -> int:
        """Blocks, or pairs of lines."""
        return self.core.blocks

    @property
    def tokens_per_sample(self) -> int:
        return self.sides[0].tokens_per_sample

    def counts(self) -> NDArray[np.uint64]:
        """How often each id occurs, (1, V), or in either half of a pair's rows, (2, V).

        The eos that begins a second half counts, as it may be masked. Rows that are cut count whole. Raises InputError
        as TokenDataset.counts.
        """
        counts = np.stack([side.counts() for side in self.sides])
        counts[1:, EOS] += np.uint64(self.blocks)
        return counts


def alone(datasets: Sequence[TokenDataset]) -> tuple[Stream, ...]:
    """A stream of each language, whose ids are in this order."""
    return tuple(Stream(languages=(i,), sides=(side,)) for i, side in enumerate(datasets))


# ---------------------------------------------------------------------------------- what is chosen


def choose(
    monolingual_langs: Sequence[str], mlm_steps: Sequence[str], folder: Path | None
) -> Choice:
    """By --monolingual-langs and --mlm-steps, or else all languages of the folder.

    Ids follow --monolingual-langs, else the order in which --mlm-steps names the languages first.
    Raises InputError for what is no language or pair, or named twice, and for a folder without languages.
    """
    check_languages(monolingual_langs, "--monolingual-langs")
    if not mlm_steps:
        languages = tuple(monolingual_langs) or (_all_languages(folder) if folder else ())
        check_languages(languages, "--monolingual-langs")
        return Choice(languages, tuple((language,) for language in languages))
    steps = [_parsed(step, monolingual_langs) for step in mlm_steps]
    for number, step in enumerate(steps):
        before = next((n for n, other in enumerate(steps[:number]) if {*step} == {*other}), None)
        if before is not None and step == steps[before]:
            raise InputError(f"--mlm-steps: {mlm_steps[number]} is named twice")
        if before is not None:
            raise InputError(
                f"--mlm-steps: {mlm_steps[before]} and {mlm_steps[number]} are the same lines, and the network "
                "does not see which half of a row is first; give one of them"
            )
    languages = tuple(monolingual_langs or dict.fromkeys(name for step in steps for name in step))
    check_languages(languages, "--mlm-steps")
    alone = sorted((s for s in steps if len(s) == 1), key=lambda s: languages.index(s[0]))
    return Choice(languages, (*alone, *(s for s in steps if len(s) == 2)))


def _all_languages(folder: Path) -> tuple[str, ...]:
    if languages := languages_in(folder, "train"):
        return languages
    pairs = pairs_in(folder, "train")
    only = (
        f"only pairs; give --mlm-steps {','.join(pairs)}"
        if pairs
        else "and is not what binarize wrote"
    )
    raise InputError(f"{folder}: holds no train.LANG.idx, {only}")


def _parsed(step: str, known: Sequence[str]) -> tuple[str, ...]:
    """A language, or the two of a pair; `known` tells names with a hyphen from pairs."""
    if step in known:
        return (step,)
    splits = [(step[: m.start()], step[m.end() :]) for m in re.finditer("-", step)]
    if not splits and not known:
        return (step,)
    pairs = [s for s in splits if not known or {*s} <= {*known}]
    if not pairs:
        raise InputError(
            f"--mlm-steps {step}: is none of the languages {','.join(known)} and no pair of two of them"
        )
    if len(pairs) > 1:
        raise InputError(
            f"--mlm-steps {step}: can be read as more than one pair; name the languages with --monolingual-langs"
        )
    if pairs[0][0] == pairs[0][1]:
        raise InputError(f"--mlm-steps {step}: a pair is of two languages; for one, give its name")
    return pairs[0]


# ------------------------------------------------------------------------------------------ on disk


def open_streams(
    folder: Path,
    split: str,
    choice: Choice,
    *,
    tokens_per_sample: int,
    break_mode: str,
    vocab_size: int,
    dictionary_sha256: str,
) -> tuple[Stream, ...]:
    """Opens a split of every stream; pairs a line each, whatever the break mode.

    Raises: InputError as open_split, and for a pair whose sides have not as many lines.
    """

    def opened(names: tuple[str, ...]) -> Stream:
        is_pair = len(names) == 2
        if is_pair:
            _check_pair_is_there(folder, split, names)
        sides = open_split(
            folder,
            stored_split(folder, split, names),
            names,
            tokens_per_sample=tokens_per_sample,
            break_mode="eos" if is_pair else break_mode,
            vocab_size=vocab_size,
            dictionary_sha256=dictionary_sha256,
        )
        if is_pair:
            _check_sides(*sides)
        return Stream(languages=choice.ids(names), sides=sides)

    return tuple(opened(names) for names in choice.streams)


def stored_split(folder: Path, split: str, stream: Sequence[str]) -> str:
    """What stands before the language in the names of a stream's files: train, or train.en-de, also for de-en."""
    if len(stream) == 1:
        return split
    first, second = stream
    names = f"{split}.{first}-{second}", f"{split}.{second}-{first}"
    return next((name for name in names if any(folder.glob(f"{name}.*.idx"))), names[0])


def has_split(folder: Path, split: str, stream: Sequence[str]) -> bool:
    there = languages_in(folder, stored_split(folder, split, stream))
    return all(language in there for language in stream)


def pairs_in(folder: Path, split: str) -> tuple[str, ...]:
    """The pairs of which the folder has this split, sorted, each as its files are called."""
    name = re.compile(rf"{re.escape(split)}\.(?!.*-None\.)(?P<pair>[^.]+-[^.]+)\.[^.]+\.idx")
    matches = (name.fullmatch(path.name) for path in folder.glob(f"{split}.*.idx"))
    return tuple(sorted({match["pair"] for match in matches if match}))


def _check_pair_is_there(folder: Path, split: str, names: tuple[str, ...]) -> None:
    """Neither side: with one, open_split names the other."""
    first, second = names
    stored = stored_split(folder, split, names)
    if any(folder.glob(f"{stored}.*.idx")) or any(folder.glob(f"{stored}.*.bin")):
        return
    there = pairs_in(folder, split)
    others = f"of pairs there is {', '.join(there)}" if there else "nor of any other pair"
    raise InputError(
        f"{folder}: there is no {split} text of the pair {first}-{second} ({stored}.{first}.idx), {others}; "
        f"binarize it (--source-lang {first} --target-lang {second}), give another --mlm-steps, or name it in "
        "--monolingual-langs if it is one language"
    )


def _check_sides(first: TokenDataset, second: TokenDataset) -> None:
    if first.tokens_per_sample < SHORTEST_ROW:
        raise InputError(
            f"--tokens-per-sample {first.tokens_per_sample}: a row with two lines needs at least {SHORTEST_ROW}"
        )
    if first.sequences != second.sequences:
        raise InputError(
            f"{first.prefix}.idx has {first.sequences} lines and {second.prefix.name}.idx {second.sequences}, but each "
            "must translate that of the same number; binarize both in one command (--source-lang, --target-lang)"
        )
