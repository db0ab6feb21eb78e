"""Perplexity and accuracy of a checkpoint, per language, per pair and overall, beside the unigram level.

    python -m xlm_ds.evaluate run OUT --split test

Every language, and every pair (TLM: a line beside its translation), is evaluated in full, under several fixed draws of
the masks, so the figures do not depend on the batch size or on the number of ranks. Of a --mask-ratio that changed
during the run the first value is used, as in the run's own validation, so that the figures of all its checkpoints
compare; a run with --whole-word-masking is evaluated with it. The unigram level is what one gets, on those masked
tokens that show <mask>, from nothing but add-one-smoothed counts of that language's (in a pair, that half's) training
text: a model above it has learnt nothing about context. The other fifth of them show a word, every second time the very
one, which a model that only copies gets right. With --xlm-masks also the figures of XLM's own evaluation, under its
names (valid_en_mlm_ppl, valid_en_fr_mlm_ppl).
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from xlm_ds.config import EvaluateConfig, TrainConfig, check_languages
from xlm_ds.flags import before_slow_imports, parse
from xlm_ds.log import EXIT_OK, InputError, logger, run_stage

if __name__ == "__main__":
    before_slow_imports(EvaluateConfig, description=__doc__)  # before torch is imported

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from xlm_ds.architectures import ModelShape, shape_from_config
from xlm_ds.batches import (
    MaskedBatch,
    Masking,
    build_batch,
    build_masking,
    evaluation_batches,
    on_device,
    rank_slice,
    shows_mask,
)
from xlm_ds.checkpoint import (
    check_files,
    checkpoint_folder,
    load_weights,
    read_configuration,
    read_manifest,
)
from xlm_ds.dictionary import PAD, Dictionary
from xlm_ds.engine import Ranks, start_ranks, stop_ranks
from xlm_ds.files import replacing
from xlm_ds.geometry import rows_that_fit
from xlm_ds.metrics import BITS_PER_NAT
from xlm_ds.model import XlmEncoder, build_model, in_second_half
from xlm_ds.order import evaluation_samples
from xlm_ds.streams import Choice, Stream, choose, has_split, open_streams
from xlm_ds.xlm_masks import every_nth, most_pairs, xlm_batches, xlm_pair_batches


class Score(NamedTuple):
    """One language's, or pair's, figures on a split."""

    language: str  # en, or en-de
    masked_tokens: int  # per mask draw
    loss: float  # bits per masked token
    perplexity: float
    accuracy: float  # percent
    tokens_at_mask: int  # of the masked tokens those that show <mask>, per draw
    perplexity_at_mask: float
    unigram_perplexity: float  # of those

    @property
    def below_unigram(self) -> float:
        """Percent by which the perplexity at <mask> is below the unigram level (negative: above it)."""
        return 100 * (1 - self.perplexity_at_mask / self.unigram_perplexity)


def sum_over_split(
    measure: Callable[[MaskedBatch], Tensor],
    stream: Stream,
    masking: Masking,
    *,
    draw: int,
    rows: int,
    ranks: Ranks,
) -> Tensor:
    """The sum of `measure(batch)` (float64, CPU) over all of a stream's blocks, the same on every rank.

    Every rank makes the same number of calls, as ZeRO 3 needs: one that has run out of blocks repeats a block without
    targets.
    """
    first, count = rank_slice(0, stream.blocks, rank=ranks.rank, world_size=ranks.world_size)
    _, most = rank_slice(0, stream.blocks, rank=0, world_size=ranks.world_size)
    batches = evaluation_batches(
        stream, masking, draw=draw, rows=rows, blocks=range(first, first + count)
    )
    total: Tensor | None = None
    with torch.no_grad():
        for _ in range(-(-most // rows)):
            batch = next(batches, None) or _without_targets(stream, masking)
            figures = measure(on_device(batch, ranks.device))
            total = figures if total is None else total + figures
    if total is None:
        raise InputError(f"{stream.name}: no tokens to evaluate")
    return ranks.sum(total)


def _without_targets(stream: Stream, masking: Masking) -> MaskedBatch:
    batch = build_batch([stream], evaluation_samples(range(1), draw=0), masking)
    return batch._replace(targets=torch.full_like(batch.targets, PAD))


def score(
    model: XlmEncoder,
    stream: Stream,
    masking: Masking,
    *,
    unigram_log_probabilities: Tensor,
    draws: int,
    rows: int,
    ranks: Ranks,
) -> Score:
    """One stream's figures, averaged over the mask draws 0, 1, … draws - 1.

    `unigram_log_probabilities`: (1, V), or of a pair (2, V), by halves.
    """

    def measure(batch: MaskedBatch) -> Tensor:
        """(6,): nats, targets, correct; of those that show <mask> number, nats, nats of the unigram model."""
        nats, real, correct = outcome(model, batch)
        at_mask = shows_mask(batch)
        unigram = -unigram_log_probabilities[half_of_targets(batch), batch.targets] * at_mask
        figures = (nats, real, correct, at_mask, nats * at_mask, unigram)
        return torch.stack([x.double().sum() for x in figures]).cpu()

    total = torch.zeros(6, dtype=torch.float64)
    for draw in range(draws):
        total += sum_over_split(measure, stream, masking, draw=draw, rows=rows, ranks=ranks)
    return _score_of(stream.name, total, draws)


def outcome(model: XlmEncoder, batch: MaskedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(B*K,) each: nats, which are targets, and which of those the model has right."""
    logits = model.logits(batch).float()
    real = batch.targets != PAD
    nats = functional.cross_entropy(logits, batch.targets, ignore_index=PAD, reduction="none")
    return nats, real, (logits.argmax(dim=-1) == batch.targets) & real


