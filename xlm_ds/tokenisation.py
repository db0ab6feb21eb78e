"""Raw lines to words: what happens to text before BPE, when a model is pretrained and whenever text meets it later.

settings = tokenisation_of(config)                    # recorded in prepare.json, which travels with the model
tokenise_line("Ça va?", "fr", settings)               # 'Ça va ?'
"""

import functools
import importlib.metadata
import unicodedata
from dataclasses import dataclass
from typing import Any

from xlm_ds.config import PrepareConfig

# XLM ran a segmenter of its own for these (tokenize.sh); Moses does not split them into words.
UNSEGMENTED = {"zh": "the Stanford segmenter", "ja": "KyTea", "th": "pythainlp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenisation:
    """All that decides how a line is tokenised; kept with the data and with the model made of it."""

    tokenizer: str
    lowercase: bool
    remove_accents: bool
    sacremoses: str  # versions: the next one may know other abbreviations or characters
    unicode: str


def tokenisation_of(config: PrepareConfig) -> Tokenisation:
    return Tokenisation(
        tokenizer=config.tokenizer,
        lowercase=config.lowercase,
        remove_accents=config.remove_accents,
        sacremoses=installed_sacremoses(),
        unicode=unicodedata.unidata_version,
    )


def installed_sacremoses() -> str:
    return importlib.metadata.version("sacremoses")


def tokenise_line(text: str, language: str, settings: Tokenisation) -> str:
    """One line as the model sees it before BPE: words separated by single blanks, every kind of blank made 0x20.

    Source: tokenize.sh and lowercase_and_remove_accent.py of XLM; Chinese, Japanese and Thai are not segmented.
    """
    if settings.tokenizer == "moses":
        normalizer, tokenizer = _moses(language)
        text = _without_unprintable(normalizer.normalize(text))
        text = tokenizer.tokenize(text, escape=False, return_str=True)
    if settings.lowercase:
        text = text.lower()
    if settings.remove_accents:
        marked = unicodedata.normalize("NFD", text)
        text = "".join(c for c in marked if unicodedata.category(c) != "Mn")
        text = text.lower() if settings.lowercase else text
    return " ".join(text.split())


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
