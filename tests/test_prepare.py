"""prepare: nothing lost, nothing made up, the same bytes whatever happens on the way."""

import dataclasses
import fcntl
import gzip
import json
import lzma
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from reference import bpe_replay
from xlm_ds import _core
from xlm_ds.config import PrepareConfig
from xlm_ds.files import CHUNK_CHARACTERS
from xlm_ds.flags import parse
from xlm_ds.log import InputError
from xlm_ds.merges import learn_merges, sample_copies
from xlm_ds.prepare import choose_held_out, main, prepare
from xlm_ds.prepare_record import Record
from xlm_ds.tokenisation import Tokenisation, tokenise_line

GOLDEN = Path(__file__).parent / "data" / "bpe"
LANGS = ["de", "hi"]
PLAIN = Tokenisation(
    tokenizer="none", lowercase=False, remove_accents=False, sacremoses="", unicode=""
)
MOSES = dataclasses.replace(PLAIN, tokenizer="moses")


def golden(name: str) -> bytes:
    return lzma.decompress((GOLDEN / f"{name}.xz").read_bytes())


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for lang in LANGS:
        (folder / f"{lang}.txt").write_bytes(golden(f"{lang}.tok"))
    return folder


def flags(raw: Path, destdir: Path, *more: str) -> list[str]:
    """Two languages to be split, in this process; later flags win."""
    return [
        *("--input", f"{raw}/{{lang}}.txt", "--langs", ",".join(LANGS), "--destdir", str(destdir)),
        *("--bpe-codes", "200", "--workers", "1", *more),
    ]


def run(raw: Path, destdir: Path, *more: str) -> dict[str, Any]:
    prepare(parse(PrepareConfig, flags(raw, destdir, *more)))
    record: dict[str, Any] = json.loads((destdir / "prepare.json").read_text(encoding="utf-8"))
    return record


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


# -------------------------------------------------------------------------------------- tokenising


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "Don't say “no” & <go>…", 'Don \'t say " no " & < go > ...'),
        ("en", "It costs 5,300.50 U.S. dollars.", "It costs 5,300.50 U.S. dollars ."),
        ("fr", "L'été, aujourd'hui", "L' été , aujourd' hui"),
        ("fr", "10\u00a0000 «\u00a0mots\u00a0»", '10,000 " mots "'),
        ("hi", "क्या हिन्दी है?", "क्या हिन्दी है ?"),
        ("en", "zero\u200bwidth a\tb\x07c\u2028d", "zero width a b c d"),
        ("xx", "unknown languages, too", "unknown languages , too"),
        ("en", "  ", ""),
    ],
)
def test_moses_as_xlm_ran_it(language: str, text: str, expected: str) -> None:
    """Not escaped, punctuation normalised, control characters made blanks (and so words kept apart)."""
    assert tokenise_line(text, language, MOSES) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("क्या हिन्दी", "कया हिनदी"),
        ("が ß ﬁ İ É", "か ß ﬁ i e"),
        ("한국어", "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165"),
    ],
)
def test_lowercase_and_remove_accents_as_xlm(text: str, expected: str) -> None:
    settings = dataclasses.replace(PLAIN, lowercase=True, remove_accents=True)
    assert tokenise_line(text, "xx", settings) == expected


@given(st.text(st.sampled_from("ab\t\x0b\x1c\x85\xa0\u1680\u2003\u2028\u202f\u3000\u200b ")))
def test_every_unicode_blank_becomes_a_space(text: str) -> None:
    tokenised = tokenise_line(text, "en", PLAIN)
    assert tokenised.split(" ") == (text.split() or [""])


# --------------------------------------------------------------------------------------- splitting


@given(
    unit_lines=st.lists(st.integers(1, 9), min_size=3, max_size=60),
    valid=st.integers(1, 20),
    test=st.integers(1, 20),
    seed=st.text(max_size=3),
)
def test_held_out_units_are_enough_and_no_more(
    unit_lines: list[int], valid: int, test: int, seed: str
) -> None:
    try:
        held_out = choose_held_out(unit_lines, valid, test, seed=seed)
    except InputError:
        too_many = 2 * (
            max(unit_lines) - 1
        )  # lines that the last unit of valid and of test can bring
        assert valid + test + too_many >= sum(unit_lines)
        return
    assert not held_out.valid & held_out.test
    assert len(held_out.valid | held_out.test) < len(unit_lines)
    for units, wanted in ((held_out.valid, valid), (held_out.test, test)):
        sizes = [unit_lines[unit] for unit in units]
        assert sum(sizes) >= wanted > sum(sizes) - max(sizes)


