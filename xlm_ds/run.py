"""A run: what it is made of, how it begins anew or goes on, and what is told and kept of it.

    run, progress = begin_run(config, ranks, hosts)         # from the start, or from its last checkpoint
    progress, best = validated(run, progress)
    save(run, progress, [LAST, BEST] if best else [LAST])

train.py has the loop.
"""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xlm_ds import checkpoint
from xlm_ds.architectures import ModelShape, parameter_count
from xlm_ds.batches import LabelledBatch, MaskedBatch, on_device, shows_mask
from xlm_ds.checkpoint import BEST, LAST, PREVIOUS, Progress, Saver
from xlm_ds.config import CommonRunConfig, FinetuneConfig, LearningConfig, RunConfig, TrainConfig
from xlm_ds.corpus import Corpus, micro_batch, open_corpus, order_facts, with_sample_numbers
from xlm_ds.deepspeed_config import (
    default_deepspeed_config,
    precision_of,
    read_deepspeed_config,
    resolve_deepspeed_config,
    with_monitor_folder,
)
from xlm_ds.dictionary import PAD, Dictionary
from xlm_ds.digests import FILE, Digests, begin_file
from xlm_ds.engine import Engine, Ranks
from xlm_ds.evaluate import shape_of, sum_over_split
from xlm_ds.flags import to_dict, to_toml
from xlm_ds.geometry import Geometry, batch_geometry, divided, rows_that_fit
from xlm_ds.init_from import fitting_rows, open_source, take_weights
from xlm_ds.lifeline import LOGS
from xlm_ds.log import InputError, logger
from xlm_ds.metrics import (
    NO_SAMPLE,
    WORK,
    LossMeter,
    RunLog,
    SlowHosts,
    Stopwatch,
    UnigramWatch,
    loss_figures,
)
from xlm_ds.model import XlmEncoder, build_model, init_output_bias, unigram_log_probabilities
from xlm_ds.pair_record import load_companions
from xlm_ds.pretrained import longest_row
from xlm_ds.retrieve import (
    AlignedRows,
    by_direction,
    find_aligned,
    read_all_aligned,
    retrieve_on_ranks,
)
from xlm_ds.schedule import check_schedule, describe_schedule, lr_at, plateau_after, without_best
from xlm_ds.streams import choose
from xlm_ds.text_ids import TextToIds

