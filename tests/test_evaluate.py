"""Every token is measured, however the work is divided, and is set beside a true unigram level."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from test_train import losses_in, train_here
from xlm_ds import binarize, checkpoint, evaluate
from xlm_ds.batches import MaskedBatch, Masking
from xlm_ds.config import DataConfig, EvaluateConfig
from xlm_ds.corpus import open_corpus, with_sample_numbers
from xlm_ds.dictionary import MASK, PAD, Dictionary
from xlm_ds.engine import Ranks
from xlm_ds.evaluate import (
    Score,
    open_subject,
    overall,
    score,
    smoothed_log_probabilities,
    sum_over_split,
)
from xlm_ds.flags import parse
from xlm_ds.log import InputError
from xlm_ds.streams import Stream, choose, open_streams

ALONE = Ranks(0, 1, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def dictionary(tiny_data: Path) -> Dictionary:
    return Dictionary.load(tiny_data / "dict.txt")


def open_english(tiny_data: Path, dictionary: Dictionary, split: str) -> Stream:
    (stream,) = open_streams(
        tiny_data,
        split,
        choose(["en"], (), tiny_data),
        tokens_per_sample=32,
        break_mode="none",
        vocab_size=len(dictionary),
        dictionary_sha256=dictionary.sha256,
    )
    return stream


def masking_of(dictionary: Dictionary) -> Masking:
    return Masking(seed=0, mask_ratio=0.15, vocab_size=len(dictionary))


def score_with(logits: Any, stream: Stream, dictionary: Dictionary, unigram: Tensor) -> Score:
    return score(
        SimpleNamespace(logits=logits),  # type: ignore[arg-type]
        stream,
        masking_of(dictionary),
        unigram_log_probabilities=unigram,
        draws=2,
        rows=5,
        ranks=ALONE,
    )


def test_the_unigram_model_scores_the_unigram_level(
    tiny_data: Path, dictionary: Dictionary
) -> None:
    unigram = smoothed_log_probabilities(open_english(tiny_data, dictionary, "train").counts())
    stream = open_english(tiny_data, dictionary, "test")
    found = score_with(
        lambda batch: unigram.expand(len(batch.targets), -1), stream, dictionary, unigram
    )
    assert found.perplexity_at_mask == pytest.approx(found.unigram_perplexity, rel=1e-5)
    assert 0.6 * found.masked_tokens < found.tokens_at_mask < found.masked_tokens
    assert found.below_unigram == pytest.approx(0, abs=1e-3)
    assert 1 < found.perplexity < len(dictionary)


def test_the_perfect_model_scores_one(tiny_data: Path, dictionary: Dictionary) -> None:
    def perfect(batch: MaskedBatch) -> Tensor:
        return 100.0 * torch.nn.functional.one_hot(batch.targets, len(dictionary))

    unigram = torch.zeros(1, len(dictionary))
    found = score_with(perfect, open_english(tiny_data, dictionary, "test"), dictionary, unigram)
    assert found.perplexity == pytest.approx(1)
    assert found.accuracy == pytest.approx(100)


def test_smoothing_adds_one_to_every_symbol(tiny_data: Path, dictionary: Dictionary) -> None:
    stream = open_english(tiny_data, dictionary, "train")
    probabilities = smoothed_log_probabilities(stream.counts()).double().exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-4)
    unseen = int((stream.counts()[0] == 0).nonzero()[0][0])
    expected = 1 / (int(stream.counts().sum()) + len(dictionary))
    assert float(probabilities[0, unseen]) == pytest.approx(expected, rel=1e-4)


class OneOfTwo(Ranks):
    """A rank whose colleague's sum is added by the test."""

    def sum(self, values: Tensor) -> Tensor:
        return values


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_every_token_is_measured_once_however_it_is_divided(
    rows: int, tiny_data: Path, dictionary: Dictionary
) -> None:
    stream = open_english(tiny_data, dictionary, "valid")

    def measure(batch: MaskedBatch) -> Tensor:
        real = batch.targets != PAD
        return torch.stack([real.sum(), (batch.targets * real).sum()]).double()

    def total(ranks: Ranks, rows: int) -> Tensor:
        return sum_over_split(
            measure, stream, masking_of(dictionary), draw=0, rows=rows, ranks=ranks
        )

    expected = total(ALONE, 7)
    cpu = torch.device("cpu")
    halves = [total(OneOfTwo(rank, 2, cpu, None), rows) for rank in (0, 1)]
    assert torch.equal(total(ALONE, rows), expected)
    assert torch.equal(halves[0] + halves[1], expected)
    # Every block of n tokens has ceil(0.15 n) targets: 31 -> 5.
    full, rest = divmod(stream.sides[0].tokens, 31)
    assert expected[0] == full * 5 + math.ceil(rest * 0.15)


