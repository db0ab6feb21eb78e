"""Pairs on disk, as the tools for them see them: opened with what lies beside them, written whole or not at all.

source = find_source(Path("OUT/train.en"), None)
with new_pairs([Path("NEW/train.en")], source.dictionary, Path("OUT"), overwrite=False) as (new,):
    writer = new.writer(_core.IndexKind.mmap, _core.Dtype.uint16, len(source.dictionary))
    …
    new.finish(writer, source.dictionary, unknown=None, more={})
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from xlm_ds import _core
from xlm_ds.dictionary import Dictionary
from xlm_ds.files import locked, make_folder, replacing, save_array, sync_file
from xlm_ds.log import InputError
from xlm_ds.pair_record import (
    KINDS,
    Counts,
    beside,
    check_dictionary,
    describe,
    load_record,
    sharing_dictionary,
    write_record,
)
from xlm_ds.ranks import Ranks, interruptible

Result = TypeVar("Result")

SUFFIXES = ("idx", "bin")

# In the folder in which pairs are written: the names they get, in this order; the files that had these names before.
JOURNAL, OLD = "names", "old"

# ------------------------------------------------------------------------------------ pairs on disk


class Source(NamedTuple):
    """A pair that is there, with its dictionary and, if it has one, its record."""

    prefix: Path
    dictionary: Dictionary
    dictionary_path: Path
    record: dict[str, Any] | None

    def open(self) -> _core.Pair:
        """Of many sources only some at a time: each takes an open file."""
        return _core.Pair(self.prefix)


def find_source(prefix: Path, dictionary_path: Path | None) -> Source:
    """Raises InputError if it is no pair, or not the one recorded, or has no dictionary, or another one; OSError.

    If a command that was to replace it was killed on the way, it is put back before.
    """
    if (_staging(prefix) / JOURNAL).exists():
        with _alone_at(prefix):
            _clear(_staging(prefix), killed=True)
    pair = _core.Pair(prefix)
    record = load_record(prefix)
    for name, value in (("lines", pair.lines), ("tokens", pair.tokens)):
        if record is not None and record[name] != value:
            raise InputError(
                f"{beside(prefix, 'json')}: says {name} {record[name]}, but it is {value}; delete it and binarize again"
            )
    path, dictionary = dictionary_of(prefix, record, dictionary_path)
    return Source(prefix, dictionary, path, record)


def dictionary_of(
    prefix: Path, record: Mapping[str, Any] | None, given: Path | None
) -> tuple[Path, Dictionary]:
    """The one given, or the one beside the pair. Raises InputError if there is none, or the record says another."""
    path = given or find_dictionary(prefix)
    dictionary = load_dictionary(path)
    if record is not None and record["dictionary_sha256"] != dictionary.sha256:
        raise InputError(
            f"{prefix}: was made with the dictionary of SHA-256 {record['dictionary_sha256']:.64}, but {path} has "
            f"{dictionary.sha256}; give the one it was made with (--dict)"
        )
    return path, dictionary


def split_and_language(prefix: Path) -> tuple[str, str]:
    """Of SPLIT.LG, of SPLIT.LG-OTHER.LG (parallel text), or of fairseq's SPLIT.LG-None.LG."""
    split = r"[\w-]+(\.(?!.*-None\.)[\w-]+-[\w-]+)?"
    name = rf"(?!dict\.)(?P<split>{split})\.(?P<lang>[\w-]+?)(-None\.(?P=lang))?"  # dict.en.txt is fairseq's
    match = re.fullmatch(name, prefix.name, re.ASCII)
    if match is None or match["lang"] in SUFFIXES:
        raise InputError(
            f"{prefix}: a pair's name is SPLIT.LANG, as train.en, without .bin or .idx"
        )
    return match["split"], match["lang"]


