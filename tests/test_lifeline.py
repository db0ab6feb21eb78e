"""What ends a rank: signals, also while it waits in C; a launcher that is gone; a file. And who tells of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xlm_ds.lifeline import END_FILE, Ending

ROOT = Path(__file__).parent.parent

# A rank: it says what it is asked for, and ends with the exit code of that. "stuck" waits as in a collective whose
# other ranks are gone: in C, where no handler of Python's runs.
RANK = """
import ctypes, os, sys, time
from pathlib import Path
from xlm_ds import lifeline
from xlm_ds.lifeline import ENDS_WITH, StopSignal
from xlm_ds.log import logger, run_stage

def main(argv):
    what, save_dir, seconds = argv
    stop = StopSignal(float(seconds))
    if what in ("launched", "talking"):
        stop.watch(lifeline.launcher_is_gone(lifeline.launcher()))
        stop.watch(lifeline.output_is_lost())
        stop.watch(lifeline.connection_is_lost())
    stop.watch(lifeline.stop_file(Path(save_dir)))
    ending = lifeline.Ending(Path(save_dir))
    ending.begin()
    if what != "joining":
        stop.joined(ending)
    Path(save_dir, "ready").write_text(str(os.getpid()))
    if what == "blocked":
        while True:
            logger.info("x" * 1000)
    if what in ("stuck", "joining"):
        libc = ctypes.CDLL(None)
        while True:
            libc.usleep(500_000)
    while not stop.requested:
        if what == "talking":
            logger.info("an update")
        time.sleep(0.01)
    Path(save_dir, "asked").write_text(stop.why)
    if what == "slow":
        time.sleep(3)
    return ENDS_WITH[stop.requested]

sys.exit(run_stage("train", main))
"""


def start(
    what: str, folder: Path, seconds: float = 8.0, **options: object
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", RANK, what, str(folder), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)  # type: ignore[call-overload, no-any-return]


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def pid_of(folder: Path) -> int:
    wait_until(lambda: (folder / "ready").exists() and bool((folder / "ready").read_text()))
    return int((folder / "ready").read_text())


CODES = [(signal.SIGINT, 130), (signal.SIGHUP, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_asks_for_an_end(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = start("willing", tmp_path)
    os.kill(pid_of(tmp_path), number)
    assert process.wait(10) == code
    assert (tmp_path / "asked").read_text() == number.name


@pytest.mark.parametrize(("number", "code"), CODES[:3])
def test_a_rank_that_waits_for_others_ends_when_its_time_is_up(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    process = start("stuck", tmp_path, 1.0, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    pid = pid_of(tmp_path)
    time.sleep(0.3)
    begin = time.monotonic()
    os.kill(pid, number)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == code
    assert 0.9 < time.monotonic() - begin < 3
    assert f"had not saved 1 seconds after {number.name}, and ends without" in output
    ended = json.loads((tmp_path / END_FILE).read_text(encoding="utf-8"))
    assert (ended["exit_code"], ended["what"]) == (code, output.split(": ", 1)[1].split(";")[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_whose_output_nobody_takes_ends_when_its_time_is_up(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Its main thread is in the midst of a line, as in `| less`, and has the lock of all lines."""
    with start("blocked", tmp_path, 0.5, stdout=subprocess.PIPE) as process:
        pid = pid_of(tmp_path)
        time.sleep(0.5)
        os.kill(pid, number)
        assert process.wait(5) == dict(CODES)[number]


def test_a_folder_that_does_not_answer_delays_no_end(tmp_path: Path) -> None:
    """A read of a fifo waits, as of a file on NFS that is mounted hard and gone."""
    os.mkfifo(tmp_path / "stop")
    process = start("stuck", tmp_path, 0.5)
    pid = pid_of(tmp_path)
    time.sleep(1)
    os.kill(pid, signal.SIGTERM)
    assert process.wait(5) == 75


