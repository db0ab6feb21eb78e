"""What goes wrong with hosts while they train: what is said, how soon all has ended, and that nothing is lost.

Each test is a row of docs/faults.md. Hosts are namespaces with sshd and pdsh (hosts.py); ranks speak gloo, on CPUs.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hosts import Hosts
from test_train import SHAPE, records_in, train_here
from xlm_ds import prove
from xlm_ds.engine import Ranks
from xlm_ds.supervise import saved_update

pytestmark = [pytest.mark.faults, pytest.mark.timeout(280)]

# 12 samples an update, which one, two and three ranks can divide; lines few enough for a pipe that nobody reads.
FLAGS = [
    *SHAPE,
    "--global-batch-tokens=384",
    "--log-interval=10",
    "--save-interval-updates=20",
    "--keep-interval-updates=2",
    "--no-epoch-checkpoints",
    "--validate-interval=100000",
]
SAVE_INTERVAL = 20
FOREVER = "--max-update=100000"
HEARTBEAT_SECONDS = 8
HEARTBEAT = f"--heartbeat-timeout={HEARTBEAT_SECONDS}"
SUPERVISE = ("xlm-ds", "supervise", "--first-pause=1", "--no-preflight", "--")
# From the wish that it should end, or a rank's end, until nothing is left on any host.
END_SECONDS = 10.0
# Torch and DeepSpeed are imported by launchers and ranks: 13 seconds on two quiet cores, and up to 50 on busy ones.
START_SECONDS = 120.0


class Training:
    """A run on hosts, started from the folder `job` of the first."""

    def __init__(self, hosts: Hosts, job: Path, data: Path) -> None:
        self.hosts = hosts
        self.first = hosts.names[0]
        self.job = job
        self.data = data
        self.save_dir = job / "run"
        self.begin = 0.0
        self.process: subprocess.Popen[str]
        self.others: set[int] = set()  # processes that are not the run's

    def start(
        self, *flags: str, before: tuple[str, ...] = (), env: Mapping[str, str] | None = None
    ) -> None:
        """Returns when it has trained for some updates and has saved."""
        words = ["deepspeed", "--hostfile=hostfile", "--module", "xlm_ds.train", str(self.data)]
        flags = ("--save-dir=run", *FLAGS, FOREVER, *flags)
        self.process = self.hosts.popen(self.first, *before, *words, *flags, cwd=self.job, env=env)
        self.wait_until(lambda: self.logged() >= 30 and bool(saved_update(self.save_dir)))

    def wait_until(self, happened: Callable[[], bool], limit: float = START_SECONDS) -> None:
        give_up = time.monotonic() + limit
        while not happened():
            if time.monotonic() > give_up or self.process.poll() is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                pytest.fail(f"it did not come to that: {self.process.communicate()}")
            time.sleep(0.05)

    def logged(self) -> int:
        """The last update in metrics.jsonl."""
        path = self.save_dir / "metrics.jsonl"
        records = records_in(self.save_dir) if path.exists() else []
        return int(records[-1]["update"]) if records else 0

    def log(self, name: str = "train.log") -> str:
        return (self.save_dir / name).read_text(encoding="utf-8")

    # ------------------------------------------------------------------------------------ faults

    def rank(self, host: str) -> int:
        (pid,) = self.running("xlm_ds.train", host)
        return pid

    def launcher(self, host: str) -> int:
        (pid,) = self.running("deepspeed.launcher.launch", host)
        return pid

    def running(self, module: str, host: str) -> list[int]:
        """Processes of Python's with this module; its own name may be another on each host."""
        begin = re.compile(rf"\S*python\S* -u -m {re.escape(module)} ")
        return [p.pid for p in self.hosts.processes(host) if begin.match(p.command)]

    def client(self, begin: str) -> int:
        (pid,) = [p.pid for p in self.hosts.processes(self.first) if p.command.startswith(begin)]
        return pid

    def kill(self, pid: int, number: signal.Signals) -> None:
        self.begin = time.monotonic()
        os.kill(pid, number)

    def signal_terminal(self, number: signal.Signals) -> None:
        """All that a terminal would signal, but for the nsenter, which waits for the exit code."""
        there = [p.pid for p in self.hosts.processes(self.first)]
        self.begin = time.monotonic()
        for pid in there:
            if os.getpgid(pid) == self.process.pid:
                os.kill(pid, number)

    def start_another(self, host: str) -> int:
        """A process that DeepSpeed's runner takes for a launcher of its own run: another run of this interpreter."""
        command = Path(f"/proc/{self.launcher(host)}/cmdline").read_bytes().split(b"\0")
        words = b" ".join(command[:4]).decode()
        self.hosts.popen(host, "bash", "-c", f"exec -a '{words}' sleep 300")
        while not (found := self.running_sleep(host, words)):
            time.sleep(0.05)
        self.others.add(found[0])
        return found[0]

    def running_sleep(self, host: str, words: str) -> list[int]:
        return [p.pid for p in self.hosts.processes(host) if p.command == f"{words} 300"]

    # -------------------------------------------------------------------------------------- ends

    def left(self, *names: str) -> dict[str, list[str]]:
        """What runs on the hosts (on all)."""
        there = {name: self.hosts.processes(name) for name in names or self.hosts.names}
        return {
            name: left
            for name, processes in there.items()
            if (left := [p.command[:80] for p in processes if p.pid not in self.others])
        }

    def end(self, limit: float = END_SECONDS, *names: str) -> float:
        """Seconds from the fault until nothing is left on these hosts (on all); fails after `limit`."""
        while left := self.left(*names):
            if time.monotonic() - self.begin > limit:
                pytest.fail(f"left after {limit:g} seconds: {left}\n{self.log()}")
            time.sleep(0.05)
        return time.monotonic() - self.begin

    def said(self) -> tuple[int, str]:
        """Exit code and output of what was started, which has ended."""
        stdout, stderr = self.process.communicate(timeout=10)
        return self.process.returncode, stdout + stderr

    def ended(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.log("ended.json"))
        return found

    def check_saved(self) -> None:
        """The run was asked to end, and did so in good order."""
        ended = self.ended()
        assert (ended["exit_code"], ended["what"]) == (75, "stopped and saved")
        assert saved_update(self.save_dir) == ended["update"]

    def check_failed(self, output: str, what: str) -> None:
        """The failure is told once, without the tracebacks that come from it; what was saved before is there."""
        ended = self.ended()
        assert ended["exit_code"] == 1
        assert re.search(what, ended["what"])
        assert "Traceback" not in output
        (report,) = re.findall(r"\| ERROR \| xlm_ds \| (.*)", output)
        assert report == (
            f"rank {ended['rank']} on {ended['host']}, after update {ended['update']}: {ended['what']}"
        )
        assert 0 <= ended["update"] - (saved_update(self.save_dir) or 0) <= 2 * SAVE_INTERVAL

    def check_nothing_is_lost(self, ranks: Ranks) -> None:
        """It goes on, in this process, and has learnt from the samples of a run that nothing has happened to."""
        saved = saved_update(self.save_dir) or 0
        update = saved + 10
        before = records_in(self.save_dir)
        undisturbed = self.job / "undisturbed"
        for save_dir in (self.save_dir, undisturbed):
            train_here(self.data, save_dir, ranks, *FLAGS, f"--max-update={update}")
        assert all(r["update"] > saved for r in records_in(self.save_dir) if r not in before)
        met = prove.compare(self.save_dir, undisturbed)
        finding = prove.samples_finding(self.save_dir, undisturbed, met)
        assert not finding.differs, finding.sentence
        assert f"identical to update {update}" in finding.sentence


