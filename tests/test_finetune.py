"""Fine-tuning learns what can be learnt, in the order that it says, and goes on as if it had never stopped."""

import json
import math
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import xlm_ds
from test_end_to_end import MODULE, ROOT, call, launcher, start, succeed, wait_for_update
from test_train import NeverStop, StopAt, last_weights, losses_in, records_in, train_here
from xlm_ds import checkpoint, finetune, prove, report
from xlm_ds.batches import LabelledBatch, Rows
from xlm_ds.classification import Classifier, Examples, accuracy_figures, outcome
from xlm_ds.config import FinetuneConfig
from xlm_ds.deepspeed_config import CONFIG_DIRECTORY
from xlm_ds.dictionary import EOS, PAD, Dictionary
from xlm_ds.engine import Engine, Ranks
from xlm_ds.flags import parse
from xlm_ds.lifeline import Ending
from xlm_ds.log import EXIT_DIFFERENT, InputError
from xlm_ds.text_ids import joined_row

FLAGS = ["--train-langs=en", "--lr=3e-3", "--log-interval=1", "--batch-size=16"]
NO_DROPOUT = ["--dropout=0", "--attention-dropout=0"]
CLASSES = ("animals", "colours", "numbers")


@pytest.fixture(scope="module")
def base(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """A model of ar, en and hi, hardly trained."""
    folder = tmp_path_factory.mktemp("base") / "run"
    train_here(tiny_data, folder, ranks, "--max-update=2")
    return folder


def lines_of(words: list[str], count: int, seed: int, texts: int) -> list[str]:
    """Labelled texts: a class's own words among others. Of pairs the second text decides."""
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        which = number % len(CLASSES)
        own, others = words[3 * which : 3 * which + 3], words[9:]
        telling = draw.sample(own, 2) + draw.sample(others, draw.randrange(4))
        draw.shuffle(telling)
        first = [" ".join(draw.sample(words, 3))] if texts > 1 else []
        lines.append("\t".join([CLASSES[which], *first, " ".join(telling)]))
    return lines


def write_task(folder: Path, base: Path, texts: int = 1) -> Path:
    symbols = Dictionary.load(base / checkpoint.LAST / "dict.txt").symbols
    words = [symbol for symbol in symbols[10:] if symbol.isalpha()][:30]
    folder.mkdir()
    for seed, (split, count) in enumerate((("train", 96), ("valid", 15), ("test", 30))):
        for language in ("en", "hi"):
            lines = lines_of(words, count, seed, texts)
            (folder / f"{split}.{language}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def task(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task") / "task", base)


Start = Callable[..., Path]


@pytest.fixture
def tune(base: Path, task: Path, tmp_path: Path, ranks: Ranks) -> Start:
    """Fine-tunes in this process; returns the run's folder."""

    def start(
        name: str,
        *flags: str,
        data: Path = task,
        stop: Any = None,
        code: int = 0,
        model: Path = base,
    ) -> Path:
        save_dir = tmp_path / name
        config = parse(
            FinetuneConfig, [str(model), str(data), f"--save-dir={save_dir}", *FLAGS, *flags]
        )
        save_dir.mkdir(exist_ok=True)
        ending = Ending(save_dir)
        ending.begin()
        stop = stop or NeverStop()
        assert finetune.finetune(config, ranks, stop, ending) == code
        return save_dir

    return start


def accuracies(run: Path) -> dict[str, float]:
    content = json.loads((run / "test.json").read_text(encoding="utf-8"))
    return {name: result["accuracy"] for name, result in content["languages"].items()}


