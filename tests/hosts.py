"""Two or three "hosts" on this machine, for tests of what happens between machines: real ssh, pdsh, and a link to cut.

    with Hosts(tmp_path, 2) as hosts:
        first, second = hosts.names
        hosts.run(first, "ssh", second, "hostname")
        hosts.link(second, up=False)

A host is a process with namespaces of its own for network, host name, processes, IPC and mounts, so that what is
started on it sees no process of another, and `pkill` there (as DeepSpeed's Ctrl-C does) reaches none. Files are those
of this machine, but for /etc/hosts, ssh's settings, /run and /dev/shm. Nothing is named in /run/netns or written to
/etc: all of it ends with the process, which ends when the pipe to it is closed, so also when the tests are killed. Two
test runs cannot meet, as no host has a link to anything but its own switch.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
REQUIRED = "XLM_DS_HOSTS_REQUIRED"  # set by `make faults`: what cannot be run fails then
TOOLS = {
    **{"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "mount": "mount"},
    **{"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client"},
    "pdsh": "pdsh",
}
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
START_SECONDS = 20

# The first process of a host, which is the end of all others when it ends: as soon as nobody holds its standard input.
INIT = """
hostname {name}
mount -t tmpfs none /dev/shm
mount -t tmpfs none /run
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
read go
{sshd} -D -e -f {folder}/{name}.sshd_config 2> {folder}/{name}.sshd.log &
cat
"""
SSH_CONFIG = """
IdentityFile {folder}/key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
GlobalKnownHostsFile /dev/null
LogLevel ERROR
"""
SSHD_CONFIG = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
"""


def missing() -> str | None:
    """One sentence on why there can be no hosts here, or None."""
    if os.geteuid() != 0:
        return "hosts in network namespaces need root; run the tests as root"
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    lacking = sorted(
        {package for tool, package in TOOLS.items() if not shutil.which(tool, path=path)}
    )
    if lacking:
        return f"hosts need programs that are not here: apt-get install {' '.join(lacking)}"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode != 0:
        return f"no namespaces may be made here: {tried.stderr.strip()}"
    return None


NAMESPACES = (
    "--net",
    "--uts",
    "--ipc",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)


def require_hosts() -> None:
    """Skips the test where there can be no hosts, or fails it if hosts were asked for."""
    if sentence := missing():
        if os.environ.get(REQUIRED):
            pytest.fail(sentence, pytrace=False)
        pytest.skip(sentence)


class Process(NamedTuple):
    """`pid` is that of the tests' own namespace: os.kill takes it."""

    pid: int
    command: str


