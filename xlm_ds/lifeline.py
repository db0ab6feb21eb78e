"""What ends a run besides its own work, and how each rank's end is told.

    stop = StopSignal(stop_seconds=8)            # signals from here on
    stop.watch(launcher_is_gone(launcher()))
    ending = Ending(save_dir)
    stop.joined(ending)                          # the others of the run
    with one_report("train", ending, is_lost_rank):
        …                                        # now and then: stop.requested; ending.update = 12

A signal's handler in Python waits for the main thread, which may itself wait for a rank that is gone, or for whoever
reads its output. So a thread reads the signals from a pipe that the interpreter writes to at once, and ends the process
when its time is up; that thread does nothing else which could wait.

SAVE_DIR/stop          asks the run to save and end: INT (exit code 130), TERM, or USR1 or nothing (75)
SAVE_DIR/ended.json    how it has ended: exit_code, update, host, rank, what; the first rank to end writes it
SAVE_DIR/logs/         rank-N.log of the ranks but 0, which has train.log
"""

import atexit
import contextlib
import functools
import json
import logging
import os
import re
import secrets
import select
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import psutil

from xlm_ds.log import (
    EXIT_BAD_INPUT,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    Fault,
    InputError,
    dropped,
    logger,
    sentence_of,
    write_to_log_file,
)

STOP_FILE, END_FILE, LOGS, START_FILE = "stop", "ended.json", "logs", ".start"
SUPERVISE_LOCK = ".supervise.lock"
LOST_CONNECTION = "the loss of its connection to the launcher"
TICK_SECONDS = 0.5
LAST_WORDS_SECONDS = (
    0.5  # at the end of a process; what is not told by then, as on a full pipe, is not
)
# How long ranks that have lost another look for what ended it, and for each other.
ROLL_CALL_SECONDS = 3.0
ENDS_WITH = {
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGHUP: EXIT_INTERRUPTED,
    signal.SIGTERM: EXIT_PREEMPTED,
    signal.SIGUSR1: EXIT_PREEMPTED,
}


# ---------------------------------------------------------------------------------------- signals


class StopSignal:
    """Remembers the first wish that the run should save and end; a second SIGINT ends the process at once.

    A launcher that is interrupted sends SIGTERM after the terminal's SIGINT: that is not a second wish. SIGUSR1 is a
    scheduler's warning and leaves all the time that saving takes; after any other the process ends within
    `stop_seconds`, if need be without having saved.
    """

    def __init__(self, stop_seconds: float) -> None:
        self.requested = 0
        self.why = ""
        self._ending: Ending | None = None
        self._stop_seconds = stop_seconds
        self._deadline = float("inf")
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in ENDS_WITH:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, lambda *_: None)  # the thread has read it already
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read, name="lifeline", daemon=True).start()

    def joined(self, ending: "Ending") -> None:
        """The others are there, and the run's folder: before, there is nothing to save, and nobody to tell."""
        self._ending = ending

    def watch(self, *looks: Callable[[], tuple[int, str] | None]) -> None:
        """Calls `looks` in this order, twice a second, on a thread of their own, as what they look at may not answer.

        One returns a signal and why, if the run should end.
        """

        def watch() -> None:
            while not self.requested:
                for look in looks:
                    if found := look():
                        self.request(*found)
                time.sleep(TICK_SECONDS)

        threading.Thread(target=watch, name="watch", daemon=True).start()

    def request(self, number: int, why: str) -> None:
        """As if this signal had come."""
        if self.requested:
            return
        self.requested, self.why = number, why
        if number != signal.SIGUSR1:
            self._deadline = time.monotonic() + (self._stop_seconds if self._ending else 0)

    def _read(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], TICK_SECONDS)
            if ready:
                for number in os.read(self._reader, 64):
                    self._came(number)
            if time.monotonic() >= self._deadline:
                leave_at_once(ENDS_WITH[signal.Signals(self.requested)], self._tell_unsaved)

    def _came(self, number: int) -> None:
        if number not in ENDS_WITH:
            return
        if self.requested and number == signal.SIGINT:
            os._exit(EXIT_INTERRUPTED)
        self.request(number, signal.Signals(number).name)

    def _tell_unsaved(self) -> None:
        code = ENDS_WITH[signal.Signals(self.requested)]
        what = f"had not saved {self._stop_seconds:g} seconds after {self.why}, and ends without"
        if self._ending and self._ending.claim(code, what):
            logger.error(f"{place()}: {what}; the last checkpoint is whole")


class Launcher(NamedTuple):
    """What has started this process."""

    pid: int
    runner: int | None  # of DeepSpeed's launch.py, the process that has started that


def launcher() -> Launcher:
    """To be asked early: what has ended by then cannot be told any more."""
    pid = os.getppid()
    try:
        parent = psutil.Process(pid)
        is_deepspeeds = "deepspeed.launcher.launch" in parent.cmdline()
        return Launcher(pid, parent.ppid() if is_deepspeeds else None)
    except psutil.Error:  # it has ended just now, as `launcher_is_gone` will see, or is another's
        return Launcher(pid, None)


