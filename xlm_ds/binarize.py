"""Text to .bin/.idx pairs of token ids: fairseq-preprocess for the cross-lingual task, with the same bytes.

    python -m xlm_ds.binarize --langs ar,de,en --srcdict D/vocab_mlm --only-source \\
        --trainpref D/train --validpref D/valid --testpref D/test --destdir OUT

writes OUT/dict.txt and for every split and language SPLIT.LG.bin and .idx (docs/formats.md), SPLIT.LG.json (counts,
checksums) and SPLIT.LG.counts.npy (occurrences of every id). A pair gets its final name when whole, its .idx last.
"""

import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from xlm_ds import _core
from xlm_ds.config import BINARIZE_ANSWERED, BinarizeConfig, check_languages
from xlm_ds.dictionary import SPECIAL_SYMBOLS, Dictionary, build_dictionary
from xlm_ds.files import file_sha256, sync_file
from xlm_ds.flags import parse
from xlm_ds.log import EXIT_OK, InputError, add_log_file, logger, run_stage

Result = TypeVar("Result")

# What prepare leaves beside the vocabulary, and what new text needs to become ids: it travels with the data.
COMPANIONS = ("codes", "prepare.json")
POLL_SECONDS = 0.1
MANY_UNKNOWN = 0.1  # of all tokens; text and dictionary of one prepare have next to none


class Text(NamedTuple):
    """One file to binarize."""

    split: str
    language: str
    path: Path


def main(argv: Sequence[str]) -> int:
    binarize(parse(BinarizeConfig, argv, answered=BINARIZE_ANSWERED, description=__doc__))
    return EXIT_OK


def binarize(config: BinarizeConfig) -> None:
    """Writes everything `config` asks for. Raises InputError or OSError; what was finished before stays."""
    texts = texts_of(config)
    threads = config.workers or len(os.sched_getaffinity(0))
    bpe = load_bpe(config)
    dictionary = find_dictionary(config, texts, threads, bpe)
    if len(dictionary) == len(SPECIAL_SYMBOLS):
        raise InputError(
            f"{config.srcdict or 'the training text'}: gives a dictionary without a single word"
        )
    config.destdir.mkdir(parents=True, exist_ok=True)
    add_log_file(config.destdir / "preprocess.log")
    write_dictionary(config, dictionary)
    core_dictionary = _core.Dictionary(dictionary.symbols)
    total_bytes = sum(text.path.stat().st_size for text in texts)
    announced = set()
    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for text in texts:
            if text.language not in announced:
                logger.info(f"[{text.language}] Dictionary: {len(dictionary)} types")
                announced.add(text.language)
            counts = write_pair(text, config, dictionary, core_dictionary, bpe, threads, bar)
            logger.info(f"[{text.language}] {text.path}: {summary(counts)}")
            if counts.unknown > MANY_UNKNOWN * counts.tokens:
                logger.info(
                    f"{text.path}: many words are not in the dictionary; was the text split with the codes that "
                    "the dictionary was counted with?"
                )
            if counts.literal_specials:
                logger.info(
                    f"{text.path}: {counts.literal_specials} words are spelt like a special symbol "
                    f"({', '.join(SPECIAL_SYMBOLS)}) and got its id, as with fairseq"
                )
    logger.info(f"Wrote preprocessed data to {config.destdir}")


def summary(counts: _core.TextCounts) -> str:
    """fairseq's line; its percentage has three significant digits."""
    share = f" {100 * counts.unknown / counts.tokens:.3}% replaced" if counts.tokens else ""
    return f"{counts.lines} sents, {counts.tokens} tokens,{share} (by <unk>)".replace(
        "tokens, (by", "tokens (by"
    )


# ------------------------------------------------------------------------------- what is asked for


def texts_of(config: BinarizeConfig) -> list[Text]:
    """The files to read, language by language. Raises InputError if one is missing or nothing is asked for."""
    if bool(config.langs) == bool(config.source_lang):
        raise InputError("give --langs ar,de,… (all languages at once) or --source-lang LG (one)")
    languages = config.langs or (str(config.source_lang),)
    check_languages(languages, "--langs")
    prefs = {"train": config.trainpref, "valid": config.validpref, "test": config.testpref}
    given = {split: pref for split, pref in prefs.items() if pref is not None}
    if not given:
        raise InputError("nothing to binarize: give --trainpref, --validpref or --testpref")
    for pref in given.values():
        if "," in pref:
            raise InputError(
                f"{pref}: several prefixes for one split are not supported; join the files"
            )
    texts = [
        Text(split, language, Path(f"{pref}.{language}"))
        for language in languages
        for split, pref in given.items()
    ]
    for text in texts:
        if not text.path.is_file():
            raise InputError(
                f"{text.path}: not found, although --{text.split}pref and language {text.language} ask for it"
            )
    return texts


def load_bpe(config: BinarizeConfig) -> _core.Bpe | None:
    if config.bpe_codes is None:
        if config.bpe_vocab is not None:
            raise InputError(
                "--bpe-vocab goes with --bpe-codes, whose merges it limits; give both or neither"
            )
        return None
    return _core.Bpe(config.bpe_codes, config.bpe_vocab)


