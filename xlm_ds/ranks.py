"""The processes that mpirun has started, as one run: what all do together, and one end for all.

    with started_ranks("binarize") as ranks:        # without mpirun: this process alone, and MPI is not imported
        plan = ranks.on_first(make_plan)            # on rank 0, for all
        ranks.together(lambda: work(plan[ranks.rank]))

When an action fails on some ranks, the others stop, the lowest of those that failed raises what it met, and the rest
leave with its exit code and without a word. When a rank dies, the launcher kills the others; a watcher says so.
"""

import logging
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from xlm_ds import _core
from xlm_ds.log import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, logger

if TYPE_CHECKING:
    from mpi4py import MPI

Result = TypeVar("Result")

# What launchers tell a process, (rank, number of ranks): MPICH's Hydra, Intel MPI and Slurm's PMI-2; Open MPI; Slurm
# with PMIx. Run with MPICH 5.0.2; the others by their manuals.
LAUNCHERS = (
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
)
LONGEST_SLEEP_SECONDS = 0.05
STOP_TAG = 1
POLL_SECONDS = 0.1
EXIT_FAULT = 1


class Stopped(Exception):
    """Another rank has failed: this one need not go on. Not a failure of its own."""


class Ranks:
    """This process among those of the run."""

    rank = 0
    size = 1

    def together(self, action: Callable[[], Result]) -> Result:
        """Runs `action` on every rank and returns when all have; if any has failed, on none."""
        return action()

    def on_first(self, action: Callable[[], Result]) -> Result:
        """Runs `action` on rank 0 and returns its result on all."""
        return action()

    def gathered(self, value: Result) -> list[Result]:
        """Every rank's value, on all of them."""
        return [value]

    def merged(
        self,
        value: Result,
        merge: Callable[[Result, Result], Result],  # noqa: ARG002
    ) -> Result:
        """On rank 0 all ranks' values made into one; on another its own."""
        return value

    def check_stop(self) -> None:
        """To be called now and then within an action that takes long. Raises Stopped."""

    def threads(self) -> int:
        """This rank's share of the processors that it may run on."""
        return len(os.sched_getaffinity(0))


class MpiRanks(Ranks):
    """The ranks of mpirun. Only the main thread calls MPI."""

    def __init__(self, comm: "MPI.Intracomm") -> None:
        from mpi4py import MPI

        self._comm = comm
        self._same_host = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.is_first_on_host = self._same_host.Get_rank() == 0
        self.has_ended = False

    def together(self, action: Callable[[], Result]) -> Result:
        failure: Exception | None = None
        try:
            result = action()
        except Stopped:
            pass
        except Exception as error:
            failure = error
        stops = [
            self._comm.isend(None, other, STOP_TAG)
            for other in range(self.size)
            if failure is not None and other != self.rank
        ]
        self._wait_for_all()
        codes = self._comm.allgather(_exit_code(failure))
        failed = [rank for rank, code in enumerate(codes) if code]
        if not failed:
            return result
        for other in failed:
            if other != self.rank:
                self._comm.recv(source=other, tag=STOP_TAG)
        for stop in stops:
            stop.wait()
        self.has_ended = True
        if failure is not None and failed[0] == self.rank:
            raise failure
        sys.exit(codes[failed[0]])

    def on_first(self, action: Callable[[], Result]) -> Result:
        result = self.together(lambda: action() if self.rank == 0 else None)
        received: Result = self._comm.bcast(result)
        return received

    def gathered(self, value: Result) -> list[Result]:
        values: list[Result] = self._comm.allgather(value)
        return values

    def merged(self, value: Result, merge: Callable[[Result, Result], Result]) -> Result:
        all_values: Result | None = self._comm.reduce(value, op=merge)
        return value if all_values is None else all_values

    def check_stop(self) -> None:
        if self._comm.iprobe(tag=STOP_TAG):
            raise Stopped

    def threads(self) -> int:
        mine = os.sched_getaffinity(0)
        users = Counter(cpu for cpus in self._same_host.allgather(mine) for cpu in cpus)
        return max(1, int(sum(1 / users[cpu] for cpu in mine)))

    def _wait_for_all(self) -> None:
        """A barrier that sleeps: MPICH's own ones keep a processor busy, and Ctrl-C would not end them."""
        request = self._comm.Ibarrier()
        seconds = 0.001
        while not request.Test():
            time.sleep(seconds)
            seconds = min(2 * seconds, LONGEST_SLEEP_SECONDS)


