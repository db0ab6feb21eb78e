"""Raw text -> D/{train,valid,test}.LANG (tokenised, BPE'd), D/codes, D/vocab_mlm.

    python -m xlm_ds.prepare --input raw/{lang}.txt --langs ar,de,en --destdir D --bpe-codes 12000
    python -m xlm_ds.prepare --wiki-dump {lang}wiki-latest-pages-articles.xml.bz2 --langs hi,th --destdir D
    python -m xlm_ds.binarize --langs ar,de,en --srcdict D/vocab_mlm --only-source \
        --trainpref D/train --validpref D/valid --testpref D/test --destdir OUT

Aligned text of two languages (--parallel, --pairs) goes the same way, line by line; also later, into the same folder.

The text before BPE stays in D/tokenised, that of dumps before both, a paragraph a line and a blank line after each
article, in D/raw. D/prepare.json says what everything was made from and counts the lines: of `lines` read, `kept` are
written, `blank` had no text, `duplicate` were also in another split. The same command run again goes on where it was
stopped; nothing has a final name before it is complete.
"""

import array
import contextlib
import functools
import hashlib
import heapq
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from tqdm import tqdm

from xlm_ds import _core
from xlm_ds.alignment import check_as_many_lines
from xlm_ds.config import PrepareConfig, check_languages
from xlm_ds.files import busy_with, compressed_text, locked, make_folder, naming, read_lines
from xlm_ds.flags import parse
from xlm_ds.log import EXIT_OK, InputError, logger, run_stage
from xlm_ds.merges import count_merges, learn_merges, load_bpe, sample_copies
from xlm_ds.prepare_record import (
    RAW,
    SPLITS,
    TOKENISED,
    Record,
    Sources,
    file_names,
    open_record,
    raw_name,
    splits_of,
    text_names,
)
from xlm_ds.tokenisation import Tokenisation, tokenisation_of, tokenise_line
from xlm_ds.wiki_dump import chunks_of_articles, read_pages, read_wiki, texts_of_articles

HELD_OUT_LINES = 5000  # per split and language: get-data-wiki.sh of XLM
HELD_OUT_SHARE = 20  # of a small corpus, at most one line in this many
CHUNKS_AHEAD = 4  # per process: read but not yet written, so that memory is bounded

_BLANK_BUT_SPACE = re.compile(r"[^\S ]")

Made = TypeVar("Made")


class InOrder(Protocol):
    """Work on chunks, in so many processes, with results in the chunks' order."""

    def __call__(
        self, work: Callable[[list[str]], Made], chunks: Iterable[list[str]], /
    ) -> Iterator[Made]: ...


def main(argv: Sequence[str]) -> int:
    try:
        prepare(parse(PrepareConfig, argv, description=__doc__.partition("\n")[0]))
    except KeyboardInterrupt:
        logger.info("stopped; the same command goes on with what is missing")
        raise
    return EXIT_OK


def prepare(config: PrepareConfig) -> None:
    """Makes what is missing in `config.destdir`.

    Raises InputError for bad text, flags that do not go together, or a folder that holds other things.
    """
    sources = _sources(config)
    make_folder(config.destdir / TOKENISED)
    if config.wiki_dump is not None:
        make_folder(config.destdir / RAW)
    with locked(config.destdir / ".prepare.lock", busy_with(config.destdir, "prepare")):
        _check_dumps(sources, config)
        record = open_record(config, sources)
        _check_pairs(record, sources, config)
        record.begin()
        if record.has(*file_names(sources, config.vocab)):
            logger.info("%s: everything is there already; nothing to do", config.destdir)
            return
        try:
            _make(record, sources, config)
        finally:
            record.remove_temporary()  # a full disk is not to stay full of what is no use