def test_a_rank_that_has_not_joined_yet_has_nothing_to_save(tmp_path: Path) -> None:
    process = start("joining", tmp_path, 60.0, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    os.kill(pid_of(tmp_path), signal.SIGTERM)
    assert process.communicate(timeout=5)[0] == ""
    assert process.returncode == 75


def test_a_schedulers_warning_leaves_all_the_time_that_saving_takes(tmp_path: Path) -> None:
    process = start("slow", tmp_path, 0.5)
    os.kill(pid_of(tmp_path), signal.SIGUSR1)
    assert process.wait(20) == 75


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """SIGTERM after SIGINT is the launcher's, not a second wish."""
    process = start("stuck", tmp_path, 60.0)
    pid = pid_of(tmp_path)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
        time.sleep(0.7)
        assert process.poll() is None
    os.kill(pid, signal.SIGINT)
    assert process.wait(5) == 130


LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def test_a_rank_whose_launcher_is_killed_ends_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCHER, RANK, "launched", str(tmp_path), "8"]
    launcher = subprocess.Popen(command, cwd=ROOT)
    rank = pid_of(tmp_path)
    time.sleep(1)
    assert not (tmp_path / "asked").exists()
    launcher.kill()
    launcher.wait()
    wait_until((tmp_path / "asked").exists, 5)
    assert (tmp_path / "asked").read_text() == "the end of its launcher"
    wait_until(lambda: not Path(f"/proc/{rank}").exists(), 5)


def test_a_rank_whose_launcher_dies_while_it_imports_torch_ends_itself(tmp_path: Path) -> None:
    """And does not train on as an orphan; it looks first for its launcher when all is imported."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-m", "xlm_ds.train", "OUT", f"--save-dir={tmp_path / 'run'}"]
    launcher = subprocess.Popen(
        [sys.executable, "-c", ORPHANING, *command],
        cwd=ROOT,
        env={**os.environ, **ranks, **place},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    maps = Path(f"/proc/{rank}/maps")
    wait_until(lambda: "libtorch" in maps.read_text())
    launcher.kill()
    launcher.communicate()
    wait_until(lambda: not maps.exists(), 60)
    assert not (tmp_path / "run").exists()


ORPHANING = """
import subprocess, sys, time
print(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL).pid, flush=True)
time.sleep(100)
"""


def test_a_rank_that_logs_into_a_closed_pipe_has_lost_its_connection(tmp_path: Path) -> None:
    """The log meets it first, and puts another file there."""
    process = start("talking", tmp_path, stdout=subprocess.PIPE)
    pid_of(tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(10) == 75


@pytest.mark.parametrize("module", ["deepspeed.launcher.launch", "a shell's words"])
def test_a_rank_whose_deepspeed_is_killed_ends_itself(module: str, tmp_path: Path) -> None:
    """Its launch.py lives on, and waits for the ranks. What has started another launcher may be a shell that leaves."""
    rank = [RANK, "launched", str(tmp_path), "8"]
    launch = [LAUNCHER.replace("*sys.argv[1:]", "*sys.argv[2:]"), module, *rank]
    runner = subprocess.Popen([sys.executable, "-c", LAUNCHER, *launch], cwd=ROOT)
    pid = pid_of(tmp_path)
    time.sleep(1)
    runner.kill()
    runner.wait()
    if module != "deepspeed.launcher.launch":
        time.sleep(1.5)
        assert not (tmp_path / "asked").exists()
        os.kill(pid, signal.SIGTERM)
    wait_until((tmp_path / "asked").exists, 5)
    expected = "the end of deepspeed" if module == "deepspeed.launcher.launch" else "SIGTERM"
    assert (tmp_path / "asked").read_text() == expected
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 5)


def test_a_signal_while_torch_is_imported_has_its_exit_code(tmp_path: Path) -> None:
    """There is nothing to save; but who looks for 75 must not find 143."""
    command = [sys.executable, "-m", "xlm_ds.train", "OUT", f"--save-dir={tmp_path / 'run'}"]
    process = subprocess.Popen(command, cwd=ROOT)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: "libtorch" in maps.read_text())
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 75


@pytest.mark.parametrize("what", ["launched", "willing"])
def test_output_that_nobody_reads_ends_a_launched_rank_only(what: str, tmp_path: Path) -> None:
    process = start(what, tmp_path, stdout=subprocess.PIPE)
    pid_of(tmp_path)
    time.sleep(1)
    assert process.poll() is None
    assert process.stdout is not None
    process.stdout.close()
    if what == "launched":
        assert process.wait(10) == 75
        assert "connection to the launcher" in (tmp_path / "asked").read_text()
    else:
        time.sleep(1.5)
        assert process.poll() is None
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize(
    ("variables", "code"),
    [({"SSH_CONNECTION": "x"}, 75), ({"SSH_CONNECTION": "x", "SSH_TTY": "x"}, None), ({}, None)],
)
def test_an_input_that_is_closed_ends_a_rank_that_ssh_has_started(
    variables: dict[str, str], code: int | None, tmp_path: Path
) -> None:
    """As pdsh's end closes it; what a user has piped in may end."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SSH_")}
    process = start("launched", tmp_path, stdin=subprocess.PIPE, env={**inherited, **variables})
    pid_of(tmp_path)
    time.sleep(1)
    assert process.poll() is None
    assert process.stdin is not None
    process.stdin.close()
    if code is None:
        time.sleep(1.5)
        assert process.poll() is None
        process.terminate()
    assert process.wait(10) == 75
    assert ("connection to the launcher" in (tmp_path / "asked").read_text()) == (code == 75)


