"""Samples to tensors: gathers and masks blocks into a batch of static shape.

    masking = Masking(seed=0, mask_ratio=0.15, vocab_size=len(dictionary))
    batch = build_batch(streams, order.samples(first, rows), masking)
    losses = model(batch)  # (B * K,) nats

With T = tokens_per_sample, a row is eos and a block of up to T - 1 tokens, or of a pair eos and a line, eos and its
translation, cut to T tokens; K = ceil(mask_ratio * (T - 1)).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from xlm_ds import _core
from xlm_ds.dictionary import MASK, PAD, Dictionary
from xlm_ds.order import Samples, evaluation_samples
from xlm_ds.streams import Stream

NO_LABEL = -1
# Rows of texts are filled up to a multiple of this: few shapes, and what tensor cores multiply fastest.
ROW_UNIT = 8


class MaskedBatch(NamedTuple):
    """Tensors on the CPU, int64, owned by the batch.

    input_ids         (B, T): eos, the masked block, padding
    languages         (B,): of a pair, of the first half
    masked_positions  (B * K,): index into the B * T positions, ascending within a row
    targets           (B * K,): what was at that position; PAD where a short row fills up with its own first position
    has_padding       some row is short
    second_languages  (B,): of the second half of a pair, else -1; None if no row is a pair
    second_starts     (B,): where in the row the second half begins, with its eos, else T; None if no row is a pair
    """

    input_ids: torch.Tensor
    languages: torch.Tensor
    masked_positions: torch.Tensor
    targets: torch.Tensor
    has_padding: bool
    second_languages: torch.Tensor | None = None
    second_starts: torch.Tensor | None = None


class Rows(NamedTuple):
    """Ids to be encoded, with nothing to predict.

    input_ids    (B, T): PAD behind the shorter ones
    languages    (B,)
    has_padding  some row is short
    """

    input_ids: torch.Tensor
    languages: torch.Tensor
    has_padding: bool


class LabelledBatch(NamedTuple):
    """Rows, each of which has a label.

    labels  (B,): its number, or NO_LABEL where a row only fills up the batch
    """

    rows: Rows
    labels: torch.Tensor


Batch = TypeVar("Batch", MaskedBatch, Rows, LabelledBatch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Masking:
    """Masks are decided by (seed, languages, pass, block); random words are the dictionary's, not special ones.

    With `word_goes_on` (Dictionary's), whole words are masked.
    """

    seed: int
    mask_ratio: float
    vocab_size: int
    word_goes_on: NDArray[np.uint64] | None = None


def build_masking(
    dictionary: Dictionary, *, seed: int, mask_ratio: float, whole_words: bool
) -> Masking:
    return Masking(
        seed=seed,
        mask_ratio=mask_ratio,
        vocab_size=len(dictionary),
        word_goes_on=dictionary.word_goes_on if whole_words else None,
    )


def build_batch(
    streams: Sequence[Stream | None], samples: Samples, masking: Masking
) -> MaskedBatch:
    """A batch of these samples of `streams`.

    Raises: InputError for a damaged file, or one made with another dictionary.
    """
    rows = len(samples.blocks)
    length = next(s.tokens_per_sample for s in streams if s is not None)
    targets_per_row = _core.masked_count(masking.mask_ratio, length - 1)
    input_ids = torch.empty((rows, length), dtype=torch.int64)
    languages, second_languages, second_starts = (np.empty(rows, np.int64) for _ in range(3))
    masked_positions = torch.empty(rows * targets_per_row, dtype=torch.int64)
    targets = torch.empty(rows * targets_per_row, dtype=torch.int64)
    has_padding, has_pairs = _core.fill_batch(
        _cores(streams),
        **_numbers(samples),
        seed=masking.seed,
        mask_ratio=masking.mask_ratio,
        vocab_size=masking.vocab_size,
        input_ids=input_ids.numpy(),
        languages=languages,
        second_languages=second_languages,
        second_starts=second_starts,
        masked_positions=masked_positions.numpy(),
        targets=targets.numpy(),
        word_goes_on=masking.word_goes_on,
    )
    halves = (second_languages, second_starts) if has_pairs else ()
    return MaskedBatch(
        input_ids,
        torch.from_numpy(languages),
        masked_positions,
        targets,
        has_padding,
        *map(torch.from_numpy, halves),
    )


def padded(rows: Sequence[NDArray[np.int32]], languages: NDArray[np.int64]) -> Rows:
    """Rows of ids, of a language (B,) each, as one batch on the CPU, PAD behind the shorter ones."""
    longest = max(map(len, rows))
    width = -(-longest // ROW_UNIT) * ROW_UNIT
    input_ids = torch.full((len(rows), width), PAD)
    for place, row in enumerate(rows):
        input_ids[place, : len(row)] = torch.from_numpy(row)
    return Rows(input_ids, torch.from_numpy(languages), min(map(len, rows)) < width)


def on_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch

    def there(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return copied_to(part, device)
        return on_device(part, device) if isinstance(part, Rows) else part

    return type(batch)(*map(there, batch))


def copied_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """From pageable memory torch's copy waits for everything the device has still to do."""
    return tensor.pin_memory().to(device, non_blocking=True)


def shows_mask(batch: MaskedBatch) -> torch.Tensor:
    """(B*K,): whether a target is shown as <mask>; a tenth of them show the target itself, a tenth another word."""
    shown = batch.input_ids.flatten().index_select(0, batch.masked_positions)
    return (shown == MASK) & (batch.targets != PAD)


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
        *_joined_halves(parts),
    )


def _joined_halves(parts: Sequence[MaskedBatch]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Second languages and starts, (B,) each, or None if no part has any."""
    if all(p.second_starts is None for p in parts):
        return None, None
    languages, starts = [], []
    for p in parts:
        length = p.input_ids.shape[1]
        missing = torch.full_like(p.languages, -1), torch.full_like(p.languages, length)
        languages.append(missing[0] if p.second_languages is None else p.second_languages)
        starts.append(missing[1] if p.second_starts is None else p.second_starts)
    return torch.cat(languages), torch.cat(starts)


def count_targets(streams: Sequence[Stream | None], samples: Samples, mask_ratio: float) -> int:
    """How many targets a batch of these samples has, without reading a token: every rank can know it for all."""
    return _core.count_targets(_cores(streams), **_numbers(samples), mask_ratio=mask_ratio)


def evaluation_batches(
    stream: Stream, masking: Masking, *, draw: int, rows: int, blocks: range | None = None
) -> Iterator[MaskedBatch]:
    """All blocks of one stream in sequence (or a rank's share of them) under the fixed masks of one draw.

    The last batch may have fewer rows; a block's masks do not depend on its batch.
    """
    blocks = range(stream.blocks) if blocks is None else blocks
    for first in range(0, len(blocks), rows):
        samples = evaluation_samples(blocks[first : first + rows], draw=draw)
        yield build_batch([stream], samples, masking)


def rank_slice(first: int, count: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous share of a rank in `count` samples from `first`: its first sample and how many.

    The shares are equal if world_size divides count; else the first ranks have one more.
    """
    share, rest = divmod(count, world_size)
    return first + rank * share + min(rank, rest), share + (rank < rest)


def _cores(streams: Sequence[Stream | None]) -> list[_core.Stream | None]:
    return [None if stream is None else stream.core for stream in streams]


def _numbers(samples: Samples) -> dict[str, NDArray[np.int64]]:
    return {"numbers": samples.streams, "passes": samples.passes, "blocks": samples.blocks}