Start = Callable[[int], Training]


@pytest.fixture
def training(start_hosts: Callable[[int], Hosts], tiny_data: Path, tmp_path: Path) -> Start:
    return lambda count: Training(start_hosts(count), tmp_path / "job", tiny_data)


# ---------------------------------------------------------------------------------- a rank, a launcher


@pytest.mark.ci
def test_a_killed_rank_is_named_by_the_others(
    training: Start, ranks: Ranks, record_property: Callable[[str, object], None]
) -> None:
    run = training(2)
    run.start()
    run.kill(run.rank("node2"), signal.SIGKILL)
    record_property("seconds", run.end(2 * END_SECONDS))
    code, output = run.said()
    assert code == 256 - signal.SIGKILL  # of the launcher on node2; pdsh -S takes the largest
    run.check_failed(output, r"^rank 1 on node2 has ended without a word .*; 1 noticed: ")
    run.check_nothing_is_lost(ranks)


def test_supervise_starts_a_run_with_a_killed_rank_again(
    training: Start, ranks: Ranks, record_property: Callable[[str, object], None]
) -> None:
    run = training(2)
    run.start(before=SUPERVISE)
    run.kill(run.rank("node2"), signal.SIGKILL)
    run.wait_until(lambda: "ended: " in run.log("supervise.log"), 2 * END_SECONDS)
    record_property("seconds", time.monotonic() - run.begin)
    assert "rank 1 on node2 has ended without a word" in run.log("supervise.log")
    run.wait_until(lambda: run.log().count("going on from ") == 1)
    record_property("seconds until it goes on", time.monotonic() - run.begin)
    before = saved_update(run.save_dir) or 0
    run.wait_until(lambda: (saved_update(run.save_dir) or 0) > before)
    run.signal_terminal(signal.SIGTERM)
    run.end()
    code, output = run.said()
    assert code == 75
    assert "Traceback" not in output
    run.check_saved()
    run.check_nothing_is_lost(ranks)


