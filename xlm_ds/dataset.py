"""Binarized text on disk, seen as blocks: what binarize wrote, or fairseq-preprocess.

    datasets = open_split(Path("OUT"), "train", ["ar", "de"], tokens_per_sample=256, break_mode="none",
                          vocab_size=len(dictionary), dictionary_sha256=dictionary.sha256)
    datasets[0].blocks, datasets[0].block(7)

The pair is SPLIT.LG.{bin,idx}, or under fairseq-preprocess's name SPLIT.LG-None.LG.{bin,idx}. Beside it may stand
SPLIT.LG.json and SPLIT.LG.counts.npy (docs/formats.md). Opening is O(1) whatever the size, except in break modes
complete and complete_doc, which walk over all lines and keep 8 bytes a block.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xlm_ds import _core
from xlm_ds.files import load_counts
from xlm_ds.log import InputError
from xlm_ds.pair_record import beside, load_record, place_of

_BREAK_MODES = {
    "none": _core.BreakMode.none,
    "eos": _core.BreakMode.eos,
    "complete": _core.BreakMode.complete,
    "complete_doc": _core.BreakMode.complete_doc,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDataset:
    """One language of one split, memory-mapped and cut into blocks of at most tokens_per_sample - 1 tokens."""

    language: str
    split: str
    prefix: Path
    tokens_per_sample: int
    vocab_size: int
    core: _core.TokenDataset

    @property
    def blocks(self) -> int:
        return self.core.blocks

    @property
    def sequences(self) -> int:
        return self.core.sequences

    @property
    def tokens(self) -> int:
        return self.core.tokens

    def block(self, number: int) -> NDArray[np.int64]:
        """The block's ids, without the eos that a sample begins with."""
        ids = np.empty(self.core.block_size, np.int64)
        return ids[: self.core.fill_block(number, vocab_size=self.vocab_size, out=ids)]

    def count_cut(self) -> int:
        """Lines that lose tokens because they are longer than a block (0 in break mode none). O(lines)."""
        return self.core.count_cut()

    def counts(self) -> NDArray[np.uint64]:
        """How often each id occurs, (V,): read from SPLIT.LG.counts.npy, or counted in O(tokens) where it is missing.

        Raises: InputError if the counts are not of this .bin, or it has an id beyond the dictionary.
        """
        path = beside(self.prefix, "counts.npy")
        if not path.exists():
            return _core.Pair(self.prefix).count_ids(self.vocab_size, _core.Progress())
        counts = load_counts(path, self.vocab_size)
        if int(counts.sum()) != self.tokens:
            raise InputError(
                f"{path}: counts {int(counts.sum())} tokens, but the .bin beside it has {self.tokens}; "
                "delete it and binarize again"
            )
        return counts


def open_split(
    folder: Path,
    split: str,
    languages: Sequence[str],
    *,
    tokens_per_sample: int,
    break_mode: str,
    vocab_size: int,
    dictionary_sha256: str,
) -> tuple[TokenDataset, ...]:
    """Opens a split of every language, in the order given: the language ids.

    Raises: InputError for a language that is missing or has no blocks, a pair that is damaged or not binarized text,
    or one made with another dictionary than that of `dictionary_sha256` (recorded in SPLIT.LG.json).
    """
    datasets = []
    for language in languages:
        prefix = _find_pair(folder, split, language)
        core = _core.TokenDataset(
            prefix, mode=_BREAK_MODES[break_mode], block_size=tokens_per_sample - 1
        )
        if core.tokens == 0:
            raise InputError(
                f"{prefix}.bin: holds no tokens; binarize some text of {language}, or leave {language} out"
            )
        if core.blocks == 0:
            raise InputError(
                f"{prefix}.bin: has no block in break mode {break_mode}, which leaves out lines of one token, "
                f"and there are no others; use another break mode, or leave {language} out"
            )
        _check_record(prefix, split, language, core.tokens, dictionary_sha256)
        datasets.append(
            TokenDataset(
                language=language,
                split=split,
                prefix=prefix,
                tokens_per_sample=tokens_per_sample,
                vocab_size=vocab_size,
                core=core,
            )
        )
    return tuple(datasets)


def languages_in(folder: Path, split: str) -> tuple[str, ...]:
    """The languages of which the folder has this split, sorted."""
    _check_folder(folder)
    name = re.compile(rf"{re.escape(split)}\.(?P<language>[^.]+?)(-None\.(?P=language))?\.idx")
    matches = (name.fullmatch(path.name) for path in folder.iterdir())
    return tuple(sorted({match["language"] for match in matches if match}))


def dictionary_path(folder: Path, languages: Sequence[str]) -> Path:
    """dict.txt, or fairseq's dict.LG.txt if it is the same for every language.

    Raises: InputError if there is neither, or the languages' dictionaries differ.
    """
    _check_folder(folder)
    joint = folder / "dict.txt"
    if joint.exists():
        return joint
    paths = [folder / f"dict.{language}.txt" for language in languages]
    missing = [path.name for path in paths if not path.exists()]
    if missing or not paths:
        wanted = f", nor {missing[0]}" if missing else ""
        raise InputError(
            f"{folder}: there is no dict.txt{wanted}; give the folder that binarize wrote"
        )
    for path in paths[1:]:
        if path.read_bytes() != paths[0].read_bytes():
            raise InputError(
                f"{path}: differs from {paths[0].name}; all languages need one dictionary: binarize with one --srcdict"
            )
    return paths[0]


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: there is no such folder; give the one binarize wrote (--destdir)"
        )


def _find_pair(folder: Path, split: str, language: str) -> Path:
    _check_folder(folder)
    prefixes = [folder / f"{split}.{language}", folder / f"{split}.{language}-None.{language}"]
    for prefix in prefixes:
        has_index, has_data = (beside(prefix, kind).exists() for kind in ("idx", "bin"))
        if has_index and has_data:
            return prefix
        if has_index or has_data:
            found, lost = (".idx", ".bin") if has_index else (".bin", ".idx")
            raise InputError(
                f"{prefix}{found}: the {lost} that belongs to it is missing; binarize again, or, if an xlm-ds shards "
                "command was killed here, give it again"
            )
    there = ", ".join(languages_in(folder, split))
    raise InputError(
        f"{prefixes[0]}.idx: there is no such file; "
        + (
            f"{split} is there for {there}"
            if there
            else f"nothing of {split} is there for any language; binarize it"
        )
    )


def _check_record(
    prefix: Path, split: str, language: str, tokens: int, dictionary_sha256: str
) -> None:
    """Compares what binarize wrote down about a pair, if it did, with what is there."""
    record = load_record(prefix)
    if record is None:
        return
    path = beside(prefix, "json")
    named = f"{record['split']}.{record['language']}"
    _, shards = place_of(record)
    if shards != 1:
        raise InputError(
            f"{path}: the pair is one of {shards} shards of {named}, and the others would be left out; join them with "
            "xlm-ds shards merge"
        )
    if named != f"{split}.{language}":
        raise InputError(
            f"{path}: was written for {named}, so the files beside it are not {split}.{language}; "
            "delete it and binarize again"
        )
    if record["dictionary_sha256"] != dictionary_sha256:
        raise InputError(
            f"{path}: the file was made with the dictionary of SHA-256 {record['dictionary_sha256']:.64}, but the one "
            f"given has {dictionary_sha256}; give the dictionary it was made with, or binarize again"
        )
    if record["tokens"] != tokens:
        raise InputError(
            f"{path}: says {record['tokens']} tokens, but the .bin beside it has {tokens}; delete it and binarize again"
        )