def test_the_permutation_is_fixed_and_seeded() -> None:
    """Figures worked out from random.Random's random(), which Python promises to keep; another split would leak."""
    held_out = choose_held_out([1] * 1000, 3, 2, seed="0 en")
    assert held_out == choose_held_out([1] * 1000, 3, 2, seed="0 en")
    assert held_out != choose_held_out([1] * 1000, 3, 2, seed="1 en")
    picks = Counter(
        unit for s in range(300) for unit in choose_held_out([1] * 10, 1, 1, seed=str(s)).valid
    )
    assert len(picks) == 10
    assert max(picks.values()) < 60  # 30 expected, standard deviation 5.2


def test_every_line_is_in_one_split_and_counted(raw: Path, tmp_path: Path) -> None:
    text = golden("de.tok").decode().split("\n")[:100]
    awkward = ["", "  \t ", "\u200b", "twice here", "twice here", "a\u00a0b"]
    (raw / "de.txt").write_text("\n".join([*text, *awkward]), encoding="utf-8")
    record = run(
        raw, tmp_path / "D", "--tokenizer", "none", "--valid-lines", "7", "--test-lines", "5"
    )
    counts = {s: record["files"][f"tokenised/{s}.de"] for s in ("train", "valid", "test")}
    kept = [line for s in counts for line in lines(tmp_path / "D/tokenised" / f"{s}.de")]
    for count in counts.values():
        assert count["lines"] == count["kept"] + count["blank"] + count["duplicate"]
    assert sum(c["lines"] for c in counts.values()) == 106
    assert sum(c["blank"] for c in counts.values()) == 2
    assert sum(c["normalised_blanks"] for c in counts.values()) == 2
    assert (counts["valid"]["lines"], counts["test"]["lines"]) == (7, 5)
    assert set(kept) == {" ".join(line.split()) for line in [*text, *awkward]} - {""}


