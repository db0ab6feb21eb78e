"""What a run of two ranks makes of the faults of docs/faults.md: disks, gradients, data, ports, folders, users.

The ranks are started here as a launcher would start them, with faults in their own code: `FAULT` of a rank is Python
that is run before training, with the rank's number as RANK.
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from hosts import Hosts, require_hosts
from test_digests import ranks_of
from xlm_ds import checkpoint, prove
from xlm_ds.deepspeed_config import CONFIG_DIRECTORY
from xlm_ds.digests import read_lines

ROOT = Path(__file__).parent.parent
PROGRAM = """
import os, sys
from xlm_ds.log import run_stage
from xlm_ds import checkpoint, train
RANK = int(os.environ["RANK"])
{fault}
sys.exit(run_stage("train", train.main))
"""
SHAPE = [
    "--encoder-layers=1",
    "--encoder-embed-dim=32",
    "--encoder-ffn-embed-dim=64",
    "--encoder-attention-heads=4",
    "--tokens-per-sample=32",
    "--max-tokens=128",
    "--lr=1e-3",
    "--lr-scheduler=inverse_sqrt",  # a validation moves no rate
    "--log-interval=1",
    "--digest-interval=1",
    "--save-interval-updates=2",
    "--max-update=6",
]
LIMIT_SECONDS = 100  # of any run here; an undisturbed one takes about 10


class Ended(NamedTuple):
    codes: list[int]
    said: list[str]  # by each rank, on both of its streams
    seconds: float

    @property
    def errors(self) -> list[str]:
        """What all ranks have said was wrong; a traceback is none."""
        lines = "\n".join(self.said).splitlines()
        assert "Traceback (most recent call last):" not in lines, "\n".join(lines)
        return [line for line in lines if line.startswith("train: ") or "| ERROR |" in line]


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def program(fault: str = "") -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(fault=fault)]


def environment(rank: int, port: str, *, hosts: bool = False) -> dict[str, str]:
    """What a launcher tells a rank of two on one host, or of one each on two."""
    local_rank = 0 if hosts else rank
    told = {
        **{"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    }
    return {**os.environ, **told}


class Started:
    """Ranks that are at work."""

    def __init__(self, ranks: "list[subprocess.Popen[str]]") -> None:
        self._ranks, self._began = ranks, time.monotonic()

    def ended(self) -> Ended:
        """Waits for all; they are killed if that takes too long, and the test fails."""
        try:
            give_up = time.monotonic() + LIMIT_SECONDS
            said = [rank.communicate(timeout=give_up - time.monotonic()) for rank in self._ranks]
        finally:
            for rank in self._ranks:
                if rank.poll() is None:
                    os.killpg(rank.pid, signal.SIGKILL)
                    rank.communicate()
        codes = [rank.returncode for rank in self._ranks]
        seconds = time.monotonic() - self._began
        return Ended(codes, [out + (err or "") for out, err in said], seconds)


def start_here(
    arguments: list[str],
    fault: str = "",
    folders: tuple[Path, Path] | None = None,
    port: str = "",
) -> Started:
    """Two ranks, each a child of this process; with `folders` to start in, as if on two hosts."""
    port = port or free_port()
    ranks = [
        subprocess.Popen(
            [*program(fault), *arguments],
            cwd=folder,
            env=environment(rank, port, hosts=folders is not None),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank, folder in enumerate(folders or (ROOT, ROOT))
    ]
    return Started(ranks)


def start_on(hosts: Hosts, arguments: list[str], fault: str = "") -> Started:
    """A rank on each of two hosts."""
    ranks = []
    for rank, name in enumerate(hosts.names):
        told = environment(rank, "29500", hosts=True) | {"MASTER_ADDR": hosts.addresses[0]}
        ranks.append(hosts.popen(name, *program(fault), *arguments, env=told))
    return Started(ranks)


Start = Callable[..., Started]


@pytest.fixture
def start(tiny_data: Path, tmp_path: Path) -> Start:
    """Starts two ranks in the folder `run`, with a fault and more flags."""

    def call(fault: str = "", *flags: str, save_dir: Path | None = None) -> Started:
        run = save_dir or tmp_path / "run"
        return start_here([str(tiny_data), f"--save-dir={run}", *SHAPE, *flags], fault)

    return call


@pytest.fixture(scope="session")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without faults."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = start_here([str(tiny_data), f"--save-dir={folder}", *SHAPE]).ended()
    assert ended.codes == [0, 0], ended.said
    return folder


def check_nothing_is_lost(run: Path, undisturbed: Path) -> None:
    """Both have ended: the same samples and the same weights after every update."""
    met = prove.compare(run, undisturbed)
    assert (met.end_a, met.end_b, met.parameters) == (6, 6, 6)
    assert (met.differs, met.parameters_differ) == (None, None)
    assert not list(run.glob(".*"))


def whole_checkpoint(run: Path) -> int:
    """The update of the last one, all its files checked."""
    folder = run / checkpoint.LAST
    manifest = checkpoint.read_manifest(folder)
    checkpoint.check_files(folder, manifest, manifest["sha256"])
    return checkpoint.read_progress(manifest).update


def end_of(run: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((run / "ended.json").read_text(encoding="utf-8"))
    return content


# ------------------------------------------------------------------------------------------- disks

# From the second save on. `limit` is put on the size of files of one rank: the kernel writes up to it, then refuses.
FULL_DISK = """
if RANK == {rank}:
    import resource
    write = checkpoint._write_share
    def full(folder, *rest):
        if "_4." in folder.name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
        return write(folder, *rest)
    checkpoint._write_share = full