def _make(record: Record, sources: Sources, config: PrepareConfig) -> None:
    workers = config.workers or len(os.sched_getaffinity(0))
    with _workers(workers) as in_order:
        for lang, splits in sources.items():
            _tokenise_language(record, lang, splits, config, in_order)
    _make_codes(record, config, sorted(config.langs))
    _keep_vocabulary(record, config.vocab)
    _apply_codes(record, text_names(sources), config.vocab, workers)
    _make_vocabulary(
        record, config.vocab, [f"train.{lang}" for lang in sorted(config.langs)], workers
    )
    logger.info(
        "%s is ready; binarize it with --srcdict %s", config.destdir, record.path("vocab_mlm")
    )


# ------------------------------------------------------------------------------------- what is read


def _sources(config: PrepareConfig) -> dict[str, dict[str, Path]]:
    """The raw files of every language, by split; under `all` if there is one file that is to be split."""
    languages = sorted(config.langs)
    check_languages(languages, "--langs")
    if not languages:
        raise InputError("--langs is empty; expected languages, as ar,de,en")
    prefs = {"train": config.trainpref, "valid": config.validpref, "test": config.testpref}
    given = {split: pref for split, pref in prefs.items() if pref is not None}
    whole = {"--input": config.input, "--wiki-dump": config.wiki_dump}
    to_split = {flag: pref for flag, pref in whole.items() if pref is not None}
    if len(to_split) + (config.trainpref is not None) != 1:
        raise InputError(
            "expected either --input or --wiki-dump (text to be split) or --trainpref, --validpref, --testpref"
        )
    for flag, pref in to_split.items():
        if given:
            raise InputError(f"--{next(iter(given))}pref does not go with {flag}; give one of them")
        given = {"all": pref}
    if not to_split and (config.valid_lines or config.test_lines or config.split_by):
        raise InputError(
            "--split-by, --valid-lines and --test-lines go with --input and --wiki-dump only"
        )
    if config.wiki_dump is not None and "{lang}" not in config.wiki_dump and len(languages) > 1:
        raise InputError(
            f"--wiki-dump {config.wiki_dump}: one file for {len(languages)} languages; put {{lang}} where their names "
            "differ, as in {lang}wiki-latest-pages-articles.xml.bz2"
        )
    if config.vocab is not None and config.codes is None:
        raise InputError(
            "--vocab goes with --codes: a vocabulary fits the codes it was counted with"
        )
    suffix = "" if config.wiki_dump is not None else ".{lang}"
    sources = {
        lang: {split: _path(pref, lang, suffix) for split, pref in given.items()}
        for lang in languages
    }
    sources |= _parallel_sources(config)
    for path in itertools.chain.from_iterable(splits.values() for splits in sources.values()):
        if not path.is_file():
            what = "not a file" if path.exists() else "no such file"
            stem = path.with_suffix("")
            hint = f" ({stem} is there: put {{lang}} where the names of the files differ)"
            raise InputError(
                f"{path}: {what}; every language needs its raw text"
                + (hint if stem.is_file() else "")
            )
        with path.open("rb") as file:
            compressed = compressed_text(path, file.read(8))
        if compressed and config.wiki_dump is None:
            raise InputError(compressed)
    return sources


def _parallel_sources(config: PrepareConfig) -> dict[str, dict[str, Path]]:
    """By side: of en-fr, `en-fr.en` and `en-fr.fr`. Valid and test only where a side of them is there."""
    if (config.parallel is None) != (not config.pairs):
        raise InputError(
            "--parallel and --pairs go together: where aligned text is, and of which languages"
        )
    if config.parallel is None:
        return {}
    if "{split}" not in config.parallel:
        raise InputError(
            f"--parallel {config.parallel}: no {{split}} in it; give para/{{split}} for para/train.en-fr.en"
        )
    sources: dict[str, dict[str, Path]] = {}
    named: dict[frozenset[str], str] = {}
    for pair in config.pairs:
        both = itertools.permutations(config.langs, 2)
        languages = next((two for two in both if "-".join(two) == pair), None)
        if languages is None:
            raise InputError(
                f"--pairs {pair}: not two of --langs {','.join(config.langs)}, as en-fr"
            )
        if (other := named.setdefault(frozenset(languages), pair)) != pair:
            raise InputError(f"--pairs: {other} and {pair} are the same pair; give one of them")
        if config.pairs.count(pair) > 1:
            raise InputError(f"--pairs: {pair} is named twice")
        for split in SPLITS:
            prefix = config.parallel.replace("{split}", split)
            sides = {f"{pair}.{lang}": Path(f"{prefix}.{pair}.{lang}") for lang in languages}
            if split == "train" or any(path.exists() for path in sides.values()):
                _check_sides(pair, prefix, *sides.values())
                for side, path in sides.items():
                    sources.setdefault(side, {})[split] = path
    return sources


