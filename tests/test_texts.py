"""Every byte is read once, in order, by ranks whose shares are nearly equal and are cut after a line feed only."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlm_ds.texts import Input, Text, divide

content = st.lists(st.sampled_from([b"\n", b"a", b" ", b"\r", b"xyz" * 20]), max_size=60).map(
    b"".join
)


def texts_with(contents: list[list[bytes]], folder: Path) -> list[Text]:
    texts = []
    for number, files in enumerate(contents):
        inputs = []
        for part, content in enumerate(files):
            path = folder / f"{number}.{part}"
            path.write_bytes(content)
            inputs.append(Input(path, len(content), 0))
        texts.append(Text("train", str(number), tuple(inputs)))
    return texts


@given(st.lists(st.lists(content, min_size=1, max_size=3), max_size=4), st.integers(1, 6))
def test_shares_are_the_texts(
    tmp_path_factory: pytest.TempPathFactory, contents: list[list[bytes]], ranks: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    texts = texts_with(contents, folder)
    shares = divide(texts, ranks)
    assert len(shares) == ranks
    longest_line = max(
        (len(line) + 1 for files in contents for file in files for line in file.split(b"\n")),
        default=0,
    )
    total = sum(text.size for text in texts)
    for share in shares:
        size = sum(s.end - s.begin for stretches in share.values() for s in stretches)
        assert abs(size - total / ranks) <= longest_line + 1
    for number, text in enumerate(texts):
        readers = [share[number] for share in shares if number in share]
        assert readers
        stretches = [stretch for stretches in readers for stretch in stretches]
        expected = b"".join(contents[number])
        read = b""
        for path, begin, end in stretches:
            file = path.read_bytes()
            assert begin < end
            assert begin == 0 or file[begin - 1 : begin] == b"\n"
            assert end == len(file) or file[end - 1 : end] == b"\n"
            read += file[begin:end]
        assert read == expected
        assert sum(text.size == 0 for _ in readers) <= 1


def test_a_long_line_is_one_stretch(tmp_path: Path) -> None:
    """Without a line feed there is no place to cut; the other ranks get nothing rather than half a line."""
    texts = texts_with([[b"a b " * 100_000]], tmp_path)
    shares = divide(texts, 5)
    assert [len(share) for share in shares] == [1, 0, 0, 0, 0]


def test_cuts_are_near_where_they_should_be(tmp_path: Path) -> None:
    texts = texts_with([[b"a b c\n" * 10_000], [b"d\n" * 60_000]], tmp_path)
    shares = divide(texts, 3)
    places = [0]
    for share in shares:
        places.append(places[-1] + sum(s.end - s.begin for ss in share.values() for s in ss))
    assert [end - begin for begin, end in pairwise(places)] == [60_000, 60_000, 60_000]