@pytest.mark.parametrize(
    ("content", "code"), [(b"", 75), (b"USR1\n", 75), (b"TERM", 75), (b"INT\n", 130)]
)
def test_a_file_asks_for_an_end(content: bytes, code: int, tmp_path: Path) -> None:
    process = start("willing", tmp_path)
    pid_of(tmp_path)
    (tmp_path / "stop").write_bytes(b"\xff\xfe")  # which says nothing, and is looked at again
    time.sleep(1)
    assert process.poll() is None
    (tmp_path / "stop").write_bytes(content)
    assert process.wait(10) == code


# ---------------------------------------------------------------------------------------- reports

# Ranks that fail at once: RANK, WORLD_SIZE in the environment; what: how this one fails.
FAILING = """
import os, sys, time
from pathlib import Path
from xlm_ds.lifeline import Ending, one_report, place
from xlm_ds.log import Fault, InputError, add_log_file, run_stage

class Lost(RuntimeError): pass

def main(argv):
    save_dir = Path(argv[0])
    how = argv[1:-1][place().rank]
    add_log_file(save_dir / "logs" / f"rank-{place().rank}.log")
    ending = Ending(save_dir)
    ending.hosts = ["a", "b", "c"]
    ending.start = argv[-1]
    ending.update = 7
    with one_report("train", ending, lambda error: isinstance(error, Lost)):
        if how == "silent": time.sleep(8)
        if how == "deaf": (save_dir / "logs").rename(save_dir / "gone")
        if how in ("waiting", "deaf"): raise Lost("Timed out waiting 8000ms for recv operation to complete")
        if how == "killed": os.kill(os.getpid(), 9)
        if how == "lost": raise Lost("Connection closed by peer [10.0.0.1]")
        if how == "disk": raise OSError(28, "No space left on device", "weight")
        if how == "input": raise InputError("the text is bad")
        if how == "fault": raise Fault("a violation")
        if how == "error": raise ValueError("a bug")
        if how == "late": time.sleep(0.7); raise Lost("Connection closed by peer [10.0.0.2]")
    return 0

sys.exit(run_stage("train", main))
"""


def end_of(folder: Path, *how: str) -> tuple[list[int], str, dict[str, object]]:
    """(exit codes, what all ranks said, ended.json)."""
    begun = Ending(folder)
    begun.begin()
    ranks = []
    for rank in range(len(how)):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(how))}
        command = [sys.executable, "-c", FAILING, str(folder), *how, begun.start]
        ranks.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stderr=subprocess.STDOUT,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    said = "".join(rank.communicate(timeout=30)[0] for rank in ranks)
    path = folder / END_FILE
    ended = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return [rank.returncode for rank in ranks], said, ended


def test_what_all_ranks_find_wrong_is_said_once(tmp_path: Path) -> None:
    codes, said, ended = end_of(tmp_path, "input", "input", "input")
    assert codes == [2, 2, 2]
    assert said == "train: error: the text is bad\n"
    assert (ended["exit_code"], ended["update"], ended["what"]) == (2, 7, "the text is bad")


def test_what_a_disk_refuses_is_said_with_its_host(tmp_path: Path) -> None:
    codes, said, ended = end_of(tmp_path, "disk")
    assert (codes, said) == ([2], "train: error: weight: no space left on device\n")
    codes, said, ended = end_of(tmp_path, "late", "disk")
    sentence = "weight: no space left on device"
    assert codes == [1, 2]
    assert said == f"train: error: rank 1 on {socket.gethostname()}: {sentence}\n"
    assert (ended["exit_code"], ended["rank"], ended["what"]) == (2, 1, sentence)


def test_an_end_is_written_into_no_other_folder(tmp_path: Path) -> None:
    """As one that the run's was mounted over."""
    ending = Ending(tmp_path)
    assert ending.claim(2, "it is so")
    assert list(tmp_path.iterdir()) == []


