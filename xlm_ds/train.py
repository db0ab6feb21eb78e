"""Pretrains a cross-lingual masked language model.

    python -m xlm_ds.train OUT --monolingual-langs ar,de,en,hi,fr --max-update 1000
    deepspeed --hostfile H --module xlm_ds.train OUT …

OUT is what binarize wrote. The run's folder (--save-dir) gets checkpoints, config.toml, train.log, metrics.jsonl and
TensorBoard files; the same command started again goes on from checkpoint_last.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from xlm_ds.config import (
    RunConfig,
    TrainConfig,
)
from xlm_ds.flags import before_slow_imports, parse
from xlm_ds.lifeline import Ending, StopSignal, end_by_signals, launcher
from xlm_ds.log import EXIT_OK, logger, run_stage
from xlm_ds.peer_flags import TRAIN_FLAGS

LAUNCHER = launcher()  # by the time that torch is imported it may be gone, and an orphan train on

if __name__ == "__main__":
    end_by_signals()
    before_slow_imports(TrainConfig, description=__doc__)  # before torch is imported

import torch

from xlm_ds import checkpoint, plan
from xlm_ds.batches import on_device
from xlm_ds.checkpoint import BEST, LAST, Progress
from xlm_ds.corpus import micro_batch, open_corpus, update_targets, with_sample_numbers
from xlm_ds.devices import this_cpu, this_gpu
from xlm_ds.engine import Ranks, collectives_timed
from xlm_ds.preflight import check_hosts
from xlm_ds.process import asked_to_stop, join, run_on_ranks, stopped
from xlm_ds.run import (
    Run,
    advanced,
    batch_at_start,
    begin_run,
    check,
    check_source,
    is_turn,
    logged,
    retrieved,
    run_geometry,
    save,
    seed_dropout,
    validated,
)
from xlm_ds.schedule import check_schedule, lr_at, lr_exhausted

# ------------------------------------------------------------------------------------- the loop


def train(config: TrainConfig, ranks: Ranks, stop: StopSignal, ending: Ending) -> int:
    """Trains until --max-update, --max-epoch, --stop-min-lr or a signal; returns the exit code."""
    join(config.run, ranks, stop, ending)
    check_hosts(config, ranks)
    run, progress = begin_run(config, ranks, ending.hosts)
    corpus, geometry, engine, stopwatch = run.corpus, run.geometry, run.engine, run.stopwatch
    epoch_samples = corpus.order.epoch_samples
    started = time.monotonic() - progress.seconds

    with contextlib.closing(run.log), collectives_timed(stopwatch.enter):
        if progress.validation_due or progress.retrieval_due:  # the run was stopped before it
            names = [LAST]
            if progress.validation_due:
                progress, best = validated(run, progress)
                names += [BEST] if best else []
            if progress.retrieval_due:
                progress = retrieved(run, progress)
            save(run, progress, names)

        while not finished(run, progress):
            stopwatch.enter("data")
            lr = lr_at(progress.update, config.optimization, progress.plateau)
            engine.train()
            targets = update_targets(corpus, geometry, first=progress.samples)
            for micro in range(geometry.accumulation):
                stopwatch.enter("data")
                first = geometry.first_sample(progress.samples, micro, ranks.rank)
                batch = micro_batch(corpus, geometry, first=first)
                run.digests.add(batch, first)
                batch = on_device(batch, ranks.device)
                stopwatch.enter("forward_backward")
                seed_dropout(config.data.seed, progress.update, micro, ranks.rank)
                losses = engine(batch)
                # The gradient is the mean over all masked tokens of the batch: DeepSpeed divides by both factors.
                engine.backward(losses.sum() * (geometry.accumulation * ranks.world_size / targets))
                stopwatch.enter("optimizer")
                engine.step(lr)
                stopwatch.enter("other")
                run.meter.add(batch, losses, first)
            stopwatch.count(geometry.batch, corpus.mask_ratio.at(progress.samples))
            run.digests.end_update(progress.update + 1, progress.samples, geometry.batch)
            run.log.advance()
            epochs_before = progress.samples // epoch_samples
            progress = advanced(progress, geometry.batch, started)
            epochs = progress.samples // epoch_samples
            ending.update = progress.update
            stopping = asked_to_stop(progress.update, ranks, stop, run.saver)
            due = what_is_due(
                config.run,
                progress.update,
                epochs_before,
                epochs,
                last=finished(run, progress),
                stopping=bool(stopping),
            )
            names = [LAST, f"checkpoint{epochs}"] if due.epoch_name else [LAST]

            if due.log:
                progress = logged(run, progress)
            if due.validate and not stopping:
                progress, best = validated(run, progress)
                names += [BEST] if best else []
            elif due.validate:
                progress = dataclasses.replace(progress, validation_due=True)
            if due.retrieve and not stopping:
                progress = retrieved(run, progress)
            elif due.retrieve:
                progress = dataclasses.replace(progress, retrieval_due=True)
            if due.save:
                save(run, progress, names)
            if stopping:
                run.saver.finish()
                return stopped(stopping, config.run, ranks, stop, progress.update)
        run.saver.finish()

    logger.info(
        f"done: {progress.update} updates, {progress.samples} samples, in {config.run.save_dir}"
    )
    run.unigram.at_end(progress.update)
    logger.info(stopwatch.shares())
    return EXIT_OK


def finished(run: Run, progress: Progress) -> bool:
    """Whether one of the run's ends has come."""
    optimization = run.config.optimization
    return (
        (0 < optimization.max_update <= progress.update)
        or (0 < optimization.max_epoch <= progress.samples // run.corpus.order.epoch_samples)
        or lr_exhausted(progress.update, optimization, progress.plateau)
    )


class Due(NamedTuple):
    """What comes after an update."""

    log: bool
    validate: bool
    retrieve: bool
    save: bool
    epoch_name: bool  # the checkpoint is also named checkpointN


def what_is_due(
    options: RunConfig, update: int, epochs_before: int, epochs: int, *, last: bool, stopping: bool
) -> Due:
    """`epochs`: whole epochs done after this update, `epochs_before` before it."""
    validate = (
        last
        or epochs // options.validate_interval > epochs_before // options.validate_interval
        or is_turn(options.validate_interval_updates, update)
    )
    save_epoch = epochs // options.save_interval > epochs_before // options.save_interval
    save = validate or save_epoch or is_turn(options.save_interval_updates, update) or stopping
    return Due(
        log=is_turn(options.log_interval, update)
        or save,  # a save is never made of a loss not looked at
        validate=validate,
        retrieve=is_turn(options.retrieve_interval_updates, update),
        save=save,
        epoch_name=save_epoch and not options.no_epoch_checkpoints,
    )


# -------------------------------------------------------------------------------------- its parts


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
    if saved is None:
        check_source(config, corpus)
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


def main(argv: Sequence[str]) -> int:
    config = parse(TrainConfig, argv, peers=TRAIN_FLAGS, description=__doc__)
    if config.run.dry_run:
        return dry_run(config)
    return run_on_ranks(
        "train",
        config.run,
        LAUNCHER,
        check=lambda ranks: check(config, ranks),
        work=lambda *joined: train(config, *joined),
    )


if __name__ == "__main__":
    sys.exit(run_stage("train", main))