def half_of_targets(batch: MaskedBatch) -> Tensor:
    """(B*K,): 1 where the masked position is in the second half of a pair, else 0."""
    if batch.second_starts is None:
        return torch.zeros_like(batch.targets)
    is_second = in_second_half(batch.input_ids, batch.second_starts)
    return is_second.flatten()[batch.masked_positions].long()


def overall(scores: Sequence[Score]) -> Score:
    """All languages together, every masked token counting the same."""
    tokens = sum(s.masked_tokens for s in scores)
    at_mask = sum(s.tokens_at_mask for s in scores)
    mean_log = sum(math.log(s.perplexity) * s.masked_tokens for s in scores) / tokens
    accuracy = sum(s.accuracy * s.masked_tokens for s in scores) / tokens
    of_mask, of_unigram = (
        sum(math.log(perplexity) * s.tokens_at_mask for s, perplexity in perplexities)
        / max(at_mask, 1)
        for perplexities in (
            [(s, s.perplexity_at_mask) for s in scores],
            [(s, s.unigram_perplexity) for s in scores],
        )
    )
    return Score(
        "all",
        tokens,
        mean_log * BITS_PER_NAT,
        math.exp(mean_log),
        accuracy,
        at_mask,
        math.exp(of_mask),
        math.exp(of_unigram),
    )


def _score_of(language: str, sums: Tensor, draws: int) -> Score:
    nats, targets, correct, at_mask, nats_at_mask, unigram = sums.tolist()
    return Score(
        language,
        round(targets / draws),
        nats / targets * BITS_PER_NAT,
        math.exp(nats / targets),
        100 * correct / targets,
        round(at_mask / draws),
        math.exp(nats_at_mask / max(at_mask, 1)),
        math.exp(unigram / max(at_mask, 1)),
    )


def smoothed_log_probabilities(counts: NDArray[np.uint64]) -> Tensor:
    """(…, V) float32: log of the add-one-smoothed unigram distributions of counted tokens (…, V)."""
    smoothed = torch.from_numpy(counts.astype(np.float64)) + 1
    return torch.log(smoothed / smoothed.sum(dim=-1, keepdim=True)).float()


def load_model(folder: Path, vocab_size: int) -> tuple[XlmEncoder, TrainConfig]:
    """The network of a checkpoint with its weights, and the configuration it was trained with."""
    manifest = read_manifest(folder)
    trained = read_configuration(folder, manifest)
    shape = shape_of(trained, vocab_size=vocab_size, languages=len(manifest["languages"]))
    model = build_model(shape, seed=0)
    load_weights(model, folder, manifest)
    return model.eval(), trained


def shape_of(trained: TrainConfig, *, vocab_size: int, languages: int) -> ModelShape:
    """Of a model that has been trained with so many words and languages."""
    return shape_from_config(
        trained.model,
        vocab_size=vocab_size,
        languages=languages,
        tokens_per_sample=trained.data.tokens_per_sample,
    )


