"""Runs a launcher's command, and starts a failed run again from its last checkpoint.

    python -m xlm_ds.supervise --restarts 10 -- deepspeed --hostfile H --module xlm_ds.train --config run.toml
    python -m xlm_ds.supervise -- torchrun --nproc-per-node 2 -m xlm_ds.train OUT --save-dir RUN

What stands after -- is any command that starts the whole run. It is started again as long as each start gained an
update, whatever ended it: a full disk may have room again, and what is wrong with the input gains nothing. Ctrl-C,
SIGTERM, SIGHUP or SIGUSR1 ends it: the run saves, and nothing of it is left.

Supervise and the run speak through files of the run's folder, as launchers mangle exit codes (torchrun makes 1 of all,
deepspeed 0 of a signal) and signals. SAVE_DIR/stop, with a signal's name in it, asks the run to save and end;
SAVE_DIR/ended.json is how it ended. Needs no torch, and stays small.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from xlm_ds import keeper
from xlm_ds.config import (
    CommonRunConfig,
    FinetuneConfig,
    RunConfig,
    SuperviseConfig,
    TrainConfig,
)
from xlm_ds.files import locked, make_folder, replacing
from xlm_ds.flags import parse
from xlm_ds.launching import check_launch, option, read_hostfile
from xlm_ds.lifeline import END_FILE, ENDS_WITH, STOP_FILE, SUPERVISE_LOCK
from xlm_ds.log import (
    EXIT_BAD_INPUT,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PREEMPTED,
    Fault,
    InputError,
    add_log_file,
    logger,
    run_stage,
    silent,
)
from xlm_ds.peer_flags import TRAIN_FLAGS

LAST = "checkpoint_last"  # checkpoint.LAST, whose room imports torch
PREFLIGHT = (sys.executable, "-m", "xlm_ds.preflight")
# What preflight is told of a launcher's options, by its own name and deepspeed's.
PREFLIGHT_TOLD = (
    ("--master_addr", "--master_addr"),
    ("--master_port", "--master_port"),
    ("--ssh_port", "--ssh_port"),
)
SOME_HOSTS = ("--include", "-i", "--exclude", "-e", "--num_nodes")
DEEPSPEEDS_HOSTFILE = Path("/job/hostfile")  # which it reads if it is told of none
POLL_SECONDS = 0.1
MARGIN_SECONDS = (
    1.0  # after its own --stop-seconds a run is killed; with 8 of them all is ended within ten
)
# A launcher may outlive its run by what DeepSpeed's leaves a rank that does not end (30 seconds, then SIGKILL), and for
# ever if a host is cut off: nobody tells its ssh (OpenSSH 9.2 without ServerAliveInterval).
LINGER_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 600.0


SUPERVISED = ("train", "finetune")


class Launch(NamedTuple):
    """A run and the command that starts it."""

    command: list[str]
    launcher: list[str]  # the words of the command up to xlm_ds.train, or finetune
    run: CommonRunConfig  # what that makes of the words after it


class Ended(NamedTuple):
    """How a start of the run ended."""

    code: int
    how: str


# ------------------------------------------------------------------------------------------- loop


def supervise(config: SuperviseConfig, launch: Launch, asked: "Asked", lock: int) -> int:
    """Starts the run until it is done, is not to be started again, or a signal has come; returns the exit code.

    Raises: Fault if it failed without having gained an update, or too often.
    """
    command, save_dir = launch.command, launch.run.save_dir
    pause = config.first_pause
    for restarts_left in range(config.restarts, -1, -1):
        before = saved_update(save_dir)
        logger.info(
            f"starting {command[0]}, from "
            + ("the beginning" if before is None else f"update {before}")
        )
        ended = run_once(command, save_dir, asked, lock)
        wait_for(save_dir, asked)
        after = saved_update(save_dir)
        logger.info(f"ended: {ended.how}; {describe_gain(before, after)}")
        if ended.code == EXIT_OK:
            return ended.code
        if asked.signal:
            return asked.exit_code
        if ended.code == EXIT_INTERRUPTED:
            return ended.code
        if not gained(before, after):
            return given_up(ended, "no update was gained, so it is not started again")
        if restarts_left == 0:
            return given_up(ended, f"it has been started again {config.restarts} times")
        logger.info(f"starting it again in {pause:g} s, {restarts_left} restarts left")
        asked.sleep(pause)
        if asked.signal:
            return asked.exit_code
        pause = min(2 * pause, max(config.first_pause, LONGEST_PAUSE_SECONDS))
        command = restart_command(launch)
    raise AssertionError("the loop ends by itself")


def given_up(ended: Ended, why: str) -> int:
    # What was preempted has nothing wrong with it: whoever has stopped it may want it again. Bad input is the user's.
    if ended.code in (EXIT_PREEMPTED, EXIT_BAD_INPUT):
        logger.error(f"{why}: {ended.how}")
        return ended.code
    raise Fault(f"{why}: {ended.how}")


def wait_for(save_dir: Path, asked: "Asked") -> None:
    """Until the run's folder is there, should it be gone: a run started now would begin anew in the one under it."""
    if not is_there(save_dir / SUPERVISE_LOCK):
        logger.error(f"{save_dir}: is gone (unmounted, moved or removed); waiting until it is back")
    while not is_there(save_dir / SUPERVISE_LOCK) and not asked.signal:
        asked.sleep(POLL_SECONDS)


