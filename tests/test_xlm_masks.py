"""XLM's own evaluation: its blocks, masks and figures, to the last position."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
from pairs import write_mmap
from test_evaluate import ALONE
from test_streams import opened, write_pair
from test_train import train_here
from xlm_ds import checkpoint, evaluate
from xlm_ds.batches import MaskedBatch
from xlm_ds.config import EvaluateConfig
from xlm_ds.dataset import TokenDataset, open_split
from xlm_ds.dictionary import PAD, Dictionary
from xlm_ds.engine import Ranks
from xlm_ds.flags import parse
from xlm_ds.log import InputError
from xlm_ds.model import XlmEncoder
from xlm_ds.streams import Stream
from xlm_ds.xlm_masks import every_nth, most_pairs, xlm_batches, xlm_pair_batches

VOCABULARY = 50


def stream(folder: Path, tokens: int, length: int) -> tuple[TokenDataset, list[int]]:
    """A language of so many tokens, in lines of seven."""
    generator = np.random.default_rng(tokens)
    ids = [2 if n % 7 == 6 else int(generator.integers(5, VOCABULARY)) for n in range(tokens)]
    write_mmap(folder / "valid.en", [ids[n : n + 7] for n in range(0, tokens, 7)])
    (dataset,) = open_split(
        folder,
        "valid",
        ["en"],
        tokens_per_sample=length,
        break_mode="none",
        vocab_size=VOCABULARY,
        dictionary_sha256="",
    )
    return dataset, ids


def rows_in(batch: MaskedBatch) -> list[tuple[list[int], dict[int, int]]]:
    rows, length = batch.input_ids.shape
    targets: list[dict[int, int]] = [{} for _ in range(rows)]
    for place, target in zip(batch.masked_positions.tolist(), batch.targets.tolist(), strict=True):
        if target != PAD:
            targets[place // length][place % length] = target
        else:
            assert place % length == 0
    return list(zip(batch.input_ids.tolist(), targets, strict=True))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33, 500])
@pytest.mark.parametrize(("length", "ratio"), [(16, 0.15), (3, 0.15), (16, 0.6)])
def test_blocks_and_masks_are_the_twins(
    tokens: int, length: int, ratio: float, tmp_path: Path
) -> None:
    """Also where a block has no position drawn, as often in short ones, and one is forced."""
    dataset, ids = stream(tmp_path, tokens, length)
    expected = reference.xlm_evaluation(ids, bptt=length, word_pred=ratio, share=1)
    for rows in (1, 4):
        batches = xlm_batches(dataset, 3, mask_ratio=ratio, rows=rows)
        found = [row for batch in batches for row in rows_in(batch)]
        assert found == expected
    assert all(targets for _, targets in expected)


def test_a_part_of_many_languages(tmp_path: Path) -> None:
    dataset, ids = stream(tmp_path, 500, 16)
    batches = xlm_batches(dataset, 0, mask_ratio=0.15, rows=3, share=5)
    expected = reference.xlm_evaluation(ids, bptt=16, word_pred=0.15, share=5)
    assert [row for batch in batches for row in rows_in(batch)] == expected
    assert len(expected) == 6
    with pytest.raises(InputError, match=r"a 10th of valid\.en, whose 100 tokens are fewer"):
        next(xlm_batches(stream(tmp_path, 100, 16)[0], 0, mask_ratio=0.15, rows=1, share=10))


def test_ranks_share_the_blocks(tmp_path: Path) -> None:
    dataset, _ = stream(tmp_path, 500, 16)

    def of_rank(rank: int, world_size: int) -> list[tuple[list[int], dict[int, int]]]:
        batches = xlm_batches(dataset, 0, mask_ratio=0.15, rows=4, rank=rank, world_size=world_size)
        return [row for batch in batches for row in rows_in(batch)]

    whole = of_rank(0, 1)
    for world_size in (2, 3, len(whole) + 1):
        shares = [of_rank(rank, world_size) for rank in range(world_size)]
        found = [str(row) for share in shares for row in share]
        assert sorted(found) == sorted(map(str, whole))


@pytest.mark.parametrize(
    ("language", "split", "languages", "share"),
    [
        ("en", "valid", 5, 1),
        ("en", "test", 5, 1),
        ("en", "valid", 6, 5),
        ("en", "test", 6, 10),
        ("xx", "valid", 30, 5),
        ("en", "valid", 31, 5),
        ("xx", "valid", 31, 10),
        ("en", "test", 31, 10),
    ],
)
def test_how_much_is_evaluated(language: str, split: str, languages: int, share: int) -> None:
    assert every_nth(language, split, languages) == share


@pytest.mark.parametrize(
    ("first", "split", "languages", "most"),
    [
        ("en", "valid", 5, None),
        ("en", "test", 5, None),
        ("en", "valid", 6, 1500),
        ("en", "test", 30, 300),
        ("xx", "valid", 30, 1500),
        ("en", "valid", 31, 1500),
        ("xx", "valid", 31, 600),
        ("en", "test", 31, 600),
    ],
)
def test_how_many_pairs_are_evaluated(
    first: str, split: str, languages: int, most: int | None
) -> None:
    assert most_pairs(first, split, languages) == most


# ------------------------------------------------------------------------------------------- pairs

Lines = list[list[int]]
Row = tuple[list[int], dict[int, int], int]  # input without padding, targets, start of second half


def sides(count: int, *, longest: int = 14) -> tuple[Lines, Lines]:
    """Lines of words; a few are empty, and many rows are as long as others."""
    generator = np.random.default_rng(count)

    def lines() -> Lines:
        lengths = generator.integers(0, longest + 1, count)
        return [generator.integers(5, VOCABULARY, n).tolist() for n in lengths]

    return lines(), lines()


def pair_of(folder: Path, first: Lines, second: Lines, *, length: int = 32) -> Stream:
    write_pair(folder, *([[*line, 2] for line in side] for side in (first, second)))
    (pair,) = opened(folder, "a-b", length=length)
    return Stream(languages=(3, 1), sides=pair.sides)


def pair_rows_in(batch: MaskedBatch) -> list[Row]:
    assert batch.second_starts is not None
    found = rows_in(batch)
    assert batch.has_padding == any(PAD in ids for ids, _ in found)
    return [
        ([token for token in ids if token != PAD], targets, start)
        for (ids, targets), start in zip(found, batch.second_starts.tolist(), strict=True)
    ]


@pytest.mark.parametrize("count", [1, 31, 33, 64, 65, 200])
@pytest.mark.parametrize(("ratio", "most"), [(0.15, None), (0.02, None), (0.6, 40)])
def test_pairs_and_their_masks_are_the_twins(
    count: int, ratio: float, most: int | None, tmp_path: Path
) -> None:
    """Also where a row has no position drawn, as nearly always with a ratio of 0.02, and one is forced."""
    first, second = sides(count)
    first[0], second[0] = [7], [8]
    expected = reference.xlm_pair_evaluation(
        first, second, word_pred=ratio, batch_size=32, most=most
    )
    stream = pair_of(tmp_path, first, second)
    for max_tokens in (1, 100, 10_000):
        batches = list(xlm_pair_batches(stream, mask_ratio=ratio, max_tokens=max_tokens, most=most))
        assert [row for batch in batches for row in pair_rows_in(batch)] == expected
        for batch in batches:
            rows, longest = batch.input_ids.shape
            assert rows == 1 or rows * longest <= max_tokens
            assert batch.second_languages is not None
            assert batch.languages.tolist() == [3] * rows
            assert batch.second_languages.tolist() == [1] * rows
    assert all(targets for _, targets, _ in expected)
    assert len(expected) == 40 or most is None or count < 40


def test_the_eos_between_two_lines_may_be_masked_and_those_at_the_ends_not(tmp_path: Path) -> None:
    stream = pair_of(tmp_path, *sides(200))
    places: set[tuple[bool, bool]] = set()
    for batch in xlm_pair_batches(stream, mask_ratio=0.5, max_tokens=10_000):
        for ids, targets, start in pair_rows_in(batch):
            assert not targets.keys() & {0, len(ids) - 1}
            places.add((start - 1 in targets, start in targets))
    assert len(places) == 4


def test_ranks_share_the_batches_of_pairs(tmp_path: Path) -> None:
    stream = pair_of(tmp_path, *sides(200))

    def of_rank(rank: int, world_size: int) -> list[Row]:
        batches = xlm_pair_batches(
            stream, mask_ratio=0.15, max_tokens=300, rank=rank, world_size=world_size
        )
        return [row for batch in batches for row in pair_rows_in(batch)]

    whole = of_rank(0, 1)
    for world_size in (2, 3, 9):
        found = [row for rank in range(world_size) for row in of_rank(rank, world_size)]
        assert sorted(map(str, found)) == sorted(map(str, whole))


def test_a_line_beyond_the_positions_keeps_its_eos(tmp_path: Path) -> None:
    """Each half has positions of its own, so both may be as long as the table."""
    first, second = [[5, 6, 7, 8, 9, 10, 11]], [[12] * 30]
    stream = pair_of(tmp_path, first, second, length=8)
    (batch,) = xlm_pair_batches(stream, mask_ratio=0, max_tokens=100)
    ((ids, targets, start),) = pair_rows_in(batch)
    for place, token in targets.items():
        ids[place] = token
    assert ids == [2, 5, 6, 7, 8, 9, 10, 2, 2, *[12] * 6, 2]
    assert start == 8
    with pytest.raises(InputError, match="no line of a-b and its translation have words"):
        next(xlm_pair_batches(pair_of(tmp_path, [[]], [[5]]), mask_ratio=0, max_tokens=9))


# --------------------------------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    save_dir = tmp_path_factory.mktemp("trained")
    train_here(tiny_data, save_dir, ranks, "--max-update=2", "--sample-break-mode=eos")
    return save_dir / checkpoint.LAST


def config_of(trained: Path, data: Path, *flags: str) -> EvaluateConfig:
    return parse(EvaluateConfig, [str(trained), str(data), "--xlm-masks", *flags])


def as_xlm(config: EvaluateConfig) -> dict[str, float]:
    return evaluate.evaluate_as_xlm(config, evaluate.open_subject(config, ALONE), ALONE)


def nats_and_right(model: XlmEncoder, batch: MaskedBatch) -> tuple[float, int]:
    """Of all targets, one after another."""
    with torch.no_grad():
        scores = model.logits(batch).log_softmax(dim=-1)
    targets = batch.targets.tolist()
    nats = -sum(float(line[target]) for line, target in zip(scores, targets, strict=True))
    right = sum(int(line.argmax()) == target for line, target in zip(scores, targets, strict=True))
    return nats, right


def test_figures_are_those_of_the_twins_blocks(trained: Path, tiny_data: Path) -> None:
    found = as_xlm(config_of(trained, tiny_data, "--split=valid"))
    dictionary = Dictionary.load(tiny_data / "dict.txt")
    model, _ = evaluate.load_model(trained, len(dictionary))
    perplexities, accuracies = [], []
    for number, language in enumerate(("ar", "en", "hi")):
        ids = np.fromfile(tiny_data / f"valid.{language}.bin", "<u2").tolist()
        nats, right, words = 0.0, 0, 0
        for row, targets in reference.xlm_evaluation(ids, bptt=32, word_pred=0.15, share=1):
            batch = MaskedBatch(
                input_ids=torch.tensor([row]),
                languages=torch.tensor([number]),
                masked_positions=torch.tensor(list(targets)),
                targets=torch.tensor(list(targets.values())),
                has_padding=False,
            )
            of_row = nats_and_right(model, batch)
            nats, right = nats + of_row[0], right + of_row[1]
            words += len(targets)
        perplexities.append(math.exp(nats / words))
        accuracies.append(100 * right / words)
        assert found[f"valid_{language}_mlm_ppl"] == pytest.approx(perplexities[-1], rel=1e-5)
        assert found[f"valid_{language}_mlm_acc"] == pytest.approx(accuracies[-1])
    assert found["valid_mlm_ppl"] == pytest.approx(sum(perplexities) / 3, rel=1e-5)
    assert found["valid_mlm_acc"] == pytest.approx(sum(accuracies) / 3)
    assert len(found) == 8


@pytest.mark.parametrize("arch", ["xlm_base", "xlm"])
def test_figures_of_pairs_are_those_of_the_twins_rows(
    parallel_data: Path, tmp_path: Path, ranks: Ranks, arch: str
) -> None:
    """Under both languages' names in the order asked for, and outside of the mean over languages."""
    steps = ["--mlm-steps=ar,en,ar-en,hi-en", f"--arch={arch}", "--warmup-updates=2"]
    train_here(parallel_data, tmp_path, ranks, *steps, "--max-update=3", "--tokens-per-sample=64")
    checkpoint_ = tmp_path / checkpoint.LAST
    few = ["--split=valid", "--max-tokens=64"]
    found = as_xlm(config_of(checkpoint_, parallel_data, *few))
    kinds = ("ppl", "acc")
    names = ("ar", "en", "ar_en", "hi_en")
    wanted = [f"valid_{name}_mlm_{kind}" for name in names for kind in kinds]
    assert [*found] == [*wanted, "valid_mlm_ppl", "valid_mlm_acc"]
    for kind in kinds:
        mean = (found[f"valid_ar_mlm_{kind}"] + found[f"valid_en_mlm_{kind}"]) / 2
        assert found[f"valid_mlm_{kind}"] == pytest.approx(mean)
    config = config_of(checkpoint_, parallel_data, *few, "--mlm-steps=en-hi")
    assert set(as_xlm(config)) == {
        "valid_en_hi_mlm_ppl",
        "valid_en_hi_mlm_acc",
    }

    model, _ = evaluate.load_model(checkpoint_, len(Dictionary.load(parallel_data / "dict.txt")))
    longest = 512 if arch == "xlm" else 64
    nats, right, words = 0.0, 0, 0
    for row, targets, start in reference.xlm_pair_evaluation(
        *(lines_in(parallel_data / f"valid.hi-en.{language}.bin", longest) for language in ("hi", "en")),
        word_pred=0.15,
        batch_size=32,
        most=None,
    ):  # fmt: skip
        batch = MaskedBatch(
            input_ids=torch.tensor([row]),
            languages=torch.tensor([2]),
            masked_positions=torch.tensor(list(targets)),
            targets=torch.tensor(list(targets.values())),
            has_padding=False,
            second_languages=torch.tensor([1]),
            second_starts=torch.tensor([start]),
        )
        of_row = nats_and_right(model, batch)
        nats, right = nats + of_row[0], right + of_row[1]
        words += len(targets)
    assert found["valid_hi_en_mlm_ppl"] == pytest.approx(math.exp(nats / words), rel=1e-5)
    assert found["valid_hi_en_mlm_acc"] == pytest.approx(100 * right / words)


