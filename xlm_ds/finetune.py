"""Fine-tunes a pretrained model to classify texts, or pairs of texts, and tests it on every language.

    python -m xlm_ds.finetune RUN DATA --train-langs en --save-dir FT --lr 2.5e-5 --max-epoch 10
    deepspeed --hostfile H --module xlm_ds.finetune RUN DATA …

Texts are raw: the model's own tokenisation, codes and dictionary make ids of them. The run's folder (--save-dir) gets
checkpoint_last and checkpoint_best, config.toml, train.log, metrics.jsonl and TensorBoard files, and when it is done
test.json; the same command started again goes on from checkpoint_last.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xlm_ds.config import FinetuneConfig, FinetuneOptimizationConfig
from xlm_ds.flags import before_slow_imports, parse, to_dict
from xlm_ds.lifeline import Ending, StopSignal, end_by_signals, launcher
from xlm_ds.log import EXIT_OK, InputError, logger, run_stage

LAUNCHER = launcher()  # by the time that torch is imported it may be gone, and an orphan train on

if __name__ == "__main__":
    end_by_signals()
    before_slow_imports(FinetuneConfig, description=__doc__)  # before torch is imported

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlm_ds import checkpoint
from xlm_ds.architectures import parameter_count, useful_flops
from xlm_ds.batches import NO_LABEL, LabelledBatch, on_device
from xlm_ds.checkpoint import BEST, LAST, Progress, Saver
from xlm_ds.classification import (
    Classifier,
    Examples,
    accuracy_figures,
    init_output,
    label_losses,
    outcome,
)
from xlm_ds.deepspeed_config import precision_of
from xlm_ds.digests import Digests
from xlm_ds.engine import Engine, Ranks, collectives_timed
from xlm_ds.files import replacing
from xlm_ds.geometry import Geometry, divided
from xlm_ds.host_facts import checkpoint_bytes
from xlm_ds.labelled import find_labelled
from xlm_ds.metrics import WORK, RunLog, SlowHosts, Stopwatch
from xlm_ds.model import build_model
from xlm_ds.order import Order, build_order
from xlm_ds.preflight import compare_hosts, request_of
from xlm_ds.pretrained import load_classifier
from xlm_ds.process import asked_to_stop, join, run_on_ranks, stopped
from xlm_ds.run import (
    Saved,
    advanced,
    check_finite,
    deepspeed_settings,
    gone_on,
    is_turn,
    open_log,
    read_companions,
    refuse_if_a_name_is_a_folder,
    refuse_if_gone,
    seed_dropout,
    seen_checkpoint,
    skipped_too_many,
    start_digests,
    time_left,
    too_many_skipped,
    update_figures,
)
from xlm_ds.schedule import (
    check_schedule,
    describe_schedule,
    lr_at,
    lr_exhausted,
    plateau_after,
    without_best,
)
from xlm_ds.task import (
    Base,
    Task,
    Texts,
    build_task,
    check_same_labels,
    check_same_on_all,
    check_same_run,
    facts_of,
    open_base,
    read_texts,
    stop_languages,
    tell_other_samples,
    with_languages,
)

EPOCHS = 10  # where neither epochs nor updates are given
ENDLESS = 1 << 62  # updates, before texts are counted

# ------------------------------------------------------------------------------------- the loop


def finetune(config: FinetuneConfig, ranks: Ranks, stop: StopSignal, ending: Ending) -> int:
    """Trains until --max-epoch, --max-update, --patience or a signal, then tests the best; returns the exit code."""
    join(config.run, ranks, stop, ending)
    run, progress = begin_run(config, ranks, ending.hosts)
    config, geometry, engine, stopwatch = run.config, run.geometry, run.engine, run.stopwatch
    started = time.monotonic() - progress.seconds

    with contextlib.closing(run.log), collectives_timed(stopwatch.enter):
        if progress.validation_due:
            progress, best = validated(run, progress)
            save(run, progress, [LAST, BEST] if best else [LAST])

        while not finished(run, progress):
            lr = lr_at(progress.update, config.optimization, progress.plateau)
            engine.train()
            for micro in range(geometry.accumulation):
                stopwatch.enter("data")
                first = geometry.first_sample(progress.samples, micro, ranks.rank)
                numbers = run.order.samples(first, geometry.rows).blocks
                run.digests.add_samples(run.task.train.sample_digests(numbers, first))
                batch = on_device(run.task.train.batch(numbers), ranks.device)
                stopwatch.enter("forward_backward")
                seed_dropout(config.data.seed, progress.update, micro, ranks.rank)
                scores = engine(batch)
                # The mean over the batch's examples: DeepSpeed divides by accumulation and ranks.
                engine.backward(label_losses(scores, batch.labels).sum() / geometry.rows)
                stopwatch.enter("optimizer")
                engine.step(lr)
                stopwatch.enter("other")
                run.sums.add_(outcome(scores, batch, len(run.model.languages)))
            count_tokens(run, progress.samples)
            run.digests.end_update(progress.update + 1, progress.samples, geometry.batch)
            run.log.advance()
            epochs_before = progress.samples // run.order.epoch_samples
            progress = advanced(progress, geometry.batch, started)
            epoch_ends = progress.samples // run.order.epoch_samples > epochs_before
            ending.update = progress.update
            stopping = asked_to_stop(progress.update, ranks, stop, run.saver)
            options = config.run
            is_validated = (
                epoch_ends
                or finished(run, progress)
                or is_turn(options.validate_interval_updates, progress.update)
            )
            saves = (
                is_validated or stopping or is_turn(options.save_interval_updates, progress.update)
            )
            names = [LAST]

            if saves or is_turn(options.log_interval, progress.update):
                progress = logged(run, progress)
            if is_validated and not stopping:
                progress, best = validated(run, progress)
                names += [BEST] if best else []
            elif is_validated:
                progress = dataclasses.replace(progress, validation_due=True)
            if saves:
                save(run, progress, names)
            if stopping:
                run.saver.finish()
                return stopped(stopping, options, ranks, stop, progress.update)
        run.saver.finish()

    logger.info(
        f"done: {progress.update} updates, {progress.samples} samples, best accuracy {progress.best_accuracy:.2f} %, "
        f"in {config.run.save_dir}"
    )
    logger.info(stopwatch.shares())
    test(run)
    return EXIT_OK


def finished(run: "Finetuning", progress: Progress) -> bool:
    """Whether one of the run's ends has come."""
    optimization, patience = run.config.optimization, run.config.data.patience
    return (
        (0 < optimization.max_update <= progress.update)
        or (0 < optimization.max_epoch <= progress.samples // run.order.epoch_samples)
        or (0 < patience <= progress.bad_validations)
        or lr_exhausted(progress.update, optimization, progress.plateau)
    )


# ------------------------------------------------------------------------------------------ begin


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finetuning:
    """What a run is made of, from its begin to its end. Where it stands is its Progress."""

    config: FinetuneConfig  # with the languages, and the number of updates, that it has come to
    model: Base
    task: Task
    facts: Mapping[str, Any]  # what a checkpoint says of both
    order: Order  # of the training examples
    geometry: Geometry
    engine: Engine
    digests: Digests
    saver: Saver
    log: RunLog
    companions: Mapping[str, bytes]  # what text needs to become ids; on rank 0
    sums: Tensor  # (3, L) on the device, since they were last logged: classification.outcome
    stopwatch: Stopwatch
    slow_hosts: SlowHosts


def check(config: FinetuneConfig, ranks: Ranks) -> None:
    """Raises InputError for what can be refused before anything is made; for process.run_on_ranks."""
    refuse_if_a_name_is_a_folder(config.run.save_dir)
    geometry = geometry_of(config.optimization, ranks.world_size)
    deepspeed_settings(config.optimization, config.run, geometry, ranks)
    saved = seen_checkpoint(config.run)
    model = open_base(config, saved)
    if saved is None and not config.data.random_weights:
        checkpoint.load_tensors(model.folder, model.manifest, "weight")  # refused if damaged
    prepared(config, model, saved)


def geometry_of(options: FinetuneOptimizationConfig, world_size: int) -> Geometry:
    """How an update is divided. Raises InputError if the batch cannot be divided among so many ranks."""
    rows = options.max_rows or -(-options.batch_size // world_size)
    return divided(options.batch_size, rows, world_size, "--batch-size")


def prepared(
    config: FinetuneConfig, model: Base, saved: Saved | None
) -> tuple[FinetuneConfig, Texts]:
    """The configuration with languages and number of updates, and the texts, not yet ids.

    Raises InputError for whatever can be refused without ids: first what flags, names and manifests tell, then texts.
    """
    config = with_epochs(config)
    check_ends(config.optimization, config.data.patience)
    if saved is not None:
        check_same_run(config, *saved)
    files = find_labelled(config.data.data)
    logger.info(f"{config.data.data}: {files.description}")
    config = with_languages(config, files, model.languages)
    texts = read_texts(config.data, files, model.languages)
    if saved is not None:
        check_same_labels(texts, *saved)
    return with_last_update(config, texts.count("train")), texts


def with_epochs(config: FinetuneConfig) -> FinetuneConfig:
    """`config` with the number of epochs where none is given."""
    options = config.optimization
    if options.max_epoch >= 0:
        return config
    epochs = 0 if options.max_update else EPOCHS
    return dataclasses.replace(config, optimization=dataclasses.replace(options, max_epoch=epochs))


def check_ends(options: FinetuneOptimizationConfig, patience: int) -> None:
    """Raises InputError if nothing would end the run, or for a schedule that no number of texts would mend."""
    ends = options.max_epoch, options.max_update, patience, options.stop_min_lr >= 0
    if not any(ends):
        raise InputError(
            "--max-epoch 0 and --max-update 0: nothing would end the run; give one of them, or --patience with "
            "a schedule that needs no end (--lr-scheduler inverse_sqrt or reduce_lr_on_plateau)"
        )
    longest = ENDLESS if options.max_epoch else 0
    check_schedule(dataclasses.replace(options, max_update=options.max_update or longest))


def with_last_update(config: FinetuneConfig, examples: int) -> FinetuneConfig:
    """`config` with the number of updates that --max-epoch means, which a schedule may need.

    Raises InputError for a schedule that does not fit into it.
    """
    options = config.optimization
    if options.max_epoch == 0:
        return config
    updates = math.ceil(options.max_epoch * examples / options.batch_size)
    resolved = dataclasses.replace(options, max_update=min(updates, options.max_update or updates))
    try:
        check_schedule(resolved)
    except InputError as error:
        raise InputError(
            f"--max-epoch {options.max_epoch} of {examples} training examples ends at update {updates}: {error}"
        ) from error
    return dataclasses.replace(config, optimization=resolved)


def begin_run(
    config: FinetuneConfig, ranks: Ranks, hosts: Sequence[str]
) -> tuple[Finetuning, Progress]:
    """The run from its start, or from the checkpoint that it goes on from. All ranks must call it."""
    refuse_if_a_name_is_a_folder(config.run.save_dir)
    model = open_base(config, seen_checkpoint(config.run))
    need = checkpoint_bytes(parameter_count(model.shape))
    compare_hosts(request_of(config), lambda _: need, ranks)
    saved = checkpoint.find_whole(config.run.save_dir, config.run.restore_file, ranks)
    if saved is None:
        model = open_base(config, None)
    geometry = geometry_of(config.optimization, ranks.world_size)
    config, texts = prepared(config, model, saved)
    task = build_task(texts, model)
    check_same_on_all(task, ranks)
    order = build_order([len(task.train.rows)], alpha=1.0, seed=config.data.seed)
    facts = facts_of(config, model, task)
    if saved is not None:
        tell_other_samples(config, facts, order.epoch_samples, saved[1])
    engine, progress = build_engine(config, model, task, geometry, ranks, saved)
    if saved is not None:
        progress = with_comparable_best(config, facts, progress, saved[1], ranks)
    run = Finetuning(
        config=config,
        model=model,
        task=task,
        facts=facts,
        order=order,
        geometry=geometry,
        engine=engine,
        digests=start_digests(config.run, engine, geometry, progress),
        saver=Saver(ranks),
        companions=read_companions(model.to_ids.dictionary, model.folder, ranks),
        sums=torch.zeros(3, len(model.languages), dtype=torch.float64, device=ranks.device),
        stopwatch=Stopwatch(
            model.shape,
            model.trained.data.tokens_per_sample,
            ranks.device,
            ranks.world_size,
            precision_of(engine.settings),
        ),
        slow_hosts=SlowHosts(hosts),
        log=open_log(config, engine, progress),
    )
    describe(run)
    return run, progress


def build_engine(
    config: FinetuneConfig,
    model: Base,
    task: Task,
    geometry: Geometry,
    ranks: Ranks,
    saved: Saved | None,
) -> tuple[Engine, Progress]:
    """The classifier in its engine, from the pretrained model or from the checkpoint that the run goes on from."""
    data = config.data
    settings, path = deepspeed_settings(config.optimization, config.run, geometry, ranks)
    encoder = build_model(model.shape, seed=data.seed)
    if saved is None and not data.random_weights:
        checkpoint.load_weights(encoder, model.folder, model.manifest)
    classifier = Classifier(
        encoder, labels=len(task.labels), pooling=data.pooling, dropout=model.shape.dropout
    )
    parameters = sum(parameter.numel() for parameter in classifier.parameters())
    begun = "random weights" if data.random_weights else model.name
    logger.info(f"{model.trained.model.arch} of {begun}: {parameters:,} parameters; {path}")
    if saved is None:
        init_output(classifier, data.seed)
        return Engine(classifier, settings, ranks, where=str(path)), Progress(
            batch_at_start=geometry.batch
        )
    batch = on_device(task.train.batch(np.arange(1)), ranks.device)
    return gone_on(
        classifier, lambda: Engine(classifier, settings, ranks, where=str(path)), saved, batch
    )


def with_comparable_best(
    config: FinetuneConfig,
    facts: Mapping[str, Any],
    progress: Progress,
    manifest: Mapping[str, Any],
    ranks: Ranks,
) -> Progress:
    """`progress` without a best accuracy that no checkpoint here has, or that is of other texts or languages.

    The state that the run goes on from is then the first to be validated: there may be no update to come.
    """
    is_here: bool = ranks.gathered((config.run.save_dir / BEST).exists())[0]
    before = manifest["finetuned"]
    is_same = all(before[name] == facts[name] for name in ("valid_sha256", "decided_by"))
    if is_here and is_same:
        return progress
    if not is_same:
        logger.info(
            "validation texts, or the languages that decide, are others: the best checkpoint is looked for anew"
        )
    return dataclasses.replace(
        progress,
        best_accuracy=None,
        bad_validations=0,
        validation_due=True,
        plateau=progress.plateau if is_same else without_best(progress.plateau),
    )


def describe(run: Finetuning) -> None:
    """Says what will happen."""
    geometry, epoch, data = run.geometry, run.order.epoch_samples, run.config.data
    logger.info(describe_schedule(run.config.optimization))
    logger.info(
        f"batch: {geometry.batch} examples an update ({geometry.rows} rows x {geometry.accumulation} micro-batches x "
        f"{geometry.world_size} ranks); an epoch is {epoch} examples, {math.ceil(epoch / geometry.batch)} updates"
        + (f", and the run at most {most}" if (most := run.config.optimization.max_update) else "")
        + f"; the best is by the accuracy in {', '.join(stop_languages(data))}"
    )
    logger.info(
        "tokens per second and tflops count the examples' own tokens, without padding: three times the forward matrix "
        "products of layers and attention; losses are bits per example"
    )


# ------------------------------------------------------------------------------- figures and saves


def count_tokens(run: Finetuning, first: int) -> None:
    """Tells the stopwatch of an update that began at sample `first`."""
    numbers = run.order.samples(first, run.geometry.batch).blocks.tolist()
    lengths = [len(run.task.train.rows[number]) for number in numbers]
    flops = sum(useful_flops(run.model.shape, rows=1, tokens=n, masked=0) for n in lengths)
    run.stopwatch.count_tokens(sum(lengths), flops)


def logged(run: Finetuning, progress: Progress) -> Progress:
    """Writes the figures since this was last called; `progress` with its chains. All ranks must call it."""
    engine, ranks, options = run.engine, run.engine.ranks, run.config.run
    progress = dataclasses.replace(progress, chains=run.digests.write())
    engine.check()
    sums = ranks.sum(run.sums.cpu().clone())
    run.sums.zero_()
    if too_many_skipped(engine, options):
        raise skipped_too_many(engine, options)
    progress = dataclasses.replace(progress, skipped_updates=engine.skipped_updates())
    figures = accuracy_figures(sums, run.model.languages)
    figures |= update_figures(engine, run.config.optimization, progress)
    figures |= {
        "epoch": progress.samples / run.order.epoch_samples,
        **run.stopwatch.take(),
        **time_left(run.config.optimization, progress),
    }
    run.log.write("train", progress.update, figures)
    run.slow_hosts.watch(ranks.each(sum(figures["seconds"][part] for part in WORK)))
    return progress


def validated(run: Finetuning, progress: Progress) -> tuple[Progress, bool]:
    """Validates; returns the progress with the schedule moved, and whether this is the best so far (as good counts)."""
    run.stopwatch.enter("validation")
    run.engine.train(False)
    sums, _ = tried(
        run.engine,
        run.task.valid,
        rows=run.geometry.rows,
        languages=len(run.model.languages),
        ranks=run.engine.ranks,
    )
    figures = accuracy_figures(sums, run.model.languages)
    is_whole = int(sums[1].sum()) == len(run.task.valid.rows)
    check_finite(figures["loss"] if is_whole else math.nan, progress, run.config.run)
    decides = stop_languages(run.config.data)
    accuracy, loss = (
        sum(figures[of][language] for language in decides) / len(decides)
        for of in ("accuracy_per_language", "loss_per_language")
    )
    before = -1.0 if progress.best_accuracy is None else progress.best_accuracy
    run.log.write("valid", progress.update, {**figures, "deciding_accuracy": accuracy})
    progress = dataclasses.replace(
        progress,
        plateau=plateau_after(
            progress.plateau, loss, run.config.optimization, update=progress.update
        ),
        best_accuracy=max(accuracy, before),
        bad_validations=0 if accuracy > before else progress.bad_validations + 1,
        validation_due=False,
    )
    return progress, accuracy >= before


@torch.no_grad()
def tried(
    scores_of: Callable[[LabelledBatch], Tensor],
    examples: Examples,
    *,
    rows: int,
    languages: int,
    ranks: Ranks,
) -> tuple[Tensor, NDArray[np.int64]]:
    """(3, L) sums (classification.outcome) and (N,) predicted labels of all examples, the same on every rank.

    Every rank makes the same number of calls, as ZeRO 3 needs: one that has run out of examples repeats one that does
    not count.
    """
    lengths = np.array([len(row) for row in examples.rows])
    by_length = np.argsort(lengths, kind="stable")  # little padding
    own = by_length[ranks.rank :: ranks.world_size]
    most = -(-len(lengths) // ranks.world_size)
    sums = torch.zeros(3, languages, dtype=torch.float64)
    predicted = torch.zeros(len(lengths), dtype=torch.int64)
    for first in range(0, most, rows):
        numbers = own[first : first + rows]
        batch = examples.batch(numbers if len(numbers) else by_length[:1])
        if not len(numbers):
            batch = batch._replace(labels=torch.full_like(batch.labels, NO_LABEL))
        batch = on_device(batch, ranks.device)
        scores = scores_of(batch)
        sums += outcome(scores, batch, languages).cpu()
        if len(numbers):
            predicted[torch.from_numpy(numbers)] = scores.argmax(dim=1).cpu()
    return ranks.sum(sums), ranks.sum(predicted).numpy()


def save(run: Finetuning, progress: Progress, names: Sequence[str]) -> None:
    """Begins to write a checkpoint; once it is whole, names it and deletes the one that nothing names any more."""
    run.stopwatch.enter("checkpoint")
    save_dir = run.config.run.save_dir
    epoch = max((progress.samples - run.geometry.batch) // run.order.epoch_samples + 1, 1)
    folder = save_dir / checkpoint.folder_name(epoch, progress.update)
    description = {
        "configuration": to_dict(run.config),
        "finetuned": run.facts,
        "languages": list(run.model.languages),
        "vocab_size": len(run.model.to_ids.dictionary),
        "dictionary_sha256": run.model.to_ids.dictionary.sha256,
        "epoch_samples": run.order.epoch_samples,
        "blocks": {
            language: int((run.task.train.languages == number).sum())
            for number, language in enumerate(run.model.languages)
            if language in run.config.data.train_langs
        },
        "batch_samples": run.geometry.batch,
    }
    run.engine.ranks.on_first(lambda: refuse_if_gone(save_dir))

    def name() -> None:
        checkpoint.name_checkpoint(folder, names, keep_last_epochs=-1, keep_update=lambda _: False)
        logger.info(f"saved {folder} as {', '.join(names)}")

    run.saver.begin(folder, run.engine, progress, description, run.companions, name)


# ------------------------------------------------------------------------------------------- test


def test(run: Finetuning) -> None:
    """Tests the best checkpoint on all test languages: a table, and test.json. All ranks must call it."""
    ranks, languages, test_data = run.engine.ranks, run.model.languages, run.task.test
    # The first rank's: another host may still see an older link.
    folder: Path = ranks.gathered((run.config.run.save_dir / BEST).resolve())[0]
    manifest = checkpoint.read_manifest(folder)
    best = load_classifier(folder, manifest, len(run.model.to_ids.dictionary)).to(ranks.device)
    sums, predicted = tried(
        best, test_data, rows=run.geometry.rows, languages=len(languages), ranks=ranks
    )
    accuracies = accuracy_figures(sums, languages)["accuracy_per_language"]
    results = {
        language: {
            "examples": int((mine := test_data.languages == languages.index(language)).sum()),
            "accuracy": accuracies[language],
            "labels": test_data.labels[mine].tolist(),
            "predicted": predicted[mine].tolist(),
        }
        for language in run.config.data.test_langs
    }
    if ranks.rank == 0:
        sys.stdout.write(table(results) + "\n")
        write_json(run, folder, results)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracies as fixed-width text, a line for each language and their mean."""
    lines = [f"{'language':>8} {'examples':>8} {'accuracy %':>10}"]
    lines += [f"{name:>8} {r['examples']:>8} {r['accuracy']:>10.2f}" for name, r in results.items()]
    mean = sum(r["accuracy"] for r in results.values()) / len(results)
    return "\n".join(
        [*lines, f"{'mean':>8} {sum(r['examples'] for r in results.values()):>8} {mean:>10.2f}"]
    )


def write_json(run: Finetuning, folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    content = {
        "checkpoint": folder.name,
        "model": run.model.name,
        "train_langs": run.config.data.train_langs,
        "labels": run.task.labels,
        "languages": results,
    }
    with replacing(run.config.run.save_dir / "test.json") as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    config = parse(FinetuneConfig, argv, description=__doc__)
    return run_on_ranks(
        "finetune",
        config.run,
        LAUNCHER,
        check=lambda ranks: check(config, ranks),
        work=lambda *joined: finetune(config, *joined),
    )


if __name__ == "__main__":
    sys.exit(run_stage("finetune", main))
