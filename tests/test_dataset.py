"""Datasets: fairseq's blocks, every layout and name, and a sentence for every way a file can be wrong."""

import io
import itertools
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference
from pairs import DTYPE_CODES, write_lazy, write_megatron, write_mmap, write_mmap_index
from xlm_ds import _core
from xlm_ds.dataset import TokenDataset, dictionary_path, languages_in, open_split
from xlm_ds.log import InputError

DATA = Path(__file__).parent / "data" / "blocks"
LINES = [[10, 11, 12, 2], [2], [13, 14, 2]]
SHA256 = "5" * 64


CORE_MODES = {
    mode: getattr(_core.BreakMode, mode) for mode in ("none", "eos", "complete", "complete_doc")
}
MODES = list(CORE_MODES)


def load_xz(name: str) -> Any:
    return json.loads(lzma.decompress((DATA / name).read_bytes()))


def open_one(
    folder: Path,
    language: str = "ar",
    *,
    split: str = "train",
    length: int = 256,
    mode: str = "none",
    vocab_size: int = 20,
) -> TokenDataset:
    (dataset,) = open_split(
        folder,
        split,
        [language],
        tokens_per_sample=length,
        break_mode=mode,
        vocab_size=vocab_size,
        dictionary_sha256=SHA256,
    )
    return dataset


def all_blocks(dataset: TokenDataset) -> list[list[int]]:
    return [dataset.block(k).tolist() for k in range(dataset.blocks)]


GOLDEN_BLOCKS = load_xz("token_blocks.json.xz")


# Where a block begins at a line without tokens (binarize writes none), fairseq loses the next line's first token.
FAIRSEQ_LOSES_TOKENS = {("with_len0", "None/1"), ("with_len0", "None/8")}


@pytest.mark.parametrize("corpus", GOLDEN_BLOCKS)
@pytest.mark.parametrize("write", [write_mmap, write_lazy, write_megatron])
def test_blocks_are_fairseqs(
    tmp_path: Path, corpus: str, write: Callable[[Path, list[list[int]]], None]
) -> None:
    golden = GOLDEN_BLOCKS[corpus]
    write(tmp_path / "train.ar", golden["sentences"])
    assert len(golden["blocks"]) == 16
    for key, blocks in golden["blocks"].items():
        mode, size = key.split("/")[0].lower(), int(key.split("/")[1])
        if (corpus, mode) == ("one", "complete_doc"):  # fairseq fails: ValueError from a reshape
            with pytest.raises(InputError, match=r"train\.ar\.bin: has no block in break mode"):
                open_one(tmp_path, length=size + 1, mode=mode)
            continue
        dataset = open_one(tmp_path, length=size + 1, mode=mode, vocab_size=400)
        if mode != "none":  # fairseq never cuts there; ours must fit the position table
            assert dataset.count_cut() == sum(len(block) > size for block in blocks)
            blocks = [block[:size] for block in blocks]
        if (corpus, key) in FAIRSEQ_LOSES_TOKENS:
            assert all_blocks(dataset) != blocks
            blocks = reference.cut_blocks(golden["sentences"], size, mode)
        assert all_blocks(dataset) == blocks


def test_some_golden_block_is_cut() -> None:
    """Guards the test above: without long lines, and lines across blocks, it would compare little."""
    sentences = [line for golden in GOLDEN_BLOCKS.values() for line in golden["sentences"]]
    assert max(map(len, sentences)) > 255
    assert sum(len(golden["blocks"]["None/7"]) for golden in GOLDEN_BLOCKS.values()) > 500
    for mode, other in itertools.combinations(["None", "eos", "complete", "complete_doc"], 2):
        assert any(
            golden["blocks"][f"{mode}/8"] != golden["blocks"][f"{other}/8"]
            for golden in GOLDEN_BLOCKS.values()
        )


LINES_OF_ALL_LENGTHS = st.lists(
    st.integers(1, 30).flatmap(lambda n: st.lists(st.integers(0, 19), min_size=n, max_size=n))
    | st.just([2]),
    min_size=1,
    max_size=12,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    LINES_OF_ALL_LENGTHS,
    st.sampled_from([write_mmap, write_lazy, write_megatron]),
    st.sampled_from(MODES),
    st.integers(1, 40),
)
def test_blocks_equal_their_twin(
    tmp_path: Path,
    lines: list[list[int]],
    write: Callable[[Path, list[list[int]]], None],
    mode: str,
    size: int,
) -> None:
    write(tmp_path / "train.ar", lines)
    core = _core.TokenDataset(tmp_path / "train.ar", mode=CORE_MODES[mode], block_size=size)
    twins = reference.cut_blocks(lines, size, mode)
    assert core.blocks == len(twins)
    out = np.empty(size, np.int64)
    for k, twin in enumerate(twins):
        assert core.block_length(k) == len(twin)
        assert out[: core.fill_block(k, vocab_size=20, out=out)].tolist() == twin
    assert core.table_bytes == (8 * len(twins) if mode.startswith("complete") else 0)
    cut = sum(len(line) > size for line in lines)
    assert core.count_cut() == (0 if mode == "none" else cut)


