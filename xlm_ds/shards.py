"""Looking after .bin/.idx pairs: what is in them, whether they are whole, and in another shape.

    xlm-ds shards inspect OUT --lines 0:3
    xlm-ds shards verify  OUT
    xlm-ds shards merge   OUT/train.en A/train.en B/train.en
    xlm-ds shards reshard OUT/train.en --shards 8 --destdir SHARDS
    xlm-ds shards convert valid.en.pth OUT/valid.en --to mmap

Pairs are read front to back in pieces and written into a folder beside their place, to which they are moved when all is
on disk, an .idx last; a command that fails leaves what was there before. docs/shards.md has the details.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from xlm_ds import _core
from xlm_ds.config import (
    ShardsConvertConfig,
    ShardsInspectConfig,
    ShardsMergeConfig,
    ShardsReshardConfig,
    ShardsVerifyConfig,
)
from xlm_ds.dictionary import BOS, EOS, MASK, PAD, SPECIAL_SYMBOLS, UNK, Dictionary
from xlm_ds.files import file_sha256, load_counts
from xlm_ds.flags import parse
from xlm_ds.log import EXIT_BAD_INPUT, EXIT_OK, InputError, logger, run_stage, sentence_of
from xlm_ds.pair_record import PAIR_FIELDS, beside, entropy_bits, load_record, place_of
from xlm_ds.pairs import (
    Source,
    bin_bytes,
    dictionary_of,
    find_pairs,
    find_source,
    load_dictionary,
    new_pairs,
    progress_bar,
    run_core,
    split_and_language,
    without_suffix,
)
from xlm_ds.xlm_pth import XLM_EOS, XLM_SPECIALS, XLM_UNK, XlmText, load_xlm_text

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)  # percent, of the lines' lengths
LINES_PER_STEP = 1 << 14  # of a .pth
LAYOUTS = {
    "mmap": _core.IndexKind.mmap,
    "lazy": _core.IndexKind.lazy,
    "cached": _core.IndexKind.lazy,
    "megatron": _core.IndexKind.megatron,
}
_XLM_IDS = {"<s>": BOS, "</s>": EOS, "<pad>": PAD, "<unk>": UNK, "<special1>": MASK}


def main(argv: Sequence[str]) -> int:
    commands: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
        "inspect": (ShardsInspectConfig, inspect),
        "verify": (ShardsVerifyConfig, verify),
        "merge": (ShardsMergeConfig, merge),
        "reshard": (ShardsReshardConfig, reshard),
        "convert": (ShardsConvertConfig, convert),
    }
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:8} {config.__doc__}" for name, (config, _) in commands.items()]
        text = "usage: xlm-ds shards COMMAND … (xlm-ds shards COMMAND --help for its flags)"
        sys.stdout.write("\n".join([text, *lines, ""]))
        return EXIT_OK
    if argv[0] not in commands:
        raise InputError(f"unknown command {argv[0]}; there are {', '.join(commands)}")
    config_class, run = commands[argv[0]]
    stage = f"shards {argv[0]}"
    return run(parse(config_class, argv[1:], description=config_class.__doc__, stage=stage))


# ----------------------------------------------------------------------------------------- inspect


def inspect(config: ShardsInspectConfig) -> int:
    """A table of the pairs, then the lines and blocks asked for; or one JSON object per pair."""
    rows = []
    for prefix in find_pairs(config.pairs):
        row = _facts(prefix, config)
        if config.json:
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
        rows.append(row)
    if not config.json:
        sys.stdout.write(_table(rows))
        for row in rows:
            for shown in row["shown"]:
                sys.stdout.write(
                    f"{row['pair']} {shown['what']} {shown['number']}: {shown['text']}\n"
                )
    return EXIT_OK


def _facts(prefix: Path, config: ShardsInspectConfig) -> dict[str, Any]:
    pair = _core.Pair(prefix)
    record = load_record(prefix)
    dictionary = None
    try:
        _, dictionary = dictionary_of(prefix, record, config.dict)
    except InputError:
        if config.dict or config.lines is not None or config.blocks is not None:
            raise
    unknown = record["unknown"] if record else None
    if record is None and dictionary is not None:
        unknown = int(_count_ids(prefix, pair, dictionary)[UNK])
    return {
        "pair": str(prefix),
        "layout": pair.kind.name,
        "dtype": pair.dtype.name,
        "lines": pair.lines,
        "tokens": pair.tokens,
        "bin_bytes": beside(prefix, "bin").stat().st_size,
        "idx_bytes": beside(prefix, "idx").stat().st_size,
        "lengths": quantiles(pair.count_lengths()),
        "unknown": unknown,
        "unknown_share": unknown / pair.tokens if unknown is not None and pair.tokens else None,
        "shown": [
            {"what": what, "number": number, "text": _text(ids, dictionary), "ids": ids}
            for what, number, ids in _shown(prefix, pair, config, dictionary)
        ],
    }


def quantiles(counts: Sequence[tuple[int, int]]) -> dict[str, int]:
    """Percent -> length: of QUANTILES, the smallest length that so many percent of the lines do not exceed."""
    if not counts:
        return {}
    lengths, lines = (np.array(column) for column in zip(*counts, strict=True))
    up_to = np.cumsum(lines)
    ranks = [max(math.ceil(int(up_to[-1]) * q / 100), 1) for q in QUANTILES]
    return {
        str(q): int(lengths[np.searchsorted(up_to, rank)])
        for q, rank in zip(QUANTILES, ranks, strict=True)
    }


def _count_ids(prefix: Path, pair: _core.Pair, dictionary: Dictionary) -> NDArray[np.uint64]:
    with progress_bar(bin_bytes([prefix])) as bar:
        return run_core(lambda progress: pair.count_ids(len(dictionary), progress), bar)


def _shown(
    prefix: Path, pair: _core.Pair, config: ShardsInspectConfig, dictionary: Dictionary | None
) -> Iterator[tuple[str, int, list[int]]]:
    if config.lines is not None:
        for number in _numbers(config.lines, "--lines", pair.lines, prefix):
            yield "line", number, pair.line(number).tolist()
    if config.blocks is not None and dictionary is not None:
        size = config.tokens_per_sample - 1
        dataset = _core.TokenDataset(prefix, mode=_core.BreakMode.none, block_size=size)
        ids = np.empty(size, np.int64)
        for number in _numbers(config.blocks, "--blocks", dataset.blocks, prefix):
            count = dataset.fill_block(number, vocab_size=len(dictionary), out=ids)
            yield "block", number, ids[:count].tolist()


def _numbers(text: str, flag: str, total: int, prefix: Path) -> range:
    """A:B or A; of A:B what there is, as pairs have different numbers of lines."""
    match = re.fullmatch(r"(\d{1,18})(?::(\d{1,18}))?", text)
    first, end = (int(match[1]), int(match[2] or int(match[1]) + 1)) if match else (0, 0)
    if first >= end:
        raise InputError(f"{flag} {text}: give A:B (from A to before B) or one number, from 0")
    if ":" not in text and first >= total:
        raise InputError(f"{flag} {text}: {prefix} has {total}, numbered from 0")
    return range(first, min(end, total))


def _text(ids: Sequence[int], dictionary: Dictionary | None) -> str:
    symbols = dictionary.symbols if dictionary else ()
    return " ".join(symbols[i] if 0 <= i < len(symbols) else f"<id {i}>" for i in ids)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["pair", "layout", "dtype", "lines", "tokens", "bytes"]
    header += ["shortest", "median", "99 %", "longest", "unknown"]
    cells = [header]
    for row in rows:
        sizes = (row["lines"], row["tokens"], row["bin_bytes"] + row["idx_bytes"])
        lengths = [
            f"{row['lengths'][q]:,}" if row["lengths"] else "" for q in ("0", "50", "99", "100")
        ]
        share = "?" if row["unknown_share"] is None else f"{100 * row['unknown_share']:.3f} %"
        cells.append(
            [row["pair"], row["layout"], row["dtype"], *(f"{n:,}" for n in sizes), *lengths, share]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = 3  # columns of words
    lines = (
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "".join(line.rstrip() + "\n" for line in lines)


# ------------------------------------------------------------------------------------------ verify


def verify(config: ShardsVerifyConfig) -> int:
    """Checks all pairs; one sentence for each that is bad, and exit code 2 if there is one."""
    prefixes = find_pairs(config.pairs)
    bad = 0
    for prefix in prefixes:
        try:
            result = verify_pair(prefix, config.dict)
        except (InputError, OSError) as error:
            bad += 1
            sys.stderr.write(f"shards: error: {sentence_of(error)}\n")
        else:
            sys.stdout.write(f"{prefix}: good: {result}\n")
    sys.stdout.write(f"{len(prefixes) - bad} of {len(prefixes)} pairs are good\n")
    return EXIT_BAD_INPUT if bad else EXIT_OK


def verify_pair(prefix: Path, dictionary_path: Path | None) -> str:
    """What was found of a good pair. Raises InputError with the first thing that is wrong; OSError."""
    changed = _changed(prefix, load_record(prefix))
    try:
        source = find_source(prefix, dictionary_path)
        pair, size = source.open(), len(source.dictionary)
        with progress_bar(bin_bytes([prefix])) as bar:
            counts = run_core(lambda progress: _core.verify_pair(pair, size, progress), bar)
    except InputError as error:
        if changed is None:
            raise
        raise InputError(f"{changed}: {error}") from error
    if changed is not None:
        raise InputError(
            f"{changed}; only the checksum shows it, and not where, as every id is in the dictionary and every line "
            "ends with </s>: copy it again, or delete it and binarize again"
        )
    _check_counts(beside(prefix, "counts.npy"), counts.by_id)
    found = f"{counts.lines} lines, {counts.tokens} tokens"
    if source.record is None:
        return f"{found}; without a record there are no checksums to compare"
    _check_record(prefix, source.record, counts)
    return f"{found}, as recorded"


def _changed(prefix: Path, record: Mapping[str, Any] | None) -> str | None:
    """Which of the files is not the one that was recorded, in half a sentence."""
    for path in (beside(prefix, kind) for kind in ("bin", "idx")):
        if record is None or not path.exists():
            continue
        if file_sha256(path) != record["sha256"].get(path.suffix[1:]):
            return (
                f"{path}: its SHA-256 is not the one in {prefix.name}.json, so one of the two was changed after they "
                "were written"
            )
    return None


def find_unchanged(path: Path, dictionary_path: Path | None) -> Source:
    """A pair to be written anew, where new checksums would hide damage. Raises InputError; OSError."""
    source = find_source(without_suffix(path), dictionary_path)
    if changed := _changed(source.prefix, source.record):
        raise InputError(f"{changed}: verify it, and copy it again or delete it and binarize again")
    return source


def _check_counts(path: Path, expected: NDArray[np.uint64]) -> None:
    if not path.exists():
        return
    counts = load_counts(path, len(expected))
    (wrong,) = np.nonzero(counts != expected)
    if wrong.size:
        at = int(wrong[0])
        raise InputError(
            f"{path}: says that id {at} occurs {int(counts[at])} times, but in the .bin it occurs {int(expected[at])} "
            "times; one of the two was changed after they were written: delete both and binarize again"
        )


def _check_record(prefix: Path, record: Mapping[str, Any], counts: _core.TextCounts) -> None:
    path = beside(prefix, "json")
    shard, shards = place_of(record)
    named = f"{record['split']}.{record['language']}{shard or ''}"
    if named != ".".join(split_and_language(prefix)):
        raise InputError(
            f"{path}: was written for {named}; delete it and binarize again, or rename the files"
        )
    expected = {
        "blank": counts.blank_lines,
        # Which of them a literal <unk> is, the ids do not tell.
        "unknown and literal_specials together": counts.unknown + counts.literal_specials,
        "unigram_entropy_bits": entropy_bits(counts.by_id),
    }
    together = record["unknown"] + record["literal_specials"]
    found = {**record, "unknown and literal_specials together": together}
    for name, value in expected.items():
        is_float = isinstance(value, float)
        tolerance = 1e-9 if is_float else 0  # another order of a sum gives other last digits
        if not math.isclose(found[name], value, rel_tol=tolerance, abs_tol=tolerance):
            raise InputError(
                f"{path}: says {name} {found[name]}, but it is {value}; delete it and binarize again"
            )
    if shard == 0 and shards > 1:
        _check_shards(prefix, record)


def _check_shards(first: Path, record: Mapping[str, Any]) -> None:
    """All shards are there, and no further one: readers take those they find."""
    shards = record["shards"]
    for number in range(1, shards + 1):
        prefix = first.with_name(f"{first.name}{number}")
        path = beside(prefix, "idx")
        if path.exists() != (number < shards):
            raise InputError(
                f"{path}: is {'missing' if number < shards else 'there'}, but {first.name} was divided into {shards} "
                f"shards; {'copy it again' if number < shards else 'move it away'}"
            )
        if number < shards and not are_of_one_text(record, load_record(prefix)):
            raise InputError(
                f"{path}: is not a shard of the text that {first.name} begins; reshard it again"
            )


def are_of_one_text(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two records are of shards that were made together."""
    names = ("split", "language", "shards", "dictionary_sha256", "made_from")
    return all((one or {}).get(name) == (other or {}).get(name) for name in names)


