"""Samples to tensors: gathers and masks blocks into a batch of static shape.

    masking = Masking(seed=0, mask_ratio=0.15, vocab_size=len(dictionary))
    batch = build_batch(datasets, order.samples(first, rows), masking)
    losses = model(batch)  # (B * K,) nats

With T = tokens_per_sample, a row is eos and a block of up to T - 1 tokens; K = ceil(mask_ratio * (T - 1)).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from xlm_ds import _core
from xlm_ds.dataset import TokenDataset
from xlm_ds.dictionary import PAD
from xlm_ds.order import Samples, evaluation_samples


class MaskedBatch(NamedTuple):
    """Tensors on the CPU, int64, owned by the batch.

    input_ids         (B, T): eos, the masked block, padding
    languages         (B,)
    masked_positions  (B * K,): index into the B * T positions, ascending within a row
    targets           (B * K,): what was at that position; PAD where a short row fills up with its own first position
    has_padding       some row is short
    """

    input_ids: torch.Tensor
    languages: torch.Tensor
    masked_positions: torch.Tensor
    targets: torch.Tensor
    has_padding: bool


class Rows(NamedTuple):
    """Ids to be encoded, with nothing to predict.

    input_ids    (B, T): PAD behind the shorter ones
    languages    (B,)
    has_padding  some row is short
    """

    input_ids: torch.Tensor
    languages: torch.Tensor
    has_padding: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Masking:
    """Masks are decided by (seed, language, pass, block); random words are the dictionary's, not special ones."""

    seed: int
    mask_ratio: float
    vocab_size: int


def build_batch(
    datasets: Sequence[TokenDataset | None], samples: Samples, masking: Masking
) -> MaskedBatch:
    """A batch of these samples; `datasets` are in the order of the language ids.

    Raises: InputError for a damaged file, or one made with another dictionary.
    """
    rows = len(samples.blocks)
    length = next(d.tokens_per_sample for d in datasets if d is not None)
    targets_per_row = _core.masked_count(masking.mask_ratio, length - 1)
    input_ids = torch.empty((rows, length), dtype=torch.int64)
    masked_positions = torch.empty(rows * targets_per_row, dtype=torch.int64)
    targets = torch.empty(rows * targets_per_row, dtype=torch.int64)
    has_padding = _core.fill_batch(
        _cores(datasets),
        **samples._asdict(),
        seed=masking.seed,
        mask_ratio=masking.mask_ratio,
        vocab_size=masking.vocab_size,
        input_ids=input_ids.numpy(),
        masked_positions=masked_positions.numpy(),
        targets=targets.numpy(),
    )
    languages = torch.from_numpy(samples.languages)
    return MaskedBatch(input_ids, languages, masked_positions, targets, has_padding)


def join_batches(parts: Sequence[MaskedBatch]) -> MaskedBatch:
    """The rows of all parts as one batch. Where their mask ratios differ, the widest K is the batch's.

    A row with fewer targets fills up with its own first position and PAD, as a short one does.
    """
    if len(parts) == 1:
        return parts[0]
    rows, length = (sum(len(p.languages) for p in parts), parts[0].input_ids.shape[1])
    width = max(len(p.targets) // len(p.languages) for p in parts)
    masked_positions = (length * torch.arange(rows)).repeat_interleave(width).view(rows, width)
    targets = torch.full((rows, width), PAD)
    first = 0
    for part in parts:
        mine = slice(first, first + len(part.languages))
        count = len(part.targets) // len(part.languages)
        masked_positions[mine, :count] = part.masked_positions.view(-1, count) + first * length
        targets[mine, :count] = part.targets.view(-1, count)
        first = mine.stop
    return MaskedBatch(
        torch.cat([p.input_ids for p in parts]),
        torch.cat([p.languages for p in parts]),
        masked_positions.flatten(),
        targets.flatten(),
        any(p.has_padding for p in parts),
    )


def count_targets(
    datasets: Sequence[TokenDataset | None], samples: Samples, mask_ratio: float
) -> int:
    """How many targets a batch of these samples has, without reading a token: every rank can know it for all."""
    return _core.count_targets(_cores(datasets), **samples._asdict(), mask_ratio=mask_ratio)


def evaluation_batches(
    dataset: TokenDataset,
    language: int,
    masking: Masking,
    *,
    draw: int,
    rows: int,
    blocks: range | None = None,
) -> Iterator[MaskedBatch]:
    """All blocks of one language in sequence (or a rank's share of them) under the fixed masks of one draw.

    `language` is its id. The last batch may have fewer rows; a block's masks do not depend on its batch.
    """
    by_language = [*[None] * language, dataset]
    blocks = range(dataset.blocks) if blocks is None else blocks
    for first in range(0, len(blocks), rows):
        samples = evaluation_samples(language, blocks[first : first + rows], draw=draw)
        yield build_batch(by_language, samples, masking)


def rank_slice(first: int, count: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous share of a rank in `count` samples from `first`: its first sample and how many.

    The shares are equal if world_size divides count; else the first ranks have one more.
    """
    share, rest = divmod(count, world_size)
    return first + rank * share + min(rank, rest), share + (rank < rest)


def _cores(datasets: Sequence[TokenDataset | None]) -> list[_core.TokenDataset | None]:
    return [None if dataset is None else dataset.core for dataset in datasets]
