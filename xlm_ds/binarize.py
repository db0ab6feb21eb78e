"""Text to .bin/.idx pairs of token ids: fairseq-preprocess for the cross-lingual task, with the same bytes.

    python -m xlm_ds.binarize --langs ar,de,en --srcdict D/vocab_mlm --only-source \\
        --trainpref D/train --validpref D/valid --testpref D/test --destdir OUT

writes OUT/dict.txt and for every split and language SPLIT.LG.bin and .idx (docs/formats.md), SPLIT.LG.json (counts,
checksums) and SPLIT.LG.counts.npy (occurrences of every id). A pair gets its final name when whole, its .idx last; one
that is there already and was made from the same is not made again.

    python -m xlm_ds.binarize --source-lang en --target-lang fr --srcdict D/vocab_mlm --trainpref D/train.en-fr \\
        --validpref D/valid.en-fr --testpref D/test.en-fr --destdir OUT

is for parallel text: line i of D/train.en-fr.fr translates line i of D/train.en-fr.en. It writes OUT/train.en-fr.en.*,
OUT/train.en-fr.fr.* and so on, which train reads with --mlm-steps en,fr,en-fr.

    --trainpref a/train,b/train     several files: for train joined, for valid and test valid, valid1, valid2, …
    xz -dc train.ar.xz | python -m xlm_ds.binarize --source-lang ar --srcdict D/vocab_mlm --trainpref - --destdir OUT
    mpirun -n 64 python -m xlm_ds.binarize …     many machines with a shared folder (pip install 'xlm_ds[mpi]')
"""

import secrets
import shutil
import socket
import sys
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from xlm_ds import _core
from xlm_ds.alignment import Unaligned, compare_lengths, remove_lines, unequal
from xlm_ds.config import BinarizeConfig
from xlm_ds.dictionary import SPECIAL_SYMBOLS, UNK, Dictionary, build_dictionary
from xlm_ds.files import copy_file, file_sha256, locked, make_folder, naming, save_array, sync_file
from xlm_ds.flags import parse
from xlm_ds.log import EXIT_OK, InputError, add_log_file, logger, run_stage
from xlm_ds.merges import load_bpe
from xlm_ds.pair_record import (
    COMPANIONS,
    KINDS,
    Counts,
    describe,
    is_made_from,
    sharing_dictionary,
    write_record,
)
from xlm_ds.peer_flags import BINARIZE_FLAGS
from xlm_ds.prepare_record import RECORD, TOKENISED
from xlm_ds.ranks import Ranks, interruptible, started_ranks
from xlm_ds.texts import Share, Text, divide, texts_of

JOIN_BYTES = 1 << 20
MANY_UNKNOWN = 0.1  # of all tokens; text and dictionary of one prepare have next to none


class Job(NamedTuple):
    """What is the same for all pairs."""

    config: BinarizeConfig
    dictionary: Dictionary
    core_dictionary: _core.Dictionary
    bpe: _core.Bpe | None
    bpe_sha256: dict[str, str]
    kind: _core.IndexKind
    threads: int
    ranks: Ranks
    bar: "tqdm[None]"


def main(argv: Sequence[str]) -> int:
    with started_ranks("binarize") as ranks:
        if ranks.rank != 0 and {"-h", "--help"} & set(argv):
            return EXIT_OK  # rank 0 shows it
        config = ranks.together(
            lambda: parse(BinarizeConfig, argv, peers=BINARIZE_FLAGS, description=__doc__)
        )
        binarize(config, ranks)
    return EXIT_OK