# ------------------------------------------------------------------------------- merge and reshard


def merge(config: ShardsMergeConfig) -> int:
    sources = [find_unchanged(prefix, config.dict) for prefix in config.pairs]
    if not sources:
        raise InputError("PAIRS is missing: give the pairs to join after the one to write")
    first = sources[0].open()
    for source in sources:
        pair = source.open()
        if (pair.kind, pair.dtype) != (first.kind, first.dtype):
            raise InputError(
                f"{source.prefix}: is {pair.kind.name} of {pair.dtype.name}, but {sources[0].prefix} is "
                f"{first.kind.name} of {first.dtype.name}; convert one of them first"
            )
        if source.dictionary.sha256 != sources[0].dictionary.sha256:
            raise InputError(
                f"{source.prefix}: has another dictionary than {sources[0].prefix}; binarize both with one --srcdict"
            )
    _check_languages(sources)
    _check_order(sources)
    _join("merge", sources, config.out, first.kind, first.dtype, config.overwrite)
    return EXIT_OK


def _check_languages(sources: Sequence[Source]) -> None:
    recorded = [(s.prefix, s.record["language"]) for s in sources if s.record is not None]
    for prefix, language in recorded:
        if language != recorded[0][1]:
            raise InputError(
                f"{prefix}: is of language {language}, but {recorded[0][0]} of {recorded[0][1]}; merge the pairs of "
                "each language"
            )


