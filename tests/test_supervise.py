"""Supervise: what is started again and what is not, how a run is asked to end, and that nothing of it is left.

The runs are small programs that keep train's side of the bargain (SAVE_DIR/stop and ended.json), or break it.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from xlm_ds import supervise
from xlm_ds.config import SuperviseConfig
from xlm_ds.log import Fault, InputError

PATIENCE_SECONDS = 20.0  # of the tests, on a busy machine

FAKE = """
import json, os, pathlib, signal, subprocess, sys, time

folder = pathlib.Path(sys.argv[sys.argv.index("--save-dir") + 1])
last = folder / "checkpoint_last" / "manifest.json"

def note(name, text):
    with (folder / name).open("a") as file:
        file.write(f"{text}\\n")

def save(update):
    last.parent.mkdir(exist_ok=True)
    last.write_text(json.dumps({"progress": {"update": update}}))

def end(code, what="it was so", leave=None):
    said = {"exit_code": code, "update": 7, "host": "node3", "rank": 5, "what": what}
    (folder / "ended.json").write_text(json.dumps(said))
    sys.exit(code if leave is None else leave)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def hang(*pids):
    note("pids", os.getpid())
    for pid in pids:
        note("pids", pid)
    (folder / "ready").touch()
    time.sleep(120)

def wait_for_stop():
    note("pids", os.getpid())
    (folder / "ready").touch()
    while not (folder / "stop").exists():
        time.sleep(0.02)
    word = (folder / "stop").read_text()
    note("asked", word)
    return 130 if word == "INT" else 75

