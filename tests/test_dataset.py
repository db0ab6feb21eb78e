"""Datasets: fairseq's blocks, every layout and name, and a sentence for every way a file can be wrong."""

import io
import itertools
import json
import lzma
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import reference
from pairs import (
    DTYPE_CODES,
    write_lazy,
    write_lazy_index,
    write_megatron,
    write_megatron_index,
    write_mmap,
    write_mmap_index,
)
from xlm_ds import _core
from xlm_ds.batches import Masking, build_batch
from xlm_ds.dataset import TokenDataset, dictionary_path, languages_in, open_split
from xlm_ds.log import InputError
from xlm_ds.order import Samples, build_order
from xlm_ds.streams import alone

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


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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


def record_with(**changes: object) -> bytes:
    """The record of train.ar of LINES."""
    record = {"language": "ar", "split": "train", "lines": 3, "tokens": 8, "unknown": 0, "blank": 1}
    record |= {"literal_specials": 0, "unigram_entropy_bits": 2.4, "dictionary_sha256": SHA256}
    return json.dumps(record | {"sha256": {}} | changes).encode()


def write_record(folder: Path, **changes: object) -> None:
    (folder / "train.ar.json").write_bytes(record_with(**changes))


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


def test_one_of_several_shards_is_refused(tmp_path: Path) -> None:
    """The first alone would train on a part of the text without a word otherwise."""
    write_mmap(tmp_path / "train.ar", LINES)
    write_record(tmp_path, shard=0, shards=3)
    with pytest.raises(InputError, match=r"one of 3 shards.*shards merge"):
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
        with pytest.raises(InputError, match=r"id 14.*, but the dictionary ends at 13; .*another"):
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
        ("train.ar.json", b"[" * 100_000, "not the record"),
        ("train.ar.json", record_with(tokens=7), r"says 7 tokens, but the \.bin beside it has 8"),
        ("train.ar.json", record_with(tokens="8"), "tokens is '8'; delete it and binarize again"),
        (
            "train.ar.counts.npy",
            as_npy(np.ones(19, np.uint64)),
            "is not numpy's file of 20 numbers",
        ),
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
    with pytest.raises(InputError, match="nothing of valid is there for any lang"):
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