Saved = tuple[Path, dict[str, Any]]  # a checkpoint's folder and its manifest
GO_ON = (
    "lower --lr or set --clip-norm and start again: the run goes on from its last checkpoint in "
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run is made of, from its begin to its end. Where it stands is its Progress."""

    config: TrainConfig  # with the languages and sample numbers that it has come to
    corpus: Corpus
    geometry: Geometry
    engine: Engine
    digests: Digests
    saver: Saver
    log: RunLog
    companions: Mapping[str, bytes]  # files of the data that go into each checkpoint; on rank 0
    meter: LossMeter
    unigram: UnigramWatch
    stopwatch: Stopwatch
    slow_hosts: SlowHosts
    aligned: Sequence[AlignedRows]  # what retrieval is measured on

    @property
    def ranks(self) -> Ranks:
        return self.engine.ranks


# ------------------------------------------------------------------------------------------ begin


def check(config: TrainConfig, ranks: Ranks) -> None:
    """Raises InputError for what can be refused before anything is made; for process.run_on_ranks."""
    refuse_if_a_name_is_a_folder(config.run.save_dir)
    check_schedule(config.optimization)
    saved = seen_checkpoint(config.run)
    geometry = run_geometry(config, saved, ranks.world_size)
    deepspeed_settings(config.optimization, config.run, geometry, ranks)
    check_retrieval(config.run)
    data = with_sample_numbers(config.data, batch_at_start(saved, geometry))
    corpus = open_corpus(data)
    network_shape(config, corpus)
    if saved is not None:
        checkpoint.check_can_go_on(*saved)
        check_same_data(dataclasses.replace(config, data=data), corpus, geometry, *saved)
        check_same_network(config, corpus, *saved)
    else:
        check_source(config, corpus)
    if config.run.retrieve_data is not None:
        find_aligned(config.run.retrieve_data, corpus.languages)


def seen_checkpoint(options: CommonRunConfig) -> Saved | None:
    """What a run would go on from, as far as it can be seen while its folder may be another's; None if it is new.

    None also where something is amiss there: a killed save may be under way or be made good when the folder is taken,
    and find_whole goes round what is damaged.
    """
    try:
        folder = checkpoint.find_checkpoint(options.save_dir, options.restore_file)
        return None if folder is None else (folder, checkpoint.read_manifest(folder))
    except InputError:
        name = options.restore_file
        if name != LAST and not (os.path.lexists(options.save_dir / name) or os.path.lexists(name)):
            raise
        return None


def begin_run(config: TrainConfig, ranks: Ranks, hosts: Sequence[str]) -> tuple[Run, Progress]:
    """The run from its start, or from the checkpoint that it goes on from; opens and says what there is to say.

    `hosts`: each rank's. All ranks must call it. Raises InputError, OSError.
    """
    refuse_if_a_name_is_a_folder(config.run.save_dir)
    saved = checkpoint.find_whole(config.run.save_dir, config.run.restore_file, ranks)
    geometry = run_geometry(config, saved, ranks.world_size)
    data = with_sample_numbers(config.data, batch_at_start(saved, geometry))
    corpus = open_corpus(data)
    data = dataclasses.replace(data, monolingual_langs=corpus.languages)
    config = dataclasses.replace(config, data=data)
    if saved is not None:
        config = with_origin(config, *saved)
    aligned = read_aligned_texts(config, corpus)
    engine, progress = build_engine(config, corpus, geometry, ranks, saved)
    run = Run(
        config=config,
        corpus=corpus,
        geometry=geometry,
        engine=engine,
        digests=start_digests(config.run, engine, geometry, progress),
        saver=Saver(ranks),
        companions=read_companions(corpus.dictionary, data.data, ranks),
        meter=LossMeter([stream.languages for stream in corpus.train], ranks.device),
        unigram=UnigramWatch(
            corpus.train,
            corpus.valid,
            config.optimization,
            geometry.batch * data.tokens_per_sample,
        ),
        stopwatch=Stopwatch(
            network_shape(config, corpus),
            data.tokens_per_sample,
            ranks.device,
            ranks.world_size,
            precision_of(engine.settings),
        ),
        slow_hosts=SlowHosts(hosts),
        log=open_log(config, engine, progress),
        aligned=aligned,
    )
    describe(run, progress)
    return run, progress


def with_origin(config: TrainConfig, folder: Path, manifest: Mapping[str, Any]) -> TrainConfig:
    """With the --init-from that the run was begun with, which now decides nothing."""
    before = checkpoint.read_configuration(folder, manifest).run.init_from
    if config.run.init_from is not None:
        logger.info(f"--init-from: decides nothing, as the run goes on from {folder}")
    return dataclasses.replace(config, run=dataclasses.replace(config.run, init_from=before))


def run_geometry(config: TrainConfig, saved: Saved | None, world_size: int) -> Geometry:
    """How an update is divided: by the flags, or where they are those of the checkpoint, so that its batch stays.

    Raises InputError if the batch cannot be divided among so many ranks.
    """
    tokens = config.data.tokens_per_sample
    if saved is not None:
        folder, manifest = saved
        before = checkpoint.read_configuration(folder, manifest)
        if batch_flags(before) == batch_flags(config):
            rows = rows_that_fit(config.optimization.max_tokens, tokens)
            return divided(int(manifest["batch_samples"]), rows, world_size)
    return batch_geometry(config.optimization, tokens, world_size)


def batch_flags(config: TrainConfig) -> tuple[int | None, ...]:
    """Those that decide the batch of so many ranks."""
    given = config.optimization
    return (
        *(given.max_tokens, given.update_freq, given.global_batch_tokens),
        config.data.tokens_per_sample,
    )


def batch_at_start(saved: Saved | None, geometry: Geometry) -> int:
    """Samples of an update when the run began: what 100000 in --sampling-alpha 0.7@0,0.5@100000 counts.

    A run that goes on with another batch keeps what it was begun with, so that the same flags mean the same samples.
    """
    if saved is None:
        return geometry.batch
    _, manifest = saved
    return checkpoint.read_progress(manifest).batch_at_start or int(manifest["batch_samples"])


def refuse_if_a_name_is_a_folder(save_dir: Path) -> None:
    """A run's folder that was copied with its links followed has folders where the links were."""
    for name in (LAST, PREVIOUS, BEST):
        if (save_dir / name).is_dir() and not (save_dir / name).is_symlink():
            raise InputError(
                f"{save_dir / name}: is a folder, where a run has a link; go on in a new --save-dir with "
                f"--restore-file {save_dir / name}"
            )


def build_engine(
    config: TrainConfig,
    corpus: Corpus,
    geometry: Geometry,
    ranks: Ranks,
    saved: Saved | None,
) -> tuple[Engine, Progress]:
    """The model in its engine, from the start or from the checkpoint that the run goes on from."""
    check_schedule(config.optimization)
    settings, path = deepspeed_settings(config.optimization, config.run, geometry, ranks)
    shape = network_shape(config, corpus)
    logger.info(f"{config.model.arch}: {parameter_count(shape):,} parameters; {path}")
    model = build_model(shape, seed=config.data.seed)
    compiles = ranks.device.type == "cuda" and not config.run.no_compile
    if saved is None:
        if config.model.init_output_bias == "unigram":
            counts = np.stack([stream.counts().sum(axis=0) for stream in corpus.train])
            probabilities = corpus.order.probabilities(0)
            init_output_bias(
                model, unigram_log_probabilities(counts, language_probabilities=probabilities)
            )
        if config.run.init_from is not None:
            for sentence in begin_from(model, config, corpus):
                logger.info(sentence)
        return Engine(model, settings, ranks, compiles=compiles, where=str(path)), Progress(
            batch_at_start=geometry.batch
        )
    check_same_data(config, corpus, geometry, *saved)
    batch = on_device(micro_batch(corpus, geometry, first=0), ranks.device)
    engine, progress = gone_on(
        model,
        lambda: Engine(model, settings, ranks, compiles=compiles, where=str(path)),
        saved,
        batch,
    )
    return engine, with_comparable_best(config, progress, saved, ranks)


def check_source(config: TrainConfig, corpus: Corpus) -> None:
    """Raises InputError or OSError if --init-from is given and its model does not fit."""
    path = config.run.init_from
    if path is not None:
        source = open_source(path, corpus.languages)
        fitting_rows(network_shape(config, corpus), source, corpus.dictionary, str(path))


def begin_from(model: XlmEncoder, config: TrainConfig, corpus: Corpus) -> list[str]:
    """Puts the weights of --init-from into `model`; returns what there is to say. Raises InputError, OSError."""
    path = config.run.init_from
    assert path is not None
    source = open_source(path, corpus.languages)
    shape = network_shape(config, corpus)
    taken = take_weights(model, shape, source, corpus.dictionary, corpus.languages, str(path))
    counts = np.stack([stream.counts().sum(axis=0) for stream in corpus.train]).sum(axis=0)
    return taken.report(counts)


def gone_on(
    model: nn.Module,
    start: Callable[[], Engine],
    saved: Saved,
    warm_up_batch: MaskedBatch | LabelledBatch,
) -> tuple[Engine, Progress]:
    """`model`, in the engine that `start` puts it in, as it was saved."""
    folder, manifest = saved
    state = checkpoint.stored_state(folder, manifest)
    checkpoint.copy_weights(model, state["weight"], folder)
    engine = start()
    progress = checkpoint.read_progress(manifest)
    engine.load_state(
        state,
        update=progress.update,
        skipped=progress.skipped_updates,
        samples=progress.samples,
        warm_up_batch=warm_up_batch,
    )
    logger.info(f"going on from {folder}: update {progress.update}, {progress.samples} samples")
    return engine, progress


def with_comparable_best(
    config: TrainConfig, progress: Progress, saved: Saved, ranks: Ranks
) -> Progress:
    """`progress` without a best loss that is of another validation, or that no checkpoint here has."""
    folder, manifest = saved
    before = what_is_validated(checkpoint.read_configuration(folder, manifest))
    if before != what_is_validated(config):
        logger.info("validation is another than before: the best checkpoint is looked for anew")
        return dataclasses.replace(
            progress, best_valid_loss=None, plateau=without_best(progress.plateau)
        )
    is_here: bool = ranks.gathered((config.run.save_dir / BEST).exists())[0]
    return progress if is_here else dataclasses.replace(progress, best_valid_loss=None)


def what_is_validated(config: TrainConfig) -> tuple[Any, ...]:
    """What two validations must have in common for their losses to compare."""
    data = config.data
    streams = choose(data.monolingual_langs, data.mlm_steps, None).streams
    return (
        *(streams, data.tokens_per_sample, data.sample_break_mode),
        *(data.mask_ratio.values[0], data.whole_word_masking),
    )


def deepspeed_settings(
    optimization: LearningConfig, options: CommonRunConfig, geometry: Geometry, ranks: Ranks
) -> tuple[dict[str, Any], Path]:
    """DeepSpeed's configuration with the run's numbers, and the file that it is made from."""
    path = options.deepspeed_config or default_deepspeed_config(ranks.device.type)
    settings = resolve_deepspeed_config(
        read_deepspeed_config(path, ranks.device.type),
        optimization,
        rows=geometry.rows,
        accumulation=geometry.accumulation,
        where=str(path),
    )
    return with_monitor_folder(settings, options.save_dir / "monitors"), path


def read_companions(dictionary: Dictionary, folder: Path, ranks: Ranks) -> dict[str, bytes]:
    """What text needs to become ids, by name of the file; on rank 0."""
    companions = {}

    def read() -> None:
        companions["dict.txt"] = dictionary.text.encode()
        companions.update(load_companions(folder))

    ranks.on_first(read)
    return companions


def read_aligned_texts(config: TrainConfig, corpus: Corpus) -> list[AlignedRows]:
    """Those of --retrieve-data, as ids. Raises InputError as check_retrieval and read_all_aligned."""
    check_retrieval(config.run)
    source = config.run.retrieve_data
    if source is None:
        return []
    to_ids = TextToIds.load(config.data.data, corpus.dictionary)
    longest = longest_row(config, corpus.dictionary, corpus.languages)
    return read_all_aligned(source, corpus.languages, to_ids, longest)


def check_retrieval(options: RunConfig) -> None:
    """Raises InputError unless the flags go together."""
    if (options.retrieve_data is None) != (options.retrieve_interval_updates == 0):
        raise InputError(
            "--retrieve-data and --retrieve-interval-updates go together; give both or neither"
        )


def network_shape(config: TrainConfig, corpus: Corpus) -> ModelShape:
    return shape_of(config, vocab_size=len(corpus.dictionary), languages=len(corpus.languages))


def check_same_network(
    config: TrainConfig, corpus: Corpus, folder: Path, manifest: Mapping[str, Any]
) -> None:
    """Refuses another architecture than the checkpoint's; dropout may change."""
    trained = checkpoint.read_configuration(folder, manifest)
    before, now = (dataclasses.asdict(network_shape(c, corpus)) for c in (trained, config))
    changes = [
        f"{name} was {before[name]} and is now {now[name]}"
        for name in now
        if before[name] != now[name] and "dropout" not in name
    ]
    if changes:
        raise InputError(
            f"{folder}: another architecture: {', '.join(changes)}; give the flags it was trained with"
        )


def check_same_data(
    config: TrainConfig,
    corpus: Corpus,
    geometry: Geometry,
    folder: Path,
    manifest: Mapping[str, Any],
) -> None:
    """Refuses a dictionary or languages that are not the checkpoint's; says what else changes the samples to come."""
    if manifest["dictionary_sha256"] != corpus.dictionary.sha256:
        raise InputError(
            f"{config.data.data}: its dictionary is not the one {folder} was trained with; "
            "binarize with the dict.txt in that folder as --srcdict"
        )
    if tuple(manifest["languages"]) != corpus.languages:
        raise InputError(
            f"--monolingual-langs {','.join(corpus.languages)}: {folder} was trained with "
            f"{','.join(manifest['languages'])}, and the order gives the language ids"
        )
    trained = dataclasses.asdict(checkpoint.read_configuration(folder, manifest).data)
    before = {**trained, "blocks": manifest["blocks"], "batch_samples": manifest["batch_samples"]}
    now = {**dataclasses.asdict(config.data), **order_facts(corpus, geometry)}
    for name in sorted(now.keys() - {"data", "monolingual_langs"}):
        if before[name] != now[name]:
            logger.info(
                f"{name} was {before[name]} and is now {now[name]}: the samples from here on are others than they "
                "would have been"
            )


def start_digests(
    run: CommonRunConfig, engine: Engine, geometry: Geometry, progress: Progress
) -> Digests:
    """The run's digests, which go on where the checkpoint's were."""
    stage = engine.settings["zero_optimization"]["stage"]
    path = run.save_dir / FILE
    names = [name for name, _, _ in engine.master_fragments()]
    engine.ranks.on_first(
        lambda: begin_file(path, names, update=progress.update, chains=progress.chains)
    )
    return Digests(
        path if engine.ranks.rank == 0 else None,
        progress.chains,
        interval=run.digest_interval,
        computed=f"{geometry.world_size} ranks, {geometry.accumulation} x {geometry.rows} rows, ZeRO {stage} in "
        f"{precision_of(engine.settings)}",
        masters=engine.master_fragments,
        sum_over_ranks=engine.ranks.sum,
    )


def open_log(config: TrainConfig | FinetuneConfig, engine: Engine, progress: Progress) -> RunLog:
    """Opens the run's files and writes the resolved configuration there."""
    run = config.run
    active = engine.ranks.rank == 0
    log = RunLog(
        run.save_dir,
        run.tensorboard_logdir or run.save_dir / "tensorboard",
        active=active,
        updates=config.optimization.max_update,
        start=progress.update,
        profile=run.profile,
        monitor=engine.write_events,
    )
    if active:
        (run.save_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
        settings = json.dumps(engine.settings, indent=1)
        (run.save_dir / "deepspeed.json").write_text(settings + "\n", encoding="utf-8")
    return log


def describe(run: Run, progress: Progress) -> None:
    """Says what will happen."""
    corpus, geometry, data = run.corpus, run.geometry, run.config.data
    tokens = geometry.batch * data.tokens_per_sample
    epoch = corpus.order.epoch_samples
    probabilities = corpus.order.probabilities(progress.samples)
    shares = zip(corpus.train, probabilities, strict=True)
    drawn = ", ".join(
        f"{s.name} {s.blocks} {'pairs' if s.is_pair else 'blocks'} drawn {p:.1%}" for s, p in shares
    )
    logger.info(f"{len(corpus.dictionary)} symbols; {drawn}")
    for name, steps in (("alpha", data.sampling_alpha), ("mask ratio", data.mask_ratio)):
        if len(steps.values) > 1:
            logger.info(f"{name} over the run: {steps}, now {steps.at(progress.samples)}")
    logger.info(describe_schedule(run.config.optimization))
    logger.info(
        f"batch: {geometry.batch} samples = {tokens} tokens an update ({geometry.rows} rows x "
        f"{geometry.accumulation} micro-batches x {geometry.world_size} ranks); an epoch is {epoch} samples, "
        f"{math.ceil(epoch / geometry.batch)} updates; tokens per second are all tokens, not the masked ones alone"
    )
    fitting = rows_that_fit(run.config.optimization.max_tokens, data.tokens_per_sample)
    if 2 * geometry.rows < fitting:
        logger.warning(
            f"{fitting} rows would fit into a micro-batch, but {geometry.batch} samples of {geometry.world_size} ranks "
            f"can only be divided into {geometry.rows} at a time, which is slow; another number of ranks, or of "
            "samples (--global-batch-tokens), may divide better"
        )
    logger.info(run.stopwatch.definition(corpus.mask_ratio.at(progress.samples)))
    logger.info(run.unigram.definition())


def seed_dropout(seed: int, update: int, micro: int, rank: int) -> None:
    """Dropout depends on where in the run it is and on nothing before, so no generator's state is saved."""
    key = hashlib.blake2b(f"{seed}/{update}/{micro}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(key, "little"))


# ------------------------------------------------------------------------------- figures and saves


def logged(run: Run, progress: Progress) -> Progress:
    """Writes the figures since this was last called, and looks whether the run is to go on; `progress` with its chains.

    All ranks must call it. Raises InputError if too many updates were skipped.
    """
    ranks, engine, optimization = run.ranks, run.engine, run.config.optimization
    progress = dataclasses.replace(progress, chains=run.digests.write())
    engine.check()
    sums = ranks.sum(run.meter.take())
    figures = loss_figures(sums, run.corpus.names, run.unigram.train)
    figures |= update_figures(engine, optimization, progress)
    check_skipped(run, progress)
    progress = dataclasses.replace(progress, skipped_updates=engine.skipped_updates())
    epoch = progress.samples / run.corpus.order.epoch_samples
    figures |= {"epoch": epoch, **run.stopwatch.take(), **time_left(optimization, progress)}
    run.log.write("train", progress.update, figures)
    run.slow_hosts.watch(ranks.each(sum(figures["seconds"][part] for part in WORK)))
    run.unigram.watch(sums, progress.update)
    return progress


def update_figures(
    engine: Engine, optimization: LearningConfig, progress: Progress
) -> dict[str, float]:
    """Of the last update."""
    figures = {
        "lr": lr_at(progress.update - 1, optimization, progress.plateau),
        "gradient_norm": engine.gradient_norm(),
    }
    skipped = engine.skipped_updates()
    return {**figures, "skipped_updates": skipped} if skipped else figures


def time_left(optimization: LearningConfig, progress: Progress) -> dict[str, int]:
    if optimization.max_update == 0:
        return {}
    left = optimization.max_update - progress.update
    return {"seconds_left": round(left * progress.seconds / progress.update)}


def check_skipped(run: Run, progress: Progress) -> None:
    """Raises InputError, on all ranks, if too many updates in a row were skipped; says what they were made of."""
    length, begin = run.engine.skipped_in_a_row()
    if length == 0:
        run.meter.forget_bad_sample()
    if not too_many_skipped(run.engine, run.config.run):
        return
    batch = run.geometry.batch
    first = progress.samples - (progress.update - begin) * batch
    bad = -run.ranks.largest(-run.meter.bad_sample())[0]
    culprit = (
        f"; the loss of {describe_sample(run.corpus, bad)} is not finite"
        if first <= bad < NO_SAMPLE  # or it is of an update that was skipped by itself
        else ""
    )
    raise skipped_too_many(
        run.engine,
        run.config.run,
        f", of the samples {first} to {first + batch - 1}{culprit}",
    )


def too_many_skipped(engine: Engine, options: CommonRunConfig) -> bool:
    length, _ = engine.skipped_in_a_row()
    return length >= options.max_skipped_updates and precision_of(engine.settings) != "fp16"


def skipped_too_many(engine: Engine, options: CommonRunConfig, made_of: str = "") -> InputError:
    """`made_of`: what the first of them was."""
    length, begin = engine.skipped_in_a_row()
    return InputError(
        f"{length} updates in a row were skipped, as their gradient was not finite: the first is update {begin + 1}"
        f"{made_of}; {GO_ON}{options.save_dir}, if it has made one"
    )


def describe_sample(corpus: Corpus, sample: int) -> str:
    found = corpus.order.samples(sample, 1)
    stream = corpus.train[int(found.streams[0])]
    what = "pair" if stream.is_pair else "block"
    return f"sample {sample} ({what} {found.blocks[0]} of train.{stream.name})"


def validated(run: Run, progress: Progress) -> tuple[Progress, bool]:
    """Validates; returns the progress with the schedule moved, and whether this is the best so far (as good counts)."""
    run.stopwatch.enter("validation")
    figures = loss_figures(validate(run), run.corpus.names, run.unigram.valid)
    run.log.write("valid", progress.update, figures)
    loss = float(figures["loss"])
    check_finite(loss, progress, run.config.run)
    best = progress.best_valid_loss is None or loss <= progress.best_valid_loss
    optimization = run.config.optimization
    plateau = plateau_after(progress.plateau, loss, optimization, update=progress.update)
    progress = dataclasses.replace(
        progress,
        plateau=plateau,
        best_valid_loss=loss if best else progress.best_valid_loss,
        validation_due=False,
    )
    return progress, best


def validate(run: Run) -> Tensor:
    """(4, S), as LossMeter has it, of every stream in full, under fixed masks."""

    def measure(batch: MaskedBatch) -> Tensor:
        """(4,): nats, targets; and of those that show <mask>."""
        nats, at_mask = run.engine(batch), shows_mask(batch)
        figures = (nats, batch.targets != PAD, nats * at_mask, at_mask)
        return torch.stack([x.double().sum() for x in figures]).cpu()

    run.engine.train(False)
    sums = [
        sum_over_split(
            measure,
            stream,
            run.corpus.masking,
            draw=0,
            rows=run.geometry.rows,
            ranks=run.ranks,
        )
        for stream in run.corpus.valid
    ]
    return torch.stack(sums, dim=1)


def retrieved(run: Run, progress: Progress) -> Progress:
    """Measures retrieval on every pair of --retrieve-data and writes it down. All ranks must call it."""
    run.stopwatch.enter("validation")
    run.engine.train(False)
    figures: dict[str, dict[str, float]] = {"cosine": {}, "margin": {}}
    for aligned in run.aligned:
        one, other = (run.corpus.languages.index(language) for language in aligned.languages)
        found = retrieve_on_ranks(
            aligned,
            run.engine,
            (one, other),
            rows_at_once=run.geometry.rows,
            ranks=run.ranks,
        )
        for kind, directions in by_direction(aligned.languages, found).items():
            figures[kind] |= directions
    if run.aligned:  # else the flags are no longer given
        run.log.write("retrieve", progress.update, figures)
    return dataclasses.replace(progress, retrieval_due=False)


def check_finite(loss: float, progress: Progress, run: CommonRunConfig) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"the validation loss is not finite at update {progress.update}; {GO_ON}{run.save_dir}, if it has made one"
        )


def save(run: Run, progress: Progress, names: Sequence[str]) -> None:
    """Begins to write a checkpoint; once it is whole, names it and deletes those that nothing keeps.

    All ranks must call it.
    """
    run.stopwatch.enter("checkpoint")
    config, corpus, geometry, options = run.config, run.corpus, run.geometry, run.config.run
    epoch_samples = corpus.order.epoch_samples
    # The epoch that has just ended, or else the one that is under way.
    epoch = max((progress.samples - geometry.batch) // epoch_samples + 1, 1)
    folder = options.save_dir / checkpoint.folder_name(epoch, progress.update)
    description = {
        "configuration": to_dict(config),
        "languages": list(corpus.languages),
        "vocab_size": len(corpus.dictionary),
        "dictionary_sha256": corpus.dictionary.sha256,
        "epoch_samples": epoch_samples,
        **order_facts(corpus, geometry),
        "interval_save": is_turn(options.save_interval_updates, progress.update),
    }
    run.ranks.on_first(lambda: refuse_if_gone(options.save_dir))
    keep, interval = options.keep_interval_updates, options.save_interval_updates
    first_kept = progress.update - interval * keep + 1 if keep >= 0 and interval else 0

    def name() -> None:
        checkpoint.name_checkpoint(
            folder,
            names,
            keep_last_epochs=options.keep_last_epochs,
            keep_update=lambda update: update >= first_kept,
        )
        logger.info(f"saved {folder} as {', '.join(names)}")

    run.saver.begin(folder, run.engine, progress, description, run.companions, name)


def refuse_if_gone(save_dir: Path) -> None:
    """A checkpoint that is written where the run's folder was mounted would be hidden when it is mounted again."""
    if not (save_dir / LOGS).exists():
        raise InputError(
            f"{save_dir}: is gone (unmounted, moved or removed), so nothing was saved; when it is back, the same "
            "command goes on from its last checkpoint"
        )


def advanced(progress: Progress, batch: int, started: float) -> Progress:
    """One update of `batch` samples further; `started` by time.monotonic()."""
    return dataclasses.replace(
        progress,
        update=progress.update + 1,
        samples=progress.samples + batch,
        seconds=time.monotonic() - started,
    )


def is_turn(interval: int, update: int) -> bool:
    """Whether something that is done every `interval` updates (0: never) is due."""
    return interval > 0 and update % interval == 0
