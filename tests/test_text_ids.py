"""Raw text becomes the ids that prepare and binarize have made of it, wherever it is met later."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import DATA
from xlm_ds import _core, binarize, prepare
from xlm_ds.dictionary import EOS, MASK, UNK
from xlm_ds.log import InputError
from xlm_ds.text_ids import TextToIds

LANGUAGES = ("ar", "de", "en", "fr", "hi")
LINES = 150


def raw_lines(split: str, language: str) -> list[str]:
    text = (DATA / "demo" / f"{split}.{language}").read_text(encoding="utf-8")
    return [line for line in text.split("\n") if line.strip()][:LINES]


def made(folder: Path, *flags: str, binarize_flags: tuple[str, ...] = ()) -> Path:
    """The demo's lines through prepare and binarize."""
    raw, text, out = folder / "raw", folder / "text", folder / "bin"
    raw.mkdir()
    for split in ("train", "valid"):
        for language in LANGUAGES:
            lines = "".join(line + "\n" for line in raw_lines(split, language))
            (raw / f"{split}.{language}").write_text(lines, encoding="utf-8")
    langs = f"--langs={','.join(LANGUAGES)}"
    prefs = [f"--{split}pref={raw / split}" for split in ("train", "valid")]
    flags = (*flags, "--duplicates=keep", "--workers=1")
    assert prepare.main([langs, *prefs, f"--destdir={text}", *flags]) == 0
    prefs = [f"--{split}pref={text / split}" for split in ("train", "valid")]
    binarize_flags = binarize_flags or (f"--srcdict={text / 'vocab_mlm'}",)
    assert binarize.main([langs, *prefs, f"--destdir={out}", "--workers=1", *binarize_flags]) == 0
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("made"), "--bpe-codes=300")


def binarized(data: Path, language: str) -> list[NDArray[np.int64]]:
    pair = _core.Pair(data / f"valid.{language}")
    return [pair.line(number) for number in range(pair.lines)]


def assert_same(data: Path) -> None:
    to_ids = TextToIds.load(data)
    unknown: int = 0
    for language in LANGUAGES:
        lines, found = raw_lines("valid", language), binarized(data, language)
        assert len(lines) == len(found) > 20
        for line, ids in zip(lines, found, strict=True):
            assert [*to_ids(line, language), EOS] == ids.tolist(), line
            unknown += int(np.count_nonzero(ids == UNK))
    assert unknown  # also those are the same


def test_ids_are_those_of_prepare_and_binarize(data: Path) -> None:
    assert_same(data)


def test_with_lower_case_and_without_accents(tmp_path: Path) -> None:
    assert_same(made(tmp_path, "--bpe-codes=100", "--lowercase", "--remove-accents"))


def test_with_published_codes_and_their_vocabulary(data: Path, tmp_path: Path) -> None:
    """Without the vocabulary pieces would be larger than those the model knows."""
    words = (data / "dict.txt").read_text(encoding="utf-8").splitlines()
    few = [line for line in words if int(line.split()[-1]) >= 12]
    (tmp_path / "vocab").write_text("".join(line + "\n" for line in few), encoding="utf-8")
    out = made(tmp_path, f"--codes={data / 'codes'}", f"--vocab={tmp_path / 'vocab'}")
    assert_same(out)
    (out / "bpe_vocab").unlink()
    with pytest.raises(AssertionError):
        assert_same(out)


def test_codes_travel_also_where_binarize_builds_the_dictionary(data: Path, tmp_path: Path) -> None:
    out = made(tmp_path, "--bpe-codes=300", binarize_flags=("--nwordssrc=500",))
    assert (out / "codes").read_bytes() == (data / "codes").read_bytes()
    assert_same(out)


def test_a_mask_is_a_word_where_it_stands(data: Path) -> None:
    to_ids = TextToIds.load(data)
    for text, language in (
        ("The <mask> is here.", "en"),
        ("Es regnet. <mask> kommt, <mask>.", "de"),
        ("L'<mask> est là", "fr"),
        ("<mask>", "hi"),
    ):
        masked = to_ids.masked(text, language)
        assert np.count_nonzero(masked == MASK) == text.count("<mask>")
        # As if a word had stood there.
        whole = to_ids(text.replace("<mask>", "Haus"), language)
        word = to_ids("Haus", language).tolist()
        filled = (word if number == MASK else [number] for number in masked.tolist())
        assert [*itertools.chain(*filled)] == whole.tolist()
    assert to_ids.masked("Qzmaskqz <mask>", "en").tolist() == [*to_ids("Qzmaskqz", "en"), MASK]


def test_several_lines_are_one(data: Path) -> None:
    to_ids = TextToIds.load(data)
    assert to_ids("one\r\ntwo\n", "en").tolist() == to_ids("one two", "en").tolist()


def copied(data: Path, folder: Path, *names: str) -> Path:
    for name in names:
        shutil.copyfile(data / name, folder / name)
    return folder


def test_what_a_folder_lacks_texts_must_be_already(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pieces = TextToIds.load(copied(data, tmp_path, "dict.txt"))
    assert "taken as tokenised and split already" in caplog.text
    text = (data.parent / "text" / "valid.en").read_text(encoding="utf-8").splitlines()
    found = binarized(data, "en")
    assert [[*pieces(line, "en"), EOS] for line in text] == [ids.tolist() for ids in found]
    words = TextToIds.load(copied(data, tmp_path, "codes"))
    assert "taken as tokenised already" in caplog.text
    text = (data.parent / "text/tokenised/valid.en").read_text(encoding="utf-8").splitlines()
    assert [[*words(line, "en"), EOS] for line in text] == [ids.tolist() for ids in found]


def test_another_tokeniser_is_said(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied(data, tmp_path, "dict.txt", "codes")
    record = json.loads((data / "prepare.json").read_text(encoding="utf-8"))
    record["tokenisation"]["sacremoses"] = "0.0.1"
    (tmp_path / "prepare.json").write_text(json.dumps(record), encoding="utf-8")
    TextToIds.load(tmp_path)
    assert "was tokenised with sacremoses 0.0.1" in caplog.text


@pytest.mark.parametrize("record", ["", "[]", '{"tokenisation": {"new": 1}}', '{"format": 1}'])
def test_a_damaged_record(record: str, data: Path, tmp_path: Path) -> None:
    copied(data, tmp_path, "dict.txt", "codes")
    (tmp_path / "prepare.json").write_text(record, encoding="utf-8")
    with pytest.raises(InputError, match="not a record of this prepare"):
        TextToIds.load(tmp_path)


def test_a_record_without_codes(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="codes: missing"):
        TextToIds.load(copied(data, tmp_path, "dict.txt", "prepare.json"))