# ------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_separable_task_is_learnt_in_the_language_trained_on_and_in_another(
    tune: Start, task: Path, pooling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tune("a", "--max-epoch=12", f"--pooling={pooling}", "--random-weights")
    assert accuracies(run) == {"en": 100.0, "hi": 100.0}
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["en", "30", "100.00"] in printed
    assert ["mean", "60", "100.00"] in printed
    content = json.loads((run / "test.json").read_text(encoding="utf-8"))
    assert content["labels"] == list(CLASSES)
    assert content["languages"]["hi"]["labels"] == [n % 3 for n in range(30)]
    assert content["languages"]["hi"]["predicted"] == content["languages"]["hi"]["labels"]
    valid = [record for record in records_in(run) if record["kind"] == "valid"]
    assert [record["update"] for record in valid] == [6 * epoch for epoch in range(1, 13)]
    assert valid[-1]["accuracy_per_language"] == {"en": 100.0, "hi": 100.0}
    model = xlm_ds.load(run)
    lines = (task / "test.hi.tsv").read_text(encoding="utf-8").splitlines()
    found = model.classify([line.split("\t")[1] for line in lines], "hi", batch_size=7)
    assert [one.label for one in found] == [line.split("\t")[0] for line in lines]
    assert all(1 / 3 < one.probability <= 1 for one in found)
    assert model.encode(["a b"], "en").shape == (1, 32)


def test_pairs_are_learnt_and_classified(tune: Start, base: Path, tmp_path: Path) -> None:
    data = write_task(tmp_path / "pairs", base, texts=2)
    run = tune("a", "--max-epoch=10", "--pooling=mean", data=data)
    assert accuracies(run)["en"] > 80
    rows = [line.split("\t") for line in (data / "test.en.tsv").read_text("utf-8").splitlines()]
    found = xlm_ds.load(run).classify([(first, second) for _, first, second in rows], "en")
    right = sum(one.label == row[0] for one, row in zip(found, rows, strict=True))
    assert 100 * right / len(rows) == pytest.approx(accuracies(run)["en"])
    with pytest.raises(InputError, match="takes a pair of texts here, not 1"):
        xlm_ds.load(run).classify(["a"], "en")


