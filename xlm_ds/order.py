"""Data order as a pure function: sample number -> (stream, pass, block).

What enters are the streams' numbers of blocks, alpha and a seed; what leaves are columns of numbers, the same for any
world size, micro-batch or point of resumption:

    order = build_order([1200, 300], alpha=0.7, seed=0)
    streams, passes, blocks = order.samples(0, 8)
    order = build_order([1200, 300], alpha=Steps.parse("0.7@0,0.5@8000samples"), seed=0)

A stream is a language, drawn with p ∝ blocks^alpha (Conneau and Lample, 2019, section 3.1), or a pair of two, drawn so
among the pairs, which come after the languages and have a fixed share of all samples. After every prefix its count is
within a few samples of its quota (csrc/include/xlm_ds/order.hpp has the bound), and it goes through all its blocks, in
a new random order, before it meets one again. Where alpha changes, the quotas begin anew and the passes go on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xlm_ds import _core
from xlm_ds.steps import Steps

# Weights are whole numbers: the shares are then exact, and a last digit in which two machines' pow() differ cannot
# send them to different samples. The rarest of 100 languages at 1:10^4 keeps an error below 1e-5 of its share.
_WEIGHT_SCALE = 1 << 32


class Samples(NamedTuple):
    """Columns of the same length (n,), int64."""

    streams: NDArray[np.int64]
    passes: NDArray[np.int64]
    blocks: NDArray[np.int64]


class Segment(NamedTuple):
    """A part of a run: from this sample on the streams have these shares, as whole numbers."""

    first_sample: int
    weights: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The order of a run; the first segment begins at sample 0."""

    seed: int
    blocks: tuple[int, ...]
    segments: tuple[Segment, ...]
    core: _core.Order = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        core = _core.Order(seed=self.seed, segments=self.segments, blocks=self.blocks)
        object.__setattr__(self, "core", core)

    def probabilities(self, sample: int) -> NDArray[np.float64]:
        """The share of each stream around a sample, (S,): of n samples of its segment, its quota is n times this."""
        segment = next(s for s in reversed(self.segments) if s.first_sample <= sample)
        weights = np.array(segment.weights, np.float64)
        shares: NDArray[np.float64] = weights / weights.sum()
        return shares

    @property
    def epoch_samples(self) -> int:
        """An epoch is as many samples as there are blocks, whatever their streams."""
        return sum(self.blocks)

    def samples(self, first: int, count: int) -> Samples:
        """Samples first, first + 1, …; O(count)."""
        samples = Samples(*(np.empty(count, np.int64) for _ in Samples._fields))
        self.core.fill_samples(first, **samples._asdict())
        return samples


def build_order(
    blocks: Sequence[int],
    *,
    alpha: float | Steps,
    seed: int,
    pair_blocks: Sequence[int] = (),
    tlm_share: float = 0.5,
) -> Order:
    """The order over languages with these numbers of blocks (each at least 1), then pairs with theirs.

    Pairs have the share `tlm_share` of the samples where there are also languages. Steps of alpha are in samples.
    """
    steps = alpha.segments if isinstance(alpha, Steps) else [(0, alpha)]
    segments = tuple(
        Segment(first, mixed_weights(blocks, pair_blocks, alpha=value, tlm_share=tlm_share))
        for first, value in steps
    )
    return Order(seed=seed, blocks=(*blocks, *pair_blocks), segments=segments)


def mixed_weights(
    blocks: Sequence[int], pair_blocks: Sequence[int], *, alpha: float, tlm_share: float
) -> tuple[int, ...]:
    """Whole numbers for languages, then pairs: among themselves in proportion to blocks^alpha."""
    if not blocks or not pair_blocks:
        return sampling_weights(blocks or pair_blocks, alpha)
    shares: list[float] = []
    for share, counts in ((1 - tlm_share, blocks), (tlm_share, pair_blocks)):
        weights = sampling_weights(counts, alpha)
        shares += [share * weight / sum(weights) for weight in weights]
    return tuple(max(1, round(share / max(shares) * _WEIGHT_SCALE)) for share in shares)


def sampling_weights(blocks: Sequence[int], alpha: float) -> tuple[int, ...]:
    """Whole numbers in proportion to blocks^alpha; the largest is 2^32, none is below 1."""
    largest = max(blocks)
    return tuple(max(1, round((count / largest) ** alpha * _WEIGHT_SCALE)) for count in blocks)


def evaluation_samples(blocks: range, *, draw: int) -> Samples:
    """Blocks of the only stream in sequence; the number of the mask draw stands where training has the pass."""
    count = len(blocks)
    return Samples(
        np.zeros(count, np.int64),
        np.full(count, draw, np.int64),
        np.arange(blocks.start, blocks.stop, blocks.step, dtype=np.int64),
    )