def restart_command(launch: Launch) -> list[str]:
    """The first start may go on from another run's checkpoint; a later one from this run's own."""
    if launch.run.restore_file == LAST:
        return launch.command
    return [*launch.command, "--restore-file", LAST]


def gained(before: int | None, after: int | None) -> int:
    """Updates. Those learnt again, as where a damaged checkpoint was gone round, are none."""
    return max((after or 0) - (before or 0), 0)


def describe_gain(before: int | None, after: int | None) -> str:
    more = gained(before, after)
    if not more:
        return "no update gained"
    return f"saved update {after}" + (f", {more} more" if before else "")


# -------------------------------------------------------------------------------------- one start


def run_once(command: Sequence[str], save_dir: Path, asked: "Asked", lock: int) -> Ended:
    """Runs the launcher until nothing of it is left on this host."""
    code = kept(command, save_dir, asked, lock)
    return read_ended(save_dir) or ended_by_launcher(code)


def kept(command: Sequence[str], save_dir: Path, asked: "Asked", lock: int) -> int:
    """The exit code of the command, run by a keeper (keeper.py) in a session of its own, which a terminal's Ctrl-C does
    not reach: DeepSpeed's runner must never have a signal, on which it kills every deepspeed run of this interpreter on
    all hosts, other people's too (0.19.8: launcher/runner.py, sigkill_handler; launcher/multinode_runner.py,
    kill_command).

    The keeper holds the lock too, so that no other supervise starts while one that was killed is being cleared away.
    """
    stop, end = save_dir / STOP_FILE, save_dir / END_FILE
    for path in (stop, end):  # what a start before has left is not said of this one
        path.unlink(missing_ok=True)
    keeper.adopt_orphans()
    words = [sys.executable, "-P", keeper.__file__, str(stop), str(asked.kill_after), *command]
    told = killed = False
    late = float("inf")  # of time.monotonic(), once the run has said how it ended
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, bufsize=0, start_new_session=True, pass_fds=(lock,)
    ) as process:
        assert process.stdin is not None
        while process.poll() is None:
            if asked.signal and not told:
                told = True
                logger.info(f"{asked.signal.name}: the run is asked to save and end")
            if asked.signal and not is_there(stop):  # also again: a run that begins removes it
                ask_to_stop(stop, asked.wish)
            if not is_there(end):  # or a launcher has started its ranks again, which removes it
                late = float("inf")
            elif late == float("inf"):
                late = time.monotonic() + LINGER_SECONDS
            lingers = time.monotonic() >= late
            if (asked.is_late() or lingers) and not killed:
                killed = True
                what = "launcher" if lingers else "run"
                logger.error(f"the {what} has not ended: killing what is left of it on this host")
                with contextlib.suppress(BrokenPipeError):  # it has ended just now
                    process.stdin.write(b"k")
            time.sleep(POLL_SECONDS)
    if (
        process.returncode < 0
    ):  # a launcher that it had is killed with it; the ranks are this process's by now
        clear_away(stop, asked.kill_after)
    with contextlib.suppress(OSError):  # the keeper has, but it may have been written since
        stop.unlink(missing_ok=True)
    return process.returncode