def change(suffix: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / f"train.ar.{suffix}"
        path.write_bytes(edit(path.read_bytes()))

    return damage


def overwrite(content: bytes, at: int) -> Callable[[Path], None]:
    return change("idx", lambda old: old[:at] + content + old[at + len(content) :])


@dataclass(frozen=True)
class Layout:
    """Where the parts of an .idx of LINES are, and the numbers they are written as."""

    write: Callable[[Path, list[list[int]]], None]
    version: int
    dtype: int
    count: int
    starts: int
    lengths: int
    length_format: str
    start_unit: int
    element_bytes: int

    def length(self, i: int, value: int) -> Callable[[Path], None]:
        width = struct.calcsize(self.length_format)
        return overwrite(struct.pack(self.length_format, value), self.lengths + width * i)

    def start(self, i: int, tokens: int, *, further: int = 0) -> Callable[[Path], None]:
        value = struct.pack("<q", tokens * self.start_unit + further)
        return overwrite(value, self.starts + 8 * i)


LAYOUTS = {
    "mmap": Layout(write_mmap, 9, 17, 18, 38, 26, "<i", 2, 2),
    "lazy": Layout(write_lazy, 8, 16, 32, 80, 112, "<q", 1, 4),
    "megatron": Layout(write_megatron, 9, 17, 18, 46, 34, "<i", 2, 2),
}
BIN = r"but the \.bin beside it has"
DAMAGES: dict[str, tuple[Callable[[Layout], Callable[[Path], None]], str]] = {
    "bin without its last byte": (lambda _: change("bin", lambda b: b[:-1]), BIN),
    "bin without a token": (lambda k: change("bin", lambda b: b[: -k.element_bytes]), BIN),
    "bin empty": (lambda _: change("bin", lambda _: b""), f"{BIN} 0 "),
    "bin with an odd byte": (lambda _: change("bin", lambda b: b + b"\0"), BIN),
    "bin of another run": (lambda _: change("bin", lambda b: b + b), BIN),
    "idx empty": (lambda _: change("idx", lambda _: b""), "neither MMIDIDX nor TNTIDX"),
    "idx of another program": (lambda _: overwrite(b"\x93NUMPY", 0), "neither MMIDIDX nor TNTIDX"),
    "idx of text": (lambda _: change("idx", lambda _: b"the cat sat\n"), "neither MMIDIDX nor"),
    "idx one byte longer": (lambda _: change("idx", lambda b: b + b"\0"), "but the file has"),
    "idx twice": (lambda _: change("idx", lambda b: b + b), "but the file has"),
    "version 0": (lambda k: overwrite(b"\0", k.version), "format version 0, expected 1"),
    "version 2": (lambda k: overwrite(b"\2", k.version), "format version 2, expected 1"),
    "dtype 0": (lambda k: overwrite(b"\0", k.dtype), "dtype code 0 is not one of the integer"),
    "dtype float64": (lambda k: overwrite(b"\6", k.dtype), "dtype code 6 is floating point"),
    "dtype float32": (lambda k: overwrite(b"\7", k.dtype), "dtype code 7 is floating point"),
    "dtype unknown": (lambda k: overwrite(b"\xff", k.dtype), "dtype code 255 is not one of"),
    "dtype of another width": (lambda k: overwrite(b"\1", k.dtype), f"{BIN}|the element size"),
    "one line more": (lambda k: overwrite(b"\4", k.count), "4 sequences|items of more than one"),
    "one line less": (lambda k: overwrite(b"\2", k.count), "2 sequences|items of more than one"),
    "more lines than can be": (lambda k: overwrite(b"\xff" * 8, k.count), "impossible number"),
    "first start": (lambda k: k.start(0, 1), "the first sequence starts at token 1, expected 0"),
    "last length longer": (lambda k: k.length(2, 4), r"lists 9 tokens .* but the \.bin"),
    "last length shorter": (lambda k: k.length(2, 2), r"lists 7 tokens .* but the \.bin"),
    "last length negative": (lambda k: k.length(2, -1), "the last sequence's place is impossible"),
    "last start too far": (lambda k: k.start(2, 6), r"lists 9 tokens .* but the \.bin"),
    "last start too early": (lambda k: k.start(2, 4), r"lists 7 tokens .* but the \.bin"),
    "last start negative": (
        lambda k: k.start(2, -2),
        r"the last sequence's place is impossible|but the \.bin",
    ),
}


def refused(folder: Path, mode: str = "none") -> str:
    """The one sentence that opening ends with."""
    with pytest.raises(InputError) as raised:
        open_one(folder, mode=mode)
    sentence = str(raised.value)
    assert sentence.startswith(f"{folder / 'train.ar.idx'}: ")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_pairs_are_refused_on_opening(tmp_path: Path, layout: Layout, name: str) -> None:
    damage, message = DAMAGES[name]
    layout.write(tmp_path / "train.ar", LINES)
    assert open_one(tmp_path).tokens == 8
    damage(layout)(tmp_path)
    assert re.search(message, refused(tmp_path))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_truncation_is_refused(tmp_path: Path, layout: Layout) -> None:
    layout.write(tmp_path / "train.ar", LINES)
    for suffix in ("idx", "bin"):
        path = tmp_path / f"train.ar.{suffix}"
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            assert refused(tmp_path)
        path.write_bytes(whole)
    assert open_one(tmp_path).tokens == 8


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda k: k.length(1, 2), "sequence 2 starts at token 5, expected 6"),
        (lambda k: k.length(1, 0), "sequence 2 starts at token 5, expected 4"),
        (lambda k: k.length(1, -1), "sequence 1 has a length of -1, but only 4 tokens are left"),
        (lambda k: k.length(1, 5), "sequence 1 has a length of 5, but only 4 tokens are left"),
        (lambda k: k.start(1, 3), "sequence 1 starts at token 3, expected 4"),  # overlaps
        (lambda k: k.start(1, 5), "sequence 1 starts at token 5, expected 4"),
        (lambda k: k.start(1, 4, further=1), "sequence 1 starts at .* expected 4"),
        (lambda k: k.start(1, -1), "sequence 1 starts at .* expected 4"),
        (lambda k: k.start(1, 2**40), f"sequence 1 starts at token {2**40}, expected 4"),
    ],
)
def test_what_only_a_look_at_every_line_sees(
    tmp_path: Path, layout: Layout, damage: Callable[[Layout], Callable[[Path], None]], message: str
) -> None:
    """Modes none and eos open in O(1); the two that walk over all lines anyway check them all."""
    layout.write(tmp_path / "train.ar", LINES)
    damage(layout)(tmp_path)
    assert all_blocks(open_one(tmp_path, length=6)) == [[10, 11, 12, 2, 2], [13, 14, 2]]
    for mode in ("complete", "complete_doc"):
        assert re.search(message, refused(tmp_path, mode))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda k: k.length(1, -1),
        lambda k: k.length(1, 9),
        lambda k: k.start(1, -1),
        lambda k: k.start(1, 2**40),
    ],
    ids=["negative length", "too long", "negative start", "start far away"],
)
def test_a_damaged_line_is_refused_when_read(
    tmp_path: Path, layout: Layout, damage: Callable[[Layout], Callable[[Path], None]]
) -> None:
    """Opening does not look at every line; reading one must not leave the file."""
    layout.write(tmp_path / "train.ar", LINES)
    damage(layout)(tmp_path)
    dataset = open_one(tmp_path, mode="eos")
    with pytest.raises(InputError, match=r"train\.ar\.idx: sequence 1 lies outside the \.bin"):
        dataset.block(1)
    assert [dataset.block(k).tolist() for k in (0, 2)] == [LINES[0], LINES[2]]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(list(LAYOUTS.values())),
    st.sampled_from(["idx", "idx", "bin"]),
    st.lists(
        st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3
    ),
    st.sampled_from(MODES),
)
def test_whatever_is_damaged_is_refused_or_read(
    tmp_path: Path, layout: Layout, suffix: str, patches: list[tuple[int, bytes]], mode: str
) -> None:
    """Mostly for the sanitizers: no bytes lead outside the files, and every id that comes out is the dictionary's."""
    layout.write(tmp_path / "train.ar", LINES)
    for at, content in patches:
        path = tmp_path / f"train.ar.{suffix}"
        old = path.read_bytes()
        path.write_bytes(old[:at] + content + old[at + len(content) :])
    try:
        dataset = open_one(tmp_path, mode=mode, length=4)
    except InputError:
        return
    dataset.count_cut()
    for number in range(dataset.blocks):
        try:
            ids = dataset.block(number)
        except InputError:
            continue
        assert len(ids) <= 3
        assert ((ids >= 0) & (ids < 20)).all()