def test_ranks_make_the_same_number_of_calls(tiny_data: Path, dictionary: Dictionary) -> None:
    """ZeRO 3 gathers parameters in every call: a rank that called less often would hang the others."""
    stream = open_english(tiny_data, dictionary, "valid")
    calls = []
    for rank in range(stream.blocks + 1):  # more ranks than blocks: the last has none
        ranks = OneOfTwo(rank, stream.blocks + 1, torch.device("cpu"), None)
        made: list[int] = []

        def measure(batch: MaskedBatch, made: list[int] = made) -> Tensor:
            made.append(1)
            return (batch.targets != PAD).sum().double()[None]

        sum_over_split(measure, stream, masking_of(dictionary), draw=0, rows=2, ranks=ranks)
        calls.append(len(made))
    assert set(calls) == {1}


def test_overall_counts_every_token_the_same() -> None:
    scores = [
        Score("a", 100, math.log2(8), 8.0, 50.0, 80, 16.0, 32.0),
        Score("b", 300, math.log2(2), 2.0, 10.0, 240, 4.0, 4.0),
    ]
    whole = overall(scores)
    assert whole.masked_tokens == 400
    assert whole.loss == pytest.approx((3 * 100 + 1 * 300) / 400)
    assert whole.perplexity == pytest.approx(2**1.5)
    assert whole.accuracy == pytest.approx(20)
    assert whole.tokens_at_mask == 320
    assert whole.perplexity_at_mask == pytest.approx(2**2.5)
    assert whole.below_unigram == pytest.approx(100 * (1 - 2**-0.25))


def test_a_model_that_copies_is_not_below_the_unigram_level(
    tiny_data: Path, dictionary: Dictionary
) -> None:
    """It has the words that are shown, a tenth of the targets, and frequencies: context tells it nothing."""
    unigram = smoothed_log_probabilities(open_english(tiny_data, dictionary, "train").counts())

    def copying(batch: MaskedBatch) -> Tensor:
        shown = batch.input_ids.flatten()[batch.masked_positions]
        known = 100.0 * torch.nn.functional.one_hot(shown, len(dictionary))
        return torch.where((shown == MASK)[:, None], unigram, known)

    stream = open_english(tiny_data, dictionary, "test")
    found = score_with(copying, stream, dictionary, unigram)
    assert found.accuracy > 5
    assert found.below_unigram == pytest.approx(0, abs=1e-3)


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    save_dir = tmp_path_factory.mktemp("trained")
    train_here(tiny_data, save_dir, ranks, "--max-update=2")
    return save_dir / checkpoint.LAST


def evaluated(trained: Path, tiny_data: Path, *flags: str) -> list[Score]:
    config = parse(EvaluateConfig, [str(trained), str(tiny_data), *flags])
    return evaluate.evaluate(config, open_subject(config, ALONE), ALONE)


def test_the_batch_size_changes_nothing(trained: Path, tiny_data: Path) -> None:
    few = evaluated(trained, tiny_data, "--max-tokens=64")
    many = evaluated(trained, tiny_data, "--max-tokens=4096")
    for a, b in zip(few, many, strict=True):
        assert a.language == b.language
        assert a.perplexity == pytest.approx(b.perplexity, rel=1e-5)
        assert a.unigram_perplexity == pytest.approx(b.unigram_perplexity, rel=1e-9)


def test_one_language_alone_scores_as_among_all(trained: Path, tiny_data: Path) -> None:
    """The language's id is the model's, not its place in this command."""
    among = {s.language: s.perplexity for s in evaluated(trained, tiny_data)}
    (alone, _) = evaluated(trained, tiny_data, "--monolingual-langs=hi")
    assert alone.perplexity == pytest.approx(among["hi"], rel=1e-5)