def test_complete_modes_say_what_they_cannot_hold(tmp_path: Path) -> None:
    write_mmap(tmp_path / "train.ar", LINES)
    assert open_one(tmp_path, length=2**20, mode="complete").block(0).size == 8
    with pytest.raises(InputError, match="blocks of 1048576 tokens are too long for break modes"):
        open_one(tmp_path, length=2**20 + 1, mode="complete")


@pytest.mark.parametrize("layout", ["mmap", "lazy"])
def test_samples_are_those_of_fairseqs_batches(layout: str) -> None:
    for case in load_xz("masked_batches.fr.json.xz"):
        dataset = open_one(DATA / layout, "fr", split="valid", length=case["T"], vocab_size=3097)
        assert dataset.blocks == case["blocks"]
        shown, targets = np.array(case["src_tokens"]), np.array(case["lm_target"])
        originals = np.where(targets == 1, shown, targets)
        for block, row in zip(case["ids"], originals, strict=True):
            tokens = dataset.block(block)
            assert row.tolist() == [2, *tokens, *[1] * (case["T"] - 1 - len(tokens))]


def test_both_layouts_hold_the_same() -> None:
    mmap, lazy = (
        open_one(DATA / k, "fr", split="valid", vocab_size=3097) for k in ("mmap", "lazy")
    )
    assert mmap.sequences == lazy.sequences == 80
    assert mmap.tokens == lazy.tokens == 2776
    assert (mmap.counts() == lazy.counts()).all()
    assert mmap.counts()[2] == 80
    assert all_blocks(mmap) == all_blocks(lazy)


@pytest.mark.parametrize("dtype", DTYPE_CODES)
def test_every_integer_type_is_read(tmp_path: Path, dtype: str) -> None:
    write_mmap(tmp_path / "train.ar", LINES, dtype)
    assert all_blocks(open_one(tmp_path, length=6)) == [[10, 11, 12, 2, 2], [13, 14, 2]]


@pytest.mark.parametrize("dtype", ["u2", "i4"])
@pytest.mark.parametrize("document_starts", [None, [0, 3], [0, 1, 1, 3]])
def test_megatrons_pairs_are_read(
    tmp_path: Path, dtype: str, document_starts: list[int] | None
) -> None:
    write_megatron(tmp_path / "train.ar", LINES, dtype, document_starts)
    assert all_blocks(open_one(tmp_path, mode="eos")) == LINES
    path = tmp_path / "train.ar.idx"
    path.write_bytes(path.read_bytes() + bytes(len(LINES)))  # multimodal: a mode for each line
    assert all_blocks(open_one(tmp_path, length=6)) == [[10, 11, 12, 2, 2], [13, 14, 2]]


@pytest.mark.parametrize(
    ("dtype", "document_starts", "message"),
    [
        ("u4", None, r"Megatron-LM's layout, but uint32"),
        ("u2", [], "lists no documents"),
        ("u2", [0, 2], r"from 0 to 2, expected from 0 to 3"),
        ("u2", [1, 3], r"from 1 to 3, expected from 0 to 3"),
    ],
)
def test_damaged_megatron_pairs_are_refused(
    tmp_path: Path, dtype: str, document_starts: list[int] | None, message: str
) -> None:
    write_megatron(tmp_path / "train.ar", LINES, dtype, document_starts)
    with pytest.raises(InputError, match=rf"train\.ar\.idx: .*{message}"):
        open_one(tmp_path)


def test_fairseqs_names_are_found(tmp_path: Path) -> None:
    write_mmap(tmp_path / "train.ar-None.ar", LINES)
    write_lazy(tmp_path / "train.de", LINES)
    write_lazy(tmp_path / "valid.fr", LINES)
    assert languages_in(tmp_path, "train") == ("ar", "de")
    assert open_one(tmp_path).tokens == 8


