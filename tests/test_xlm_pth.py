"""XLM's .pth: the bytes that binarizing its text gives, and nothing in such a file is ever run."""

import collections
import copyreg
import json
import lzma
import os
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlm_ds import _core, binarize, shards, torch_file
from xlm_ds.log import InputError
from xlm_ds.xlm_pth import XLM_SPECIALS, load_xlm_text

DATA = Path(__file__).parent / "data" / "xlm"
LEGACY_HEADER = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]


class XlmDictionary:
    """What XLM pickles: attributes, under a class of its own package."""

    def __init__(self, words: tuple[str, ...]) -> None:
        symbols = [*XLM_SPECIALS, *words]
        self.id2word = dict(enumerate(symbols))
        self.word2id = {symbol: i for i, symbol in enumerate(symbols)}
        self.counts = {symbol: 10 - i if i > 13 else 0 for i, symbol in enumerate(symbols)}
        self.bos_index, self.eos_index, self.pad_index, self.unk_index = 0, 1, 2, 3


@pytest.fixture(autouse=True)
def _importable() -> Iterator[None]:
    """The modules that XLM's class is pickled under, for the tests that write such files."""
    names = ["xlm", "xlm.data", "xlm.data.dictionary", "src", "src.data", "src.data.dictionary"]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].Dictionary = XlmDictionary  # type: ignore[attr-defined]
    XlmDictionary.__name__ = XlmDictionary.__qualname__ = "Dictionary"
    yield
    for name in names:
        del sys.modules[name]


def content(module: str = "xlm.data.dictionary", **changes: Any) -> dict[str, Any]:
    """`the cat xyz`, an empty line, `cat`."""
    XlmDictionary.__module__ = module
    return {
        "dico": XlmDictionary(("the", "cat")),
        "positions": np.array([[0, 3], [4, 4], [5, 6]]),
        "sentences": np.array([14, 15, 3, 1, 1, 15, 1], np.uint16),
        "unk_words": {"xyz": 1},
    } | changes


