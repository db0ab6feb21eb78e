"""Pairs on disk, as the tools for them see them: opened with what lies beside them, written whole or not at all.

source = open_source(Path("OUT/train.en"), None)
with new_pairs([Path("NEW/train.en")], source.dictionary, Path("OUT"), overwrite=False) as (new,):
    writer = new.writer(source.pair.kind, source.pair.dtype, len(source.dictionary))
    …
    new.finish(writer, source.dictionary, unknown=None, more={})
"""

import contextlib
import json
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
from xlm_ds.files import locked, naming, save_array, sync_file
from xlm_ds.log import InputError
from xlm_ds.pair_record import COMPANIONS, KINDS, Counts, describe, write_record
from xlm_ds.ranks import Ranks, interruptible

Result = TypeVar("Result")

# Of a record; what else is in one is kept in the made_from of what is made of its pair.
PAIR_FIELDS = {
    **{"language": str, "split": str, "lines": int, "tokens": int, "unknown": int, "blank": int},
    **{"literal_specials": int, "unigram_entropy_bits": float, "dictionary_sha256": str},
    "sha256": dict,
}


# ------------------------------------------------------------------------------------ pairs on disk


class Source(NamedTuple):
    """A pair that is there, with its dictionary and, if it has one, its record."""

    prefix: Path
    pair: _core.Pair
    dictionary: Dictionary
    dictionary_path: Path
    record: dict[str, Any] | None


def open_source(prefix: Path, dictionary_path: Path | None) -> Source:
    """Raises InputError if it is no pair, has no dictionary, or was made with another one; OSError."""
    pair = _core.Pair(prefix)
    path = dictionary_path or find_dictionary(prefix)
    dictionary = load_dictionary(path)
    record = load_record(prefix)
    if record is not None and record["dictionary_sha256"] != dictionary.sha256:
        raise InputError(
            f"{prefix}: was made with the dictionary of SHA-256 {record['dictionary_sha256']}, but {path} has "
            f"{dictionary.sha256}; give the one it was made with (--dict)"
        )
    return Source(prefix, pair, dictionary, path, record)