"""
FAILING_DISK = """
if RANK == {rank}:
    import errno
    fsync = os.fsync
    def fail(descriptor):
        name = os.readlink(f"/proc/self/fd/{{descriptor}}")
        if "checkpoint_1_4" in name and "{file}" in name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)
    os.fsync = fail
"""
DISKS = {
    "full": (1, "", "weight-00002-of-00002.safetensors"),
    "fsync": (1, "exp_avg-00002", "exp_avg-00002-of-00002.safetensors"),
    "manifest": (0, "manifest.json", "manifest.json"),
}


@pytest.mark.faults
@pytest.mark.parametrize("what", DISKS)
def test_a_rank_that_cannot_write_its_share_is_named(
    what: str, start: Start, tmp_path: Path, undisturbed: Path
) -> None:
    rank, file, named = DISKS[what]
    fault = FULL_DISK if what == "full" else FAILING_DISK
    ended = start(fault.format(rank=rank, file=file)).ended()
    assert ended.codes == [2, 2], ended.said
    (error,) = ended.errors
    assert error.startswith(f"train: error: rank {rank} on {socket.gethostname()}: "), error
    assert named in error
    assert re.search("File too large|Input/output error", error)
    assert (end_of(tmp_path / "run")["rank"], end_of(tmp_path / "run")["exit_code"]) == (rank, 2)
    assert whole_checkpoint(tmp_path / "run") == 2
    ended = start().ended()
    assert ended.codes == [0, 0], ended.said
    check_nothing_is_lost(tmp_path / "run", undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A folder with room for so many kilobytes; another call makes it larger."""
    require_hosts()  # so root
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        size = f"size={kilobytes}k" + (",remount" if folder.is_mount() else "")
        command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
        subprocess.run(command, check=True)
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("kilobytes", [300, 1000])
def test_a_disk_that_is_full_for_all_ranks_ends_the_run_with_one_sentence(
    kilobytes: int, small_disk: Callable[[int], Path], start: Start, undisturbed: Path
) -> None:
    """In the first save, or in the third; then there is more room."""
    run = small_disk(kilobytes) / "run"
    ended = start(save_dir=run).ended()
    assert ended.codes == [2, 2], ended.said
    (error,) = ended.errors
    assert re.match(rf"train: error: rank [01] on {socket.gethostname()}: ", error), error
    assert str(run) in error
    assert "o space left on device" in error
    if (run / checkpoint.LAST).exists():
        assert whole_checkpoint(run) in (2, 4)
    small_disk(100_000)
    ended = start(save_dir=run).ended()
    assert ended.codes == [0, 0], ended.said
    check_nothing_is_lost(run, undisturbed)


