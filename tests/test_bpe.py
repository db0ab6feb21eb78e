"""Byte pair encoding: equal to fastBPE's own output and to the slow twin, to ids in one pass too; bad files refused."""

import lzma
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import bpe_apply
from xlm_ds import _core, binarize
from xlm_ds.dictionary import SPECIAL_SYMBOLS
from xlm_ds.log import InputError

DATA = Path(__file__).parent / "data" / "bpe"
TEXTS = ["ar", "de", "en", "fr", "hi", "odd"]


def golden(name: str) -> bytes:
    return lzma.decompress((DATA / f"{name}.xz").read_bytes())


def unpacked(name: str, folder: Path) -> Path:
    path = folder / name
    path.write_bytes(golden(name))
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> _core.Bpe:
    return _core.Bpe(unpacked("codes", tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def thin_bpe(tmp_path_factory: pytest.TempPathFactory) -> _core.Bpe:
    folder = tmp_path_factory.mktemp("thin")
    vocabulary = folder / "vocab.thin"
    vocabulary.write_bytes(b"".join(golden("vocab").splitlines(keepends=True)[:900]))
    return _core.Bpe(unpacked("codes", folder), vocabulary)


@pytest.mark.parametrize("name", TEXTS)
def test_files_equal_fastbpe(bpe: _core.Bpe, tmp_path: Path, name: str) -> None:
    bpe.apply_file(unpacked(f"{name}.tok", tmp_path), tmp_path / "bpe")
    assert (tmp_path / "bpe").read_bytes() == golden(f"{name}.bpe")


@pytest.mark.parametrize("name", TEXTS)
def test_files_equal_fastbpe_within_a_vocabulary(
    thin_bpe: _core.Bpe, tmp_path: Path, name: str
) -> None:
    thin_bpe.apply_file(unpacked(f"{name}.tok", tmp_path), tmp_path / "bpe")
    assert (tmp_path / "bpe").read_bytes() == golden(f"{name}.thin.bpe")
    assert golden(f"{name}.thin.bpe") != golden(f"{name}.bpe")  # or the test would show nothing


def test_word_counts_equal_fastbpe_getvocab(tmp_path: Path) -> None:
    paths = [unpacked(f"{name}.bpe", tmp_path) for name in TEXTS if name != "odd"]
    for threads in (1, 2, 7):
        assert _core.count_words(paths, tmp_path / "vocab", threads) == golden("vocab").count(b"\n")
        assert (tmp_path / "vocab").read_bytes() == golden("vocab")


def test_word_counts_do_not_depend_on_threads(tmp_path: Path) -> None:
    """More text than one thread takes at a time, words and blanks where it is cut; the last one without a line end."""
    text = b"".join(golden(f"{name}.tok") for name in TEXTS) + b"long" * 100_000
    copies = 9_000_000 // len(text)
    (tmp_path / "tok").write_bytes((text + b" " * 3) * copies + b"last")
    for threads in (1, 2, 7):
        _core.count_words([tmp_path / "tok"], tmp_path / f"vocab{threads}", threads)
    counts = Counter(dict.fromkeys(text.replace(b"\n", b" ").split(b" "), 0))
    for word in text.replace(b"\n", b" ").split(b" "):
        counts[word] += copies
    counts[b"last"] += 1
    ordered = sorted(((w, n) for w, n in counts.items() if w), key=lambda item: (-item[1], item[0]))
    expected = b"".join(b"%b %d\n" % item for item in ordered)
    for threads in (1, 2, 7):
        assert (tmp_path / f"vocab{threads}").read_bytes() == expected


def test_bytes_do_not_depend_on_threads(bpe: _core.Bpe, tmp_path: Path) -> None:
    """More text than one thread takes at a time, so that it is really cut; most words meet the cache."""
    text = b"".join(golden(f"{name}.tok") for name in TEXTS)
    (tmp_path / "tok").write_bytes(text * (9_000_000 // len(text)))
    results = set()
    for threads in (1, 2, 7):
        bpe.apply_file(tmp_path / "tok", tmp_path / "bpe", threads)
        results.add((tmp_path / "bpe").read_bytes())
    assert len(results) == 1
    assert results.pop() == bpe.apply_line(text) * (9_000_000 // len(text))


def test_nothing_is_lost_at_the_end_of_a_file(bpe: _core.Bpe, tmp_path: Path) -> None:
    """fastBPE drops a last word without a line end, fails on an empty file, and stops at a NUL."""
    for text in (b"", b"low", b"\n", b"low\nlower", b"low\0er \0"):
        (tmp_path / "tok").write_bytes(text)
        bpe.apply_file(tmp_path / "tok", tmp_path / "bpe")
        restored = (tmp_path / "bpe").read_bytes().replace(b"@@ ", b"")
        assert restored == text
        assert _core.count_words([tmp_path / "tok"], tmp_path / "vocab") == len(set(text.split()))


ALPHABET = [b"a", b"b", b"c", "é".encode(), "क".encode(), "्".encode(), b"\xe9", b"\x80", b"@"]


@st.composite
def learnt_codes(
    draw: st.DrawFn, alphabet: tuple[bytes, ...] = tuple(ALPHABET)
) -> list[tuple[bytes, bytes]]:
    """Merges as fastBPE could read them: of symbols there are, none made twice, in any order."""
    inside, last = list(alphabet), [c + b"</w>" for c in alphabet]
    codes = {}
    for _ in range(draw(st.integers(1, 25))):
        left = draw(st.sampled_from(inside))
        right = draw(st.sampled_from(inside + last))
        if left + right not in codes:
            codes[left + right] = (left, right)
            (last if right.endswith(b"</w>") else inside).append(left + right)
    return draw(st.permutations(list(codes.values())))


def test_the_twin_equals_fastbpe() -> None:
    codes = [(line.split(b" ")[0], line.split(b" ")[1]) for line in golden("codes").splitlines()]
    thin = {line.split(b" ")[0] for line in golden("vocab").splitlines()[:900]}
    assert bpe_apply(golden("odd.tok"), codes) == golden("odd.bpe")
    assert bpe_apply(golden("odd.tok"), codes, thin) == golden("odd.thin.bpe")


@given(
    codes=learnt_codes(),
    text=st.lists(st.sampled_from([*ALPHABET, b"x", b" ", b"\n"]), max_size=200).map(b"".join),
    copies=st.sampled_from([1, 1, 40]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_equals_the_twin(
    tmp_path_factory: pytest.TempPathFactory,
    codes: list[tuple[bytes, bytes]],
    text: bytes,
    copies: int,
    data: st.DataObject,
) -> None:
    """Random merges on random bytes, in words short and (copied) long: two algorithms in C++, one in the twin."""
    text = text if copies == 1 else text.replace(b" ", b"").replace(b"\n", b"")[:20] * copies
    folder = tmp_path_factory.mktemp("twin")
    (folder / "codes").write_bytes(b"".join(b"%b %b 1\n" % pair for pair in codes))
    assert _core.Bpe(folder / "codes").apply_line(text) == bpe_apply(text, codes)

    symbols = [(left + right).removesuffix(b"</w>") for left, right in codes] + ALPHABET
    shown = sorted({*symbols, *(symbol + b"@@" for symbol in symbols)})
    vocabulary = set(data.draw(st.lists(st.sampled_from(shown))))
    (folder / "vocab").write_bytes(b"".join(word + b" 1\n" for word in sorted(vocabulary)))
    limited = _core.Bpe(folder / "codes", folder / "vocab").apply_line(text)
    assert limited == bpe_apply(text, codes, vocabulary)


@given(words=st.lists(st.binary(min_size=1, max_size=20), max_size=200))
def test_word_counts_are_counts(
    tmp_path_factory: pytest.TempPathFactory, words: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("words")
    text = b" ".join(words)
    (folder / "tok").write_bytes(text)
    _core.count_words([folder / "tok"], folder / "vocab")
    counts = Counter(w for line in text.split(b"\n") for w in line.split(b" ") if w)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    assert (folder / "vocab").read_bytes() == b"".join(b"%b %d\n" % item for item in ordered)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (b"", "no merges"),
        (b"a b 1\na b\n", "codes:2: found 2 fields"),
        (b"a b 1\n\n", "codes:2: found 1 fields"),
        (b"a  1\n", "codes:1: "),
        (b"#version: 0.2\na b\n", "codes:1: subword-nmt's header"),
        (b"a b 2\nc d 1\na b 0\n", "codes:3: same pair as line 1"),
        (b"a bc 2\nab c 1\n", "codes:2: makes the same symbol as line 1"),
    ],
)
def test_bad_codes_are_refused(tmp_path: Path, codes: bytes, message: str) -> None:
    (tmp_path / "codes").write_bytes(codes)
    with pytest.raises(InputError, match=message):
        _core.Bpe(tmp_path / "codes")


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (b"a 1\nb\n", "vocab:2: expected `word count`"),
        (b"a x\n", "vocab:1: expected `word count`"),
        (b"a 1 1\n", "vocab:1: expected `word count`"),
        (b"a 5000000000\nb 1\na 1\n", "vocab:3: same word as line 1"),
    ],
)
def test_bad_vocabularies_are_refused(tmp_path: Path, vocabulary: bytes, message: str) -> None:
    (tmp_path / "codes").write_bytes(b"a b 1\n")
    (tmp_path / "vocab").write_bytes(vocabulary)
    with pytest.raises(InputError, match=message):
        _core.Bpe(tmp_path / "codes", tmp_path / "vocab")


def test_files_that_cannot_be_read_or_written(bpe: _core.Bpe, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _core.Bpe(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        bpe.apply_file(tmp_path / "none", tmp_path / "bpe")
    (tmp_path / "tok").write_bytes(b"low\n")
    with pytest.raises(FileNotFoundError):
        bpe.apply_file(tmp_path / "tok", tmp_path / "none" / "bpe")
    with pytest.raises(InputError, match="is the input too"):
        bpe.apply_file(tmp_path / "tok", tmp_path / "tok")
    assert (tmp_path / "tok").read_bytes() == b"low\n"


# ------------------------------------------------------------------------------- in one pass to ids


class Encoded(NamedTuple):
    """What _core.encode_text and write_text_index have written, and what it counted."""

    data: bytes
    idx: bytes
    counted: list[int]
    by_id: bytes


def encode(
    text: Path,
    symbols: list[str],
    bpe: _core.Bpe | None = None,
    threads: int = 1,
    chunk_bytes: int = 1 << 18,
) -> Encoded:
    data, index, lengths = (text.with_suffix(suffix) for suffix in (".bin", ".idx", ".lengths"))
    mmap = _core.IndexKind.mmap
    counts = _core.encode_text(
        [_core.Piece(text)],
        _core.Dictionary(symbols),
        mmap,
        data,
        lengths,
        threads,
        _core.Progress(),
        chunk_bytes,
        bpe,
    )
    _core.write_text_index(index, mmap, len(symbols), lengths)
    numbers = [counts.lines, counts.tokens, counts.unknown, counts.blank_lines]
    return Encoded(
        data.read_bytes(),
        index.read_bytes(),
        [*numbers, counts.literal_specials],
        counts.by_id.tobytes(),
    )


@pytest.mark.parametrize("limited", ["all", "thin"])
@pytest.mark.parametrize("name", TEXTS)
def test_one_pass_equals_fastbpe_then_binarize(
    bpe: _core.Bpe, thin_bpe: _core.Bpe, tmp_path: Path, name: str, limited: str
) -> None:
    """Of fastBPE's own output; with a dictionary of all pieces and with one that has few of them."""
    pieces = unpacked(f"{name}.bpe" if limited == "all" else f"{name}.thin.bpe", tmp_path)
    words = [line.split(" ")[0] for line in golden("vocab").decode().splitlines()]
    for rows in (len(words), 300):
        symbols = [*SPECIAL_SYMBOLS, *words[:rows]]
        expected = encode(pieces, symbols)
        assert rows > 300 or expected.counted[2] > 0  # or the small dictionary would show nothing
        for threads, chunk_bytes in ((1, 1 << 18), (2, 1000), (7, 1), (7, 100)):
            text = unpacked(f"{name}.tok", tmp_path)
            used = bpe if limited == "all" else thin_bpe
            assert encode(text, symbols, used, threads, chunk_bytes) == expected


ODD = [*"ab\réक\t", "\u0301", "\xa0", "\u3000", "\x85", "@", "<"]
odd_codes = learnt_codes((*(c.encode() for c in ODD), b"\xa0", b"\xc2"))
odd_text = st.lists(
    st.sampled_from(
        [*ODD, *"  \n\nx", "\r\n", "@@", "</w>", " <unk> ", " </s> ", "a" * 40, "ab" * 130]
    ),
    max_size=60,
).map("".join)


@given(
    codes=odd_codes,
    text=odd_text,
    threads=st.sampled_from([1, 2, 7]),
    chunk_bytes=st.sampled_from([1, 2, 3, 8, 1 << 18]),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_one_pass_equals_two_steps(
    tmp_path_factory: pytest.TempPathFactory,
    codes: list[tuple[bytes, bytes]],
    text: str,
    threads: int,
    chunk_bytes: int,
    data: st.DataObject,
) -> None:
    """Words that contain blanks and line ends, pieces that are none, characters split by codes that are not UTF-8."""
    folder = tmp_path_factory.mktemp("pass")
    (folder / "codes").write_bytes(b"".join(b"%b %b 1\n" % pair for pair in codes))
    made = [(left + right).removesuffix(b"</w>").decode(errors="ignore") for left, right in codes]
    shown = sorted({s + mark for s in [*made, *ODD] for mark in ("", "@@")} - {""})
    symbols = [*SPECIAL_SYMBOLS, *data.draw(st.lists(st.sampled_from(shown), unique=True))]
    vocabulary = data.draw(st.none() | st.lists(st.sampled_from(shown), unique=True, min_size=1))
    if vocabulary is not None:
        kept = [word for word in vocabulary if not {" ", "\n"} & set(word)]
        (folder / "vocab").write_text("".join(f"{w} 1\n" for w in kept), newline="")
    bpe = _core.Bpe(folder / "codes", None if vocabulary is None else folder / "vocab")
    (folder / "tok").write_bytes(text.encode())
    bpe.apply_file(folder / "tok", folder / "pieces")
    try:
        expected = encode(folder / "pieces", symbols)
    except InputError:
        with pytest.raises(InputError, match="the codes split a character"):
            encode(folder / "tok", symbols, bpe, threads, chunk_bytes)
    else:
        assert encode(folder / "tok", symbols, bpe, threads, chunk_bytes) == expected


def test_one_pass_names_the_byte_of_the_tokenised_text(bpe: _core.Bpe, tmp_path: Path) -> None:
    (tmp_path / "tok").write_bytes(b"lower newest\r\nnewest \xe9\n")
    with pytest.raises(InputError, match=r"tok, line 2, byte 21: 0xe9 is not UTF-8"):
        encode(tmp_path / "tok", list(SPECIAL_SYMBOLS), bpe, 2, 4)


def test_codes_that_split_a_character_are_refused(tmp_path: Path) -> None:
    """In two steps it is the second one that refuses: the pieces are not UTF-8."""
    (tmp_path / "codes").write_bytes(b"\xc3 \xa9</w> 1\n")
    (tmp_path / "vocab").write_bytes(b"x 1\n")
    (tmp_path / "tok").write_text("a é\n")
    bpe = _core.Bpe(tmp_path / "codes", tmp_path / "vocab")
    assert bpe.apply_line("é".encode()) == b"\xc3@@ \xa9"
    with pytest.raises(InputError, match="the codes split a character of the word `é`"):
        encode(tmp_path / "tok", list(SPECIAL_SYMBOLS), bpe)
    with pytest.raises(InputError, match="the codes split a character into pieces"):
        _core.count_text_words([_core.Piece(tmp_path / "tok")], 1, _core.Progress(), bpe=bpe)


def test_what_does_not_fit_a_cache_is_split_alike(bpe: _core.Bpe, tmp_path: Path) -> None:
    """Values that are long, keys that are long, words that are not kept, and more words than a cache holds."""
    letters = golden("ar.tok").decode().replace(" ", "").replace("\n", "")
    words = [letters[i : i + n] for n in (10, 16, 17, 24, 70, 150) for i in range(0, 3000, 7)]
    numbers = " ".join(f"{i:x}" for i in range(600_000))
    (tmp_path / "tok").write_text(f"{' '.join(words)}\n{numbers}\n{' '.join(words)}\n")
    bpe.apply_file(tmp_path / "tok", tmp_path / "pieces")
    assert (tmp_path / "pieces").read_bytes().replace(b"@@ ", b"") == (
        tmp_path / "tok"
    ).read_bytes()
    first, _, again = (tmp_path / "pieces").read_text().splitlines()
    assert first == again == " ".join(bpe.apply_line(word.encode()).decode() for word in words)
    pieces = [line.split(" ")[0] for line in golden("vocab").decode().splitlines()]
    symbols = [*SPECIAL_SYMBOLS, *pieces]
    assert encode(tmp_path / "tok", symbols, bpe) == encode(tmp_path / "pieces", symbols)


# --------------------------------------------------------------------------- binarize --bpe-codes


def run_binarize(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "xlm_ds.binarize", "--source-lang=ar", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=60)


def test_binarize_with_codes_writes_what_two_steps_write(tmp_path: Path) -> None:
    codes, vocabulary = unpacked("codes", tmp_path), unpacked("vocab", tmp_path)
    (tmp_path / "pieces.ar").write_bytes(golden("ar.bpe"))
    (tmp_path / "tokenised.ar").write_bytes(golden("ar.tok"))
    two, one = tmp_path / "two", tmp_path / "one"
    run_binarize(
        f"--srcdict={vocabulary}", f"--trainpref={tmp_path / 'pieces'}", f"--destdir={two}"
    )
    run_binarize(f"--srcdict={vocabulary}", f"--trainpref={tmp_path / 'tokenised'}", f"--destdir={one}",
                 f"--bpe-codes={codes}", "--workers=2")  # fmt: skip
    for name in ("dict.txt", "train.ar.bin", "train.ar.idx", "train.ar.counts.npy"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert (one / "codes").read_bytes() == codes.read_bytes()


def binarize_tokenised(folder: Path, *arguments: str) -> Path:
    (folder / "tok.en").write_bytes(golden("en.tok"))
    assert (
        binarize.main([f"--trainpref={folder / 'tok'}", f"--destdir={folder / 'out'}", *arguments])
        == 0
    )
    return folder / "out"


def test_a_dictionary_built_on_the_way_has_the_pieces(tmp_path: Path) -> None:
    codes = unpacked("codes", tmp_path)
    arguments = (f"--bpe-codes={codes}", "--langs=en", "--padding-factor=1")
    built = binarize_tokenised(tmp_path, *arguments)
    rows = (built / "dict.txt").read_text().splitlines()
    counts = Counter(golden("en.bpe").decode().split())
    assert {row.split(" ")[0]: int(row.split(" ")[1]) for row in rows} == counts


def test_the_codes_used_travel_with_the_data(tmp_path: Path) -> None:
    """Not those beside the dictionary; and data split with others is not added."""
    vocabulary = unpacked("vocab", tmp_path)
    (tmp_path / "codes").write_text("a b 1\n")
    (tmp_path / "given").write_bytes(golden("codes"))
    arguments = ("--source-lang=en", f"--srcdict={vocabulary}")
    folder = binarize_tokenised(tmp_path, *arguments, f"--bpe-codes={tmp_path / 'given'}")
    assert (folder / "codes").read_bytes() == golden("codes")
    binarize_tokenised(tmp_path, *arguments, f"--bpe-codes={tmp_path / 'given'}")
    for more in ([f"--bpe-codes={tmp_path / 'codes'}"],
                 [f"--bpe-codes={tmp_path / 'given'}", f"--bpe-vocab={vocabulary}"]):  # fmt: skip
        with pytest.raises(InputError, match="other codes than"):
            binarize_tokenised(tmp_path, *arguments, *more)


def test_the_vocabulary_used_travels_with_the_codes(tmp_path: Path) -> None:
    """Also when the first run was killed between the two; without it later text would be split otherwise."""
    codes, vocabulary = unpacked("codes", tmp_path), unpacked("vocab", tmp_path)
    arguments = ("--source-lang=en", f"--srcdict={vocabulary}", f"--bpe-codes={codes}")
    limited = (*arguments, f"--bpe-vocab={vocabulary}")
    folder = binarize_tokenised(tmp_path, *limited)
    (folder / "codes").unlink()
    with pytest.raises(InputError, match="other codes than"):
        binarize_tokenised(tmp_path, *arguments)
    binarize_tokenised(tmp_path, *limited)
    assert (folder / "codes").read_bytes() == golden("codes")
    assert (folder / "bpe_vocab").read_bytes() == golden("vocab")
    with pytest.raises(InputError, match="other codes than"):
        binarize_tokenised(tmp_path, *arguments)


def test_a_vocabulary_needs_codes(tmp_path: Path) -> None:
    vocabulary = unpacked("vocab", tmp_path)
    with pytest.raises(InputError, match="--bpe-vocab goes with --bpe-codes"):
        binarize_tokenised(tmp_path, "--langs=en", f"--bpe-vocab={vocabulary}")
    (tmp_path / "empty").touch()
    codes = unpacked("codes", tmp_path)
    with pytest.raises(InputError, match="empty: is empty, expected lines `word count`"):
        binarize_tokenised(
            tmp_path, "--langs=en", f"--bpe-codes={codes}", f"--bpe-vocab={tmp_path / 'empty'}"
        )
    assert not (tmp_path / "out").exists()
