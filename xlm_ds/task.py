"""What a fine-tuning begins with and is to learn: a pretrained model, labelled texts, and what checkpoints say of both.

model = open_base(config, None)
config = with_languages(config, files := find_labelled(config.data.data), model.languages)
texts = read_texts(config.data, files, model.languages)     # seconds; whatever is wrong with a line is refused
task = build_task(texts, model)                             # minutes: rows of ids
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xlm_ds import checkpoint
from xlm_ds.architectures import ModelShape
from xlm_ds.classification import Examples
from xlm_ds.config import FinetuneConfig, FinetuneDataConfig, TrainConfig, check_languages
from xlm_ds.engine import Ranks
from xlm_ds.evaluate import shape_of
from xlm_ds.flags import to_dict
from xlm_ds.labelled import SPLITS, Example, Labelled, LabelledFiles
from xlm_ds.log import InputError, logger
from xlm_ds.pretrained import base_configuration, longest_row
from xlm_ds.text_ids import TextToIds, rows_of_texts

# ------------------------------------------------------------------------------------- the model


class Base(NamedTuple):
    """The pretrained model that the run began with."""

    name: str  # its folder's
    sha256: str  # of its manifest
    folder: Path  # where its files are: there, or in the fine-tuning's own checkpoint, which has all but the weights
    manifest: Mapping[str, Any]
    trained: TrainConfig
    shape: ModelShape
    to_ids: TextToIds

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.manifest["languages"])


def open_base(config: FinetuneConfig, saved: tuple[Path, Mapping[str, Any]] | None) -> Base:
    """Of a run that goes on from `saved` what that says, so that its model may have gone on too, or be gone.

    Raises InputError if the model given is no pretrained checkpoint.
    """
    if saved is not None and checkpoint.is_finetuned(saved[1]):
        folder, manifest = saved
        before = manifest["finetuned"]
        with contextlib.suppress(InputError):  # find_whole goes round what is damaged
            trained = base_configuration(folder, manifest)
            return _base(config, before["model"], before["model_sha256"], folder, manifest, trained)
    folder = checkpoint.checkpoint_folder(config.data.model).resolve()
    manifest = checkpoint.read_manifest(folder)
    trained = checkpoint.read_configuration(folder, manifest)
    return _base(config, str(folder), manifest["manifest_sha256"], folder, manifest, trained)


def _base(
    config: FinetuneConfig,
    name: str,
    sha256: str,
    folder: Path,
    manifest: Mapping[str, Any],
    trained: TrainConfig,
) -> Base:
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
    return Base(name, sha256, folder, manifest, trained, shape, to_ids)


# ------------------------------------------------------------------------------------- languages


def with_languages(
    config: FinetuneConfig, files: LabelledFiles, known: Sequence[str]
) -> FinetuneConfig:
    """`config` with the languages to train and to test on. Raises InputError for what the model or the data has not."""
    data = dataclasses.replace(
        config.data,
        train_langs=_chosen(config.data, "train", files, known),
        test_langs=_chosen(config.data, "test", files, known),
    )
    _check_validation(data, files, known)
    return dataclasses.replace(config, data=data)


def _chosen(
    data: FinetuneDataConfig, split: str, files: LabelledFiles, known: Sequence[str]
) -> tuple[str, ...]:
    """The languages of a split that are given, or else all that both the model and the data have."""
    given, flag = (
        (data.train_langs, "--train-langs")
        if split == "train"
        else (data.test_langs, "--test-langs")
    )
    there = files.languages(split)
    has = f"{data.data} has {split} texts in {', '.join(there) or 'no language'}"
    check_languages(given, flag)
    for language in given:
        if language not in known:
            raise InputError(f"{flag} {language}: the model knows {', '.join(known)}")
        if language not in there:
            raise InputError(f"{flag} {language}: {has}")
    if given:
        return given
    chosen = tuple(language for language in known if language in there)
    if not chosen:
        raise InputError(f"{has}; the model knows {', '.join(known)}")
    if left_out := sorted(set(there) - set(chosen)):
        logger.info(
            f"{split} texts in languages that the model does not know are left out: {', '.join(left_out)}"
        )
    return chosen


def _check_validation(data: FinetuneDataConfig, files: LabelledFiles, known: Sequence[str]) -> None:
    there = files.languages("valid")
    for language in stop_languages(data):
        if language not in known:
            raise InputError(f"--stop-lang {language}: the model knows {', '.join(known)}")
        if language not in there:
            others = [other for other in there if other in known]
            raise InputError(
                f"{data.data}: has no validation texts in {language}, by whose accuracy the best checkpoint is chosen; "
                f"add {files.name_of('valid', language)}"
                + (f", or choose by another language: --stop-lang {others[0]}" if others else "")
            )


def stop_languages(data: FinetuneDataConfig) -> tuple[str, ...]:
    """Those whose mean accuracy decides."""
    return data.train_langs if data.stop_lang is None else (data.stop_lang,)


# ----------------------------------------------------------------------------------------- texts


class Texts(NamedTuple):
    """The labelled texts of a task, as they are in the files."""

    labels: tuple[str, ...]
    splits: Mapping[str, Mapping[str, Labelled]]  # of each split, of each language

    def count(self, split: str) -> int:
        return sum(len(part.examples) for part in self.splits[split].values())


def read_texts(data: FinetuneDataConfig, files: LabelledFiles, known: Sequence[str]) -> Texts:
    """Raises InputError for what is wrong with a line, or for a label that no training text has."""
    validated_on = {*data.test_langs, *data.train_langs, *stop_languages(data)}
    valid_there = files.languages("valid")
    languages = {
        "train": data.train_langs,
        "valid": tuple(name for name in known if name in validated_on and name in valid_there),
        "test": data.test_langs,
    }
    splits = {split: {lg: files.read(split, lg) for lg in languages[split]} for split in SPLITS}
    labels = tuple(sorted({e.label for part in splits["train"].values() for e in part.examples}))
    if len(labels) == 1:
        raise InputError(f"{data.data}: all training texts have the label {labels[0]}")
    texts = Texts(labels, splits)
    _check_alike(texts)
    _warn_of_headers(texts)
    return texts


def _warn_of_headers(texts: Texts) -> None:
    found = [(path, e) for path, examples in texts.splits["train"].values() for e in examples]
    counts = Counter(example.label for _, example in found)
    for path, example in found:
        if example.line == 1 and counts[example.label] == 1:
            logger.warning(
                f"{path}:1: no other training text has the label {example.label!r}; if the line is a header, take it "
                "out"
            )


def _check_alike(texts: Texts) -> None:
    width = 0
    for path, example in _all_examples(texts):
        if example.label not in texts.labels:
            raise InputError(
                f"{path}:{example.line}: label {example.label!r} is in no training text; there are "
                f"{', '.join(texts.labels)}"
            )
        width = width or len(example.texts)
        if len(example.texts) != width:
            raise InputError(
                f"{path}:{example.line}: has {len(example.texts)} texts, where other files have {width}"
            )


def _all_examples(texts: Texts) -> Iterator[tuple[Path, Example]]:
    for by_language in texts.splits.values():
        for path, examples in by_language.values():
            for example in examples:
                yield path, example


# ------------------------------------------------------------------------------------------- ids


class Task(NamedTuple):
    """What is to be learnt. Examples have the model's numbers of languages."""

    labels: tuple[str, ...]
    texts_per_example: int  # 1, or 2 where pairs are classified
    train: Examples
    valid: Examples
    test: Examples
    sha256: Mapping[str, str]  # of each split


