"""What a run reads.

geometry = batch_geometry(config.optimization, config.data.tokens_per_sample, world_size=2)
corpus = open_corpus(with_sample_numbers(config.data, geometry.batch))
batch = micro_batch(corpus, geometry, first=geometry.first_sample(0, micro=0, rank=1))      # on the CPU
"""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from xlm_ds.batches import (
    MaskedBatch,
    Masking,
    build_batch,
    build_masking,
    count_targets,
    join_batches,
)
from xlm_ds.config import DataConfig
from xlm_ds.dataset import dictionary_path
from xlm_ds.dictionary import GOES_ON, Dictionary
from xlm_ds.geometry import Geometry
from xlm_ds.log import InputError, is_first_rank, logger
from xlm_ds.order import Order, build_order
from xlm_ds.steps import Steps
from xlm_ds.streams import Stream, choose, open_streams


class Corpus(NamedTuple):
    """Everything the run reads."""

    dictionary: Dictionary
    languages: tuple[str, ...]  # by id
    train: tuple[Stream, ...]  # languages by id, then pairs
    valid: tuple[Stream, ...]
    order: Order
    masking: Masking  # of the first sample, and of all validation, so that its losses compare
    mask_ratio: Steps

    @property
    def names(self) -> tuple[str, ...]:
        """Of the streams: en, or en-de."""
        return tuple(stream.name for stream in self.train)


def with_sample_numbers(config: DataConfig, batch: int) -> DataConfig:
    """The configuration with what changes during the run at sample numbers; an update is `batch` samples."""

    def resolved(flag: str, steps: Steps) -> Steps:
        try:
            return steps.in_samples(batch)
        except ValueError as error:
            raise InputError(f"{flag} {steps}: {error}") from error

    return dataclasses.replace(
        config,
        sampling_alpha=resolved("--sampling-alpha", config.sampling_alpha),
        mask_ratio=resolved("--mask-ratio", config.mask_ratio),
    )


def open_corpus(config: DataConfig) -> Corpus:
    """Opens dictionary, training and validation data and lays out the order. Reads no tokens.

    What changes during the run must be at sample numbers (`with_sample_numbers`).
    """
    if not config.data.is_dir():
        raise InputError(f"{config.data}: no such folder; give what binarize wrote (its --destdir)")
    choice = choose(config.monolingual_langs, config.mlm_steps, config.data)
    dictionary = Dictionary.load(dictionary_path(config.data, choice.languages))
    train, valid = (
        open_streams(
            config.data,
            split,
            choice,
            tokens_per_sample=config.tokens_per_sample,
            break_mode=config.sample_break_mode,
            vocab_size=len(dictionary),
            dictionary_sha256=dictionary.sha256,
        )
        for split in ("train", "valid")
    )
    pairs = [stream for stream in train if stream.is_pair]
    alone = [stream for stream in train if not stream.is_pair]
    if is_first_rank():
        _tell_cut(config, alone, pairs)
    sides = [side for stream in train + valid for side in stream.sides]
    if table_bytes := sum(side.core.table_bytes for side in sides):
        logger.info(
            f"the tables of break mode {config.sample_break_mode} take {table_bytes / 2**20:.1f} MiB in each process"
        )
    order = build_order(
        [stream.blocks for stream in alone],
        alpha=config.sampling_alpha,
        seed=config.seed,
        pair_blocks=[stream.blocks for stream in pairs],
        tlm_share=config.tlm_share,
    )
    masking = build_masking(
        dictionary,
        seed=config.seed,
        mask_ratio=config.mask_ratio.values[0],
        whole_words=config.whole_word_masking,
    )
    if config.whole_word_masking and not dictionary.word_goes_on.any() and is_first_rank():
        logger.info(
            f"--whole-word-masking: no symbol of the dictionary ends with {GOES_ON}, so every token is a whole word"
        )
    return Corpus(dictionary, choice.languages, train, valid, order, masking, config.mask_ratio)


def _tell_cut(config: DataConfig, alone: Sequence[Stream], pairs: Sequence[Stream]) -> None:
    tokens = config.tokens_per_sample
    if config.sample_break_mode != "none" and alone:
        cut = sum(stream.core.count_cut() for stream in alone)
        logger.info(f"{cut} lines are longer than {tokens - 1} tokens and are cut")
    if pairs:
        cut, whole = (
            sum(figures)
            for figures in zip(*((p.core.count_cut(), p.blocks) for p in pairs), strict=True)
        )
        logger.info(
            f"{cut} of {whole} pairs of lines are longer than {tokens} tokens, two eos included, and are cut"
        )


def micro_batch(corpus: Corpus, geometry: Geometry, *, first: int) -> MaskedBatch:
    """The micro-batch that begins at sample `first` (Geometry.first_sample).

    It is filled when it is needed, without loader processes or threads. One of eight ranks with 64 x 256 tokens spends
    50 microseconds on it and 47 on `update_targets` of all 512 rows (benchmarks/loader.py). xlm_base with 95,000
    symbols computes 8.9e12 operations from it: 6 x 75.5 million weights x 16,384 tokens in the layers, 6 x 97 million x
    2,496 masked tokens in the output. That is 22 ms on an H100 at 400e12 a second, 40 % of its peak (assumed, not
    measured): 0.44 % of a step, if nothing of it overlaps with the GPU's work.
    """
    parts = []
    for part, ratio in _parts(corpus.mask_ratio, first, geometry.rows):
        samples = corpus.order.samples(part.start, len(part))
        masking = dataclasses.replace(corpus.masking, mask_ratio=ratio)
        parts.append(build_batch(corpus.train, samples, masking))
    return join_batches(parts)


def update_targets(corpus: Corpus, geometry: Geometry, *, first: int) -> int:
    """The masked tokens of the update that begins at sample `first`, all ranks together; reads none of them."""
    return sum(
        count_targets(corpus.train, corpus.order.samples(part.start, len(part)), ratio)
        for part, ratio in _parts(corpus.mask_ratio, first, geometry.batch)
    )


def _parts(mask_ratio: Steps, first: int, count: int) -> Iterator[tuple[range, float]]:
    """Samples first, first + 1, … in parts of one mask ratio each.

    There is one part, unless the run was resumed with another batch and the ratio changes inside an update.
    """
    inside = [start for start in mask_ratio.starts if first < start < first + count]
    for start, end in pairwise([first, *inside, first + count]):
        yield range(start, end), mask_ratio.at(start)


def order_facts(corpus: Corpus, geometry: Geometry) -> dict[str, Any]:
    """What decides the samples of a run beside its flags."""
    blocks = {stream.name: stream.blocks for stream in corpus.train}
    return {"blocks": blocks, "batch_samples": geometry.batch}
