"""Retrieval's figures are those of its slow twin, and files that are not aligned are refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
import xlm_ds
from conftest import DATA
from test_text_ids import made
from test_train import train_here
from xlm_ds import fill, retrieve
from xlm_ds.engine import Ranks
from xlm_ds.log import InputError
from xlm_ds.retrieve import read_aligned, retrieval

PARALLEL = DATA / "demo" / "para"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    folder = tmp_path_factory.mktemp("retrieve")
    data = made(folder, "--bpe-codes=300")
    train_here(data, folder / "run", ranks, "--max-update=2")
    return folder / "run"


@pytest.fixture
def aligned(tmp_path: Path) -> tuple[Path, Path]:
    """Thirty lines of two languages."""
    paths = []
    for language in ("en", "fr"):
        lines = (DATA / "demo" / f"valid.{language}").read_text(encoding="utf-8").splitlines()
        paths.append(tmp_path / f"lines.{language}")
        paths[-1].write_text("".join(f"{line}\n" for line in lines[:30]), encoding="utf-8")
    return paths[0], paths[1]


@pytest.mark.parametrize("count", [1, 3, 60])
@pytest.mark.parametrize("at_once", [1, 200, 1 << 24])
def test_figures_are_the_twins(count: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many lines are compared at a time, and also where there are fewer than four neighbours."""
    monkeypatch.setattr(retrieve, "SIMILARITIES_AT_ONCE", at_once)
    generator = np.random.default_rng(count)
    # Near to all others, as hidden states are, so that cosine and margin differ.
    first = generator.normal(0.4, 1, (count, 16)) * generator.uniform(0.5, 2, (count, 1))
    second = first + generator.normal(0, 1.2, first.shape) + generator.normal(0, 0.5, 16)
    found = retrieval(torch.from_numpy(first), torch.from_numpy(second))
    expected = reference.retrieval(first, second)
    assert found.lines == count
    assert found.cosine == pytest.approx(expected["cosine"])
    assert found.margin == pytest.approx(expected["margin"])
    if count == 60:
        assert found.cosine != found.margin
        assert 5 < min(found.cosine) < 95


def test_vectors_that_are_all_the_same_find_nothing() -> None:
    """A network that has collapsed must not look perfect."""
    same = torch.ones(50, 8)
    assert retrieval(same, same).cosine == (2, 2)


def test_the_table_and_the_json(
    run: Path, aligned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (str(path) for path in aligned)
    assert retrieve.main([str(run), a, b, b, b]) == 0
    written = json.loads((run / "checkpoint_best-retrieval.json").read_text(encoding="utf-8"))
    one, same = written["pairs"]
    assert one["languages"] == ["en", "fr"]
    assert one["lines"] == 30
    model = xlm_ds.load(run)
    vectors = [
        model.encode(path.read_text(encoding="utf-8").splitlines(), path.suffix[1:])
        for path in aligned
    ]
    twin = reference.retrieval(*vectors)
    for kind in ("cosine", "margin"):
        assert [one[kind]["en-fr"], one[kind]["fr-en"]] == pytest.approx(twin[kind])
    assert same["cosine"] == {"fr-fr": 100}  # each line finds itself
    output = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in output] == ["direction", "en-fr", "fr-en", "fr-fr"]


def test_languages_can_be_given(run: Path, aligned: tuple[Path, Path], tmp_path: Path) -> None:
    renamed = [path.rename(tmp_path / f"{path.suffix[1:]}.txt") for path in aligned]
    output = tmp_path / "figures.json"
    files = [str(path) for path in renamed]
    assert retrieve.main([str(run), *files, "--languages=en,fr", f"--output={output}"]) == 0
    assert json.loads(output.read_text(encoding="utf-8"))["pairs"][0]["languages"] == ["en", "fr"]
    with pytest.raises(InputError, match="language txt: the model knows"):
        retrieve.main([str(run), *files])


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a\nb\n", "a\n", r"second: ends after line 1, but .*first has 2"),
        ("a\n", "a\nb\nc", r"first: ends after line 1, but .*second has 3"),
        ("a\n\nc\n", "a\nb\nc\n", r"first, line 2: has no text"),
        ("a\nb\nc\n", "a\nb\n \t\n", r"second, line 3: has no text"),
        ("", "", r"first: is empty"),
    ],
)
def test_files_that_are_not_aligned(first: str, second: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=expected):
        read_aligned(written(tmp_path / "first", first), written(tmp_path / "second", second))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a.en"], "1 files: give them in pairs"),
        ([], "0 files|files is missing|FILES is missing"),
        (["a.en", "b.fr", "--languages=en"], "are 1 for 2 files"),
        (["a.en", "b.xx"], "language xx: the model knows"),
        (["a.en", "b.fr", "--output=/no/such/folder/x.json"], "not a file in a folder"),
    ],
)
def test_bad_arguments(arguments: list[str], expected: str, run: Path) -> None:
    with pytest.raises(InputError, match=expected):
        retrieve.main([str(run), *arguments])


def test_a_line_without_a_word_is_named(run: Path, tmp_path: Path) -> None:
    """It has a character, but none that is left after tokenising."""
    a = written(tmp_path / "a.en", "one\n\u200b\n")
    b = written(tmp_path / "b.fr", "un\ndeux\n")
    with pytest.raises(InputError, match=r"a\.en: text 2 of 2"):
        retrieve.main([str(run), str(a), str(b)])


# -------------------------------------------------------------------------------------------- fill


def test_fill_says_what_the_model_fills(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["The <mask> is <mask>.", "<mask>"]
    assert fill.main([str(run), *texts, "--language=en", "--top=2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["text", "mask", "percent", "word"]
    assert [row[:2] for row in rows[1:]] == [
        *(["1", "1"] for _ in range(2)),
        *(["1", "2"] for _ in range(2)),
        *(["2", "1"] for _ in range(2)),
    ]
    model = xlm_ds.load(run)
    best = [c for text in texts for mask in model.fill(text, "en", top=2) for c in mask]
    assert [row[3] for row in rows[1:]] == [candidate.piece for candidate in best]
    assert [row[2] for row in rows[1:]] == [f"{100 * c.probability:.3f}" for c in best]


def test_fill_reads_standard_input(run: Path) -> None:
    def call(text: bytes) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "xlm_ds.fill", str(run), "--language=hi", "--top=3"]
        return subprocess.run(command, input=text, capture_output=True, timeout=120, check=False)

    result = call("यह <mask> है\n<mask>\n".encode())
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1 + 2 * 3
    result = call(b"<mask> \xff\n")
    assert result.returncode == 2
    assert b"byte 7 is not UTF-8" in result.stderr.splitlines()[-1]
    assert b"there is no text" in call(b"").stderr
