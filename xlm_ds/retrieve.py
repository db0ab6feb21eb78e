"""Sentence retrieval: how often a line's translation is the nearest of all lines of the other file, in both directions.

    python -m xlm_ds.retrieve run test.fr-en.fr test.fr-en.en
    python -m xlm_ds.retrieve run a.txt b.txt c.txt d.txt --languages en,fr,en,de

Files are raw text, aligned line by line; of each line the vector is Pretrained.encode's. Nearest is by cosine, and by
the ratio margin of Artetxe and Schwenk (2019, arXiv 1811.01136): the cosine divided by the mean of those to both lines'
four nearest neighbours, which takes the advantage from lines that are near to all.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xlm_ds.config import RetrieveConfig
from xlm_ds.flags import before_slow_imports, parse
from xlm_ds.log import EXIT_OK, InputError, logger, run_stage

if __name__ == "__main__":
    before_slow_imports(RetrieveConfig, description=__doc__)  # before torch is imported

import torch
from torch import Tensor
from torch.nn import functional

from xlm_ds.batches import Rows, rank_slice
from xlm_ds.engine import Ranks
from xlm_ds.files import read_lines, replacing
from xlm_ds.pretrained import Pretrained, mean_vectors
from xlm_ds.text_ids import Row, TextToIds, rows_of_texts

NEIGHBOURS = 4
SIMILARITIES_AT_ONCE = 1 << 24  # 64 MB


class Retrieval(NamedTuple):
    """Percent of the lines whose translation is found: from the first file to the second, and back."""

    lines: int
    cosine: tuple[float, float]
    margin: tuple[float, float]


# ------------------------------------------------------------------------------------------- texts


class AlignedRows(NamedTuple):
    """Two aligned texts as rows of ids."""

    languages: tuple[str, str]
    rows: tuple[list[Row], list[Row]]


def read_aligned(
    files: Sequence[Path], languages: tuple[str, str], to_ids: TextToIds, longest: int | None
) -> AlignedRows:
    """Two files of raw text. Raises InputError unless they have as many lines, and each has a word."""
    texts = [[line.rstrip("\n") for some in read_lines(path) for line in some] for path in files]
    if len(texts[0]) != len(texts[1]):
        short, long = sorted(zip(map(len, texts), files, strict=True))
        raise InputError(
            f"{short[1]}: ends after line {short[0]}, but {long[1]} has {long[0]}; give files that are aligned"
        )
    if not texts[0]:
        raise InputError(f"{files[0]}: is empty")
    rows = []
    for path, lines, language in zip(files, texts, languages, strict=True):

        def where(number: int, path: Path = path) -> str:
            return f"{path}, line {number + 1}"

        examples = [(line,) for line in lines]
        rows.append(rows_of_texts(examples, language, to_ids, longest, where))
    return AlignedRows(languages, (rows[0], rows[1]))


# ----------------------------------------------------------------------------------------- figures


def retrieval(first: Tensor, second: Tensor) -> Retrieval:
    """Of vectors (N, d) of which those with the same number belong together; memory is O(N d).

    Of several that are as near the first counts.
    """
    one, other = (functional.normalize(vectors.float(), dim=1) for vectors in (first, second))
    near_one, near_other = _nearness(one, other), _nearness(other, one)
    ahead = _found(one, other, near_one, near_other)
    back = _found(other, one, near_other, near_one)
    return Retrieval(len(one), (ahead[0], back[0]), (ahead[1], back[1]))


def _nearness(queries: Tensor, targets: Tensor) -> Tensor:
    """(N,): each query's mean cosine to the targets nearest to it."""
    count = min(NEIGHBOURS, len(targets))
    parts = _similarities(queries, targets)
    return torch.cat([similar.topk(count, dim=1).values.mean(dim=1) for _, similar in parts])