def test_train_keeps_the_order_of_the_text(raw: Path, tmp_path: Path) -> None:
    """Neighbouring lines stay neighbours: a block of the model's input is made of lines that belong together."""
    run(raw, tmp_path / "D", "--tokenizer", "none")
    whole, train = lines(raw / "de.txt"), lines(tmp_path / "D/tokenised/train.de")
    places = [whole.index(line) for line in train]
    assert places == sorted(places)
    assert len(train) == len(whole) - 2 * (len(whole) // 20)


def test_duplicates_are_removed_between_splits_only(tmp_path: Path) -> None:
    texts = {
        "train": "one two\nonly train\nonly train\nthree  four\nfive\n",
        "valid": "three four\nonly valid\nfive\nonly valid\n",
        "test": "one two\nfive\n",
    }
    for split, text in texts.items():
        (tmp_path / f"{split}.xx").write_text(text, encoding="utf-8")
    prefs = [f for s in texts for f in (f"--{s}pref", str(tmp_path / s))]
    for duplicates, train, valid in (
        ("remove", "only train\nonly train", "three four\nonly valid\nonly valid"),
        ("keep", texts["train"].replace("  ", " ").strip(), texts["valid"].strip()),
    ):
        folder = tmp_path / duplicates
        more = ["--langs", "xx", "--workers", "1", "--duplicates", duplicates]
        prepare(parse(PrepareConfig, [*prefs, "--destdir", str(folder), *more]))
        assert lines(folder / "tokenised/train.xx") == train.split("\n")
        assert lines(folder / "tokenised/valid.xx") == valid.split("\n")
        assert lines(folder / "tokenised/test.xx") == ["one two", "five"]
    files = json.loads((tmp_path / "remove/prepare.json").read_text(encoding="utf-8"))["files"]
    assert files["tokenised/train.xx"]["duplicate"] == 3
    assert files["tokenised/valid.xx"]["duplicate"] == 1


def test_documents_stay_whole(raw: Path, tmp_path: Path) -> None:
    documents = [[f"document {d} line {i}" for i in range(1 + d % 4)] for d in range(40)]
    text = "\n\n".join("\n".join(d) for d in documents)
    (raw / "de.txt").write_text(f"\n\n{text}\n\n\n", encoding="utf-8")
    (raw / "hi.txt").write_text(text.replace("\n", "\r\n"), encoding="utf-8")
    run(raw, tmp_path / "D", "--split-by", "document", "--valid-lines", "9", "--test-lines", "9")
    for lang in LANGS:
        where: dict[str, set[str]] = {}
        sizes = Counter[str]()
        for split in ("train", "valid", "test"):
            written = (tmp_path / "D/tokenised" / f"{split}.{lang}").read_text(encoding="utf-8")
            # An empty line between two documents, and nowhere else, before and after BPE.
            for document in written.removesuffix("\n").split("\n\n"):
                numbers = {line.split()[1] for line in document.split("\n")}
                assert len(numbers) == 1
                where.setdefault(numbers.pop(), set()).add(split)
                sizes[split] += document.count("\n") + 1
            assert [not line for line in lines(tmp_path / "D" / f"{split}.{lang}")] == [
                not line for line in written.removesuffix("\n").split("\n")
            ]
        assert all(len(splits) == 1 for splits in where.values())
        assert sum(sizes.values()) == sum(map(len, documents))
        assert 9 <= sizes["valid"] <= 12
        assert 9 <= sizes["test"] <= 12


# ------------------------------------------------------------------------------------------- codes


def test_codes_are_those_that_counting_gives(tmp_path: Path) -> None:
    """Each merge is a most frequent pair of its time, and the third column is how often it was applied."""
    sample = b"".join(golden(f"{lang}.tok") for lang in ("ar", "en", "fr", "hi")).decode()
    (tmp_path / "sample").write_text(sample, encoding="utf-8")
    merges = learn_merges(tmp_path / "sample", 150)
    assert len(merges) == 150
    for there, most, _ in bpe_replay(Counter(sample.split()), merges):
        assert there == most


def test_codes_fit_fastbpe_and_tokenizers(raw: Path, tmp_path: Path) -> None:
    """Read by our fastBPE and by the library that learnt them, they split every word alike."""
    run(raw, tmp_path / "D", "--tokenizer", "none")
    fields = [line.split(" ") for line in lines(tmp_path / "D/codes")]
    merges = [(left, right) for left, right, _ in fields]
    assert len(merges) == 200
    text = "".join(
        (tmp_path / f"D/tokenised/train.{lang}").read_text(encoding="utf-8") for lang in LANGS
    )
    characters = {c + end for c in text if not c.isspace() for end in ("", "</w>")}
    symbols = sorted(characters | {left + right for left, right in merges})
    model = models.BPE(
        vocab={symbol: i for i, symbol in enumerate(symbols)},
        merges=merges,
        end_of_word_suffix="</w>",
    )
    theirs = Tokenizer(model)
    theirs.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    ours = _core.Bpe(tmp_path / "D/codes")
    for word in sorted(set(text.split())):
        split = ours.apply_line(word.encode()).decode().split("@@ ")
        assert [*split[:-1], split[-1] + "</w>"] == theirs.encode(word).tokens


def test_the_third_column_is_how_often_a_merge_is_applied(tmp_path: Path) -> None:
    text = "".join(f"{line}\n" for line in lines_of_one_language())
    (tmp_path / "train.en").write_text(text, encoding="utf-8")
    more = ["--langs", "en", "--bpe-codes", "120", "--tokenizer", "none", "--workers", "1"]
    pref = ["--trainpref", str(tmp_path / "train"), "--destdir", str(tmp_path / "D")]
    prepare(parse(PrepareConfig, [*pref, *more]))
    fields = [line.split(" ") for line in lines(tmp_path / "D/codes")]
    history = bpe_replay(Counter(text.split()), [(left, right) for left, right, _ in fields])
    assert [int(count) for _, _, count in fields] == [applied for _, _, applied in history]


def lines_of_one_language() -> list[str]:
    return golden("en.tok").decode().split("\n")[:80]


def test_codes_make_no_symbol_that_means_something_else(tmp_path: Path) -> None:
    """`<unk>` as one piece would become the dictionary's; a `</w>` from the text would end words that go on."""
    (tmp_path / "sample").write_text("<unk> <s> a</w>b x</w> \U000f0041 \n" * 50, encoding="utf-8")
    merges = learn_merges(tmp_path / "sample", 1000)
    made = [left + right for left, right in merges]
    assert len(set(made)) == len(made)
    assert not {"<unk></w>", "<s></w>"} & set(made)
    assert any("<u" in symbol or "un" in symbol for symbol in made)  # or nothing was learnt from it
    for left, right in merges:
        assert "</w>" not in left
        assert right.count("</w>") == right.endswith("</w>")


def test_few_merges_on_little_text(tmp_path: Path) -> None:
    """fastBPE goes on with pairs that are nowhere, and cannot read what it wrote."""
    (tmp_path / "sample").write_text("ab ab cd\n", encoding="utf-8")
    assert learn_merges(tmp_path / "sample", 1000) == [("a", "b</w>")]
    (tmp_path / "train.xx").write_text("ab cd\n", encoding="utf-8")
    pref = ["--trainpref", str(tmp_path / "train"), "--destdir", str(tmp_path / "D")]
    with pytest.raises(InputError, match="no pair of characters is twice"):
        prepare(parse(PrepareConfig, [*pref, "--langs", "xx", "--workers", "1"]))


@given(
    sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=10),
    alpha=st.floats(0, 1),
    sample=st.integers(1, 10**10),
)
def test_shares_of_the_sample(sizes: list[int], alpha: float, sample: int) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    copies = sample_copies(named, alpha, sample)
    sampled = {lang: copies[lang] * size for lang, size in named.items()}
    assert sum(sampled.values()) == pytest.approx(min(sample, sum(sizes)))
    for lang, size in named.items():
        share = size**alpha / sum(s**alpha for s in sizes)
        assert sampled[lang] == pytest.approx(share * min(sample, sum(sizes)))