@pytest.mark.ci
def test_ranks_whose_launcher_is_killed_save_and_end(
    training: Start, ranks: Ranks, record_property: Callable[[str, object], None]
) -> None:
    run = training(2)
    run.start()
    run.kill(run.launcher("node2"), signal.SIGKILL)
    record_property("seconds", run.end())
    code, output = run.said()
    assert code == 255  # ssh's, as nobody can tell of the launcher that was killed
    assert "stopped by the end of its launcher (rank 1 on node2) after update " in output
    assert "Traceback" not in output
    run.check_saved()
    run.check_nothing_is_lost(ranks)


NO_ANSWER = (
    r"^rank {} on {} does not answer \(stopped, or on a host that is down or cut off\); 1 noticed: "
    "Timed out"
)


@pytest.mark.parametrize("then", ["continued", "interrupted"])
def test_a_stopped_rank_is_named(
    then: str,
    training: Start,
    ranks: Ranks,
    record_property: Callable[[str, object], None],
) -> None:
    run = training(2)
    run.start(HEARTBEAT)
    stopped = run.rank("node2")
    run.kill(stopped, signal.SIGSTOP)
    run.wait_until(lambda: (run.save_dir / "ended.json").exists(), HEARTBEAT_SECONDS + END_SECONDS)
    record_property("seconds until it is named", time.monotonic() - run.begin)
    assert time.monotonic() - run.begin >= HEARTBEAT_SECONDS
    run.wait_until(lambda: not run.running("deepspeed.launcher.launch", "node1"), END_SECONDS)
    if then == "continued":
        run.kill(stopped, signal.SIGCONT)
        record_property("seconds", run.end())
    else:
        run.signal_terminal(signal.SIGINT)
        # DeepSpeed's launcher gives it 30 seconds, and then kills it.
        seconds = run.end(30 + END_SECONDS)
        record_property("seconds", seconds)
        assert seconds > 25
    code, output = run.said()
    assert code == 1
    run.check_failed(output, NO_ANSWER.format(1, "node2"))
    run.check_nothing_is_lost(ranks)


# ------------------------------------------------------------------------------------------ network


def test_a_host_that_is_cut_off_ends_the_run_by_its_time_out(
    training: Start, ranks: Ranks, record_property: Callable[[str, object], None]
) -> None:
    """On both sides. The shared folder is gone from that host too; ssh is told to ask whether the host is there."""
    run = training(2)
    run.start(
        HEARTBEAT,
        env={"PDSH_SSH_ARGS_APPEND": "-oServerAliveInterval=2 -oServerAliveCountMax=2"},
    )
    folder = str(run.save_dir)
    assert run.hosts.run("node2", "mount", "-t", "tmpfs", "none", folder).returncode == 0
    run.begin = time.monotonic()
    run.hosts.link("node2", up=False)
    limit = HEARTBEAT_SECONDS + 2 * END_SECONDS
    seconds = run.end(limit, "node1")
    while any("sshd" not in command for command in run.left("node2").get("node2", [])):
        assert time.monotonic() - run.begin < limit, run.left()
        time.sleep(0.05)
    assert seconds >= HEARTBEAT_SECONDS
    record_property("seconds", time.monotonic() - run.begin)
    code, output = run.said()
    assert code == 255
    run.check_failed(output, NO_ANSWER.format(1, "node2"))
    assert re.search(NO_ANSWER.format(0, "node1")[1:], run.log("logs/rank-1.log"))
    run.hosts.link("node2", up=True)
    run.begin = time.monotonic()
    run.end(60)  # sshd notices when it next tries to send
    run.check_nothing_is_lost(ranks)


# -------------------------------------------------------------------------------- asked to end, or not


