"""Blocks and masks as XLM's own evaluation has them, so that figures can be set beside published ones.

    for batch in xlm_batches(dataset, language, mask_ratio=0.15, rows=8):
        model.logits(batch)
    for batch in xlm_pair_batches(stream, mask_ratio=0.15, max_tokens=8192):
        model.logits(batch)

All of a language is one stream of tokens with eos before it, so many that it is whole blocks of T = tokens_per_sample;
its last token is in none. A position is predicted with the probability mask_ratio, but never the first or last of a
block, and every one that is predicted has MASK as its input. The draws are those of numpy's RandomState(0), begun anew
for each language and split. Source: XLM cd281d3, src/evaluation/evaluator.py and src/data/dataset.py.

A pair's rows are a line and its translation, each between two eos. The first so many that have words on both sides are
sorted by length, of equals the first in front, and divided into batches; what is masked depends on them. Of a row
neither its first place nor its last one is predicted, the two eos between the lines are like words. Source: XLM
312bf28, the same files, src/data/loader.py and src/utils.py.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from xlm_ds.batches import MaskedBatch
from xlm_ds.dataset import TokenDataset
from xlm_ds.dictionary import EOS, MASK, PAD
from xlm_ds.log import InputError
from xlm_ds.streams import Stream

# With very many languages XLM evaluates more of those that XNLI has.
XNLI = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
MANY, VERY_MANY = 5, 30  # languages

# XLM's --batch_size, by default and in its README's command for TLM. Its --tokens_per_batch decides nothing here.
PAIRS_IN_A_BATCH = 32


def every_nth(language: str, split: str, languages: int) -> int:
    """XLM evaluates the first n-th of the blocks; returns n."""
    if languages <= MANY:
        return 1
    return 5 if _is_preferred(language, split, languages) else 10


def most_pairs(first: str, split: str, languages: int) -> int | None:
    """XLM evaluates so many pairs of lines of a step, by the first of its two languages; None is all."""
    if languages <= MANY:
        return None
    if _is_preferred(first, split, languages):
        return 1500
    return 300 if languages <= VERY_MANY else 600


def _is_preferred(language: str, split: str, languages: int) -> bool:
    return split == "valid" and (languages <= VERY_MANY or language in XNLI)


def count_blocks(dataset: TokenDataset, share: int) -> int:
    """Raises InputError if that are none, or they are too short to mask a position."""
    length = dataset.tokens_per_sample
    blocks = -(-dataset.tokens // length) // share
    if length < 3:
        raise InputError(f"--xlm-masks: blocks of {length} tokens have none between first and last")
    if blocks == 0:
        raise InputError(
            f"--xlm-masks: XLM would evaluate a {share}th of {dataset.split}.{dataset.language}, whose "
            f"{dataset.tokens} tokens are fewer than {share} blocks of {length}; leave it out"
        )
    return blocks


def xlm_batches(
    dataset: TokenDataset,
    language: int,
    *,
    mask_ratio: float,
    rows: int,
    share: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[MaskedBatch]:
    """Every world_size-th block from number `rank` on of the first 1/share of them, `rows` at a time.

    `dataset` must be in break mode none; `language` is its id. Raises InputError as count_blocks.
    """
    blocks = count_blocks(dataset, share)
    generator = np.random.RandomState(0)
    ids: list[NDArray[np.int64]] = []
    masks: list[NDArray[np.int64]] = []
    for block in range(blocks):
        (places,) = _draw(generator, [dataset.tokens_per_sample], mask_ratio)
        if block % world_size == rank:
            ids.append(_block(dataset, block))
            masks.append(places)
        if len(ids) == rows or (ids and block == blocks - 1):
            yield _batch(ids, masks, language)
            ids, masks = [], []


def xlm_pair_batches(
    stream: Stream,
    *,
    mask_ratio: float,
    max_tokens: int,
    most: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[MaskedBatch]:
    """Every world_size-th of XLM's batches from number `rank` on, of the first `most` pairs of lines.

    One of more than `max_tokens` comes in parts, of a row at least. A line longer than the stream's tokens_per_sample
    with its two eos loses its end. Raises InputError if no pair has words on both sides.
    """
    generator = np.random.RandomState(0)
    lengths = _lengths_of_pairs(stream, most)
    by_length = sorted(lengths, key=lengths.__getitem__)
    batches = np.array_split(np.array(by_length), -(-len(by_length) // PAIRS_IN_A_BATCH))
    for number, batch in enumerate(batches):
        pairs: list[int] = batch.tolist()
        masks = _draw(generator, [lengths[pair] for pair in pairs], mask_ratio)
        if number % world_size != rank:
            continue
        rows = max(max_tokens // lengths[pairs[-1]], 1)
        for begin in range(0, len(pairs), rows):
            part = slice(begin, begin + rows)
            yield _batch_of_pairs(stream, pairs[part], masks[part])


def _lengths_of_pairs(stream: Stream, most: int | None) -> dict[int, int]:
    """Of the first `most` pairs of lines with words on both sides, number: tokens in the row."""
    found: dict[int, int] = {}
    for pair in range(stream.blocks):
        if len(found) == most:
            break
        lengths = [side.core.block_length(pair) for side in stream.sides]
        if min(lengths) > 1:  # one is its eos
            found[pair] = sum(lengths) + 2
    if not found:
        raise InputError(f"--xlm-masks: no line of {stream.name} and its translation have words")
    return found


def _batch_of_pairs(
    stream: Stream, pairs: Sequence[int], masks: Sequence[NDArray[np.int64]]
) -> MaskedBatch:
    first, second = ([_between_eos(side, pair) for pair in pairs] for side in stream.sides)
    rows = [np.concatenate(halves) for halves in zip(first, second, strict=True)]
    language, second_language = stream.languages
    return _batch(rows, masks, language)._replace(
        second_languages=torch.full((len(pairs),), second_language),
        second_starts=torch.tensor([len(half) for half in first]),
    )


def _between_eos(side: TokenDataset, line: int) -> NDArray[np.int64]:
    ids = np.insert(side.block(line), 0, EOS)
    ids[-1] = EOS  # also where the end is cut
    return ids


def _draw(
    generator: np.random.RandomState, lengths: Sequence[int], mask_ratio: float
) -> list[NDArray[np.int64]]:
    """Of each row of a batch the places to be predicted, ascending; at least one."""
    chosen = generator.rand(max(lengths), len(lengths)) <= mask_ratio
    chosen[0] = False
    for row, length in enumerate(lengths):
        chosen[length - 1 :, row] = False
        if not chosen[:, row].any():
            chosen[generator.randint(1, length - 1), row] = True
    return [np.flatnonzero(column) for column in chosen.T]


def _block(dataset: TokenDataset, number: int) -> NDArray[np.int64]:
    """(T,): a block of the stream. It is shifted by one: an eos comes before those that fill it up."""
    length = dataset.tokens_per_sample
    filling = 1 + -dataset.tokens % length
    begin = number * length - filling
    ids = np.full(length, EOS)
    ids[max(-begin, 0) :] = _tokens(dataset, max(begin, 0), begin + length)
    return ids


def _tokens(dataset: TokenDataset, begin: int, end: int) -> NDArray[np.int64]:
    """Tokens [begin, end) of all."""
    size = dataset.core.block_size
    first = begin // size
    parts = [dataset.block(number) for number in range(first, -(-end // size))]
    return np.concatenate([np.empty(0, np.int64), *parts])[
        begin - first * size : end - first * size
    ]


def _batch(
    ids: Sequence[NDArray[np.int64]], masks: Sequence[NDArray[np.int64]], language: int
) -> MaskedBatch:
    """Short rows fill up with PAD; those with fewer masks than others with their first position, and PAD as target."""
    rows, length = len(ids), max(map(len, ids))
    width = max(map(len, masks))
    input_ids = torch.full((rows, length), PAD)
    positions = (length * torch.arange(rows))[:, None].repeat(1, width)
    targets = torch.full((rows, width), PAD)
    for row, (tokens, places) in enumerate(zip(ids, masks, strict=True)):
        chosen = torch.from_numpy(places)
        input_ids[row, : len(tokens)] = torch.from_numpy(tokens)
        positions[row, : len(places)] += chosen
        targets[row, : len(places)] = input_ids[row, chosen]
        input_ids[row, chosen] = MASK
    return MaskedBatch(
        input_ids=input_ids,
        languages=torch.full((rows,), language),
        masked_positions=positions.flatten(),
        targets=targets.flatten(),
        has_padding=min(map(len, ids)) < length,
    )