def launcher_is_gone(launcher: Launcher) -> Callable[[], tuple[int, str] | None]:
    """For `StopSignal.watch`: whether the process that started this one has ended.

    Or the `deepspeed` that started its launch.py on this host, which nobody tells of that (0.19.8). The parent of
    another launcher may be a shell that leaves.
    """

    def look() -> tuple[int, str] | None:
        if os.getppid() != launcher.pid:
            return signal.SIGTERM, "the end of its launcher"
        with contextlib.suppress(psutil.Error):
            runner = psutil.Process(launcher.pid).ppid()
            if launcher.runner is not None and runner != launcher.runner:
                return signal.SIGTERM, "the end of deepspeed"
        return None

    return look


def end_by_signals() -> None:
    """Until there is a StopSignal: the exit codes of signals, for a process that has nothing to save yet."""
    for number, code in ENDS_WITH.items():
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
            signal.signal(number, functools.partial(_end, code))


def _end(code: int, *_: object) -> None:
    os._exit(code)


def output_is_lost() -> Callable[[], tuple[int, str] | None]:
    """For `StopSignal.watch`: whether a pipe that this process writes to has nobody at its other end any more.

    So ends the ssh connection of a rank's launcher; nothing on its host is told (OpenSSH 9.2, without a terminal). The
    log may have met that first, and dropped it.
    """
    pipes = [descriptor for descriptor in (1, 2) if _is_pipe(descriptor)]

    def look() -> tuple[int, str] | None:
        # One that is no pipe at the moment may be one of a library's that hides a compiler's words (DeepSpeed 0.19.8).
        if any(pipe in dropped or (_is_pipe(pipe) and _is_closed(pipe)) for pipe in pipes):
            return signal.SIGTERM, LOST_CONNECTION
        return None

    return look


def connection_is_lost() -> Callable[[], tuple[int, str] | None]:
    """For `StopSignal.watch`: whether the pipe that an ssh has made this process's input has been closed since.

    So ends pdsh 2.34, killed or with its terminal: its ssh clients live on, and what they cannot write they drop. The
    input that a user's own shell has made (with SSH_TTY where it came by ssh) may end at any time, and says nothing.
    """
    by_ssh = "SSH_CONNECTION" in os.environ and "SSH_TTY" not in os.environ
    watched = by_ssh and _is_pipe(0) and not _is_closed(0)

    def look() -> tuple[int, str] | None:
        return (signal.SIGTERM, LOST_CONNECTION) if watched and _is_closed(0) else None

    return look


def _is_pipe(descriptor: int) -> bool:
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _is_closed(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def stop_file(save_dir: Path) -> Callable[[], tuple[int, str] | None]:
    """For `StopSignal.watch`: what SAVE_DIR/stop asks for."""
    path = save_dir / STOP_FILE

    def look() -> tuple[int, str] | None:
        try:
            name = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        number = {"INT": signal.SIGINT, "TERM": signal.SIGTERM}.get(name, signal.SIGUSR1)
        return number, str(path)

    return look


# -------------------------------------------------------------------------------------------- end


class Place(NamedTuple):
    """Which of the run's processes this is."""

    rank: int
    ranks: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}" if self.ranks > 1 else self.host