def _check_order(sources: Sequence[Source]) -> None:
    """Raises InputError unless of each text that was divided all shards are there, in their order."""
    records = [None, *(source.record for source in sources), None]
    for number, (before, after) in enumerate(pairwise(records)):
        (shard, shards), (found, of) = place_of(before), place_of(after)
        due = (shard + 1) % shards
        if due and (found != due or not are_of_one_text(before, after)):
            raise InputError(
                f"{sources[number - 1].prefix}: is shard {shard} of {shards}, and shard {due} does not follow; give "
                "all shards of a text, in their order"
            )
        if found and not due:
            raise InputError(
                f"{sources[number].prefix}: is shard {found} of {of}, and shard {found - 1} is not before it; give "
                "all shards of a text, in their order"
            )


def _join(
    command: str,
    sources: Sequence[Source],
    out: Path,
    kind: _core.IndexKind,
    dtype: _core.Dtype,
    overwrite: bool,
) -> None:
    """Writes one pair of all the lines of `sources`, which have one dictionary."""
    dictionary, folder = sources[0].dictionary, sources[0].dictionary_path.parent
    with (
        new_pairs([out], dictionary, folder, overwrite=overwrite) as (new,),
        progress_bar(bin_bytes(source.prefix for source in sources)) as bar,
    ):
        writer = new.writer(kind, dtype, len(dictionary))
        for source in sources:
            pair = source.open()
            _append(writer, pair, 0, pair.lines, bar)
        unknown = _unknown_words(sources)
        counts = new.finish(writer, dictionary, unknown=unknown, more=_made_from(command, sources))
    logger.info(f"{out}: {counts.lines} lines, {counts.tokens} tokens, {kind.name}")


