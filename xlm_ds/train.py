"""Pretrains a cross-lingual masked language model.

    python -m xlm_ds.train OUT --monolingual-langs ar,de,en,hi,fr --max-update 1000
    deepspeed --hostfile H --module xlm_ds.train OUT …

OUT is what binarize wrote. The run's folder (--save-dir) gets checkpoints, config.toml, train.log, metrics.jsonl and
TensorBoard files; the same command started again goes on from checkpoint_last.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xlm_ds.config import (
    TRAIN_ANSWERED,
    OptimizationConfig,
    RunConfig,
    TrainConfig,
)
from xlm_ds.flags import before_slow_imports, parse, to_dict, to_toml
from xlm_ds.log import (
    EXIT_OK,
    InputError,
    add_log_file,
    logger,
    run_stage,
)

if __name__ == "__main__":
    before_slow_imports(TrainConfig, description=__doc__)  # before torch is imported

import numpy as np
import torch
from torch import Tensor

from xlm_ds import checkpoint, plan
from xlm_ds.architectures import ModelShape, parameter_count, shape_from_config
from xlm_ds.batches import MaskedBatch
from xlm_ds.checkpoint import BEST, LAST, PREVIOUS, Progress, Saver
from xlm_ds.corpus import (
    Corpus,
    micro_batch,
    open_corpus,
    order_facts,
    update_targets,
    with_sample_numbers,
)
from xlm_ds.deepspeed_config import (
    default_deepspeed_config,
    precision_of,
    read_deepspeed_config,
    resolve_deepspeed_config,
    with_monitor_folder,
)
from xlm_ds.devices import this_cpu, this_gpu
from xlm_ds.dictionary import PAD
from xlm_ds.digests import FILE, Digests, begin_file
from xlm_ds.engine import (
    Engine,
    Ranks,
    collectives_timed,
    is_lost_rank,
    start_ranks,
    stop_ranks,
)
from xlm_ds.evaluate import on_device, sum_over_split
from xlm_ds.files import alone_in, make_folder
from xlm_ds.geometry import Geometry, batch_geometry, divided
from xlm_ds.lifeline import (
    ENDS_WITH,
    LOGS,
    Ending,
    StopSignal,
    connection_is_lost,
    launcher_is_gone,
    leave,
    one_report,
    output_is_lost,
    place,
    stop_file,
)
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
from xlm_ds.model import build_model, init_output_bias, unigram_log_probabilities
from xlm_ds.pair_record import COMPANIONS
from xlm_ds.preflight import check_hosts
from xlm_ds.schedule import (
    check_schedule,
    describe_schedule,
    lr_at,
    lr_exhausted,
    plateau_after,
)

# ------------------------------------------------------------------------------------- the loop


def train(config: TrainConfig, ranks: Ranks, stop: StopSignal, ending: Ending) -> int:
    """Trains until --max-update, --max-epoch, --stop-min-lr or a signal; returns the exit code."""
    optimization, run = config.optimization, config.run
    add_log_file(rank_log(run.save_dir, ranks.rank))
    ending.hosts = ranks.gathered(place().host)
    logger.info(f"{place()}, process {os.getpid()}, {ranks.device}, of {ranks.world_size} ranks")
    check_hosts(config, ranks)
    refuse_if_a_name_is_a_folder(run.save_dir)
    saved = checkpoint.find_whole(run.save_dir, run.restore_file, ranks)
    geometry = run_geometry(config, saved, ranks.world_size)
    data = with_sample_numbers(config.data, batch_at_start(saved, geometry))
    corpus = open_corpus(data)
    config = with_languages(dataclasses.replace(config, data=data), corpus.languages)
    if ranks.rank == 0:
        stop.watch(stop_file(run.save_dir))
    shape = shape_from_config(
        config.model,
        vocab_size=len(corpus.dictionary),
        languages=len(corpus.languages),
        tokens_per_sample=data.tokens_per_sample,
    )
    engine, progress = build_engine(config, corpus, geometry, shape, ranks, saved)
    digests = start_digests(run, engine, progress)
    epoch_samples = corpus.order.epoch_samples
    meter = LossMeter(len(corpus.languages), ranks.device)
    unigram = UnigramWatch(
        corpus.train, corpus.valid, optimization, geometry.batch * data.tokens_per_sample
    )
    dtype = precision_of(engine.settings)
    stopwatch = Stopwatch(shape, data.tokens_per_sample, ranks.device, ranks.world_size, dtype)
    slow_hosts = SlowHosts(ending.hosts)
    saver = checkpoint.Saver(ranks)
    started = time.monotonic() - progress.seconds

    with (
        contextlib.closing(start_log(config, corpus, geometry, engine, progress)) as log,
        collectives_timed(stopwatch.enter),
    ):
        logger.info(stopwatch.definition(corpus.mask_ratio.at(progress.samples)))
        logger.info(unigram.definition())
        if progress.validation_due:
            stopwatch.enter("validation")
            progress, best = validated(config, corpus, geometry, engine, unigram, log, progress)
            stopwatch.enter("checkpoint")
            names = [LAST, BEST] if best else [LAST]
            save(saver, config, corpus, geometry, engine, progress, names)

        while not finished(optimization, progress, epoch_samples):
            stopwatch.enter("data")
            lr = lr_at(progress.update, optimization, progress.plateau)
            engine.train()
            targets = update_targets(corpus, geometry, first=progress.samples)
            for micro in range(geometry.accumulation):
                stopwatch.enter("data")
                first = geometry.first_sample(progress.samples, micro, ranks.rank)
                batch = micro_batch(corpus, geometry, first=first)
                digests.add(batch, first)
                batch = on_device(batch, ranks.device)
                stopwatch.enter("forward_backward")
                seed_dropout(data.seed, progress.update, micro, ranks.rank)
                losses = engine(batch)
                # The gradient is the mean over all masked tokens of the batch: DeepSpeed divides by both factors.
                engine.backward(losses.sum() * (geometry.accumulation * ranks.world_size / targets))
                stopwatch.enter("optimizer")
                engine.step(lr)
                stopwatch.enter("other")
                meter.add(batch, losses, first)
            stopwatch.count(geometry.batch, corpus.mask_ratio.at(progress.samples))
            digests.end_update(progress.update + 1, progress.samples, geometry.batch)
            epochs_before = progress.samples // epoch_samples
            progress = dataclasses.replace(
                progress,
                update=progress.update + 1,
                samples=progress.samples + geometry.batch,
                seconds=time.monotonic() - started,
            )
            log.advance()
            ending.update = progress.update
            stopping = 0
            if progress.update % ranks.control_interval == 0:
                stopping, writing = ranks.largest(stop.requested, saver.is_writing())
                if not writing:
                    saver.finish()
            epochs = progress.samples // epoch_samples
            last = finished(optimization, progress, epoch_samples)
            due = what_is_due(
                run, progress.update, epochs_before, epochs, last=last, stopping=bool(stopping)
            )

            if due.log:
                progress = dataclasses.replace(progress, chains=digests.write())
                engine.check()
                sums = ranks.sum(meter.take())
                figures = loss_figures(sums, corpus.languages, unigram.train)
                figures |= {"lr": lr, "gradient_norm": engine.gradient_norm()}
                check_skipped(engine, meter, corpus, geometry, progress, run)
                progress = dataclasses.replace(progress, skipped_updates=engine.skipped_updates())
                if progress.skipped_updates:
                    figures["skipped_updates"] = progress.skipped_updates
                figures |= {"epoch": progress.samples / epoch_samples, **stopwatch.take()}
                figures |= time_left(optimization, progress)
                log.write("train", progress.update, figures)
                slow_hosts.watch(ranks.each(sum(figures["seconds"][part] for part in WORK)))
                unigram.watch(sums, progress.update)
            names = [LAST, f"checkpoint{epochs}"] if due.epoch_name else [LAST]
            if due.validate and not stopping:
                stopwatch.enter("validation")
                progress, best = validated(config, corpus, geometry, engine, unigram, log, progress)
                names += [BEST] if best else []
            elif due.validate:
                progress = dataclasses.replace(progress, validation_due=True)
            if due.save:
                stopwatch.enter("checkpoint")
                save(saver, config, corpus, geometry, engine, progress, names)
            if stopping:
                saver.finish()
                return stopped(stopping, first_wish(stop, ranks), run, progress)
        saver.finish()

    logger.info(f"done: {progress.update} updates, {progress.samples} samples, in {run.save_dir}")
    logger.info(stopwatch.shares())
    return EXIT_OK


def finished(optimization: OptimizationConfig, progress: Progress, epoch_samples: int) -> bool:
    """Whether one of the run's ends has come."""
    return (
        (0 < optimization.max_update <= progress.update)
        or (0 < optimization.max_epoch <= progress.samples // epoch_samples)
        or lr_exhausted(progress.update, optimization, progress.plateau)
    )


class Due(NamedTuple):
    """What comes after an update."""

    log: bool
    validate: bool
    save: bool
    epoch_name: bool  # the checkpoint is also named checkpointN


def what_is_due(
    run: RunConfig, update: int, epochs_before: int, epochs: int, *, last: bool, stopping: bool
) -> Due:
    """`epochs`: whole epochs done after this update, `epochs_before` before it."""
    validate = (
        last
        or epochs // run.validate_interval > epochs_before // run.validate_interval
        or _every(run.validate_interval_updates, update)
    )
    save_epoch = epochs // run.save_interval > epochs_before // run.save_interval
    save = validate or save_epoch or _every(run.save_interval_updates, update) or stopping
    return Due(
        log=_every(run.log_interval, update)
        or save,  # a save is never made of a loss not looked at
        validate=validate,
        save=save,
        epoch_name=save_epoch and not run.no_epoch_checkpoints,
    )


def _every(interval: int, update: int) -> bool:
    return interval > 0 and update % interval == 0


# -------------------------------------------------------------------------------------- its parts


def with_languages(config: TrainConfig, languages: tuple[str, ...]) -> TrainConfig:
    """The configuration with the languages that were found where none were named."""
    data = dataclasses.replace(config.data, monolingual_langs=languages)
    return dataclasses.replace(config, data=data)


def dry_run(config: TrainConfig) -> int:
    """Says what the run would need and take, on the device and with the ranks that it is started with."""
    world, per_node = (
        int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    if os.environ.get("RANK", "0") != "0":
        return EXIT_OK
    check_schedule(config.optimization)
    found = checkpoint.find_checkpoint(config.run.save_dir, config.run.restore_file)
    saved = (found, checkpoint.read_manifest(found)) if found else None
    geometry = run_geometry(config, saved, world)
    corpus = open_corpus(with_sample_numbers(config.data, batch_at_start(saved, geometry)))
    facts = plan.Facts(len(corpus.dictionary), len(corpus.languages), corpus.order.epoch_samples)
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        properties = torch.cuda.get_device_properties(0)
        device = this_gpu(properties.name, properties.total_memory)
        per_node = max(per_node, torch.cuda.device_count())
    else:
        device = this_cpu(per_node)
    ground = plan.Ground(device, world, per_node)
    job = plan.build_job(config.data, config.model, config.optimization, config.run, facts, ground)
    done = checkpoint.read_progress(saved[1]).update if saved else 0
    plan.show(job, config.optimization, facts, name=config.model.arch, updates_done=done)
    return EXIT_OK


Saved = tuple[Path, dict[str, Any]]  # a checkpoint's folder and its manifest


def run_geometry(config: TrainConfig, saved: Saved | None, world_size: int) -> Geometry:
    """How an update is divided: by the flags, or where they are those of the checkpoint, so that its batch stays.

    Raises InputError if the batch cannot be divided among so many ranks.
    """
    by_flags = batch_geometry(config.optimization, config.data.tokens_per_sample, world_size)
    if saved is None:
        return by_flags
    folder, manifest = saved
    before = checkpoint.read_configuration(folder, manifest)
    if batch_flags(before) != batch_flags(config):
        return by_flags
    return divided(int(manifest["batch_samples"]), by_flags.rows, world_size)


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


def build_engine(
    config: TrainConfig,
    corpus: Corpus,
    geometry: Geometry,
    shape: ModelShape,
    ranks: Ranks,
    saved: Saved | None,
) -> tuple[Engine, Progress]:
    """The model in its engine, from the start or from the checkpoint that the run goes on from."""
    check_schedule(config.optimization)
    path = config.run.deepspeed_config or default_deepspeed_config(ranks.device.type)
    settings = resolve_deepspeed_config(
        read_deepspeed_config(path, ranks.device.type),
        config.optimization,
        rows=geometry.rows,
        accumulation=geometry.accumulation,
        where=str(path),
    )
    settings = with_monitor_folder(settings, config.run.save_dir / "monitors")
    logger.info(f"{config.model.arch}: {parameter_count(shape):,} parameters; {path}")
    model = build_model(shape, seed=config.data.seed)
    compiles = ranks.device.type == "cuda" and not config.run.no_compile
    if saved is None:
        if config.model.init_output_bias == "unigram":
            counts = np.stack([dataset.counts() for dataset in corpus.train])
            probabilities = corpus.order.probabilities(0)
            init_output_bias(
                model, unigram_log_probabilities(counts, language_probabilities=probabilities)
            )
        return Engine(model, settings, ranks, compiles=compiles, where=str(path)), Progress(
            batch_at_start=geometry.batch
        )
    folder, manifest = saved
    check_same_data(config, corpus, geometry, manifest, folder)
    state = checkpoint.stored_state(folder, manifest)
    checkpoint.copy_weights(model, state["weight"], folder)
    engine = Engine(model, settings, ranks, compiles=compiles, where=str(path))
    progress = checkpoint.read_progress(manifest)
    engine.load_state(
        state,
        update=progress.update,
        skipped=progress.skipped_updates,
        samples=progress.samples,
        warm_up_batch=on_device(micro_batch(corpus, geometry, first=0), ranks.device),
    )
    logger.info(f"going on from {folder}: update {progress.update}, {progress.samples} samples")
    return engine, progress


def refuse_if_a_name_is_a_folder(save_dir: Path) -> None:
    """A run's folder that was copied with its links followed has folders where the links were."""
    for name in (LAST, PREVIOUS, BEST):
        if (save_dir / name).is_dir() and not (save_dir / name).is_symlink():
            raise InputError(
                f"{save_dir / name}: is a folder, where a run has a link; go on in a new --save-dir with "
                f"--restore-file {save_dir / name}"
            )


def check_same_data(
    config: TrainConfig,
    corpus: Corpus,
    geometry: Geometry,
    manifest: Mapping[str, Any],
    folder: Path,
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


def start_digests(run: RunConfig, engine: Engine, progress: Progress) -> Digests:
    """The run's digests, which go on where the checkpoint's were."""
    path = run.save_dir / FILE
    names = [name for name, _, _ in engine.master_fragments()]
    engine.ranks.on_first(
        lambda: begin_file(path, names, update=progress.update, chains=progress.chains)
    )
    return Digests(
        path if engine.ranks.rank == 0 else None,
        progress.chains,
        interval=run.digest_interval,
        masters=engine.master_fragments,
        sum_over_ranks=engine.ranks.sum,
    )


def start_log(
    config: TrainConfig, corpus: Corpus, geometry: Geometry, engine: Engine, progress: Progress
) -> RunLog:
    """Opens the run's files, writes the resolved configuration and says what will happen."""
    run, optimization = config.run, config.optimization
    active = engine.ranks.rank == 0
    log = RunLog(
        run.save_dir,
        run.tensorboard_logdir or run.save_dir / "tensorboard",
        active=active,
        updates=optimization.max_update,
        start=progress.update,
        profile=run.profile,
        monitor=engine.write_events,
    )
    if active:
        (run.save_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
        settings = json.dumps(engine.settings, indent=1)
        (run.save_dir / "deepspeed.json").write_text(settings + "\n", encoding="utf-8")
    tokens = geometry.batch * config.data.tokens_per_sample
    epoch = corpus.order.epoch_samples
    probabilities = corpus.order.probabilities(progress.samples)
    shares = zip(corpus.train, probabilities, strict=True)
    drawn = ", ".join(f"{d.language} {d.blocks} blocks drawn {p:.1%}" for d, p in shares)
    logger.info(f"{len(corpus.dictionary)} symbols; {drawn}")
    for name, steps in (
        ("alpha", config.data.sampling_alpha),
        ("mask ratio", config.data.mask_ratio),
    ):
        if len(steps.values) > 1:
            logger.info(f"{name} over the run: {steps}, now {steps.at(progress.samples)}")
    logger.info(describe_schedule(optimization))
    logger.info(
        f"batch: {geometry.batch} samples = {tokens} tokens an update ({geometry.rows} rows x "
        f"{geometry.accumulation} micro-batches x {geometry.world_size} ranks); an epoch is {epoch} samples, "
        f"{math.ceil(epoch / geometry.batch)} updates; tokens per second are all tokens, not the masked ones alone"
    )
    return log


def seed_dropout(seed: int, update: int, micro: int, rank: int) -> None:
    """Dropout depends on where in the run it is and on nothing before, so no generator's state is saved."""
    key = hashlib.blake2b(f"{seed}/{update}/{micro}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(key, "little"))


GO_ON = (
    "lower --lr or set --clip-norm and start again: the run goes on from its last checkpoint in "
)


def check_skipped(
    engine: Engine,
    meter: LossMeter,
    corpus: Corpus,
    geometry: Geometry,
    progress: Progress,
    run: RunConfig,
) -> None:
    """Raises InputError, on all ranks, if too many updates in a row were skipped; says what they were made of."""
    length, begin = engine.skipped_in_a_row()
    if length < run.max_skipped_updates or precision_of(engine.settings) == "fp16":
        return
    first = progress.samples - (progress.update - begin) * geometry.batch
    bad = -engine.ranks.any(-meter.bad_sample())
    culprit = (
        f"; the loss of {describe_sample(corpus, bad)} is not finite" if bad < NO_SAMPLE else ""
    )
    raise InputError(
        f"{length} updates in a row were skipped, as their gradient was not finite: the first is update {begin + 1}, "
        f"of the samples {first} to {first + geometry.batch - 1}{culprit}; {GO_ON}{run.save_dir}, if it has made one"
    )


def describe_sample(corpus: Corpus, sample: int) -> str:
    found = corpus.order.samples(sample, 1)
    language = corpus.languages[int(found.languages[0])]
    return f"sample {sample} (block {found.blocks[0]} of train.{language})"


def check_finite(loss: float, progress: Progress, run: RunConfig) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"the validation loss is not finite at update {progress.update}; {GO_ON}{run.save_dir}, if it has made one"
        )


def validated(
    config: TrainConfig,
    corpus: Corpus,
    geometry: Geometry,
    engine: Engine,
    unigram: UnigramWatch,
    log: RunLog,
    progress: Progress,
) -> tuple[Progress, bool]:
    """Validates; returns the progress with the schedule moved, and whether this is the best so far (as good counts)."""
    figures = loss_figures(validate(engine, corpus, geometry), corpus.languages, unigram.valid)
    log.write("valid", progress.update, figures)
    loss = float(figures["loss"])
    check_finite(loss, progress, config.run)
    best = progress.best_valid_loss is None or loss <= progress.best_valid_loss
    plateau = plateau_after(progress.plateau, loss, config.optimization, update=progress.update)
    progress = dataclasses.replace(
        progress,
        plateau=plateau,
        best_valid_loss=loss if best else progress.best_valid_loss,
        validation_due=False,
    )
    return progress, best


def validate(engine: Engine, corpus: Corpus, geometry: Geometry) -> Tensor:
    """(2, L): nats and targets of every language in full, under fixed masks."""

    def measure(batch: MaskedBatch) -> Tensor:
        """(2,): nats, targets."""
        real = batch.targets != PAD
        return torch.stack([x.double().sum() for x in (engine(batch), real)]).cpu()

    engine.train(False)
    sums = [
        sum_over_split(
            measure,
            dataset,
            language,
            corpus.masking,
            draw=0,
            rows=geometry.rows,
            ranks=engine.ranks,
        )
        for language, dataset in enumerate(corpus.valid)
    ]
    return torch.stack(sums, dim=1)


def save(
    saver: Saver,
    config: TrainConfig,
    corpus: Corpus,
    geometry: Geometry,
    engine: Engine,
    progress: Progress,
    names: Sequence[str],
) -> None:
    """Begins to write a checkpoint; once it is whole, names it and deletes those that nothing keeps.

    All ranks must call it.
    """
    run, epoch_samples = config.run, corpus.order.epoch_samples
    # The epoch that has just ended, or else the one that is under way.
    epoch = max((progress.samples - geometry.batch) // epoch_samples + 1, 1)
    folder = run.save_dir / checkpoint.folder_name(epoch, progress.update)
    description = {
        "configuration": to_dict(config),
        "languages": list(corpus.languages),
        "vocab_size": len(corpus.dictionary),
        "dictionary_sha256": corpus.dictionary.sha256,
        "epoch_samples": epoch_samples,
        **order_facts(corpus, geometry),
        "interval_save": _every(run.save_interval_updates, progress.update),
    }
    companions = {"dict.txt": corpus.dictionary.text.encode()}
    for path in (config.data.data / name for name in COMPANIONS):
        if path.exists():
            companions[path.name] = path.read_bytes()
    engine.ranks.on_first(lambda: refuse_if_gone(run.save_dir))
    keep, interval = run.keep_interval_updates, run.save_interval_updates
    first_kept = progress.update - interval * keep + 1 if keep >= 0 and interval else 0

    def name() -> None:
        checkpoint.name_checkpoint(
            folder,
            names,
            keep_last_epochs=run.keep_last_epochs,
            keep_update=lambda update: update >= first_kept,
        )
        logger.info(f"saved {folder} as {', '.join(names)}")

    saver.begin(folder, engine, progress, description, companions, name)


def refuse_if_gone(save_dir: Path) -> None:
    """A checkpoint that is written where the run's folder was mounted would be hidden when it is mounted again."""
    if not (save_dir / LOGS).exists():
        raise InputError(
            f"{save_dir}: is gone (unmounted, moved or removed), so nothing was saved; when it is back, the same "
            "command goes on from its last checkpoint"
        )


def time_left(optimization: OptimizationConfig, progress: Progress) -> dict[str, int]:
    if optimization.max_update == 0:
        return {}
    left = optimization.max_update - progress.update
    return {"seconds_left": round(left * progress.seconds / progress.update)}


# ---------------------------------------------------------------------------------------- signals


def rank_log(save_dir: Path, rank: int) -> Path:
    return save_dir / LOGS / f"rank-{rank}.log" if rank else save_dir / "train.log"


def first_wish(stop: StopSignal, ranks: Ranks) -> str:
    """Why the run is to end, as the lowest of the ranks has it that want it to."""
    wishes: list[str] = ranks.gathered(f"{stop.why} ({place()})" if stop.why else "")
    return next(wish for wish in wishes if wish)


def stopped(number: int, why: str, run: RunConfig, progress: Progress) -> int:
    how = "the same command goes on from it"
    if run.restore_file != LAST:
        how = f"to go on from it, leave out --restore-file {run.restore_file}"
    logger.info(
        f"stopped by {why} after update {progress.update}, saved {run.save_dir / LAST}; {how}"
    )
    return ENDS_WITH[signal.Signals(number)]


@contextlib.contextmanager
def run_folder(save_dir: Path, ending: Ending, ranks: Ranks) -> Iterator[None]:
    """The run's folder, made, cleared of what killed saves left, and this run's alone."""
    with contextlib.ExitStack() as held:

        def take() -> None:
            make_folder(save_dir)
            held.enter_context(alone_in(save_dir, "run"))
            checkpoint.discard_leftovers(save_dir)
            ending.clear()

        ranks.on_first(take)
        yield


def main(argv: Sequence[str]) -> int:
    config = parse(TrainConfig, argv, answered=TRAIN_ANSWERED, description=__doc__)
    if config.run.dry_run:
        return dry_run(config)
    stop = StopSignal(config.run.stop_seconds)
    if launched := "RANK" in os.environ:
        stop.watch(launcher_is_gone())
        stop.watch(output_is_lost)
        stop.watch(connection_is_lost())
    ranks = start_ranks(config.run.heartbeat_timeout)
    stop.has_joined = True
    ending = Ending(config.run.save_dir)
    with run_folder(config.run.save_dir, ending, ranks), one_report(ending, is_lost_rank):
        stop.claim = ending.claim
        code = train(config, ranks, stop, ending)
        if ranks.rank == 0:
            ending.claim(code, "done" if code == EXIT_OK else "stopped and saved")
    stop_ranks()
    if launched:
        leave(code)
    return code


if __name__ == "__main__":
    sys.exit(run_stage("train", main))