def _found(
    queries: Tensor, targets: Tensor, near: Tensor, near_theirs: Tensor
) -> tuple[float, float]:
    """Percent of the queries whose own target is the best, by cosine and by margin."""
    right = [0, 0]
    for rows, similar in _similarities(queries, targets):
        own = torch.arange(rows.start, rows.stop, device=similar.device)
        margin = similar / (near[rows, None] + near_theirs)
        for kind, scores in enumerate((similar, margin)):
            right[kind] += int((scores.argmax(dim=1) == own).sum())
    return 100 * right[0] / len(queries), 100 * right[1] / len(queries)


def _similarities(queries: Tensor, targets: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Of some queries at a time, which they are and their cosines to all targets."""
    step = max(1, SIMILARITIES_AT_ONCE // len(targets))
    for begin in range(0, len(queries), step):
        rows = slice(begin, min(begin + step, len(queries)))
        yield rows, queries[rows] @ targets.T


def by_direction(languages: tuple[str, str], found: Retrieval) -> dict[str, dict[str, float]]:
    """{"cosine": {"en-fr": percent, "fr-en": percent}, "margin": …}"""
    names = ("-".join(languages), "-".join(reversed(languages)))
    figures = {"cosine": found.cosine, "margin": found.margin}
    return {kind: dict(zip(names, both, strict=True)) for kind, both in figures.items()}


# ---------------------------------------------------------------------------------- during training


def find_aligned(
    source: Path, languages: Sequence[str]
) -> list[tuple[tuple[str, str], tuple[Path, Path]]]:
    """The texts LG1-LG2.LG1 and LG1-LG2.LG2 of all pairs of these languages, in one order or the other, that there are
    in a folder, or behind a prefix and a point.

    Raises InputError if there is none, or one without the other.
    """
    begin = f"{source}/" if source.is_dir() else f"{source}."
    found = []
    for one, other in itertools.combinations(languages, 2):
        for pair in ((one, other), (other, one)):
            first, second = (Path(f"{begin}{'-'.join(pair)}.{language}") for language in pair)
            if first.exists() != second.exists():
                missing, there = sorted((first, second), key=Path.exists)
                raise InputError(
                    f"{missing}: is not there, but {there} is; a pair needs both sides"
                )
            if first.exists():
                found.append((pair, (first, second)))
                break
    if not found:
        prefixes = {
            path.name.removesuffix(f".{one}-{two}.{one}")
            for one, two in itertools.permutations(languages, 2)
            for path in source.glob(f"*.{one}-{two}.{one}")
        }
        hint = f"give {' or '.join(f'{source}/{prefix}' for prefix in sorted(prefixes))}"
        raise InputError(
            f"{source}: has no aligned texts of {', '.join(languages)}; "
            + (hint if prefixes else "they are to be called LG1-LG2.LG1 and LG1-LG2.LG2")
        )
    return found


def read_all_aligned(
    source: Path, languages: Sequence[str], to_ids: TextToIds, longest: int | None
) -> list[AlignedRows]:
    """All that find_aligned finds. Raises InputError as it and read_aligned."""
    found = [
        read_aligned(paths, pair, to_ids, longest)
        for pair, paths in find_aligned(source, languages)
    ]
    shown = ", ".join(f"{'-'.join(pair)} ({len(rows[0])} lines)" for pair, rows in found)
    logger.info(f"{source}: retrieval is measured on {shown}")
    return found


def retrieve_on_ranks(
    aligned: AlignedRows,
    encode: Callable[[Rows], Tensor],
    ids: tuple[int, int],
    *,
    rows_at_once: int,
    ranks: Ranks,
) -> Retrieval:
    """The figures of a network that all ranks hold, each encoding its share. All must call it.

    `ids`: the languages' in the network.
    """
    first, second = (
        _gathered_vectors(rows, encode, language, rows_at_once=rows_at_once, ranks=ranks)
        for rows, language in zip(aligned.rows, ids, strict=True)
    )
    return retrieval(first.to(ranks.device), second.to(ranks.device))


def _gathered_vectors(
    rows: Sequence[Row],
    encode: Callable[[Rows], Tensor],
    language: int,
    *,
    rows_at_once: int,
    ranks: Ranks,
) -> Tensor:
    """(N, d) on every rank. Each makes the same number of calls, as ZeRO 3 needs."""
    begin, count = rank_slice(0, len(rows), rank=ranks.rank, world_size=ranks.world_size)
    _, most = rank_slice(0, len(rows), rank=0, world_size=ranks.world_size)
    own = [*rows[begin : begin + count], *rows[: most - count]]  # shares differ by one row
    vectors = mean_vectors(encode, own, language, rows_at_once=rows_at_once, device=ranks.device)
    whole = torch.zeros(len(rows), vectors.shape[1])
    whole[begin : begin + count] = vectors[:count]
    return ranks.sum(whole)


# ------------------------------------------------------------------------------------------- stage


class Pair(NamedTuple):
    """Two aligned files and their languages."""

    files: tuple[Path, Path]
    languages: tuple[str, str]


def pairs_of(config: RetrieveConfig) -> list[Pair]:
    """Raises InputError unless there are two and two files, and each has a language."""
    files = config.files
    if not files or len(files) % 2:
        raise InputError(f"{len(files)} files: give them in pairs, FILE_A FILE_B [FILE_A FILE_B …]")
    languages = config.languages or tuple(path.suffix.removeprefix(".") for path in files)
    if len(languages) != len(files):
        raise InputError(
            f"--languages {','.join(languages)}: are {len(languages)} for {len(files)} files; give each file's"
        )
    pairs = [
        Pair((files[n], files[n + 1]), (languages[n], languages[n + 1]))
        for n in range(0, len(files), 2)
    ]
    for pair in pairs:
        if pair.files[0] == pair.files[1] and pair.languages[0] == pair.languages[1]:
            raise InputError(
                f"{pair.files[0]}: is given for its own translation; give the file of the other language"
            )
    return pairs


def retrieve(aligned: AlignedRows, model: Pretrained, batch_size: int) -> Retrieval:
    first, second = (
        model.vectors(rows, language, batch_size).to(model.device)
        for rows, language in zip(aligned.rows, aligned.languages, strict=True)
    )
    return retrieval(first, second)


def table(results: Sequence[tuple[Pair, Retrieval]]) -> str:
    """The figures as fixed-width text, a line for each direction."""
    lines = [f"{'direction':>16} {'lines':>8} {'cosine %':>9} {'margin %':>9}"]
    for pair, found in results:
        figures = by_direction(pair.languages, found)
        lines += [
            f"{name:>16} {found.lines:>8} {cosine:>9.2f} {figures['margin'][name]:>9.2f}"
            for name, cosine in figures["cosine"].items()
        ]
    return "\n".join(lines)


def write_json(
    path: Path, config: RetrieveConfig, results: Sequence[tuple[Pair, Retrieval]]
) -> None:
    content: dict[str, Any] = {
        "checkpoint": str(config.checkpoint),
        "neighbours": NEIGHBOURS,
        "pairs": [
            {
                "files": [str(file) for file in pair.files],
                "languages": pair.languages,
                "lines": found.lines,
                **by_direction(pair.languages, found),
            }
            for pair, found in results
        ],
    }
    with replacing(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    config = parse(RetrieveConfig, argv, description=__doc__)
    pairs = pairs_of(config)
    output = config.output
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"--output {output}: not a file in a folder that is there")
    model = Pretrained.load(config.checkpoint)
    for language in itertools.chain.from_iterable(pair.languages for pair in pairs):
        if language not in model.languages:  # refused before the first file is read
            raise InputError(
                f"language {language}: the model knows {', '.join(model.languages)}; name the files' with --languages"
            )
    aligned = [read_aligned(*pair, model.to_ids, model.longest) for pair in pairs]
    results = [
        (pair, retrieve(texts, model, config.batch_size))
        for pair, texts in zip(pairs, aligned, strict=True)
    ]
    sys.stdout.write(table(results) + "\n")
    if output is not None:
        write_json(output, config, results)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_stage("retrieve", main, log_to=sys.stderr))  # the table alone is the output