def _unknown_words(sources: Sequence[Source]) -> int | None:
    """Of all together, if each has a record."""
    known = [source.record["unknown"] for source in sources if source.record is not None]
    return sum(known) if len(known) == len(sources) else None


def _append(
    writer: _core.PairWriter, pair: _core.Pair, first: int, end: int, bar: "tqdm[None]"
) -> None:
    run_core(lambda progress: writer.append(pair, first, end, progress), bar)


def _made_from(command: str, sources: Iterable[Source]) -> dict[str, Any]:
    """What a record keeps of those it was made from: what they say beyond their pair itself."""
    pairs = [
        {"name": source.prefix.name, **_more_fields(source.record or {})} for source in sources
    ]
    return {"made_from": {"shards": command, "pairs": pairs}}


def _more_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in PAIR_FIELDS}


def reshard(config: ShardsReshardConfig) -> int:
    source = _find_whole(config.pair, config.dict)
    split, language = split_and_language(source.prefix)
    pair = source.open()
    ends = shard_ends(source.prefix, pair, config)
    name = f"{split}.{language}"
    outs = [config.destdir / f"{name}{number or ''}" for number in range(len(ends))]
    folder = source.dictionary_path.parent
    with (
        new_pairs(outs, source.dictionary, folder, overwrite=config.overwrite) as pairs,
        progress_bar(bin_bytes([source.prefix])) as bar,
    ):
        first = 0
        for number, (new, end) in enumerate(zip(pairs, ends, strict=True)):
            writer = new.writer(pair.kind, pair.dtype, len(source.dictionary))
            _append(writer, pair, first, end, bar)
            place = {"language": language, "shard": number, "shards": len(ends)}
            more = place | _made_from("reshard", [source])
            counts = new.finish(writer, source.dictionary, unknown=None, more=more)
            logger.info(f"{new.prefix}: {counts.lines} lines, {counts.tokens} tokens")
            first = end
    return EXIT_OK