# ------------------------------------------------------------------------- a folder that is gone

# The ranks wait after some updates until they are told to go on; no save is under way then.
PAUSED = """
import time
from pathlib import Path
from xlm_ds.engine import Engine
step, begin, updates = Engine.step, checkpoint.Saver.begin, [0]
def begin_and_finish(self, *arguments):
    begin(self, *arguments)
    self.finish()
checkpoint.Saver.begin = begin_and_finish
def paused(self, lr):
    step(self, lr)
    updates[0] += 1
    if updates[0] in (3, 5):
        Path({folder!r}, f"{{updates[0]}}-{{RANK}}").touch()
        while not Path({folder!r}, f"{{updates[0]}}-go").exists():
            time.sleep(0.02)
Engine.step = paused
"""
ONE_SAVE = "--save-interval-updates=6"  # else the second is after update 4


class Pauses:
    def __init__(self, folder: Path) -> None:
        self.folder = folder / "pauses"
        self.folder.mkdir()
        self.fault = PAUSED.format(folder=str(self.folder))

    def reached(self, update: int) -> None:
        give_up = time.monotonic() + LIMIT_SECONDS
        while not all((self.folder / f"{update}-{rank}").exists() for rank in range(2)):
            assert time.monotonic() < give_up, "the ranks have not come to that"
            time.sleep(0.02)

    def go_on(self, update: int) -> None:
        (self.folder / f"{update}-go").touch()