def _check_sides(pair: str, prefix: str, *sides: Path) -> None:
    missing = next((path for path in sides if not path.exists()), None)
    if missing is None:
        return
    there = next((path for path in sides if path.exists()), None)
    if there is not None:
        raise InputError(f"{missing}: no such file, but {there} is there; a pair needs both sides")
    first, second = (path.suffix for path in sides)
    swapped = f"{second}-{first}".replace(".", "")
    if Path(f"{prefix}.{swapped}{first}").exists():
        raise InputError(
            f"--pairs {pair}: {missing} is not there, but {prefix}.{swapped}{first} is; give --pairs {swapped}"
        )
    raise InputError(f"{missing}: no such file; --parallel and --pairs {pair} ask for it")


def _check_dumps(sources: Sources, config: PrepareConfig) -> None:
    """Refuses what is no dump before gigabytes of the others are read, be it for their SHA-256; says if one seems to be
    another language's.
    """
    if config.wiki_dump is not None:
        for lang in config.langs:
            if not (config.destdir / raw_name(lang)).exists():
                dump = sources[lang]["all"]
                language = read_wiki(dump).language
                if language is not None and _first_subtag(language) != _first_subtag(lang):
                    logger.warning(
                        f"{dump}: says that its language is {language}, and is read as {lang}; stop this if it is the "
                        "wrong file"
                    )


def _first_subtag(language: str) -> str:
    return re.split("[-_]", language.lower())[0]


def _check_pairs(record: Record, sources: Sources, config: PrepareConfig) -> None:
    """Refuses sides of different numbers of lines before hours of work, and before anything is removed."""
    for pair in config.pairs:
        first, second = (side for side in sources if side.startswith(f"{pair}."))
        for split, path in sources[first].items():
            if not record.has(*(f"{TOKENISED}/{split}.{side}" for side in (first, second))):
                check_as_many_lines(path, sources[second][split])


def _path(pref: str, lang: str, suffix: str) -> Path:
    return Path((pref if "{lang}" in pref else pref + suffix).replace("{lang}", lang))


def _extract(record: Record, lang: str, dump: Path, in_order: InOrder) -> Path:
    """The text of a dump's articles."""
    name = raw_name(lang)
    if record.has(name):
        logger.info("%s: there already", name)
        return record.path(name)
    counts = dict.fromkeys(("pages", "articles", "empty", "lines"), 0)
    work = functools.partial(texts_of_articles, unshown=read_wiki(dump).unshown)
    temporary = record.temporary(name)
    with temporary.open("wb") as file:
        for texts in in_order(work, chunks_of_articles(read_pages(dump), counts)):
            for lines in texts:
                counts["lines"] += len(lines)
                counts["empty"] += not lines
                with naming(temporary):
                    file.writelines(f"{line}\n".encode() for line in [*lines, ""] if lines)
    if counts["lines"] == 0:
        raise InputError(f"{dump}: no article with text: {_shown(counts)}")
    record.publish(name, counts)
    logger.info("%s: %s", name, _shown(counts))
    return record.path(name)


# --------------------------------------------------------------------------------------- splitting


class HeldOut(NamedTuple):
    """The units (lines or documents, numbered without blank lines) that do not go to train."""

    valid: frozenset[int]
    test: frozenset[int]

    def split_of(self, unit: int) -> str:
        return "test" if unit in self.test else "valid" if unit in self.valid else "train"


