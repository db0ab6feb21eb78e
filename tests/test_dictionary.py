"""Dictionaries are read as fairseq reads them, refused where it refuses them, and survive being saved."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz_dictionary import fuzz, holds
from xlm_ds import binarize
from xlm_ds.dictionary import SPECIAL_SYMBOLS, Dictionary, build_dictionary
from xlm_ds.log import InputError


def load_text(folder: Path, text: str, **options: object) -> Dictionary:
    path = folder / "dict.txt"
    path.write_bytes(text.encode())
    return Dictionary.load(path, **options)  # type: ignore[arg-type]


def test_every_odd_file_is_accepted_or_refused_as_by_fairseq(golden: Path, tmp_path: Path) -> None:
    cases = json.loads((golden / "dict_load_cases.json").read_text(encoding="utf-8"))
    accepted = 0
    for name, case in cases.items():
        if not case["ok"]:
            with pytest.raises(InputError, match=r"dict\.txt, line \d+: ") as caught:
                load_text(tmp_path, case["content"])
            assert "\n" not in str(caught.value), name
            continue
        accepted += 1
        dictionary = load_text(tmp_path, case["content"])
        assert list(dictionary.symbols) == case["symbols"], name
        assert list(dictionary.counts) == case["count"], name
        # fairseq forgets the overwrite flag, and cannot read the result (its issue 3705); ours keeps it.
        assert dictionary.text.replace(" #fairseq:overwrite", "") == case["saved"], name
        assert load_text(tmp_path, dictionary.text) == dictionary, name
    assert 0 < accepted < len(cases)


def test_dictionaries_are_built_as_by_fairseq(golden: Path, tmp_path: Path) -> None:
    """Options and results of fairseq-preprocess without --srcdict."""
    options = json.loads((golden / "dictbuild" / "outcomes.json").read_text(encoding="utf-8"))
    for case, (flags, outcome) in options.items():
        name, language = case.split("/")
        destination = tmp_path / name / language
        text = ["--trainpref", str(golden / "text" / "train"), "--langs", language]
        assert outcome == "ok"
        binarize.main([*text, *flags, "--destdir", str(destination)])
        expected = (golden / "dictbuild" / name / f"dict.{language}.txt").read_bytes()
        assert (destination / "dict.txt").read_bytes() == expected, case
    assert len(options) == 15


def test_joint_dictionary_counts_all_languages(golden: Path, tmp_path: Path) -> None:
    text = ["--trainpref", str(golden / "text" / "train"), "--padding-factor", "1"]
    joint = {}
    for langs in ("en", "hi", "en,hi"):
        binarize.main([*text, "--langs", langs, "--destdir", str(tmp_path / langs)])
        dictionary = Dictionary.load(tmp_path / langs / "dict.txt")
        joint[langs] = dict(zip(dictionary.symbols, dictionary.counts, strict=True))
    for symbol in joint["en,hi"].keys() - set(SPECIAL_SYMBOLS):
        summed = joint["en"].get(symbol, 0) + joint["hi"].get(symbol, 0)
        assert joint["en,hi"][symbol] == summed


def test_max_vocab_counts_the_special_symbols(tmp_path: Path) -> None:
    dictionary = load_text(tmp_path, "a 3\nb 2\nc 1\n", max_vocab=7)
    assert dictionary.symbols == (*SPECIAL_SYMBOLS, "a", "b")
    assert len(load_text(tmp_path, "a 3\n", max_vocab=100)) == 6


def test_max_vocab_limits_a_built_dictionary_too(golden: Path, tmp_path: Path) -> None:
    """The padding of --padding-factor must not make the model larger than asked for."""
    text = ["--trainpref", str(golden / "text" / "train"), "--langs", "en"]
    binarize.main([*text, "--max-vocab", "601", "--destdir", str(tmp_path / "out")])
    assert len(Dictionary.load(tmp_path / "out" / "dict.txt")) == 601


def test_skipped_duplicates_use_no_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="xlm_ds"):
        dictionary = load_text(tmp_path, "a 3\na 2\n<unk> 1\nb 1\n", on_duplicate="skip")
    assert dictionary.symbols[5:] == ("a", "b")
    assert dictionary.counts[5:] == (3, 1)
    assert "skipped 2 rows" in caplog.text
    assert "line 2" in caplog.text


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "dict.txt"
    path.write_bytes(b"a 1\nb\xe9 2\n")
    with pytest.raises(InputError, match="line 2, byte 5: 0xe9 is not UTF-8"):
        Dictionary.load(path)


# Any text without a line end is a symbol, also one with blanks in it: the count follows the last U+0020.
symbols = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=6)


@given(st.lists(st.tuples(symbols, st.integers(-5, 10**12)), max_size=20))
def test_save_and_load_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]
) -> None:
    dictionary = Dictionary(
        (*SPECIAL_SYMBOLS, *(symbol for symbol, _ in rows)),
        (*[1] * len(SPECIAL_SYMBOLS), *(count for _, count in rows)),
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.txt"
    dictionary.save(path)
    assert Dictionary.load(path) == dictionary
    assert Dictionary.load(path).sha256 == dictionary.sha256


def test_mutated_files_are_accepted_or_refused_as_by_fairseq(tmp_path: Path) -> None:
    """`make fuzz` runs more of them."""
    accepted, refused = fuzz(5000, 1, tmp_path)
    assert accepted > 500
    assert refused > 500


@pytest.mark.parametrize("content", [b"5 #fairseq:overwrite\n", b"#fairseq:overwrite\n", b"5\n"])
def test_a_count_without_a_symbol_is_refused(content: bytes, tmp_path: Path) -> None:
    assert not holds(tmp_path / "dict.txt", content)


def test_building_orders_by_count_then_code_point() -> None:
    built = build_dictionary({"b": 2, "a": 2, "é": 2, "z": 9, "</s>": 50}, padding_factor=1)
    assert built.symbols[5:] == ("z", "a", "b", "é")
