"""A number that may change during a run: a step function of the sample number, as one knob's value.

    alpha = Steps.parse("0.7@0,0.5@100000")  # 0.5 from update 100,000 on; Steps.parse("0.7") never changes
    alpha = alpha.in_samples(batch=512)      # "0.7@0,0.5@51200000samples"
    alpha.at(51_199_999)                     # 0.7

People think in updates, but a sample must depend on its own number alone and not on how large the updates are. So
updates become sample numbers once, when a run begins, and only sample numbers are written down.
"""

import re
from itertools import pairwise
from typing import NamedTuple, Self

_SUFFIX = "samples"
_END = 1 << 62  # sample numbers end there (csrc/src/order.cpp)


class Steps(NamedTuple):
    """values[i] holds from starts[i] on, up to the next start."""

    values: tuple[float, ...]
    starts: tuple[int, ...] = (0,)  # ascending from 0: updates, or samples
    counts_samples: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """`VALUE`, or `VALUE@0,VALUE@N,…` with N in updates or, all of them but 0, as `Nsamples`.

        Raises ValueError with what is wrong.
        """
        parts = [part.strip() for part in text.split(",")]
        if len(parts) == 1 and "@" not in text:
            return cls((_value(text),))
        pairs = [part.partition("@") for part in parts]
        for part, (_, at, _) in zip(parts, pairs, strict=True):
            if not at:
                raise ValueError(f"{part!r} does not say from where on; write VALUE@0,VALUE@UPDATE")
        starts = [_start(start) for _, _, start in pairs]
        if starts[0][0] != 0:
            raise ValueError("must start at update 0, as VALUE@0,VALUE@UPDATE")
        if any(after <= before for (before, _), (after, _) in pairwise(starts)):
            raise ValueError("updates must ascend, as 0.7@0,0.5@1000,0.3@2000")
        units = {samples for start, samples in starts if start or samples}
        if len(units) == 2:
            raise ValueError(f"counts updates and {_SUFFIX}; use one of them")
        return cls(
            tuple(_value(value) for value, _, _ in pairs),
            tuple(start for start, _ in starts),
            True in units,
        )

    def __str__(self) -> str:
        """The text that `parse` reads."""
        if len(self.values) == 1:
            return str(self.values[0])
        unit = _SUFFIX if self.counts_samples else ""
        pairs = zip(self.values, self.starts, strict=True)
        return ",".join(f"{value}@{start}{unit if start else ''}" for value, start in pairs)

    def in_samples(self, batch: int) -> Self:
        """The same with sample numbers; an update is `batch` samples. Raises ValueError if they end before."""
        if self.counts_samples or len(self.values) == 1:
            return self
        starts = tuple(start * batch for start in self.starts)
        if starts[-1] >= _END:
            raise ValueError(
                f"update {self.starts[-1]} is never reached: sample numbers end at 2^62"
            )
        return self._replace(starts=starts, counts_samples=True)

    def at(self, sample: int) -> float:
        """The value for a sample."""
        return next(value for start, value in reversed(self.segments) if start <= sample)

    @property
    def segments(self) -> list[tuple[int, float]]:
        """(first sample, value). Raises RuntimeError if updates have not become samples."""
        if len(self.values) > 1 and not self.counts_samples:
            raise RuntimeError(f"{self} counts updates; call in_samples first")
        return list(zip(self.starts, self.values, strict=True))


def _value(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number") from error


def _start(text: str) -> tuple[int, bool]:
    """A number of updates or samples, and whether it is samples."""
    match = re.fullmatch(rf"([0-9]+)({_SUFFIX})?", text.strip())
    if not match:
        raise ValueError(
            f"@{text} is not where a value can start; give a whole number of updates, as @100000"
        )
    if int(match[1]) >= _END:
        raise ValueError(f"@{text} is never reached: sample numbers end at 2^62")
    return int(match[1]), match[2] is not None