note("starts", " ".join(sys.argv))
start = len((folder / "starts").read_text().splitlines())
"""

Supervise = Callable[..., subprocess.Popen[str]]
BRIEF = ("--stop-seconds=0.1",)  # of a run that is to be killed


@pytest.fixture(autouse=True)
def not_a_subreaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called in this process must not make it the parent of other tests' orphans."""
    monkeypatch.setattr("xlm_ds.keeper.adopt_orphans", lambda: None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def start(tmp_path: Path, run: Path) -> Iterator[Supervise]:
    """Supervises a run that does `body` (statements, with the names of FAKE)."""
    with contextlib.ExitStack() as started:

        def begin(body: str, *flags: str, words: tuple[str, ...] = ()) -> subprocess.Popen[str]:
            own = ["--first-pause=0.1", *flags]
            command = fake_command(tmp_path / "fake.py", body, run, *words)
            process = subprocess.Popen(
                [sys.executable, "-m", "xlm_ds.supervise", *own, "--", *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # a group of its own, as a shell's job
            )
            started.enter_context(process)
            started.callback(process.kill)
            return process

        yield begin


def fake_command(program: Path, body: str, run: Path, *words: str) -> list[str]:
    program.write_text(FAKE + body + "\n", encoding="utf-8")
    launcher = [sys.executable, "-S", str(program)]
    return [*launcher, "xlm_ds/train.py", "OUT", "--save-dir", str(run), *words]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, everything said)."""
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, output


def starts(run: Path) -> list[str]:
    return (run / "starts").read_text(encoding="utf-8").splitlines()


def wait_until(happened: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < limit, f"not within {PATIENCE_SECONDS} s: {what}"
        time.sleep(0.02)


def wait_for(path: Path) -> None:
    wait_until(path.exists, f"{path} is there")


def pids(run: Path) -> list[int]:
    """Of the run's processes, as it has noted them itself."""
    noted = [int(line) for line in (run / "pids").read_text(encoding="utf-8").split()]
    assert noted
    return noted


def lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def keeper_of(process: subprocess.Popen[str]) -> psutil.Process:
    (keeper,) = psutil.Process(process.pid).children()
    assert isinstance(keeper, psutil.Process)
    return keeper


# ----------------------------------------------------------------------------------- starting again


def test_a_run_that_is_done_is_started_once(start: Supervise, run: Path) -> None:
    code, output = ended(start("save(3); end(0, 'done: 3 updates')"))
    assert code == 0
    assert len(starts(run)) == 1
    assert "node3, rank 5, update 7: done: 3 updates" in output
    assert "saved update 3" in output
    assert output.splitlines() == (run / "supervise.log").read_text(encoding="utf-8").splitlines()


def test_a_failed_run_is_started_again_after_growing_pauses(start: Supervise, run: Path) -> None:
    code, output = ended(start("save(start * 10); end(0 if start == 4 else 1)"))
    assert code == 0
    assert len(starts(run)) == 4
    assert re.findall(r"again in (\S+) s, (\d+)", output) == [
        ("0.1", "10"),
        ("0.2", "9"),
        ("0.4", "8"),
    ]
    assert "from the beginning" in output
    assert "from update 30" in output
    assert "saved update 40, 10 more" in output


def test_a_run_that_gains_nothing_is_not_started_again(start: Supervise, run: Path) -> None:
    """It would fail for ever, and nobody would look."""
    body = "save(10); end(1, 'the first' if start == 1 else 'a tensor was empty')"
    code, output = ended(start(body))
    assert code == 1
    assert len(starts(run)) == 2
    last = output.splitlines()[-1]
    assert last.startswith("supervise: fault: no update was gained")
    assert "node3, rank 5, update 7: a tensor was empty" in last


def test_so_many_restarts_and_no_more(start: Supervise, run: Path) -> None:
    code, output = ended(start("save(start); end(1)", "--restarts=2"))
    assert code == 1
    assert len(starts(run)) == 3
    assert "started again 2 times" in output.splitlines()[-1]


def test_an_interrupted_run_is_not_started_again(start: Supervise, run: Path) -> None:
    assert ended(start("save(start); end(130, leave=1)"))[0] == 130
    assert len(starts(run)) == 1


def test_bad_input_gains_nothing_and_is_not_started_again(start: Supervise, run: Path) -> None:
    code, output = ended(start("end(2, 'dict.txt: is no dictionary', leave=1)"))
    assert code == 2
    assert len(starts(run)) == 1
    assert "dict.txt: is no dictionary" in output.splitlines()[-1]


def test_a_run_that_a_full_disk_has_ended_goes_on(start: Supervise, run: Path) -> None:
    assert ended(start("save(start); end(2 if start == 1 else 0, 'No space left')"))[0] == 0
    assert len(starts(run)) == 2


def test_a_run_whose_folder_is_gone_goes_on_when_it_is_back(start: Supervise, run: Path) -> None:
    """Meanwhile nothing is started, which would begin anew in the folder under it."""
    away = run.with_name("away")
    body = f"save(start)\nif start == 1: os.rename(folder, '{away}'); sys.exit(2)\nend(0)"
    process = start(body)
    wait_for(away)
    wait_until(lambda: "is gone" in (away / "supervise.log").read_text(), "it is missed")
    time.sleep(0.5)
    assert not run.exists()
    away.rename(run)
    assert ended(process)[0] == 0
    assert len(starts(run)) == 2


def test_a_signal_ends_the_wait_for_a_folder(start: Supervise, run: Path) -> None:
    away = run.with_name("away")
    process = start(f"save(start); os.rename(folder, '{away}'); sys.exit(2)")
    wait_for(away)
    wait_until(lambda: "is gone" in (away / "supervise.log").read_text(), "it is missed")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 75


def test_learning_again_what_a_damaged_checkpoint_held_is_no_gain(
    start: Supervise, run: Path
) -> None:
    assert ended(start("save([5, 3, 3, 9][start - 1]); end(1)"))[0] == 1
    assert len(starts(run)) == 2


def test_a_run_that_was_preempted_goes_on(start: Supervise, run: Path) -> None:
    assert ended(start("save(1); end(75 if start == 1 else 0)"))[0] == 0
    assert len(starts(run)) == 2


def test_a_run_that_was_preempted_before_it_gained_anything_says_so(start: Supervise) -> None:
    """A scheduler that starts again what ends with 75 must not drop it."""
    assert ended(start("end(75)"))[0] == 75


def test_a_launcher_s_zero_is_not_believed(start: Supervise, run: Path) -> None:
    """DeepSpeed's runner ends with 0 when the program it runs is killed by a signal (0.19.8, runner.py)."""
    code, output = ended(start("save(min(start, 2)); sys.exit(0)"))
    assert code == 1
    assert len(starts(run)) == 3
    assert "could not say how it ended, although the launcher's exit code is 0" in output


def test_a_launcher_s_own_two_is_bad_input(start: Supervise, run: Path) -> None:
    """As of a wrong flag of torchrun's, before there is a run that could say anything."""
    assert ended(start("sys.exit(2)"))[0] == 2
    assert len(starts(run)) == 1


def test_a_killed_run_is_started_again_whatever_an_earlier_one_has_left(
    start: Supervise, run: Path
) -> None:
    said = {"exit_code": 0, "update": 1, "host": "h", "rank": 0, "what": "done"}
    (run / "ended.json").write_text(json.dumps(said), encoding="utf-8")
    (run / "stop").touch()
    body = "assert not (folder / 'stop').exists(); save(start); die() if start == 1 else end(0)"
    code, output = ended(start(body))
    assert code == 0
    assert len(starts(run)) == 2
    assert "that of SIGKILL" in output


@pytest.mark.parametrize("content", ["", "[]", '{"exit_code": null}', '{"exit_code": "x'])
def test_a_word_that_was_not_written_whole_is_a_failure(content: str, run: Path) -> None:
    (run / "ended.json").write_text(content, encoding="utf-8")
    found = supervise.read_ended(run)
    assert found is not None
    assert found.code == 1


@pytest.mark.parametrize(
    ("code", "name"), [(-9, "KILL"), (137, "KILL"), (247, "KILL"), (143, "TERM")]
)
def test_signals_are_found_in_exit_codes(code: int, name: str) -> None:
    assert f"SIG{name}" in supervise.ended_by_launcher(code).how


def test_a_restart_goes_on_from_the_run_s_own_checkpoint(start: Supervise, run: Path) -> None:
    """And not from the other run's that the first start went on from, which would lose what was gained."""
    words = ("--restore-file", "/elsewhere/checkpoint_best")
    assert ended(start("save(start); end(0 if start == 2 else 1)", words=words))[0] == 0
    first, second = starts(run)
    assert first.endswith("checkpoint_best")
    assert second == f"{first} --restore-file checkpoint_last"


# ------------------------------------------------------------------------------------- being asked

WELL_BEHAVED = "code = wait_for_stop(); save(5); end(code, leave=1)"


@pytest.mark.parametrize(
    ("number", "word", "code"),
    [
        (signal.SIGINT, "INT", 130),
        (signal.SIGHUP, "INT", 130),
        (signal.SIGTERM, "TERM", 75),
        (signal.SIGUSR1, "USR1", 75),
    ],
)
def test_a_signal_makes_the_run_save_and_end(
    number: int, word: str, code: int, start: Supervise, run: Path
) -> None:
    """It does not reach the launcher (DeepSpeed's kills other runs); a keeper that a scheduler signals goes on."""
    process = start(WELL_BEHAVED, "--first-pause=60")
    wait_for(run / "ready")
    keeper_of(process).send_signal(number)
    os.killpg(process.pid, number)  # as a terminal does
    found, output = ended(process)
    assert found == code, output
    assert (run / "asked").read_text(encoding="utf-8").split() == [word]
    assert "saved update 5" in output
    assert not (run / "stop").exists()
    assert len(starts(run)) == 1


def test_a_run_that_does_not_end_is_killed(start: Supervise, run: Path) -> None:
    process = start("hang()", words=BRIEF)
    wait_for(run / "ready")
    process.send_signal(signal.SIGTERM)
    code, output = ended(process)
    assert code == 75
    assert "killing what is left of it" in output
    assert not any(map(lives, pids(run)))
    assert not (run / "stop").exists()


def test_a_second_ctrl_c_kills_at_once(start: Supervise, run: Path) -> None:
    process = start("hang()", words=("--stop-seconds=60",))
    wait_for(run / "ready")
    process.send_signal(signal.SIGINT)
    wait_for(run / "stop")
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130
    assert not any(map(lives, pids(run)))


def test_usr1_leaves_the_run_all_the_time_it_needs(start: Supervise, run: Path) -> None:
    process = start(f"wait_for_stop(); time.sleep(2); {WELL_BEHAVED}", words=BRIEF)
    wait_for(run / "ready")
    process.send_signal(signal.SIGUSR1)
    code, output = ended(process)
    assert code == 75
    assert "saved update 5" in output


def test_a_run_that_was_only_beginning_is_asked_again(start: Supervise, run: Path) -> None:
    """It clears its folder first, and after SIGUSR1 it would else never end."""
    body = "(folder / 'ready').touch(); time.sleep(0.5); (folder / 'stop').unlink(); "
    process = start(body + WELL_BEHAVED)
    wait_for(run / "ready")
    process.send_signal(signal.SIGUSR1)
    assert ended(process)[0] == 75
    assert (run / "asked").read_text(encoding="utf-8").split() == ["USR1"]


def test_a_pause_ends_when_asked(start: Supervise, run: Path) -> None:
    process = start("save(start); end(1)", "--first-pause=600")
    log = run / "supervise.log"
    wait_until(lambda: log.exists() and "again in 600 s" in log.read_text(), "the pause has begun")
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130
    assert len(starts(run)) == 1


def test_a_run_that_is_done_while_it_is_asked_is_done(start: Supervise, run: Path) -> None:
    process = start("wait_for_stop(); end(0)")
    wait_for(run / "ready")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 0


# ----------------------------------------------------------------------------------- nothing is left

# As DeepSpeed's runner: a launcher that dies and leaves what it has started, here in a session of its own.
SLEEP = "[sys.executable, '-S', '-c', 'import time; time.sleep(120)', 'a rank']"
ORPHAN = f"child = subprocess.Popen({SLEEP}, start_new_session=True).pid; note('pids', child); "


def test_what_a_dead_launcher_leaves_is_killed_and_nothing_else(
    start: Supervise, run: Path
) -> None:
    namespace: dict[str, list[str]] = {}
    exec(f"import sys\nwords = {SLEEP}", namespace)
    with subprocess.Popen(namespace["words"]) as other:  # the same words, of somebody else
        code, output = ended(start(ORPHAN + "die()", words=BRIEF))
        assert code == 1
        assert "no update was gained" in output
        (orphan,) = pids(run)
        assert not lives(orphan)
        assert other.poll() is None
        other.kill()


def test_a_launcher_that_outlives_its_run_is_killed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pdsh does, whose ssh is never told that a host was cut off."""
    monkeypatch.setattr(supervise, "LINGER_SECONDS", 0.5)
    (run / "ended.json").write_text("of an earlier start", encoding="utf-8")
    body = "if os.fork(): time.sleep(1); hang()\nwhile not (folder / 'ready').exists(): time.sleep(0.02)\nend(1)"
    command = fake_command(tmp_path / "fake.py", body, run)
    with default_signals(), (run / "lock").open("w") as lock:
        began = time.monotonic()
        ended = supervise.run_once(command, run, supervise.Asked(60), lock.fileno())
    assert ended.code == 1
    assert "node3, rank 5, update 7: it was so" in ended.how
    assert time.monotonic() - began >= 1.5
    assert not any(map(lives, pids(run)))


def test_a_launcher_that_starts_its_run_again_by_itself_is_left_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun --max-restarts does: the new attempt removes what the last one said."""
    monkeypatch.setattr(supervise, "LINGER_SECONDS", 0.5)
    body = """
(folder / "ended.json").write_text('{"exit_code": 1, "update": 7, "host": "h", "rank": 1, "what": "lost"}')
time.sleep(0.3)
(folder / "ended.json").unlink()
time.sleep(1.5)
end(0)
"""
    command = fake_command(tmp_path / "fake.py", body, run)
    with default_signals(), (run / "lock").open("w") as lock:
        assert supervise.run_once(command, run, supervise.Asked(60), lock.fileno()).code == 0


def test_a_folder_that_does_not_answer_for_a_moment_ends_no_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale handle of NFS's, of which Path.exists makes an exception."""
    real = os.stat
    asked = itertools.count()

    def stale(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).startswith(f"{run}/") and next(asked) < 5:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return real(path, *arguments, **options)

    command = fake_command(tmp_path / "fake.py", "time.sleep(1); end(0)", run)
    with default_signals(), (run / "lock").open("w") as lock:
        monkeypatch.setattr(os, "stat", stale)
        assert supervise.run_once(command, run, supervise.Asked(60), lock.fileno()).code == 0
    assert next(asked) > 5


def test_ranks_of_a_dead_launcher_are_asked_to_save_first(start: Supervise, run: Path) -> None:
    """Those of a killed single-node runner have a living parent (launch.py), and would never notice."""
    body = f"os.fork() and die(); os.setsid(); time.sleep(0.2); {WELL_BEHAVED}"
    code, output = ended(start(f"if start == 2: end(0)\n{body}"))
    assert code == 0
    assert (run / "asked").read_text(encoding="utf-8").strip() == "TERM"
    assert "saved update 5" in output


def test_killing_supervise_ends_the_run_which_saves(start: Supervise, run: Path) -> None:
    process = start(WELL_BEHAVED)
    wait_for(run / "ready")
    keeper = keeper_of(process)
    process.kill()
    wait_until(lambda: not lives(keeper.pid), "the keeper has ended")
    assert not any(map(lives, pids(run)))
    assert (run / "asked").exists()
    assert not (run / "stop").exists()


def test_killing_supervise_leaves_nothing_of_a_run_that_hangs(start: Supervise, run: Path) -> None:
    process = start(ORPHAN + "hang()", words=("--stop-seconds=1",))
    wait_for(run / "ready")
    keeper = keeper_of(process)
    process.kill()
    process.wait()
    # Meanwhile no other supervise starts a second run beside it.
    code, output = ended(start("end(0)"))
    assert code == 2
    assert "another supervise has this run" in output
    wait_until(lambda: not lives(keeper.pid), "the keeper has ended")
    assert len(pids(run)) == 2
    assert not any(map(lives, pids(run)))
    assert ended(start("end(0)"))[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_CHILD_SUBREAPER is Linux's")
@pytest.mark.parametrize("rank", ["code = wait_for_stop(); save(5); end(code)", "hang()"])
def test_what_a_killed_keeper_leaves_is_ended_before_the_next_start(
    rank: str, start: Supervise, run: Path
) -> None:
    """The ranks of deepspeed have a parent of their own (launch.py), which the keeper's end does not reach."""
    body = f"if start > 1: end(0)\nsave(3)\nif os.fork(): os.wait()\nelif os.fork(): os.wait()\nelse: {rank}"
    process = start(body, words=("--stop-seconds=1",))
    wait_for(run / "ready")
    keeper_of(process).kill()
    assert ended(process)[0] == 0
    assert len(starts(run)) == 2
    assert not any(map(lives, pids(run)))
    assert (run / "asked").exists() == ("stop" in rank)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_killed_keeper_takes_the_launcher_along(start: Supervise, run: Path) -> None:
    process = start("hang()")
    wait_for(run / "ready")
    keeper_of(process).kill()
    assert ended(process)[0] == 1
    (launcher,) = pids(run)
    wait_until(lambda: not lives(launcher), "the launcher has ended")


def test_one_run_has_one_supervise(start: Supervise, run: Path) -> None:
    first = start(WELL_BEHAVED)
    wait_for(run / "ready")
    code, output = ended(start("end(0)"))
    assert code == 2
    assert output.splitlines()[-1].startswith("supervise: error: ")
    assert "another supervise has this run" in output
    first.send_signal(signal.SIGINT)
    assert ended(first)[0] == 130
    assert len(starts(run)) == 1


# -------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "launcher",
    [
        "deepspeed --hostfile H --module xlm_ds.train",
        "torchrun --nproc-per-node 2 -m xlm_ds.train",
        "deepspeed /somewhere/xlm_ds/train.py",
        "xlm-ds train",
        "/bin/xlm-ds train",
        "python -m xlm_ds train",
        "srun python -m xlm_ds.train",
        "torchrun --nproc-per-node 2 -m xlm_ds.finetune",
        "deepspeed /somewhere/xlm_ds/finetune.py",
        "xlm-ds finetune",
    ],
)
def test_train_is_found_behind_any_launcher(launcher: str) -> None:
    words = launcher.split()
    assert supervise.words_before_flags([*words, "OUT", "train", "--lr=1"]) == len(words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no command to supervise"),
        (["python", "-m", "xlm_ds.train", "OUT"], "no command to supervise; put -- before it"),
        (["--"], "nothing: does not start training"),
        (["--", "deepspeed", "train.py"], "deepspeed train.py: does not start training"),
        (["--", "python", "-m", "xlm_ds.train", "OUT", "--sav-dir=x"], "did you mean --save-dir"),
        (["--", "python", "-m", "xlm_ds.train"], "DATA is missing"),
        (["--", "python", "-m", "xlm_ds.finetune"], "MODEL is missing"),
        (["--", "xlm-no-such", "-m", "xlm_ds.train", "OUT"], "xlm-no-such: no such program"),
        (["--", "python", "-m", "xlm_ds.train", "OUT", "--dry-run"], "starts no run"),
        (["--restart=3", "--", "python", "-m", "xlm_ds.train", "OUT"], "did you mean --restarts"),
        (["--restarts=-1", "--", "python", "-m", "xlm_ds.train", "OUT"], "must be in"),
    ],
)
def test_bad_commands_are_refused_in_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(sentence)):
        supervise.main(words)
    assert not list(tmp_path.iterdir())