def _units(chunks: Iterable[list[str]], split_by: str) -> Iterator[list[tuple[int, str]]]:
    """Every line with the number of its line or document; a blank line has that of the text before it."""
    unit, starts = -1, True
    for lines in chunks:
        numbered = []
        for line in lines:
            blank = not line or line.isspace()
            unit += not blank and (starts or split_by == "line")
            starts = blank
            numbered.append((unit, line))
        yield numbered


def choose_held_out(
    unit_lines: Sequence[int], valid_lines: int, test_lines: int, *, seed: str
) -> HeldOut:
    """Takes units in the order of a permutation until valid, and then test, has at least its number of lines.

    `unit_lines`: lines of each unit. The permutation orders units by Python's random() after seeding with `seed`, a
    sequence that the language promises never to change.
    Raises InputError if nothing would be left for train.
    """
    generator = random.Random(seed)
    keys = ((generator.random(), unit) for unit in range(len(unit_lines)))
    order = iter(heapq.nsmallest(valid_lines + test_lines, keys))
    valid, test = (_take(order, unit_lines, lines) for lines in (valid_lines, test_lines))
    if not unit_lines:
        raise InputError("there is no line with text in it")
    if len(valid) + len(test) >= len(unit_lines):
        raise InputError(
            f"{len(unit_lines)} lines or documents with text, {valid_lines} lines wanted for valid and "
            f"{test_lines} for test: nothing is left for train; lower --valid-lines and --test-lines"
        )
    return HeldOut(valid, test)


def _take(
    order: Iterator[tuple[float, int]], unit_lines: Sequence[int], lines: int
) -> frozenset[int]:
    units: list[int] = []
    while lines > 0 and (unit := next(order, None)) is not None:
        units.append(unit[1])
        lines -= unit_lines[unit[1]]
    return frozenset(units)


def _held_out(path: Path, lang: str, config: PrepareConfig) -> HeldOut:
    unit_lines = array.array("I")  # 4 bytes per line of text is all that is held in memory
    for numbered in _units(read_lines(path), config.unit):
        for unit, line in numbered:
            if not line.isspace():
                unit_lines.extend([0] * (unit + 1 - len(unit_lines)))
                unit_lines[unit] += 1
    default = min(HELD_OUT_LINES, max(1, sum(unit_lines) // HELD_OUT_SHARE))
    valid, test = config.valid_lines or default, config.test_lines or default
    try:
        return choose_held_out(unit_lines, valid, test, seed=f"{config.seed} {lang}")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _lines_of(path: Path, split: str, held_out: HeldOut, split_by: str) -> Iterator[list[str]]:
    for numbered in _units(read_lines(path), split_by):
        yield [line for unit, line in numbered if held_out.split_of(unit) == split]


# -------------------------------------------------------------------------------------- tokenising


class TokenisedChunk(NamedTuple):
    lines: list[str]
    normalised_blanks: int


def tokenise_chunk(lines: list[str], language: str, settings: Tokenisation) -> TokenisedChunk:
    lines = [line.removesuffix("\n") for line in lines]
    blanks = sum(len(_BLANK_BUT_SPACE.findall(line)) for line in lines)
    return TokenisedChunk([tokenise_line(line, language, settings) for line in lines], blanks)


@contextlib.contextmanager
def _workers(count: int) -> Iterator[InOrder]:
    """A map() that runs in `count` processes; they start when there is work, and end with this one however it ends."""
    if count == 1:
        yield _one_by_one
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker) as pool:
        yield functools.partial(_in_order, pool, CHUNKS_AHEAD * count)


def _start_worker() -> None:
    # Ctrl-C reaches all processes; the first one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _one_by_one(
    work: Callable[[list[str]], Made], chunks: Iterable[list[str]], /
) -> Iterator[Made]:
    return map(work, chunks)