def lines_in(path: Path, longest: int) -> Lines:
    """Without the eos that ends each; at most so many tokens with two."""
    lines: Lines = [[]]
    for token in np.fromfile(path, "<u2").tolist():
        if token == 2:
            lines.append([])
        else:
            lines[-1].append(token)
    assert not lines.pop()
    return [line[: longest - 2] for line in lines]


def test_they_stand_beside_ours(
    trained: Path,
    tiny_data: Path,
    tmp_path: Path,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate, "start_ranks", lambda: ranks)
    monkeypatch.setattr(evaluate, "stop_ranks", lambda: None)
    output = tmp_path / "figures.json"
    arguments = [str(trained), str(tiny_data), "--mask-draws=1", f"--output={output}"]
    assert evaluate.main([*arguments, "--monolingual-langs=hi", "--xlm-masks"]) == 0
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written["test_hi_mlm_ppl"] == written["test_mlm_ppl"] > 1
    assert [score["language"] for score in written["scores"]] == ["hi", "all"]
    shown = capsys.readouterr().out.splitlines()
    assert f"{written['test_hi_mlm_ppl']:.2f}" in next(x for x in shown if "test_hi_mlm_ppl" in x)
    assert evaluate.main(arguments) == 0
    assert "test_mlm_ppl" not in json.loads(output.read_text(encoding="utf-8"))
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "all"


def test_xlm_has_no_figures_for_the_training_text(trained: Path, tiny_data: Path) -> None:
    with pytest.raises(InputError, match="XLM evaluates valid and test"):
        evaluate.main([str(trained), str(tiny_data), "--xlm-masks", "--split=train"])
