"""What is refused leaves nothing behind: before a run begins, its flags, files and labelled texts are looked at."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from test_end_to_end import MODULE, call, environment
from test_finetune import FLAGS, write_task
from test_train import SHAPE, train_here
from xlm_ds import checkpoint
from xlm_ds.config import TrainConfig
from xlm_ds.engine import Ranks
from xlm_ds.files import locked
from xlm_ds.flags import parse
from xlm_ds.lifeline import END_FILE, SUPERVISE_LOCK, Ending
from xlm_ds.log import InputError, logger
from xlm_ds.process import LOCK, refusal
from xlm_ds.run import seen_checkpoint

# Commands one after another in a process that has imported torch once: as run_stage ends them.
COMMANDS = """
import contextlib, io, json, os, sys
from xlm_ds import finetune, train
from xlm_ds.log import run_stage
ends = []
for stage, words in json.load(sys.stdin):
    before = dict(os.environ)
    sys.argv[1:] = words
    with contextlib.redirect_stderr(io.StringIO()) as said:
        ends.append((run_stage(stage, {"train": train, "finetune": finetune}[stage].main), said.getvalue()))
    os.environ.clear()
    os.environ.update(before)
print(json.dumps(ends))
"""


def ends_of(commands: list[tuple[str, list[str]]]) -> list[tuple[int, str]]:
    """Of each stage with its words the exit code and what stderr has."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=json.dumps(commands),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: list[tuple[int, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def base(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    train_here(tiny_data, folder, ranks, "--max-update=2")
    return folder


