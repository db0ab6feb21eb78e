"""How a run speaks and how it ends: text lines, one-sentence errors, exit codes.

A stage's `main(argv)` is wrapped once:

    if __name__ == "__main__":
        sys.exit(run_stage("binarize", main))

Library code raises `InputError`; only `run_stage` turns it into a sentence on stderr and exit code 2.
"""

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from xlm_ds._core import InputError

__all__ = [
    "EXIT_BAD_INPUT",
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_PREEMPTED",
    "InputError",
    "add_log_file",
    "logger",
    "run_stage",
    "sentence_of",
]

EXIT_OK = 0
EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: a scheduler should start the run again
EXIT_INTERRUPTED = 130

logger = logging.getLogger("xlm_ds")

# fairseq's layout, so that scripts that read its logs read ours (spec: fairseq_cli/preprocess.py).
_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"


def run_stage(
    stage: str, main: Callable[[Sequence[str]], int], *, log_to: TextIO = sys.stdout
) -> int:
    """Runs `main(sys.argv[1:])` and returns the exit code: 2 and one sentence for bad input, 130 when interrupted.

    Anything else that is raised is a fault of ours and keeps its traceback (exit code 1).
    """
    _log_to(log_to)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main(sys.argv[1:])
    except (InputError, OSError) as error:
        sys.stderr.write(f"{stage}: error: {sentence_of(error)}\n")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stderr.write(f"{stage}: interrupted\n")
        return EXIT_INTERRUPTED


def add_log_file(path: Path) -> None:
    """Appends everything logged from now on to `path`, and no longer to another file; its folder must exist."""
    for other in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        logger.removeHandler(other)
        other.close()
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT, _DATE_FORMAT))
    logger.addHandler(handler)


class _LogFile(logging.FileHandler):
    """Says once that it cannot be written, and is left out from then on: the console has the same lines."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logger.removeHandler(self)
        sys.stderr.write(f"cannot write {self.baseFilename}: {error.strerror}; going on without\n")


def _log_to(stream: TextIO) -> None:
    """One text logger; ranks other than 0 speak only when something is wrong."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(_FORMAT, _DATE_FORMAT))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def sentence_of(error: Exception) -> str:
    """OSError's own text begins with [Errno n]; the core's says what could not be done to which file."""
    if isinstance(error, OSError) and error.strerror is not None:
        if error.errno == errno.EAGAIN and error.strerror == os.strerror(errno.EAGAIN):
            return "the system gives no more threads or processes; give fewer --workers"
        where = f"{error.filename}: " if error.filename is not None else ""
        return where + (error.strerror.lower() if where else error.strerror)
    return str(error)