def test_dictionary_is_joint_or_the_same_for_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no dict\.txt, nor dict\.ar\.txt"):
        dictionary_path(tmp_path, ["ar", "de"])
    for language in ("ar", "de"):
        (tmp_path / f"dict.{language}.txt").write_text("the 10\n", encoding="utf-8")
    assert dictionary_path(tmp_path, ["ar", "de"]).name == "dict.ar.txt"
    (tmp_path / "dict.de.txt").write_text("der 10\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"dict\.de\.txt: differs from dict\.ar\.txt"):
        dictionary_path(tmp_path, ["ar", "de"])
    (tmp_path / "dict.txt").write_text("the 10\n", encoding="utf-8")
    assert dictionary_path(tmp_path, ["ar", "de"]).name == "dict.txt"


# ------------------------------------------------------------------------------------ side files


def write_record(folder: Path, **changes: object) -> None:
    record = {"language": "ar", "split": "train", "tokens": 8, "dictionary_sha256": SHA256}
    (folder / "train.ar.json").write_text(json.dumps(record | changes), encoding="utf-8")


def test_counts_are_read_or_counted(tmp_path: Path) -> None:
    write_mmap(tmp_path / "train.ar", LINES)
    counted = open_one(tmp_path).counts()
    assert counted.dtype == np.uint64
    assert counted.tolist() == np.bincount([10, 11, 12, 2, 2, 13, 14, 2], minlength=20).tolist()
    recorded = np.zeros(20, np.uint64)
    recorded[5] = 8  # not what is there, to see that it is believed
    np.save(tmp_path / "train.ar.counts.npy", recorded)
    assert open_one(tmp_path).counts().tolist() == recorded.tolist()


def test_counting_goes_over_its_steps(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 50, 10_000)
    write_lazy(tmp_path / "train.ar", [ids.tolist()])
    counts = open_one(tmp_path, vocab_size=50).counts()
    assert counts.tolist() == np.bincount(ids, minlength=50).tolist()


def test_a_pair_under_another_name_is_refused(tmp_path: Path) -> None:
    """Danish copied over Estonian trains without a word otherwise."""
    write_mmap(tmp_path / "train.ar", LINES)
    write_record(tmp_path, language="da")
    with pytest.raises(InputError, match=r"was written for train\.da"):
        open_one(tmp_path)


def test_another_dictionary_is_refused(tmp_path: Path) -> None:
    write_mmap(tmp_path / "train.ar", LINES)
    write_record(tmp_path)
    assert open_one(tmp_path).tokens == 8
    write_record(tmp_path, dictionary_sha256="6" * 64)
    with pytest.raises(
        InputError, match=r"train\.ar\.json: .* made with the dictionary of SHA-256 666"
    ):
        open_one(tmp_path)


def test_an_id_beyond_the_dictionary_is_refused(tmp_path: Path) -> None:
    write_mmap(tmp_path / "train.ar", LINES)
    dataset = open_one(tmp_path, vocab_size=14)
    for read in (dataset.counts, lambda: dataset.block(0)):
        with pytest.raises(
            InputError, match=r"has the id 14, but the dictionary ends at 13; .*another"
        ):
            read()


def test_a_negative_id_is_refused(tmp_path: Path) -> None:
    write_lazy(tmp_path / "train.ar", [[5, -1, 2]])
    with pytest.raises(InputError, match="has the id -1"):
        open_one(tmp_path).block(0)


def as_npy(counts: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, counts)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.ar.json", b"{", "not the record"),
        ("train.ar.json", b"[]", "not the record"),
        ("train.ar.json", b'{"tokens": 8}', "not the record"),
        ("train.ar.json", b"\xff", "not the record"),
        (
            "train.ar.json",
            json.dumps(
                {"language": "ar", "split": "train", "tokens": 7, "dictionary_sha256": SHA256}
            ).encode(),
            r"says 7 tokens, but the \.bin beside it has 8",
        ),
        ("train.ar.counts.npy", b"", "not a numpy array"),
        ("train.ar.counts.npy", b"counts", "not a numpy array"),
        ("train.ar.counts.npy", as_npy(np.ones(20)), "has float64 of shape"),
        ("train.ar.counts.npy", as_npy(np.ones(19, np.uint64)), "expected uint64 of shape"),
        ("train.ar.counts.npy", as_npy(np.ones(20, np.uint64)), "counts 20 tokens, but"),
    ],
)
def test_damaged_side_files_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    write_mmap(tmp_path / "train.ar", LINES)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_one(tmp_path).counts()


# ------------------------------------------------------------------------------------- bad input


