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
from test_train import train_here
from xlm_ds import checkpoint, evaluate
from xlm_ds.batches import MaskedBatch
from xlm_ds.config import EvaluateConfig
from xlm_ds.dataset import TokenDataset, open_split
from xlm_ds.dictionary import PAD, Dictionary
from xlm_ds.engine import Ranks
from xlm_ds.flags import parse
from xlm_ds.log import InputError
from xlm_ds.xlm_masks import share_of, xlm_batches

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
    assert share_of(language, split, languages) == share


# --------------------------------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    save_dir = tmp_path_factory.mktemp("trained")
    train_here(tiny_data, save_dir, ranks, "--max-update=2", "--sample-break-mode=eos")
    return save_dir / checkpoint.LAST


def config_of(trained: Path, data: Path, *flags: str) -> EvaluateConfig:
    return parse(EvaluateConfig, [str(trained), str(data), "--xlm-masks", *flags])


def test_figures_are_those_of_the_twins_blocks(trained: Path, tiny_data: Path) -> None:
    found = evaluate.evaluate_as_xlm(config_of(trained, tiny_data, "--split=valid"), ALONE)
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
            with torch.no_grad():
                scores = model.logits(batch).log_softmax(dim=-1)
            for line, target in zip(scores, targets.values(), strict=True):
                nats -= float(line[target])
                right += int(line.argmax()) == target
                words += 1
        perplexities.append(math.exp(nats / words))
        accuracies.append(100 * right / words)
        assert found[f"valid_{language}_mlm_ppl"] == pytest.approx(perplexities[-1], rel=1e-5)
        assert found[f"valid_{language}_mlm_acc"] == pytest.approx(accuracies[-1])
    assert found["valid_mlm_ppl"] == pytest.approx(sum(perplexities) / 3, rel=1e-5)
    assert found["valid_mlm_acc"] == pytest.approx(sum(accuracies) / 3)
    assert len(found) == 8


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
