"""Full disks and failing ones: nothing half-written has a final name, nothing is left, and one sentence says where.

A limit on the size of files stands for a disk that is full within a file: the kernel writes up to it and then refuses.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from xlm_ds import binarize, prepare, shards
from xlm_ds.dictionary import Dictionary
from xlm_ds.files import Appended, copy_file, file_sha256, save_array

ROOT = Path(__file__).parent.parent
LANGS = "en,fr"
PAIR = {"train.en.bin", "train.en.idx", "train.en.json", "train.en.counts.npy"}


@contextlib.contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """Writing beyond `limit` bytes of any file fails with EFBIG (Python ignores the signal that comes with it)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A folder with room for so many pages of 4096 bytes; another call makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(pages: int) -> Path:
        size = f"size={4096 * pages}" + (",remount" if folder.is_mount() else "")
        command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
        if subprocess.run(command, check=False, capture_output=True).returncode != 0:
            pytest.skip("only root may mount a small disk")
        return folder

    yield mount
    if folder.is_mount():  # its log may still be open
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def tree(folder: Path) -> dict[str, bytes]:
    """What is there but for the logs, whose lines have times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def message_of(error: OSError) -> str:
    """What the stage says: one sentence, as the file's name and the reason are in it."""
    message = str(error.strerror)
    if error.filename is not None:
        message = f"{error.filename}: {message}"
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------- binarize


def write_text(folder: Path, train: str, symbols: list[str], codes: str = "a b 1\n") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "train.en").write_text(train, encoding="utf-8")
    (folder / "vocab").write_text("".join(f"{symbol} 1\n" for symbol in symbols), encoding="utf-8")
    (folder / "codes").write_text(codes, encoding="utf-8")


def run_binarize(text: Path, destination: Path) -> None:
    flags = ["--langs=en", f"--srcdict={text / 'vocab'}", f"--trainpref={text / 'train'}"]
    binarize.main([*flags, f"--destdir={destination}", "--workers=2"])


def check_pair(folder: Path) -> None:
    """If there is an .idx there is a whole pair, and if not, nothing of one; nothing temporary in any case."""
    names = {path.name for path in folder.iterdir()}
    assert not {name for name in names if name.startswith(".")}
    present = {name for name in names if name.startswith("train.")}
    if "train.en.idx" not in present:
        assert not present
        return
    assert present == PAIR
    record = json.loads((folder / "train.en.json").read_text(encoding="utf-8"))
    for kind in ("bin", "idx"):
        assert file_sha256(folder / f"train.en.{kind}") == record["sha256"][kind]
    assert np.load(folder / "train.en.counts.npy").sum() == record["tokens"]


MANY = [f"w{number:03}" for number in range(800)]
# (stage that fails, training text, symbols, largest file): of all files the stage writes the first beyond the limit.
STAGES = [
    ("bin", "a " * 4000, ["a"], 4096),
    ("lengths", "\n" * 1500, ["a"], 4096),
    ("idx", "\n" * 600, ["a"], 4096),
    ("counts", "a\n", MANY, 6000),
    ("json", "a\n", ["a"], 400),
]


@pytest.mark.parametrize(("stage", "train", "symbols", "limit"), STAGES)
def test_a_pair_that_cannot_be_written_leaves_what_was_there(
    stage: str, train: str, symbols: list[str], limit: int, tmp_path: Path
) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    write_text(text, "a b a\n", symbols)
    run_binarize(text, out)  # an earlier pair, of other text
    before = tree(out)
    assert before.keys() >= PAIR
    write_text(text, train, symbols)
    with largest_file(limit), pytest.raises(OSError, match="cannot write") as caught:
        run_binarize(text, out)
    assert re.search(rf"cannot write {out}/\.train\.en\S*\.{stage}", message_of(caught.value))
    assert caught.value.errno == errno.EFBIG
    assert tree(out) == before
    check_pair(out)
    run_binarize(text, out)
    run_binarize(text, tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("stage", "symbols", "codes", "limit"),
    [("dict.txt", MANY, "a b 1\n", 4096), ("codes", ["a"], "a b 1\n" * 800, 4096)],
)
def test_a_dictionary_or_codes_that_cannot_be_written_are_written_next_time(
    stage: str, symbols: list[str], codes: str, limit: int, tmp_path: Path
) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    write_text(text, "a b a\n", symbols, codes)
    with largest_file(limit), pytest.raises(OSError, match="cannot write") as caught:
        run_binarize(text, out)
    assert re.search(rf"cannot write {out}/\.?{stage}", message_of(caught.value))
    assert not tree(out)
    run_binarize(text, out)
    assert (out / "codes").read_text(encoding="utf-8") == codes
    assert len(Dictionary.load(out / "dict.txt")) == 5 + len(symbols)