def build_task(texts: Texts, model: Base) -> Task:
    """All texts as ids; says how many there are. Raises InputError for a text without a word."""
    begun = time.monotonic()
    for split, by_language in texts.splits.items():
        counts = (f"{language} {len(part.examples)}" for language, part in by_language.items())
        logger.info(f"{split}: {', '.join(counts)}")
    numbers = {label: number for number, label in enumerate(texts.labels)}
    examples = {
        split: _examples(by_language, numbers, model) for split, by_language in texts.splits.items()
    }
    _, first = next(_all_examples(texts))
    width = len(first.texts)
    logger.info(
        f"{'texts' if width == 1 else 'pairs of texts'} with {len(texts.labels)} labels "
        f"({', '.join(texts.labels)}), as ids in {time.monotonic() - begun:.1f} s"
    )
    sha256 = {split: examples[split].sha256() for split in SPLITS}
    return Task(texts.labels, width, **examples, sha256=sha256)


def _examples(
    by_language: Mapping[str, Labelled], numbers: Mapping[str, int], model: Base
) -> Examples:
    longest = longest_row(model.trained, model.to_ids.dictionary, model.languages)
    found = Examples([], np.empty(0, np.int64), np.empty(0, np.int64))
    for language, part in by_language.items():
        count = len(part.examples)
        texts = [example.texts for example in part.examples]
        rows = rows_of_texts(texts, language, model.to_ids, longest, _line_of(part))
        labels = np.array([numbers[example.label] for example in part.examples])
        found = Examples(
            found.rows + rows,
            np.append(found.labels, labels),
            np.append(found.languages, np.full(count, model.languages.index(language))),
        )
    return found