def test_a_program_that_cannot_be_run_is_bad_input(run: Path, tmp_path: Path) -> None:
    program = tmp_path / "launcher"
    program.write_text("no program\n", encoding="utf-8")
    program.chmod(0o755)
    words = ["--", str(program), "xlm_ds.train", "OUT", "--save-dir", str(run)]
    command = [sys.executable, "-m", "xlm_ds.supervise", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{program}: Exec format error" in done.stderr


@pytest.mark.parametrize(
    ("launcher", "hostfile"),
    [
        (["deepspeed", "--hostfile", "H", "--module", "xlm_ds.train"], "H"),
        (["deepspeed", "--hostfile=H", "xlm_ds/train.py"], "H"),
        (["deepspeed", "-H", "H", "--module", "xlm_ds.train"], "H"),
        (["torchrun", "-m", "xlm_ds.train"], None),
        (["deepspeed", "--module", "xlm_ds.train"], None),
    ],
)
def test_the_hostfile_is_found(launcher: list[str], hostfile: str | None) -> None:
    assert supervise.hostfile_of(launcher) == hostfile


@pytest.mark.parametrize(
    "words", [["ds"], ["env", "A=1", "deepspeed"], ["python", "-m", "deepspeed.launcher.runner"]]
)
def test_deepspeed_has_several_names(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reads a hostfile that it is not told of."""
    monkeypatch.setattr(supervise, "DEEPSPEEDS_HOSTFILE", tmp_path / "hostfile")
    (tmp_path / "hostfile").write_text("node1 slots=1\n", encoding="utf-8")
    launcher = [*words, "--module", "xlm_ds.train"]
    assert supervise.deepspeed_at(launcher) == len(words) - 1
    assert supervise.hostfile_of(launcher) == str(tmp_path / "hostfile")


@pytest.mark.parametrize(
    ("preflight_code", "flags", "code", "more"),
    [
        (2, [], 2, []),
        (0, [], 0, []),
        (2, ["--no-preflight"], 0, []),
        (0, [], 0, ["--master_port=29777", "--ssh_port=2222"]),
        (2, [], 0, ["--include=node1@node2"]),
    ],
)
def test_hosts_are_looked_at_before_the_first_start(
    preflight_code: int,
    flags: list[str],
    code: int,
    more: list[str],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = run / "hosts"
    program = (
        f"import pathlib, sys; pathlib.Path({str(looked)!r}).write_text(' '.join(sys.argv[1:])); "
        f"sys.exit({preflight_code})"
    )
    monkeypatch.setattr(supervise, "PREFLIGHT", (sys.executable, "-S", "-c", program))
    python, *words = fake_command(tmp_path / "fake.py", "end(0)", run)
    launcher = tmp_path / "launcher"  # which does not mind a hostfile
    launcher.write_text(f'#!/bin/sh\nshift {2 + len(more)}\nexec {python} "$@"\n', encoding="utf-8")
    launcher.chmod(0o755)
    hostfile = tmp_path / "H"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n", encoding="utf-8")
    command = [str(launcher), "--hostfile", str(hostfile), *more, *words]
    with default_signals():
        assert supervise.main(["--first-pause=0", *flags, "--", *command]) == code
    is_asked = not flags and "--include=node1@node2" not in more
    assert looked.exists() == is_asked
    told = words[supervise.words_before_flags(words) :]  # what train is told
    expected = [f"--hostfile={hostfile}", *more, *told]
    assert not is_asked or looked.read_text(encoding="utf-8").split() == expected
    assert (run / "starts").exists() == (code == 0)


@pytest.mark.parametrize("flags", [[], ["--no-preflight"]])
def test_what_a_launcher_would_mangle_is_refused_before_the_start(
    flags: list[str], run: Path, tmp_path: Path
) -> None:
    """Of one host it reaches no other's shell, and nothing is asked of ssh."""
    deepspeed = tmp_path / "deepspeed"
    deepspeed.write_text("#!/bin/sh\nexit 2\n", encoding="utf-8")
    deepspeed.chmod(0o755)
    hostfile = tmp_path / "H"
    started = [str(deepspeed), "--hostfile", str(hostfile), "--module", "xlm_ds.train"]
    command = [*started, "OUT;x", f"--save-dir={run}"]
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n", encoding="utf-8")
    with default_signals():
        with pytest.raises(InputError, match="'OUT;x': would not reach other hosts"):
            supervise.main([*flags, "--", *command])
        hostfile.write_text("localhost slots=1\n", encoding="utf-8")
        assert supervise.main([*flags, "--", *command]) == 2


@contextlib.contextmanager
def default_signals() -> Iterator[None]:
    """Puts back the handlers that supervise sets in this process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_pauses_grow_to_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    updates = itertools.count()
    monkeypatch.setattr(supervise, "saved_update", lambda _: next(updates))
    monkeypatch.setattr(supervise, "run_once", lambda *_, **__: supervise.Ended(1, "it was so"))
    monkeypatch.setattr(supervise, "wait_for", lambda *_: None)
    monkeypatch.setattr(supervise.Asked, "sleep", lambda _, seconds: pauses.append(seconds))
    launch = supervise.read_command([sys.executable, "xlm_ds/train.py", "OUT"])
    with default_signals(), pytest.raises(Fault):
        supervise.supervise(SuperviseConfig(restarts=8), launch, supervise.Asked(1.0), 0)
    assert pauses == [10, 20, 40, 80, 160, 320, 600, 600]


def test_supervise_is_small_beside_the_run() -> None:
    """It runs for months on a node whose memory is the run's."""
    code = "import sys, xlm_ds.supervise; assert not {'torch', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ----------------------------------------------------------------------------------------- for real

# Kills the first start as soon as it has saved.
LAUNCHER = """
import pathlib, subprocess, sys, time

last = pathlib.Path(sys.argv[1]) / "checkpoint_last"
first = not last.exists()
run = subprocess.Popen(sys.argv[2:])
while first and not last.exists():
    assert run.poll() is None
    time.sleep(0.02)
if first:
    run.kill()
sys.exit(run.wait())
"""


@pytest.mark.slow
def test_a_killed_training_is_resumed_and_done(tiny_data: Path, tmp_path: Path) -> None:
    from xlm_ds import checkpoint

    assert supervise.LAST == checkpoint.LAST
    run, launcher = tmp_path / "run", tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER, encoding="utf-8")
    size = ["--encoder-layers=1", "--encoder-embed-dim=16", "--encoder-ffn-embed-dim=32"]
    flags = [*size, "--encoder-attention-heads=2", "--tokens-per-sample=32", "--max-tokens=64"]
    flags += [
        "--save-interval-updates=5",
        "--max-update=60",
        "--log-interval=1",
        f"--save-dir={run}",
    ]
    training = [sys.executable, "-m", "xlm_ds.train", str(tiny_data), *flags]
    words = [sys.executable, str(launcher), str(run), *training]
    command = [sys.executable, "-m", "xlm_ds.supervise", "--first-pause=0.1", "--", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = (run / "supervise.log").read_text(encoding="utf-8")
    assert said.count("starting") == 3  # two starts, one "starting it again"
    assert "going on from" in done.stdout
    assert supervise.saved_update(run) == 60
