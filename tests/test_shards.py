"""Looking after pairs: joined and divided without a byte lost, every damaged byte named, nothing left of a failure."""

import errno
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pairs import write_lazy, write_megatron, write_mmap, write_mmap_index
from xlm_ds import _core, binarize, shards
from xlm_ds.dataset import open_split
from xlm_ds.dictionary import Dictionary
from xlm_ds.files import locked
from xlm_ds.log import EXIT_BAD_INPUT, EXIT_CLOSED_PIPE, EXIT_OK, InputError
from xlm_ds.pair_record import PAIR_FIELDS

ROOT = Path(__file__).parent.parent
LINES = [[5, 6, 2], [2], [7, 3, 5, 2]]
WRITERS: dict[str, Callable[..., None]] = {
    "mmap": write_mmap,
    "lazy": write_lazy,
    "megatron": write_megatron,
}
WORDS = ("the", "cat", "sat", "dog", "ran")


def run(*arguments: object) -> int:
    return shards.main([str(argument) for argument in arguments])


def write_dict(folder: Path, words: tuple[str, ...] = WORDS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dict.txt").write_text("".join(f"{w} 1\n" for w in words), encoding="utf-8")


def make_pair(
    prefix: Path, lines: list[list[int]] = LINES, layout: str = "mmap", dtype: str = "u2"
) -> Path:
    """A pair without a record, as another program writes it, and its dictionary of 10 symbols."""
    write_dict(prefix.parent)
    WRITERS[layout](prefix, lines, *([dtype] if layout != "lazy" else []))
    return prefix


def make_recorded(folder: Path, name: str = "train.en") -> Path:
    """A pair with all that binarize writes beside it."""
    write_dict(folder)
    text = folder / "text" / name
    text.parent.mkdir(exist_ok=True)
    text.write_text("the cat\n\nsat xyz the\n", encoding="utf-8")
    split, language = name.split(".")
    flags = [f"--{split}pref={text.with_suffix('')}", f"--source-lang={language}"]
    assert binarize.main([*flags, f"--srcdict={folder / 'dict.txt'}", f"--destdir={folder}"]) == 0
    return folder / name


def contents(prefix: Path) -> tuple[bytes, bytes]:
    data, index = (prefix.with_name(f"{prefix.name}.{kind}") for kind in ("bin", "idx"))
    return data.read_bytes(), index.read_bytes()


def tree(folder: Path) -> dict[str, bytes]:
    """But for locks: those of a killed program stay, and are nobody's."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.name: path.read_bytes() for path in files}


def record_of(prefix: Path) -> dict[str, Any]:
    path = prefix.with_name(f"{prefix.name}.json")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def facts(prefix: Path) -> dict[str, Any]:
    return {name: value for name, value in record_of(prefix).items() if name in PAIR_FIELDS}


# ------------------------------------------------------------------------------- merge and reshard


@pytest.mark.parametrize("implementation", ["mmap", "lazy"])
def test_merging_is_binarizing_the_joined_text(
    golden: Path, tmp_path: Path, implementation: str
) -> None:
    """Blank lines, unknown and special-looking words, and an empty text among them; the record and the counts too."""
    names = ("xx", "e3", "en", "e1")
    texts = [(golden / "text" / f"train.{name}").read_bytes() for name in names]
    assert all(text[-1:] in (b"", b"\n", b"\r") for text in texts[1:])
    texts[0] += b"\n"  # its last line has no end

    def binarized(folder: Path, text: bytes) -> Path:
        (tmp_path / "train.en").write_bytes(text)
        flags = [f"--trainpref={tmp_path / 'train'}", f"--dataset-impl={implementation}"]
        binarize.main([*flags, f"--srcdict={golden / 'vocab.small'}", "--source-lang=en",
                       f"--destdir={folder}"])  # fmt: skip
        return folder / "train.en"

    parts = [binarized(tmp_path / str(i), text) for i, text in enumerate(texts)]
    whole = binarized(tmp_path / "whole", b"".join(texts))
    assert run("merge", tmp_path / "out" / "train.en", *parts) == EXIT_OK
    merged = tmp_path / "out" / "train.en"
    assert contents(merged) == contents(whole)
    assert facts(merged) == facts(whole)
    assert record_of(merged)["literal_specials"] > 0
    for name in ("train.en.counts.npy", "dict.txt"):
        assert (merged.parent / name).read_bytes() == (whole.parent / name).read_bytes()
    assert run("verify", tmp_path / "out") == EXIT_OK


@given(
    st.lists(
        st.lists(st.integers(3, 9), max_size=6).map(lambda x: [*x, 2]), min_size=1, max_size=12
    ),
    st.sampled_from(list(WRITERS)),
    st.sampled_from(["--shards", "--max-tokens", "--max-bytes"]),
    st.integers(1, 12),
)
@settings(max_examples=40, deadline=None)
def test_merge_undoes_reshard(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[list[int]],
    layout: str,
    how: str,
    size: int,
) -> None:
    folder = tmp_path_factory.mktemp("reshard")
    pair = make_pair(folder / "train.en", lines, layout)
    if how == "--shards":
        size = min(size, len(lines))
    assert run("reshard", pair, how, size, "--destdir", folder / "out") == EXIT_OK
    count = len(list((folder / "out").glob("*.idx")))
    outs = [folder / "out" / f"train.en{k or ''}" for k in range(count)]
    read = [[core.line(i).tolist() for i in range(core.lines)] for core in map(_core.Pair, outs)]
    assert [line for shard in read for line in shard] == lines
    assert all(read)
    tokens = [sum(map(len, shard)) for shard in read]
    if how == "--shards":
        assert count == size
    else:
        limit = size if how == "--max-tokens" else size // (4 if layout == "lazy" else 2)
        assert all(n <= limit or len(s) == 1 for n, s in zip(tokens, read, strict=True))
        # None was ended early.
        pairs = zip(tokens, read[1:], strict=False)
        assert all(n + len(following[0]) > limit for n, following in pairs)
    assert run("verify", folder / "out") == EXIT_OK
    assert run("merge", folder / "again" / "train.en", *outs) == EXIT_OK
    assert contents(folder / "again" / "train.en") == contents(pair)


def test_shards_are_of_one_size(tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "train.en", [[5, 6, 2]] * 1000)
    run("reshard", pair, "--shards", 7, "--destdir", tmp_path / "out")
    sizes = [_core.Pair(tmp_path / "out" / f"train.en{k or ''}").lines for k in range(7)]
    assert max(sizes) - min(sizes) <= 1


def test_merging_back_keeps_facts_and_history(tmp_path: Path) -> None:
    """Fields of a record that this version does not know stay with what is made of the pair."""
    pair = make_recorded(tmp_path / "in")
    record = record_of(pair) | {"flavour": "plain"}
    (tmp_path / "in" / "train.en.json").write_text(json.dumps(record), encoding="utf-8")
    run("reshard", pair, "--shards", 3, "--destdir", tmp_path / "out")
    outs = [tmp_path / "out" / f"train.en{k or ''}" for k in range(3)]
    assert [record_of(out)["shard"] for out in outs] == [0, 1, 2]
    assert {record_of(out)["language"] for out in outs} == {"en"}
    run("merge", tmp_path / "again" / "train.en", *outs)
    again = tmp_path / "again" / "train.en"
    assert facts(again) == facts(pair)
    assert "shard" not in record_of(again)
    made_from = record_of(again)["made_from"]["pairs"][2]["made_from"]["pairs"][0]
    assert made_from["flavour"] == "plain"


def test_a_lost_shard_is_missed_and_a_further_one_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Readers take the shards they find: fairseq trains on the first of three without a word."""
    pair = make_recorded(tmp_path / "in")
    out = tmp_path / "out"
    run("reshard", pair, "--shards", 3, "--destdir", out)
    with pytest.raises(InputError, match=r"train\.en2\.idx: would be read as one more shard"):
        run("reshard", pair, "--shards", 2, "--destdir", out, "--overwrite")
    (out / "train.en1.idx").unlink()
    assert run("verify", out / "train.en") == EXIT_BAD_INPUT
    assert "train.en1.idx: is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["a/train.en", "a/train.en2"],
            r"a/train\.en: is shard 0 of 3, and shard 1 does not follow",
        ),
        (
            ["a/train.en1", "a/train.en"],
            r"a/train\.en1: is shard 1 of 3, and shard 0 is not before",
        ),
        (["a/train.en", "a/train.en1"], r"a/train\.en1: is shard 1 of 3, and shard 2 does not"),
        (["a/train.en", "b/train.en1"], r"a/train\.en: is shard 0 of 3, and shard 1 does not"),
        (
            ["in/train.en", "a/train.en1"],
            r"a/train\.en1: is shard 1 of 3, and shard 0 is not before",
        ),
        (["in/train.en", "in/train.de"], r"in/train\.de: is of language de, but .*train\.en of en"),
    ],
)
def test_shards_are_merged_all_and_in_order(
    tmp_path: Path, names: list[str], expected: str
) -> None:
    pair = make_recorded(tmp_path / "in")
    make_recorded(tmp_path / "in", "train.de")
    run("reshard", pair, "--shards", 3, "--destdir", tmp_path / "a")
    change_record(tmp_path / "in", flavour="of another text")
    run("reshard", pair, "--shards", 3, "--destdir", tmp_path / "b")
    with pytest.raises(InputError, match=expected):
        run("merge", tmp_path / "out" / "train.en", *(tmp_path / name for name in names))
    assert not (tmp_path / "out").exists()
    all_of_a = [tmp_path / "a" / f"train.en{k or ''}" for k in range(3)]
    assert run("merge", tmp_path / "out" / "train.en", pair, *all_of_a, *all_of_a) == EXIT_OK


