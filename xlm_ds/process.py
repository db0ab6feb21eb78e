"""What a run is beside its work, the same for train and finetune: begun by all ranks in one folder, stopped, ended.

code = run_on_ranks(
    "train",
    config.run,
    LAUNCHER,
    check=lambda ranks: check(config, ranks),
    work=lambda *joined: train(config, *joined),
)

def train(config, ranks, stop, ending):
    join(config.run, ranks, stop, ending)
    …
    if number := asked_to_stop(update, ranks, stop, saver):
        return stopped(number, config.run, ranks, stop, update)
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from xlm_ds.checkpoint import LAST, Saver, discard_leftovers
from xlm_ds.config import CommonRunConfig
from xlm_ds.engine import Ranks, is_lost_rank, start_ranks, stop_ranks
from xlm_ds.files import busy_with, is_locked, locked, make_folder
from xlm_ds.lifeline import (
    ENDS_WITH,
    LOGS,
    SUPERVISE_LOCK,
    Ending,
    Launcher,
    StopSignal,
    connection_is_lost,
    launcher_is_gone,
    leave,
    one_report,
    output_is_lost,
    place,
    stop_file,
)
from xlm_ds.log import (
    EXIT_BAD_INPUT,
    EXIT_OK,
    InputError,
    add_log_file,
    logger,
    sentence_of,
    silent,
)

LOCK = ".run.lock"


def run_on_ranks(
    stage: str,
    options: CommonRunConfig,
    launcher: Launcher,
    *,
    check: Callable[[Ranks], None],
    work: Callable[[Ranks, StopSignal, Ending], int],
) -> int:
    """Joins the other ranks, holds the run's folder while `work` is done, and tells how it has ended; its exit code.

    `launcher`: what lifeline.launcher() has told before torch was imported. `check` raises InputError, on rank 0, for
    what is not to be begun; what it logs is left out, as `work` looks at the same again.
    """
    stop = StopSignal(options.stop_seconds)
    if launched := "RANK" in os.environ:
        # In this order: with its launcher goes a rank's connection.
        stop.watch(launcher_is_gone(launcher), output_is_lost(), connection_is_lost())
    ranks = start_ranks(options.heartbeat_timeout)
    ending = Ending(options.save_dir)
    refused = refusal(check, options.save_dir, ending, ranks) if ranks.rank == 0 else None
    ranks.raise_on_all(refused)
    with run_folder(options.save_dir, ending, ranks), one_report(stage, ending, is_lost_rank):
        stop.joined(ending)
        code = work(ranks, stop, ending)
        if ranks.rank == 0:
            ending.claim(code, "done" if code == EXIT_OK else "stopped and saved")
    stop_ranks()
    if launched:
        leave(code)
    return code


def refusal(
    check: Callable[[Ranks], None], save_dir: Path, ending: Ending, ranks: Ranks
) -> InputError | OSError | None:
    """What `check` says, by which a command that is refused makes no folder and changes nothing of a run in it.

    Any other failure is left to `work`, which meets it too, and is reported once, with its host and rank.
    """
    try:
        with silent():
            check(ranks)
    except (InputError, OSError) as error:
        try:
            tell_supervise(ending, save_dir, error)
        except (InputError, OSError) as busy:
            return busy
        return error
    except Exception:
        return None
    return None


def tell_supervise(ending: Ending, save_dir: Path, error: Exception) -> None:
    """It has made the folder, and waits for the run's own word: torchrun makes 1 of all exit codes."""
    if is_locked(save_dir / SUPERVISE_LOCK):
        with locked(save_dir / LOCK, busy_with(save_dir, "run")):
            ending.begin()
            ending.claim(EXIT_BAD_INPUT, sentence_of(error))


@contextlib.contextmanager
def run_folder(save_dir: Path, ending: Ending, ranks: Ranks) -> Iterator[None]:
    """The run's folder, made, cleared of what killed saves left, and this run's alone."""
    with contextlib.ExitStack() as held:

        def take() -> None:
            make_folder(save_dir)
            held.enter_context(locked(save_dir / LOCK, busy_with(save_dir, "run")))
            discard_leftovers(save_dir)
            ending.begin()

        ranks.on_first(take)
        ending.start = ranks.gathered(ending.start)[0]
        yield


def join(options: CommonRunConfig, ranks: Ranks, stop: StopSignal, ending: Ending) -> None:
    """Begins this rank's log, and looks out for the file by which the run is asked to end."""
    add_log_file(rank_log(options.save_dir, ranks.rank))
    ending.hosts = ranks.gathered(place().host)
    logger.info(f"{place()}, process {os.getpid()}, {ranks.device}, of {ranks.world_size} ranks")
    if ranks.rank == 0:
        stop.watch(stop_file(options.save_dir))


def rank_log(save_dir: Path, rank: int) -> Path:
    return save_dir / LOGS / f"rank-{rank}.log" if rank else save_dir / "train.log"


def asked_to_stop(update: int, ranks: Ranks, stop: StopSignal, saver: Saver) -> int:
    """The signal that any rank is asked to end by, on all ranks, or 0; meanwhile ends a save that all have written."""
    if update % ranks.control_interval:
        return 0
    signal_number, writing = ranks.largest(stop.requested, saver.is_writing())
    if not writing:
        saver.finish()
    return signal_number


def stopped(
    number: int, options: CommonRunConfig, ranks: Ranks, stop: StopSignal, update: int
) -> int:
    """Says by whom a run was stopped that has been saved, and how it goes on; the exit code."""
    how = "the same command goes on from it"
    if options.restore_file != LAST:
        how = f"to go on from it, leave out --restore-file {options.restore_file}"
    logger.info(
        f"stopped by {first_wish(stop, ranks)} after update {update}, saved {options.save_dir / LAST}; {how}"
    )
    return ENDS_WITH[signal.Signals(number)]


def first_wish(stop: StopSignal, ranks: Ranks) -> str:
    """Why the run is to end, as the lowest of the ranks has it that want it to."""
    wishes: list[str] = ranks.gathered(f"{stop.why} ({place()})" if stop.why else "")
    return next(wish for wish in wishes if wish)
