"""Starts a command and sees to it that, in the end, nothing of it is left on this host.

    python keeper.py STOP_FILE KILL_AFTER COMMAND…      with a pipe as its standard input

The keeper is what supervise starts instead of the launcher. It ends, with the launcher's exit code (128 + N for signal
N), when the launcher and every process that descends from it have ended. It ends them

- when the pipe is closed, as by a SIGKILL of supervise, or the launcher has ended before its ranks: it makes STOP_FILE,
  which asks the run to save and end, and kills what is left KILL_AFTER seconds later;
- when a byte comes through the pipe: at once.

STOP_FILE is not there any more when the keeper ends.

It must be the launcher's parent to know its descendants: a launcher that dies leaves its ranks to its nearest ancestor
that has said it takes them (PR_SET_CHILD_SUBREAPER, Linux), and without one to init, where nobody could tell them from
others. No name and no command line decides what is killed. Standard library and psutil only: it is there for months.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

POLL_SECONDS = 0.1
UNKILLABLE_SECONDS = 5.0  # a process that a dead disk holds in the kernel does not end when killed
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36


def keep(command: Sequence[str], stop_file: Path, *, kill_after: float) -> int:
    """Runs `command` until nothing of it is left; returns its exit code. The pipe is file descriptor 0."""
    launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    said = None
    while said is None and launcher.returncode is None:
        said = heard()
        reap(launcher)
    if not said and descendants():
        ask_to_stop(stop_file)
    deadline = time.monotonic() + (0 if said else kill_after)
    while left := descendants():
        if said == b"":
            time.sleep(POLL_SECONDS)
        elif said := heard():
            deadline = time.monotonic()
        if time.monotonic() >= deadline:
            kill(left)
        if time.monotonic() >= deadline + UNKILLABLE_SECONDS:
            pids = ", ".join(str(process.pid) for process in left)
            complain(f"killed, but still there (a disk that does not answer?): process {pids}")
            return 128 + signal.SIGKILL
        reap(launcher)
    return launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode


def heard() -> bytes | None:
    """What came through the pipe: a byte, or b"" if it is closed, or None if nothing within a moment."""
    ready, _, _ = select.select([0], [], [], POLL_SECONDS)
    return os.read(0, 1) if ready else None


def reap(launcher: subprocess.Popen[bytes] | None = None) -> None:
    """Takes the exit codes of children that have ended, also of those that were adopted; keeps the launcher's."""
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if launcher is not None and ended[0] == launcher.pid:
                launcher.returncode = os.waitstatus_to_exitcode(ended[1])
    except ChildProcessError:
        return  # there are none


def descendants() -> list[psutil.Process]:
    processes: list[psutil.Process] = psutil.Process().children(recursive=True)
    return processes


def kill(processes: Sequence[psutil.Process]) -> None:
    """psutil compares the time of creation first: a number that is another process's by now is not signalled."""
    for process in processes:
        try:
            process.kill()
        except psutil.Error:  # it has ended, or is another user's (sudo), who has to do it
            continue


def ask_to_stop(stop_file: Path) -> None:
    temporary = stop_file.with_name(f".{stop_file.name}.keeper")
    try:
        temporary.write_text("TERM", encoding="utf-8")
        temporary.replace(stop_file)  # a rank that looks meanwhile must not find it empty
    except OSError as error:  # the folder is gone: what is left is killed without having saved
        complain(f"cannot make {stop_file}: {error.strerror}")


def complain(sentence: str) -> None:
    try:
        sys.stderr.write(f"supervise: {sentence}\n")
    except OSError:  # nobody reads it any more; ending the processes is what matters
        sys.stderr = None


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """In the launcher, before it is one: a killed keeper takes it along. What it has started is left to supervise."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def main() -> int:
    stop_file, kill_after, *command = sys.argv[1:]
    # A scheduler signals every process of a job: what that means is decided by supervise. Not SIG_IGN, which the
    # launcher would inherit.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, lambda *_: None)
    adopt_orphans()
    try:
        return keep(command, Path(stop_file), kill_after=float(kill_after))
    except OSError as error:
        complain(f"error: {error.filename}: {error.strerror}")
        return 2
    finally:
        with contextlib.suppress(OSError):
            Path(stop_file).unlink(missing_ok=True)  # a run that was killed has left it


if __name__ == "__main__":
    sys.exit(main())
