"""What prepare has made, and of what: D/prepare.json.

record = open_record(config, sources)            # new, or of a run to go on with
record.begin()                                   # what is stale is removed
if not record.has("codes"):
    …                                            # write record.temporary("codes")
    record.publish("codes", {"merges": 12000})
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from xlm_ds.config import PrepareConfig
from xlm_ds.files import file_sha256, replacing, sync_file
from xlm_ds.log import InputError, logger
from xlm_ds.merges import load_bpe
from xlm_ds.tokenisation import tokenisation_of
from xlm_ds.wiki_dump import parser_version

# Valid is made after test and train after both, as each leaves out the lines of those before it.
SPLITS = ("test", "valid", "train")
RECORD = "prepare.json"
RECORD_FORMAT = 1
TOKENISED = "tokenised"
RAW = "raw"
REASONS = 4  # why a folder is refused: more of them make no sentence

Sources: TypeAlias = Mapping[str, Mapping[str, Path]]
"""The raw files of every language, by split; under `all` if there is one file that is to be split."""


def splits_of(sources: Mapping[str, Path]) -> list[str]:
    """The splits that come of these sources, in the order in which they are made."""
    return [split for split in SPLITS if split in sources or "all" in sources]


def text_names(sources: Sources) -> list[str]:
    return [f"{split}.{lang}" for lang, splits in sources.items() for split in splits_of(splits)]


def file_names(sources: Sources, vocab: Path | None) -> list[str]:
    """The files that are made of these sources and stay, but for the record; tokenised text may be deleted.

    `vocab`: the vocabulary that limits the pieces, if there is one.
    """
    limits = [] if vocab is None else ["bpe_vocab"]
    return ["codes", *limits, "vocab_mlm", *text_names(sources)]


def raw_name(lang: str) -> str:
    """The file of a dump's text."""
    return f"{RAW}/wiki.{lang}"


