"""Raw lines to words: what happens to text before BPE, when a model is pretrained and whenever text meets it later.

settings = tokenisation_of(config)                    # recorded in prepare.json, which travels with the model
tokenise_line("Ça va?", "fr", settings)               # 'Ça va ?'

Chinese, Japanese and Thai are written without blanks between words; a library finds them, which is an extra each.
"""

import functools
import importlib.metadata
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from xlm_ds.config import PrepareConfig
from xlm_ds.log import InputError, logger

# What finds words (docs/decisions/0015): extras of the languages' names in pyproject.toml.
PACKAGES = {"zh": ("rjieba",), "ja": ("SudachiPy", "SudachiDict-small"), "th": ("pythainlp",)}

# SudachiPy 0.7.0 takes no more than 49,149 bytes at once; a character has at most 4.
PIECE_CHARACTERS = 10_000

Segment = Callable[[str], Iterable[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenisation:
    """All that decides how a line is tokenised; kept with the data and with the model made of it."""

    tokenizer: str
    lowercase: bool
    remove_accents: bool
    sacremoses: str  # versions: the next one may know other abbreviations or characters
    unicode: str
    segmenters: Mapping[str, str] = field(default_factory=dict)
    """Packages and versions by language; a language that is not there is not segmented."""


def tokenisation_of(config: PrepareConfig) -> Tokenisation:
    """Raises InputError if what finds the words of one of the languages is not installed."""
    segmented = [lang for lang in config.langs if lang in PACKAGES and config.tokenizer == "moses"]
    return Tokenisation(
        tokenizer=config.tokenizer,
        lowercase=config.lowercase,
        remove_accents=config.remove_accents,
        sacremoses=installed_sacremoses(),
        unicode=unicodedata.unidata_version,
        segmenters={lang: _installed(lang) for lang in segmented},
    )


def _installed(language: str) -> str:
    try:
        return ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES[language])
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"{language} is written without blanks, and {error.name}, which finds its words, is not installed; pip "
            f"install 'xlm_ds[{language}]' (or prepare text with blanks between words, with --tokenizer none)"
        ) from error


def installed_sacremoses() -> str:
    return importlib.metadata.version("sacremoses")


def tokenise_line(text: str, language: str, settings: Tokenisation) -> str:
    """One line as the model sees it before BPE: words separated by single blanks, every kind of blank made 0x20.

    Source: tokenize.sh and lowercase_and_remove_accent.py of XLM; its segmenters were others, and it normalised Chinese
    only after finding its words, which puts brackets back to them. Raises InputError if the language's is missing.
    """
    if settings.tokenizer == "moses":
        normalizer, tokenizer = _moses(language)
        text = _without_unprintable(normalizer.normalize(text))
        if language in settings.segmenters:
            text = " ".join(segmenter(language, settings.segmenters[language])(text))
        else:
            text = tokenizer.tokenize(text, escape=False, return_str=True)
    if settings.lowercase:
        text = text.lower()
    if settings.remove_accents:
        marked = unicodedata.normalize("NFD", text)
        text = "".join(c for c in marked if unicodedata.category(c) != "Mn")
        text = text.lower() if settings.lowercase else text
    return " ".join(text.split())


@functools.cache
def segmenter(language: str, recorded: str) -> Segment:
    """Finds the words of a text; says, once, if it is not what the text of the record was segmented with.

    Raises InputError if it is not installed.
    """
    installed = _installed(language)
    if installed != recorded:
        logger.warning(
            f"{language}: words are found by {installed}, and were by {recorded} before; some may differ"
        )
    return {"zh": _chinese, "ja": _japanese, "th": _thai}[language]()


def _chinese() -> Segment:
    import rjieba

    cut: Segment = rjieba.cut
    return cut


def _japanese() -> Segment:
    from sudachipy import Dictionary, SplitMode

    # Short units of the small dictionary, which are UniDic's, as KyTea's are that XLM ran.
    tokenizer = Dictionary(dict="small").tokenizer(mode=SplitMode.A)
    return lambda text: (
        word.surface() for piece in _pieces(text) for word in tokenizer.tokenize(piece)
    )


def _thai() -> Segment:
    os.environ.setdefault("PYTHAINLP_READ_ONLY", "1")  # or it makes a folder in the user's home
    from pythainlp.tokenize import word_tokenize

    return lambda text: word_tokenize(text, engine="newmm", keep_whitespace=False)


def _pieces(text: str) -> Iterator[str]:
    """Cut at blanks, where there are any."""
    while len(text) > PIECE_CHARACTERS:
        blank = text.rfind(" ", 1, PIECE_CHARACTERS)
        end = blank if blank > 0 else PIECE_CHARACTERS
        yield text[:end]
        text = text[end:]
    yield text


@functools.cache
def _moses(language: str) -> tuple[Any, Any]:
    from sacremoses import MosesPunctNormalizer, MosesTokenizer

    normalizer = MosesPunctNormalizer(lang=language, pre_replace_unicode_punct=True)
    return normalizer, MosesTokenizer(lang=language)


def _without_unprintable(text: str) -> str:
    """Category C becomes a blank, as in Moses's remove-non-printing-char.perl; sacremoses would join the parts."""
    if text.isprintable():  # most lines
        return text
    return "".join(" " if unicodedata.category(c).startswith("C") else c for c in text)