def test_more_pairs_are_merged_than_files_may_be_open(tmp_path: Path) -> None:
    pair = make_recorded(tmp_path / "in")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, before[1]))
    try:
        assert run("merge", tmp_path / "out" / "train.en", *[pair] * 100) == EXIT_OK
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_shards_of_two_texts_are_not_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make_recorded(tmp_path / "in")
    run("reshard", pair, "--shards", 2, "--destdir", tmp_path / "a")
    change_record(tmp_path / "in", flavour="of another text")
    run("reshard", pair, "--shards", 2, "--destdir", tmp_path / "b")
    assert run("verify", tmp_path / "a") == EXIT_OK
    for path in (tmp_path / "b").glob("train.en1.*"):
        shutil.copy(path, tmp_path / "a")
    assert run("verify", tmp_path / "a") == EXIT_BAD_INPUT
    assert "train.en1.idx: is not a shard of the text" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["reshard", "convert"])
def test_a_shard_alone_is_not_made_into_something_else(tmp_path: Path, command: str) -> None:
    """It would be taken for the whole text of a language en1."""
    run("reshard", make_recorded(tmp_path / "in"), "--shards", 2, "--destdir", tmp_path / "a")
    out = tmp_path / "out" / "train.en1"
    flags = ["--shards", 1, "--destdir", out.parent] if command == "reshard" else [out]
    with pytest.raises(InputError, match=r"train\.en1: is shard 1 of 2 of a text; merge them"):
        run(command, tmp_path / "a" / "train.en1", *flags)


