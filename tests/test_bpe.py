"""Byte pair encoding: equal to fastBPE's own output and to the slow twin; bad files refused."""

import lzma
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import bpe_apply
from xlm_ds import _core
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
    assert _core.count_words(paths, tmp_path / "vocab") == golden("vocab").count(b"\n")
    assert (tmp_path / "vocab").read_bytes() == golden("vocab")


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
def learnt_codes(draw: st.DrawFn) -> list[tuple[bytes, bytes]]:
    """Merges as fastBPE could read them: of symbols there are, none made twice, in any order."""
    inside, last = list(ALPHABET), [c + b"</w>" for c in ALPHABET]
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