def test_published_codes_and_vocabulary(tmp_path: Path) -> None:
    """fastBPE's codes and vocabulary give fastBPE's text, and go to the next stage as they are."""
    (tmp_path / "codes").write_bytes(golden("codes"))
    thin = b"".join(golden("vocab").splitlines(keepends=True)[:900])
    (tmp_path / "vocab").write_bytes(thin)
    for lang in LANGS:
        (tmp_path / f"train.{lang}").write_bytes(golden(f"{lang}.tok"))
    arguments = ["--trainpref", str(tmp_path / "train"), "--langs", ",".join(LANGS)]
    arguments += ["--tokenizer", "none", "--workers", "1", "--codes", str(tmp_path / "codes")]
    prepare(parse(PrepareConfig, [*arguments, "--destdir", str(tmp_path / "free")]))
    arguments += ["--vocab", str(tmp_path / "vocab")]
    prepare(parse(PrepareConfig, [*arguments, "--destdir", str(tmp_path / "thin")]))
    for lang in LANGS:
        assert (tmp_path / f"free/train.{lang}").read_bytes() == golden(f"{lang}.bpe")
        assert (tmp_path / f"thin/train.{lang}").read_bytes() == golden(f"{lang}.thin.bpe")
    assert (tmp_path / "thin/codes").read_bytes() == golden("codes")
    assert (tmp_path / "thin/vocab_mlm").read_bytes() == thin
    assert (tmp_path / "thin/bpe_vocab").read_bytes() == thin  # which travels with the codes
    pieces = Counter(p for lang in LANGS for p in golden(f"{lang}.bpe").split())
    assert (
        (tmp_path / "free/vocab_mlm").read_bytes().startswith(b"%b %d\n" % pieces.most_common(1)[0])
    )


# ------------------------------------------------------------------------- resuming, and what stops


def test_the_command_line_gives_the_same_bytes_with_two_processes(
    raw: Path, tmp_path: Path
) -> None:
    """Text of several chunks; and another interpreter, where every hash table has another order."""
    (raw / "de.txt").write_bytes(golden("de.tok") * 20)
    assert (raw / "de.txt").stat().st_size > 2 * CHUNK_CHARACTERS
    run(raw, tmp_path / "one")
    # As the README writes it: worker processes look for their functions in the module that was started.
    python, arguments = [sys.executable, "-m"], flags(raw, tmp_path / "two", "--workers", "2")
    subprocess.run(
        [*python, "xlm_ds", "prepare", *arguments], check=True, capture_output=True, timeout=120
    )
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert set(tree(tmp_path / "one")) > {"codes", "vocab_mlm", "train.de", "valid.hi", "test.de"}
    command = [*python, "xlm_ds.prepare", *arguments]
    written = (tmp_path / "two/prepare.json").stat().st_ino
    second = subprocess.run(command, check=True, capture_output=True, timeout=120, text=True)
    assert "nothing to do" in second.stdout
    assert second.stderr == ""
    assert (
        tmp_path / "two/prepare.json"
    ).stat().st_ino == written  # it may be on a disk that is read only


@pytest.mark.parametrize("stop_at", [1, 4, 7, 9, 13, 14])
@pytest.mark.parametrize("renamed", [False, True])
def test_stopped_anywhere_it_goes_on(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, renamed: bool
) -> None:
    """Stopped when a file is complete, before or after it has its final name: the most awkward moments."""
    run(raw, tmp_path / "whole")
    seen = 0
    replace = Path.replace

    def stop(self: Path, target: Path) -> Path:
        nonlocal seen
        seen += target.name != "prepare.json"
        if seen == stop_at and target.name != "prepare.json":
            if renamed:
                replace(self, target)
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            main(flags(raw, tmp_path / "stopped"))
    made = {name for name in tree(tmp_path / "stopped") if not name.endswith(".partial")}
    assert len(made - {"prepare.json"}) == stop_at - (not renamed)
    whole = tree(tmp_path / "whole")
    assert all((tmp_path / "stopped" / n).read_bytes() == whole[n] for n in made - {"prepare.json"})
    run(raw, tmp_path / "stopped")
    assert tree(tmp_path / "stopped") == whole