# ------------------------------------------------------------------------------------------- size


def id_at(token: int | NDArray[np.int64]) -> Any:
    """What write_borders writes at a place; neighbours and places 2^30 apart differ."""
    return token % 997 + 5


BORDERS = (2**30, 2**31, 2**32)  # 2^32 bytes of int32 and of uint16, 2^32 tokens
STARTS = (0, 2**30 - 5, 2**30 + 5, 2**31 - 7, 2**31 + 7, 2**32 - 3, 2**32 + 3)
TOKENS = 2**32 + 1000


def write_borders(path: Path, dtype: str, bias: int) -> None:
    """A sparse .bin of TOKENS tokens, zero except within 1,000 tokens of each border."""
    width = np.dtype(dtype).itemsize
    with path.open("wb") as stream:
        for border in BORDERS:
            places = np.arange(border - 1000, border + 1000)
            stream.seek(width * int(places[0]))
            stream.write((id_at(places) + bias).astype(f"<{dtype}").tobytes())
        assert stream.tell() == width * TOKENS


@pytest.mark.parametrize(
    ("write_index", "dtype", "bias"),
    [
        (write_mmap_index, "u2", 0),
        (partial(write_mmap_index, dtype="u4"), "u4", 0),
        (partial(write_megatron_index, dtype="i4"), "i4", 0),
        (write_lazy_index, "i4", 1),
    ],
    ids=["mmap16", "mmap32", "megatron", "lazy"],
)
def test_beyond_2_31_tokens_and_2_32_bytes(
    tmp_path: Path, write_index: Callable[[Path, list[int]], None], dtype: str, bias: int
) -> None:
    """Sparse files; real tokens around each border, read by block, by line, by whole lines, and in a batch."""
    lengths = [end - start for start, end in zip(STARTS, [*STARTS[1:], TOKENS], strict=True)]
    write_index(tmp_path / "train.ar.idx", lengths)
    write_borders(tmp_path / "train.ar.bin", dtype, bias)

    stream = open_one(tmp_path, vocab_size=1002)
    assert stream.tokens == TOKENS
    assert stream.blocks == -(-TOKENS // 255)
    around = [border // 255 + step for border in BORDERS for step in (-1, 0, 1)]
    for block in [*around, stream.blocks - 1]:
        places = np.arange(255 * block, min(255 * (block + 1), TOKENS))
        assert stream.block(block).tolist() == id_at(places).tolist()
    samples = Samples(np.zeros(9, np.int64), np.zeros(9, np.int64), np.array(around, np.int64))
    batch = build_batch(alone([stream]), samples, Masking(seed=0, mask_ratio=0.0, vocab_size=1002))
    rows = [[2, *id_at(np.arange(255 * block, 255 * (block + 1))).tolist()] for block in around]
    assert batch.input_ids.tolist() == rows

    # The seven lines begin before, at most 7 tokens from, and after the borders; each is a block of its own.
    for mode in ("eos", "complete"):
        lines = open_one(tmp_path, mode=mode, vocab_size=1002)
        assert (lines.blocks, lines.count_cut()) == (7, 4)
        for line in range(1, 7):
            places = STARTS[line] + np.arange(min(lengths[line], 255))
            assert lines.block(line).tolist() == id_at(places).tolist()


# Private_Dirty is what this process wrote to; pages of the files belong to the page cache.
TRILLION = """
import random, sys, time
from pathlib import Path
from xlm_ds.dataset import open_split

def private_kilobytes():
    lines = [line.split() for line in open("/proc/self/smaps_rollup")]
    return sum(int(line[1]) for line in lines if line[0] in ("Private_Dirty:", "Anonymous:"))

def look(folder):
    (dataset,) = open_split(
        Path(folder), "train", ["ar"], tokens_per_sample=256, break_mode="none", vocab_size=20, dictionary_sha256=""
    )
    random.seed(0)
    for _ in range(200):
        assert len(dataset.block(random.randrange(dataset.blocks))) == 255
    return dataset

look(sys.argv[2])  # what a first call imports and allocates
before = private_kilobytes()
started = time.perf_counter()
dataset = look(sys.argv[1])
seconds, kilobytes = time.perf_counter() - started, private_kilobytes() - before
print(seconds, kilobytes, dataset.tokens, dataset.block(dataset.blocks - 1)[-1])
"""


def test_a_trillion_tokens_take_neither_time_nor_memory(tmp_path: Path) -> None:
    """2 TB of zeros but for the last token: under a second for 200 random blocks, under 4 MB."""
    longest, tokens = 2**31 - 1, 10**12
    whole, rest = divmod(tokens, longest)
    big, small = tmp_path / "big", tmp_path / "small"
    big.mkdir()
    small.mkdir()
    write_mmap_index(big / "train.ar.idx", [longest] * whole + [rest])
    with (big / "train.ar.bin").open("wb") as stream:
        try:
            stream.seek(2 * tokens - 2)
            stream.write(b"\x13\0")
        except OSError as error:
            pytest.skip(f"the file system has no sparse files of 2 TB: {error}")
    write_mmap(small / "train.ar", [[7] * 255] * 2)
    command = [sys.executable, "-c", TRILLION, str(big), str(small)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, kilobytes, found, last = (float(field) for field in result.stdout.split())
    assert (found, last) == (tokens, 0x13)
    assert seconds < 1
    assert kilobytes < 4000


def test_the_first_batch_of_200_million_tokens_is_there_in_5_ms(tmp_path: Path) -> None:
    """The best of five, as other programs run beside the tests: opening must not grow with the data."""
    lines, tokens = 8_000_000, 200_000_000
    # Zeros between the header and the last line: neither mode looks at them.
    with (tmp_path / "train.ar.idx").open("wb") as stream:
        stream.write(b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, 8, lines))
        stream.seek(26 + 4 * (lines - 1))
        stream.write(struct.pack("<i", 25))
        stream.seek(26 + 12 * lines - 8)
        stream.write(struct.pack("<q", 2 * (tokens - 25)))
    with (tmp_path / "train.ar.bin").open("wb") as stream:
        stream.truncate(2 * tokens)

    def seconds(mode: str) -> float:
        started = time.perf_counter()
        dataset = open_one(tmp_path, mode=mode)
        samples = build_order([dataset.blocks], alpha=0.7, seed=0).samples(0, 32)
        build_batch(alone([dataset]), samples, Masking(seed=0, mask_ratio=0.15, vocab_size=20))
        return time.perf_counter() - started

    for mode in ("none", "eos"):
        assert min(seconds(mode) for _ in range(5)) < 0.005