class Record:
    """D/prepare.json: what D is made from, and its finished files. Saved after every file."""

    def __init__(
        self, folder: Path, content: dict[str, Any], *, stale: Sequence[str], is_saved: bool
    ) -> None:
        """`stale`: what is in the folder, made from something else, and is no longer in `content`."""
        self._folder = folder
        self._content = content
        self._stale = stale
        self._is_saved = is_saved
        self._temporary: set[Path] = set()

    def path(self, name: str) -> Path:
        return self._folder / name

    def temporary(self, name: str) -> Path:
        path = self._folder / f"{name}.partial"
        self._temporary.add(path)
        return path

    def remove_temporary(self) -> None:
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def has(self, *names: str) -> bool:
        return all(name in self._content["files"] and self.path(name).exists() for name in names)

    def begin(self) -> None:
        """Removes what is stale: from here on the folder is this command's."""
        for name in self._stale:
            self.path(name).unlink(missing_ok=True)
        texts = {_text_of(name) for name in self._stale} - self._content["inputs"].keys()
        if gone := sorted({text.partition(".")[0] for text in texts if _is_side(text)}):
            logger.info(
                "removed %s, made otherwise; name it in --pairs to make it again", ", ".join(gone)
            )
        if not self._is_saved:
            self.save()

    def publish(self, name: str, facts: Mapping[str, int] | None = None) -> None:
        """Gives a file its final name. It is recorded before: a file that is not in the record is never one of ours."""
        temporary = self.temporary(name)
        self._content["files"][name] = {
            "bytes": temporary.stat().st_size,
            "sha256": file_sha256(temporary),
            **(facts or {}),
        }
        sync_file(temporary)
        self.save()
        temporary.replace(self.path(name))

    def save(self) -> None:
        text = json.dumps(self._content, indent=1, ensure_ascii=False, sort_keys=True)
        with replacing(self.path(RECORD)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def open_record(config: PrepareConfig, sources: Sources) -> Record:
    """The record of `config.destdir`, new or to go on with; changes nothing yet (Record.begin).

    Raises InputError if a file in it was made by other settings or from other inputs or edited (--overwrite removes
    it), or was not made here at all, or for a pair that is there in the other order.
    """
    folder = config.destdir
    old = _load_record(folder / RECORD)
    new = _describe(config, sources, known=old["inputs"])
    there = _pairs_by_languages(old["inputs"])
    for languages, pair in _pairs_by_languages(sources).items():
        if there.get(languages, pair) != pair:
            raise InputError(
                f"--pairs {pair}: {folder} has {there[languages]}, which is the same; name the files as then"
            )
    earlier = {text: facts for text, facts in old["inputs"].items() if _is_side(text)}
    new["inputs"] = earlier | new["inputs"]  # pairs of other commands stay
    names = [
        *file_names(sources, config.vocab),
        *(f"{TOKENISED}/{text}" for text in text_names(sources)),
    ]
    if config.wiki_dump is not None:
        names += map(raw_name, sources)
    for name in names:
        if name not in old["files"] and (folder / name).exists():
            raise InputError(
                f"{folder / name}: is there but was not made here; move it away or give another --destdir"
            )
    changes = _changes(old, new) if old["files"] else []
    edited = [name for name in old["files"] if _is_edited(folder / name, old["files"][name])]
    stale = _stale(old["files"], changes, edited)
    if stale and not config.overwrite:
        reasons = [*_reasons(old, new), *(f"{name} was edited" for name in edited)]
        more = [f"and {len(reasons) - REASONS} more"] if len(reasons) > REASONS else []
        raise InputError(
            f"{folder}: {stale[0]} was made from something else: {'; '.join([*reasons[:REASONS], *more])}; give the "
            "same as then, or another --destdir, or --overwrite to redo what depends on it"
        )
    new["files"] = {name: facts for name, facts in old["files"].items() if name not in stale}
    read = {*sources, *map(_text_of, new["files"])}
    new["inputs"] = {text: facts for text, facts in new["inputs"].items() if text in read}
    return Record(folder, new, stale=stale, is_saved=new == old)


def _is_side(text: str) -> bool:
    """en-fr.en, which is a side of a pair, and not en."""
    return "." in text


def _pairs_by_languages(texts: Iterable[str]) -> dict[frozenset[str], str]:
    sides: dict[str, set[str]] = {}
    for text in filter(_is_side, texts):
        pair, _, language = text.rpartition(".")
        sides.setdefault(pair, set()).add(language)
    return {frozenset(languages): pair for pair, languages in sides.items()}


def _text_of(name: str) -> str:
    """tokenised/train.en -> en; train.en-fr.en -> en-fr.en."""
    return Path(name).name.partition(".")[2]


def _load_record(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"inputs": {}, "files": {}}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        entries = [*content["files"].values()]
        for splits in content["inputs"].values():
            entries += splits.values()
        if content["format"] != RECORD_FORMAT or any(type(e["bytes"]) is not int for e in entries):
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a record of this prepare; give another --destdir") from error
    return content


def _describe(
    config: PrepareConfig, sources: Sources, *, known: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides the bytes of every file; `known` inputs are not hashed again if they look the same."""
    # What is not installed is said before files are hashed for hours.
    tokenisation = dataclasses.asdict(tokenisation_of(config))
    extraction = {} if config.wiki_dump is None else {"mwparserfromhell": parser_version()}
    inputs = {
        lang: {
            split: _identity(path, known.get(lang, {}).get(split)) for split, path in splits.items()
        }
        for lang, splits in sources.items()
    }
    splitting: dict[str, Any] = {"duplicates": config.duplicates}
    if config.trainpref is None:
        held_out = ("valid_lines", "test_lines", "seed")
        splitting |= {name: getattr(config, name) for name in held_out}
        splitting["split_by"] = config.unit
    if config.codes is not None:
        load_bpe(config.codes, config.vocab)  # refused before hours of tokenising
        codes = {
            "codes": file_sha256(config.codes),
            "vocab": config.vocab and file_sha256(config.vocab),
        }
    else:
        names = ("bpe_codes", "bpe_alpha", "bpe_sample_bytes", "seed")
        codes = {name: getattr(config, name) for name in names}
        codes["tokenizers"] = importlib.metadata.version("tokenizers")
    return {
        "format": RECORD_FORMAT,
        "inputs": inputs,
        "extraction": extraction,
        "tokenisation": tokenisation,
        "splitting": splitting,
        "codes": codes,
        "files": {},
    }


def _identity(path: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    status = path.stat()
    seen = {"path": str(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    if known is not None and seen.items() <= known.items():
        return dict(known)
    return {**seen, "sha256": file_sha256(path)}


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The places in the record of every setting or input that differs."""
    before, now = dict(_flat(old)), dict(_flat(new))
    places = sorted(before.keys() | now.keys())
    return [place for place in places if before.get(place) != now.get(place)]


def _reasons(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs, in the user's words; of what goes with a flag, the flag alone."""
    reasons = [*_other_texts(old["inputs"], new["inputs"]), *_other_settings(old, new)]
    return list(dict.fromkeys(reasons))  # --seed decides two things


def _other_texts(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    languages = [",".join(t for t in sorted(inputs) if not _is_side(t)) for inputs in (before, now)]
    if languages[0] != languages[1]:
        yield f"--langs was {languages[0]}, is now {languages[1]}"
    for text in sorted(before.keys() & now.keys()):
        if ("all" in before[text]) != ("all" in now[text]):
            flags = ["--trainpref", "--input or --wiki-dump"]
            yield "{} is given instead of {}".format(*flags[:: -1 if "all" in now[text] else 1])
            continue
        for split in sorted(before[text].keys() | now[text].keys()):
            was, is_now = before[text].get(split), now[text].get(split)
            if was is None:
                yield f"{is_now['path']} is new"
            elif is_now is None:
                yield f"{was['path']} is not read now"
            elif was["sha256"] != is_now["sha256"]:
                same = was["path"] == is_now["path"]
                yield f"{is_now['path']} {'has changed' if same else 'is not what ' + was['path'] + ' was'}"


def _other_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    flags = {field.name for field in dataclasses.fields(PrepareConfig)}
    before, now = (dict(_flat({**content, "inputs": {}})) for content in (old, new))
    if ("codes.codes" in before) != ("codes.codes" in now):
        yield "--codes is new" if "codes.codes" in now else "--codes is not given now"
    for place in sorted(before.keys() & now.keys()):
        name = place.partition(".")[2]
        shown = f"--{name.replace('_', '-')}" if name in flags else name
        was, is_now = ("not given" if c[place] is None else c[place] for c in (before, now))
        if was != is_now and place in ("codes.codes", "codes.vocab"):
            yield f"{shown} is another file"
        elif was != is_now:
            yield f"{shown} was {was}, is now {is_now}"


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and key != "files":
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in ("files", "path", "mtime_ns"):  # a copy of the same text is the same input
            yield f"{prefix}{key}", value


def _is_edited(path: Path, facts: Mapping[str, Any]) -> bool:
    return path.exists() and path.stat().st_size != facts["bytes"]


def _stale(files: Iterable[str], changes: Iterable[str], edited: Iterable[str]) -> list[str]:
    """The files to be made again: text if what it is made of, or how, changed; others if anything did.

    Of a side of a pair nothing else is made: codes and vocabulary are those of the languages' own text.
    """
    changes, edited = list(changes), list(edited)
    segmenters = "tokenisation.segmenters."
    extraction = any(place.startswith("extraction.") for place in changes)
    all_text = extraction or any(
        place.startswith(("tokenisation.", "splitting.")) and not place.startswith(segmenters)
        for place in changes
    )
    raw = {_changed_text(place) for place in changes if place.startswith("inputs.")}
    raw |= {_made_of(name) for name in edited if name.startswith(RAW)}
    tokenised = raw | {_made_of(name) for name in edited if name.startswith(TOKENISED)}
    segmented = {
        place.removeprefix(segmenters) for place in changes if place.startswith(segmenters)
    }
    not_of_sides = any(not place.startswith("inputs.") for place in changes)
    shared = not_of_sides or not all(map(_is_side, [*tokenised, *map(_text_of, edited)]))

    def is_stale(name: str) -> bool:
        if name.startswith(RAW):
            return extraction or _text_of(name) in raw
        is_other = _made_of(name) in tokenised or _text_of(name).rpartition(".")[2] in segmented
        return is_other or (all_text if name.startswith(TOKENISED) else shared or name in edited)

    return [name for name in files if is_stale(name)]


def _changed_text(place: str) -> str:
    """Of inputs.TEXT.SPLIT.FACT; see _made_of."""
    text, split, _ = place.removeprefix("inputs.").rsplit(".", 2)
    return f"{split}.{text}" if _is_side(text) else text


def _made_of(name: str) -> str:
    """What a text is made of: a language's text, as its splits leave out lines of each other, or a side's split."""
    text = _text_of(name)
    return Path(name).name if _is_side(text) else text