class Hosts:
    """Some hosts joined by a switch. `folder` gets keys, settings and sshd's logs."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder / "hosts"
        self.folder.mkdir()
        (self.folder / "home").mkdir()
        self.names = [f"node{number}" for number in range(1, count + 1)]
        self.addresses = [f"10.77.0.{number}" for number in range(1, count + 1)]
        self._started: list[subprocess.Popen[str]] = []
        self._popened: list[subprocess.Popen[str]] = []
        try:
            self._write_settings()
            self._switch = self._start(["unshare", *NAMESPACES, "sh", "-c", "echo ready; cat"])
            self._in_network(self._switch, "ip link add br0 type bridge")
            self._in_network(self._switch, "ip link set br0 up")
            self._pids = {}
            for name, address in zip(self.names, self.addresses, strict=True):
                self._pids[name] = self._start_host(name, address)
            for name in self.names:
                self._wait_for_sshd(name)
            self._always_there = {p.pid for name in self.names for p in self._all_processes(name)}
        except BaseException:
            self.close()
            raise

    def _write_settings(self) -> None:
        for key in ("key", "host_key"):
            keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(keygen, check=True)
        named = zip(self.addresses, self.names, strict=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in named)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (self.folder / "ssh_config").write_text(
            SSH_CONFIG.format(folder=self.folder), encoding="utf-8"
        )

    def _start_host(self, name: str, address: str) -> int:
        settings = SSHD_CONFIG.format(folder=self.folder, address=address)
        (self.folder / f"{name}.sshd_config").write_text(settings, encoding="utf-8")
        sshd = shutil.which("sshd", path=SYSTEM_PATH)
        init = INIT.format(name=name, folder=shlex.quote(str(self.folder)), sshd=sshd)
        pid = self._start(["unshare", *NAMESPACES, "sh", "-e", "-c", f"echo ready; {init}"])
        self._in_network(pid, "ip link set lo up")
        peer = f"peer name {name} netns {self._switch}"
        self._in_network(pid, f"ip link add eth0 type veth {peer}")
        self._in_network(self._switch, f"ip link set {name} master br0 up")
        self._in_network(pid, f"ip addr add {address}/24 dev eth0")
        self._in_network(pid, "ip link set eth0 up")
        standard_input = self._started[-1].stdin
        assert standard_input is not None
        standard_input.write("go\n")
        standard_input.flush()
        return pid

    def _start(self, command: Sequence[str]) -> int:
        """The pid of the first process in the namespaces, child of the one started."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={"PATH": SYSTEM_PATH},
        )
        self._started.append(process)
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(process.stderr.read())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("utf-8")
        return int(children.split()[0])

    def _in_network(self, pid: int, command: str) -> None:
        subprocess.run(
            ["nsenter", f"--target={pid}", "--net", *command.split()],
            check=True,
            capture_output=True,
        )

    def _wait_for_sshd(self, name: str) -> None:
        give_up = time.monotonic() + START_SECONDS
        while self.run(name, "ssh", name, "true").returncode != 0:
            if time.monotonic() > give_up:
                log = self.folder / f"{name}.sshd.log"
                raise RuntimeError(f"{name}: no sshd: {log.read_text(encoding='utf-8')}")
            time.sleep(0.05)

    # ------------------------------------------------------------------------------------ use

    @property
    def environment(self) -> dict[str, str]:
        """What `run` gives a command: nothing of the tests' own, so that they do not depend on it."""
        return {
            "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
            "HOME": str(self.folder / "home"),  # DeepSpeed reads its .deepspeed_env
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }

    @property
    def deepspeed_env(self) -> str:
        """A .deepspeed_env for the folder that `deepspeed` is started in: what it does not hand on by itself."""
        names = ("PATH", "DS_ACCELERATOR", "OMP_NUM_THREADS")
        return "".join(f"{name}={self.environment[name]}\n" for name in names)

    def hostfile(self, *slots: int) -> str:
        """Its text; one slot each, unless said otherwise."""
        pairs = zip(self.names, slots or [1] * len(self.names), strict=True)
        return "".join(f"{name} slots={count}\n" for name, count in pairs)

    def _command(self, host: str, command: Sequence[str], cwd: Path | None) -> list[str]:
        into = ["nsenter", f"--target={self._pids[host]}", "--all"]
        return [*into, "env", f"--chdir={cwd or self.folder}", *command]

    def run(
        self,
        host: str,
        *command: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 120,
    ) -> "subprocess.CompletedProcess[str]":
        """`command` on the host, with `env` beside the hosts' environment."""
        process = self.popen(host, *command, env=env, cwd=cwd)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            _kill_group(process)
            raise
        self._popened.remove(process)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def popen(
        self,
        host: str,
        *command: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> "subprocess.Popen[str]":
        """The same, without waiting. It leads a process group: `os.killpg(process.pid, signal.SIGINT)` is Ctrl-C there.

        Its own pid is that of the nsenter that waits for the command; that of the command is in `processes`.
        Nobody reads what it says before `communicate`: after 64 kB it waits.
        """
        process = subprocess.Popen(
            self._command(host, command, cwd),
            env={**self.environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._popened.append(process)
        return process

    def link(self, host: str, *, up: bool) -> None:
        """Joins a host to the switch, or cuts it off, at the switch's end: the host itself is not told."""
        state = "up" if up else "down"
        self._in_network(self._switch, f"ip link set {host} {state}")

    def processes(self, host: str) -> list[Process]:
        """Those alive on the host, but for its first process and the sshd that listens."""
        return [p for p in self._all_processes(host) if p.pid not in self._always_there]

    def _all_processes(self, host: str) -> Iterator[Process]:
        own = Path(f"/proc/{self._pids[host]}/ns/pid").readlink()
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if folder.name.isdecimal() and (folder / "ns/pid").readlink() == own:
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    if command := b" ".join(words).decode(errors="replace").strip():  # no zombie
                        yield Process(int(folder.name), command)

    def close(self) -> None:
        """Ends every process of the hosts. What they were is gone with them."""
        for process in self._popened:
            _kill_group(process)
        for process in self._started:
            for stream in (process.stdin, process.stdout, process.stderr):
                assert stream is not None
                stream.close()
        for process in self._started:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _kill_group(process: "subprocess.Popen[str]") -> None:
    """Of one started by `popen`, which leads it."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
    process.communicate()