def clear_away(stop: Path, seconds: float) -> None:
    """Ends what a killed keeper has left on this host: asks it to save, and kills it after so many seconds."""
    deadline = time.monotonic() + seconds
    while left := keeper.descendants():
        if time.monotonic() >= deadline + keeper.UNKILLABLE_SECONDS:
            raise Fault(
                f"process {left[0].pid} of a run that has ended is still there, and cannot be killed"
            )
        if not is_there(stop):
            ask_to_stop(stop, "TERM")
        if time.monotonic() >= deadline:
            keeper.kill(left)
        time.sleep(POLL_SECONDS)
        keeper.reap()


def ask_to_stop(stop: Path, name: str) -> None:
    with contextlib.suppress(OSError), replacing(stop) as temporary:  # no rank must find it empty
        temporary.write_text(name, encoding="utf-8")


def is_there(path: Path) -> bool:
    """False also where a folder does not answer as it should: Path.exists raises for a stale handle of NFS's."""
    return os.path.exists(path)  # noqa: PTH110


def read_ended(save_dir: Path) -> Ended | None:
    """What the run itself says, if it could."""
    try:
        said = json.loads((save_dir / END_FILE).read_text(encoding="utf-8"))
        code, update, host, rank, what = (
            said[key] for key in ("exit_code", "update", "host", "rank", "what")
        )
    except OSError:
        return None
    except (ValueError, KeyError, TypeError):  # killed, or the disk full, while it was written
        return Ended(EXIT_FAULT, f"{save_dir / END_FILE} is damaged, as by a full disk")
    return Ended(int(code), f"{host}, rank {rank}, update {update}: {what} (exit code {code})")


def ended_by_launcher(code: int) -> Ended:
    """Where the run could not say how it ended: 0 is then not believed, and 128 + N is signal N."""
    unsaid = "the run could not say how it ended"
    if code == EXIT_OK:
        return Ended(EXIT_FAULT, f"{unsaid}, although the launcher's exit code is 0")
    with contextlib.suppress(ValueError):
        return Ended(code, f"{unsaid}; the launcher's exit code is that of {signal_in(code).name}")
    return Ended(code, f"{unsaid}; the launcher's exit code is {code}")


def signal_in(code: int) -> signal.Signals:
    """Python says -N, a shell 128 + N, and sys.exit(-N) of deepspeed's launch.py 256 - N. Raises ValueError."""
    return signal.Signals(-code if code < 0 else 256 - code if code > 192 else code - 128)


def saved_update(save_dir: Path) -> int | None:
    """The update of its last checkpoint; None if there is none, or it is damaged (which is for the run to say)."""
    path = save_dir / LAST / "manifest.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["progress"]["update"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---------------------------------------------------------------------------------------- signals


class Asked:
    """Remembers the first signal that asked for an end, and until when the run may take to come to it."""

    def __init__(self, kill_after: float) -> None:
        self.signal: signal.Signals | None = None
        self.kill_after = kill_after  # seconds
        self._interrupts = 0
        self._deadline = float("inf")  # of time.monotonic()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.signal = self.signal or signal.Signals(number)
        if number != signal.SIGUSR1:  # by which a scheduler says that there is time
            self._deadline = min(self._deadline, time.monotonic() + self.kill_after)
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._deadline = 0.0

    @property
    def wish(self) -> str:
        """What the run is to be told. A lost terminal is no preemption: nobody starts the run again."""
        if self.signal in (signal.SIGTERM, signal.SIGUSR1):
            return self.signal.name.removeprefix("SIG")
        return "INT"

    @property
    def exit_code(self) -> int:
        return ENDS_WITH[self.signal] if self.signal else EXIT_OK

    def is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    def sleep(self, seconds: float) -> None:
        """Until then, or until a signal comes."""
        end = time.monotonic() + seconds
        while not self.signal and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))


# ------------------------------------------------------------------------------------ the command


