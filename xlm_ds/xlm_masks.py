"""Blocks and masks as XLM's own evaluation has them, so that figures can be set beside published ones.

    for batch in xlm_batches(dataset, language, mask_ratio=0.15, rows=8):
        model.logits(batch)

All of a language is one stream of tokens with eos before it, so many that it is whole blocks of T = tokens_per_sample;
its last token is in none. A position is predicted with the probability mask_ratio, but never the first or last of a
block, and every one that is predicted has MASK as its input. The draws are those of numpy's RandomState(0), begun anew
for each language and split. Source: XLM cd281d3, src/evaluation/evaluator.py and src/data/dataset.py.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from xlm_ds.batches import MaskedBatch
from xlm_ds.dataset import TokenDataset
from xlm_ds.dictionary import EOS, MASK, PAD
from xlm_ds.log import InputError

# With very many languages XLM evaluates more of those that XNLI has.
XNLI = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
MANY, VERY_MANY = 5, 30  # languages


def share_of(language: str, split: str, languages: int) -> int:
    """XLM evaluates the first n-th of the blocks; returns n."""
    if languages <= MANY:
        return 1
    full = split == "valid" and (languages <= VERY_MANY or language in XNLI)
    return 5 if full else 10


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
        places = _draw(generator, dataset.tokens_per_sample, mask_ratio)
        if block % world_size == rank:
            ids.append(_block(dataset, block))
            masks.append(places)
        if len(ids) == rows or (ids and block == blocks - 1):
            yield _batch(ids, masks, language)
            ids, masks = [], []


def _draw(generator: np.random.RandomState, length: int, mask_ratio: float) -> NDArray[np.int64]:
    """The positions of a block to be predicted, ascending; at least one."""
    chosen = generator.rand(length) <= mask_ratio
    chosen[[0, -1]] = False
    if not chosen.any():
        chosen[generator.randint(1, length - 1)] = True
    return np.flatnonzero(chosen)


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
    """Rows with fewer masks than others fill up with their first position and PAD."""
    input_ids = torch.from_numpy(np.stack(ids))
    rows, length = input_ids.shape
    width = max(map(len, masks))
    positions = (length * torch.arange(rows))[:, None].repeat(1, width)
    targets = torch.full((rows, width), PAD)
    for row, places in enumerate(masks):
        chosen = torch.from_numpy(places)
        positions[row, : len(places)] += chosen
        targets[row, : len(places)] = input_ids[row, chosen]
        input_ids[row, chosen] = MASK
    languages = torch.full((rows,), language)
    return MaskedBatch(
        input_ids=input_ids,
        languages=languages,
        masked_positions=positions.flatten(),
        targets=targets.flatten(),
        has_padding=False,
    )