def test_a_language_without_data_is_named(tmp_path: Path) -> None:
    write_mmap(tmp_path / "train.de", LINES)
    write_mmap(tmp_path / "train.en", LINES)
    with pytest.raises(InputError, match=r"train\.ar\.idx: .* train is there for de, en$"):
        open_one(tmp_path)
    with pytest.raises(InputError, match="valid is there for no language"):
        open_one(tmp_path, split="valid")
    with pytest.raises(InputError, match="there is no such folder"):
        open_one(tmp_path / "OUT")


@pytest.mark.parametrize(("kept", "lost"), [("idx", "bin"), ("bin", "idx")])
def test_half_a_pair_is_refused(tmp_path: Path, kept: str, lost: str) -> None:
    write_mmap(tmp_path / "train.ar", LINES)
    (tmp_path / f"train.ar.{lost}").unlink()
    with pytest.raises(InputError, match=rf"train\.ar\.{kept}: the \.{lost} .* is missing"):
        open_one(tmp_path)


def test_an_empty_language_is_refused(tmp_path: Path) -> None:
    for write in (write_mmap, write_lazy):
        write(tmp_path / "train.ar", [])
        with pytest.raises(InputError, match=r"train\.ar\.bin: holds no tokens"):
            open_one(tmp_path)


def cut(suffix: str, by: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / f"train.ar.{suffix}"
        path.write_bytes(path.read_bytes()[:-by])

    return damage


def append(suffix: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / f"train.ar.{suffix}"
        path.write_bytes(path.read_bytes() + content)

    return damage


def overwrite(content: bytes, at: int = 0) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "train.ar.idx"
        old = path.read_bytes()
        path.write_bytes(old[:at] + content + old[at + len(content) :])

    return damage


DAMAGES = {
    "bin cut": (cut("bin", 1), r"lists 8 tokens of uint16, 16 bytes, but the \.bin .* has 15"),
    "bin of another run": (cut("bin", 4), r"but the \.bin beside it has 12"),
    "idx cut": (cut("idx", 8), "truncated"),
    "idx cut in the header": (cut("idx", 50), "truncated"),
    "idx of another program": (overwrite(b"\x93NUMPY"), "neither MMIDIDX nor TNTIDX"),
    "idx version": (overwrite(b"\x02", 9), "format version 2"),
    "idx of floats": (overwrite(b"\x06", 17), "dtype code 6"),
    "last length": (overwrite(b"\x04", 26 + 8), "lists 9 tokens"),
    "idx of Megatron's floats": (overwrite(b"\x07", 17), "dtype code 7 is floating point"),
    "idx too long": (append("idx", b"\0" * 7), "a layout other than fairseq's and Megatron-LM's"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_pairs_are_refused_on_opening(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    write_mmap(tmp_path / "train.ar", LINES)
    assert open_one(tmp_path).tokens == 8
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        open_one(tmp_path)
    assert str(tmp_path / "train.ar.idx") in str(raised.value)


@pytest.mark.parametrize(
    "damage",
    [overwrite(b"\xff\xff\xff\xff", 26), overwrite(b"\x09", 26), overwrite(b"\xff" * 8, 26 + 12)],
    ids=["negative length", "too long", "start far away"],
)
def test_a_damaged_line_is_refused_when_read(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Opening does not look at every line; reading one must not leave the file."""
    write_mmap(tmp_path / "train.ar", LINES)
    damage(tmp_path)
    dataset = open_one(tmp_path, mode="eos")
    with pytest.raises(InputError, match=r"train\.ar\.idx: sequence 0 lies outside the \.bin"):
        dataset.block(0)
    assert dataset.block(1).tolist() == [2]


# ------------------------------------------------------------------------------------------- size


def test_more_than_2_31_tokens_and_2_32_bytes(tmp_path: Path) -> None:
    """A sparse file: 3 lines of 2^30 tokens, six apparent GiB, a few KiB on disk."""
    line = 2**30
    write_mmap_index(tmp_path / "train.ar.idx", [line] * 3)
    last = np.arange(100, 200, dtype="<u2")
    with (tmp_path / "train.ar.bin").open("wb") as stream:
        stream.seek(2 * 3 * line - last.nbytes)
        stream.write(last.tobytes())
    stream_blocks = open_one(tmp_path, vocab_size=300)
    assert stream_blocks.tokens == 3 * 2**30
    assert stream_blocks.blocks == -(-3 * 2**30 // 255)
    tail = stream_blocks.block(stream_blocks.blocks - 1)
    assert len(tail) == 3 * 2**30 % 255
    assert tail.tolist() == [*[0] * (len(tail) - 100), *range(100, 200)]
    lines = open_one(tmp_path, mode="eos", vocab_size=300)
    assert lines.count_cut() == 3
    assert lines.block(2).tolist() == [0] * 255