def binarize(config: BinarizeConfig, ranks: Ranks) -> None:
    """Writes everything `config` asks for. Raises InputError or OSError; what was finished before stays.

    Alone, pair by pair. Of several ranks each reads its share of all texts; when all is on disk they finish the pairs.
    """
    texts = ranks.on_first(lambda: texts_for(config, ranks.size))
    threads = config.workers or ranks.threads()
    bpe = ranks.together(lambda: bpe_of(config))
    bpe_sha256 = ranks.on_first(lambda: bpe_checksums(config.bpe_codes, config.bpe_vocab))
    ranks.together(lambda: check_same_bpe(config, bpe_sha256))
    dictionary = find_dictionary(config, texts, bpe, threads, ranks)
    ranks.on_first(lambda: start_folder(config, texts, dictionary, bpe_sha256))
    check_shared(config.destdir, ranks)
    sizes = [text.size for text in texts]
    unknown_size = any(text.is_standard_input for text in texts)
    with tqdm(
        total=None if unknown_size else sum(sizes) // ranks.size,
        unit="B",
        unit_scale=True,
        disable=ranks.rank != 0 or not sys.stderr.isatty(),
    ) as bar:
        kind = _core.IndexKind.mmap if config.dataset_impl == "mmap" else _core.IndexKind.lazy
        core_dictionary = _core.Dictionary(dictionary.symbols)
        job = Job(config, dictionary, core_dictionary, bpe, bpe_sha256, kind, threads, ranks, bar)
        announced: set[str] = set()
        for group in one_after_another(texts) if ranks.size == 1 else [texts]:
            made = make_pairs(group, job)
            for text in group:
                if text.language not in announced:
                    logger.info(f"[{text.language}] Dictionary: {len(dictionary)} types")
                    announced.add(text.language)
                tell(text, made.get(text.pair))
    logger.info(f"Wrote preprocessed data to {config.destdir}")


def one_after_another(texts: Sequence[Text]) -> list[list[Text]]:
    """Texts that can be made each by itself; the two sides of parallel text stand together."""
    groups: list[list[Text]] = []
    for text in texts:
        if groups and text.translation and text.split == groups[-1][-1].split:
            groups[-1].append(text)
        else:
            groups.append([text])
    return groups


def tell(text: Text, counts: Counts | None) -> None:
    if counts is None:
        logger.info(
            f"{text.pair}: is there already, made from the same input, dictionary and flags; not redone"
        )
        return
    logger.info(f"[{text.language}] {text}: {summary(counts)}")
    if counts.unknown > MANY_UNKNOWN * counts.tokens:
        logger.warning(
            f"{text}: many words are not in the dictionary; was the text split with the codes that "
            "the dictionary was counted with?"
        )
    for file in text.inputs:
        if not text.is_standard_input and begins_with_byte_order_mark(file.path):
            logger.info(
                f"{file.path}: begins with a byte order mark, which is part of its first word, as with fairseq; "
                "remove it (sed -i '1s/^\\xef\\xbb\\xbf//')"
            )
    if counts.literal_specials:
        logger.info(
            f"{text}: {counts.literal_specials} words are spelt like a special symbol "
            f"({', '.join(SPECIAL_SYMBOLS)}) and got its id, as with fairseq"
        )


def begins_with_byte_order_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(BOM_UTF8)) == BOM_UTF8


def summary(counts: Counts) -> str:
    """fairseq's line; its percentage has three significant digits."""
    share = f", {100 * counts.unknown / counts.tokens:.3}% replaced" if counts.tokens else ""
    return f"{counts.lines} sents, {counts.tokens} tokens{share} (by <unk>)"


# ------------------------------------------------------------------------------- before the first pair


def texts_for(config: BinarizeConfig, ranks: int) -> list[Text]:
    """Those of the configuration. Raises InputError also if there is nothing to make a dictionary from."""
    texts = texts_of(config)
    if ranks > 1 and any(text.is_standard_input for text in texts):
        raise InputError(f"- is standard input, which {ranks} ranks cannot share; give a file")
    if config.srcdict is None and not config.langs:
        if config.target_lang is not None:
            raise InputError(
                "parallel text without --srcdict would have a dictionary of its own; give --srcdict, that of the "
                "languages"
            )
        raise InputError(
            "--source-lang without --srcdict would give every language its own ids; give --srcdict, or --langs "
            "with all languages to build one dictionary from their training text"
        )
    if config.srcdict is None and config.trainpref is None:
        raise InputError(
            "no --srcdict and no --trainpref: there is nothing to build the dictionary from"
        )
    return texts


def bpe_of(config: BinarizeConfig) -> _core.Bpe | None:
    if config.bpe_codes is None:
        if config.bpe_vocab is not None:
            raise InputError(
                "--bpe-vocab goes with --bpe-codes, whose merges it limits; give both or neither"
            )
        return None
    return load_bpe(config.bpe_codes, config.bpe_vocab)