def _line_of(part: Labelled) -> Callable[[int], str]:
    return lambda number: f"{part.path}:{part.examples[number].line}"


def check_same_on_all(task: Task, ranks: Ranks) -> None:
    """Raises InputError, on all ranks, if one has read other texts."""
    found = ranks.gathered([task.labels, task.sha256])
    other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
    ranks.raise_on_all(
        InputError(
            f"rank {other} has read other texts, or made other ids of them, than rank 0; give all hosts the same "
            "model and data"
        )
        if other is not None
        else None
    )


# ----------------------------------------------------------------------- what checkpoints say of it


def facts_of(config: FinetuneConfig, model: Base, task: Task) -> dict[str, Any]:
    """What a checkpoint says of the task, and what `Pretrained.load` needs."""
    return {
        "labels": list(task.labels),
        "texts_per_example": task.texts_per_example,
        "pooling": config.data.pooling,
        "model": model.name,
        "model_sha256": model.sha256,
        "configuration": to_dict(model.trained),
        "random_weights": config.data.random_weights,
        "train_sha256": task.sha256["train"],
        "valid_sha256": task.sha256["valid"],
        "decided_by": list(stop_languages(config.data)),
    }


def check_same_run(config: FinetuneConfig, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses to go on from a checkpoint of something else: of train, another model, pooling or batch."""
    if not checkpoint.is_finetuned(manifest):
        raise InputError(f"{folder}: is of train, not of finetune; give another --save-dir")
    before = manifest["finetuned"]
    given = config.data.model
    if str(given) != manifest["configuration"]["data"]["model"]:
        place = checkpoint.checkpoint_folder(given).resolve()
        other = checkpoint.read_manifest(place)
        checkpoint.read_configuration(place, other)  # refuses a fine-tuned one
        if other["manifest_sha256"] != before["model_sha256"]:
            raise InputError(
                f"{folder}: was made from another model than {given}; to go on, give "
                f"{manifest['configuration']['data']['model']}, or begin anew in another --save-dir"
            )
    if before["pooling"] != config.data.pooling:
        raise InputError(f"{folder}: was trained with --pooling {before['pooling']}; go on with it")
    if before["random_weights"] != config.data.random_weights:
        how = "with --random-weights" if before["random_weights"] else "without --random-weights"
        raise InputError(f"{folder}: was begun {how}; go on so")
    batch = manifest["batch_samples"]  # its epochs are so many updates
    if batch != config.optimization.batch_size:
        raise InputError(f"{folder}: was trained with --batch-size {batch}; go on with it")


def check_same_labels(texts: Texts, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses other labels than the checkpoint's."""
    before = manifest["finetuned"]["labels"]
    if before != list(texts.labels):
        raise InputError(
            f"{folder}: was trained with the labels {', '.join(before)}; the training texts now have "
            f"{', '.join(texts.labels)}"
        )


def tell_other_samples(
    config: FinetuneConfig, facts: Mapping[str, Any], count: int, manifest: Mapping[str, Any]
) -> None:
    """Says what changes the samples to come, of which an epoch has `count`."""
    changes = []
    if manifest["finetuned"]["train_sha256"] != facts["train_sha256"]:
        before = manifest["epoch_samples"]
        numbers = "" if before == count else f" ({before}, now {count})"
        changes.append(f"the training texts are others{numbers}")
    seed = manifest["configuration"]["data"]["seed"]
    if seed != config.data.seed:
        changes.append(f"--seed was {seed} and is now {config.data.seed}")
    for change in changes:
        logger.info(f"{change}: the samples from here on are others than they would have been")
