"""Which texts binarize is asked for, and how their bytes are divided among ranks.

texts = texts_of(config)                 # one for every .bin/.idx pair
shares = divide(texts, ranks=4)
shares[2]                                # {number in texts: the stretches of its files that rank 2 reads}
"""

from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple, TypeAlias

from xlm_ds import _core
from xlm_ds.config import BinarizeConfig, check_languages
from xlm_ds.files import compressed_text
from xlm_ds.log import InputError

BLOCK_BYTES = 1 << 16


class Input(NamedTuple):
    """A file as it was when the run began."""

    path: Path
    size: int  # bytes
    mtime_ns: int


STANDARD_INPUT = Input(Path(_core.STANDARD_INPUT), 0, 0)


class Text(NamedTuple):
    """What becomes one .bin/.idx pair: files that are read one after another, or standard input."""

    split: str  # train, or of parallel text train.en-fr
    language: str
    inputs: tuple[Input, ...]
    translation: "Text | None" = None  # the other side of parallel text
    side: int = 0  # 1: the second of parallel text

    @property
    def pair(self) -> str:
        return f"{self.split}.{self.language}"

    @property
    def size(self) -> int:
        return sum(file.size for file in self.inputs)

    @property
    def is_standard_input(self) -> bool:
        return self.inputs == (STANDARD_INPUT,)

    def __str__(self) -> str:
        if self.is_standard_input:
            return "standard input"
        return ",".join(str(file.path) for file in self.inputs)


class Stretch(NamedTuple):
    """Bytes [begin, end) of a file; both are where the file begins or ends, or right after a line feed."""

    path: Path
    begin: int
    end: int


Share: TypeAlias = dict[int, list[Stretch]]


# ------------------------------------------------------------------------------- what is asked for


def texts_of(config: BinarizeConfig) -> list[Text]:
    """The texts, language by language. Raises InputError if a file is missing or what is asked for cannot be done."""
    if bool(config.langs) == bool(config.source_lang):
        raise InputError("give --langs ar,de,… (all languages at once) or --source-lang LG (one)")
    languages = config.langs or (str(config.source_lang),)
    if config.target_lang is not None:
        languages = (*languages, config.target_lang)
    check_languages(languages, "--langs" if config.langs else "--source-lang, --target-lang")
    given = {"train": config.trainpref, "valid": config.validpref, "test": config.testpref}
    prefs = {split: pref.split(",") for split, pref in given.items() if pref is not None}
    if not prefs:
        raise InputError("nothing to binarize: give --trainpref, --validpref or --testpref")
    for split, names in prefs.items():
        if "" in names:
            raise InputError(f"--{split}pref {given[split]}: there is a prefix without a character")
    _check_standard_input(prefs, languages, config)
    if config.target_lang is not None:
        return _parallel_texts(prefs, config)
    texts = []
    for language in languages:
        for split, names in prefs.items():
            _check_commas(given[split], split, language)
            inputs = [_input(name, split, language) for name in names]
            if split == "train":
                texts.append(Text(split, language, tuple(inputs)))
            else:  # valid, valid1, valid2, … as fairseq
                texts += [
                    Text(f"{split}{number or ''}", language, (file,))
                    for number, file in enumerate(inputs)
                ]
    return texts


def _parallel_texts(prefs: dict[str, list[str]], config: BinarizeConfig) -> list[Text]:
    """Both sides of each split, one after the other. Raises InputError as texts_of."""
    if config.langs or config.only_source:
        flag = "--langs" if config.langs else "--only-source"
        raise InputError(
            f"--target-lang is for parallel text, --source-lang one side and --target-lang the other; leave out {flag}"
        )
    if len(prefs.get("train", "")) > 1:
        raise InputError(
            f"--trainpref {config.trainpref}: several files of parallel text are not joined, as one that has lost a "
            "line would shift all after it; join them (cat) where you know that they are whole"
        )
    languages = (str(config.source_lang), str(config.target_lang))
    texts = []
    for split, names in prefs.items():
        for number, name in enumerate(names):
            _check_meant(name, split, languages)
            named = f"{split}{number or ''}.{'-'.join(languages)}"
            first, second = (
                Text(named, language, (_input(name, split, language),), side=side)
                for side, language in enumerate(languages)
            )
            texts += [first._replace(translation=second), second._replace(translation=first)]
    return texts