@pytest.fixture
def task(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder of labelled texts, with other files than usual: None for none."""
    made = write_task(tmp_path / "task", base)

    def copy(**files: bytes | None) -> Path:
        folder = tmp_path / f"task{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for path in made.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        for name, content in files.items():
            path = folder / f"{name.replace('_', '.')}.tsv"
            path.unlink() if content is None else path.write_bytes(content)
        return folder

    return copy


def test_a_finetune_that_is_refused_has_one_sentence_and_leaves_nothing(
    base: Path, task: Callable[..., Path], tmp_path: Path
) -> None:
    plain, run = task(), tmp_path / "runs" / "new"
    endless = ["--max-epoch=0", "--max-update=0"]
    room = "--lr-scheduler linear with --max-update 60 and --warmup-updates 99 has no updates to decay in"
    cases: list[tuple[Path, list[str], str]] = [
        (plain, ["--train-langs=en,en"], "--train-langs: en is named twice"),
        (plain, ["--train-langs=fr"], "--train-langs fr: the model knows ar, en, hi"),
        (plain, ["--train-langs=ar"], "task1 has train texts in en, hi"),
        (plain, ["--stop-lang=fr"], "--stop-lang fr: the model knows ar, en, hi"),
        (plain, ["--stop-lang=ar"], "add valid.ar.tsv, or choose by another language: --stop-lang"),
        (plain, endless, "nothing would end the run; give one of them, or --patience"),
        (plain, [*endless, "--lr-scheduler=inverse_sqrt"], "nothing would end the run"),
        (plain, ["--warmup-updates=99"], f"of 96 training examples ends at update 60: {room}"),
        (plain, ["--lr-scheduler=wsd"], "needs --decay-updates"),
        (plain, ["--deepspeed_config=no.json"], "no.json: no such file or directory"),
        (plain, ["--restore-file=nowhere"], "nor a path that exists"),
        (tmp_path / "no", [], "no: no such folder; give the folder with the labelled texts"),
        (task(valid_en=None, valid_hi=None), [], "is chosen; add valid.en.tsv\n"),
        (task(test_hi=b"animals\tx\nfruits\ty\n"), [], "test.hi.tsv:2: label 'fruits' is in no"),
        (task(test_hi=b""), [], "test.hi.tsv: is empty"),
        (plain / "train.en.tsv", [], "train.en.tsv: is a file; give the folder"),
        (task(train_en=b"animals\tx\n\n"), [], "train.en.tsv:2: is an empty line; take it out"),
        (task(valid_hi=b"animals\tx\ty\n"), [], "valid.hi.tsv:1: has 2 texts, where other files"),
    ]
    commands = [
        ("finetune", [str(base), str(data), f"--save-dir={run}", *FLAGS, *flags])
        for data, flags, _ in cases
    ]
    damaged = tmp_path / "damaged"
    shutil.copytree((base / checkpoint.BEST).resolve(), damaged)
    weights = next(damaged.glob("weight*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    commands.append(("finetune", [str(damaged), str(plain), f"--save-dir={run}", *FLAGS]))
    cases.append((plain, [], "its SHA-256 is not the one in manifest.json"))
    for (_, flags, expected), (code, said) in zip(cases, ends_of(commands), strict=True):
        assert (code, said.count("\n")) == (2, 1), said
        assert said.startswith("finetune: error: "), said
        assert expected in said, flags
    assert not run.parent.exists()


def test_a_train_that_is_refused_leaves_nothing(tiny_data: Path, tmp_path: Path) -> None:
    run, interval = tmp_path / "run", ["--retrieve-interval-updates=1"]
    cases = [
        (tmp_path / "no", [], "no such folder; give what binarize wrote"),
        (tiny_data, ["--monolingual-langs=ar,xx"], "train is there for ar, en, hi"),
        (tiny_data, ["--max-tokens=16"], "one sample must fit"),
        (tiny_data, ["--max-positions=16"], "is beyond the position table of 16 rows"),
        (tiny_data, ["--lr-scheduler=linear"], "has no updates to decay in"),
        (tiny_data, ["--retrieve-data=no"], "go together; give both or neither"),
        (tiny_data, [*interval, "--retrieve-data=no"], "no: has no aligned texts of ar, en, hi"),
        (tiny_data, ["--stop-min-lr=1"], "ends the run before its first update"),
        (tiny_data, ["--deepspeed_config=no.json"], "no.json: no such file"),
    ]
    commands = [
        ("train", [str(data), f"--save-dir={run}", *SHAPE, *flags]) for data, flags, _ in cases
    ]
    for (_, _, expected), (code, said) in zip(cases, ends_of(commands), strict=True):
        assert (code, said.count("\n")) == (2, 1), said
        assert expected in said
    assert not run.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_another_s_run_is_left_as_it_is(
    base: Path, task: Callable[..., Path], tiny_data: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Also how it has ended."""
    run = tmp_path / "run"
    train_here(tiny_data, run, ranks, "--max-update=1")
    Ending(run).claim(0, "done")
    before = contents(run)
    words = [str(base), str(task()), f"--save-dir={run}"]
    again = [str(tiny_data), f"--save-dir={run}", *SHAPE]
    commands = [
        ("finetune", words, "is of train, not of finetune; give another --save-dir"),
        ("train", [*again, "--restore-file=typo"], "--restore-file typo: neither in"),
        (
            "train",
            [*again, "--encoder-layers=3"],
            "another architecture: layers was 2 and is now 3",
        ),
        ("train", [*again, "--arch=xlm"], "another architecture: "),
    ]
    ends = ends_of([(stage, flags) for stage, flags, _ in commands])
    for (_, _, expected), (code, said) in zip(commands, ends, strict=True):
        assert code == 2
        assert expected in said
    assert contents(run) == before


# ----------------------------------------------------------------------------------- under supervise


def refuse(_: object) -> None:
    logger.info("is not said twice")
    raise InputError("the flag is bad")


def refused(folder: Path, ranks: Ranks) -> str:
    return str(refusal(refuse, folder, Ending(folder), ranks))


def test_supervise_is_told_and_nobody_else(tmp_path: Path, ranks: Ranks) -> None:
    """It has removed what an earlier start said; without a word, torchrun's exit code would be believed."""
    assert refused(tmp_path, ranks) == "the flag is bad"
    assert not list(tmp_path.iterdir())
    (tmp_path / SUPERVISE_LOCK).touch()  # of one that was killed
    assert refused(tmp_path, ranks) == "the flag is bad"
    assert not (tmp_path / END_FILE).exists()
    with locked(tmp_path / SUPERVISE_LOCK):
        assert refused(tmp_path, ranks) == "the flag is bad"
    ended = json.loads((tmp_path / END_FILE).read_text(encoding="utf-8"))
    assert (ended["exit_code"], ended["what"]) == (2, "the flag is bad")


def test_a_run_at_work_is_not_told_that_it_has_ended(tmp_path: Path, ranks: Ranks) -> None:
    """Its supervise would believe that, and kill it after a minute."""
    with locked(tmp_path / SUPERVISE_LOCK), locked(tmp_path / LOCK):
        assert "another run is at work here" in refused(tmp_path, ranks)
    assert not (tmp_path / END_FILE).exists()


def test_what_is_looked_at_first_is_said_once(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    def check(_: object) -> None:
        logger.warning("a")
        other = threading.Thread(target=lambda: logger.warning("another thread's"))
        other.start()
        other.join()

    with caplog.at_level("INFO", logger="xlm_ds"):
        assert refusal(check, tmp_path, Ending(tmp_path), ranks) is None
        logger.warning("b")
    assert [record.message for record in caplog.records] == ["another thread's", "b"]


def test_a_fault_is_left_to_the_run_which_reports_it(tmp_path: Path, ranks: Ranks) -> None:
    def check(_: object) -> None:
        raise TypeError("of a manifest that no version has written")

    assert refusal(check, tmp_path, Ending(tmp_path), ranks) is None


@pytest.mark.slow
def test_supervise_has_the_exit_code_of_a_refused_run_through_torchrun(tmp_path: Path) -> None:
    torchrun = [*MODULE, "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    words = ["xlm_ds.train", str(tmp_path / "no"), f"--save-dir={tmp_path / 'run'}"]
    result = call(*MODULE, "xlm_ds.supervise", "--", *torchrun, *words)
    assert result.returncode == 2, result.stderr
    assert "no such folder; give what binarize wrote" in result.stdout.splitlines()[-1]


# --------------------------------------------------------------------------------- what can be seen


def test_what_a_killed_save_has_moved_aside_is_not_missed_too_early(
    base: Path, tmp_path: Path
) -> None:
    """It is put back when the run's folder is taken (checkpoint.discard_leftovers)."""
    run = tmp_path / "run"
    run.mkdir()
    (run / checkpoint.LAST).symlink_to("checkpoint_1_2")
    (run / ".checkpoint_1_2.old").symlink_to((base / checkpoint.LAST).resolve())

    def options(*flags: str) -> TrainConfig:
        return parse(TrainConfig, ["data", f"--save-dir={run}", *flags])

    assert seen_checkpoint(options().run) is None
    (run / ".checkpoint_1_2.old").rename(run / "checkpoint_1_2")
    found = seen_checkpoint(options().run)
    assert found is not None
    assert found[1]["progress"]["update"] == 2
    gone = parse(TrainConfig, ["data", f"--save-dir={tmp_path / 'no'}", "--restore-file=a"])
    with pytest.raises(InputError, match="--restore-file a: neither in"):
        seen_checkpoint(gone.run)