def test_the_traceback_that_matters_is_the_only_one(tmp_path: Path) -> None:
    codes, said, ended = end_of(tmp_path, "late", "error", "late")
    assert codes == [1, 1, 1]
    assert said.count("Traceback") == 1
    assert "rank 1 on" in said
    assert "ValueError: a bug" in said
    assert "Connection closed" not in said
    assert (ended["rank"], ended["what"]) == (1, "ValueError: a bug")
    assert "Connection closed" in (tmp_path / "logs" / "rank-2.log").read_text(encoding="utf-8")


def test_ranks_that_fail_alike_are_counted(tmp_path: Path) -> None:
    codes, said, _ = end_of(tmp_path, "error", "error", "error")
    assert codes == [1, 1, 1]
    assert said.count("Traceback") == 1
    assert "and 2 other ranks failed" in said


def test_one_that_fails_alike_is_counted(tmp_path: Path) -> None:
    _, said, _ = end_of(tmp_path, "error", "error")
    assert said.endswith("and 1 other rank failed\n")


def test_each_rank_keeps_its_own_reason(tmp_path: Path) -> None:
    """The console may be gone, and the next start removes ended.json."""
    end_of(tmp_path, "input", "disk")
    logs = [(tmp_path / "logs" / f"rank-{n}.log").read_text(encoding="utf-8") for n in (0, 1)]
    assert "the text is bad" in logs[0]
    assert "No space left" in logs[1]
    assert all("Traceback" in log for log in logs)


def test_a_rank_that_was_killed_is_named_by_those_who_lost_it(tmp_path: Path) -> None:
    codes, said, ended = end_of(tmp_path, "lost", "killed", "late")
    assert codes == [1, -9, 1]
    assert "Traceback" not in said
    assert said.count("rank 1 on b has ended without a word") == 1
    assert "2 noticed: Connection closed by peer" in said
    assert "rank 1 on b" in str(ended["what"])


def test_a_rank_that_does_not_answer_is_told_from_one_that_has_ended(tmp_path: Path) -> None:
    codes, said, _ = end_of(tmp_path, "waiting", "silent", "waiting")
    assert codes == [1, 0, 1]
    assert said.count("rank 1 on b does not answer (stopped, ") == 1
    assert "2 noticed: Timed out waiting 8000ms" in said


def test_a_rank_whose_folder_is_gone_too_does_not_name_itself(tmp_path: Path) -> None:
    _, said, _ = end_of(tmp_path, "deaf", "silent")
    assert "rank 1 on b does not answer" in said
    assert "1 noticed: " in said


def test_a_network_that_is_cut_is_told_from_a_rank_that_has_ended(tmp_path: Path) -> None:
    codes, said, _ = end_of(tmp_path, "lost", "lost", "lost")
    assert codes == [1, 1, 1]
    assert said.count("the ranks have lost each other, and none has ended") == 1


def test_a_fault_that_was_noticed_has_no_traceback(tmp_path: Path) -> None:
    codes, said, ended = end_of(tmp_path, "fault", "late")
    assert codes == [1, 1]
    assert "a violation" in said
    assert "Traceback" not in said
    assert ended["exit_code"] == 1


def test_the_first_end_is_the_only_one_and_the_next_run_clears_it(tmp_path: Path) -> None:
    ending = Ending(tmp_path)
    ending.begin()
    assert ending.claim(75, "stopped and saved")
    assert not ending.claim(1, "later")
    assert json.loads((tmp_path / END_FILE).read_text(encoding="utf-8"))["exit_code"] == 75
    assert not list(tmp_path.glob(".ended*"))
    ending.begin()
    assert not ending.is_claimed()


def test_a_rank_of_an_earlier_start_says_nothing_of_this_one(tmp_path: Path) -> None:
    """It was stopped (SIGSTOP) or cut off when its run ended, and comes back when that has been started again."""
    earlier, now = Ending(tmp_path), Ending(tmp_path)
    earlier.begin()
    now.begin()
    earlier.mark()
    assert not earlier.claim(1, "rank 0 has ended without a word")
    assert earlier.lost(RuntimeError("Connection closed")) is None
    assert not now.is_claimed()
    assert now.marked(0) == set()
    assert now.claim(0, "done")


def test_an_end_is_told_once_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    ending = Ending(tmp_path)
    ending.begin()
    assert ending.claim(75, "stopped and saved")
    assert not ending.claim(1, "later")
    assert json.loads((tmp_path / END_FILE).read_text(encoding="utf-8"))["exit_code"] == 75
