"""What stands beside a .bin/.idx pair: its record SPLIT.LG.json, its counts, and what its folder shares.

record = describe("train", "en", counts, by_id, dictionary, files)      # what is in it
write_record(files["json"], {**record, "made_from": made_from})         # and what it was made from
is_made_from(OUT / "train.en", made_from)                               # whether it need not be made again
load_record(OUT / "train.en")                                           # for those who read it
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from xlm_ds.dictionary import Dictionary
from xlm_ds.files import copy_file, file_sha256, locked, naming, replacing
from xlm_ds.log import InputError

# What new text needs to become ids, as prepare or --bpe-codes left it: it travels with the data.
COMPANIONS = ("codes", "bpe_vocab", "prepare.json")
KINDS = ("bin", "counts.npy", "json", "idx")  # of a pair's files, in the order of their renaming

# Of every record; what else is in one is kept in the made_from of what is made of its pair.
PAIR_FIELDS: dict[str, type] = {
    **{"language": str, "split": str, "lines": int, "tokens": int, "unknown": int, "blank": int},
    **{"literal_specials": int, "unigram_entropy_bits": float, "dictionary_sha256": str},
    "sha256": dict,
}

CountsById: TypeAlias = NDArray[np.uint64]  # (V,)


def beside(prefix: Path, kind: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{kind}")


class Counts(NamedTuple):
    """What a text contains (_core.TextCounts), or a rank's part of it."""

    lines: int
    tokens: int
    unknown: int
    blank_lines: int
    literal_specials: int


def load_companions(folder: Path) -> dict[str, bytes]:
    """Those of COMPANIONS that are in `folder`, by their names. Raises OSError."""
    paths = (folder / name for name in COMPANIONS)
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def describe(
    split: str,
    language: str,
    counts: Counts,
    by_id: CountsById,
    dictionary: Dictionary,
    files: Mapping[str, Path],
) -> dict[str, Any]:
    """The record of a pair but for what it was made from. `files`, by kind, are written, all but the record itself."""
    return {
        "language": language,
        "split": split,
        "lines": counts.lines,
        "tokens": counts.tokens,
        "unknown": counts.unknown,
        "blank": counts.blank_lines,
        "literal_specials": counts.literal_specials,
        "unigram_entropy_bits": entropy_bits(by_id),
        "dictionary_sha256": dictionary.sha256,
        "sha256": {kind: file_sha256(files[kind]) for kind in ("bin", "idx")},
        "bytes": _sizes(files),
    }


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    with naming(path):
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_record(prefix: Path) -> dict[str, Any] | None:
    """What PREFIX.json says, None without one. Raises InputError if it is none; OSError."""
    path = beside(prefix, "json")
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        fields: dict[str, Any] = {name: record[name] for name in PAIR_FIELDS}
        fields["shard"], fields["shards"] = place_of(record)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: not the record of a binarized file; delete it and binarize again"
        ) from error
    for name, value in fields.items():
        kind = PAIR_FIELDS.get(name, int)
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 1 << 63):
            raise InputError(f"{path}: {name} is {value!r:.60}; delete it and binarize again")
    if fields["shard"] >= fields["shards"]:
        raise InputError(
            f"{path}: is of shard {fields['shard']} of {fields['shards']}, which start at 0; reshard again"
        )
    return dict(record)


def place_of(record: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """Which of how many shards a pair is, by its record: 0 of 1 if it is a whole text, or has no record."""
    return (0, 1) if record is None else (record.get("shard", 0), record.get("shards", 1))


def is_made_from(pair: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether the pair is there, whole, and was made from this."""
    try:
        record = json.loads(Path(f"{pair}.json").read_bytes())
        sizes = _sizes({kind: Path(f"{pair}.{kind}") for kind in KINDS})
    except (FileNotFoundError, ValueError, RecursionError):  # too deep to be one of ours
        return False
    return (
        isinstance(record, dict)
        and record.get("made_from") == made_from
        and record.get("bytes") == sizes
    )


@contextmanager
def sharing_dictionary(
    folder: Path,
    dictionary: Dictionary,
    companions: Path,
    names: Sequence[str] = COMPANIONS,
) -> Iterator[None]:
    """While it lasts no other run writes what the pairs of `folder` share; what was written goes if anything is raised.

    A folder without a dict.txt gets the dictionary, and of `names` what it lacks and the folder `companions` has.
    Raises: InputError if another dictionary is there; OSError.
    """
    with locked(folder / ".dict.txt.lock"), ExitStack() as undo:
        check_dictionary(folder, dictionary)
        path = folder / "dict.txt"
        if not path.exists():
            for name in names:
                source, target = companions / name, folder / name
                if source.is_file() and not target.exists():
                    undo.callback(target.unlink, missing_ok=True)
                    copy_file(source, target)
            undo.callback(path.unlink, missing_ok=True)
            with replacing(path) as temporary:  # last, as without it the others are looked for
                dictionary.save(temporary)
        yield
        undo.pop_all()


def check_dictionary(folder: Path, dictionary: Dictionary) -> None:
    """Raises InputError if `folder` has another: its pairs would mean other words."""
    path = folder / "dict.txt"
    if path.exists() and Dictionary.load(path).sha256 != dictionary.sha256:
        raise InputError(
            f"{path}: another dictionary is there already; write to an empty folder, or binarize with this one "
            f"(--srcdict {path})"
        )


def _sizes(files: Mapping[str, Path]) -> dict[str, int]:
    return {kind: files[kind].stat().st_size for kind in KINDS if kind != "json"}


def entropy_bits(counts: CountsById) -> float:
    """Entropy of the unigram distribution, eos included; 0 of an empty text."""
    seen = counts[counts > 0].astype(np.float64)
    total = float(seen.sum())
    return float(math.log2(total) - (seen * np.log2(seen)).sum() / total) if total else 0.0
