"""A checkpoint at work gives what its network computes for the texts' own ids."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import xlm_ds
from test_text_ids import made
from test_train import train_here
from xlm_ds.batches import MaskedBatch
from xlm_ds.dictionary import EOS, MASK, SPECIAL_SYMBOLS
from xlm_ds.engine import Ranks
from xlm_ds.log import InputError
from xlm_ds.pretrained import Pretrained

ROOT = Path(__file__).parent.parent
TEXTS = ["The station is here.", "No.", "He said that the house was old and cold, again."]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    data = made(folder, "--bpe-codes=300")
    train_here(data, folder / "run", ranks, "--max-update=2")
    return folder / "run"


@pytest.fixture(scope="module")
def model(run: Path) -> Pretrained:
    return xlm_ds.load(run)


def test_a_vector_is_the_mean_over_the_texts_own_ids(model: Pretrained) -> None:
    for text in TEXTS:
        ids = model.to_ids(text, "en").tolist()
        row = torch.tensor([[EOS, *ids, EOS]])
        language = torch.tensor([model.languages.index("en")])
        with torch.no_grad():
            hidden = model.model.encode(row, language, has_padding=False)
        (found,) = model.encode([text], "en")
        assert found.dtype == np.float32
        assert found == pytest.approx(hidden[0, 1:-1].mean(dim=0).numpy(), abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_vector_does_not_depend_on_its_neighbours(model: Pretrained, batch_size: int) -> None:
    together = model.encode(TEXTS, "en", batch_size=batch_size)
    alone = np.concatenate([model.encode([text], "en") for text in TEXTS])
    assert together == pytest.approx(alone, abs=1e-5)
    assert np.array_equal(together, model.encode(TEXTS, "en", batch_size=batch_size))  # no dropout
    assert not np.allclose(together[0], together[1], atol=1e-3)


def test_the_language_counts(model: Pretrained) -> None:
    assert not np.allclose(model.encode(["No."], "en"), model.encode(["No."], "de"), atol=1e-4)


def test_fill_gives_the_shares_that_the_loss_is_made_of(model: Pretrained) -> None:
    text = "The <mask> is <mask>."
    filled = model.fill(text, "en", top=4)
    assert [len(candidates) for candidates in filled] == [4, 4]
    row = torch.tensor([[EOS, *model.to_ids.masked(text, "en").tolist(), EOS]])
    places = (row[0] == MASK).nonzero().flatten()
    language = torch.tensor([model.languages.index("en")])
    symbols = model.to_ids.dictionary.symbols
    for rank in range(4):
        targets = torch.tensor([symbols.index(candidates[rank].piece) for candidates in filled])
        batch = MaskedBatch(row, language, places, targets, has_padding=False)
        with torch.no_grad():
            expected = (-model.model(batch)).exp()
        assert [c[rank].probability for c in filled] == pytest.approx(expected.tolist(), rel=1e-4)
    every = model.fill(text, "en", top=len(symbols) - len(SPECIAL_SYMBOLS))[0]
    assert [c.probability for c in every] == sorted((c.probability for c in every), reverse=True)
    assert not {c.piece for c in every} & set(SPECIAL_SYMBOLS)
    assert 0.5 < sum(c.probability for c in every) < 1
    assert model.fill(text, "en", top=4) == filled


def test_long_texts_are_cut_and_counted(
    model: Pretrained, caplog: pytest.LogCaptureFixture
) -> None:
    long = "word " * 100  # the position table has 32 rows
    vectors = model.encode([long, "No.", long + "more"], "en")
    assert "2 of 3 texts in en are longer than the 32 positions" in caplog.text
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5)
    with pytest.raises(InputError, match="the model has 32; shorten"):
        model.fill(long + "<mask>", "en")
    caplog.clear()
    assert len(model.fill("<mask> " + long, "en")) == 1
    assert "is longer than the 32 positions of the model and is cut" in caplog.text


@pytest.mark.parametrize(
    ("texts", "language", "expected"),
    [
        (["a"], "xx", "language xx: the model knows ar, de, en, fr, hi"),
        (["a", " \n"], "en", r"text 2 of 2 .* has no word"),
        ("a", "en", "expected a list of texts"),
        (b"a", "en", "expected a list of texts"),
        (["a", b"b"], "en", r"text 2 of 2 \(b'b'\): is of type bytes; expected a str"),
        (["a", float("nan")], "en", "text 2 of 2 .*is of type float"),
        ([("a", "b")], "en", "takes one text here, not 2"),
        (["a\udcff"], "en", r"text 1 of 1 .*character 2 is a lone surrogate"),
    ],
)
def test_bad_texts(model: Pretrained, texts: Any, language: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        model.encode(texts, language)


@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_bad_numbers(model: Pretrained, value: Any) -> None:
    with pytest.raises(InputError, match=f"batch_size {value}: expected a whole number from 1 up"):
        model.encode(["a"], "en", batch_size=value)
    with pytest.raises(InputError, match=f"top {value}: expected a whole number from 1 to "):
        model.fill("<mask>", "en", top=value)


def test_texts_may_come_one_by_one(model: Pretrained) -> None:
    assert np.array_equal(model.encode(iter(TEXTS), "en"), model.encode(TEXTS, "en"))


def test_nothing_to_encode(model: Pretrained) -> None:
    assert model.encode([], "en").shape == (0, 32)


def test_bad_masks(model: Pretrained) -> None:
    with pytest.raises(InputError, match="has no <mask> to fill"):
        model.fill("nothing", "en")
    with pytest.raises(InputError, match="is of type list"):
        model.fill(["<mask>"], "en")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lone surrogate"):
        model.fill("<mask>\udcff", "en")
    with pytest.raises(InputError, match="language xx"):
        model.fill("<mask>", "xx")


def test_a_damaged_companion_is_named(run: Path, tmp_path: Path) -> None:
    for path in (run / "checkpoint_best").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    xlm_ds.load(tmp_path)
    (tmp_path / "codes").write_bytes(b"a b 1\n")
    with pytest.raises(InputError, match=r"codes: its SHA-256"):
        xlm_ds.load(tmp_path)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no manifest"):
        xlm_ds.load(tmp_path)


def test_importing_the_package_is_instant() -> None:
    assert xlm_ds.InputError is InputError
    assert issubclass(InputError, ValueError)
    code = "import sys, xlm_ds; xlm_ds.load; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_tutorials_example(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is run as it stands there."""
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    example, *_ = re.findall(r"```python\n(import xlm_ds\n.*?)```", page, flags=re.DOTALL)
    assert "model.encode" in example
    monkeypatch.chdir(run.parent)
    names: dict[str, np.ndarray] = {}
    exec(example, names)
    assert names["vectors"].shape == (2, 32)
    assert capsys.readouterr().out.count("Candidate(") == 3