def _find_whole(path: Path, dictionary: Path | None) -> Source:
    source = find_unchanged(path, dictionary)
    shard, shards = place_of(source.record)
    if shards > 1:
        raise InputError(
            f"{source.prefix}: is shard {shard} of {shards} of a text; merge them first"
        )
    return source


def shard_ends(prefix: Path, pair: _core.Pair, config: ShardsReshardConfig) -> list[int]:
    """The line before which each shard ends; the last is the number of lines. No shard is without a line."""
    given = [f for f in ("shards", "max_tokens", "max_bytes") if getattr(config, f) is not None]
    if len(given) != 1:
        raise InputError("give one of --shards, --max-tokens and --max-bytes")
    if pair.lines < (config.shards or 1):
        raise InputError(
            f"{prefix}: has {pair.lines} lines, which are not enough for {config.shards or 1} shards"
        )
    ends: list[int] = []
    if config.shards is not None:
        for number in range(1, config.shards + 1):
            wanted = pair.lines_within(pair.tokens * number // config.shards)
            at_least = (ends[-1] if ends else 0) + 1
            ends.append(min(max(wanted, at_least), pair.lines - (config.shards - number)))
        return ends
    width = np.dtype(pair.dtype.name).itemsize
    size = config.max_tokens or (config.max_bytes or 0) // width
    while not ends or ends[-1] < pair.lines:
        first = ends[-1] if ends else 0
        ends.append(max(pair.lines_within(pair.tokens_before(first) + size), first + 1))
    return ends


# ----------------------------------------------------------------------------------------- convert


def convert(config: ShardsConvertConfig) -> int:
    kind = LAYOUTS[config.to]
    if config.source.suffix == ".pth":
        return _convert_xlm(config, kind)
    source = _find_whole(config.source, config.dict)
    pair = source.open()
    if pair.documents not in (0, pair.lines):
        logger.info(f"{source.prefix}: its {pair.documents} documents become one per line, or none")
    dtype = _core.dtype_to_write(kind, len(source.dictionary))
    _join("convert", [source], config.out, kind, dtype, config.overwrite)
    return EXIT_OK


def _convert_xlm(config: ShardsConvertConfig, kind: _core.IndexKind) -> int:
    text = load_xlm_text(config.source)
    if config.dict is None:
        special = [1] * len(SPECIAL_SYMBOLS)
        dictionary = Dictionary((*SPECIAL_SYMBOLS, *text.words), (*special, *text.counts))
    else:
        dictionary = load_dictionary(config.dict)
    ids = ids_of_xlm(text, dictionary, same_words=config.dict is None)
    companions = (config.dict or config.source).parent
    with (
        new_pairs([config.out], dictionary, companions, overwrite=config.overwrite) as (new,),
        progress_bar(text.sentences.nbytes) as bar,
    ):
        size = len(dictionary)
        writer = new.writer(kind, _core.dtype_to_write(kind, size), size)
        unknown_before = unknown = 0
        for tokens, lengths in xlm_lines(config.source, text):
            ours = ids[tokens]
            writer.append_ids(ours, lengths)
            unknown_before += int(np.count_nonzero(tokens == XLM_UNK))
            unknown += int(np.count_nonzero(ours == UNK))
            bar.update(tokens.nbytes)
        more = {"made_from": {"shards": "convert", "pairs": [{"name": config.source.name}]}}
        literal = text.unknown_words.get(SPECIAL_SYMBOLS[UNK], 0)  # XLM counts it as unknown
        counts = new.finish(writer, dictionary, unknown=unknown - literal, more=more)
    logger.info(f"{config.out}: {counts.lines} lines, {counts.tokens} tokens, {config.to}")
    if unknown > unknown_before:
        logger.info(
            f"{config.source}: {unknown - unknown_before} of {counts.tokens} tokens are words that {config.dict} has "
            "not; they became <unk>"
        )
    return EXIT_OK


def ids_of_xlm(text: XlmText, dictionary: Dictionary, *, same_words: bool) -> NDArray[np.int64]:
    """Our id of each of XLM's, in the order of theirs; UNK for what `dictionary` has not. `same_words`: it was made
    from the text's own words."""
    special = [_XLM_IDS.get(symbol, UNK) for symbol in XLM_SPECIALS]
    if same_words:
        words = list(range(len(SPECIAL_SYMBOLS), len(dictionary)))
    else:
        ours = {symbol: number for number, symbol in enumerate(dictionary.symbols)}
        words = [ours.get(word, UNK) for word in text.words]
    return np.array([*special, *words], np.int64)


def xlm_lines(path: Path, text: XlmText) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    """Some lines at a time: XLM's ids of all of them, and their lengths with eos. Raises InputError unless the
    positions divide the sentences into lines that end with eos."""
    total = len(XLM_SPECIALS) + len(text.words)
    begin = 0
    for at in range(0, len(text.positions), LINES_PER_STEP):
        starts, ends = text.positions[at : at + LINES_PER_STEP].T
        follow = np.concatenate(([begin], ends[:-1] + 1))
        good = (starts == follow) & (ends >= starts) & (ends < len(text.sentences))
        # Only places that are in the array are looked up.
        good[good] = text.sentences[ends[good]] == XLM_EOS
        if not good.all():
            line = at + int(np.argmin(good))
            raise InputError(
                f"{path}: sentence {line} is not where the one before it ends, or has no eos; the file is damaged"
            )
        tokens = text.sentences[begin : int(ends[-1]) + 1]
        if tokens.min() < 0 or tokens.max() >= total:
            bad = int(np.argmax((tokens < 0) | (tokens >= total)))
            raise InputError(
                f"{path}: token {begin + bad} is {tokens[bad]}, but its Dictionary ends at {total - 1}; the file is "
                "damaged"
            )
        yield tokens, ends - starts + 1
        begin = int(ends[-1]) + 1
    if begin != len(text.sentences):
        raise InputError(
            f"{path}: its sentences go on after the last of its positions; the file is damaged"
        )


if __name__ == "__main__":
    # What is asked for goes to stdout, what is said about it to stderr: --json is read by programs.
    sys.exit(run_stage("shards", main, log_to=sys.stderr))