@contextmanager
def interruptible(
    progress: _core.Progress, ranks: Ranks, bar: "tqdm[None] | None" = None
) -> Iterator[Callable[[Callable[[], Result]], Result]]:
    """Runs calls of the core on another thread, so that Ctrl-C or another rank's failure ends them; moves the bar."""

    def result_of(future: "Future[Result]") -> Result:
        shown = 0
        while not future.done():
            wait([future], timeout=POLL_SECONDS)
            ranks.check_stop()
            if bar is not None:
                bar.update(progress.done_bytes - shown)
                shown = progress.done_bytes
        return future.result()

    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            yield lambda call: result_of(thread.submit(call))
        except BaseException:
            progress.cancel()
            raise


@contextmanager
def started_ranks(stage: str) -> Iterator[Ranks]:
    """The ranks of this run. Ends the process itself when it is interrupted under mpirun."""
    rank, size = _told_by_launcher()
    if size == 1:
        yield Ranks()
        return
    if rank != 0:
        logger.setLevel(logging.ERROR)
    try:
        ranks = MpiRanks(_world(size))
    except InputError:
        if rank == 0:
            raise
        sys.exit(EXIT_BAD_INPUT)
    watcher = _start_watcher(stage) if ranks.is_first_on_host else None
    leave_with = None
    try:
        yield ranks
    except KeyboardInterrupt:
        if ranks.rank == 0:
            sys.stderr.write(f"{stage}: interrupted\n")
        leave_with = EXIT_INTERRUPTED
    except Exception:
        if ranks.has_ended:
            raise
        traceback.print_exc()  # outside together: the others do not know
        leave_with = EXIT_FAULT
    finally:
        if watcher is not None:
            watcher.communicate(b"ended\n")
    if leave_with is not None:
        _leave(leave_with)


def _told_by_launcher() -> tuple[int, int]:
    """(rank, number of ranks), by the environment alone: a plain run does not pay for MPI."""
    for rank, size in LAUNCHERS:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


def _world(size: int) -> "MPI.Intracomm":
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another launcher's environment: said below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
        raise InputError(
            f"started as one of {size} ranks, but mpi4py cannot be used "
            f"({str(error).partition(chr(10))[0]}); pip install 'xlm_ds[mpi]' on every host"
        ) from error
    if size != MPI.COMM_WORLD.Get_size():
        library = MPI.Get_library_version().partition("\n")[0].strip()
        raise InputError(
            f"the launcher started {size} ranks, but mpi4py's library ({library}) sees "
            f"{MPI.COMM_WORLD.Get_size()}; start with the mpirun that belongs to this library"
        )
    return MPI.COMM_WORLD


def _exit_code(failure: Exception | None) -> int:
    """As run_stage has it."""
    if failure is None:
        return 0
    return EXIT_BAD_INPUT if isinstance(failure, (InputError, OSError)) else EXIT_FAULT


def _leave(code: int) -> None:
    """Ends this process at once: MPI's own end would wait for ranks that may never come."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start_watcher(stage: str) -> "subprocess.Popen[bytes]":
    """A child of one rank of each host that says one sentence when its rank ends without having told it so.

    When a rank dies, MPICH's launcher kills the others with SIGKILL, so that none of them can. The child's session is
    its own, or it would be killed with them. What it says arrives from the host of the rank that died: from the others
    the launcher takes nothing any more (MPICH 5.0.2, two hosts, 12 of 12 times).
    """
    sentence = (
        f"{stage}: error: a rank has died or was killed, so the run has ended; nothing that was under way "
        "is under a final name; give the same command again"
    )
    return subprocess.Popen(
        ["sh", "-c", f"read ended || echo '{sentence}' >&2"],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