def beside(prefix: Path, kind: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{kind}")


def split_and_language(prefix: Path) -> tuple[str, str]:
    """Of SPLIT.LG, or of fairseq's SPLIT.LG-None.LG."""
    match = re.fullmatch(r"(?P<split>[^.]+)\.(?P<lang>[^.]+?)(-None\.(?P=lang))?", prefix.name)
    if match is None:
        raise InputError(f"{prefix}: a pair's name is SPLIT.LANG, as train.en")
    return match["split"], match["lang"]


def find_pairs(paths: Sequence[Path]) -> list[Path]:
    """The pairs named, also as .idx or .bin, and those in the folders named, sorted within each."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            names = {p.with_suffix("") for p in path.iterdir() if p.suffix in (".idx", ".bin")}
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
    return path.with_suffix("") if path.suffix in (".idx", ".bin") else path


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


def load_record(prefix: Path) -> dict[str, Any] | None:
    path = beside(prefix, "json")
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        wrong = [name for name, kind in PAIR_FIELDS.items() if type(record[name]) is not kind]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the record of a binarized file; binarize again") from error
    if wrong:
        raise InputError(f"{path}: {wrong[0]} is {record[wrong[0]]!r:.60}; binarize again")
    return dict(record)


# ------------------------------------------------------------------------------------ writing pairs


class NewPair:
    """A pair that is being written, under temporary names."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.final = {kind: beside(prefix, kind) for kind in KINDS}
        self.temporary = {kind: p.with_name(f".{p.name}.tmp") for kind, p in self.final.items()}
        self.lengths = prefix.with_name(f".{prefix.name}.lengths.tmp")

    def writer(
        self, kind: _core.IndexKind, dtype: _core.Dtype, vocab_size: int
    ) -> _core.PairWriter:
        return _core.PairWriter(self.temporary["bin"], self.lengths, kind, dtype, vocab_size)

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
        counts = writer.finish(self.temporary["idx"])
        self.lengths.unlink()
        save_array(self.temporary["counts.npy"], counts.by_id)
        if unknown is None:
            unknown = counts.unknown
        literal = counts.literal_specials + counts.unknown - unknown
        figures = Counts(counts.lines, counts.tokens, unknown, counts.blank_lines, literal)
        split, language = split_and_language(self.prefix)
        record = describe(split, language, figures, counts.by_id, dictionary, self.temporary)
        write_record(self.temporary["json"], {**record, **more})
        return counts


@contextmanager
def new_pairs(
    prefixes: Sequence[Path], dictionary: Dictionary, companions: Path, *, overwrite: bool
) -> Iterator[list[NewPair]]:
    """Pairs of one folder to be filled and described; they get their final names if nothing is raised.

    A folder without a dict.txt gets the dictionary, and what lies beside it in the folder `companions`.
    Raises: InputError if a pair is there already, or being made, or another dictionary, or a further shard of the last.
    """
    first = prefixes[0]
    folder = first.parent
    pairs = [NewPair(prefix) for prefix in prefixes]
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"{first}: another program is making this pair; wait for it, or give another name"
    try:
        with locked(beside(first.with_name(f".{first.name}"), "lock"), busy):  # binarize's too
            try:
                _check_room(pairs, overwrite)
                _check_dictionary(folder, dictionary)
                yield pairs
                with locked(folder / ".dict.txt.lock"):
                    _check_dictionary(folder, dictionary)
                    _publish(pairs, dictionary, companions)
            finally:
                for pair in pairs:
                    for path in (*pair.temporary.values(), pair.lengths):
                        path.unlink(missing_ok=True)
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _publish(pairs: Sequence[NewPair], dictionary: Dictionary, companions: Path) -> None:
    """Gives all files their names, or none."""
    folder = pairs[0].prefix.parent
    names = {p.temporary[kind]: p.final[kind] for kind in KINDS for p in pairs}
    shared = {name: folder / f".{name}.tmp" for name in (*COMPANIONS, "dict.txt")}
    published: list[Path] = []
    try:
        if not (folder / "dict.txt").exists():
            with naming(shared["dict.txt"]):
                dictionary.save(shared["dict.txt"])
            names = {shared["dict.txt"]: folder / "dict.txt", **names}
            for name in COMPANIONS:
                if (companions / name).is_file() and not (folder / name).exists():
                    with naming(shared[name]):
                        shutil.copyfile(companions / name, shared[name])
                    names = {shared[name]: folder / name, **names}
        for path in names:
            sync_file(path)
        for pair in pairs:  # an .idx says that its pair is whole: an old one goes first
            pair.final["idx"].unlink(missing_ok=True)
        for temporary, final in names.items():
            if temporary == pairs[0].temporary["idx"]:
                sync_file(folder)  # or a loss of power could undo the other names only
            temporary.replace(final)
            published.append(final)
        sync_file(folder)
    except BaseException:
        for path in published:
            path.unlink()
        raise
    finally:
        for path in shared.values():
            path.unlink(missing_ok=True)


def _check_room(pairs: Sequence[NewPair], overwrite: bool) -> None:
    for pair in pairs:
        split_and_language(pair.prefix)
        for path in pair.final.values():
            if path.exists() and not overwrite:
                raise InputError(f"{path}: is there already; give another name, or --overwrite")
    first = pairs[0].prefix
    further = beside(first.with_name(f"{first.name}{len(pairs)}"), "idx")
    if further.exists():
        raise InputError(
            f"{further}: would be read as one more shard of {first.name}; move it away"
        )


def _check_dictionary(folder: Path, dictionary: Dictionary) -> None:
    there = folder / "dict.txt"
    if there.exists() and load_dictionary(there).sha256 != dictionary.sha256:
        raise InputError(f"{there}: another dictionary is there already; write to another folder")


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
