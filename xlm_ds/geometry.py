"""How the samples of an update are divided among ranks and micro-batches.

geometry = batch_geometry(config.optimization, config.data.tokens_per_sample, world_size=2)
geometry.batch  # samples of an update
"""

from typing import NamedTuple

from xlm_ds.config import OptimizationConfig
from xlm_ds.log import InputError


class Geometry(NamedTuple):
    """How the samples of one update are divided."""

    rows: int  # per rank and micro-batch
    accumulation: int  # micro-batches per rank
    world_size: int

    @property
    def batch(self) -> int:
        return self.rows * self.accumulation * self.world_size

    def first_sample(self, first: int, micro: int, rank: int) -> int:
        """Of a rank's micro-batch, in the update that begins at sample `first`; a rank has a contiguous slice of it."""
        return first + (rank * self.accumulation + micro) * self.rows


def batch_geometry(config: OptimizationConfig, tokens_per_sample: int, world_size: int) -> Geometry:
    """Raises InputError if no sample fits, or if --global-batch-tokens cannot be divided among the ranks."""
    rows = rows_that_fit(config.max_tokens, tokens_per_sample)
    if config.global_batch_tokens is None:
        return Geometry(rows, config.update_freq, world_size)
    samples, rest = divmod(config.global_batch_tokens, tokens_per_sample)
    if rest or samples == 0 or samples % world_size:
        unit = tokens_per_sample * world_size
        nearest = max(round(config.global_batch_tokens / unit), 1) * unit
        raise InputError(
            f"--global-batch-tokens {config.global_batch_tokens} cannot be divided into samples of "
            f"{tokens_per_sample} tokens for {world_size} ranks; the nearest that can is {nearest}"
        )
    return divided(samples, rows, world_size)


def divided(
    batch: int, rows: int, world_size: int, flag: str = "--global-batch-tokens"
) -> Geometry:
    """A batch of so many samples in micro-batches of at most `rows`. Raises InputError, which names the flag that owns
    the batch, if ranks would have different shares."""
    share, rest = divmod(batch, world_size)
    if rest:
        possible = [n for n in range(1, batch + 1) if batch % n == 0]
        near = sorted(sorted(possible, key=lambda n: abs(n - world_size))[:6])
        raise InputError(
            f"the run has {batch} samples an update, which {world_size} ranks cannot share evenly; start it with "
            f"{', '.join(map(str, near))} ranks, or give another batch: {flag}"
        )
    fitting = next(r for r in range(min(rows, share), 0, -1) if share % r == 0)
    return Geometry(fitting, share // fitting, world_size)


def rows_that_fit(max_tokens: int, tokens_per_sample: int) -> int:
    """Samples in a micro-batch of at most `max_tokens` tokens. Raises InputError if there is no room for one."""
    if max_tokens < tokens_per_sample:
        raise InputError(
            f"--max-tokens {max_tokens} is below --tokens-per-sample {tokens_per_sample}; one sample must fit"
        )
    return max_tokens // tokens_per_sample