def test_training_does_not_take_one_shard_for_the_text(tmp_path: Path) -> None:
    pair = make_recorded(tmp_path / "in")
    dictionary_sha256 = record_of(pair)["dictionary_sha256"]

    def open_language(language: str) -> None:
        out, size = tmp_path / "out", len(WORDS) + 5
        open_split(
            out,
            "train",
            [language],
            tokens_per_sample=8,
            break_mode="none",
            vocab_size=size,
            dictionary_sha256=dictionary_sha256,
        )

    run("reshard", pair, "--shards", 1, "--destdir", tmp_path / "out")
    open_language("en")
    run("reshard", pair, "--shards", 2, "--destdir", tmp_path / "out", "--overwrite")
    for language in ("en", "en1"):
        with pytest.raises(InputError, match=r"one of 2 shards of train\.en, and the others"):
            open_language(language)


def test_a_pair_is_made_by_one_at_a_time(tmp_path: Path) -> None:
    """Be it another command or binarize; what the other has written so far stays."""
    pair = make_recorded(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    with locked(out / ".train.en.lock"):
        (out / ".train.en.new").mkdir()
        (out / ".train.en.new" / "train.en.bin").write_bytes(b"of the other")
        with pytest.raises(InputError, match=r"train\.en: another program is making this pair"):
            run("merge", out / "train.en", pair, pair)
        assert (out / ".train.en.new" / "train.en.bin").read_bytes() == b"of the other"
        assert run("merge", out / "valid.en", pair, pair) == EXIT_OK
    assert run("merge", out / "train.en", pair, pair) == EXIT_OK
    assert not list(out.glob(".*"))


def test_verify_names_the_file_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make_pair(tmp_path / "train.en")
    assert run("verify", pair, "--dict", tmp_path / "none") == EXIT_BAD_INPUT
    assert f"{tmp_path / 'none'}: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (
            lambda f: make_pair(f / "b" / "train.en", LINES, "lazy"),
            "is lazy of int32, but .* is mmap",
        ),
        (lambda f: make_pair(f / "b" / "train.en", LINES, "mmap", "u4"), "is mmap of uint32, but"),
        (
            lambda f: write_dict(make_pair(f / "b" / "train.en").parent, ("other",)),
            "has another dictionary than",
        ),
        (
            lambda f: make_pair(f / "b" / "train.en", [[5, 6], [2]]),
            "ends with id 6 instead of </s>",
        ),
        (lambda f: make_pair(f / "b" / "train.en", [[5, 99, 2]]), r"id 99 at byte 2 \(token 1\)"),
    ],
)
def test_what_cannot_be_merged(
    tmp_path: Path, prepare: Callable[[Path], object], expected: str
) -> None:
    first = make_pair(tmp_path / "a" / "train.en")
    prepare(tmp_path)
    with pytest.raises(InputError, match=expected):
        run("merge", tmp_path / "out" / "train.en", first, tmp_path / "b" / "train.en")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "{out}/train.en", "{pair}"],
        ["convert", "{pair}", "{out}/train.en", "--to", "mmap"],
        ["reshard", "{pair}", "--shards", "2", "--destdir", "{out}"],
    ],
)
def test_a_damaged_pair_gets_no_new_checksums(tmp_path: Path, arguments: list[str]) -> None:
    """All its ids are in the dictionary, so only the old ones can tell."""
    pair, out = make_recorded(tmp_path), tmp_path / "out"
    flip(tmp_path / "train.en.bin", 0)
    with pytest.raises(InputError, match=r"train\.en\.bin: its SHA-256 is not the one"):
        run(*(argument.format(pair=pair, out=out) for argument in arguments))
    assert not out.exists()


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    pair = make_pair(tmp_path / "train.en")
    (tmp_path / f"train.en.{kind}").unlink()
    os.mkfifo(tmp_path / f"train.en.{kind}")
    with pytest.raises(OSError, match=rf"cannot read .*train\.en\.{kind}"):
        run("inspect", pair)


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    first, second = make_recorded(tmp_path / "a"), make_recorded(tmp_path / "b")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").glob("train.*")}
    with pytest.raises(InputError, match=r"a/train\.en\.bin: is there already"):
        run("merge", first, first, second)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").glob("train.*")} == before
    assert run("merge", first, "--overwrite", first, second) == EXIT_OK
    assert record_of(first)["lines"] == 6
    assert run("verify", tmp_path / "a") == EXIT_OK
    write_dict(tmp_path / "c", ("other",))
    with pytest.raises(InputError, match=r"c/dict\.txt: another dictionary is there already"):
        run("merge", tmp_path / "c" / "train.en", first, second)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["reshard", "{pair}"], "--destdir is missing"),
        (["reshard", "{pair}", "--destdir", "{out}"], "give one of --shards, --max-tokens and"),
        (
            ["reshard", "{pair}", "--destdir", "{out}", "--shards", "4"],
            "has 3 lines, which are not",
        ),
        (["merge", "{out}/train.en"], "PAIRS is missing"),
        (["merge", "{out}/train", "{pair}"], "a pair's name is SPLIT.LANG"),
        (["convert", "{pair}", "{out}/train.bin"], "a pair's name is SPLIT.LANG"),
        (["convert", "{pair}", "{out}/dict.txt"], "a pair's name is SPLIT.LANG"),
        (["convert", "{pair}", "{out}/a b.en"], "a pair's name is SPLIT.LANG"),
        (["reshard", "{pair}", "--max-tokens", "9" * 30, "--destdir", "{out}"], "--max-tokens 9"),
        (["reshard", "{pair}", "--shards", "1", "--destdir", "{pair}.idx"], "idx: a file is where"),
        (["merge", "{out}/train.en", "{folder}"], "is a folder; name a pair in it"),
        (["inspect", "{pair}", "--lines", "3"], "has 3, numbered from 0"),
        (["inspect", "{pair}", "--lines", "a:b"], "give A:B"),
        (["inspect", "{pair}", "--lines", "2:2"], "give A:B"),
        (["inspect", "{pair}", "--lines", "9" * 5000], "give A:B"),
        (["inspect", "{out}"], "cannot open .*out.idx"),
        (["convert", "{pair}", "{out}/train.en", "--to", "raw"], "is not supported; there is mmap"),
        (["convert", "{pair}", "{out}/train.en", "--dict", "{out}/x"], "No such file"),
        (["dance"], "unknown command dance; there are inspect"),
    ],
)
def test_bad_requests(tmp_path: Path, arguments: list[str], expected: str) -> None:
    pair = make_pair(tmp_path / "train.en")
    values = [a.format(pair=pair, out=tmp_path / "out", folder=tmp_path) for a in arguments]
    with pytest.raises((InputError, OSError), match=expected):
        run(*values)
    assert not (tmp_path / "out").exists()


