"""How a run speaks and how it ends: text lines, one-sentence errors, exit codes.

A stage's `main(argv)` is wrapped once:

    if __name__ == "__main__":
        sys.exit(run_stage("binarize", main))

Library code raises `InputError`; only `run_stage` turns it into a sentence on stderr and exit code 2.
"""

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from xlm_ds._core import InputError

__all__ = [
    "EXIT_BAD_INPUT",
    "EXIT_CLOSED_PIPE",
    "EXIT_DIFFERENT",
    "EXIT_FAULT",
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_PREEMPTED",
    "Fault",
    "InputError",
    "add_log_file",
    "dropped",
    "is_first_rank",
    "logger",
    "run_stage",
    "sentence_of",
    "write_to_log_file",
]

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_BAD_INPUT = 2
EXIT_DIFFERENT = 3  # of two runs that prove compares; diff and cmp say 1, here a fault of ours
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: a scheduler should start the run again
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141  # as a shell says that SIGPIPE has ended a program

logger = logging.getLogger("xlm_ds")
dropped: set[int] = set()  # descriptors that could not be written to, and are so no more

# fairseq's layout, so that scripts that read its logs read ours (spec: fairseq_cli/preprocess.py).
_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"


class Fault(Exception):
    """Something this program did wrong and noticed: one sentence, exit code 1."""


def run_stage(
    stage: str, main: Callable[[Sequence[str]], int], *, log_to: TextIO = sys.stdout
) -> int:
    """Runs `main(sys.argv[1:])` and returns the exit code: 2 and one sentence for bad input, 130 when interrupted or
    terminated, 141 without a word when nobody reads its output any more before it has ended.

    Anything else that is raised is a fault of ours and keeps its traceback (exit code 1).
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who has started it, as by `>&-`
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Words that a terminal's code has not are no reason to end.
        sys.stdout.reconfigure(errors="backslashreplace")
    _log_to(log_to)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    code = EXIT_CLOSED_PIPE
    last_words = ""
    try:
        returned = main(sys.argv[1:])
        sys.stdout.flush()
        code = returned
    except BrokenPipeError:
        pass
    except (InputError, OSError) as error:
        code, last_words = EXIT_BAD_INPUT, f"error: {sentence_of(error)}"
    except Fault as error:
        code, last_words = EXIT_FAULT, f"fault: {error}"
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        code, last_words = EXIT_INTERRUPTED, "interrupted"
    finally:  # also of --help, which ends by SystemExit
        _end_output(f"{stage}: {last_words}\n" if last_words else "")
    return code


def _end_output(last_words: str) -> None:
    """Writes them to stderr. What cannot be written is dropped, or Python would complain and exit with 120."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, last_words)):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            _drop_output(stream)


def _drop_output(stream: TextIO) -> None:
    """Also what is still in its buffer."""
    dropped.add(stream.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def add_log_file(path: Path) -> None:
    """Appends everything logged from now on to `path`, and no longer to another file; its folder must exist."""
    for other in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        logger.removeHandler(other)
        other.close()
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
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


class _Console(logging.StreamHandler[TextIO]):
    """Is left out when nobody reads it any more, or it cannot be written: what a run makes is not in its log."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            logger.removeHandler(self)
            _drop_output(self.stream)
        else:
            super().handleError(record)


def _log_to(stream: TextIO) -> None:
    """One text logger; ranks other than 0 speak only when something is wrong, and keep the rest for their log file."""
    handler = _Console(stream)
    handler.setFormatter(logging.Formatter(_FORMAT, _DATE_FORMAT))
    handler.setLevel(logging.INFO if is_first_rank() else logging.ERROR)
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def write_to_log_file(text: str) -> None:
    """An error that the console is spared, as another rank tells what it comes from."""
    record = logger.makeRecord(logger.name, logging.ERROR, "", 0, text, (), None)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Leaves out what this thread logs."""
    own = threading.get_ident()

    def is_others(_: logging.LogRecord) -> bool:  # called by the thread that logs
        return threading.get_ident() != own

    logger.addFilter(is_others)
    try:
        yield
    finally:
        logger.removeFilter(is_others)


def sentence_of(error: Exception) -> str:
    """OSError's own text begins with [Errno n]; the core's says what could not be done to which file."""
    if isinstance(error, OSError) and error.strerror is not None:
        if error.errno == errno.EAGAIN and error.strerror == os.strerror(errno.EAGAIN):
            return "the system gives no more threads or processes; raise ulimit -u, or give fewer --workers"
        where = f"{error.filename}: " if error.filename is not None else ""
        return where + (error.strerror.lower() if where else error.strerror)
    return str(error)