def bpe_checksums(codes: Path | None, vocab: Path | None) -> dict[str, str]:
    files = {"bpe_codes_sha256": codes, "bpe_vocab_sha256": vocab}
    return {name: file_sha256(path) for name, path in files.items() if path is not None}


def check_same_bpe(config: BinarizeConfig, first: Mapping[str, str]) -> None:
    """Raises InputError on a rank whose files are not those of rank 0, whose checksums are `first`."""
    if bpe_checksums(config.bpe_codes, config.bpe_vocab) != first:
        raise InputError(
            f"{config.bpe_codes}: on {socket.gethostname()} it, or its --bpe-vocab, is another file than on the "
            "first rank; give files that are the same on all hosts"
        )


def find_dictionary(
    config: BinarizeConfig,
    texts: Sequence[Text],
    bpe: _core.Bpe | None,
    threads: int,
    ranks: Ranks,
) -> Dictionary:
    """The one of --srcdict, or one built from the training text of all languages together."""
    words = Counter[str]() if config.srcdict else count_words(texts, bpe, threads, ranks)
    return ranks.on_first(lambda: dictionary_of(config, words))


def dictionary_of(config: BinarizeConfig, words: Counter[str]) -> Dictionary:
    if config.srcdict is not None:
        found = Dictionary.load(
            config.srcdict, on_duplicate=config.on_duplicate, max_vocab=config.max_vocab
        )
        if (config.thresholdsrc, config.nwordssrc) != (0, -1):
            logger.info(
                "--thresholdsrc, --nwordssrc: --srcdict is taken as it is; they decide nothing"
            )
    else:
        found = build_dictionary(
            words,
            threshold=config.thresholdsrc,
            nwords=config.nwordssrc,
            padding_factor=config.padding_factor,
        )
        if config.max_vocab is not None:
            # After the padding, so that the model has no more rows than asked for.
            found = found.truncated(config.max_vocab)
    symbols = found.symbols[len(SPECIAL_SYMBOLS) :]
    if 2 * sum(" " in symbol for symbol in symbols) > len(symbols):  # which no word of a text has
        raise InputError(
            f"{config.srcdict}: most of its rows have a blank within the symbol, as codes have; give the vocabulary "
            "(of prepare: D/vocab_mlm)"
        )
    if not any(config.srcdict or symbol in words for symbol in symbols):  # the padding's are none
        raise InputError(
            f"{config.srcdict or 'the training text'}: gives a dictionary without a single word"
        )
    return found


def count_words(
    texts: Sequence[Text], bpe: _core.Bpe | None, threads: int, ranks: Ranks
) -> Counter[str]:
    """Of the training text; on ranks other than 0 not all of it."""
    training = [text for text in texts if text.split == "train"]
    share = ranks.on_first(lambda: divide(training, ranks.size))[ranks.rank]
    pieces = [_core.Piece(*stretch) for stretches in share.values() for stretch in stretches]
    progress = _core.Progress()

    def count() -> Counter[str]:
        with interruptible(progress, ranks) as run:
            counted = run(lambda: _core.count_text_words(pieces, threads, progress, bpe=bpe))
            return Counter(dict(counted))

    def merge(one: Counter[str], other: Counter[str]) -> Counter[str]:
        one.update(other)
        return one

    return ranks.merged(ranks.together(count), merge)


def start_folder(
    config: BinarizeConfig,
    texts: Sequence[Text],
    dictionary: Dictionary,
    bpe_sha256: Mapping[str, str],
) -> None:
    """Makes OUT, its log, OUT/dict.txt and its companions. Raises InputError if others are there."""
    make_folder(config.destdir)
    add_log_file(config.destdir / "preprocess.log")
    companions = config.srcdict.parent if config.srcdict else prepared_folder(texts[0])
    companions = companions or config.destdir  # none to copy then
    names = COMPANIONS if config.bpe_codes is None else ("prepare.json",)
    # The recipe's loop over languages may run in parallel: they must not write the same file.
    with sharing_dictionary(config.destdir, dictionary, companions, names):
        if config.bpe_codes is not None:
            write_bpe(config, bpe_sha256)


def prepared_folder(text: Text) -> Path | None:
    """Where prepare left what goes with a text that it has made."""
    folder = text.inputs[0].path.parent
    folder = folder.parent if folder.name == TOKENISED else folder
    return folder if (folder / RECORD).exists() else None