def _in_order(
    pool: ProcessPoolExecutor,
    ahead: int,
    work: Callable[[list[str]], Made],
    chunks: Iterable[list[str]],
) -> Iterator[Made]:
    """`work` on every chunk, results in the chunks' order, at most `ahead` of them in memory."""
    pending: deque[Future[Made]] = deque()
    for chunk in chunks:
        pending.append(pool.submit(work, chunk))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _tokenise_language(
    record: Record,
    lang: str,
    sources: Mapping[str, Path],
    config: PrepareConfig,
    in_order: InOrder,
) -> None:
    """`lang`: a language, or a side of a pair, whose lines all stay where they are."""
    language, aligned = lang.rpartition(".")[2], "." in lang
    tokenised = {split: f"{TOKENISED}/{split}.{lang}" for split in splits_of(sources)}
    made_of_it = [f"{split}.{lang}" for split in tokenised]
    if record.has(*tokenised.values()) or record.has("codes", *made_of_it):
        logger.info("%s: tokenised already", lang)
        return
    if config.wiki_dump is not None and not aligned:
        sources = {"all": _extract(record, lang, sources["all"], in_order)}
    work = functools.partial(tokenise_chunk, language=language, settings=tokenisation_of(config))
    held_out = _held_out(sources["all"], lang, config) if "all" in sources else None
    made: list[Path] = []
    for split, name in tokenised.items():
        if not record.has(name):
            path = sources.get(split) or sources["all"]
            lines = _lines_of(path, split, held_out, config.unit) if held_out else read_lines(path)
            chunks = in_order(work, lines)
            if aligned:
                counts = _write_all(record.temporary(name), chunks)
            else:
                elsewhere = _digests(made) if config.duplicates == "remove" else frozenset()
                counts = _write_kept(record.temporary(name), chunks, elsewhere, config.unit)
            if counts["kept"] == 0:
                raise InputError(f"{path}: no line of text for {split}.{lang}: {_shown(counts)}")
            record.publish(name, counts)
            logger.info("%s: %s", name, _shown(counts))
        made.append(record.path(name))


def _write_kept(
    path: Path, chunks: Iterable[TokenisedChunk], elsewhere: frozenset[bytes], unit: str
) -> dict[str, int]:
    """Writes the lines that have text and are not `elsewhere`; returns counts: lines = kept + blank + duplicate.

    Documents are written with an empty line between them, by which complete_doc knows them (docs/formats.md).
    """
    counts = dict.fromkeys(("lines", "kept", "blank", "duplicate", "normalised_blanks"), 0)
    documents, begins = 0, True
    with naming(path), path.open("wb") as file:
        for chunk in chunks:
            counts["lines"] += len(chunk.lines)
            counts["normalised_blanks"] += chunk.normalised_blanks
            for text in chunk.lines:
                line = text.encode() + b"\n"
                if not text:
                    counts["blank"] += 1
                    begins = True
                elif elsewhere and _digest(line) in elsewhere:
                    counts["duplicate"] += 1
                else:
                    if begins and documents and unit == "document":
                        file.write(b"\n")
                    documents += begins
                    begins = False
                    counts["kept"] += 1
                    file.write(line)
    return counts | ({"documents": documents} if unit == "document" else {})


def _write_all(path: Path, chunks: Iterable[TokenisedChunk]) -> dict[str, int]:
    """Writes every line, also one without text: binarize says which have no translation."""
    counts = dict.fromkeys(("lines", "kept", "blank", "normalised_blanks"), 0)
    with naming(path), path.open("wb") as file:
        for chunk in chunks:
            counts["lines"] += len(chunk.lines)
            counts["kept"] += sum(map(bool, chunk.lines))
            counts["normalised_blanks"] += chunk.normalised_blanks
            file.writelines(text.encode() + b"\n" for text in chunk.lines)
    counts["blank"] = counts["lines"] - counts["kept"]
    return counts


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=16).digest()


def _digests(paths: Iterable[Path]) -> frozenset[bytes]:
    digests: set[bytes] = set()
    for path in paths:
        with path.open("rb") as file:
            digests.update(map(_digest, file))
    return frozenset(digests)


def _shown(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items())


# ------------------------------------------------------------------------------------------- codes


