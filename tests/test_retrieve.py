"""Retrieval's figures are those of its slow twin, and files that are not aligned are refused."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
import xlm_ds
from conftest import DATA
from test_end_to_end import MODULE, NO_DROPOUT, launcher, succeed, train_command
from test_text_ids import made
from test_train import losses_in, records_in, stop_here, train_here
from xlm_ds import checkpoint, fill, retrieve
from xlm_ds.batches import Rows
from xlm_ds.deepspeed_config import CONFIG_DIRECTORY
from xlm_ds.engine import Ranks
from xlm_ds.log import InputError
from xlm_ds.report import page
from xlm_ds.retrieve import read_all_aligned, retrieval
from xlm_ds.run_folder import read_run
from xlm_ds.text_ids import TextToIds


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
    before = set(run.iterdir())
    copy = shutil.copy(b, aligned[1].with_name("copy.fr"))
    files, output = [a, b, b, str(copy)], aligned[0].parent / "figures.json"
    assert retrieve.main([str(run), *files]) == 0
    assert set(run.iterdir()) == before
    assert retrieve.main([str(run), *files, f"--output={output}"]) == 0
    one, same = json.loads(output.read_text(encoding="utf-8"))["pairs"]
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
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == 2 * ["direction", "en-fr", "fr-en", "fr-fr"]


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
        ("a\n\nc\n", "a\nb\nc\n", r"first, line 2: the text has no word"),
        ("a\nb\nc\n", "a\nb\n \t\n", r"second, line 3: the text has no word"),
        ("", "", r"first: is empty"),
    ],
)
def test_files_that_are_not_aligned(
    first: str, second: str, expected: str, run: Path, tmp_path: Path
) -> None:
    files = [written(tmp_path / "first", first), written(tmp_path / "second", second)]
    with pytest.raises(InputError, match=expected):
        retrieve.main([str(run), *map(str, files), "--languages=en,fr"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a.en"], "1 files: give them in pairs"),
        ([], "FILES is missing: raw texts, two and two"),
        (["a.en", "a.en"], "a.en: is given for its own translation"),
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
    with pytest.raises(InputError, match=r"a\.en, line 2: the text has no word"):
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


def test_fill_reads_standard_input(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(text: bytes) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="ascii"))
        assert fill.main([str(run), "--language=hi", "--top=3"]) == 0
        return capsys.readouterr().out.splitlines()

    assert len(call("यह <mask> है\r\n<mask>\n".encode())) == 1 + 2 * 3
    with pytest.raises(InputError, match="byte 7 is not UTF-8"):
        call(b"<mask> \xff\n")
    with pytest.raises(InputError, match="there is no text"):
        call(b"")


# -------------------------------------------------------------------------------- during training


def write_aligned(folder: Path, lines: int) -> Path:
    folder.mkdir()
    for pair in (("fr", "en"), ("de", "hi")):
        for language in pair:
            text = (DATA / "demo" / f"valid.{language}").read_text(encoding="utf-8").splitlines()
            path = folder / f"{'-'.join(pair)}.{language}"
            path.write_text("".join(f"{line}\n" for line in text[:lines]), encoding="utf-8")
    return folder


def test_files_behind_a_prefix(run: Path, tmp_path: Path) -> None:
    """As the parallel corpora are called: valid.de-hi.de."""
    folder = write_aligned(tmp_path / "aligned", 3)
    to_ids, languages = TextToIds.load(run / checkpoint.BEST), ("ar", "de", "en", "fr", "hi")
    in_folder = read_all_aligned(folder, languages, to_ids, None)
    assert [aligned.languages for aligned in in_folder] == [("de", "hi"), ("fr", "en")]
    for path in list(folder.iterdir()):
        path.rename(tmp_path / f"valid.{path.name}")
    with pytest.raises(InputError, match=rf"; give {tmp_path}/valid$"):
        read_all_aligned(tmp_path, languages, to_ids, None)
    behind = read_all_aligned(tmp_path / "valid", languages, to_ids, None)
    assert [aligned.languages for aligned in behind] == [("de", "hi"), ("fr", "en")]
    (tmp_path / "valid.de-hi.hi").unlink()
    with pytest.raises(
        InputError, match=r"valid\.de-hi\.hi: is not there, but \S*valid\.de-hi\.de is"
    ):
        read_all_aligned(tmp_path / "valid", languages, to_ids, None)


def flags(tmp_path: Path, lines: int = 7) -> list[str]:
    data = write_aligned(tmp_path / "aligned", lines)
    return [f"--retrieve-data={data}", "--retrieve-interval-updates=2"]


def retrieved_in(save_dir: Path) -> list[dict[str, Any]]:
    return [record for record in records_in(save_dir) if record["kind"] == "retrieve"]


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_measures_what_its_checkpoint_gives_and_changes_nothing_else(
    stage: int, run: Path, tmp_path: Path, ranks: Ranks
) -> None:
    settings = json.loads((CONFIG_DIRECTORY / "zero1_fp32.json").read_text(encoding="utf-8"))
    settings["zero_optimization"]["stage"] = stage
    (tmp_path / "ds.json").write_text(json.dumps(settings), encoding="utf-8")
    data, common = run.parent / "bin", ["--max-update=4", f"--deepspeed_config={tmp_path}/ds.json"]
    train_here(data, tmp_path / "plain", ranks, *common)
    train_here(data, tmp_path / "measured", ranks, *common, *flags(tmp_path))
    assert losses_in(tmp_path / "measured") == losses_in(tmp_path / "plain")
    assert (tmp_path / "measured/digests.jsonl").read_bytes() == (
        tmp_path / "plain/digests.jsonl"
    ).read_bytes()
    records = retrieved_in(tmp_path / "measured")
    assert [record["update"] for record in records] == [2, 4]
    model = xlm_ds.load(tmp_path / "measured/checkpoint_last")
    for pair in (("fr", "en"), ("de", "hi")):
        paths = [tmp_path / "aligned" / f"{'-'.join(pair)}.{lg}" for lg in pair]
        texts = [path.read_text(encoding="utf-8").splitlines() for path in paths]
        vectors = [model.encode(lines, lg) for lines, lg in zip(texts, pair, strict=True)]
        expected = reference.retrieval(*vectors)
        for kind in ("cosine", "margin"):
            names = ("-".join(pair), "-".join(reversed(pair)))
            assert [records[-1][kind][name] for name in names] == pytest.approx(expected[kind])
    assert "Retrieval, margin" in page([read_run(tmp_path / "measured")])


def test_a_measurement_missed_by_a_stop_is_made_up_for(
    run: Path, tmp_path: Path, ranks: Ranks
) -> None:
    data, common = run.parent / "bin", ["--max-update=4", *flags(tmp_path)]
    train_here(data, tmp_path / "whole", ranks, *common)
    stop_here(2, data, tmp_path / "stopped", ranks, *common)
    assert retrieved_in(tmp_path / "stopped") == []
    train_here(data, tmp_path / "stopped", ranks, *common)
    expected = [{**r, "time": None} for r in retrieved_in(tmp_path / "whole")]
    assert [r["update"] for r in expected] == [2, 4]
    assert [{**r, "time": None} for r in retrieved_in(tmp_path / "stopped")] == expected


class OneOfMany(Ranks):
    """A rank whose colleagues' vectors are added by the test."""

    def sum(self, values: Tensor) -> Tensor:
        return values