@contextlib.contextmanager
def nth_call_fails(what: str, n: int) -> Iterator[list[object]]:
    """Gives what is called, call by call; fewer than n say that there was no n-th."""
    owner, name = (os, "fsync") if what == "fsync" else (Path, "replace")
    real, calls = getattr(owner, name), list[object]()

    def fail(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == n:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(OSError):
        patch.setattr(owner, name, fail)
        yield calls


@pytest.mark.parametrize("what", ["fsync", "rename"])
def test_a_disk_that_fails_at_any_moment_leaves_no_half_pair(what: str, tmp_path: Path) -> None:
    """The n-th call fails, for every n there is."""
    text = tmp_path / "text"
    write_text(text, "a b a\n", ["a", "b"])
    for n in itertools.count(1):
        out = tmp_path / f"out{n}"
        with nth_call_fails(what, n) as calls:
            run_binarize(text, out)
        check_pair(out)
        run_binarize(text, out)
        check_pair(out)
        assert (out / "train.en.idx").exists()
        if len(calls) < n:
            break
    assert n > 5  # files, and the folder for fsync


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["fsync", "rename"])
def test_shards_leave_what_was_there_on_a_disk_that_fails_at_any_moment(
    what: str, overwrite: bool, tmp_path: Path
) -> None:
    text, pair = tmp_path / "text", tmp_path / "in" / "train.en"
    write_text(text, "a b a\n", ["a", "b"])
    run_binarize(text, pair.parent)
    for n in itertools.count(1):
        out = tmp_path / f"out{n}"
        if overwrite:
            shards.main(["merge", str(out / "train.en"), str(pair)])
        before = tree(out)
        command = [
            "merge",
            str(out / "train.en"),
            str(pair),
            str(pair),
            *["--overwrite"] * overwrite,
        ]
        with nth_call_fails(what, n) as calls:
            shards.main(command)
        if len(calls) < n:
            break
        assert tree(out) == before
        assert out.exists() == overwrite
        shards.main(command)
        check_pair(out)
    check_pair(out)
    assert n > 6  # also the dictionary and its codes


def test_a_full_disk_is_named_until_it_is_large_enough(
    disk: Callable[[int], Path], tmp_path: Path
) -> None:
    """From too small for the dictionary to large enough for the pair."""
    text = tmp_path / "text"
    write_text(text, "a b\n" * 1500, ["a", "b"])
    out = disk(1) / "out"
    reasons: list[str] = []
    for pages in range(2, 40):
        with contextlib.suppress(FileNotFoundError):
            check_pair(out)
        try:
            run_binarize(text, out)
        except OSError as error:
            reasons.append(f"{errno.errorcode[error.errno or 0]} {message_of(error)}")
        else:
            break
        disk(pages)
    check_pair(out)
    assert (out / "train.en.idx").exists()
    assert len(reasons) > 3
    assert all(reason.startswith("ENOSPC ") and str(out) in reason for reason in reasons)


def test_the_stage_says_it_in_one_line_and_with_its_exit_code(tmp_path: Path) -> None:
    """The log cannot be written either, and must not hide the reason behind a traceback."""
    text, out = tmp_path / "text", tmp_path / "out"
    write_text(text, "a b\n", ["a", "b"])
    (text / "valid.en").write_text("a b\n" * 1500, encoding="utf-8")
    out.mkdir()
    (out / "preprocess.log").write_bytes(b"x" * 5000)
    program = (
        "import resource, sys; from xlm_ds import binarize; from xlm_ds.log import run_stage; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        "sys.exit(run_stage('binarize', binarize.main))"
    )
    flags = ["--langs=en", f"--srcdict={text / 'vocab'}", f"--destdir={out}"]
    prefs = [f"--trainpref={text / 'train'}", f"--validpref={text / 'valid'}"]
    command = [sys.executable, "-c", program, *flags, *prefs]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    log, reason = result.stderr.splitlines()
    assert log == f"cannot write {out}/preprocess.log: File too large; going on without"
    assert re.fullmatch(rf"binarize: error: cannot write {out}/\S+: File too large", reason)
    check_pair(out)
    assert (out / "train.en.idx").exists()
    assert not list(out.glob("valid*"))


def test_threads_that_cannot_be_had_are_one_sentence(tmp_path: Path) -> None:
    """Fewer than --workers may be, as in a container with a limit; here one of memory, for their stacks."""
    text = tmp_path / "text"
    write_text(text, "a b\n", ["a", "b"])
    program = (
        "import resource, sys; from xlm_ds import binarize; from xlm_ds.log import run_stage; "
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)); "
        "sys.exit(run_stage('binarize', binarize.main))"
    )
    flags = ["--langs=en", f"--trainpref={text / 'train'}", f"--destdir={tmp_path / 'out'}"]
    command = [sys.executable, "-c", program, *flags, "--workers=4096"]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no more threads or processes; raise ulimit -u, or give fewer --workers" in result.stderr
    assert result.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------- prepare