@pytest.mark.faults
@pytest.mark.parametrize("save", [False, True])
def test_the_runs_folder_is_gone_for_two_updates(
    save: bool, start: Start, tmp_path: Path, undisturbed: Path
) -> None:
    """Moved away after update 3 and back after update 5, with a save between or without."""
    run, away, pauses = tmp_path / "run", tmp_path / "away", Pauses(tmp_path)
    if save:
        pauses.go_on(5)
    started = start(pauses.fault, *([] if save else [ONE_SAVE]))
    pauses.reached(3)
    run.rename(away)
    pauses.go_on(3)
    if save:
        ended = started.ended()
        assert ended.codes == [2, 2], ended.said
        (error,) = ended.errors
        assert error.startswith(f"train: error: {run}: is gone (unmounted, moved or removed)")
        assert not run.exists()
        away.rename(run)
        assert whole_checkpoint(run) == 2
        ended = start().ended()
    else:
        pauses.reached(5)
        assert not run.exists()
        away.rename(run)
        pauses.go_on(5)
        ended = started.ended()
        assert ended.said[0].count("digests.jsonl: No such file or directory; going on") == 1
        assert ended.said[0].count("digests.jsonl can be written again") == 1
        assert ended.errors == []
    assert ended.codes == [0, 0], ended.said
    check_nothing_is_lost(run, undisturbed)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [r["update"] for r in map(json.loads, lines) if r["kind"] == "train"]
    assert sorted(set(logged)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.faults
@pytest.mark.parametrize("who", ["second", "all"])
@pytest.mark.parametrize("save", [False, True])
def test_a_shared_folder_is_unmounted_for_two_updates(
    save: bool,
    who: str,
    start_hosts: Callable[[int], Hosts],
    tiny_data: Path,
    tmp_path: Path,
    undisturbed: Path,
) -> None:
    """On one host or on both. What is under the mount stays empty, as what was written there would be hidden."""
    hosts, pauses = start_hosts(2), Pauses(tmp_path)
    shared, under = tmp_path / "shared", tmp_path / "job" / "run"
    shared.mkdir()
    under.mkdir()
    unmounted = hosts.names if who == "all" else hosts.names[1:]

    def mount(*names: str) -> None:
        for name in names:
            assert hosts.run(name, "mount", "--bind", str(shared), str(under)).returncode == 0

    mount(*hosts.names)
    if save:
        pauses.go_on(5)
    arguments = [str(tiny_data), f"--save-dir={under}", *SHAPE]
    started = start_on(hosts, [*arguments, *([] if save else [ONE_SAVE])], pauses.fault)
    pauses.reached(3)
    for name in unmounted:
        assert hosts.run(name, "umount", "--lazy", str(under)).returncode == 0
    pauses.go_on(3)
    if save:
        ended = started.ended()
        assert ended.codes == [2, 2], ended.said
        (error,) = ended.errors
        named = f"{under}: is gone (" if who == "all" else "rank 1 on node2: cannot write"
        assert error.startswith(f"train: error: {named}"), error
        assert str(under) in error
        assert whole_checkpoint(shared) == 2
        mount(*unmounted)
        ended = start_on(hosts, arguments).ended()
    else:
        pauses.reached(5)
        mount(*unmounted)
        pauses.go_on(5)
        ended = started.ended()
        assert ended.errors == []
    assert ended.codes == [0, 0], ended.said
    assert list(under.iterdir()) == []
    check_nothing_is_lost(shared, undisturbed)


# --------------------------------------------------------------------------------------- gradients

# One number of one parameter's gradient, on one rank, in some updates; and each rank's weights after each update.
BAD_GRADIENT = """
import hashlib, math, torch
from xlm_ds.engine import Engine
BAD = {bad}
backward, step, updates = Engine.backward, Engine.step, [0]
def spoilt(gradient):
    gradient = gradient.clone()
    gradient.view(-1)[-1] = BAD[updates[0]]
    return gradient
def poisoned(self, loss):
    updates[0] += 1
    if RANK == 1 and updates[0] in BAD:
        parameters = list(self._engine.module.parameters())
        hook = parameters[updates[0] % len(parameters)].register_hook(spoilt)
        backward(self, loss)
        hook.remove()
    else:
        backward(self, loss)
def noted(self, lr):
    step(self, lr)
    weights = [p.detach().float().numpy().tobytes() for p in self._engine.module.parameters()]
    print("weights", updates[0], hashlib.sha256(b"".join(weights)).hexdigest(), flush=True)
Engine.backward, Engine.step = poisoned, noted
"""
STAGES = ["zero1_fp32", "zero1_bf16", "zero2_bf16", "zero3_bf16"]


def json_of(stage: str) -> str:
    return f"--deepspeed-config={CONFIG_DIRECTORY / f'{stage}.json'}"


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(
    stage: str, start: Start, tmp_path: Path
) -> None:
    fault = BAD_GRADIENT.format(bad="{2: math.nan, 4: math.inf}")
    ended = start(fault, json_of(stage)).ended()
    assert ended.codes == [0, 0], ended.said
    run = tmp_path / "run"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    figures = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    assert [r.get("skipped_updates", 0) for r in figures] == [0, 1, 1, 2, 2, 2]
    weights = [line.parameters for line in read_lines(run)]
    changed = [now != before for before, now in itertools.pairwise(weights)]
    assert changed == [False, True, False, True, True]
    if stage != "zero3_bf16":  # where there is one copy of each weight, and no rank has them all
        of_ranks = [re.findall(r"^weights .*", said, re.MULTILINE) for said in ended.said]
        assert len(of_ranks[0]) == 6
        assert of_ranks[0] == of_ranks[1]
    manifest = checkpoint.read_manifest(run / checkpoint.LAST)
    assert checkpoint.read_progress(manifest).skipped_updates == 2


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
def test_too_many_skipped_updates_end_both_ranks_with_one_sentence(
    stage: str, start: Start, tmp_path: Path, undisturbed: Path
) -> None:
    fault = BAD_GRADIENT.format(bad="dict.fromkeys((3, 4, 5), math.nan)")
    ended = start(fault, "--max-skipped-updates=3", json_of(stage)).ended()
    assert ended.codes == [2, 2], ended.said
    (error,) = ended.errors
    assert "3 updates in a row were skipped, as their gradient was not finite: " in error
    assert "the first is update 3, of the samples 16 to 23" in error
    assert end_of(tmp_path / "run")["update"] == 5
    assert whole_checkpoint(tmp_path / "run") in (2, 4)  # that of 4 may be under way
    ended = start("", json_of(stage)).ended()
    assert ended.codes == [0, 0], ended.said
    met = prove.compare(tmp_path / "run", undisturbed)
    assert (met.end_a, met.differs) == (6, None)


# -------------------------------------------------------------------------------------------- data


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


@pytest.mark.faults
def test_a_rank_with_other_data_is_named_before_the_first_update(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Two hosts whose folder `data` differs in a token."""
    hosts = (tmp_path / "node1", tmp_path / "node2")
    for host in hosts:
        shutil.copytree(tiny_data, host / "data")
    flip(hosts[1] / "data" / "train.en.bin", 100)
    run = tmp_path / "run"
    ended = start_here(["data", f"--save-dir={run}", *SHAPE], folders=hosts).ended()
    assert ended.codes == [2, 2], ended.said
    (error,) = ended.errors
    name = socket.gethostname()
    sentence = f"{name} (rank 1): has other data than {name} (rank 0): train.en.bin; "
    assert error.startswith(f"train: error: {sentence}"), error
    assert end_of(run)["update"] == 0
    assert {path.name for path in run.iterdir()} == {".run.lock", "ended.json", "logs", "train.log"}
    shutil.copy(hosts[0] / "data" / "train.en.bin", hosts[1] / "data")
    ended = start_here(["data", f"--save-dir={run}", *SHAPE], folders=hosts).ended()
    assert ended.codes == [0, 0], ended.said


# ------------------------------------------------------------------------------------------- ports


@contextlib.contextmanager
def port_in_use() -> Iterator[str]:
    """By a program that never answers."""
    with socket.create_server(("", 0)) as listener:
        yield str(listener.getsockname()[1])


@pytest.mark.faults
def test_a_port_in_use_is_a_sentence_and_nobody_waits_longer_than_told(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Without a launcher, which would end the second rank."""
    with port_in_use() as port:
        arguments = [str(tiny_data), f"--save-dir={tmp_path / 'run'}", *SHAPE]
        ended = start_here([*arguments, "--heartbeat-timeout=5"], port=port).ended()
    assert ended.codes == [2, 1], ended.said
    first, second = ended.errors
    assert first.startswith(f"train: error: port {port} of {socket.gethostname()} is in use")
    host = socket.gethostname()
    assert f"rank 1 on {host} has not met rank 0 at port {port} of 127.0.0.1 in 5 s: " in second
    assert "Traceback" not in "".join(ended.said)
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_port_in_use_ends_every_launcher(launcher: str, tiny_data: Path, tmp_path: Path) -> None:
    """torchrun finds it itself, in words of its own."""
    (tmp_path / "hostfile").write_text("localhost slots=2\n", encoding="utf-8")
    scripts = Path(sys.executable).parent
    with port_in_use() as port:
        where = {
            "deepspeed": ["--hostfile=hostfile", "--no_ssh_check", "--master_addr=127.0.0.1"],
            "torchrun": ["--nproc-per-node=2"],
        }[launcher]
        module = ["--module" if launcher == "deepspeed" else "-m", "xlm_ds.train"]
        words = [*where, f"--master_port={port}", *module, str(tiny_data), "--save-dir=run", *SHAPE]
        result = subprocess.run(
            [str(scripts / launcher), *words],
            cwd=tmp_path,
            env=without_rank() | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_SECONDS,
        )
    said = result.stdout + result.stderr
    if launcher == "deepspeed":
        assert result.returncode == 2, said
        assert said.count(f"port {port} of {socket.gethostname()} is in use, perhaps by") == 1
        assert "Traceback" not in said
        assert "had not saved" not in said
    else:
        assert result.returncode == 1, said
        assert f"port: {port}, useIpv6: false, code: -98, name: EADDRINUSE" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_of_a_killed_deepspeed_on_one_host_save_and_end(
    number: signal.Signals,
    tiny_data: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Its launch.py lives on, whose end alone DeepSpeed's ranks could notice."""
    (tmp_path / "hostfile").write_text("localhost slots=2\n", encoding="utf-8")
    run = tmp_path / "run"
    where = ["--hostfile=hostfile", "--no_ssh_check", "--master_addr=127.0.0.1"]
    training = ["xlm_ds.train", str(tiny_data), f"--save-dir={run}", *SHAPE, "--max-update=1000000"]
    deepspeed = Path(sys.executable).parent / "deepspeed"
    with subprocess.Popen(
        [str(deepspeed), *where, f"--master_port={free_port()}", "--module", *training],
        cwd=tmp_path,
        env=without_rank() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as runner:
        give_up = time.monotonic() + LIMIT_SECONDS
        while not (run / checkpoint.LAST).exists():
            assert runner.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.05)
        ranks = ranks_of(run)
        assert set(ranks) == {0, 1}
        began = time.monotonic()
        runner.send_signal(number)
        while ranks_of(run) and time.monotonic() - began < 15:
            time.sleep(0.05)
        record_property("seconds", time.monotonic() - began)
    try:
        assert time.monotonic() - began < 10
    finally:
        for pid in ranks_of(run).values():
            os.kill(pid, signal.SIGKILL)
    assert end_of(run)["exit_code"] == 75
    log = (run / "train.log").read_text(encoding="utf-8")
    assert "stopped by the end of deepspeed (rank" in log
    assert whole_checkpoint(run) == end_of(run)["update"]


def without_rank() -> dict[str, str]:
    """Of a launcher, which tells its ranks itself."""
    told = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in os.environ.items() if k not in told} | {"OMP_NUM_THREADS": "1"}


@pytest.mark.faults
def test_a_port_in_use_on_the_first_host_is_found_by_preflight_and_ends_the_run(
    start_hosts: Callable[[int], Hosts], tiny_data: Path, tmp_path: Path
) -> None:
    """The second host's rank can know it only by waiting."""
    hosts = start_hosts(2)
    first, second = hosts.names
    listen = "import socket, time; s = socket.create_server(('', 29500)); time.sleep(1000)"
    hosts.popen(first, sys.executable, "-c", listen)
    while "0.0.0.0:29500" not in hosts.run(first, "ss", "-ltn").stdout:
        time.sleep(0.05)
    job = tmp_path / "job"
    words = [str(tiny_data), "--save-dir=run", *SHAPE, "--heartbeat-timeout=15"]
    preflight = [sys.executable, "-m", "xlm_ds.preflight", "--hostfile=hostfile", *words]
    result = hosts.run(first, *preflight, cwd=job)
    assert result.returncode == 2
    error = f"preflight: error: {first}: port 29500 cannot be used: address already in use"
    assert result.stderr.startswith(error), result.stderr
    run = ["deepspeed", "--hostfile=hostfile", "--module", "xlm_ds.train", *words]
    result = hosts.run(first, *run, cwd=job, timeout=LIMIT_SECONDS)
    said = result.stdout + result.stderr
    assert result.returncode != 0
    assert said.count(f"train: error: port 29500 of {first} is in use") == 1, said
    assert said.count(f"rank 1 on {second} has not met rank 0 at port 29500") == 1
    assert "Traceback" not in said


# ------------------------------------------------------------------------------------------- users

SECOND_USER = 12345


@pytest.mark.faults
def test_two_runs_of_two_users_on_one_machine(tiny_data: Path) -> None:
    """At once, of the same data, which neither may write; the second user has no name and no group of the first."""
    require_hosts()  # so root
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # tmp_path is root's alone
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(tiny_data, folder / "data")
        for path in (folder / "data", *(folder / "data").iterdir()):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = owned_by_the_second()
        users = [in_the_name_of(None, folder), in_the_name_of(SECOND_USER, folder)]
        try:
            ended = Started(users).ended()
            assert ended.codes == [0, 0], ended.said
            assert ended.errors == []
            met = prove.compare(folder / "first" / "run", folder / "second" / "run")
            assert (met.end_a, met.differs, met.parameters_differ) == (6, None, None)
            # What the second user's run has left in shared folders is named by chance, or after its user.
            for path in owned_by_the_second() - before:
                shutil.rmtree(path)
                assert path.name.startswith("torchelastic_") or str(SECOND_USER) in path.name
        finally:
            (folder / "data").chmod(0o755)


def owned_by_the_second() -> set[Path]:
    return {
        path
        for shared in (Path("/tmp"), Path("/dev/shm"))
        for path in shared.iterdir()
        if path.lstat().st_uid == SECOND_USER
    }


def in_the_name_of(user: int | None, folder: Path) -> "subprocess.Popen[str]":
    """torchrun with two ranks, which takes a free port, in a home of the user's (None: of this process)."""
    home = folder / ("first" if user is None else "second")
    home.mkdir()
    command = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "xlm_ds.train"]
    arguments = [str(folder / "data"), f"--save-dir={home / 'run'}", *SHAPE]
    become = []
    if user is not None:
        os.chown(home, user, user)
        # May read what is under a home of root's, as an interpreter may be, and nothing more than others.
        may_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *may_read]
    return subprocess.Popen(
        [*become, *command, *arguments],
        cwd=home,
        env={
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **{"HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


# ------------------------------------------------------------------------------------- checkpoints


@pytest.mark.faults
@pytest.mark.parametrize("how", ["flipped", "short", "gone"])
def test_a_damaged_share_is_named_and_the_run_goes_on_from_the_one_before(
    how: str, start: Start, tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    share = run / "checkpoint_1_6" / "weight-00002-of-00002.safetensors"
    if how == "flipped":
        flip(share, share.stat().st_size // 2)
    elif how == "short":
        share.write_bytes(share.read_bytes()[:-5])
    else:
        share.unlink()
    ended = start().ended()
    assert ended.codes == [0, 0], ended.said
    said = [line for line in "\n".join(ended.said).splitlines() if share.name in line]
    assert len(said) == 1, said
    assert f"{share}: " in said[0]
    assert "WARNING" in said[0]
    assert "going on from checkpoint_1_4, the one before" in said[0]
    assert "going on from" in ended.said[0]
    assert whole_checkpoint(run) == 6
    check_nothing_is_lost(run, undisturbed)


# A save takes a second; a rank is killed somewhere in it, as by kill -9.
KILLED = """
import random, threading, time
moment = random.Random({seed})
victim, seconds = moment.randrange(2), moment.uniform(0, 1.2)
write, put = checkpoint._write_share, checkpoint._put_in_place
def slow_write(folder, *rest):
    if "_4." in folder.name:
        if RANK == victim:
            threading.Timer(seconds, os.kill, (os.getpid(), 9)).start()
        time.sleep(0.3)
        sha256 = write(folder, *rest)
        time.sleep(0.3)
        return sha256
    return write(folder, *rest)
def slow_put(temporary, folder):
    time.sleep(0.2)
    put(temporary, folder)
    time.sleep(0.2)
checkpoint._write_share, checkpoint._put_in_place = slow_write, slow_put
"""


@pytest.mark.faults
def test_a_rank_killed_in_a_save_leaves_a_whole_checkpoint(
    start: Start, tmp_path: Path, undisturbed: Path
) -> None:
    found = set()
    for seed in range(5):
        run = tmp_path / f"run{seed}"
        ended = start(KILLED.format(seed=seed), "--save-interval-updates=2", save_dir=run).ended()
        victim = random.Random(seed).randrange(2)
        assert ended.codes[victim] == -9, ended.said
        assert ended.codes[1 - victim] == 1, ended.said
        (error,) = ended.errors
        assert f"rank {victim} on {socket.gethostname()} has ended without a word" in error
        found.add(whole_checkpoint(run))
        ended = start(save_dir=run).ended()
        assert ended.codes == [0, 0], ended.said
        check_nothing_is_lost(run, undisturbed)
    assert found <= {2, 4}
    assert len(found) == 2, "all were killed too early, or too late"
