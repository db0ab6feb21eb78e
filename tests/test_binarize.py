"""The bytes are fairseq's, for any number of threads; what is wrong is named and leaves nothing behind."""

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import reference
from xlm_ds import _core, binarize
from xlm_ds.dictionary import SPECIAL_SYMBOLS, Dictionary
from xlm_ds.files import file_sha256, locked
from xlm_ds.log import InputError, sentence_of

BLANKS = "\t\x0b\x0c\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000"
NOT_BLANK = "\u180e\u200b\u200c\u200d\u2060\ufeff"


def pairs_in(folder: Path) -> list[Path]:
    return sorted(path.with_suffix("") for path in folder.glob("*.idx"))


GOLDEN_RUNS = ["small.mmap", "small.lazy", "odd.mmap", "65499.mmap", "65500.mmap"]


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("run", GOLDEN_RUNS)
def test_bytes_are_fairseqs(run: str, workers: int, golden: Path, tmp_path: Path) -> None:
    vocabulary, implementation = run.split(".")
    compared = 0
    for pair in pairs_in(golden / "bin" / run):
        split, language = pair.name.split(".")
        binarize.main(
            [
                f"--srcdict={golden / f'vocab.{vocabulary}'}",
                f"--{split}pref={golden / 'text' / split}",
                f"--source-lang={language}",
                f"--destdir={tmp_path}",
                f"--workers={workers}",
                f"--dataset-impl={implementation}",
            ]
        )
        for suffix in (".bin", ".idx"):
            expected = pair.with_name(pair.name + suffix).read_bytes()
            assert (tmp_path / (pair.name + suffix)).read_bytes() == expected, pair.name + suffix
            compared += 1
    assert compared >= 12


