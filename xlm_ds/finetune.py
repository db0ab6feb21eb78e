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
from typing import Any, NamedTuple

from xlm_ds.config import FinetuneConfig, TrainConfig, check_languages
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
from xlm_ds.architectures import ModelShape, parameter_count, useful_flops
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
from xlm_ds.evaluate import shape_of
from xlm_ds.files import replacing
from xlm_ds.geometry import Geometry, divided
from xlm_ds.host_facts import checkpoint_bytes
from xlm_ds.labelled import SPLITS, LabelledFiles, find_labelled
from xlm_ds.metrics import WORK, RunLog, SlowHosts, Stopwatch
from xlm_ds.model import build_model
from xlm_ds.order import Order, build_order
from xlm_ds.preflight import compare_hosts, request_of
from xlm_ds.pretrained import load_classifier, longest_row
from xlm_ds.process import asked_to_stop, join, run_on_ranks, stopped
from xlm_ds.run import (
    Saved,
    advanced,
    check_finite,
    deepspeed_settings,
    is_turn,
    open_log,
    read_companions,
    refuse_if_a_name_is_a_folder,
    refuse_if_gone,
    seed_dropout,
    skipped_too_many,
    start_digests,
    time_left,
    too_many_skipped,
    update_figures,
)
from xlm_ds.schedule import check_schedule, describe_schedule, lr_at, lr_exhausted, plateau_after
from xlm_ds.text_ids import TextToIds, rows_of_texts

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


class Base(NamedTuple):
    """The pretrained model that the run begins with."""

    folder: Path
    manifest: Mapping[str, Any]
    trained: TrainConfig
    shape: ModelShape
    to_ids: TextToIds

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.manifest["languages"])


class Task(NamedTuple):
    """What is to be learnt. Examples have the model's numbers of languages."""

    labels: tuple[str, ...]
    texts_per_example: int  # 1, or 2 where pairs are classified
    train: Examples
    valid: Examples
    test: Examples


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