@pytest.mark.parametrize("world", [2, 5, 9])
def test_every_line_is_one_ranks_and_all_make_the_same_calls(world: int) -> None:
    """Also where there are more ranks than lines."""
    rows = [np.array([2, *range(10, 11 + n), 2], np.int32) for n in (3, 1, 4, 0, 2, 6, 5)]
    whole, calls = torch.zeros(len(rows), 2), []
    for rank in range(world):
        made: list[int] = []

        def encode(batch: Rows, made: list[int] = made) -> Tensor:
            made.append(1)
            return torch.stack([batch.input_ids, torch.ones_like(batch.input_ids)], dim=2)

        ranks = OneOfMany(rank, world, torch.device("cpu"), None)
        whole += retrieve._gathered_vectors(rows, encode, 0, rows_at_once=2, ranks=ranks)
        calls.append(len(made))
    assert len(set(calls)) == 1
    assert whole.tolist() == [[row[1:-1].mean(), 1] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_measure_what_one_does(stage: int, run: Path, tmp_path: Path) -> None:
    settings = json.loads((CONFIG_DIRECTORY / "zero1_fp32.json").read_text(encoding="utf-8"))
    settings["zero_optimization"]["stage"] = stage
    (tmp_path / "ds.json").write_text(json.dumps(settings), encoding="utf-8")
    common = ["--max-update=4", f"--deepspeed_config={tmp_path}/ds.json", *flags(tmp_path, 41)]
    common += ["--global-batch-tokens=256", *NO_DROPOUT]
    data = run.parent / "bin"
    succeed(*MODULE, *train_command(data, tmp_path / "one", *common))
    succeed(*launcher(tmp_path, 2), *train_command(data, tmp_path / "two", *common))
    assert losses_in(tmp_path / "two") == pytest.approx(losses_in(tmp_path / "one"), abs=1e-4)
    for one, two in zip(
        retrieved_in(tmp_path / "one"), retrieved_in(tmp_path / "two"), strict=True
    ):
        for kind in ("cosine", "margin"):
            assert two[kind] == pytest.approx(one[kind], abs=2.6)  # a line of 41


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--retrieve-interval-updates=2"], "go together"),
        (["--retrieve-data=."], "go together"),
        (["--retrieve-interval-updates=2", "--retrieve-data=."], "has no aligned texts of ar, de"),
    ],
)
def test_bad_flags(
    given: list[str], expected: str, run: Path, tmp_path: Path, ranks: Ranks
) -> None:
    with pytest.raises(InputError, match=expected):
        train_here(run.parent / "bin", tmp_path / "run", ranks, *given)