def _check_meant(name: str, split: str, languages: tuple[str, str]) -> None:
    """Of what prepare makes, D/train.fr is text of one language, which no line of D/train.en translates."""
    for first, second in (languages, languages[::-1]):
        meant = f"{name}.{first}-{second}"
        if Path(f"{meant}.{first}").exists():
            raise InputError(
                f"--{split}pref {name}: {meant}.{first} is there, which is parallel text by its name; give "
                f"--{split}pref {meant}"
            )
        stem = name.removesuffix(f".{second}-{first}")
        swapped = f"{stem}.{first}-{second}"
        given, other = (Path(f"{prefix}.{first}") for prefix in (name, swapped))
        if stem != name and other.exists() and not given.exists():
            raise InputError(f"{given}: not found, but {other} is; give --{split}pref {swapped}")


def _input(pref: str, split: str, language: str) -> Input:
    if pref == _core.STANDARD_INPUT:
        return STANDARD_INPUT
    path = Path(f"{pref}.{language}")
    if not path.is_file():
        what = "not a file" if path.exists() else "not found"
        sides = f"{path}.{language.partition('-')[0]}"
        hint = f"; {sides} is there: parallel text needs --source-lang and --target-lang"
        raise InputError(
            f"{path}: {what}, although --{split}pref and language {language} ask for it"
            + (hint if Path(sides).exists() else "")
        )
    with path.open("rb") as file:
        if compressed := compressed_text(path, file.read(8)):
            raise InputError(compressed)
    status = path.stat()
    return Input(path, status.st_size, status.st_mtime_ns)


def _check_commas(pref: str | None, split: str, language: str) -> None:
    path = Path(f"{pref}.{language}")
    if pref is not None and "," in pref and path.is_file():
        raise InputError(
            f"{path}: there is a file of this name, but a comma in --{split}pref separates several; rename the file"
        )


def _check_standard_input(
    prefs: dict[str, list[str]], languages: tuple[str, ...], config: BinarizeConfig
) -> None:
    names = [name for split in prefs.values() for name in split]
    if _core.STANDARD_INPUT not in names:
        return
    if names.count(_core.STANDARD_INPUT) > 1 or any(
        _core.STANDARD_INPUT in split and len(split) > 1 for split in prefs.values()
    ):
        raise InputError(
            "- (standard input) can be read once: give it as all there is of one split"
        )
    if len(languages) > 1:
        raise InputError(
            f"- is standard input, which is text in one language, but {len(languages)} are asked for; "
            "give --source-lang LG"
        )
    if config.srcdict is None:
        raise InputError(
            "- is standard input, which cannot be read a second time to build a dictionary; give --srcdict"
        )


# ------------------------------------------------------------------------------- who reads what


def divide(texts: list[Text], ranks: int) -> list[Share]:
    """By rank, what it reads of which text: together everything once, in the order of the ranks.

    All texts one after another are cut into shares of nearly equal bytes, each cut moved to the next place right after
    a line feed (a lone CR is within a word for fastBPE), or to the file's end. Of a text without a byte, one rank has
    no stretch.
    """
    total = sum(text.size for text in texts)
    places = [total * rank // ranks for rank in range(ranks + 1)]
    shares: list[Share] = [{} for _ in range(ranks)]
    first_bytes = accumulate((file.size for text in texts for file in text.inputs), initial=0)
    for number, text in enumerate(texts):
        for file in text.inputs:
            before = next(first_bytes)
            cuts = _cuts(file, [place - before for place in places])
            for share, (begin, end) in zip(shares, pairwise(cuts), strict=True):
                if begin < end:
                    share.setdefault(number, []).append(Stretch(file.path, begin, end))
        if text.size == 0:
            shares[number % ranks][number] = []
    return shares


def _cuts(file: Input, wanted: list[int]) -> list[int]:
    """For every wanted place, which may be outside the file, the first place from there on where it can be cut."""
    cuts = [0]
    for place in wanted[1:]:
        # A long line is looked through once, not once for every place within it.
        cuts.append(cuts[-1] if place <= cuts[-1] else _line_begin(file, place))
    return cuts


def _line_begin(file: Input, place: int) -> int:
    if place >= file.size:
        return file.size
    with file.path.open("rb") as content:
        content.seek(place - 1)
        while block := content.read(BLOCK_BYTES):
            found = block.find(b"\n")
            if found >= 0:
                return min(content.tell() - len(block) + found + 1, file.size)
    return file.size
