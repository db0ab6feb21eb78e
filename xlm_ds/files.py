"""Files as a whole: text read line by line with progress, checksums, that they are on the disk, and what hinders it."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xlm_ds.log import InputError, logger

CHUNK_CHARACTERS = 1 << 17  # of text read at a time
_UNPACKED_BY = {  # by what compressed files begin with
    b"\x1f\x8b": "gunzip",
    **{b"BZh%d1AY&" % level: "bunzip2" for level in range(1, 10)},
    b"\xfd7zXZ\0": "unxz",
    b"7z\xbc\xaf": "7z x",
    b"PK\x03\x04": "unzip",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
_LINE_END = re.compile(rb"\r\n|\r|\n")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_json_object(path: Path) -> dict[str, Any]:
    """Raises InputError for anything else; OSError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: damaged: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged: not an object")
    return content


def make_folder(path: Path) -> None:
    """With those above it, where they are missing. Raises InputError if a file is in the way; OSError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"{path}: a file is where this folder, or one above it, would be; give another folder"
        ) from error


@contextlib.contextmanager
def naming(path: Path, verb: str = "write") -> Iterator[None]:
    """Puts the file at work into an OSError that does not say where it happened: that of opening does, no other."""
    try:
        yield
    except OSError as error:
        # A copy names the file copied from, and a second one; what has other words than the system's names its file.
        opening = error.filename is not None and error.filename2 is None
        if error.errno is None or opening or error.strerror != os.strerror(error.errno):
            raise
        raise OSError(error.errno, f"cannot {verb} {path}: {error.strerror}") from error


def sync_file(path: Path) -> None:
    """Returns when a file's bytes (or a folder's names) would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Writes a .npy file. np.save loses the end of the array on a full disk, without an error (numpy 2.4)."""
    content = io.BytesIO()
    np.save(content, array)
    with naming(path):
        path.write_bytes(content.getbuffer())


def load_counts(path: Path, size: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A .npy file of so many counts, as save_array writes it; read-only.

    Raises: InputError if it is anything else. Its header is compared and not read: numpy's reader evaluates it, and for
    damaged ones raises whatever Python's own does (tokenize.TokenError, SyntaxError, MemoryError; numpy 2.4).
    """
    header = io.BytesIO()
    shape = {"descr": "<u8", "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(header, shape)
    expected = header.getvalue()
    whole = len(expected) + 8 * size
    with path.open("rb") as file, naming(path, "read"):
        content = file.read(whole + 1)
    if len(content) != whole or not content.startswith(expected):
        raise InputError(
            f"{path}: is not numpy's file of {size} numbers of 64 bits, one for each symbol of the dictionary; "
            "delete it, and it is counted anew, or binarize again"
        )
    return np.frombuffer(content, np.uint64, offset=len(expected))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name under which to write a file, which is called `path` only when it is whole and on disk.

    The name is no other process's while a lock is held.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(temporary):
            yield temporary
        sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


class Appended:
    """A file that is there, to which a run appends; what cannot be written now is kept and follows later.

    It is opened each time, as a shared folder may go and come back, and never made: where the folder has gone there may
    be another, such as that under a mount, in which the file must not begin anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = b""
        self._fails = False

    def append(self, text: str) -> None:
        """Says once that it cannot be written, and when it can again."""
        self._kept += text.encode()
        try:
            self._write()
        except OSError as error:
            if not self._fails:
                reason = f"{self._path}: {error.strerror}"
                logger.warning(f"cannot write {reason}; going on without, and trying again")
            self._fails = True
        else:
            if self._fails:
                logger.info(f"{self._path} can be written again, and nothing of it is missing")
            self._fails = False

    def _write(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            while self._kept:
                self._kept = self._kept[os.write(descriptor, self._kept) :]
        finally:
            os.close(descriptor)


def read_lines(path: Path) -> Iterator[list[str]]:
    """The lines of a text, some at a time; they end at LF, CRLF or CR as everywhere in fairseq. Shows progress."""
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        io.TextIOWrapper(file, encoding="utf-8-sig") as text,  # a byte order mark is no word
        tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None) as bar,
    ):
        try:
            while lines := _some_lines(text, path):
                bar.update(file.tell() - bar.n)
                yield lines
        except UnicodeDecodeError as error:
            raise InputError(_where_not_utf8(path)) from error


def _some_lines(text: io.TextIOWrapper, path: Path) -> list[str]:
    with naming(path, "read"):
        return text.readlines(CHUNK_CHARACTERS)


def compressed_text(path: Path, start: bytes) -> str:
    """What is to be said of a file that begins like a compressed one, or ""."""
    programs = (name for magic, name in _UNPACKED_BY.items() if start.startswith(magic))
    return next((f"{path}: is compressed; unpack it first ({name})" for name in programs), "")


def _where_not_utf8(path: Path) -> str:
    lines, offset = 1, 0
    with path.open("rb") as file:
        if compressed := compressed_text(path, file.read(8)):
            return compressed
        file.seek(0)
        for line in file:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                lines += len(_LINE_END.findall(line[: error.start]))
                offset += error.start
                found = f"byte 0x{line[error.start]:02x} at offset {offset}"
                how = "convert the file (iconv -f LATIN1 -t UTF-8, if it is that)"
                return f"{path}:{lines}: {found} is not UTF-8; {how}"
            lines += len(_LINE_END.findall(line))
            offset += len(line)
    raise AssertionError(f"{path} is UTF-8 after all")


@contextlib.contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[int]:
    """Holds the lock file `path`, also on a shared folder; a process that dies lets go of it.

    Gives its file descriptor: processes that it is passed on to hold the lock too.

    If another process has it: raises InputError(busy), or without `busy` waits.
    """
    handle = _lock_handle(path, busy)
    try:
        yield handle
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file `path`; one that has been killed leaves the file, and holds nothing."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(handle)


def _lock_handle(path: Path, busy: str | None) -> int:
    while True:
        # To write, as NFS locks nothing else.
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if busy is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it before may have removed the file since it was opened here, and others made it again.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(handle)):
                    return handle
        except BlockingIOError as error:
            os.close(handle)
            raise InputError(str(busy)) from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def busy_with(folder: Path, what: str) -> str:
    """For `locked`: what is said where another process does the same."""
    return f"{folder}: another {what} is at work here; wait for it, or give another folder"