def begin_run(
    config: FinetuneConfig, ranks: Ranks, hosts: Sequence[str]
) -> tuple[Finetuning, Progress]:
    """The run from its start, or from the checkpoint that it goes on from. All ranks must call it."""
    refuse_if_a_name_is_a_folder(config.run.save_dir)
    model = open_base(config)
    need = checkpoint_bytes(parameter_count(model.shape))
    compare_hosts(request_of(config), lambda _: need, ranks)
    saved = checkpoint.find_whole(config.run.save_dir, config.run.restore_file, ranks)
    options = config.optimization
    rows = options.max_rows or -(-options.batch_size // ranks.world_size)
    geometry = divided(options.batch_size, rows, ranks.world_size, "--batch-size")
    files = find_labelled(config.data.data)
    logger.info(f"{config.data.data}: {files.description}")
    config = with_languages(config, files, model.languages)
    task = read_task(config, files, model)
    check_same_on_all(task, ranks)
    order = build_order([len(task.train.rows)], alpha=1.0, seed=config.data.seed)
    config = with_last_update(config, order.epoch_samples)
    facts = facts_of(config, model, task)
    if saved is not None:
        check_same_task(config, facts, *saved)
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


def open_base(config: FinetuneConfig) -> Base:
    """Raises InputError if it is no pretrained checkpoint."""
    folder = checkpoint.checkpoint_folder(config.data.model).resolve()
    manifest = checkpoint.read_manifest(folder)
    trained = checkpoint.read_configuration(folder, manifest)
    given = {
        name: value
        for name in ("dropout", "attention_dropout")
        if (value := getattr(config.data, name)) is not None
    }
    trained = dataclasses.replace(trained, model=dataclasses.replace(trained.model, **given))
    checkpoint.check_files(
        folder, manifest, [n for n in manifest["sha256"] if not n.endswith(".safetensors")]
    )
    to_ids = TextToIds.load(folder)
    shape = shape_of(
        trained, vocab_size=len(to_ids.dictionary), languages=len(manifest["languages"])
    )
    return Base(folder, manifest, trained, shape, to_ids)


def with_languages(
    config: FinetuneConfig, files: LabelledFiles, known: Sequence[str]
) -> FinetuneConfig:
    """`config` with the languages to train and to test on. Raises InputError for what the model or the data has not."""
    chosen: dict[str, Any] = {}
    for flag, split in (("train_langs", "train"), ("test_langs", "test")):
        shown, there = "--" + flag.replace("_", "-"), files.languages(split)
        given: tuple[str, ...] = getattr(config.data, flag)
        check_languages(given, shown)
        for language in given:
            if language not in known:
                raise InputError(f"{shown} {language}: the model knows {', '.join(known)}")
            if language not in there:
                raise InputError(
                    f"{shown} {language}: {config.data.data} has {split} texts in {', '.join(there) or 'no language'}"
                )
        chosen[flag] = given or tuple(language for language in known if language in there)
        if not chosen[flag]:
            raise InputError(
                f"{config.data.data}: has {split} texts in {', '.join(there) or 'no language'}; the model knows "
                f"{', '.join(known)}"
            )
        if not given and len(there) > len(chosen[flag]):
            left_out = ", ".join(sorted(set(there) - set(chosen[flag])))
            logger.info(
                f"{split} texts in languages that the model does not know are left out: {left_out}"
            )
    data = dataclasses.replace(config.data, **chosen)
    validated_on = files.languages("valid")
    for language in stop_languages(data):
        if language not in validated_on:
            raise InputError(
                f"{data.data}: has no validation texts in {language}, whose accuracy is to decide which checkpoint is "
                f"the best; there are {', '.join(validated_on) or 'none'}: name one with --stop-lang"
            )
        if language not in known:
            raise InputError(f"--stop-lang {language}: the model knows {', '.join(known)}")
    return dataclasses.replace(config, data=data)


def stop_languages(data: Any) -> tuple[str, ...]:
    """Of a FinetuneDataConfig, those whose mean accuracy decides."""
    return data.train_langs if data.stop_lang is None else (data.stop_lang,)


def with_last_update(config: FinetuneConfig, epoch_samples: int) -> FinetuneConfig:
    """`config` with the number of updates that --max-epoch means, which a schedule may need."""
    options = config.optimization
    if options.max_epoch:
        updates = math.ceil(options.max_epoch * epoch_samples / options.batch_size)
        updates = min(updates, options.max_update or updates)
        options = dataclasses.replace(options, max_update=updates)
    check_schedule(options)
    return dataclasses.replace(config, optimization=options)


def read_task(config: FinetuneConfig, files: LabelledFiles, model: Base) -> Task:
    """All texts as ids. Raises InputError for a label that no training text has."""
    data = config.data
    begun = time.monotonic()
    texts = {
        "train": data.train_langs,
        "valid": tuple(
            language
            for language in model.languages
            if language in files.languages("valid")
            and language in {*data.test_langs, *data.train_langs, *stop_languages(data)}
        ),
        "test": data.test_langs,
    }
    found = {split: {lg: files.read(split, lg) for lg in texts[split]} for split in SPLITS}
    labels = tuple(sorted({e.label for part in found["train"].values() for e in part.examples}))
    if len(labels) == 1:
        raise InputError(f"{data.data}: all training texts have the label {labels[0]}")
    numbers = {label: number for number, label in enumerate(labels)}
    longest = longest_row(model.trained, model.to_ids.dictionary, model.languages)
    width = 0
    parts: dict[str, Examples] = {}
    for split, by_language in found.items():
        rows: list[NDArray[np.int32]] = []
        label_ids: list[int] = []
        languages: list[int] = []
        for language, (path, examples) in by_language.items():
            for example in examples:
                where = f"{path}:{example.line}"
                if example.label not in numbers:
                    raise InputError(
                        f"{where}: label {example.label!r} is in no training text; there are {', '.join(labels)}"
                    )
                if len(example.texts) != (width := width or len(example.texts)):
                    raise InputError(
                        f"{where}: has {len(example.texts)} texts, where other files have {width}"
                    )
            rows += rows_of_texts(
                [example.texts for example in examples],
                language,
                model.to_ids,
                longest,
                lambda n, path=path, examples=examples: f"{path}:{examples[n].line}",  # type: ignore[misc]
            )
            label_ids += [numbers[example.label] for example in examples]
            languages += [model.languages.index(language)] * len(examples)
        parts[split] = Examples(rows, np.array(label_ids), np.array(languages))
        shown = ", ".join(
            f"{language} {len(part.examples)}" for language, part in by_language.items()
        )
        logger.info(f"{split}: {shown}")
    what = "pairs of texts" if width > 1 else "texts"
    logger.info(
        f"{what} with {len(labels)} labels ({', '.join(labels)}), as ids in {time.monotonic() - begun:.1f} s"
    )
    return Task(labels, width, **parts)


def check_same_on_all(task: Task, ranks: Ranks) -> None:
    """Raises InputError, on all ranks, if one has read other texts."""
    digest = [examples.sha256() for examples in (task.train, task.valid, task.test)]
    found = ranks.gathered([*task.labels, *digest])
    other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
    ranks.raise_on_all(
        InputError(
            f"rank {other} has read other texts, or made other ids of them, than rank 0; give all hosts the same "
            "model and data"
        )
        if other is not None
        else None
    )


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
    begun = "random weights" if data.random_weights else str(model.folder)
    logger.info(f"{model.trained.model.arch} of {begun}: {parameters:,} parameters; {path}")
    if saved is None:
        init_output(classifier, data.seed)
        return Engine(classifier, settings, ranks, where=str(path)), Progress(
            batch_at_start=geometry.batch
        )
    folder, manifest = saved
    state = checkpoint.stored_state(folder, manifest)
    checkpoint.copy_weights(classifier, state["weight"], folder)
    engine = Engine(classifier, settings, ranks, where=str(path))
    progress = checkpoint.read_progress(manifest)
    engine.load_state(
        state,
        update=progress.update,
        skipped=progress.skipped_updates,
        samples=progress.samples,
        warm_up_batch=on_device(task.train.batch(np.arange(1)), ranks.device),
    )
    logger.info(f"going on from {folder}: update {progress.update}, {progress.samples} samples")
    return engine, progress


def facts_of(config: FinetuneConfig, model: Base, task: Task) -> dict[str, Any]:
    """What a checkpoint says of the task, and what `Pretrained.load` needs."""
    return {
        "labels": list(task.labels),
        "texts_per_example": task.texts_per_example,
        "pooling": config.data.pooling,
        "model": str(model.folder),
        "model_sha256": model.manifest["manifest_sha256"],
        "configuration": to_dict(model.trained),
        "random_weights": config.data.random_weights,
        "train_sha256": task.train.sha256(),
        "valid_sha256": task.valid.sha256(),
    }


def check_same_task(
    config: FinetuneConfig, now: Mapping[str, Any], folder: Path, manifest: Mapping[str, Any]
) -> None:
    """Refuses another model, labels or pooling than the checkpoint's; says what else changes the samples to come."""
    if not checkpoint.is_finetuned(manifest):
        raise InputError(f"{folder}: is of train, not of finetune; give another --save-dir")
    before = manifest["finetuned"]
    if before["model_sha256"] != now["model_sha256"]:
        raise InputError(f"{folder}: was made from another model ({before['model']})")
    if before["labels"] != now["labels"]:
        raise InputError(
            f"{folder}: was trained with the labels {', '.join(before['labels'])}; the training texts now have "
            f"{', '.join(now['labels'])}"
        )
    if before["pooling"] != now["pooling"]:
        raise InputError(f"{folder}: was trained with --pooling {before['pooling']}; go on with it")
    if before["random_weights"] != now["random_weights"]:
        raise InputError(f"{folder}: --random-weights was {before['random_weights']} at its begin")
    if (
        manifest["batch_samples"] != config.optimization.batch_size
    ):  # its epochs are so many updates
        raise InputError(
            f"{folder}: was trained with --batch-size {manifest['batch_samples']}; go on with it"
        )
    facts = {"train_sha256": "texts", "seed": "--seed"}
    old = {**before, "seed": manifest["configuration"]["data"]["seed"]}
    current = {**now, "seed": config.data.seed}
    for name, shown in facts.items():
        if old[name] != current[name]:
            logger.info(
                f"{shown} changed: the samples from here on are others than they would have been"
            )


def with_comparable_best(
    config: FinetuneConfig,
    facts: Mapping[str, Any],
    progress: Progress,
    manifest: Mapping[str, Any],
    ranks: Ranks,
) -> Progress:
    """`progress` without a best accuracy that no checkpoint here has, or that is of other validation texts."""
    is_here: bool = ranks.gathered((config.run.save_dir / BEST).exists())[0]
    if is_here and manifest["finetuned"]["valid_sha256"] == facts["valid_sha256"]:
        return progress
    if is_here:
        logger.info("validation texts changed: the best checkpoint is looked for anew")
    return dataclasses.replace(progress, best_accuracy=None, bad_validations=0)


def describe(run: Finetuning) -> None:
    """Says what will happen."""
    geometry, epoch, data = run.geometry, run.order.epoch_samples, run.config.data
    logger.info(describe_schedule(run.config.optimization))
    logger.info(
        f"batch: {geometry.batch} examples an update ({geometry.rows} rows x {geometry.accumulation} micro-batches x "
        f"{geometry.world_size} ranks); an epoch is {epoch} examples, {math.ceil(epoch / geometry.batch)} updates, and "
        f"the run at most {run.config.optimization.max_update}; the best is by the accuracy in "
        f"{', '.join(stop_languages(data))}"
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
    folder = (run.config.run.save_dir / BEST).resolve()
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
        "model": str(run.model.folder),
        "train_langs": run.config.data.train_langs,
        "labels": run.task.labels,
        "languages": results,
    }
    with replacing(run.config.run.save_dir / "test.json") as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    config = parse(FinetuneConfig, argv, description=__doc__)
    return run_on_ranks("finetune", config.run, LAUNCHER, lambda *joined: finetune(config, *joined))


if __name__ == "__main__":
    sys.exit(run_stage("finetune", main))