def write_zip(path: Path, raw: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("text/data.pkl", raw)
        archive.writestr("text/version", "3\n")
    return path


def write_pth(path: Path, value: object, *, legacy: bool = False, protocol: int = 4) -> Path:
    """As torch.save does in its two formats."""
    raw = pickle.dumps(value, protocol=protocol)
    if not legacy:
        return write_zip(path, raw)
    header = b"".join(pickle.dumps(v, protocol=protocol) for v in LEGACY_HEADER)
    path.write_bytes(header + raw + pickle.dumps([], protocol=protocol))
    return path


def convert(source: Path, out: Path, *flags: object) -> _core.Pair:
    assert shards.main(["convert", str(source), str(out), *map(str, flags)]) == 0
    return _core.Pair(out)


# ------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("implementation", ["mmap", "lazy"])
@pytest.mark.parametrize("language", ["en", "hi"])
def test_converting_is_binarizing_the_same_text(
    golden: Path, tmp_path: Path, language: str, implementation: str
) -> None:
    pth = tmp_path / f"valid.{language}.pth"
    pth.write_bytes(lzma.decompress((DATA / f"{pth.name}.xz").read_bytes()))
    convert(pth, tmp_path / "out" / f"valid.{language}", "--to", implementation)
    binarize.main([f"--srcdict={golden / 'vocab.small'}", f"--validpref={golden / 'text' / 'valid'}",
                   f"--langs={language}", f"--dataset-impl={implementation}",
                   f"--destdir={tmp_path / 'wanted'}"])  # fmt: skip
    for name in ("bin", "idx", "counts.npy"):
        found, wanted = (
            (tmp_path / d / f"valid.{language}.{name}").read_bytes() for d in ("out", "wanted")
        )
        assert found == wanted, name
    found_record, wanted_record = (
        json.loads((tmp_path / d / f"valid.{language}.json").read_text(encoding="utf-8"))
        for d in ("out", "wanted")
    )
    for record in (found_record, wanted_record):
        record.pop("made_from")
    assert found_record == wanted_record
    vocabulary = (golden / "vocab.small").read_bytes()
    assert (tmp_path / "out" / "dict.txt").read_bytes() == vocabulary
    assert shards.main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("module", ["xlm.data.dictionary", "src.data.dictionary"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_both_formats_of_torch_and_both_names_of_the_class(
    tmp_path: Path, module: str, legacy: bool, protocol: int
) -> None:
    value = content(module)
    if protocol == 5:  # numpy's bytes take a call of _frombuffer there
        value["positions"] = value["sentences"] = None
        with pytest.raises(InputError, match=r"(positions|sentences) is not an array"):
            load_xlm_text(write_pth(tmp_path / "x.pth", value, legacy=legacy, protocol=protocol))
        return
    text = load_xlm_text(write_pth(tmp_path / "x.pth", value, legacy=legacy, protocol=protocol))
    assert text.words == ("the", "cat")
    assert text.counts == (-4, -5)
    assert text.sentences.tolist() == [14, 15, 3, 1, 1, 15, 1]
    assert text.positions.tolist() == [[0, 3], [4, 4], [5, 6]]
    assert text.unknown_words == {"xyz": 1}


@pytest.mark.parametrize("legacy", [False, True])
def test_torchs_own_files(tmp_path: Path, legacy: bool) -> None:
    import torch

    path = tmp_path / "train.en.pth"
    zipped = not legacy
    torch.save(content(), path, pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    pair = convert(path, tmp_path / "out" / "train.en")
    assert [pair.line(i).tolist() for i in range(3)] == [[5, 6, 3, 2], [2], [6, 2]]


def test_numbers_of_numpy_and_other_array_types(tmp_path: Path) -> None:
    dico = content()["dico"]
    dico.counts = {word: np.int64(count) for word, count in dico.counts.items()}
    arrays: dict[str, Any] = {
        "sentences": np.array([14, 15, 3, 1, 1, 15, 1], ">i4"),
        "positions": np.asfortranarray([[0, 3], [4, 4], [5, 6]]),
    }
    text = load_xlm_text(write_pth(tmp_path / "x.pth", content(dico=dico, **arrays)))
    assert text.counts == (-4, -5)
    assert text.sentences.tolist() == [14, 15, 3, 1, 1, 15, 1]
    assert text.positions.tolist() == [[0, 3], [4, 4], [5, 6]]


def test_another_dictionary_finds_words_by_their_spelling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "dict.txt").write_text("dog 3\ncat 1\n", encoding="utf-8")
    path = write_pth(tmp_path / "train.en.pth", content())
    with caplog.at_level("INFO", logger="xlm_ds"):
        pair = convert(path, tmp_path / "out" / "train.en", "--dict", tmp_path / "dict.txt")
    assert [pair.line(i).tolist() for i in range(3)] == [[3, 6, 3, 2], [2], [6, 2]]
    assert "1 of 7 tokens are words that" in caplog.text
    assert (tmp_path / "out" / "dict.txt").read_text(encoding="utf-8") == "dog 3\ncat 1\n"


def test_many_lines_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "LINES_PER_STEP", 2)
    path = write_pth(tmp_path / "train.en.pth", content())
    pair = convert(path, tmp_path / "out" / "train.en")
    assert [pair.line(i).tolist() for i in range(3)] == [[5, 6, 3, 2], [2], [6, 2]]
    empty = content(positions=np.zeros(0, np.int64), sentences=np.zeros(0, np.uint16))
    pair = convert(write_pth(tmp_path / "e.pth", empty), tmp_path / "out" / "test.en")
    assert (pair.lines, pair.tokens) == (0, 0)


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"positions": np.array([[0, 3], [5, 6]])}, "sentence 1 is not where"),
        ({"positions": np.array([[0, 3], [4, 4], [5, 7]])}, "sentence 2 is not where"),
        ({"positions": np.array([[0, 3], [4, 4], [5, 5]])}, "sentence 2 .* has no eos"),
        ({"positions": np.array([[0, 3], [4, 4]])}, "go on after the last"),
        ({"positions": np.array([[0, 3], [4, -1 << 62]])}, "sentence 1 is not where"),
        ({"positions": np.zeros((3, 3), np.int64)}, "of shape"),
        ({"positions": np.zeros((3, 2))}, "positions of float64"),
        (
            {"sentences": np.array([14, 16, 3, 1, 1, 15, 1])},
            "token 1 is 16, but its Dictionary ends",
        ),
        ({"sentences": np.array([14, -1, 3, 1, 1, 15, 1])}, "token 1 is -1"),
        ({"sentences": [14, 1]}, "sentences is not an array"),
        ({"dico": {"the": 1}}, "dico is not XLM's Dictionary"),
        ({"unk_words": [1]}, "unk_words is not counts"),
        ({"unk_words": {"<unk>": 2}}, "says that -1 words are unknown, but its lines have 1 <unk>"),
    ],
)
def test_damaged_content(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = write_pth(tmp_path / "train.en.pth", content(**changes))
    with pytest.raises(InputError, match=expected):
        convert(path, tmp_path / "out" / "train.en")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d.id2word.pop(3), "does not give every id a word"),
        (lambda d: d.id2word.update({14: "<mask>"}), "does not give every id a word"),
        (lambda d: d.id2word.update({2: "</s>"}), "not with XLM's special words"),
        (lambda d: d.id2word.update({14: "a b"}) or d.counts.update({"a b": 1}), "is not one word"),
        (lambda d: delattr(d, "counts"), "has no id2word or no counts"),
    ],
)
def test_damaged_dictionaries(
    tmp_path: Path, change: Callable[[XlmDictionary], object], expected: str
) -> None:
    value = content()
    change(value["dico"])
    with pytest.raises(InputError, match=expected):
        load_xlm_text(write_pth(tmp_path / "x.pth", value))


