"""Labelled texts for classification: one text each, or two, by split and language.

    files = find_labelled(DATA)
    files.languages("test")                     # those that have such texts
    files.read("train", "en")                   # Labelled: path, [Example(label, texts, line), …]

Three layouts are known, by the names of their files:

    {train,valid,test}.LANG.tsv                 label<TAB>text[<TAB>text], no header
    xnli.dev.tsv, xnli.test.tsv, multinli.train.LANG.tsv    XNLI 1.0 and XNLI-MT 1.0, or their folders as unpacked
    {train,valid,test}.{s1,s2,label}.LANG       a line each; XLM's get-data-xnli.sh has them so (s2 only for pairs)
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from xlm_ds.files import read_lines
from xlm_ds.log import InputError

SPLITS = ("train", "valid", "test")
PAIR = 2
XNLI_SPLITS = {"valid": "xnli.dev.tsv", "test": "xnli.test.tsv"}
XNLI_FOLDERS = ("", "XNLI-1.0", "XNLI-MT-1.0/multinli", "multinli")  # as its zip files unpack
# multinli.train.LANG.tsv has another word than xnli.dev.tsv (XLM's get-data-xnli.sh replaces it too).
XNLI_LABELS = {"contradictory": "contradiction"}


class Example(NamedTuple):
    label: str
    texts: tuple[str, ...]  # one or two
    line: int  # of its file, from 1


class Labelled(NamedTuple):
    """The examples of a split in a language, at least one."""

    path: Path
    examples: list[Example]


class LabelledFiles(NamedTuple):
    """A folder's layout."""

    description: str
    languages: Callable[[str], tuple[str, ...]]  # of a split
    name_of: Callable[[str, str], str]  # what the file of a split and a language is called
    read: Callable[[str, str], Labelled]