def test_ctrl_c_on_three_hosts(
    training: Start, ranks: Ranks, record_property: Callable[[str, object], None]
) -> None:
    """DeepSpeed's runner, which has it, may also end other people's runs: supervise does not."""
    run = training(3)
    run.start()
    run.signal_terminal(signal.SIGINT)
    record_property("seconds", run.end())
    code, output = run.said()
    assert code == 1  # the runner's, whatever the ranks say
    assert "| ERROR | xlm_ds |" not in output
    run.check_saved()
    run.check_nothing_is_lost(ranks)


def test_ctrl_c_on_three_hosts_under_supervise(
    training: Start, ranks: Ranks, record_property: Callable[[str, object], None]
) -> None:
    run = training(3)
    run.start(before=SUPERVISE)
    others = [run.start_another(host) for host in run.hosts.names]
    run.signal_terminal(signal.SIGINT)
    record_property("seconds", run.end())
    code, output = run.said()
    assert code == 130
    assert "Traceback" not in output
    assert "| ERROR | xlm_ds |" not in output
    assert saved_update(run.save_dir) == run.ended()["update"]
    assert all(Path(f"/proc/{other}").exists() for other in others)
    run.check_nothing_is_lost(ranks)


@pytest.mark.parametrize("lost", ["the terminal", "pdsh", "an ssh"])
def test_what_leads_to_a_rank_is_lost(
    lost: str,
    training: Start,
    ranks: Ranks,
    record_property: Callable[[str, object], None],
) -> None:
    run = training(2)
    run.start()
    if lost == "the terminal":
        run.signal_terminal(signal.SIGHUP)
    elif lost == "pdsh":
        run.kill(run.client("pdsh "), signal.SIGKILL)
    else:
        run.kill(run.client("ssh -oConnectTimeout=10 -2 -a -x node2 "), signal.SIGKILL)
    record_property("seconds", run.end())
    code, output = run.said()
    record_property("exit code", code)
    assert "Traceback" not in output
    assert "| ERROR | xlm_ds |" not in output
    run.check_saved()
    assert "stopped by the loss of its connection to the launcher (rank " in run.log()
    run.check_nothing_is_lost(ranks)


def test_after_pdsh_is_killed_supervise_lets_the_run_save_and_starts_it_again(
    training: Start, ranks: Ranks, record_property: Callable[[str, object], None]
) -> None:
    run = training(2)
    run.start(before=SUPERVISE)
    run.kill(run.client("pdsh "), signal.SIGKILL)
    run.wait_until(lambda: "ended: " in run.log("supervise.log"), END_SECONDS)
    record_property("seconds", time.monotonic() - run.begin)
    assert "stopped and saved (exit code 75)" in run.log("supervise.log")
    run.wait_until(lambda: run.log().count("going on from ") == 1)
    run.signal_terminal(signal.SIGTERM)
    run.end()
    code, output = run.said()
    assert code == 75
    assert "Traceback" not in output
    run.check_nothing_is_lost(ranks)


@pytest.mark.ci
def test_sigterm_to_the_launcher(
    training: Start, ranks: Ranks, record_property: Callable[[str, object], None]
) -> None:
    run = training(2)
    run.start()
    (runner,) = (p.pid for p in run.hosts.processes("node1") if "bin/deepspeed " in p.command)
    run.kill(runner, signal.SIGTERM)
    record_property("seconds", run.end())
    code, output = run.said()
    assert code == 1  # the runner's, whatever the ranks say
    assert "Traceback" not in output
    assert "| ERROR | xlm_ds |" not in output
    run.check_saved()
    run.check_nothing_is_lost(ranks)


# --------------------------------------------------------------------------------------- a slow host


def test_a_slow_host_is_named(
    training: Start, record_property: Callable[[str, object], None]
) -> None:
    """As cpulimit slows a process: it is stopped for most of the time."""
    run = training(2)
    run.start()
    slow, done = run.rank("node2"), threading.Event()

    def limit() -> None:
        while not done.is_set():
            os.kill(slow, signal.SIGSTOP)
            time.sleep(0.08)
            os.kill(slow, signal.SIGCONT)
            time.sleep(0.02)

    run.begin = time.monotonic()
    limiting = threading.Thread(target=limit)
    limiting.start()
    try:
        run.wait_until(lambda: "node2 is slow: its ranks work " in run.log(), 60)
        record_property("seconds until it is named", time.monotonic() - run.begin)
    finally:
        done.set()
        limiting.join()
    assert "node1 is slow" not in run.log()
    run.signal_terminal(signal.SIGTERM)
    run.end()