def find_pairs(paths: Sequence[Path]) -> list[Path]:
    """The pairs named, also as .idx or .bin, and those in the folders named, sorted within each."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            names = {p.with_suffix("") for p in path.iterdir() if p.suffix[1:] in SUFFIXES}
            pairs = sorted(name for name in names if not name.name.startswith("."))
            if not pairs:
                raise InputError(f"{path}: there is no .bin/.idx pair in this folder")
            found += pairs
        else:
            found.append(without_suffix(path))
    if not found:
        raise InputError("no pair is named; give PATH/SPLIT.LANG or a folder")
    return found


def without_suffix(path: Path) -> Path:
    """A pair that may be named by one of its files. Raises InputError for a folder."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a pair in it, PATH/SPLIT.LANG")
    return path.with_suffix("") if path.suffix[1:] in SUFFIXES else path


def find_dictionary(prefix: Path) -> Path:
    names = ["dict.txt"]
    with contextlib.suppress(InputError):  # a name without a language can still have a dict.txt
        names.append(f"dict.{split_and_language(prefix)[1]}.txt")
    for name in names:
        if prefix.with_name(name).is_file():
            return prefix.with_name(name)
    raise InputError(f"{prefix.parent}: there is no {' and no '.join(names)}; give --dict")


def load_dictionary(path: Path) -> Dictionary:
    """The same object for the pairs of one folder."""
    status = path.stat()
    return _load_dictionary(path, status.st_size, status.st_mtime_ns)


@cache
def _load_dictionary(path: Path, _size: int, _mtime_ns: int) -> Dictionary:
    return Dictionary.load(path)


# ------------------------------------------------------------------------------------ writing pairs


class NewPair:
    """A pair that is being written, under its own names in another folder."""

    def __init__(self, prefix: Path, staging: Path) -> None:
        self.prefix = prefix
        self._files = {kind: beside(staging / prefix.name, kind) for kind in KINDS}
        self._lengths = beside(staging / prefix.name, "lengths")

    def writer(
        self, kind: _core.IndexKind, dtype: _core.Dtype, vocab_size: int
    ) -> _core.PairWriter:
        return _core.PairWriter(self._files["bin"], self._lengths, kind, dtype, vocab_size)

    def finish(
        self,
        writer: _core.PairWriter,
        dictionary: Dictionary,
        *,
        unknown: int | None,
        more: Mapping[str, Any],
    ) -> _core.TextCounts:
        """Writes the .idx, the counts and the record, which also gets the fields `more`.

        `unknown`: how many unknown words there are, if known; a literal <unk> has their id.
        """
        counts = writer.finish(self._files["idx"])
        self._lengths.unlink()
        save_array(self._files["counts.npy"], counts.by_id)
        if unknown is None:
            unknown = counts.unknown
        if not 0 <= unknown <= counts.unknown:
            raise InputError(
                f"{self.prefix}: not written: what it is made from says that {unknown} words are unknown, but its "
                f"lines have {counts.unknown} <unk>; one of the two is damaged"
            )
        literal = counts.literal_specials + counts.unknown - unknown
        figures = Counts(counts.lines, counts.tokens, unknown, counts.blank_lines, literal)
        split, language = split_and_language(self.prefix)
        record = describe(split, language, figures, counts.by_id, dictionary, self._files)
        write_record(self._files["json"], {**record, **more})
        return counts


@contextmanager
def new_pairs(
    prefixes: Sequence[Path], dictionary: Dictionary, companions: Path, *, overwrite: bool
) -> Iterator[list[NewPair]]:
    """Pairs of one folder to be filled and described; they get their final names if nothing is raised.

    A folder without a dict.txt gets the dictionary, and what lies beside it in the folder `companions`. What a killed
    run has left of the first pair and its shards is undone before.
    Raises: InputError if a pair is there already, or being made, or another dictionary, or a further shard of the last.
    """
    first = prefixes[0]
    folder = first.parent
    for prefix in prefixes:
        split_and_language(prefix)
    is_new = not folder.exists()
    make_folder(folder)
    staging = _staging(first)
    try:
        with _alone_at(first):
            _clear(staging, killed=True)
            try:
                _check_room(prefixes, overwrite)
                check_dictionary(folder, dictionary)
                staging.mkdir()
                yield [NewPair(prefix, staging) for prefix in prefixes]
                with sharing_dictionary(folder, dictionary, companions):
                    _publish(prefixes, staging)
            finally:
                _clear(staging, killed=False)
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _staging(first: Path) -> Path:
    return first.with_name(f".{first.name}.new")


