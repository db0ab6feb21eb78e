"""launch/ holds no logic, and what it holds can be started as it stands."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hosts import Hosts
from test_preflight import TRAINING, gone
from xlm_ds.config import TrainConfig
from xlm_ds.flags import parse
from xlm_ds.launching import read_hostfile

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SHELL = [LAUNCH / name for name in ("mpi.sh", "torchrun.sh", "slurm.sbatch")]
START = r"(?:-m|--module)[= ]xlm_ds\.(\w+)((?: +(?:-[\w-]+|[\w./]+|\"\$[01]\"))*)"


LONG = """
max_update = 100000
global_batch_tokens = 256
"""


def test_all_examples_are_tested() -> None:
    others = {LAUNCH / name for name in ("README.md", "hostfile", "run.toml")}
    assert set(LAUNCH.iterdir()) == {*SHELL, *others}


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_scripts_are_what_their_shell_reads(path: Path) -> None:
    shell = path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("#!/bin/")
    assert shell in ("sh", "bash")
    checked = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    "path", [*SHELL, LAUNCH / "hostfile", LAUNCH / "README.md"], ids=lambda p: p.name
)
def test_flags_of_ours_are_there(path: Path) -> None:
    """Those that follow one of our stages."""
    started = re.findall(START, path.read_text(encoding="utf-8"))
    assert started
    for stage, words in started:
        shown = subprocess.run(
            [sys.executable, "-m", f"xlm_ds.{stage}", "--help"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        for flag in re.findall(r"--[\w-]+", words):
            assert re.search(rf"{flag}\b", shown.stdout), f"{stage} has no {flag}"
        if path.suffix != ".md":
            assert "--config" in words, "values belong into the TOML"


def test_the_toml_and_the_hostfile_are_read() -> None:
    config = parse(TrainConfig, ["--config", str(LAUNCH / "run.toml")])
    assert config.run.save_interval_updates == 1000
    assert read_hostfile(LAUNCH / "hostfile") == [("localhost", 1)]


SLURM = {
    # Plays srun of two tasks: their highest exit code.
    "srun": """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_NTASKS=2
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first; code=$?
wait $second || code=$?
exit $code
""",
    "scontrol": '#!/bin/sh\n[ "$1" = show ] && echo node1 && echo node2 && exit\necho "$@" >> requeued\n',
    "python": '#!/bin/sh\necho "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*" >> started\nexit $CODE\n',
}


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_the_slurm_job_is_requeued_when_it_was_preempted(code: int, tmp_path: Path) -> None:
    for name, text in SLURM.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    result = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "a b.toml"],
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "CODE": str(code),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
        },
        check=False,
    )
    assert result.returncode == code
    started = sorted((tmp_path / "started").read_text(encoding="utf-8").splitlines())
    words = "2 node1 -m xlm_ds.train --config a b.toml"
    assert started == [f"0 0 {words}", f"1 1 {words}"]
    requeued = tmp_path / "requeued"
    assert (requeued.read_text(encoding="utf-8") if requeued.exists() else "") == (
        "requeue 7\n" if code == 75 else ""
    )


@pytest.mark.faults
def test_mpirun_and_torchrun_start_a_run_on_two_hosts(
    start_hosts: Callable[[int], Hosts], tiny_data: Path, tmp_path: Path
) -> None:
    hosts = start_hosts(2)
    first, second = hosts.names
    job = tmp_path / "job"

    def run_toml(name: str) -> None:
        toml = TRAINING.format(data=tiny_data, run=job / name)
        (job / "run.toml").write_text(toml, encoding="utf-8")

    run_toml("mpi")
    words = [f"{first},{second}", "2", "1", "run.toml"]
    script = ["sh", str(LAUNCH / "mpi.sh"), *words]
    result = hosts.run(first, *script, cwd=job, env={"MASTER_ADDR": first})
    assert result.returncode == 0, result.stderr
    assert "2 hosts agree" in result.stdout
    assert "done: 3 updates" in result.stdout

    run_toml("torchrun")
    elastic = {"HEAD": first, "SLOTS": "1", "MIN": "2", "MAX": "2"}
    script = ["sh", str(LAUNCH / "torchrun.sh"), "run.toml"]
    other = hosts.popen(second, *script, cwd=job, env=elastic)
    result = hosts.run(first, *script, cwd=job, env=elastic)
    assert result.returncode == 0, result.stderr
    assert other.wait(timeout=60) == 0
    assert "2 hosts agree" in result.stdout
    assert "done: 3 updates" in result.stdout
    assert gone(hosts, first)
    assert gone(hosts, second)


@pytest.mark.faults
def test_under_torchrun_hosts_leave_and_join(
    start_hosts: Callable[[int], Hosts], tiny_data: Path, tmp_path: Path
) -> None:
    """With the same batch on one host as on two."""
    hosts = start_hosts(2)
    first, second = hosts.names
    job = tmp_path / "job"
    log = job / "run" / "train.log"
    toml = (
        TRAINING.format(data=tiny_data, run=job / "run")
        .replace("max_update = 3", LONG)
        .replace("log_interval = 1", "log_interval = 100")
    )
    (job / "run.toml").write_text(toml, encoding="utf-8")
    elastic = {"HEAD": first, "SLOTS": "1", "MIN": "1", "MAX": "2"}
    script = ["sh", str(LAUNCH / "torchrun.sh"), "run.toml"]

    def said(what: str) -> list[str]:
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return [line for line in lines if what in line]

    def wait(what: str, times: int = 1) -> None:
        give_up = time.monotonic() + 120
        while len(said(what)) < times:
            assert time.monotonic() < give_up, f"{what}: {log.read_text(encoding='utf-8')}"
            time.sleep(0.1)

    for host in hosts.names:
        hosts.popen(host, *script, cwd=job, env=elastic)
    wait("| saved ")
    for process in hosts.processes(second):
        os.kill(process.pid, signal.SIGKILL)
    wait("going on from ")
    hosts.popen(second, *script, cwd=job, env=elastic)
    wait("| batch: ", times=3)
    assert len(said("going on from ")) == 2
    ranks = [line.split(" x ")[-1].split(" ranks")[0] for line in said("| batch: ")]
    assert ranks == ["2", "1", "2"]
    assert all("| batch: 8 samples " in line for line in said("| batch: "))
    saved = len(said("| saved "))
    wait("| saved ", times=saved + 1)
    for host in hosts.names:
        for process in hosts.processes(host):
            if "torchrun --nnodes" in process.command:
                os.kill(process.pid, signal.SIGTERM)
    assert all(gone(hosts, host, 20) for host in hosts.names)
    assert len(said("stopped by SIGTERM")) == 2  # when the second joined, and now
