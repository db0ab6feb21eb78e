"""Pretrains a cross-lingual masked language model.

    python -m xlm_ds.train OUT --monolingual-langs ar,de,en,hi,fr --max-update 1000
    deepspeed --hostfile H --module xlm_ds.train OUT …

OUT is what binarize wrote. The run's folder (--save-dir) gets checkpoints, config.toml, train.log, metrics.jsonl and
TensorBoard files; the same command started again goes on from checkpoint_last.
"""

import contextlib
import dataclasses
import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from xlm_ds.config import (
    TRAIN_ANSWERED,
    RunConfig,
    TrainConfig,
)
from xlm_ds.flags import before_slow_imports, parse
from xlm_ds.lifeline import end_by_signals, launcher
from xlm_ds.log import (
    EXIT_OK,
    add_log_file,
    logger,
    run_stage,
)

LAUNCHER = launcher()  # by the time that torch is imported it may be gone, and an orphan train on

if __name__ == "__main__":
    end_by_signals()
    before_slow_imports(TrainConfig, description=__doc__)  # before torch is imported

import torch

from xlm_ds import checkpoint, plan
from xlm_ds.checkpoint import BEST, LAST, Progress
from xlm_ds.corpus import micro_batch, open_corpus, update_targets, with_sample_numbers
from xlm_ds.devices import this_cpu, this_gpu
from xlm_ds.engine import Ranks, collectives_timed, is_lost_rank, start_ranks, stop_ranks
from xlm_ds.evaluate import on_device
from xlm_ds.files import busy_with, locked, make_folder
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
from xlm_ds.preflight import check_hosts
from xlm_ds.run import (
    Run,
    batch_at_start,
    begin_run,
    is_turn,
    logged,
    retrieved,
    run_geometry,
    save,
    validated,
)
from xlm_ds.schedule import check_schedule, lr_at, lr_exhausted

# ------------------------------------------------------------------------------------- the loop


def train(config: TrainConfig, ranks: Ranks, stop: StopSignal, ending: Ending) -> int:
    """Trains until --max-update, --max-epoch, --stop-min-lr or a signal; returns the exit code."""
    add_log_file(rank_log(config.run.save_dir, ranks.rank))
    ending.hosts = ranks.gathered(place().host)
    logger.info(f"{place()}, process {os.getpid()}, {ranks.device}, of {ranks.world_size} ranks")
    check_hosts(config, ranks)
    if ranks.rank == 0:
        stop.watch(stop_file(config.run.save_dir))
    run, progress = begin_run(config, ranks, ending.hosts)
    corpus, geometry, engine, stopwatch = run.corpus, run.geometry, run.engine, run.stopwatch
    epoch_samples = corpus.order.epoch_samples
    started = time.monotonic() - progress.seconds

    with contextlib.closing(run.log), collectives_timed(stopwatch.enter):
        if progress.validation_due:
            progress, best = validated(run, progress)
            save(run, progress, [LAST, BEST] if best else [LAST])

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
            stopping = asked_to_stop(run, stop, progress)
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
            if is_turn(config.run.retrieve_interval_updates, progress.update) and not stopping:
                retrieved(run, progress.update)
            if due.save:
                save(run, progress, names)
            if stopping:
                run.saver.finish()
                return stopped(stopping, first_wish(stop, ranks), config.run, progress)
        run.saver.finish()

    logger.info(
        f"done: {progress.update} updates, {progress.samples} samples, in {config.run.save_dir}"
    )
    logger.info(stopwatch.shares())
    return EXIT_OK


def advanced(progress: Progress, batch: int, started: float) -> Progress:
    """One update of `batch` samples further; `started` by time.monotonic()."""
    return dataclasses.replace(
        progress,
        update=progress.update + 1,
        samples=progress.samples + batch,
        seconds=time.monotonic() - started,
    )


def asked_to_stop(run: Run, stop: StopSignal, progress: Progress) -> int:
    """The signal that any rank is asked to end by, on all ranks, or 0; meanwhile ends a save that all have written."""
    if progress.update % run.ranks.control_interval:
        return 0
    signal_number, writing = run.ranks.largest(stop.requested, run.saver.is_writing())
    if not writing:
        run.saver.finish()
    return signal_number


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


def seed_dropout(seed: int, update: int, micro: int, rank: int) -> None:
    """Dropout depends on where in the run it is and on nothing before, so no generator's state is saved."""
    key = hashlib.blake2b(f"{seed}/{update}/{micro}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(key, "little"))


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
            held.enter_context(locked(save_dir / ".run.lock", busy_with(save_dir, "run")))
            checkpoint.discard_leftovers(save_dir)
            ending.begin()

        ranks.on_first(take)
        ending.start = ranks.gathered(ending.start)[0]
        yield


def main(argv: Sequence[str]) -> int:
    config = parse(TrainConfig, argv, answered=TRAIN_ANSWERED, description=__doc__)
    if config.run.dry_run:
        return dry_run(config)
    stop = StopSignal(config.run.stop_seconds)
    if launched := "RANK" in os.environ:
        stop.watch(launcher_is_gone(LAUNCHER))
        stop.watch(output_is_lost())
        stop.watch(connection_is_lost())
    ranks = start_ranks(config.run.heartbeat_timeout)
    ending = Ending(config.run.save_dir)
    with run_folder(config.run.save_dir, ending, ranks), one_report("train", ending, is_lost_rank):
        stop.joined(ending)
        code = train(config, ranks, stop, ending)
        if ranks.rank == 0:
            ending.claim(code, "done" if code == EXIT_OK else "stopped and saved")
    stop_ranks()
    if launched:
        leave(code)
    return code


if __name__ == "__main__":
    sys.exit(run_stage("train", main))