def read_command(command: list[str]) -> Launch:
    """What the command would run. Raises InputError if it cannot be supervised."""
    first = words_before_flags(command)
    words = command[first:]
    run: CommonRunConfig
    if stage_of(command[first - 1]) == "finetune":
        run = parse(FinetuneConfig, words).run
    else:
        with silent():  # the run says it
            run = parse(TrainConfig, words, peers=TRAIN_FLAGS, stage="train").run
    if isinstance(run, RunConfig) and run.dry_run:
        raise InputError("--dry-run starts no run that could be supervised; leave supervise out")
    if shutil.which(command[0]) is None:
        raise InputError(f"{command[0]}: no such program; give its path, or put it on PATH")
    return Launch(command, command[:first], run)


def stage_of(word: str) -> str:
    """The stage that such a word names: xlm_ds.train, …/xlm_ds/train.py or train; "" if none that can be supervised."""
    path = Path(word)
    is_file = path.parts[-2:-1] == ("xlm_ds",) and path.suffix == ".py"
    name = path.stem if is_file else word.removeprefix("xlm_ds.")
    return name if name in SUPERVISED else ""


def words_before_flags(command: Sequence[str]) -> int:
    """How many words come before the stage's own flags."""
    for i, word in enumerate(command):
        after_program = i > 0 and Path(command[i - 1]).name in ("xlm-ds", "xlm_ds")
        if stage_of(word) and (word not in SUPERVISED or after_program):
            return i + 1
    raise InputError(
        f"{' '.join(command) or 'nothing'}: does not start training; expected xlm_ds.train (after --module or -m), "
        "…/xlm_ds/train.py or xlm-ds train as words of the command, or finetune in its place"
    )


def preflight(config: SuperviseConfig, launch: Launch, asked: Asked, lock: int) -> int:
    """Whether the hosts of the command's hostfile can run it: the exit code of `python -m xlm_ds.preflight`.

    Raises InputError if some of the command would not reach them as it is; OSError.
    """
    words = launch.launcher
    hostfile = hostfile_of(words)
    if hostfile is None:
        return EXIT_OK
    deepspeed = deepspeed_at(words)
    if deepspeed is not None:
        check_launch(Path(hostfile), launch.command[deepspeed + 1 :], os.environ, Path.cwd())
    if config.no_preflight or len(read_hostfile(Path(hostfile))) == 1:
        return EXIT_OK
    if some := [name for name in SOME_HOSTS if option(words, name) is not None]:
        logger.info(f"no preflight, as {some[0]} leaves out hosts of {hostfile}")
        return EXIT_OK
    told = [(name, option(words, deepspeeds)) for name, deepspeeds in PREFLIGHT_TOLD]
    flags = [f"{name}={value}" for name, value in told if value is not None]
    command = [*PREFLIGHT, f"--hostfile={hostfile}", *flags, *launch.command[len(words) :]]
    return kept(command, launch.run.save_dir, asked, lock)


def deepspeed_at(words: Sequence[str]) -> int | None:
    """The place of DeepSpeed's runner among them, by one of its names."""
    for i, word in enumerate(words):
        if Path(word).name in ("deepspeed", "ds") or word == "deepspeed.launcher.runner":
            return i
    return None


def hostfile_of(words: Sequence[str]) -> str | None:
    given = option(words, "--hostfile") or option(words, "-H")
    if given is None and deepspeed_at(words) is not None and DEEPSPEEDS_HOSTFILE.is_file():
        return str(DEEPSPEEDS_HOSTFILE)
    return given


def main(argv: Sequence[str]) -> int:
    own = list(argv[: argv.index("--")]) if "--" in argv else list(argv)
    if "--" not in argv and not {"-h", "--help"} & set(argv):
        raise InputError("no command to supervise; put -- before it, after supervise's own flags")
    config = parse(SuperviseConfig, own, description=__doc__)
    launch = read_command(list(argv[len(own) + 1 :]))
    asked = Asked(launch.run.stop_seconds + MARGIN_SECONDS)
    save_dir = launch.run.save_dir
    make_folder(save_dir)
    busy = f"{save_dir}: another supervise has this run; wait for it, or stop it (Ctrl-C, SIGTERM)"
    with locked(save_dir / SUPERVISE_LOCK, busy) as lock:
        add_log_file(save_dir / "supervise.log")
        logger.info(f"process {os.getpid()} supervises the run in {save_dir}")
        code = preflight(config, launch, asked, lock)
        if asked.signal:
            return asked.exit_code
        return code or supervise(config, launch, asked, lock)


if __name__ == "__main__":
    sys.exit(run_stage("supervise", main))