def killed_at_move(number: int, *arguments: object) -> bool:
    """Runs a command that ends without a word when it is about to move its file `number`; False if there are fewer."""
    child = os.fork()
    if child == 0:
        moves, real = itertools.count(), Path.replace

        def replace(path: Path, target: Path) -> Path:
            if next(moves) == number:
                os._exit(9)
            return real(path, target)

        Path.replace = replace  # type: ignore[assignment,method-assign]
        try:
            run(*arguments)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("shards_before", [0, 2])
def test_what_was_killed_at_any_move_is_undone_and_goes_on(
    tmp_path: Path, shards_before: int
) -> None:
    """And no reader takes a mixture of old and new shards for a text."""
    pair, old = make_recorded(tmp_path / "in"), tmp_path / "old" / "train.en"
    run("merge", old, pair, pair)
    out = tmp_path / "out"
    command = ["reshard", pair, "--shards", 3, "--destdir", out]
    run(*command)
    new = tree(out)
    for number in itertools.count():
        shutil.rmtree(out)
        if shards_before:
            run("reshard", old, "--shards", shards_before, "--destdir", out)
            before = tree(out)
        if not killed_at_move(number, *command, "--overwrite"):
            break
        if (out / "train.en.idx").exists():
            assert run("verify", out / "train.en") == EXIT_OK
        if shards_before:
            with pytest.raises(InputError, match="is there already"):
                run(*command)
            assert tree(out) == before
        run(*command, *(["--overwrite"] if shards_before else []))
        assert tree(out) == new
    to_move = ["names", *new.keys() - ({"dict.txt"} if shards_before else set())]
    assert number == len(to_move) + 4 * shards_before


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "{pair}", "{pair}", "{pair}"],
        ["convert", "{pair}", "{pair}", "--to=lazy"],
        ["reshard", "{pair}", "--shards=2", "--destdir={folder}"],
        ["verify", "{pair}"],
    ],
)
def test_a_pair_in_whose_place_a_command_was_killed_is_found_again(
    tmp_path: Path, command: list[str]
) -> None:
    """It is what the same command reads when it is given again."""
    pair = make_recorded(tmp_path / "in")
    before = contents(pair)
    arguments = [a.format(pair=pair, folder=tmp_path / "in") for a in command]
    first = arguments if command[0] != "verify" else ["merge", pair, pair, pair]
    for number in (2, 4, 8):  # of 9 or more moves: the old files go, the new ones come
        assert killed_at_move(number, *first, "--overwrite")
        assert not (tmp_path / "in" / "train.en.idx").exists()
        if command[0] == "verify":
            assert run(*arguments) == EXIT_OK
        else:
            with pytest.raises(InputError, match="is there already"):
                run(*arguments)
        assert contents(pair) == before