def write_bpe(config: BinarizeConfig, sha256: Mapping[str, str]) -> None:
    """OUT/codes and OUT/bpe_vocab, instead of those beside --srcdict. Raises InputError if there are others."""
    codes, vocab = config.destdir / "codes", config.destdir / "bpe_vocab"
    there = bpe_checksums(*(path if path.exists() else None for path in (codes, vocab)))
    if there == sha256:
        return
    if codes.exists() or not there.items() <= sha256.items():
        raise InputError(
            f"{config.destdir}: other codes than {config.bpe_codes}, or another vocabulary of theirs, are there "
            "already and split other pieces; binarize into an empty --destdir, or use what is there"
        )
    for given, path in ((config.bpe_vocab, vocab), (config.bpe_codes, codes)):
        if given is not None:  # the codes last: where they are, a vocabulary they go with is too
            copy_file(given, path)


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raises InputError on a rank for which `folder` is another than rank 0's."""
    with ExitStack() as stack:
        path = folder / ".shared.lock"

        def write() -> str:
            stack.enter_context(locked(path))
            with naming(path):
                path.write_text(secrets.token_hex(), encoding="utf-8")
            return path.read_text(encoding="utf-8")

        def compare() -> None:
            if not path.exists() or path.read_text(encoding="utf-8") != written:
                raise InputError(
                    f"{folder}: on {socket.gethostname()} it is not the folder that the first rank writes to; "
                    "give a --destdir that all hosts share"
                )

        written = ranks.on_first(write)
        ranks.together(compare)


# ------------------------------------------------------------------------------------ pairs


def make_pairs(texts: Sequence[Text], job: Job) -> dict[str, Counts]:
    """Makes those that are not there already, and returns what they contain, by pair.

    Every rank encodes its share into parts; then one rank for each text joins them, and renames the pair when all ranks
    have come so far.
    """
    ranks = job.ranks
    wanted = ranks.on_first(lambda: [text for text in texts if is_wanted(text, job)])
    shares = ranks.on_first(lambda: divide(wanted, ranks.size))
    own = [number for number in range(len(wanted)) if owner(shares, number) == ranks.rank]
    with ExitStack() as stack:
        ranks.together(lambda: [stack.enter_context(alone_at(wanted[n], job)) for n in own])
        ranks.together(lambda: encode_share(wanted, shares[ranks.rank], job))
        ranks.together(lambda: join_parts(wanted, shares, own, job))
        alone = ranks.together(lambda: {n: lines_without_partner(wanted[n], job) for n in own})
        ranks.on_first(lambda: tell_left_out(wanted, job))
        made = ranks.together(
            lambda: {
                wanted[n].pair: finish_pair(wanted[n], readers(shares, n), alone[n], job)
                for n in own
            }
        )
        ranks.together(lambda: withdraw([wanted[number] for number in own], job))
        ranks.together(lambda: publish([wanted[number] for number in own], job))
    return {pair: counts for part in ranks.gathered(made) for pair, counts in part.items()}


def readers(shares: Sequence[Share], number: int) -> list[int]:
    """The ranks that have a part of the text, in the order of its bytes."""
    return [rank for rank, share in enumerate(shares) if number in share]


def owner(shares: Sequence[Share], number: int) -> int:
    """The rank with the largest part."""
    return max(
        readers(shares, number), key=lambda r: sum(s.end - s.begin for s in shares[r][number])
    )


@contextmanager
def alone_at(text: Text, job: Job) -> Iterator[None]:
    """Holds the text's pair for this run, without temporary files before and after, also those of a killed run."""
    folder = job.config.destdir
    busy = f"{folder / text.pair}: another binarize is making this pair; wait for it, or give another --destdir"
    with locked(folder / f".{text.pair}.lock", busy):
        remove_temporary(text, job)
        try:
            yield
        finally:
            remove_temporary(text, job)


def remove_temporary(text: Text, job: Job) -> None:
    for path in job.config.destdir.glob(f".{text.pair}.*.tmp"):
        path.unlink(missing_ok=True)