def place() -> Place:
    """By what the launcher has told."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Place(rank, ranks, socket.gethostname())


class Ending:
    """What the ranks know of each other's ends, by files in the run's folder."""

    def __init__(self, save_dir: Path) -> None:
        self.update = 0
        self.hosts: list[str] = []  # of each rank, once they are known
        self.start = ""  # a word for this start of the run, the same on all ranks
        self._save_dir = save_dir

    def begin(self) -> None:
        """Removes what an earlier start has left, and takes the folder from it. On one rank; raises OSError."""
        (self._save_dir / LOGS).mkdir(exist_ok=True)
        for path in (self._save_dir / STOP_FILE, self._save_dir / END_FILE, *self._marks()):
            path.unlink(missing_ok=True)
        self.start = secrets.token_hex(8)
        (self._save_dir / LOGS / START_FILE).write_text(self.start, encoding="utf-8")

    def is_of_the_past(self) -> bool:
        """Whether the run has been started again since: this rank was stopped, or cut off, and speaks for nobody."""
        try:
            return (self._save_dir / LOGS / START_FILE).read_text(encoding="utf-8") != self.start
        except OSError:
            return False  # the folder is gone

    def claim(self, code: int, what: str) -> bool:
        """Writes ended.json; False if another rank has."""
        if self.is_of_the_past():
            return False
        here = place()
        content = {"exit_code": code, "update": self.update, "host": here.host, "rank": here.rank}
        text = json.dumps({**content, "what": what}, ensure_ascii=False)
        mine = (
            self._save_dir / LOGS / f".{END_FILE}.{here.rank}"
        )  # is there only if the run's folder is
        try:
            mine.write_text(text + "\n", encoding="utf-8")
            _put_once(mine, self._save_dir / END_FILE)
        except FileExistsError:
            return False
        except OSError:
            return True  # the folder is gone or full: better told by all than by none
        finally:
            with contextlib.suppress(OSError):
                mine.unlink()
        return True

    def is_claimed(self) -> bool:
        return os.path.exists(self._save_dir / END_FILE) or self.is_of_the_past()  # noqa: PTH110

    def mark(self) -> None:
        """For `marked`: this rank has failed."""
        if self.is_of_the_past():
            return
        with contextlib.suppress(OSError):
            (self._save_dir / LOGS / f"{place().rank}.failed").write_text("", encoding="utf-8")

    def marked(self, seconds: float, until: Callable[[], bool] = lambda: False) -> set[int]:
        """The ranks that have failed, when all have, or `until` is true, or so many seconds have passed."""
        end = time.monotonic() + seconds
        while True:
            there = {int(path.stem) for path in self._marks()}
            if len(there) == place().ranks or until() or time.monotonic() > end:
                return there
            time.sleep(0.1)

    def _marks(self) -> list[Path]:
        return list((self._save_dir / LOGS).glob("*.failed"))

    def lost(self, error: BaseException) -> str | None:
        """What a rank that has lost another knows of it; None if another rank has told what ended the run."""
        there = self.marked(ROLL_CALL_SECONDS, self.is_claimed)
        if self.is_claimed():
            return None
        there.add(place().rank)  # also where the shared folder is gone with the network
        absent = [rank for rank in range(place().ranks) if rank not in there]
        names = [
            f"rank {rank}" + (f" on {self.hosts[rank]}" if self.hosts else "") for rank in absent
        ]
        one = len(absent) == 1
        timed_out = "Timed out" in str(error)  # of gloo: the connection is there, and silent
        if absent and timed_out:
            what = (
                f"{', '.join(names)} {'does' if one else 'do'} not answer (stopped, or on a host that is down or cut "
                f"off); {len(there)} noticed"
            )
        elif absent:
            what = (
                f"{', '.join(names)} {'has' if one else 'have'} ended without a word (killed, or out of memory), or "
                f"cannot be reached; {len(there)} noticed"
            )
        else:
            what = "the ranks have lost each other, and none has ended: the network is cut off or too slow"
        return f"{what}: {_first_sentence(error)}"


def _put_once(path: Path, name: Path) -> None:
    """Gives a file its name, whole; raises FileExistsError if that is another's, OSError."""
    try:
        os.link(path, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: who opens it first writes it
        with name.open("x", encoding="utf-8") as file:
            file.write(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def one_report(
    stage: str, ending: Ending, is_lost_rank: Callable[[BaseException], bool]
) -> Iterator[None]:
    """Tells the first failure of all ranks once, with its host, rank and traceback; the others end without a word.

    `is_lost_rank` says of an exception whether all it tells is another rank's end.
    """
    try:
        yield
    except (InputError, OSError) as error:
        ending.mark()
        _note(ending)
        sentence = sentence_of(error)
        is_first = ending.claim(EXIT_BAD_INPUT, sentence)
        if place().ranks == 1:
            raise
        # Python's own end would sometimes be an abort by a thread of gloo's, and 134 the exit code (engine.stop_ranks).
        where = f"{place()}: " if isinstance(error, OSError) else ""  # a disk is one host's
        said = f"{stage}: error: {where}{sentence}\n"
        leave_at_once(EXIT_BAD_INPUT, lambda: sys.stderr.write(said) if is_first else None)
    except Exception as error:
        ending.mark()
        _note(ending)
        if is_lost_rank(error):
            report = what = ending.lost(error)
        else:
            what = f"{type(error).__name__}: {error}"
            report = str(error) if isinstance(error, Fault) else traceback.format_exc()
        if what is not None and ending.claim(EXIT_FAULT, what):
            others = 0 if is_lost_rank(error) else len(ending.marked(1.0) - {place().rank})
            logger.error(
                f"{place()}, after update {ending.update}: {report}"
                + (f"\nand {others} other rank{'s' * (others > 1)} failed" if others else "")
            )
        leave_at_once(EXIT_FAULT)


def _note(ending: Ending) -> None:
    """The traceback, for the rank's own log: the console may be gone, and the next start removes ended.json."""
    write_to_log_file(f"after update {ending.update}:\n{traceback.format_exc()}")


def _first_sentence(error: BaseException) -> str:
    """Of gloo's messages, without the place in its source and its advice."""
    line = str(error).splitlines()[0]
    return re.sub(r"^\[\S+/gloo/\S+\] ", "", line).partition(". This is typically")[0]


def leave(code: int) -> NoReturn:
    """Ends this process in good order but for what Python and torch take apart (3 CPU-seconds, torch 2.13)."""
    atexit._run_exitfuncs()
    leave_at_once(code)


def leave_at_once(code: int, tell: Callable[[], object] = lambda: None) -> NoReturn:
    """Ends this process: threads of a backend that has lost a rank may wait for it for ever.

    Whatever `tell` does, and what is still to be written, has LAST_WORDS_SECONDS.
    """

    def last_words() -> None:
        tell()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()

    thread = threading.Thread(target=last_words, daemon=True)
    thread.start()
    thread.join(LAST_WORDS_SECONDS)
    os._exit(code)