def test_what_cannot_be_put_back_is_kept_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, out = make_recorded(tmp_path / "in"), tmp_path / "out"
    run("merge", out / "train.en", pair, pair)
    before, real = tree(out), Path.replace

    def replace(path: Path, target: Path) -> Path:
        if target == out / "train.en.idx":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(
            OSError, match=r"could not be put back .* it is in \S+/\.train\.en\.new/old"
        ):
            run("merge", out / "train.en", pair, "--overwrite")
    with pytest.raises(InputError, match="is there already"):
        run("merge", out / "train.en", pair)
    assert tree(out) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_sigterm_end_it_and_leave_nothing(tmp_path: Path, number: int) -> None:
    make_pair(tmp_path / "train.en")
    count = 4_000_000
    (tmp_path / "train.en.bin").write_bytes(np.array([5] * 9 + [2], "<u2").tobytes() * count)
    header = b"MMIDIDX\0\0\1\0\0\0\0\0\0\0\x08" + count.to_bytes(8, "little")
    starts = np.arange(count, dtype="<i8") * 20
    index = header + np.full(count, 10, "<i4").tobytes() + starts.tobytes()
    (tmp_path / "train.en.idx").write_bytes(index)
    out = tmp_path / "out"
    command: list[str | Path] = [sys.executable, "-m", "xlm_ds.shards", "merge", out / "train.en"]
    process = subprocess.Popen([*command, *[tmp_path / "train.en"] * 20], cwd=ROOT)
    while not (out / ".train.en.new" / "train.en.bin").exists():
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=30) == 130
    assert not out.exists()


# ----------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize(("start", "to"), [("mmap", "lazy"), ("lazy", "mmap"), ("lazy", "cached")])
def test_converted_pairs_are_fairseqs(golden: Path, tmp_path: Path, start: str, to: str) -> None:
    compared = 0
    for index in sorted((golden / "bin" / f"small.{start}").glob("*.idx")):
        wanted = golden / "bin" / f"small.{'mmap' if to == 'mmap' else 'lazy'}" / index.stem
        out = tmp_path / index.stem
        if wanted.with_name(f"{wanted.name}.idx").exists():
            assert run("convert", index, out, "--to", to, "--dict", golden / "vocab.small") == 0
            assert contents(out) == contents(wanted)
            compared += 1
    assert compared >= 10
    assert run("verify", tmp_path) == EXIT_OK


@pytest.mark.parametrize("start", WRITERS)
@pytest.mark.parametrize("to", WRITERS)
def test_layouts_convert_into_each_other(tmp_path: Path, start: str, to: str) -> None:
    pair = make_pair(tmp_path / "in" / "train.en", LINES, start)
    wanted = make_pair(tmp_path / "wanted" / "train.en", LINES, to)
    run("convert", pair, tmp_path / "out" / "train.en", "--to", to)
    assert contents(tmp_path / "out" / "train.en") == contents(wanted)