def raw_text(folder: Path) -> Path:
    folder.mkdir()
    demo = ROOT / "tests" / "data" / "demo"
    for language in LANGS.split(","):
        lines = (demo / f"train.{language}").read_text(encoding="utf-8").split("\n")[:120]
        (folder / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run_prepare(raw: Path, destination: Path) -> None:
    flags = [
        f"--input={raw}/{{lang}}.txt",
        f"--langs={LANGS}",
        "--tokenizer=none",
        "--bpe-codes=600",
    ]
    prepare.main(
        [*flags, f"--destdir={destination}", "--workers=1", "--valid-lines=10", "--test-lines=5"]
    )


def test_prepare_on_a_full_disk_leaves_whole_files_and_goes_on(tmp_path: Path) -> None:
    """Whichever file is the first that has no room."""
    raw = raw_text(tmp_path / "raw")
    run_prepare(raw, tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    named = set()
    for limit in sorted({len(content) - 1 for content in whole.values()}):
        out = tmp_path / f"limit{limit}"
        with largest_file(limit), pytest.raises(OSError, match="cannot write") as caught:
            run_prepare(raw, out)
        found = re.search(rf"cannot write {out}/(\S+): File too large", message_of(caught.value))
        assert found is not None, message_of(caught.value)
        named.add(found[1])
        made = tree(out)
        assert all(
            content == whole[name] for name, content in made.items() if name != "prepare.json"
        )
        assert not {name for name in made if name not in whole}  # so nothing temporary either
        run_prepare(raw, out)
        assert tree(out) == whole
    assert named >= {".prepare.json.tmp", "tokenised/train.en.partial", "codes.sample.partial"}


@pytest.mark.parametrize("name", ["train.en", "vocab_mlm"])
def test_prepare_names_what_the_core_could_not_write(name: str, tmp_path: Path) -> None:
    raw, out = raw_text(tmp_path / "raw"), tmp_path / "out"
    run_prepare(raw, out)
    whole = tree(out)
    (out / name).unlink()
    reason = rf"cannot write {out}/{name}\.partial: File too large"
    with largest_file(len(whole[name]) - 1), pytest.raises(OSError, match=reason):
        run_prepare(raw, out)
    assert tree(out).keys() == whole.keys() - {name}
    run_prepare(raw, out)
    assert tree(out) == whole


# ------------------------------------------------------------------------------------------- files


def test_arrays_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    """numpy's own writer keeps the end of an array in a buffer, and says nothing when that cannot be written."""
    array = np.arange(1000, dtype=np.uint64)
    save_array(tmp_path / "whole.npy", array)
    assert (np.load(tmp_path / "whole.npy") == array).all()
    with (
        largest_file(7000),
        pytest.raises(OSError, match=r"cannot write .*part\.npy: File too large"),
    ):
        save_array(tmp_path / "part.npy", array)


def test_copies_are_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 5000)
    with (
        largest_file(4096),
        pytest.raises(OSError, match=r"cannot write .*target.*: File too large"),
    ):
        copy_file(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    copy_file(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"x" * 5000


def disk_with_room_for(size: int) -> Callable[[int, bytes], int]:
    """An os.write, which writes what there is room for and then fails."""
    write, left = os.write, size

    def call(descriptor: int, content: bytes) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, content[:left])
        left -= written
        return written

    return call


def test_what_cannot_be_appended_follows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is gone for two calls, and then the disk is full within a line."""
    run, away = tmp_path / "run", tmp_path / "away"
    run.mkdir()
    (run / "log").write_text("1\n", encoding="utf-8")
    log = Appended(run / "log")
    with caplog.at_level("INFO", logger="xlm_ds"):
        log.append("2\n")
        run.rename(away)
        log.append("3\n")
        run.mkdir()  # another, as under a mount
        log.append("4\n")
        assert list(run.iterdir()) == []
        run.rmdir()
        away.rename(run)
        log.append("5\n")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", disk_with_room_for(2))
            log.append("6 is long\n")
        assert (run / "log").read_text(encoding="utf-8") == "1\n2\n3\n4\n5\n6 "
        log.append("7\n")
    assert (run / "log").read_text(encoding="utf-8") == "1\n2\n3\n4\n5\n6 is long\n7\n"
    said = [record.getMessage() for record in caplog.records]
    assert [reason.partition(": ")[2] for reason in said] == [
        *("No such file or directory; going on without, and trying again", ""),
        *("No space left on device; going on without, and trying again", ""),
    ]
    assert said[1] == f"{run / 'log'} can be written again, and nothing of it is missing"