def test_finished_parts_are_not_made_again(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "D")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "D").rglob("*.*")}
    whole = tree(tmp_path / "D")
    (tmp_path / "D/valid.hi").unlink()
    run(raw, tmp_path / "D")
    assert tree(tmp_path / "D") == whole
    again = {p.name for p, at in before.items() if p.stat().st_mtime_ns != at}
    assert again == {"valid.hi", "prepare.json"}


def test_other_settings_are_refused_unless_to_be_overwritten(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "D")
    whole = tree(tmp_path / "D")
    with pytest.raises(InputError, match="--bpe-codes was 200, is now 100; give the"):
        run(raw, tmp_path / "D", "--bpe-codes", "100")
    with pytest.raises(InputError, match="else: --lowercase was False, is now True"):
        run(raw, tmp_path / "D", "--lowercase")
    with pytest.raises(InputError, match="else: --langs was de,hi, is now de;"):
        run(raw, tmp_path / "D", "--langs", "de")
    assert tree(tmp_path / "D") == whole
    text = (tmp_path / "D/tokenised/train.de").stat().st_mtime_ns
    run(raw, tmp_path / "D", "--bpe-codes", "100", "--overwrite")
    assert len(lines(tmp_path / "D/codes")) == 100
    assert (tmp_path / "D/tokenised/train.de").stat().st_mtime_ns == text
    run(raw, tmp_path / "D", "--lowercase", "--overwrite")
    run(raw, tmp_path / "lower", "--lowercase")
    assert tree(tmp_path / "D") == tree(tmp_path / "lower")


def test_what_differs_is_said_in_a_sentence(raw: Path, tmp_path: Path) -> None:
    """A list of hashes and sizes is read by nobody, least of all when other flags have moved all of it."""
    run(raw, tmp_path / "D", "--seed", "1", "--valid-lines", "9")
    (raw / "other.hi").write_bytes(golden("hi.tok") + b"x\n")
    (raw / "other.de").write_bytes(golden("de.tok"))
    (raw / "codes").write_text("a b 9\n", encoding="utf-8")
    same = ["--seed", "1", "--valid-lines", "9"]
    given = {
        f"else: {raw}/other.hi is not what {raw}/hi.txt was; give": [
            "--input",
            f"{raw}/other",
            *same,
        ],
        "else: --codes is new; give": ["--codes", f"{raw}/codes", *same],
        "else: --seed was 1, is now 0; --valid-lines was 9, is now not given; give": [],
        "; --seed was 1, is now 2; --test-lines was not given, is now 3; and 2 more; give": [
            *("--seed", "2", "--bpe-codes", "9", "--bpe-alpha", "1", "--test-lines", "3"),
            *("--lowercase", "--remove-accents", "--valid-lines", "9"),
        ],
    }
    for message, more in given.items():
        with pytest.raises(InputError) as caught:
            run(raw, tmp_path / "D", *more)
        assert message in str(caught.value)
        assert re.search("[0-9a-f]{20}", str(caught.value).replace(str(tmp_path), "")) is None
    split = ["--langs", "de,hi", "--destdir", str(tmp_path / "D"), "--trainpref", f"{raw}/other"]
    with pytest.raises(InputError, match="else: --trainpref is given instead of --input or --wiki"):
        prepare(parse(PrepareConfig, split))


def test_other_text_is_noticed_and_the_same_text_is_not(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "D")
    os.utime(raw / "de.txt")  # as a fresh clone would
    run(raw, tmp_path / "D")
    (raw / "de.txt").write_bytes(golden("de.tok") + b"one more line\n")
    with pytest.raises(InputError, match=r"else: \S*raw/de.txt has changed;"):
        run(raw, tmp_path / "D")
    hindi = (tmp_path / "D/tokenised/train.hi").stat().st_mtime_ns
    run(raw, tmp_path / "D", "--overwrite")
    assert (tmp_path / "D/tokenised/train.hi").stat().st_mtime_ns == hindi
    run(raw, tmp_path / "fresh")
    assert tree(tmp_path / "D") == tree(tmp_path / "fresh")