def _alone_at(first: Path) -> contextlib.AbstractContextManager[int]:
    busy = f"{first}: another program is making this pair; wait for it, or give another name"
    return locked(first.with_name(f".{first.name}.lock"), busy)  # binarize's too


def _publish(prefixes: Sequence[Path], staging: Path) -> None:
    """Moves all files from `staging` to the folder it is in. _clear undoes it where it fails or is killed.

    Readers find a pair by its .idx, and shards by that of the first: it is the first to go and the last to come.
    """
    folder = staging.parent
    *others, indexes = [[beside(p, kind).name for p in reversed(prefixes)] for kind in KINDS]
    contents = [name for kind in others for name in kind]
    names = [*contents, *indexes]
    for name in names:
        sync_file(staging / name)
    _write_journal(staging, names)
    there = [name for name in reversed(names) if (folder / name).exists()]
    for group in (there[:1], there[1:]):
        _move(group, folder, staging / OLD)
    for group in (contents, indexes[:-1], indexes[-1:]):
        _move(group, staging, folder)
    (staging / JOURNAL).unlink()


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    """Returns when a loss of power would not undo it."""
    for name in names:
        (source / name).replace(target / name)
    sync_file(target)


def _write_journal(staging: Path, names: Sequence[str]) -> None:
    (staging / OLD).mkdir()
    with replacing(staging / JOURNAL) as temporary:
        temporary.write_bytes(os.fsencode("\0".join(names)))
    sync_file(staging)


def _clear(staging: Path, *, killed: bool) -> None:
    """Removes the folder of a run that has ended, and undoes what it moved if it did not come to the end.

    If the last of its names is there, one that was `killed` had come to the end, or another program has made the pair.
    """
    journal = staging / JOURNAL
    if journal.exists():
        names = os.fsdecode(journal.read_bytes()).split("\0")
        if not (killed and (staging.parent / names[-1]).exists()):
            _undo(staging, names)
        journal.unlink()
    if staging.exists():
        shutil.rmtree(staging)


def _undo(staging: Path, names: Sequence[str]) -> None:
    """What was moved goes back, then what was there before comes back; if this is stopped, it can be done again."""
    folder, old = staging.parent, staging / OLD
    moved = [n for n in names if not (staging / n).exists() and (folder / n).exists()]
    try:
        _move(reversed(moved), folder, staging)
        _move([n for n in names if (old / n).exists()], old, folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{folder / names[-1]}: was not replaced, and what was there before could not be put back "
            f"({error.strerror}); it is in {old}, and the next command with this pair puts it back",
        ) from error


def _check_room(prefixes: Sequence[Path], overwrite: bool) -> None:
    for path in (beside(prefix, kind) for prefix in prefixes for kind in KINDS):
        if not overwrite and path.exists():
            raise InputError(f"{path}: is there already; give another name, or --overwrite")
    first = prefixes[0]
    further = beside(first.with_name(f"{first.name}{len(prefixes)}"), "idx")
    if further.exists():
        raise InputError(
            f"{further}: would be read as one more shard of {first.name}; move it away"
        )


@contextmanager
def progress_bar(total_bytes: int) -> Iterator["tqdm[None]"]:
    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        yield bar


def run_core(call: Callable[[_core.Progress], Result], bar: "tqdm[None]") -> Result:
    """The core's `call`, so that Ctrl-C ends it at once and the bar moves."""
    progress = _core.Progress()
    with interruptible(progress, Ranks(), bar) as run:
        return run(lambda: call(progress))


def bin_bytes(prefixes: Iterable[Path]) -> int:
    return sum(beside(prefix, "bin").stat().st_size for prefix in prefixes)