def test_words_are_masked_whole_where_the_run_did(
    tiny_corpus: Path, tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two runs that have learnt nothing, with the same weights, the figures differ by the masks alone."""
    for split in ("train", "valid", "test"):
        words = (tiny_corpus / f"{split}.en").read_text(encoding="utf-8").replace("e ", "e@@ ")
        (tmp_path / f"{split}.en").write_text(words, encoding="utf-8")
    prefs = [f"--{split}pref={tmp_path / split}" for split in ("train", "valid", "test")]
    data = tmp_path / "bin"
    argv = [*prefs, "--langs=en", f"--destdir={data}", "--nwordssrc=600", "--workers=1"]
    assert binarize.main(argv) == 0
    losses, perplexities = [], []
    for name, flags in (("tokens", ()), ("words", ("--whole-word-masking",))):
        train_here(data, tmp_path / name, ranks, "--max-update=1", "--lr=1e-30", *flags)
        losses.append(losses_in(tmp_path / name, "valid")[1])
        scores = evaluated(tmp_path / name / checkpoint.LAST, data)
        perplexities.append(scores[0].perplexity)
    assert losses[0] != losses[1]
    assert perplexities[0] != perplexities[1]
    assert "every token is a whole word" not in caplog.text


def test_a_dictionary_without_subwords_is_said(
    tiny_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig(data=tiny_data, whole_word_masking=True)
    with caplog.at_level("INFO", logger="xlm_ds"):
        open_corpus(with_sample_numbers(config, 1))
    assert "no symbol of the dictionary ends with @@, so every token is a whole word" in caplog.text


def test_the_json_has_the_tables_figures(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = parse(EvaluateConfig, [str(trained), str(tiny_data)])
    scores = evaluate.evaluate(config, open_subject(config, ALONE), ALONE)
    evaluate.write_json(tmp_path / "scores.json", config, scores)
    written = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert [s["perplexity"] for s in written["scores"]] == [s.perplexity for s in scores]
    assert f"{scores[0].perplexity:.1f}" in evaluate.table(scores)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--monolingual-langs=de"], "the model knows ar, en, hi"),
        (["--monolingual-langs=en,en"], "en is named twice"),
        (["--max-tokens=16"], "one sample must fit"),
    ],
)
def test_bad_input(trained: Path, tiny_data: Path, flags: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        evaluated(trained, tiny_data, *flags)


def copy_without(data: Path, target: Path, *left_out: str) -> Path:
    target.mkdir()
    for path in data.iterdir():
        if not any(path.name.startswith(f"{name}.") for name in left_out):
            (target / path.name).symlink_to(path)
    return target


def test_what_has_no_such_split_is_left_out_unless_asked_for(
    trained: Path, tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = copy_without(tiny_data, tmp_path / "data", "test.en")
    assert [s.language for s in evaluated(trained, data)] == ["ar", "hi", "all"]
    assert f"{data}: has no test of en, left out" in caplog.text
    with pytest.raises(InputError, match=r"test\.en\.idx: there is no such file"):
        evaluated(trained, data, "--monolingual-langs=ar,en")


def test_nothing_is_measured_before_all_files_are_open(
    trained: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = copy_without(tiny_data, tmp_path / "data", "train.hi")
    monkeypatch.setattr(evaluate, "score", None)
    with pytest.raises(InputError, match=r"train\.hi\.idx: there is no such file"):
        evaluated(trained, data)


def test_a_runs_folder_is_its_best_checkpoint(
    trained: Path, tiny_data: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "start_ranks", lambda: ranks)
    monkeypatch.setattr(evaluate, "stop_ranks", lambda: None)
    run = trained.parent
    assert evaluate.main([str(run), str(tiny_data), "--mask-draws=1"]) == 0
    written = json.loads((run / f"{checkpoint.BEST}-test.json").read_text(encoding="utf-8"))
    assert [s["language"] for s in written["scores"]] == ["ar", "en", "hi", "all"]
    before = {path: path.read_bytes() for path in run.glob("*.json")}
    assert (
        evaluate.main([str(run), str(tiny_data), "--mask-draws=1", "--monolingual-langs=hi"]) == 0
    )
    assert {path: path.read_bytes() for path in run.glob("*.json")} == before


def test_a_folder_that_is_no_checkpoint(tiny_data: Path) -> None:
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        evaluated(tiny_data, tiny_data)