def temporary(text: Text, job: Job, what: str, rank: int | None = None) -> Path:
    """Of a file on its way, or of a rank's part of it."""
    part = "" if rank is None else f".part{rank}"
    return job.config.destdir / f".{text.pair}{part}.{what}.tmp"


def made_from(text: Text, job: Job) -> dict[str, Any]:
    """What decides the bytes of the pair."""
    return {
        "inputs": [
            {"name": file.path.name, "bytes": file.size, "mtime_ns": file.mtime_ns}
            for file in text.inputs
        ],
        "dictionary_sha256": job.dictionary.sha256,
        "dataset_impl": job.kind.name,
        **job.bpe_sha256,
        **({"translation": translated_from(text.translation, job)} if text.translation else {}),
    }


def translated_from(other: Text, job: Job) -> dict[str, Any]:
    """What the other side decides of a side's bytes: which lines are left out."""
    (file,) = other.inputs
    return {
        **{"name": file.path.name, "bytes": file.size, "mtime_ns": file.mtime_ns},
        "unaligned": job.config.unaligned,
    }


def is_wanted(text: Text, job: Job) -> bool:
    """Whether it is to be made. Both sides of parallel text are, or none."""
    if text.translation is None:
        return not is_there(text, job)
    other = text.translation._replace(translation=text)
    return not (is_there(text, job) and is_there(other, job))


def is_there(text: Text, job: Job) -> bool:
    """Of standard input nobody knows."""
    pair = job.config.destdir / text.pair
    return not text.is_standard_input and is_made_from(pair, made_from(text, job))


def encode_share(texts: Sequence[Text], share: Share, job: Job) -> None:
    """This rank's parts: ids, lengths of the lines, and counts."""
    for number, stretches in share.items():
        text = texts[number]
        pieces = [_core.Piece(*stretch) for stretch in stretches]
        if text.is_standard_input:
            pieces = [_core.Piece(_core.STANDARD_INPUT)]
        data, lengths, counts = (
            temporary(text, job, what, job.ranks.rank) for what in ("bin", "lengths", "counts")
        )
        encoded = encode(pieces, data, lengths, job)
        figures = [getattr(encoded, field) for field in Counts._fields]
        save_array(counts, np.concatenate([np.array(figures, np.uint64), encoded.by_id]))


def encode(pieces: Sequence[_core.Piece], data: Path, lengths: Path, job: Job) -> _core.TextCounts:
    progress = _core.Progress()
    with interruptible(progress, job.ranks, job.bar) as run:
        return run(
            lambda: _core.encode_text(
                pieces,
                job.core_dictionary,
                job.kind,
                data,
                lengths,
                job.threads,
                progress,
                bpe=job.bpe,
            )
        )


def join_parts(
    texts: Sequence[Text], shares: Sequence[Share], own: Sequence[int], job: Job
) -> None:
    """Makes what all ranks have encoded of the texts numbered `own` one .bin and one file of lengths each."""
    for number, what in product(own, ("bin", "lengths")):
        job.ranks.check_stop()
        parts = [temporary(texts[number], job, what, rank) for rank in readers(shares, number)]
        join(parts, temporary(texts[number], job, what))


def lines_without_partner(text: Text, job: Job) -> NDArray[np.int64]:
    """Numbers, from 0, of lines to be left out. Raises InputError if there are any, without --unaligned skip.

    Of monolingual text there are none.
    """
    if text.translation is None:
        return np.empty(0, np.int64)
    first, second, found = compared(text, text.translation, job)
    refusal = found.refusal(first, second)
    if refusal and job.config.unaligned == "refuse":
        raise InputError(refusal)
    if found.left_out == max(found.lines):
        raise InputError(f"{first} and {second}: there is no line that has a translation")
    return found.without_partner(text.side)


def tell_left_out(texts: Sequence[Text], job: Job) -> None:
    """Once for both sides of parallel text."""
    for text in texts:
        if text.translation is None or text.side != 0:
            continue
        first, second, found = compared(text, text.translation, job)
        if warning := unequal(found.lines, first, second):
            logger.warning(warning)
        if found.left_out:
            logger.info(
                f"{first} and {second}: left out {found.left_out} of {max(found.lines)} pairs of lines, as one side "
                f"is empty or missing; the first is line {found.first}"
            )