def test_text_that_nothing_was_made_of_may_change(raw: Path, tmp_path: Path) -> None:
    """The cure for a refused file must not be --overwrite."""
    good = (raw / "hi.txt").read_bytes()
    (raw / "hi.txt").write_bytes(good + b"\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        run(raw, tmp_path / "D")
    assert (tmp_path / "D/tokenised/train.de").exists()
    (raw / "hi.txt").write_bytes(good)
    run(raw, tmp_path / "D")
    run(raw, tmp_path / "fresh")
    assert tree(tmp_path / "D") == tree(tmp_path / "fresh")


def test_files_of_others_are_left_alone(raw: Path, tmp_path: Path) -> None:
    """Above all the raw text itself, when --destdir is where it is."""
    (raw / "train.de").write_bytes(golden("de.tok"))
    arguments = ["--trainpref", str(raw / "train"), "--langs", "de", "--destdir", str(raw)]
    for more in ([], ["--overwrite"]):
        with pytest.raises(InputError, match=r"train.de: is there but was not made here"):
            prepare(parse(PrepareConfig, [*arguments, *more]))
    assert (raw / "train.de").read_bytes() == golden("de.tok")
    run(raw, tmp_path / "D")
    (tmp_path / "D/vocab_mlm").write_bytes(b"my own\n")
    with pytest.raises(InputError, match="vocab_mlm was edited"):
        run(raw, tmp_path / "D")
    damaged = ["{}", "[]", "{", "[" * 100_000, '{"format": 1, "files": {}, "inputs": {"de": 3}}']
    for record in damaged:
        (tmp_path / "D/prepare.json").write_text(record, encoding="utf-8")
        with pytest.raises(InputError, match="not a record of this prepare"):
            run(raw, tmp_path / "D")


def test_two_at_once_are_refused(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "D").mkdir()
    other = os.open(tmp_path / "D" / ".prepare.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(InputError, match="another prepare is at work"):
            run(raw, tmp_path / "D")
    finally:
        os.close(other)


# --------------------------------------------------------------------------------------- bad input


def test_text_that_is_not_utf8_is_named_by_line_and_byte(raw: Path, tmp_path: Path) -> None:
    (raw / "de.txt").write_bytes("\ufeffä\r\nb\rc\n".encode() + b"d\nee\xe9\n" + b"f\n" * 10)
    result = subprocess.run(
        [sys.executable, "-m", "xlm_ds.prepare", *flags(raw, tmp_path / "D")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(
        f"prepare: error: {raw}/de.txt:5: byte 0xe9 at offset 15 is not"
    )
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trainpref", "x"], "either --input"),
        (["--validpref", "x"], "--validpref does not go with --input"),
        (["--langs", "de,de"], "de is named twice"),
        (["--langs", "../de"], "no name of a language"),
        (["--langs", ""], "--langs is empty"),
        (["--langs", "de,sw"], "sw.txt: no such file"),
        (["--vocab", "x"], "--vocab goes with --codes"),
        (
            ["--valid-lines", "100", "--test-lines", "50"],
            "150 lines or documents with text.*nothing is left",
        ),
        (["--split-by", "document"], "1 lines or documents.*nothing is left"),
        (["--split-by", "dokument"], "did you mean document"),
    ],
)
def test_flags_that_do_not_fit(raw: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(raw, tmp_path / "D", *more)
    assert not any(n != "prepare.json" for n in tree(tmp_path / "D"))


def test_bad_codes_are_refused_before_the_work(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "codes").write_text("a b\n", encoding="utf-8")
    with pytest.raises(InputError, match="codes:1: found 2 fields"):
        run(raw, tmp_path / "D", "--codes", str(tmp_path / "codes"))
    assert tree(tmp_path / "D") == {}


@pytest.mark.parametrize("text", ["", "\n \n", "only one line\n"])
def test_a_language_without_text(raw: Path, tmp_path: Path, text: str) -> None:
    (raw / "hi.txt").write_text(text, encoding="utf-8")
    expected = "1 lines or documents with text" if text.strip() else "there is no line with text"
    with pytest.raises(InputError, match=f"hi.txt: {expected}"):
        run(raw, tmp_path / "D")
    (tmp_path / "train.hi").write_text(text, encoding="utf-8")
    arguments = ["--trainpref", str(tmp_path / "train"), "--langs", "hi", "--workers", "1"]
    if not text.strip():
        with pytest.raises(InputError, match=r"train.hi: no line of text for train.hi: \d lines"):
            prepare(parse(PrepareConfig, [*arguments, "--destdir", str(tmp_path / "D2")]))


def test_what_raw_text_is_not_is_said_before_any_is_read(raw: Path, tmp_path: Path) -> None:
    (raw / "hi.txt").write_bytes(gzip.compress(b"text\n"))
    with pytest.raises(InputError, match=r"hi\.txt: is compressed; unpack it first \(gunzip\)"):
        run(raw, tmp_path / "D")
    arguments = ["--input", str(raw / "hi.txt"), "--langs", "hi", "--destdir", str(tmp_path / "D")]
    with pytest.raises(
        InputError, match=r"hi\.txt\.hi: no such file; .*hi\.txt is there: put \{lang\}"
    ):
        prepare(parse(PrepareConfig, arguments))
    assert not (tmp_path / "D").exists()


def test_the_record_can_be_read_back(raw: Path, tmp_path: Path) -> None:
    """Fine-tuning makes the same Tokenisation of it."""
    record = run(raw, tmp_path / "D", "--remove-accents")
    settings = Tokenisation(**record["tokenisation"])
    assert (settings.tokenizer, settings.remove_accents) == ("moses", True)
    whole = lines(raw / "de.txt")
    train = lines(tmp_path / "D/tokenised/train.de")
    assert set(train) <= {tokenise_line(line, "de", settings) for line in whole}
    again = Record(tmp_path / "D", record, stale=(), is_saved=True)
    assert again.has("codes", "vocab_mlm", "train.hi")


# ----------------------------------------------------------------------------------- aligned text


@pytest.fixture
def para(tmp_path: Path) -> Path:
    """Sides of de-hi; no line of theirs may be lost, neither one without text nor one that is there twice."""
    folder = tmp_path / "para"
    folder.mkdir()
    german = ["Das Haus.", "", "Das Haus.", "Wo ist es?"]
    hindi = ["यह घर है।", "वह पेड़ है।", "यह घर है।", ""]
    for split, count in (("train", 4), ("valid", 2)):
        for lang, text in (("de", german), ("hi", hindi)):
            content = "".join(f"{line}\n" for line in text[:count])
            (folder / f"{split}.de-hi.{lang}").write_text(content, encoding="utf-8")
    return folder


def parallel(para: Path) -> list[str]:
    return ["--parallel", f"{para}/{{split}}", "--pairs", "de-hi"]


def test_lines_of_a_pair_stay_where_they_are(raw: Path, para: Path, tmp_path: Path) -> None:
    """And are tokenised and split as their languages' text is, which alone gives codes and vocabulary."""
    alone = run(raw, tmp_path / "A")
    record = run(raw, tmp_path / "D", *parallel(para))
    made = tmp_path / "D"
    for name in ("codes", "vocab_mlm", "train.de", "train.hi"):
        assert (made / name).read_bytes() == (tmp_path / "A" / name).read_bytes()
    assert alone["codes"] == record["codes"]
    assert lines(made / "tokenised" / "train.de-hi.de") == [
        *("Das Haus .", "", "Das Haus .", "Wo ist es ?"),
    ]
    assert [bool(line) for line in lines(made / "train.de-hi.hi")] == [True, True, True, False]
    assert [line.replace("@@ ", "") for line in lines(made / "train.de-hi.de")] == lines(
        made / "tokenised" / "train.de-hi.de"
    )
    assert len(lines(made / "valid.de-hi.hi")) == 2
    assert not (made / "test.de-hi.de").exists()
    facts = record["files"]["tokenised/train.de-hi.hi"]
    assert (facts["lines"], facts["kept"], facts["blank"]) == (4, 3, 1)
    before = tree(made)
    assert run(raw, made, *parallel(para)) == record
    assert tree(made) == before


def test_a_pair_may_come_later_and_those_before_stay(
    raw: Path, para: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is made of a pair but itself, so all is as if it had been there from the beginning."""
    langs = ["--langs", "de,en,hi"]
    (raw / "en.txt").write_bytes(golden("de.tok")[:9000])
    for lang in ("de", "en"):
        (para / f"train.de-en.{lang}").write_text("eins\nzwei\n", encoding="utf-8")
    later, made = ["--parallel", f"{para}/{{split}}", "--pairs", "de-en"], tmp_path / "D"
    run(raw, made, *langs)
    run(raw, made, *langs, *parallel(para))
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*") if p.name != "prepare.json"}
    for path in (made / "tokenised").iterdir():
        path.unlink()  # as docs/formats.md allows: nobody tokenises the languages again for a pair
    record = run(raw, made, *langs, *later)
    assert {
        f"{split}.{pair}" for pair in ("de-hi.de", "de-hi.hi") for split in ("train", "valid")
    } | {
        "train.de-en.de",
        "train.de-en.en",
    } == {name for name in record["files"] if "-" in name and "/" not in name}
    tokenised = sorted(path.name for path in (made / "tokenised").iterdir())
    assert tokenised == ["train.de-en.de", "train.de-en.en"]
    for path, at in before.items():
        assert not path.is_file() or path.stat().st_mtime_ns == at
    both = [*langs, "--parallel", f"{para}/{{split}}", "--pairs", "de-hi,de-en"]
    assert run(raw, made, *both) == record == run(raw, made, *langs)
    whole = run(raw, tmp_path / "once", *both)
    assert whole == record
    for name in record["files"]:
        if "/" not in name:
            assert (made / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    with caplog.at_level("INFO", logger="xlm_ds"):
        record = run(raw, made, *langs, *later, "--overwrite", "--lowercase")
    assert "removed de-hi, made otherwise" in caplog.text  # it would have the codes of then
    assert not list(made.rglob("*de-hi*"))
    assert not any("de-hi" in name for name in [*record["files"], *record["inputs"]])
    assert run(raw, made, *langs, *later, "--lowercase") == record


def test_sides_of_different_numbers_of_lines_are_refused_before_the_work(
    raw: Path, para: Path, tmp_path: Path
) -> None:
    """The codes would be learnt for hours before binarize sees it, and every line after a lost one is wrong."""
    side = para / "valid.de-hi.hi"
    whole = side.read_bytes()
    for content, last in ((whole + b"\r\n", 3), (whole + b"x\r\ry\r\nz", 6)):
        side.write_bytes(content)
        with pytest.raises(InputError) as caught:
            run(raw, tmp_path / "D", *parallel(para))
        assert re.search(
            rf"valid.de-hi.de has 2 lines and \S*valid.de-hi.hi {last}, .*: line 3 of \S*valid.de-hi.hi is the first "
            r"without one, or one is lost before, in which case all .* wrongly; .* \(head -n 2\)$",
            str(caught.value),
        )
    assert not set(tree(tmp_path / "D"))
    side.write_bytes(whole.removesuffix(b"\n"))
    run(raw, tmp_path / "D", *parallel(para))
    made = tree(tmp_path / "D")
    side.write_bytes(whole + b"\n")
    with pytest.raises(InputError, match=r"valid.de-hi.hi has changed"):
        run(raw, tmp_path / "D", *parallel(para))
    with pytest.raises(InputError, match=r"valid.de-hi.hi 3, but"):
        run(raw, tmp_path / "D", *parallel(para), "--overwrite")
    side.write_bytes(whole + b"\xed\xa0\x80\n")  # a lone surrogate
    with pytest.raises(InputError, match=r"valid.de-hi.hi:3: byte 0xed at offset \d+ is not UTF-8"):
        run(raw, tmp_path / "D", *parallel(para), "--overwrite", "--lowercase")
    assert tree(tmp_path / "D") == made


def test_pairs_named_twice_or_otherwise_than_their_files(
    raw: Path, para: Path, tmp_path: Path
) -> None:
    def refused(pairs: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            run(raw, tmp_path / "D", "--parallel", f"{para}/{{split}}", "--pairs", pairs)

    refused("de-hi,de-hi", "--pairs: de-hi is named twice")
    refused(
        "hi-de",
        r"--pairs hi-de: \S*train.hi-de.hi is not there, but \S*train.de-hi.hi is; give --pairs de-hi$",
    )
    for lang in LANGS:
        (para / f"train.hi-de.{lang}").write_text("a\n", encoding="utf-8")
    refused("de-hi,hi-de", "--pairs: de-hi and hi-de are the same pair; give one")
    run(raw, tmp_path / "D", *parallel(para))
    refused("hi-de", r"--pairs hi-de: \S*D has de-hi, which is the same; name the files as then")
    (para / "valid.de-hi.de").unlink()
    refused("de-hi", r"valid.de-hi.de: no such file, but \S*valid.de-hi.hi is there; a pair needs")


def test_a_side_that_has_changed_is_made_again_and_nothing_else(
    raw: Path, para: Path, tmp_path: Path
) -> None:
    run(raw, tmp_path / "D", *parallel(para))
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "D").rglob("*.*")}
    path = para / "train.de-hi.de"
    path.write_text(path.read_text(encoding="utf-8").replace("Haus", "Dorf"), encoding="utf-8")
    with pytest.raises(InputError, match=r"else: \S*train.de-hi.de has changed; give"):
        run(raw, tmp_path / "D", *parallel(para))
    run(raw, tmp_path / "D", *parallel(para), "--overwrite")
    again = {p.name for p, mtime in made.items() if p.stat().st_mtime_ns != mtime}
    assert again == {"train.de-hi.de", "prepare.json"}
    assert lines(tmp_path / "D" / "tokenised" / "train.de-hi.de")[0] == "Das Dorf ."


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pairs=de-hi"], "--parallel and --pairs go together"),
        (["--parallel=x/{split}"], "--parallel and --pairs go together"),
        (["--parallel=x", "--pairs=de-hi"], r"--parallel x: no \{split\} in it"),
        (["--parallel=x/{split}", "--pairs=de-fr"], "--pairs de-fr: not two of --langs de,hi"),
        (["--parallel=x/{split}", "--pairs=de-de"], "--pairs de-de: not two of"),
        (["--parallel=x/{split}", "--pairs=de"], "--pairs de: not two of"),
        (["--parallel=x/{split}", "--pairs=de-hi"], r"x/train\.de-hi\.de: no such file"),
    ],
)
def test_pairs_that_do_not_fit(raw: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(raw, tmp_path / "D", *more)