def test_log_lines_are_fairseqs(
    golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its preprocess.log, without the lines of the file it failed on, and with paths as given here."""
    expected = (golden / "bin" / "small.mmap" / "preprocess.log").read_text(encoding="utf-8")
    wanted = [line for line in expected.splitlines() if " sents, " in line]
    monkeypatch.chdir(golden)
    with caplog.at_level("INFO", logger="xlm_ds"):
        for line in wanted:
            split, language = line.split(": ")[0].split("/")[-1].split(".")
            binarize.main(["--srcdict=vocab.small", f"--{split}pref=text/{split}",
                           f"--source-lang={language}", f"--destdir={tmp_path}"])  # fmt: skip
    found = [message for message in caplog.messages if " sents, " in message]
    assert found == wanted
    assert len(wanted) > 10


def encode(
    text: bytes, symbols: list[str], folder: Path, threads: int, chunk_bytes: int
) -> tuple[list[list[int]], _core.TextCounts]:
    """The sequences that the core writes for `text`."""
    (folder / "text").write_bytes(text)
    mmap = _core.IndexKind.mmap
    counts = _core.encode_text(
        [_core.Piece(folder / "text")],
        _core.Dictionary(symbols),
        mmap,
        folder / "x.bin",
        folder / "x.lengths",
        threads,
        _core.Progress(),
        chunk_bytes,
    )
    _core.write_text_index(folder / "x.idx", mmap, len(symbols), folder / "x.lengths")
    ids = np.fromfile(folder / "x.bin", dtype=np.uint16).tolist()
    sequences = []
    begin = 0
    index = (folder / "x.idx").read_bytes()
    for length in np.frombuffer(index, dtype="<i4", count=counts.lines, offset=26).tolist():
        sequences.append(ids[begin : begin + length])
        begin += length
    assert begin == len(ids)
    return sequences, counts


SYMBOLS = [*SPECIAL_SYMBOLS, "a", "bb", "é", "한", "🙂", "a", "\u200b"]
alphabet = st.sampled_from(
    [*"abé한🙂\n\r", *BLANKS, *NOT_BLANK, "bb", "\r\n", "<unk>", "<s>", "</s>", "\0"]
)


@given(
    st.lists(alphabet, max_size=60).map("".join),
    st.sampled_from([1, 2, 7]),
    st.sampled_from([1, 2, 3, 8, 1 << 20]),
)
@example("a\r", 2, 1)
@example("a\r\na", 2, 2)
@example("", 1, 1)
def test_core_equals_its_slow_twin(
    tmp_path_factory: pytest.TempPathFactory, text: str, threads: int, chunk_bytes: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    found, counts = encode(text.encode(), SYMBOLS, folder, threads, chunk_bytes)
    expected = reference.encode_text(text, SYMBOLS)
    assert found == expected
    assert counts.lines == len(expected)
    assert counts.tokens == sum(map(len, expected))
    assert counts.blank_lines == sum(sequence == [2] for sequence in expected)
    flat = [i for sequence in expected for i in sequence]
    assert counts.by_id.tolist() == np.bincount(flat, minlength=len(SYMBOLS)).tolist()
    words = text.split()
    assert counts.unknown == sum(word not in SYMBOLS for word in words)
    assert counts.literal_specials == sum(word in SPECIAL_SYMBOLS for word in words)


def test_all_29_blanks_separate_and_no_others(tmp_path: Path) -> None:
    blanks = [chr(c) for c in range(0x110000) if chr(c).isspace()]
    assert len(blanks) == 29
    for blank in set(blanks) - {"\n", "\r"}:
        found, _ = encode(f"a{blank}a\n".encode(), SYMBOLS, tmp_path, 1, 1 << 20)
        assert found == [[10, 10, 2]], hex(ord(blank))
    for other in NOT_BLANK:
        found, _ = encode(f"a{other}a\n".encode(), SYMBOLS, tmp_path, 1, 1 << 20)
        assert found == [[3, 2]], hex(ord(other))


@given(st.binary(max_size=40), st.sampled_from([1, 3]), st.sampled_from([1, 4, 1 << 20]))
@example(b"\xed\xa0\x80", 1, 4)  # a surrogate
@example(b"\xc0\x80", 1, 4)  # an overlong form
@example(b"\xf4\x90\x80\x80", 1, 4)  # beyond U+10FFFF
@example(b"a\nb\xe9", 1, 1)
@example(b"a \xe2\x80y", 1, 4)  # begins like a blank
def test_bytes_that_are_not_utf8_are_named_as_python_finds_them(
    tmp_path_factory: pytest.TempPathFactory, text: bytes, threads: int, chunk_bytes: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        text.decode()
    except UnicodeDecodeError as error:
        before = text[: error.start].decode().replace("\r\n", "\n").replace("\r", "\n")
        with pytest.raises(_core.InputError) as caught:
            encode(text, SYMBOLS, folder, threads, chunk_bytes)
        where = f"line {before.count(chr(10)) + 1}, byte {error.start}: 0x{text[error.start]:02x}"
        assert where in str(caught.value)
    else:
        encode(text, SYMBOLS, folder, threads, chunk_bytes)


def test_a_large_text_is_the_same_for_any_threads(tmp_path: Path) -> None:
    """Enough chunks that threads really overtake each other."""
    generator = random.Random(0)
    lines = [
        " ".join(generator.choices(["a", "bb", "é", "x"], k=generator.randrange(20)))
        for _ in range(20000)
    ]
    text = "\n".join(lines).encode()
    expected, _ = encode(text, SYMBOLS, tmp_path, 1, 1 << 20)
    for threads, chunk_bytes in ((2, 1000), (7, 333), (3, 1 << 16)):
        found, _ = encode(text, SYMBOLS, tmp_path, threads, chunk_bytes)
        assert found == expected


RESIDENT_GROWTH = """
import sys
from pathlib import Path
from xlm_ds import _core
folder = Path(sys.argv[1])
dictionary = _core.Dictionary(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a"])
pieces = [_core.Piece(folder / "text")]
mmap = _core.IndexKind.mmap
def peak():  # not getrusage's: that is the parent's where it was larger
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before = peak()
_core.encode_text(pieces, dictionary, mmap, folder / "x.bin", folder / "x.lengths", 2, _core.Progress())
_core.write_text_index(folder / "x.idx", mmap, 6, folder / "x.lengths")
print(peak() - before)
"""


@pytest.mark.parametrize("line", [b"a b\n", b"a b "])
def test_memory_does_not_grow_with_the_text_or_a_line(line: bytes, tmp_path: Path) -> None:
    """Also for a file that is one line: chunks are cut between words, and nothing stays mapped."""
    repeats = 16_000_000
    (tmp_path / "text").write_bytes(line * repeats)
    command = [sys.executable, "-c", RESIDENT_GROWTH, str(tmp_path)]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert int(result.stdout) < 16_000_000
    lines = repeats if line.endswith(b"\n") else 1
    assert (tmp_path / "x.bin").stat().st_size == 2 * (2 * repeats + lines)


# --------------------------------------------------------------------------------- the stage


def run_stage(text: Path, destination: Path, *flags: str) -> None:
    binarize.main([f"--trainpref={text / 'train'}", f"--destdir={destination}", *flags])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "train.en").write_text("a b\n\nb <s> c\n", encoding="utf-8")
    (folder / "train.fr").write_text("b c c\n", encoding="utf-8")
    (folder / "vocab").write_text("b 3\nc 3\n", encoding="utf-8")
    return folder


def test_side_files_describe_the_pair(text: Path, tmp_path: Path) -> None:
    run_stage(text, tmp_path / "out", "--langs=en,fr", f"--srcdict={text / 'vocab'}")
    written = json.loads((tmp_path / "out" / "train.en.json").read_text(encoding="utf-8"))
    assert written["language"] == "en"
    assert (written["lines"], written["tokens"], written["unknown"]) == (3, 8, 1)
    assert (written["blank"], written["literal_specials"]) == (1, 1)
    dictionary = Dictionary.load(tmp_path / "out" / "dict.txt")
    assert written["dictionary_sha256"] == dictionary.sha256
    for kind in ("bin", "idx"):
        assert written["sha256"][kind] == file_sha256(tmp_path / "out" / f"train.en.{kind}")
    counts = np.load(tmp_path / "out" / "train.en.counts.npy")
    assert counts.dtype == np.uint64
    assert counts.tolist() == [1, 0, 3, 1, 0, 2, 1]
    shares = counts[counts > 0] / counts.sum()
    assert written["unigram_entropy_bits"] == pytest.approx(-(shares * np.log2(shares)).sum())


def test_codes_and_tokenisation_travel_with_the_data(text: Path, tmp_path: Path) -> None:
    (text / "codes").write_text("a b 1\n", encoding="utf-8")
    run_stage(text, tmp_path / "out", "--langs=en", f"--srcdict={text / 'vocab'}")
    assert (tmp_path / "out" / "codes").read_text(encoding="utf-8") == "a b 1\n"


def test_the_recipes_loop_and_all_at_once_give_the_same_files(text: Path, tmp_path: Path) -> None:
    srcdict = f"--srcdict={text / 'vocab'}"
    for language in ("en", "fr"):
        run_stage(text, tmp_path / "loop", f"--source-lang={language}", srcdict, "--only-source")
    run_stage(text, tmp_path / "once", "--langs=en,fr", srcdict)
    names = {p.name for p in (tmp_path / "loop").iterdir()}
    assert names == {p.name for p in (tmp_path / "once").iterdir()}
    for name in names - {"preprocess.log"}:
        assert (tmp_path / "loop" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--source-lang=en"], "or --langs with all languages"),
        ([], "give --langs"),
        (["--langs=en", "--source-lang=en"], "give --langs"),
        (["--langs=en,de"], "train.de: not found"),
        (["--langs=en", "--validpref=nowhere/valid"], "valid.en: not found"),
        (["--langs=en", "--testpref=a,b"], "a.en: not found"),
        (["--langs=en", "--testpref=a,"], "a prefix without a character"),
        (["--langs=en", "--trainpref=-"], "give --srcdict"),
        (["--langs=en,fr", "--validpref=-"], "text in one language"),
        (["--langs=en", "--validpref=-", "--testpref=-"], "can be read once"),
        (["--langs=en", "--validpref=-,a"], "can be read once"),
        (["--langs=en,en"], "en is named twice"),
        (["--langs=../x"], "is no name of a language"),
        (["--langs=en", "--nwordssrc=3", "--padding-factor=1"], "without a single word"),
        (["--langs=en", "--thresholdsrc=9"], "without a single word"),
        (["--langs=en", "--workers=5000"], "must be in [0, 4096]"),
        (["--langs=en", "--bpe-codes=."], "cannot read .: Is a directory"),
    ],
)
def test_bad_requests(text: Path, tmp_path: Path, flags: list[str], expected: str) -> None:
    with pytest.raises((InputError, OSError)) as caught:
        run_stage(text, tmp_path / "out", *flags)
    sentence = sentence_of(caught.value)
    assert expected in sentence
    assert "\n" not in sentence
    assert not (tmp_path / "out").exists()


def test_files_and_folders_in_each_others_place(text: Path, tmp_path: Path) -> None:
    (text / "valid.en").mkdir()
    with pytest.raises(InputError, match=r"valid\.en: not a file, although --validpref"):
        run_stage(text, tmp_path, "--langs=en", f"--validpref={text / 'valid'}")
    (tmp_path / "file").touch()
    for destdir in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match="a file is where this folder"):
            run_stage(text, destdir, "--langs=en", f"--srcdict={text / 'vocab'}")


def test_another_dictionary_in_the_folder_is_refused(text: Path, tmp_path: Path) -> None:
    run_stage(text, tmp_path / "out", "--langs=en", f"--srcdict={text / 'vocab'}")
    before = (tmp_path / "out" / "train.en.bin").read_bytes()
    (text / "other").write_text("c 3\nb 3\n", encoding="utf-8")
    with pytest.raises(InputError, match="another dictionary is there already"):
        run_stage(text, tmp_path / "out", "--langs=en", f"--srcdict={text / 'other'}")
    assert (tmp_path / "out" / "train.en.bin").read_bytes() == before


def test_a_byte_order_mark_is_said_and_kept_as_by_fairseq(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (text / "train.en").write_bytes(b"\xef\xbb\xbfb c\n")
    with caplog.at_level("INFO", logger="xlm_ds"):
        run_stage(text, tmp_path / "out", "--langs=en,fr", f"--srcdict={text / 'vocab'}")
    assert [m.split(": ")[0] for m in caplog.messages if "byte order mark" in m] == [
        f"{text / 'train.en'}"
    ]
    assert pair_bytes(tmp_path / "out", "train.en")[0] == np.array([3, 6, 2], "<u2").tobytes()


def test_compressed_text_is_called_so(text: Path, tmp_path: Path) -> None:
    (text / "train.fr").write_bytes(gzip.compress((text / "train.fr").read_bytes()))
    with pytest.raises(InputError, match=r"train\.fr: is compressed; unpack it first \(gunzip\)"):
        run_stage(text, tmp_path / "out", "--langs=en,fr", f"--srcdict={text / 'vocab'}")
    (text / "train.fr").write_bytes(b"BZh is a word\n")  # and bzip2's first three letters
    run_stage(text, tmp_path / "out", "--langs=en,fr", f"--srcdict={text / 'vocab'}")


def test_parallel_text_needs_the_dictionary_of_its_languages(text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"parallel text without --srcdict .*; give --srcdict, that"
    ):
        run_stage(text, tmp_path / "out", "--source-lang=en", "--target-lang=fr")


def test_codes_are_no_dictionary(text: Path, tmp_path: Path) -> None:
    (tmp_path / "codes").write_text("t h 9\nth e</w> 7\na n 3\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"codes: most of its rows have a blank within the symbol"):
        run_stage(text, tmp_path / "out", "--langs=en,fr", f"--srcdict={tmp_path / 'codes'}")
    assert not list((tmp_path / "out").glob("*.idx"))


def test_text_that_is_not_utf8_leaves_no_pair(text: Path, tmp_path: Path) -> None:
    (text / "train.fr").write_bytes(b"b c\nb \xe9t\xe9\n")
    with pytest.raises(InputError, match=r"train\.fr, line 2, byte 6: 0xe9 is not UTF-8"):
        run_stage(text, tmp_path / "out", "--langs=en,fr", f"--srcdict={text / 'vocab'}")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {name for name in names if "fr" in name or name.startswith(".")}
    assert "train.en.idx" in names


def test_ctrl_c_ends_the_run_and_leaves_no_pair(tmp_path: Path) -> None:
    (tmp_path / "train.en").write_bytes(b"a b c d e f g h\n" * 10_000_000)
    (tmp_path / "vocab").write_text("a 1\n", encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "xlm_ds.binarize", "--langs=en", f"--destdir={out}"]
    files = [f"--trainpref={tmp_path / 'train'}", f"--srcdict={tmp_path / 'vocab'}"]
    root = Path(__file__).parent.parent
    process = subprocess.Popen([*command, *files], cwd=root, stdout=subprocess.DEVNULL)
    while not (out / ".train.en.part0.bin.tmp").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert {path.name for path in out.iterdir()} == {"dict.txt", "preprocess.log"}


def test_a_killed_run_leaves_nothing_under_a_final_name(tmp_path: Path) -> None:
    """kill -9 in the middle of a file; the next run is as if nothing had been."""
    (tmp_path / "train.en").write_bytes(b"a b c d e f g h\n" * 3_000_000)
    (tmp_path / "vocab").write_text("a 1\n", encoding="utf-8")
    out = tmp_path / "out"
    arguments = [
        f"--trainpref={tmp_path / 'train'}",
        "--langs=en",
        f"--srcdict={tmp_path / 'vocab'}",
    ]
    command = [
        sys.executable,
        "-m",
        "xlm_ds.binarize",
        *arguments,
        f"--destdir={out}",
        "--workers=1",
    ]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
    while not (out / ".train.en.part0.bin.tmp").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not list(out.glob("train.en.*"))
    assert binarize.main([*arguments, f"--destdir={out}"]) == 0
    assert not list(out.glob(".*"))
    assert (out / "train.en.bin").stat().st_size == 2 * 9 * 3_000_000


# --------------------------------------------------------------------------------- what it reads


def pair_bytes(folder: Path, pair: str) -> tuple[bytes, bytes]:
    return (folder / f"{pair}.bin").read_bytes(), (folder / f"{pair}.idx").read_bytes()


def test_training_files_are_joined_and_others_numbered(text: Path, tmp_path: Path) -> None:
    """fairseq's names for the k-th file of valid and test; each file ends its last line."""
    (text / "a.en").write_bytes(b"b c\nc")
    (text / "b.en").write_bytes(b"")
    (text / "c.en").write_bytes(b"\nc\r")
    (text / "train.en").write_bytes(b"b c\nc\n\nc\r")
    several = ",".join(str(text / name) for name in "abc")
    flags = ["--langs=en", f"--srcdict={text / 'vocab'}", f"--destdir={tmp_path / 'several'}"]
    binarize.main([*flags, f"--trainpref={several}", f"--validpref={several}"])
    run_stage(text, tmp_path / "one", "--langs=en", f"--srcdict={text / 'vocab'}")
    assert pair_bytes(tmp_path / "several", "train.en") == pair_bytes(tmp_path / "one", "train.en")
    lines = [
        json.loads((tmp_path / "several" / f"{split}.en.json").read_text(encoding="utf-8"))["lines"]
        for split in ("valid", "valid1", "valid2", "train")
    ]
    assert lines == [2, 0, 2, 4]


def test_a_file_with_a_comma_in_its_name_is_not_guessed_at(text: Path, tmp_path: Path) -> None:
    for name in ("a.en", "b.en", "a,b.en"):
        (text / name).write_text("b\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"a,b\.en: there is a file of this name, but a comma"):
        run_stage(
            text, tmp_path, "--langs=en", f"--validpref={text}/a,{text}/b", f"--testpref={text}/a,b"
        )


def from_standard_input(
    content: bytes, text: Path, out: Path
) -> "subprocess.CompletedProcess[str]":
    """The stage at the end of a pipe that gives its bytes little by little."""
    (text / "content").write_bytes(content)
    stage = f"{sys.executable} -m xlm_ds.binarize --source-lang en --trainpref - --destdir {out}"
    command = f"dd bs=7 if={text / 'content'} 2>&- | {stage} --srcdict {text / 'vocab'}"
    root = Path(__file__).parent.parent
    return subprocess.run(command, shell=True, cwd=root, capture_output=True, text=True)


def test_standard_input_is_read_as_a_file_and_always_again(text: Path, tmp_path: Path) -> None:
    content = (text / "train.en").read_bytes() * 50 + "c 한 b".encode()
    for repeats in (1, 2):
        result = from_standard_input(content * repeats, text, tmp_path / "out")
        assert result.returncode == 0, result.stderr
        assert f"[en] standard input: {repeats * 151 - (repeats - 1)} sents" in result.stdout
        (text / "train.en").write_bytes(content * repeats)
        run_stage(text, tmp_path / f"file{repeats}", "--langs=en", f"--srcdict={text / 'vocab'}")
        found = pair_bytes(tmp_path / "out", "train.en")
        assert found == pair_bytes(tmp_path / f"file{repeats}", "train.en")


def test_a_bad_byte_of_standard_input_is_named(text: Path, tmp_path: Path) -> None:
    result = from_standard_input(b"b c\n" * 100 + b"\xe9t\n", text, tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "standard input, byte 400: 0xe9 is not UTF-8" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"dict.txt", "preprocess.log"}


def test_empty_standard_input_is_refused(text: Path, tmp_path: Path) -> None:
    result = from_standard_input(b"", text, tmp_path / "out")
    assert result.returncode == 2
    assert "standard input: was empty" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"dict.txt", "preprocess.log"}


def test_ctrl_c_ends_a_run_that_waits_for_standard_input(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xlm_ds.binarize", "--source-lang=en", "--trainpref=-"]
    flags = [f"--destdir={tmp_path / 'out'}", f"--srcdict={text / 'vocab'}"]
    process = subprocess.Popen(
        [*command, *flags], cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE
    )
    while not (tmp_path / "out" / ".train.en.part0.bin.tmp").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert process.stdin is not None
    process.stdin.close()


def test_a_text_that_becomes_shorter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a b\n")
    with pytest.raises(InputError, match="ends at byte 4, but had at least 5 when the run began"):
        _core.count_text_words([_core.Piece(tmp_path / "text", 0, 5)], 1, _core.Progress())


# --------------------------------------------------------------------------------- again


def test_what_is_there_is_redone_only_when_something_has_changed(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    flags = ["--langs=en,fr", f"--srcdict={text / 'vocab'}"]
    caplog.set_level("INFO", logger="xlm_ds")

    def redone(*more: str) -> set[str]:
        """The languages made in a run; of the others it is said that they are there."""
        before = {path: path.stat().st_ino for path in out.glob("*.idx")}
        caplog.clear()
        run_stage(text, out, *flags, *more)
        said = {m.partition(":")[0] for m in caplog.messages if m.endswith("flags; not redone")}
        made = {p.suffixes[0][1:] for p in out.glob("*.idx") if before.get(p) != p.stat().st_ino}
        assert said == {f"train.{language}" for language in {"en", "fr"} - made}
        return made

    assert redone() == {"en", "fr"}
    assert redone("--workers=1") == set()
    (text / "train.en").touch()
    assert redone() == {"en"}
    with (out / "train.fr.bin").open("ab") as file:
        file.write(b"x")
    assert redone() == {"fr"}
    (out / "train.fr.counts.npy").unlink()
    (out / "train.en.json").write_text("[]", encoding="utf-8")
    assert redone() == {"en", "fr"}
    (out / "train.en.json").write_text("[" * 100_000, encoding="utf-8")
    assert redone() == {"en"}
    assert redone("--dataset-impl=lazy") == {"en", "fr"}
    assert redone("--dataset-impl=cached") == set()


def test_a_killed_run_goes_on_with_the_next_pair(text: Path, tmp_path: Path) -> None:
    """en is whole, fr was under way: en keeps its files, and no temporary one is left."""
    out = tmp_path / "out"
    run_stage(text, out, "--langs=en", f"--srcdict={text / 'vocab'}")
    for name in (".train.fr.part0.bin.tmp", ".train.fr.part3.lengths.tmp", ".train.fr.idx.tmp"):
        (out / name).write_bytes(b"half")
    (out / ".train.fr.lock").touch()
    before = (out / "train.en.idx").stat().st_ino
    run_stage(text, out, "--langs=en,fr", f"--srcdict={text / 'vocab'}")
    assert (out / "train.en.idx").stat().st_ino == before
    assert (out / "train.fr.idx").exists()
    assert not list(out.glob(".*"))


def test_two_runs_do_not_make_one_pair_at_once(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with locked(out / ".train.en.lock"):
        run_stage(text, out, "--langs=fr", f"--srcdict={text / 'vocab'}")
        (out / ".train.en.bin.tmp").write_bytes(b"of the other run")
        with pytest.raises(InputError, match=r"train\.en: another binarize is making this pair"):
            run_stage(text, out, "--langs=en", f"--srcdict={text / 'vocab'}")
        assert (out / ".train.en.bin.tmp").exists()
    run_stage(text, out, "--langs=en", f"--srcdict={text / 'vocab'}")
    assert not list(out.glob(".*"))


def test_a_lock_is_waited_for_and_left_to_one(tmp_path: Path) -> None:
    """More threads than one can ever hold it; whoever waits must not keep a file that was removed."""
    inside = 0

    def add(_: int) -> None:
        nonlocal inside
        with locked(tmp_path / "lock"):
            before = inside
            time.sleep(0.001)
            inside = before + 1

    with ThreadPoolExecutor(max_workers=8) as threads:
        list(threads.map(add, range(50)))
    assert inside == 50
    assert not (tmp_path / "lock").exists()