@pytest.mark.parametrize(
    ("size", "to", "dtype"),
    [
        (65_499, "mmap", "uint16"),
        (65_500, "mmap", "uint32"),
        (65_499, "megatron", "uint16"),
        (65_500, "megatron", "int32"),  # Megatron-LM knows no uint32
        (65_500, "lazy", "int32"),
    ],
)
def test_the_dictionary_decides_the_type(tmp_path: Path, size: int, to: str, dtype: str) -> None:
    pair = make_pair(tmp_path / "train.en", [[size - 1, 2]], "mmap", "i8")
    write_dict(tmp_path, tuple(f"w{i}" for i in range(size - 5)))
    run("convert", pair, tmp_path / "out" / "train.en", "--to", to)
    found = _core.Pair(tmp_path / "out" / "train.en")
    assert found.dtype.name == dtype
    assert found.line(0).tolist() == [size - 1, 2]


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_items_of_another_shape_are_no_lines(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """TNTIDX can hold matrices; here item 0 is one, and item 1 has no dimension."""
    pair = make_pair(tmp_path / "train.en", LINES, "lazy")
    flip(tmp_path / "train.en.idx", 48 + 8, mask=3)
    expected = "the items before item 1 have 2 dimensions together, expected one each, at byte 56"
    if command == "verify":
        assert run("verify", pair) == EXIT_BAD_INPUT
        assert expected in capsys.readouterr().err
    else:
        with pytest.raises(InputError, match=expected):
            run("convert", pair, tmp_path / "out" / "train.en")


def test_documents_of_several_lines_are_not_lost_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_dict(tmp_path)
    write_megatron(tmp_path / "train.en", LINES, document_starts=[0, 2, 3])
    with pytest.raises(InputError, match="has documents of several lines"):
        run("merge", tmp_path / "out" / "train.en", tmp_path / "train.en")
    with caplog.at_level("INFO", logger="xlm_ds"):
        run("convert", tmp_path / "train.en", tmp_path / "out" / "train.en")
    assert "its 2 documents become" in caplog.text


# ----------------------------------------------------------------------------------------- inspect


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run("inspect", "--json", *arguments) == EXIT_OK
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_inspect_shows_the_text_that_was_binarized(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    binarize.main([f"--srcdict={golden / 'vocab.small'}", f"--validpref={golden / 'text' / 'valid'}",
                   "--langs=en,hi", f"--destdir={tmp_path}"])  # fmt: skip
    for row, language in zip(
        inspected(capsys, tmp_path, "--lines", "0:80"), ("en", "hi"), strict=True
    ):
        text = (golden / "text" / f"valid.{language}").read_text(encoding="utf-8")
        unknown = sum(line["text"].split().count("<unk>") for line in row["shown"])
        assert row["unknown"] == unknown
        for line, shown in zip(text.splitlines(), row["shown"], strict=True):
            words = zip([*line.split(), "</s>"], shown["text"].split(), strict=True)
            assert all(a == b or b == "<unk>" for a, b in words)
        lengths = sorted(len(line["ids"]) for line in row["shown"])
        assert (row["lines"], row["tokens"]) == (80, sum(lengths))
        twin = np.percentile(lengths, [0, 1, 5, 25, 50, 75, 95, 99, 100], method="inverted_cdf")
        assert list(row["lengths"].values()) == twin.tolist()


def test_inspect_shows_blocks_as_training_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make_pair(tmp_path / "train.en")
    (row,) = inspected(capsys, pair, "--blocks", "1:9", "--tokens-per-sample", 5)
    assert [shown["ids"] for shown in row["shown"]] == [[7, 3, 5, 2]]
    assert row["shown"][0]["text"] == "sat <unk> the </s>"
    assert row["unknown_share"] == 1 / 8  # counted, as there is no record
    assert run("inspect", pair, "--lines", "0") == EXIT_OK
    assert "line 0: the cat </s>" in capsys.readouterr().out


def test_inspect_shows_no_words_of_another_dictionary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make_recorded(tmp_path)
    write_dict(tmp_path, ("a", "b", "c", "d", "e"))
    assert inspected(capsys, pair)[0]["unknown"] == 1  # as recorded
    with pytest.raises(InputError, match="was made with the dictionary of SHA-256"):
        run("inspect", pair, "--lines", "0")


def test_inspect_shows_the_lines_that_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path / "train.en")
    make_pair(tmp_path / "valid.en", [])
    rows = inspected(capsys, tmp_path, "--lines", "2:9")
    assert [[shown["number"] for shown in row["shown"]] for row in rows] == [[2], []]


def test_inspect_needs_no_dictionary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = make_pair(tmp_path / "train.en", [], "lazy")
    (tmp_path / "dict.txt").unlink()
    (row,) = inspected(capsys, pair)
    assert (row["layout"], row["dtype"], row["lines"], row["lengths"]) == ("lazy", "int32", 0, {})
    assert row["unknown"] is None
    with pytest.raises(
        InputError, match=r"there is no dict\.txt and no dict\.en\.txt; give --dict"
    ):
        run("merge", tmp_path / "out.en", pair)


# ------------------------------------------------------------------------------------------ verify


def flip(path: Path, *places: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    for at in places:
        content[at] ^= mask
    path.write_bytes(content)


def change_record(folder: Path, **changes: object) -> None:
    path = folder / "train.en.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(record | changes), encoding="utf-8")


def lose_record_and_a_word(folder: Path) -> None:
    (folder / "train.en.json").unlink()
    flip(folder / "train.en.bin", 0, mask=3)


def add_count(folder: Path) -> None:
    counts = np.load(folder / "train.en.counts.npy")
    counts[5] += 1
    np.save(folder / "train.en.counts.npy", counts)


def _saved(array: NDArray[Any]) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def _with_shape(shape: bytes) -> bytes:
    return _saved(np.ones(10, np.uint64)).replace(b"(10,), }".ljust(22), shape.ljust(22))


# The pair's ids are 5 6 2 | 2 | 7 3 5 2 as uint16; its .idx has 3 lengths from byte 26 and 3 starts from byte 38.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "an id beyond the dictionary": (
        lambda f: flip(f / "train.en.bin", 9, mask=0x40),
        r"train\.en\.bin: its SHA-256 .*: \S+/train\.en\.bin: id 16391 at byte 8 \(token 4\), but the dictionary ends",
    ),
    "a line without eos": (
        lambda f: flip(f / "train.en.bin", 6),
        r"train\.en\.bin: line 1 ends with id 3 instead of </s> \(2\), at byte 6",
    ),
    "another word": (
        lambda f: flip(f / "train.en.bin", 0, mask=3),
        r"train\.en\.bin: its SHA-256 is not the one in train\.en\.json, .* only the checksum shows it, and not where",
    ),
    "another word, without a record": (
        lose_record_and_a_word,
        r"counts\.npy: says that id 5 occurs 2 times, but in the \.bin it occurs 1 times; one of the two was changed",
    ),
    "words swapped": (
        lambda f: flip(f / "train.en.bin", 0, 2, mask=3),
        r"train\.en\.bin: its SHA-256 is not the one in train\.en\.json",
    ),
    "an .idx of another text": (
        lambda f: write_mmap_index(f / "train.en.idx", [2, 2, 4]),
        r"train\.en\.idx: its SHA-256 .*: \S+/train\.en\.bin: line 0 ends with id 6 instead of </s> \(2\), at byte 2",
    ),
    "a start": (
        lambda f: flip(f / "train.en.idx", 46, mask=2),
        r"train\.en\.idx: sequence 1 starts at token 2, expected 3 .*, at byte 46;",
    ),
    "half a token": (lambda f: flip(f / "train.en.idx", 46), r"token 3 and a part of one, expected 3 .*, at byte 46;"),
    "a negative length": (lambda f: flip(f / "train.en.idx", 33, mask=0x80), r"sequence 1 .*, at byte 30;"),
    "a cut .bin": (
        lambda f: (f / "train.en.bin").write_bytes((f / "train.en.bin").read_bytes()[:-2]),
        r"lists 8 tokens of uint16, 16 bytes, but the \.bin beside it has 14",
    ),
    "a cut .idx": (
        lambda f: (f / "train.en.idx").write_bytes((f / "train.en.idx").read_bytes()[:-1]),
        r"train\.en\.idx: the header says 3 sequences",
    ),
    "no .bin": (lambda f: (f / "train.en.bin").unlink(), r"cannot read .*train\.en\.bin"),
    "no .idx": (lambda f: (f / "train.en.idx").unlink(), r"cannot open .*train\.en\.idx"),
    "another dictionary": (
        lambda f: write_dict(f, ("a", "b", "c", "d", "e")),
        r"train\.en: was made with the dictionary of SHA-256",
    ),
    "counts of another text": (add_count, r"counts\.npy: says that id 5 occurs 3 times, but .* 2 times"),
    "lines": (lambda f: change_record(f, lines=4), r"json: says lines 4, but it is 3"),
    "tokens": (lambda f: change_record(f, tokens=9), r"json: says tokens 9, but it is 8"),
    "blank": (lambda f: change_record(f, blank=0), r"json: says blank 0, but it is 1"),
    "unknown": (lambda f: change_record(f, unknown=2), r"unknown and literal_specials together 2"),
    "entropy": (lambda f: change_record(f, unigram_entropy_bits=2.5), r"says unigram_entropy_bits 2\.5"),
    "no tokens": (lambda f: change_record(f, tokens="8"), r"json: tokens is '8'"),
    "another split": (lambda f: change_record(f, split="test"), r"was written for test\.en"),
    "no record": (
        lambda f: (f / "train.en.json").write_text("[]", encoding="utf-8"),
        r"json: not the record of a binarized file",
    ),
    "a record 100,000 deep": (
        lambda f: (f / "train.en.json").write_text("[" * 100_000, encoding="utf-8"),
        r"json: not the record of a binarized file",
    ),
    "a count beyond all numbers": (lambda f: change_record(f, lines=10**400), r"json: lines is 1000"),
    "a shard that is none": (lambda f: change_record(f, shard=2, shards=2), r"json: is of shard 2 of 2"),
    "shards that are no number": (lambda f: change_record(f, shards="2"), r"json: shards is '2'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_what_is_wrong(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_recorded(tmp_path)
    make_recorded(tmp_path, "valid.en")
    assert run("verify", tmp_path) == EXIT_OK
    break_it, expected = DAMAGES[damage]
    break_it(tmp_path)
    capsys.readouterr()
    assert run("verify", tmp_path) == EXIT_BAD_INPUT
    out, err = capsys.readouterr()
    sentences = err.splitlines()
    assert len(sentences) == (2 if damage == "another dictionary" else 1)
    assert sentences[0].startswith("shards: error: ")
    assert re.search(expected, sentences[0]), sentences[0]
    if damage != "another dictionary":
        assert "valid.en: good" in out  # the pairs after a bad one are checked too


@pytest.mark.parametrize("layout", WRITERS)
def test_every_flipped_byte_of_an_index_is_found_without_a_checksum(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make_pair(tmp_path / "train.en", LINES, layout)
    assert run("verify", pair) == EXIT_OK
    index = tmp_path / "train.en.idx"
    # Of Megatron-LM's documents, every division of the lines is as good as another.
    end = 34 + 12 * len(LINES) if layout == "megatron" else index.stat().st_size
    for at in range(end):
        for mask in (1, 0x80):
            flip(index, at, mask=mask)
            assert run("verify", pair) == EXIT_BAD_INPUT, (at, mask)
            flip(index, at, mask=mask)
    assert run("verify", pair) == EXIT_OK
    capsys.readouterr()


def test_every_flipped_byte_of_the_data_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make_recorded(tmp_path)
    for kind in ("bin", "counts.npy"):
        path = tmp_path / f"train.en.{kind}"
        for at in range(path.stat().st_size):
            flip(path, at)
            assert run("verify", pair) == EXIT_BAD_INPUT, (kind, at)
            flip(path, at)
    assert run("verify", pair) == EXIT_OK
    capsys.readouterr()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"counts",
        _with_shape(b"(10"),  # numpy's own reader raises tokenize.TokenError
        _with_shape(b"(10000000000,), }"),  # MemoryError
        _saved(np.ones(10)),
        _saved(np.ones(11, np.uint64)),
        _saved(np.ones(10, np.uint64))[:-1],
        _saved(np.ones(10, np.uint64)) + b"x",
    ],
)
def test_counts_that_are_none(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make_recorded(tmp_path)
    (tmp_path / "train.en.counts.npy").write_bytes(content)
    assert run("verify", pair) == EXIT_BAD_INPUT
    assert "counts.npy: is not numpy's file of 10 numbers of 64 bits" in capsys.readouterr().err


def test_fairseqs_own_files_are_good(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for vocabulary in ("small", "odd", "65499", "65500"):
        folder = golden / "bin" / f"{vocabulary}.mmap"
        assert run("verify", folder, "--dict", golden / f"vocab.{vocabulary}") == EXIT_OK
    assert "bad" not in capsys.readouterr().err


def test_the_first_bad_byte_is_found_far_into_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond the pieces that are read at a time, and with lines longer than them."""
    pair = make_pair(
        tmp_path / "train.en", [[5] * 100_000 + [2], [6] * 9 + [2], [5] * 50_000 + [2]]
    )
    assert run("verify", pair) == EXIT_OK
    flip(tmp_path / "train.en.bin", 2 * 123_456, mask=0x40)
    assert run("verify", pair) == EXIT_BAD_INPUT
    assert f"id 69 at byte {2 * 123_456} (token 123456)" in capsys.readouterr().err


def test_the_stage_is_known(tmp_path: Path) -> None:
    make_pair(tmp_path / "train.en")
    command: list[str | Path] = [sys.executable, "-m", "xlm_ds", "shards"]
    for arguments, code in ((["--help"], 0), (["verify", tmp_path], 0), (["verify", "x"], 2)):
        done = subprocess.run([*command, *arguments], cwd=ROOT, check=False, capture_output=True)
        assert done.returncode == code


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["shards", "merge", "--help"], EXIT_OK),
        (["shards", "inspect", "{pair}"], EXIT_CLOSED_PIPE),
        (["shards", "verify", "{pair}", "{pair}x"], EXIT_CLOSED_PIPE),
        (["shards", "convert", "{pair}", "{out}"], EXIT_OK),  # only its log is cut short
        (["shards", "convert", "{pair}x", "{out}"], EXIT_BAD_INPUT),
        (
            [
                "binarize",
                "--source-lang=en",
                "--srcdict={folder}/dict.txt",
                "--trainpref={folder}/text/train",
                "--destdir={folder}/out",
            ],
            EXIT_OK,
        ),
    ],
)
def test_a_reader_that_leaves_is_no_error(tmp_path: Path, arguments: list[str], code: int) -> None:
    """As `| head -1` does; here it has left before the first line, be that written at once or at the end."""
    pair, out = make_recorded(tmp_path), tmp_path / "out" / "train.en"
    values = [argument.format(pair=pair, out=out, folder=tmp_path) for argument in arguments]
    command = [sys.executable, "-m", "xlm_ds", *values]
    makes = arguments[0] == "binarize" or "convert" in arguments
    for unbuffered, others in [
        ("1", subprocess.PIPE),
        ("", subprocess.PIPE),
        ("", subprocess.STDOUT),
    ]:
        shutil.rmtree(out.parent, ignore_errors=True)
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=others, env=environment
        ) as process:
            assert process.stdout is not None
            process.stdout.close()
            said = process.stderr.read().decode() if process.stderr else ""
        assert process.returncode == code
        assert not re.search("roken pipe|Traceback", said)
        assert out.with_suffix(".en.idx").exists() == (makes and code == EXIT_OK)


def test_output_may_be_closed_from_the_start(tmp_path: Path) -> None:
    """As for what some daemons and schedulers start."""
    pair, out = make_pair(tmp_path / "train.en"), tmp_path / "out" / "train.en"
    command = f"{sys.executable} -m xlm_ds shards merge {out} {pair} >&- 2>&-"
    assert subprocess.run(command, shell=True, cwd=ROOT, check=False).returncode == EXIT_OK
    assert contents(out) == contents(pair)
    command = f"{sys.executable} -m xlm_ds shards verify {pair} {pair}x >&-"
    done = subprocess.run(command, shell=True, cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == EXIT_BAD_INPUT
    assert b"cannot open" in done.stderr
    assert b"Traceback" not in done.stderr


def test_output_that_cannot_be_written_ends_no_work(tmp_path: Path) -> None:
    pair, out = make_pair(tmp_path / "train.en"), tmp_path / "out" / "train.en"
    command = f"{sys.executable} -m xlm_ds shards merge {out} {pair} 2>/dev/full"
    assert subprocess.run(command, shell=True, cwd=ROOT, check=False).returncode == EXIT_OK
    assert contents(out) == contents(pair)


def test_words_that_the_terminal_has_not_are_spelt_out(tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "train.en")
    write_dict(tmp_path, ("\u0641", *WORDS[1:]))
    command = [sys.executable, "-m", "xlm_ds", "shards", "inspect", str(pair), "--lines", "0"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )
    assert done.stdout.endswith(b"line 0: \\u0641 cat </s>\n")


def test_dictionary_and_companions_travel(tmp_path: Path) -> None:
    pair = make_recorded(tmp_path / "in")
    (tmp_path / "in" / "codes").write_text("t h 1\n", encoding="utf-8")
    run("convert", pair, tmp_path / "out" / "train.en", "--to", "lazy")
    assert Dictionary.load(tmp_path / "out" / "dict.txt") == Dictionary.load(
        tmp_path / "in" / "dict.txt"
    )
    assert (tmp_path / "out" / "codes").read_text(encoding="utf-8") == "t h 1\n"
    shutil.rmtree(tmp_path / "in")
    assert run("verify", tmp_path / "out") == EXIT_OK