def test_files_that_are_not_torchs(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    raw = pickle.dumps(content(), protocol=4)
    for written, expected in [
        (b"", "is empty"),
        (b"the cat\n", "it has a missing mark before byte 1"),
        (b"\x7fELF", "it has opcode 0x7f at byte 0"),
        (raw, "is not a file of torch"),
        (b"PK\3\4" + raw, "damaged zip archive"),
        (pickle.dumps(LEGACY_HEADER[0], protocol=4) * 2, "is not a file of torch"),
    ]:
        path.write_bytes(written)
        with pytest.raises(InputError, match=expected):
            load_xlm_text(path)
    with pytest.raises(InputError, match="compressed or encrypted"):
        load_xlm_text(write_zip(path, raw, compression=zipfile.ZIP_DEFLATED))
    whole = write_zip(path, raw).read_bytes()
    path.write_bytes(whole.replace(b"\x0e\0\x0f\0\3\0", b"\x0e\0\x0e\0\3\0"))
    with pytest.raises(InputError, match=r"checksum of its data\.pkl is wrong"):
        load_xlm_text(path)
    write_pth(path, content(), legacy=True)
    for size in range(0, path.stat().st_size - 10, 7):
        cut = tmp_path / "cut.pth"
        cut.write_bytes(path.read_bytes()[:size])
        with pytest.raises(InputError):
            load_xlm_text(cut)


def test_an_array_without_elements_has_no_huge_size(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "x.pth", content(positions=np.zeros((0, 2), int)), legacy=True)
    huge = b"\x8a\x08" + (1 << 62).to_bytes(8, "little")  # LONG1
    raw = path.read_bytes()
    assert raw.count(b"K\0K\2\x86") == 1
    path.write_bytes(raw.replace(b"K\0K\2\x86", b"K\0" + huge + b"\x86"))
    with pytest.raises(InputError, match="or whose shape and bytes do not agree"):
        load_xlm_text(path)


class Call:
    """Pickled as a call; unpickling it anywhere runs `function(*arguments)`."""

    def __init__(self, function: Callable[..., object], *arguments: object, state: object = None):
        self.reduced = (function, arguments, *([state] if state is not None else []))

    def __reduce__(self) -> Any:
        return self.reduced


class Key:
    """An instance of a class of the attacker's, with a state."""

    def __init__(self) -> None:
        self.x = 1


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


# Pairs of the same tuple twice, 60 deep.
NESTED = [b"h%c\x86\x94" % i for i in range(60)]


def text_op(text: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()


def malicious(canary: str) -> dict[str, object]:
    """Pickles that would make the file `canary`, or eat the machine, if they were read by Python's own reader."""
    touch = f"__import__('os').close(__import__('os').open({canary!r}, 64))"  # O_CREAT
    dtype = np.dtype([("a", "i4"), ("b", "O")])
    dictionary = content()["dico"]
    dictionary.word2id = Call(os.system, f"touch {canary}")
    stack_global = text_op("builtins") + text_op("eval") + pickle.STACK_GLOBAL
    call = text_op(touch) + pickle.TUPLE1 + pickle.REDUCE
    array_stub = b"cnumpy.core.multiarray\n_reconstruct\n"
    return {
        "a call": Call(os.system, f"touch {canary}"),
        "builtins.eval": Call(eval, touch),
        "builtins.getattr": Call(getattr, "", "join"),
        "in the content": content(unk_words=Call(eval, touch)),
        "in the dictionary": content(dico=dictionary),
        "in an array of objects": content(sentences=np.array([Call(eval, touch)], object)),
        "in a structured array": content(sentences=np.zeros(2, dtype)),
        "as a key": {Call(eval, touch): 1},
        "as a state": Call(collections.OrderedDict, state={"x": Call(eval, touch)}),
        "a class of its own": Key(),
        "a subclass of an array": content(sentences=np.zeros(3).view(np.recarray)),
        "numpy's runstring": Call(exec, touch),
        "copyreg": Call(copyreg._reconstructor, Key, object, None),  # type: ignore[attr-defined]
        "STACK_GLOBAL": opcodes(stack_global, call),
        "GLOBAL": opcodes(b"cbuiltins\neval\n", call),
        "GLOBAL with a dotted name": opcodes(
            text_op("numpy"), text_op("core.os.system"), b"\x93", call
        ),
        "GLOBAL from the memo": opcodes(stack_global, pickle.MEMOIZE, b"0", b"h\0", call),
        "INST": b"(S'" + touch.encode() + b"'\nibuiltins\neval\n.",
        "OBJ": b"(cbuiltins\neval\nS'" + touch.encode() + b"'\no.",
        "NEWOBJ_EX": opcodes(b"cbuiltins\neval\n", b")}", pickle.NEWOBJ_EX),
        "NEWOBJ of an array": opcodes(b"cnumpy\nndarray\n", b"K\5\x85", pickle.NEWOBJ),
        "EXT1": opcodes(pickle.EXT1, b"\1"),
        "PERSID": b"Pbuiltins.eval\n.",
        "BINPERSID": opcodes(text_op("x"), pickle.BINPERSID),
        "a call of a class that is known": opcodes(
            b"cxlm.data.dictionary\nDictionary\n", b")", b"R"
        ),
        "an array of another class": opcodes(array_stub, b"cos\nsystem\nK\0\x85C\1b\x87R"),
        "BUILD with a tuple": opcodes(b"cxlm.data.dictionary\nDictionary\n", b")\x81", b"N}\x86b"),
        "BUILD with setstate": opcodes(
            b"cxlm.data.dictionary\nDictionary\n)\x81}" + text_op("__setstate__"),
            stack_global,
            b"sb",
        ),
        "BUILD of a class": opcodes(b"cxlm.data.dictionary\nDictionary\n}b"),
        "a memo of 32 GB": opcodes(b"N", pickle.LONG_BINPUT, b"\xff\xff\xff\xff", b"0"),
        "bytes of an exabyte": opcodes(pickle.BINBYTES8, struct.pack("<Q", 1 << 60)),
        "a word of an exabyte": opcodes(pickle.BINUNICODE8, struct.pack("<Q", 1 << 60)),
        "BYTEARRAY8": opcodes(pickle.BYTEARRAY8, struct.pack("<Q", 1 << 60)),
        "a number of 2 GB": opcodes(pickle.LONG4, struct.pack("<i", -1)),
        # A tuple of the same tuple twice, 60 deep: its hash takes 2^60 steps.
        "a hash that never ends": opcodes(b"})\x94", *NESTED, b"K\1s"),
        "an array of no bytes": opcodes(
            array_stub,
            b"cnumpy\nndarray\nK\0\x85C\1b\x87R(K\1\x8a\5\0\0\0\0\1\x85",
            b"cnumpy\ndtype\n" + text_op("u1") + b"\x89\x88\x87R\x89C\0tb",
        ),
        "a dtype that is text to evaluate": opcodes(
            b"cnumpy\ndtype\n" + text_op("i4,O") + b"\x89\x88\x87R"
        ),
        "pops below the mark": opcodes(b"N(0" * 3),
        "marks without an end": opcodes(b"(" * 1000),
        "a list in itself": opcodes(b"]\x94h\0ah\0a"),
        "DUP": opcodes(b"]" + b"2" * 40),
    }


MALICIOUS = list(malicious(""))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", MALICIOUS)
def test_nothing_in_a_file_is_run(tmp_path: Path, kind: str, legacy: bool) -> None:
    canary = tmp_path / "canary"
    value = malicious(str(canary))[kind]
    raw = value if isinstance(value, bytes) else pickle.dumps(value, protocol=4)
    path = tmp_path / "train.en.pth"
    if legacy:
        header = b"".join(pickle.dumps(v, protocol=4) for v in LEGACY_HEADER)
        path.write_bytes(header + raw)
    else:
        write_zip(path, raw)
    with pytest.raises(InputError) as caught:
        convert(path, tmp_path / "out" / "train.en")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert [p.name for p in tmp_path.iterdir()] == ["train.en.pth"]


def test_the_canary_sings(tmp_path: Path) -> None:
    """Guards the test above: Python's own reader does run what is in such files."""
    canary = tmp_path / "canary"
    sung = 0
    for kind in ("a call", "builtins.eval", "in the dictionary", "STACK_GLOBAL", "INST", "OBJ"):
        value = malicious(str(canary))[kind]
        raw = value if isinstance(value, bytes) else pickle.dumps(value, protocol=4)
        pickle.loads(raw)
        sung += canary.exists()
        canary.unlink()
    assert sung == 6


def test_the_message_names_the_class(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "x.pth", Call(os.system, "true"))
    with pytest.raises(InputError, match=r"x\.pth: not read: it has 'posix\.system' before byte"):
        load_xlm_text(path)


def test_keys_are_words_and_numbers(tmp_path: Path) -> None:
    """Of nested tuples the hash alone could take for ever; Python's own reader does not come back."""
    path = write_zip(tmp_path / "x.pth", opcodes(b"})\x94", *NESTED, b"K\1s"))
    with pytest.raises(InputError, match="something else than a dictionary of words and numbers"):
        load_xlm_text(path)
    short = pickle.loads(opcodes(b"})\x94", *NESTED[:3], b"K\1s"))
    assert next(iter(short)) == ((((), ()), ((), ())), (((), ()), ((), ())))


def test_opcodes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "x.pth", opcodes(b"}" * 2000))
    monkeypatch.setattr(torch_file, "MAX_OPCODES", 1000)
    with pytest.raises(InputError, match="more than 1,000 opcodes"):
        load_xlm_text(path)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    path = write_pth(tmp_path_factory.getbasetemp() / "fuzz.pth", content(), legacy=True)
    raw = bytearray(path.read_bytes())
    for at, value in changes:
        raw[at % len(raw)] = value
    path.write_bytes(raw)
    refusal = ""
    try:
        text = load_xlm_text(path)
        for _ in shards.xlm_lines(path, text):
            pass
    except InputError as error:
        refusal = str(error)
    assert not refusal or refusal.startswith(str(path))