def find_labelled(folder: Path) -> LabelledFiles:
    """The layout of a folder. Raises InputError if there is no training file of any."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}; give the folder with the labelled texts")
    layouts = [_tsv(folder), _xnli(folder), _columns(folder)]
    there = [layout for layout in layouts if layout.languages("train")]
    if len(there) > 1:
        raise InputError(
            f"{folder}: has {' and '.join(layout.description for layout in there)}; give a folder with one of them"
        )
    if there:
        return there[0]
    raise InputError(
        f"{folder}: has no labelled texts to train on: neither train.LANG.tsv, nor multinli.train.LANG.tsv, nor "
        "train.s1.LANG with train.label.LANG"
    )


# ------------------------------------------------------------------------------------------- layouts


def _tsv(folder: Path) -> LabelledFiles:
    def languages(split: str) -> tuple[str, ...]:
        return _between(folder, f"{split}.", ".tsv")

    def name_of(split: str, language: str) -> str:
        return f"{split}.{language}.tsv"

    def read(split: str, language: str) -> Labelled:
        path = folder / name_of(split, language)
        return _checked(path, _tsv_examples(path))

    return LabelledFiles("label<TAB>text[<TAB>text] of each language", languages, name_of, read)


def _tsv_examples(path: Path) -> Iterator[Example]:
    for line, text in _numbered(path):
        _refuse_blank(path, line, text)
        label, *texts = text.split("\t")
        if not 1 <= len(texts) <= PAIR:
            raise InputError(
                f"{path}:{line}: has {_counted(len(texts) + 1, 'column')}; expected label<TAB>text, or "
                "label<TAB>text<TAB>text"
            )
        yield Example(label.strip(), tuple(texts), line)


def _xnli(folder: Path) -> LabelledFiles:
    def find(name: str) -> Path | None:
        paths = (folder / inner / name for inner in XNLI_FOLDERS)
        return next((path for path in paths if path.exists()), None)

    def languages(split: str) -> tuple[str, ...]:
        if split == "train":
            found = (_between(folder / i, "multinli.train.", ".tsv") for i in XNLI_FOLDERS)
            return next((names for names in found if names), ())
        return tuple(sorted(of_all_languages(split)))

    def name_of(split: str, language: str) -> str:
        return XNLI_SPLITS.get(split, f"multinli.train.{language}.tsv")

    @functools.cache
    def of_all_languages(split: str) -> dict[str, list[Example]]:
        """Of a split that is one file, which is read once for all."""
        found: dict[str, list[Example]] = {}
        if path := find(XNLI_SPLITS[split]):
            columns = ("language", "gold_label", "sentence1", "sentence2")
            for line, (language, label, first, second) in _table(path, columns):
                found.setdefault(language, []).append(Example(label, (first, second), line))
        return found

    def read(split: str, language: str) -> Labelled:
        name = name_of(split, language)
        path = find(name) or folder / name
        if split != "train":
            examples = iter(of_all_languages(split).get(language, []))
            return _checked(path, examples, f"has no line of language {language}")
        rows = _table(path, ("label", "premise", "hypo"))
        return _checked(
            path,
            (
                Example(XNLI_LABELS.get(label, label), (first, second), line)
                for line, (label, first, second) in rows
            ),
        )

    return LabelledFiles("XNLI's files", languages, name_of, read)


def _columns(folder: Path) -> LabelledFiles:
    def languages(split: str) -> tuple[str, ...]:
        return _between(folder, f"{split}.label.", "")

    def read(split: str, language: str) -> Labelled:
        paths = [folder / f"{split}.{column}.{language}" for column in ("label", "s1", "s2")]
        if not paths[2].exists():
            paths.pop()
        labels, *texts = ([text for _, text in _numbered(path)] for path in paths)
        for path, column in zip(paths, (labels, *texts), strict=True):
            for line, text in enumerate(column, start=1):
                _refuse_blank(path, line, text, " of all files")
        for path, column in zip(paths[1:], texts, strict=True):
            if len(column) != len(labels):
                raise InputError(
                    f"{path}: has {_counted(len(column), 'line')}, but {paths[0]} has {len(labels)}; give files that "
                    "are aligned"
                )
        rows = enumerate(zip(*texts, strict=True), start=1)
        examples = (Example(labels[line - 1].strip(), parts, line) for line, parts in rows)
        return _checked(paths[0], examples)

    def name_of(split: str, language: str) -> str:
        return f"{split}.label.{language}"

    return LabelledFiles("texts and labels in files of their own", languages, name_of, read)


# --------------------------------------------------------------------------------------------- files


def _between(folder: Path, start: str, end: str) -> tuple[str, ...]:
    """What stands for LANG in the names of the folder's files."""
    names = (path.name for path in folder.glob(f"{start}*{end}"))
    found = (name[len(start) : len(name) - len(end)] for name in names)
    return tuple(sorted(language for language in found if language and "." not in language))


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    line = 0
    for lines in read_lines(path):
        for text in lines:
            line += 1
            if "\0" in text:
                raise InputError(
                    f"{path}:{line}: has a zero byte, so it is no text in UTF-8; convert the file (iconv -f UTF-16 -t "
                    "UTF-8, if that is what it is)"
                )
            yield line, text.rstrip("\n")


def _refuse_blank(path: Path, line: int, text: str, where: str = "") -> None:
    if text.strip():
        return
    if not any(text.strip() for _, text in _numbered(path)):
        raise InputError(f"{path}: holds empty lines only")
    raise InputError(f"{path}:{line}: is an empty line; take it out{where}")


def _table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Of each line after the header its number and these columns. Quotes mean nothing."""
    rows = ((line, text.split("\t")) for line, text in _numbered(path))
    _, header = next(rows, (1, [""]))
    missing = [name for name in columns if name not in header]
    if missing:
        raise InputError(
            f"{path}:1: the header has no {', '.join(missing)}; give the file as XNLI has it"
        )
    places = [header.index(name) for name in columns]
    for line, row in rows:
        _refuse_blank(path, line, "\t".join(row))
        if len(row) != len(header):
            raise InputError(
                f"{path}:{line}: has {_counted(len(row), 'column')}, but the header {len(header)}"
            )
        yield line, tuple(row[place] for place in places)


def _checked(path: Path, examples: Iterator[Example], empty: str = "is empty") -> Labelled:
    found: list[Example] = []
    for example in examples:
        if not example.label:
            raise InputError(f"{path}:{example.line}: has no label")
        if not all(text.strip() for text in example.texts):
            raise InputError(f"{path}:{example.line}: a text is empty; take the line out")
        if found and len(example.texts) != len(found[0].texts):
            raise InputError(
                f"{path}:{example.line}: has {_texts(example)}, but line {found[0].line} has {_texts(found[0])}"
            )
        found.append(example)
    if not found:
        raise InputError(f"{path}: {empty}")
    return Labelled(path, found)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def _texts(example: Example) -> str:
    return "one text" if len(example.texts) == 1 else "two texts"