def _make_codes(record: Record, config: PrepareConfig, languages: Sequence[str]) -> None:
    if record.has("codes"):
        logger.info("codes: there already")
        return
    if config.codes is not None:
        with naming(record.temporary("codes")):
            shutil.copyfile(config.codes, record.temporary("codes"))
        record.publish("codes", {"merges": _count_lines(config.codes)})
        return
    sample = record.temporary("codes.sample")
    texts = {lang: record.path(f"{TOKENISED}/train.{lang}") for lang in languages}
    _write_sample(sample, texts, config)
    logger.info("codes: learning %d merges on %d bytes", config.bpe_codes, sample.stat().st_size)
    merges = learn_merges(sample, config.bpe_codes)
    if not merges:
        raise InputError(
            "no pair of characters is twice in the training text; there are no codes to learn"
        )
    if len(merges) < config.bpe_codes:
        logger.info("codes: only %d merges, as no other pair is there twice", len(merges))
    _write_codes(record, merges, [0] * len(merges))
    counts = count_merges(
        record.temporary("codes"), sample, merges, scratch=record.temporary("codes")
    )
    _write_codes(record, merges, counts)
    sample.unlink()
    record.publish("codes", {"merges": len(merges)})


def _keep_vocabulary(record: Record, vocab: Path | None) -> None:
    """D/bpe_vocab, beside the codes: new text must be split with both."""
    if vocab is not None and not record.has("bpe_vocab"):
        with naming(record.temporary("bpe_vocab")):
            shutil.copyfile(vocab, record.temporary("bpe_vocab"))
        record.publish("bpe_vocab")


def _write_sample(path: Path, texts: Mapping[str, Path], config: PrepareConfig) -> None:
    sizes = {lang: text.stat().st_size for lang, text in texts.items()}
    copies = sample_copies(sizes, config.bpe_alpha, config.bpe_sample_bytes)
    with naming(path), path.open("w", encoding="utf-8") as file:
        for lang, text in texts.items():
            generator = random.Random(f"{config.seed} {lang} codes")
            whole, part = divmod(copies[lang], 1)
            for lines in read_lines(text):
                for line in lines:
                    file.write(line * (int(whole) + (generator.random() < part)))


def _write_codes(record: Record, merges: Sequence[tuple[str, str]], counts: Sequence[int]) -> None:
    lines = (f"{left} {right} {n}\n" for (left, right), n in zip(merges, counts, strict=True))
    with naming(record.temporary("codes")):
        record.temporary("codes").write_text("".join(lines), encoding="utf-8")


# ------------------------------------------------------------------------------ BPE and vocabulary


def _apply_codes(record: Record, names: Sequence[str], vocab: Path | None, workers: int) -> None:
    missing = [name for name in names if not record.has(name)]
    if not missing:
        return
    bpe = load_bpe(record.path("codes"), vocab)
    total = sum(record.path(f"{TOKENISED}/{name}").stat().st_size for name in missing)
    with tqdm(total=total, desc="bpe", unit="B", unit_scale=True, disable=None) as bar:
        for name in missing:
            text = record.path(f"{TOKENISED}/{name}")
            bpe.apply_file(text, record.temporary(name), threads=workers)
            record.publish(name)
            bar.update(text.stat().st_size)
    logger.info("bpe: %d files split with %s", len(missing), record.path("codes"))


def _make_vocabulary(
    record: Record, vocab: Path | None, trains: Sequence[str], workers: int
) -> None:
    if record.has("vocab_mlm"):
        return
    temporary = record.temporary("vocab_mlm")
    if vocab is not None:
        with naming(temporary):
            shutil.copyfile(vocab, temporary)
    else:
        _core.count_words([record.path(name) for name in trains], temporary, threads=workers)
    words = _count_lines(temporary)
    record.publish("vocab_mlm", {"words": words})
    logger.info(f"vocab_mlm: {words:,} pieces of words")


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


if __name__ == "__main__":
    sys.exit(run_stage("prepare", main))