def find_dictionary(
    config: BinarizeConfig, texts: Sequence[Text], threads: int, bpe: _core.Bpe | None
) -> Dictionary:
    """The one of --srcdict, or one built from the training text of all languages together."""
    if config.srcdict is not None:
        return Dictionary.load(
            config.srcdict, on_duplicate=config.on_duplicate, max_vocab=config.max_vocab
        )
    if not config.langs:
        raise InputError(
            "--source-lang without --srcdict would give every language its own ids; give --srcdict, or --langs "
            "with all languages to build one dictionary from their training text"
        )
    training = [text for text in texts if text.split == "train"]
    if not training:
        raise InputError(
            "no --srcdict and no --trainpref: there is nothing to build the dictionary from"
        )
    words: Counter[str] = Counter()
    for text in training:
        progress = _core.Progress()
        with interruptible(progress) as run:
            counted = run(lambda: _core.count_text_words(text.path, threads, progress, bpe=bpe))  # noqa: B023
        words.update(dict(counted))
    built = build_dictionary(
        words,
        threshold=config.thresholdsrc,
        nwords=config.nwordssrc,
        padding_factor=config.padding_factor,
    )
    # After the padding, so that the model has no more rows than asked for.
    return built if config.max_vocab is None else built.truncated(config.max_vocab)


def write_dictionary(config: BinarizeConfig, dictionary: Dictionary) -> None:
    """OUT/dict.txt. Raises InputError if another one is there: its pairs would mean other words."""
    path = config.destdir / "dict.txt"
    exists = path.exists()
    if exists and Dictionary.load(path).sha256 != dictionary.sha256:
        raise InputError(
            f"{path}: another dictionary is there already; binarize into an empty --destdir, "
            f"or use this one with --srcdict {path}"
        )
    if config.bpe_codes is not None:
        write_codes(config.bpe_codes, config.destdir)
    if exists:
        return
    # The recipe's loop over languages may run in parallel: they must not write the same file.
    temporary = path.with_name(f".dict.txt.{os.getpid()}.tmp")
    dictionary.save(temporary)
    sync_file(temporary)
    temporary.replace(path)
    if config.srcdict is not None:
        for name in COMPANIONS:
            if (config.srcdict.parent / name).is_file() and not (config.destdir / name).exists():
                shutil.copyfile(config.srcdict.parent / name, config.destdir / name)


def write_codes(codes: Path, folder: Path) -> None:
    """OUT/codes, instead of those beside --srcdict. Raises InputError if others are there: they split other pieces."""
    path = folder / "codes"
    if path.exists():
        if file_sha256(path) != file_sha256(codes):
            raise InputError(
                f"{path}: other codes than {codes} are there already; binarize into an empty --destdir, or use "
                f"these with --bpe-codes {path}"
            )
        return
    temporary = path.with_name(f".codes.{os.getpid()}.tmp")
    shutil.copyfile(codes, temporary)
    sync_file(temporary)
    temporary.replace(path)


# ------------------------------------------------------------------------------------ one pair


def write_pair(
    text: Text,
    config: BinarizeConfig,
    dictionary: Dictionary,
    core_dictionary: _core.Dictionary,
    bpe: _core.Bpe | None,
    threads: int,
    bar: "tqdm[None]",
) -> _core.TextCounts:
    """Binarizes one file under temporary names and renames them when all is on disk."""
    base = f"{text.split}.{text.language}"
    final = {
        kind: config.destdir / f"{base}.{kind}" for kind in ("bin", "counts.npy", "json", "idx")
    }
    temporary = {kind: path.with_name(f".{path.name}.tmp") for kind, path in final.items()}
    lengths = config.destdir / f".{base}.lengths.tmp"
    kind = _core.IndexKind.mmap if config.dataset_impl == "mmap" else _core.IndexKind.lazy
    paths = _core.PairPaths(temporary["bin"], temporary["idx"], lengths)
    progress = _core.Progress()
    try:
        with interruptible(progress, bar) as run:
            counts = run(
                lambda: _core.binarize_file(
                    text.path, core_dictionary, kind, paths, threads, progress, bpe=bpe
                )
            )
        with temporary["counts.npy"].open("wb") as file:
            np.save(file, counts.by_id)
        description = {
            "language": text.language,
            "split": text.split,
            "lines": counts.lines,
            "tokens": counts.tokens,
            "unknown": counts.unknown,
            "blank": counts.blank_lines,
            "literal_specials": counts.literal_specials,
            "unigram_entropy_bits": entropy_bits(counts.by_id),
            "dictionary_sha256": dictionary.sha256,
            "sha256": {kind: file_sha256(temporary[kind]) for kind in ("bin", "idx")},
        }
        temporary["json"].write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        for path in temporary.values():
            sync_file(path)
        # An .idx says that its pair is whole: an old one goes first, the new one comes last.
        final["idx"].unlink(missing_ok=True)
        for kind_of_file, path in temporary.items():
            if kind_of_file == "idx":
                sync_file(config.destdir)  # or a loss of power could undo the other names only
            path.replace(final[kind_of_file])
        sync_file(config.destdir)
    finally:
        for path in (*temporary.values(), lengths):
            path.unlink(missing_ok=True)
    return counts


def entropy_bits(counts: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> float:
    """Entropy of the unigram distribution, eos included; 0 of an empty text."""
    seen = counts[counts > 0].astype(np.float64)
    total = float(seen.sum())
    return float(math.log2(total) - (seen * np.log2(seen)).sum() / total) if total else 0.0


@contextmanager
def interruptible(
    progress: _core.Progress, bar: "tqdm[None] | None" = None
) -> Iterator[Callable[[Callable[[], Result]], Result]]:
    """Runs calls of the core on another thread, so that Ctrl-C ends them at once and the bar moves."""

    def result_of(future: "Future[Result]") -> Result:
        shown = 0
        while not future.done():
            wait([future], timeout=POLL_SECONDS)
            if bar is not None:
                bar.update(progress.done_bytes - shown)
                shown = progress.done_bytes
        return future.result()

    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            yield lambda call: result_of(thread.submit(call))
        except KeyboardInterrupt:
            progress.cancel()
            raise


if __name__ == "__main__":
    sys.exit(run_stage("binarize", main))