def compared(text: Text, other: Text, job: Job) -> tuple[str, str, Unaligned]:
    """The names of both sides, first and second, and what is wrong between them."""
    first, second = sorted((text, other), key=lambda text: text.side)
    lengths = (temporary(side, job, "lengths") for side in (first, second))
    return str(first), str(second), compare_lengths(*lengths)


def leave_out(
    text: Text, numbers: NDArray[np.int64], counts: Counts, by_id: NDArray[np.uint64], job: Job
) -> tuple[Counts, NDArray[np.uint64]]:
    """Takes lines out of the temporary .bin and its lengths; returns what is counted without them.

    A word spelt <unk> in such a line is taken for an unknown one: the ids do not tell.
    """
    if len(numbers) == 0:
        return counts, by_id
    dtype = np.dtype(_core.dtype_to_write(job.kind, len(job.dictionary)).name)
    bias = 1 if job.kind == _core.IndexKind.lazy else 0
    removed = remove_lines(
        temporary(text, job, "bin"), temporary(text, job, "lengths"), numbers, dtype
    )
    ids = np.concatenate(removed).astype(np.int64) - bias
    gone = np.bincount(ids, minlength=len(by_id)).astype(np.uint64)
    unknown = min(int(gone[UNK]), counts.unknown)
    special = int(gone[: len(SPECIAL_SYMBOLS)].sum()) - len(numbers) - unknown  # but for the eos
    return (
        Counts(
            lines=counts.lines - len(numbers),
            tokens=counts.tokens - len(ids),
            unknown=counts.unknown - unknown,
            blank_lines=counts.blank_lines - sum(len(line) == 1 for line in removed),
            literal_specials=counts.literal_specials - special,
        ),
        by_id - gone,
    )


def finish_pair(
    text: Text, ranks: Sequence[int], without_partner: NDArray[np.int64], job: Job
) -> Counts:
    """Adds what belongs to a pair to what `ranks` have encoded; all is on disk then, under temporary names."""
    new = {kind: temporary(text, job, kind) for kind in KINDS}
    lengths = temporary(text, job, "lengths")
    figures = sum(np.load(temporary(text, job, "counts", rank)) for rank in ranks)
    counts = Counts(*(int(figure) for figure in figures[: len(Counts._fields)]))
    by_id = figures[len(Counts._fields) :]
    counts, by_id = leave_out(text, without_partner, counts, by_id, job)
    if text.is_standard_input and counts.lines == 0:
        # A pipe does not tell that the command before it has failed.
        raise InputError(
            "standard input: was empty; look whether the command that writes to it has failed"
        )
    _core.write_text_index(new["idx"], job.kind, len(job.dictionary), lengths)
    save_array(new["counts.npy"], by_id)
    record = describe(text.split, text.language, counts, by_id, job.dictionary, new)
    write_record(new["json"], {**record, "made_from": made_from(text, job)})
    for path in new.values():
        sync_file(path)
    return counts


def join(parts: Sequence[Path], whole: Path) -> None:
    parts[0].replace(whole)
    with naming(whole), whole.open("ab") as file:
        for part in parts[1:]:
            with part.open("rb") as content:
                shutil.copyfileobj(content, file, JOIN_BYTES)
            part.unlink()


def withdraw(texts: Sequence[Text], job: Job) -> None:
    """Takes the old .idx of parallel texts, so that no new side ever stands beside an old one."""
    for text in texts:
        if text.translation:
            (job.config.destdir / f"{text.pair}.idx").unlink(missing_ok=True)


def publish(texts: Sequence[Text], job: Job) -> None:
    """Gives finished pairs their names. An .idx says that its pair is whole: the old goes first, the new comes last."""
    folder = job.config.destdir
    for text in texts:
        final = {kind: folder / f"{text.pair}.{kind}" for kind in KINDS}
        final["idx"].unlink(missing_ok=True)
        try:
            for kind in KINDS:
                if kind == "idx":
                    sync_file(folder)  # or a loss of power could undo the other names only
                temporary(text, job, kind).replace(final[kind])
        finally:
            if not final["idx"].exists():  # stopped between the names: what has one is no pair
                for path in final.values():
                    path.unlink(missing_ok=True)
    sync_file(folder)


if __name__ == "__main__":
    sys.exit(run_stage("binarize", main))