def table(scores: Sequence[Score]) -> str:
    """The scores as fixed-width text."""
    head = f"{'language':>8} {'masked':>8} {'bits':>7} {'ppl':>9} {'acc %':>6} {'at <mask>':>10}"
    head += f" {'unigram':>9} {'below %':>8}"
    lines = [
        f"{s.language:>8} {s.masked_tokens:>8} {s.loss:>7.3f} {s.perplexity:>9.1f} {s.accuracy:>6.2f} "
        f"{s.perplexity_at_mask:>10.1f} {s.unigram_perplexity:>9.1f} {s.below_unigram:>8.1f}"
        for s in scores
    ]
    return "\n".join([head, *lines])


class Subject(NamedTuple):
    """A model, and what it is evaluated on, all files open."""

    model: XlmEncoder
    trained: TrainConfig
    dictionary: Dictionary
    choice: Choice
    streams: tuple[Stream, ...]  # the split's
    training: tuple[Stream, ...]  # of the same languages and pairs, for their unigram levels


def open_subject(config: EvaluateConfig, ranks: Ranks) -> Subject:
    """Raises InputError for what the model does not know or the folder does not have."""
    folder = checkpoint_folder(config.checkpoint).resolve()
    manifest = read_manifest(folder)
    check_files(folder, manifest, ["dict.txt"])
    known = tuple(manifest["languages"])
    dictionary = Dictionary.load(folder / "dict.txt")
    model, trained = load_model(folder, len(dictionary))
    choice = chosen(config, trained, known)

    def opened(split: str) -> tuple[Stream, ...]:
        return open_streams(
            config.data,
            split,
            choice,
            tokens_per_sample=trained.data.tokens_per_sample,
            break_mode=trained.data.sample_break_mode,
            vocab_size=len(dictionary),
            dictionary_sha256=dictionary.sha256,
        )

    streams, training = opened(config.split), opened("train")
    return Subject(model.to(ranks.device), trained, dictionary, choice, streams, training)


def chosen(config: EvaluateConfig, trained: TrainConfig, known: Sequence[str]) -> Choice:
    """What is asked for, or else what the model was trained on and the folder has.

    Raises InputError for what the model does not know.
    """
    if config.mlm_steps and config.monolingual_langs:
        raise InputError("--monolingual-langs and --mlm-steps both say what to evaluate; give one")
    if config.monolingual_langs:
        check_languages(config.monolingual_langs, "--monolingual-langs")
        for language in config.monolingual_langs:
            if language not in known:
                raise InputError(
                    f"--monolingual-langs {language}: the model knows {', '.join(known)}"
                )
        streams = tuple((language,) for language in config.monolingual_langs)
        return Choice(tuple(known), streams)
    if config.mlm_steps:
        return choose(known, config.mlm_steps, None)
    choice = choose(known, trained.data.mlm_steps, None)
    there = tuple(s for s in choice.streams if has_split(config.data, config.split, s))
    if there and len(there) < len(choice.streams):
        missing = ", ".join("-".join(s) for s in choice.streams if s not in there)
        logger.warning(f"{config.data}: has no {config.split} of {missing}, left out")
    return choice._replace(streams=there or choice.streams)


def evaluate(config: EvaluateConfig, subject: Subject, ranks: Ranks) -> list[Score]:
    """The scores of every language and pair, then "all"."""
    data = subject.trained.data
    masking = build_masking(
        subject.dictionary,
        seed=config.seed,
        mask_ratio=data.mask_ratio.values[0],
        whole_words=data.whole_word_masking,
    )
    scores = []
    for stream, training in zip(subject.streams, subject.training, strict=True):
        unigram = smoothed_log_probabilities(training.counts())
        scores.append(
            score(
                subject.model,
                stream,
                masking,
                unigram_log_probabilities=unigram.to(ranks.device),
                draws=config.mask_draws,
                rows=rows_that_fit(config.max_tokens, data.tokens_per_sample),
                ranks=ranks,
            )
        )
        logger.info(f"{scores[-1].language}: perplexity {scores[-1].perplexity:.1f}")
    return [*scores, overall(scores)]