def test_the_best_is_looked_for_anew_where_other_languages_decide(
    tune: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a checkpoint that is good in one language would stand against those that are good in another."""
    run = tune("a", "--max-epoch=2")
    with caplog.at_level("INFO", logger="xlm_ds"):
        tune("a", "--max-epoch=3", "--stop-lang=hi")
    assert "the languages that decide, are others" in caplog.text
    records = [r for r in records_in(run) if r["kind"] == "valid"]
    assert [r["update"] for r in records] == [6, 12, 12, 18]
    manifest = checkpoint.read_manifest(run / checkpoint.BEST)
    assert manifest["finetuned"]["decided_by"] == ["hi"]
    best = max(r["accuracy_per_language"]["hi"] for r in records[2:])
    assert manifest["progress"]["best_accuracy"] == best


def test_updates_given_are_the_only_end(tune: Start) -> None:
    """Not ten epochs too, of which nobody has spoken."""
    run = tune("a", "--max-update=61")
    assert max(losses_in(run)) == 61 > 10 * 96 / 16


def test_a_header_is_no_silent_label(
    tune: Start, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_task(tmp_path / "headed", base)
    path = data / "train.en.tsv"
    path.write_text(f"label\ttext\n{path.read_text(encoding='utf-8')}", encoding="utf-8")
    tune("a", "--max-epoch=1", data=data)
    assert f"{path}:1: no other training text has the label 'label'; if the line is" in caplog.text


def test_training_on_all_languages(tune: Start) -> None:
    run = tune("a", "--train-langs=en,hi", "--max-epoch=1")
    train = [record for record in records_in(run) if record["kind"] == "train"]
    assert set(train[0]["accuracy_per_language"]) == {"en", "hi"}
    assert len(train) == 2 * 96 / 16


def test_the_pretrained_weights_are_begun_with_unless_asked_otherwise(
    tune: Start, base: Path
) -> None:
    flags = ["--max-update=1", "--lr=1e-30"]
    pretrained, name = last_weights(base), "layers.0.ffn.fc1.weight"
    assert torch.equal(last_weights(tune("a", *flags))[f"encoder.{name}"], pretrained[name])
    fresh = last_weights(tune("b", *flags, "--random-weights"))[f"encoder.{name}"]
    assert not torch.equal(fresh, pretrained[name])


# ------------------------------------------------------------------------------------- the same again


def test_resuming_is_bit_equal_to_never_stopping(tune: Start) -> None:
    """Stopped in the middle of an epoch, with dropout on; the missed validation is made up for."""
    whole = tune("whole", "--max-epoch=3")
    stopped = tune("stopped", "--max-epoch=3", stop=StopAt(9), code=75)
    assert max(losses_in(stopped)) == 9
    assert not (stopped / "test.json").exists()
    tune("stopped", "--max-epoch=3", stop=StopAt(3), code=75)  # at an epoch's end
    assert max(losses_in(stopped)) == 12
    tune("stopped", "--max-epoch=3")
    assert losses_in(stopped) == losses_in(whole)
    assert losses_in(stopped, "valid") == losses_in(whole, "valid")
    a, b = last_weights(whole), last_weights(stopped)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (whole / "digests.jsonl").read_bytes() == (stopped / "digests.jsonl").read_bytes()
    before = (whole / "test.json").read_bytes()
    tune("whole", "--max-epoch=3")  # is done already
    assert losses_in(stopped) == losses_in(whole)
    assert (whole / "test.json").read_bytes() == before


def test_micro_batches_give_the_same_losses(tune: Start) -> None:
    whole = losses_in(tune("a", "--max-epoch=1", *NO_DROPOUT))
    parts = losses_in(tune("b", "--max-epoch=1", *NO_DROPOUT, "--max-rows=4"))
    assert parts == pytest.approx(whole, abs=1e-4)


def finetune_command(base: Path, task: Path, save_dir: Path, *flags: str) -> list[str | Path]:
    return ["xlm_ds.finetune", base, task, f"--save-dir={save_dir}", *FLAGS, *flags]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_give_one_ranks_losses(
    stage: int, base: Path, task: Path, tmp_path: Path, tune: Start
) -> None:
    """15 validation texts and 2 languages: one rank has one less than the other."""
    one = tune("one", "--max-epoch=2", *NO_DROPOUT)
    template = json.loads((CONFIG_DIRECTORY / "zero1_fp32.json").read_text(encoding="utf-8"))
    template["zero_optimization"]["stage"] = stage
    (tmp_path / "ds.json").write_text(json.dumps(template), encoding="utf-8")
    flags = ["--max-epoch=2", *NO_DROPOUT, f"--deepspeed_config={tmp_path / 'ds.json'}"]
    two = tmp_path / "two"
    command = finetune_command(base, task, two, *flags)
    succeed(*launcher(tmp_path, 2), *command)
    assert losses_in(two) == pytest.approx(losses_in(one), abs=1e-3)
    assert losses_in(two, "valid") == pytest.approx(losses_in(one, "valid"), abs=1e-3)
    assert accuracies(two) == accuracies(one)
    digests = [
        [
            json.loads(line)["digest"]
            for line in (run / "digests.jsonl").read_text("utf-8").splitlines()[1:]
        ]
        for run in (one, two)
    ]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_two_ranks_continue_on_one(base: Path, task: Path, tmp_path: Path, tune: Start) -> None:
    # A schedule that does not know where the run is to end.
    flags = ["--max-epoch=2", "--lr-scheduler=inverse_sqrt", *NO_DROPOUT]
    one = tune("one", *flags)
    command = finetune_command(base, task, tmp_path / "two", *flags)
    succeed(*launcher(tmp_path, 2), *command, "--max-update=7")
    tune("two", *flags)
    both = losses_in(tmp_path / "two"), losses_in(one)
    for found, expected in zip(*(list(losses.items())[-5:] for losses in both), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(base: Path, task: Path, tmp_path: Path) -> None:
    command = finetune_command(base, task, tmp_path / "run", "--max-epoch=60")
    process = start(*MODULE, *command)
    wait_for_update(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "the same command goes on from it" in output
    output = succeed(*MODULE, *command)
    assert "going on from" in output
    assert re.search(r"^ +mean +60 +100\.00$", output, re.MULTILINE)


@pytest.mark.slow
def test_the_benchmark_of_transfer(base: Path, task: Path, tmp_path: Path) -> None:
    """The task shares its words between the languages, so everything transfers; what is chosen is the best on valid."""
    command: list[str | Path] = [ROOT / "benchmarks" / "finetune.py", base, task]
    command += [f"--work={tmp_path / 'work'}"]
    flags = [
        "--seeds=2",
        "--lrs",
        "1e-9",
        "1e-2",
        "--poolings",
        "mean",
        "--epochs=8",
        "--draws=200",
    ]
    flags += ["--jobs=1", f"--output={tmp_path / 'f.json'}"]
    printed = succeed(sys.executable, *command, *flags)
    result = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert result["chosen_on_source_valid"]["zero-shot"]["lr"] == 1e-2
    assert result["accuracy"]["bag of words"]["hi"] == 100
    for name in ("zero-shot", "untrained", "in language"):
        assert result["accuracy"][name]["transfer"] == result["accuracy"][name]["hi"] > 90
    found = result["differences"]["zero-shot - bag of words"]["hi"]
    assert found["low"] <= found["points"] <= found["high"] <= 0
    assert [goal["reached"] for goal in result["goals"]] == [False, False]
    assert "NOT reached" in printed
    assert len(result["runs"]) == 2 * 2 * 2 + 2
    assert not list((tmp_path / "work").glob("*/checkpoint*")), "they are many"
    again = succeed(sys.executable, *command, *flags)
    assert "% on valid" not in again, "what is done was done again"
    assert (
        json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))["accuracy"]
        == result["accuracy"]
    )


# ------------------------------------------------------------------------------------- early stopping


def test_the_run_ends_when_the_accuracy_has_not_risen_for_some_validations(
    tune: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the language that decides; the test is of the best."""
    rising = {"en": iter([60.0, 40, 40, 40, 40, 40]), "hi": iter([10.0, 20, 20, 15, 30, 30])}
    real = accuracy_figures

    def figures(sums: torch.Tensor, languages: Any) -> dict[str, Any]:
        found = real(sums, languages)
        if set(found["accuracy_per_language"]) == {"en", "hi"} and sums[1].sum() == 30:
            found["accuracy_per_language"] = {name: next(rising[name]) for name in rising}
        return found

    monkeypatch.setattr(finetune, "accuracy_figures", figures)
    run = tune("a", "--stop-lang=hi", "--patience=2", "--max-epoch=6")
    valid = [record["deciding_accuracy"] for record in records_in(run) if record["kind"] == "valid"]
    assert valid == [10, 20, 20, 15]  # as good does not count as better
    manifest = checkpoint.read_manifest(run / checkpoint.BEST)
    assert manifest["progress"]["update"] == 18, "as good counts as best"
    assert manifest["progress"]["best_accuracy"] == 20
    tested = json.loads((run / "test.json").read_text(encoding="utf-8"))
    assert tested["checkpoint"] == (run / checkpoint.BEST).resolve().name


def test_validation_and_saves_within_an_epoch(tune: Start) -> None:
    run = tune("a", "--max-update=5", "--validate-interval-updates=2")
    assert set(losses_in(run, "valid")) == {2, 4, 5}
    assert len(list(run.glob("checkpoint_[0-9]*"))) <= 3  # last, the one before, best


# ------------------------------------------------------------------------------------------ bad input


def refused(tune: Start, expected: str, *flags: str, **options: Any) -> None:
    with pytest.raises(InputError, match=expected):
        tune("bad", *flags, **options)


def test_no_other_language_decides_anything(tune: Start, task: Path, tmp_path: Path) -> None:
    """In zero-shot transfer validation texts of others may be wrong, and many."""
    turned = dict(zip(CLASSES, CLASSES[1:] + CLASSES[:1], strict=True))
    right = (task / "valid.hi.tsv").read_text(encoding="utf-8").splitlines()
    split = [line.split("\t") for line in right]
    wrong = 10 * "".join(f"{turned[label]}\t{text}\n" for label, text in split)
    other = write_copy(task, tmp_path / "other", valid_hi=wrong)
    flags = [
        "--max-epoch=8",
        "--lr-scheduler=reduce_lr_on_plateau",
        "--random-weights",
        *NO_DROPOUT,
    ]
    a, b = tune("a", *flags), tune("b", *flags, data=other)
    rates = [[r["lr"] for r in records_in(run) if r["kind"] == "train"] for run in (a, b)]
    assert rates[0] == rates[1]
    assert accuracies(a)["en"] == accuracies(b)["en"]


def test_other_validation_texts_have_another_best(
    tune: Start, task: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tune("a", "--max-epoch=3")
    first = (task / "valid.en.tsv").read_text(encoding="utf-8").replace("animals", "colours")
    other = write_copy(task, tmp_path / "other", valid_en=first)
    with caplog.at_level("INFO", logger="xlm_ds"):
        assert tune("a", "--max-epoch=4", data=other) == run
    assert "validation texts, or the languages that decide, are others" in caplog.text
    found = checkpoint.read_manifest(run / "checkpoint_best")["progress"]
    assert (found["update"], found["best_accuracy"] < 100) == (24, True)


def test_a_run_that_is_done_finds_its_best_by_other_validation_texts(
    tune: Start, task: Path, tmp_path: Path
) -> None:
    """There is no update to come after which it could be looked for."""
    run = tune("a", "--max-epoch=1")
    other = write_copy(task, tmp_path / "other", valid_en="animals\tx\n")
    assert tune("a", "--max-epoch=1", data=other) == run
    found = checkpoint.read_manifest(run / checkpoint.BEST)["progress"]
    assert found["update"] == 6
    assert found["best_accuracy"] in (0.0, 100.0), "of one text"


def test_other_training_texts_and_seeds_are_said(
    tune: Start, task: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tune("a", "--max-epoch=1")
    lines = (task / "train.en.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    other = write_copy(task, tmp_path / "other", train_en="".join(lines[:48]))
    with caplog.at_level("INFO", logger="xlm_ds"):
        tune("a", "--max-epoch=3")
        assert "the samples from here on" not in caplog.text
        tune("a", "--max-epoch=8", "--seed=7", data=other)
    said = ": the samples from here on are others than they would have been"
    assert f"the training texts are others (96, now 48){said}" in caplog.text
    assert f"--seed was 0 and is now 7{said}" in caplog.text


def test_a_run_that_begins_with_another_s_checkpoint_finds_a_best_of_its_own(tune: Start) -> None:
    first = tune("a", "--max-epoch=12", "--random-weights")
    again = tune(
        "b",
        "--max-epoch=13",
        "--random-weights",
        f"--restore-file={first / 'checkpoint_last'}",
        "--lr=1e-9",
    )
    assert (again / "checkpoint_best").exists()


def test_the_classifier_is_no_part_of_the_table_of_words(tune: Start) -> None:
    run = tune("a", "--max-update=1", "--random-weights", "--lr=1e-12", "--warmup-updates=0")
    weights = checkpoint.load_tensors(
        run / "checkpoint_last", checkpoint.read_manifest(run / "checkpoint_last"), "weight"
    )
    table = weights["encoder.token_embedding.weight"][:9]
    likeness = torch.nn.functional.cosine_similarity(
        weights["output.weight"][:, None], table[None], dim=-1
    )
    assert float(likeness.abs().max()) < 0.9


def test_bad_languages(tune: Start) -> None:
    refused(tune, r"--train-langs fr: the model knows ar, en, hi", "--train-langs=fr")
    refused(tune, r"--train-langs ar: .* has train texts in en, hi", "--train-langs=ar")
    refused(tune, r"--test-langs fr: the model knows ar, en, hi", "--test-langs=en,fr")
    refused(tune, r"has no validation texts in ar.*--stop-lang en", "--stop-lang=ar")


def write_copy(task: Path, folder: Path, **files: str) -> Path:
    folder.mkdir()
    for path in task.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name, text in files.items():
        (folder / f"{name.replace('_', '.')}.tsv").write_text(text, encoding="utf-8")
    return folder


def test_bad_texts(tune: Start, task: Path, tmp_path: Path) -> None:
    data = write_copy(task, tmp_path / "a", test_hi="animals\tx\nfruits\ty\n")
    refused(tune, r"test\.hi\.tsv:2: label 'fruits' is in no training text.*animals", data=data)
    data = write_copy(task, tmp_path / "b", test_hi="")
    refused(tune, r"test\.hi\.tsv: is empty", data=data)
    data = write_copy(task, tmp_path / "c", valid_hi="animals\tx\ty\n")
    refused(tune, r"valid\.hi\.tsv:1: has 2 texts, where other files have 1", data=data)
    data = write_copy(task, tmp_path / "d", train_en="animals\tx\nanimals\ty\n")
    refused(tune, r"all training texts have the label", data=data)


def test_texts_in_a_language_that_the_model_does_not_know_are_left_out_and_said(
    tune: Start, task: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_copy(task, tmp_path / "data", test_fr="animals\tun\n")
    with caplog.at_level("INFO", logger="xlm_ds"):
        run = tune("a", "--max-update=1", data=data)
    assert "test texts in languages that the model does not know are left out: fr" in caplog.text
    assert set(accuracies(run)) == {"en", "hi"}


def test_long_texts_are_cut_and_counted(
    tune: Start, task: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = f"animals\t{'a ' * 100}\n"
    data = write_copy(task, tmp_path / "data", test_hi=f"{long}animals\tshort\n{long}")
    with caplog.at_level("INFO", logger="xlm_ds"):
        tune("a", "--max-update=1", data=data)
    assert "2 of 3 texts in hi are longer than the 32 positions of the model" in caplog.text


def test_prove_says_why_it_names_no_sample(tune: Start, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tune(name, "--max-epoch=1", f"--seed={seed}") for seed, name in enumerate("ab")]
    assert prove.main([str(run) for run in runs]) == EXIT_DIFFERENT
    assert "a is a fine-tuning, whose texts are not made again" in capsys.readouterr().out


def test_a_run_goes_on_without_its_model(tune: Start, base: Path, tmp_path: Path) -> None:
    """The pretraining may have gone on since, and its best checkpoint be another."""
    whole = tune("whole", "--max-epoch=2")
    model, moved = tmp_path / "model", tmp_path / "moved"
    shutil.copytree((base / checkpoint.BEST).resolve(), model)
    run = tune("run", "--max-epoch=2", model=model, stop=StopAt(7), code=75)
    model.rename(moved)
    assert tune("run", "--max-epoch=2", model=model) == run
    assert losses_in(run) == losses_in(whole)
    assert checkpoint.read_manifest(run / checkpoint.LAST)["finetuned"]["model"] == str(model)
    tune("run", "--max-epoch=3", model=moved)  # the same one elsewhere


def test_a_run_goes_on_only_with_what_it_was_begun_with(
    tune: Start, base: Path, task: Path, tiny_data: Path, tmp_path: Path, ranks: Ranks
) -> None:
    run = tune("bad", "--max-update=1")
    refused(tune, "was trained with --pooling first", "--pooling=mean")
    data = write_copy(task, tmp_path / "labels", train_en="animals\tx\nnumbers\ty\n")
    for name in ("valid", "test"):
        for language in ("en", "hi"):
            (data / f"{name}.{language}.tsv").write_text("animals\tx\n", encoding="utf-8")
    refused(tune, "was trained with the labels animals, colours, numbers", data=data)
    refused(tune, "is of finetune, a classifier", model=run)
    train_here(tiny_data, tmp_path / "other", ranks, "--max-update=1", "--seed=3")
    refused(tune, "was made from another model", model=tmp_path / "other")
    config = ["--restore-file", str(base / checkpoint.LAST)]
    refused(tune, "is of train, not of finetune", *config)


def test_what_is_not_for_classifiers_says_so(
    tune: Start, base: Path, tiny_data: Path, ranks: Ranks
) -> None:
    run = tune("a", "--max-update=1")
    result = call(*MODULE, "xlm_ds.evaluate", run / checkpoint.BEST, tiny_data)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "is of finetune, a classifier that predicts no words any more" in result.stderr
    with pytest.raises(InputError, match="is of finetune, a classifier"):
        train_here(tiny_data, run.parent / "b", ranks, f"--restore-file={run / checkpoint.BEST}")
    assert report.main([str(run)]) == 0
    with pytest.raises(InputError, match="predicts no words any more"):
        xlm_ds.load(run).fill("<mask>", "en")
    with pytest.raises(InputError, match="is not fine-tuned"):
        xlm_ds.load(base).classify(["a"], "en")
    with pytest.raises(InputError, match=r"text 2 of 2 \(' '\): the text has no word"):
        xlm_ds.load(run).classify(["a", " "], "en")
    with pytest.raises(InputError, match="takes one text here, not 2"):
        xlm_ds.load(run).classify(["a", ("a", "b")], "en")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="language xx"):
        xlm_ds.load(run).classify(["a"], "xx")


def test_updates_that_are_all_skipped_end_the_run(
    tune: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Engine.backward
    monkeypatch.setattr(Engine, "backward", lambda self, loss: backward(self, loss * float("nan")))
    refused(
        tune,
        r"2 updates in a row were skipped.*the first is update 1; lower --lr",
        "--max-skipped-updates=2",
    )


# --------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("lengths", "longest", "expected"),
    [
        ((3,), None, (3,)),
        ((9,), 8, (6,)),
        ((3, 2), None, (3, 2)),
        ((9, 2), 9, (4, 2)),
        ((2, 9), 9, (2, 4)),
        ((9, 9), 10, (4, 3)),
        ((3, 3), 9, (3, 3)),
    ],
)
def test_rows_keep_their_eos(
    lengths: tuple[int, ...], longest: int | None, expected: tuple[int, ...]
) -> None:
    parts = [np.arange(10 * (n + 1), 10 * (n + 1) + length) for n, length in enumerate(lengths)]
    row, was_cut = joined_row(parts, longest)
    assert row.tolist() == [
        EOS, *(token for part, length in zip(parts, expected, strict=True) for token in [*part[:length].tolist(), EOS])
    ]  # fmt: skip
    assert was_cut == (lengths != expected)


def test_a_batch_is_filled_up_to_a_multiple_of_8_and_padding_changes_nothing(base: Path) -> None:
    rows = [np.array([EOS, 7, 8, EOS], np.int32), np.array([EOS, *range(20, 30), EOS], np.int32)]
    examples = Examples(rows, np.array([0, 1]), np.array([1, 2]))
    batch = examples.batch([0, 1])
    assert batch.rows.input_ids.shape == (2, 16)
    assert batch.rows.input_ids[0, 4:].eq(PAD).all()
    encoder = xlm_ds.load(base).model
    for pooling in ("first", "mean"):
        model = Classifier(encoder, labels=3, pooling=pooling, dropout=0.0).eval()
        torch.nn.init.normal_(model.output.weight)
        with torch.no_grad():
            together = model(batch)
            alone = model(
                LabelledBatch(
                    Rows(torch.tensor([rows[0].tolist()]), torch.tensor([1]), False),
                    batch.labels[:1],
                )
            )
        assert together[0] == pytest.approx(alone[0], abs=1e-5)
        encoder = xlm_ds.load(base).model


def test_figures_count_every_example_once() -> None:
    rows = Rows(torch.zeros(4, 2, dtype=torch.int64), torch.tensor([0, 2, 2, 2]), False)
    labels = torch.tensor([1, 0, 1, -1])
    scores = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0], [9.0, 0.0]])
    scores[0] = float("nan")
    sums = outcome(scores, LabelledBatch(rows, labels), 3)
    assert sums[1].tolist() == [0, 0, 2]
    figures = accuracy_figures(sums, ("a", "b", "c"))
    assert figures["accuracy"] == 50
    assert set(figures["loss_per_language"]) == {"c"}
    nats = (math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2
    assert figures["loss"] == pytest.approx(nats / math.log(2), abs=1e-6)
    assert accuracy_figures(torch.zeros(3, 3), ("a", "b", "c")) == {}
