"""Every layout of labelled texts gives the same examples, and what is wrong with a file is said with its line."""

import bz2
import gzip
from pathlib import Path

import pytest

from xlm_ds.labelled import Example, find_labelled
from xlm_ds.log import InputError

XNLI_HEADER = (
    "language\tgold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\t"
    "sentence2\tpromptID\tpairID\tgenre\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tsentence1_tokenized\t"
    "sentence2_tokenized\tmatch"
)


def xnli_line(language: str, label: str, first: str, second: str) -> str:
    return "\t".join([language, label, "", "", "", "", first, second, *["x"] * 11])


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_xnli(folder: Path) -> None:
    for split, prefix in (("dev", "d"), ("test", "t")):
        lines = [
            xnli_line("de", "neutral", f'{prefix} "eins', "zwei"),
            xnli_line("en", "entailment", f"{prefix} one", "two"),
            xnli_line("en", "contradiction", f"{prefix} three", "four"),
        ]
        write(folder / "XNLI-1.0" / f"xnli.{split}.tsv", XNLI_HEADER, *lines)
    path = folder / "XNLI-MT-1.0" / "multinli" / "multinli.train.en.tsv"
    write(path, "premise\thypo\tlabel", "a b\tc\tcontradictory", "d\te\tneutral")


def test_one_text_a_line(tmp_path: Path) -> None:
    write(tmp_path / "train.en.tsv", "b\tone text", "a\tanother", "b\tthird")
    write(tmp_path / "train.de.tsv", "a\tein Text")
    write(tmp_path / "test.fr.tsv", "a\tun texte")
    files = find_labelled(tmp_path)
    assert files.languages("train") == ("de", "en")
    assert (files.languages("valid"), files.languages("test")) == ((), ("fr",))
    path, examples = files.read("train", "en")
    assert path == tmp_path / "train.en.tsv"
    assert examples[:2] == [Example("b", ("one text",), 1), Example("a", ("another",), 2)]


def test_a_pair_a_line(tmp_path: Path) -> None:
    write(tmp_path / "train.en.tsv", "yes\tone\ttwo", "no\tthree\tfour")
    _, examples = find_labelled(tmp_path).read("train", "en")
    assert examples == [Example("yes", ("one", "two"), 1), Example("no", ("three", "four"), 2)]


def test_xnli_as_it_unpacks(tmp_path: Path) -> None:
    write_xnli(tmp_path)
    files = find_labelled(tmp_path)
    assert files.description == "XNLI's files"
    assert files.languages("train") == ("en",)
    assert files.languages("valid") == files.languages("test") == ("de", "en")
    assert files.read("train", "en").examples == [
        Example("contradiction", ("a b", "c"), 2),  # as the other files call it
        Example("neutral", ("d", "e"), 3),
    ]
    assert files.read("valid", "en").examples == [
        Example("entailment", ("d one", "two"), 3),
        Example("contradiction", ("d three", "four"), 4),
    ]
    assert files.read("test", "de").examples == [Example("neutral", ('t "eins', "zwei"), 2)]


def test_texts_and_labels_in_files_of_their_own(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write(tmp_path / f"{split}.label.en", "x", "y")
        write(tmp_path / f"{split}.s1.en", "one", "two")
    write(tmp_path / "train.s2.en", "eins", "zwei")
    files = find_labelled(tmp_path)
    expected = [Example("x", ("one", "eins"), 1), Example("y", ("two", "zwei"), 2)]
    assert files.read("train", "en").examples == expected
    assert files.read("valid", "en").examples == [
        Example("x", ("one",), 1),
        Example("y", ("two",), 2),
    ]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], r"train.en.tsv: is empty"),
        (["a\tb", "only one"], r"train.en.tsv:2: has 1 column; expected label<TAB>text"),
        (["a\tb\tc\td"], r"train.en.tsv:1: has 4 columns"),
        (["a\tb", "a\tb\tc"], r"train.en.tsv:2: has two texts, but line 1 has one text"),
        (["a\tb", "\tb"], r"train.en.tsv:2: has no label"),
        (["a\tb", "a\t "], r"train.en.tsv:2: a text is empty"),
        (["a\tb", "", "b\tc"], r"train.en.tsv:2: is an empty line; take it out$"),
        (["", " \t", ""], r"train.en.tsv: holds empty lines only"),
        (["a\tb", "b\tc\0"], r"train.en.tsv:2: has a zero byte, so it is no text in UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines: list[str], expected: str) -> None:
    write(tmp_path / "train.en.tsv", *lines)
    with pytest.raises(InputError, match=expected):
        find_labelled(tmp_path).read("train", "en")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (gzip.compress(b"a\tb\n"), r"train.en.tsv: is compressed; unpack it first \(gunzip\)"),
        (bz2.compress(b"a\tb\n"), r"train.en.tsv: is compressed; unpack it first \(bunzip2\)"),
        (b"a\tb\nb\t\xff\n", r"train.en.tsv:2: byte 0xff at offset 6 is not UTF-8; .*iconv"),
        ("a\tb\n".encode("utf-16-le"), r"train.en.tsv:1: has a zero byte.*iconv -f UTF-16"),
    ],
)
def test_what_is_no_text_in_utf_8_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "train.en.tsv").write_bytes(content)
    with pytest.raises(InputError, match=expected):
        find_labelled(tmp_path).read("train", "en")


def test_each_layout_names_its_files(tmp_path: Path) -> None:
    write(tmp_path / "tsv" / "train.en.tsv", "a\tb")
    write_xnli(tmp_path / "xnli")
    write(tmp_path / "columns" / "train.label.en", "a")
    names = {
        name: find_labelled(tmp_path / name).name_of("valid", "en")
        for name in ("tsv", "xnli", "columns")
    }
    assert names == {"tsv": "valid.en.tsv", "xnli": "xnli.dev.tsv", "columns": "valid.label.en"}


def test_bad_files_of_xnli(tmp_path: Path) -> None:
    write_xnli(tmp_path)
    files = find_labelled(tmp_path)
    with pytest.raises(InputError, match=r"xnli\.dev\.tsv: has no line of language sw"):
        files.read("valid", "sw")
    path = tmp_path / "XNLI-1.0" / "xnli.test.tsv"
    write(path, XNLI_HEADER, "en\tneutral\ttoo\tfew")
    with pytest.raises(InputError, match=r"xnli\.test\.tsv:2: has 4 columns, but the header 19"):
        files.read("test", "en")
    write(path, "premise\thypo\tlabel")
    with pytest.raises(InputError, match=r"xnli\.test\.tsv:1: the header has no language"):
        files.languages("test")


def test_files_that_are_not_aligned(tmp_path: Path) -> None:
    write(tmp_path / "train.label.en", "x", "y")
    write(tmp_path / "train.s1.en", "one")
    with pytest.raises(InputError, match=r"train\.s1\.en: has 1 line, but .*label\.en has 2"):
        find_labelled(tmp_path).read("train", "en")


def test_an_empty_line_among_files_that_are_aligned(tmp_path: Path) -> None:
    write(tmp_path / "train.label.en", "x", "y")
    write(tmp_path / "train.s1.en", "one", "")
    with pytest.raises(InputError, match=r"s1\.en:2: is an empty line; take it out of all files"):
        find_labelled(tmp_path).read("train", "en")


def test_folders_without_labelled_texts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no labelled texts to train on"):
        find_labelled(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        find_labelled(tmp_path / "nowhere")