def evaluate_as_xlm(config: EvaluateConfig, subject: Subject, ranks: Ranks) -> dict[str, float]:
    """XLM's figures under its own names: SPLIT_LG_mlm_ppl and _acc (percent), SPLIT_LG_LG_mlm_ppl and _acc of a pair,
    and the means of the languages' figures, SPLIT_mlm_ppl and _acc.

    Raises InputError for a text too short for its part of it.
    """
    model, trained, dictionary, choice = subject[:4]
    languages = len(choice.languages)
    shape = shape_of(trained, vocab_size=len(dictionary), languages=languages)
    figures: dict[str, float] = {}
    of_languages: list[str] = []
    for names in choice.streams:
        (stream,) = open_streams(
            config.data,
            config.split,
            choice._replace(streams=(names,)),
            tokens_per_sample=shape.max_positions
            if len(names) == 2
            else trained.data.tokens_per_sample,
            break_mode="none",
            vocab_size=len(dictionary),
            dictionary_sha256=dictionary.sha256,
        )
        total = torch.zeros(3, dtype=torch.float64)
        for batch in _batches_of_xlm(stream, config, trained, languages=languages, ranks=ranks):
            with torch.no_grad():
                of_batch = outcome(model, on_device(batch, ranks.device))
            total += torch.stack([x.double().sum() for x in of_batch]).cpu()
        nats, targets, correct = ranks.sum(total).tolist()
        name = f"{config.split}_{'_'.join(names)}_mlm"
        figures |= {f"{name}_ppl": math.exp(nats / targets), f"{name}_acc": 100 * correct / targets}
        if not stream.is_pair:
            of_languages.append(name)
    for kind in ("ppl", "acc") if of_languages else ():
        found = [figures[f"{name}_{kind}"] for name in of_languages]
        figures[f"{config.split}_mlm_{kind}"] = sum(found) / len(found)
    return figures


def _batches_of_xlm(
    stream: Stream, config: EvaluateConfig, trained: TrainConfig, *, languages: int, ranks: Ranks
) -> Iterator[MaskedBatch]:
    """A rank's; says how many lines of a pair are cut."""
    first = stream.sides[0].language
    mask_ratio = trained.data.mask_ratio.values[0]
    if not stream.is_pair:
        return xlm_batches(
            stream.sides[0],
            stream.languages[0],
            mask_ratio=mask_ratio,
            rows=rows_that_fit(config.max_tokens, stream.tokens_per_sample),
            share=every_nth(first, config.split, languages),
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
    if cut := sum(side.count_cut() for side in stream.sides):
        logger.warning(
            f"--xlm-masks: {cut} lines of {config.split}.{stream.name} are longer than the {stream.tokens_per_sample} "
            "positions of the model and are cut"
        )
    return xlm_pair_batches(
        stream,
        mask_ratio=mask_ratio,
        max_tokens=config.max_tokens,
        most=most_pairs(first, config.split, languages),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def xlm_table(figures: Mapping[str, float]) -> str:
    """XLM's figures as fixed-width text."""
    return "\n".join(f"{name:>24} {value:>9.2f}" for name, value in figures.items())


def write_json(
    path: Path,
    config: EvaluateConfig,
    scores: Sequence[Score],
    xlm: Mapping[str, float] | None = None,
) -> None:
    content = {
        "checkpoint": str(config.checkpoint),
        "data": str(config.data),
        "split": config.split,
        "mask_draws": config.mask_draws,
        "seed": config.seed,
        "scores": [{**s._asdict(), "below_unigram": s.below_unigram} for s in scores],
        **(xlm or {}),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    config = parse(EvaluateConfig, argv, description=__doc__)
    folder = checkpoint_folder(config.checkpoint)
    output = config.output
    if output is None and not (config.mlm_steps or config.monolingual_langs):
        output = folder.with_name(f"{folder.name}-{config.split}.json")
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"--output {output}: not a file in a folder that is there")
    if config.xlm_masks and config.split == "train":
        raise InputError("--xlm-masks: XLM evaluates valid and test; give --split test")
    ranks = start_ranks()
    try:
        subject = open_subject(config, ranks)
        # First, as it may refuse a text that is too short for its part of it.
        xlm = evaluate_as_xlm(config, subject, ranks) if config.xlm_masks else {}
        scores = evaluate(config, subject, ranks)
        if ranks.rank == 0:
            sys.stdout.write("\n".join([table(scores), xlm_table(xlm)]).rstrip() + "\n")
            if output is not None:
                write_json(output, config, scores, xlm)
    finally:
        stop_ranks()
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_stage("evaluate", main, log_to=sys.stderr))  # the table alone is the output
