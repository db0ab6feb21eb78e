"""What a launcher is given: the hosts, and what of a command and its environment would arrive as something else.

    hosts = read_hostfile(Path("hostfile"))                       # [Host("node1", 8), Host("node2", 8)]
    check_launch(Path("hostfile"), ["--module", "xlm_ds.train", "--config", "run.toml"], os.environ, Path.cwd())

`deepspeed --hostfile H …` writes a line for the shells of the other hosts: `export KEY=VALUE; … cd FOLDER; PYTHON …
WORDS`, with double quotes around values and words that have a blank, and around no folder or interpreter (0.19.8,
launcher/multinode_runner.py). What a shell would read as something else there is refused, as nothing can quote it.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from xlm_ds.log import InputError

DEFAULT_LAUNCHER = "pdsh"
# Of the environment that `deepspeed` is started in, what begins so goes to all hosts (launcher/runner.py; NCCL: where
# there are GPUs), beside the lines of .deepspeed_env.
EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
# Options of deepspeed whose value stays on the machine that it is started on, or is for the launcher.
STAYS = ("--hostfile", "-H", "--launcher_args")

_PLAIN = re.compile(r"[A-Za-z0-9@+=:,./_-]+")  # no shell reads these as anything but themselves
_HOST = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LINE = re.compile(r"(\S+)\s+slots=([0-9]+)(\s.*)?")
_QUOTED_BY_DEEPSPEED = re.compile(r"[^\w@%+=:,./-]")
# What means something between double quotes, and % to pdsh: %h, %n, %u and %% are not left as they are (2.34).
_NOT_BETWEEN_QUOTES = re.compile(r"[$`\"\\%\x00-\x1f\x7f]")


class Host(NamedTuple):
    """One line of a hostfile."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in DeepSpeed's form, `NAME slots=N` a line. Raises InputError with the line that is wrong; OSError.

    DeepSpeed takes any name, and hands it to ssh or pdsh, which may read it as an option, a list or a command.
    """
    hosts: dict[str, Host] = {}
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a file; write lines NAME slots=N")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8; write lines NAME slots=N") from error
    for number, line in enumerate((line.strip() for line in lines), start=1):
        if not line or line.startswith("#"):
            continue
        where, match = f"{path}, line {number}", _LINE.fullmatch(line)
        if match is None:
            raise InputError(f"{where}: {line!r} is not of the form NAME slots=N")
        name, slots = match[1], int(match[2])
        if not _HOST.fullmatch(name):
            raise InputError(
                f"{where}: {name!r} is no name of a host; use letters, digits, '.', '_' and '-', not '-' first"
            )
        if slots == 0:
            raise InputError(f"{where}: {name} has slots=0; give it a slot, or leave it out")
        if name in hosts:
            raise InputError(f"{where}: {name} is there twice; give its slots in one line")
        hosts[name] = Host(name, slots)
    if not hosts:
        raise InputError(f"{path}: names no host; write lines NAME slots=N")
    return list(hosts.values())


def check_launch(
    hostfile: Path, words: Sequence[str], environment: Mapping[str, str], folder: Path
) -> None:
    """Refuses what would not arrive on the other hosts as it is. `words` follow `deepspeed`, started in `folder`.

    What stays on one machine passes through no shell, and nothing of it is refused.
    Raises: InputError, with one sentence; OSError if the hostfile or .deepspeed_env cannot be read.
    """
    hosts = read_hostfile(hostfile)
    if "--no_ssh" in words or (len(hosts) == 1 and "--force_multi" not in words):
        return
    for what, path in (("the current folder", folder), ("the interpreter", Path(sys.executable))):
        if not _PLAIN.fullmatch(str(path)):
            raise InputError(
                f"{str(path)!r}: {what} reaches other hosts through a shell, where it would be something else; use a "
                "path of letters, digits and . _ - @ + = : , / alone"
            )
    for word in _words_that_pass(words):
        if not _PLAIN.fullmatch(word):
            raise InputError(
                f"{word!r}: would not reach other hosts as it is, or as more than it is; give such values in the "
                "run's TOML (--config run.toml), and the TOML a plain name"
            )
    launcher = option(words, "--launcher") or DEFAULT_LAUNCHER
    for name, value in exported(environment, folder).items():
        _check_variable(name, value, launcher.lower())


def exported(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The environment that DeepSpeed gives every rank, beside what a login there has.

    Raises: InputError for a line of .deepspeed_env that DeepSpeed would fall over; OSError.
    """
    inherited = environment.get("PYTHONPATH")
    path = f"{folder}:{inherited}" if inherited is not None else str(folder)
    chosen = {k: v for k, v in environment.items() if k.startswith(EXPORTED)}
    chosen["PYTHONPATH"] = path
    home = Path(environment.get("HOME") or Path.home())
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    for file in (home / name, folder / name):
        if file.is_file():
            chosen |= _read_variables(file)
    return chosen


def _read_variables(path: Path) -> dict[str, str]:
    variables = {}
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        name, equals, value = line.partition("=")
        if not equals:
            raise InputError(
                f"{path}, line {number}: {line!r} is not of the form KEY=VALUE, and DeepSpeed takes no empty lines or "
                "comments there"
            )
        variables[name.strip()] = value.strip()
    return variables


def _words_that_pass(words: Sequence[str]) -> Iterator[str]:
    iterator = iter(words)
    for word in iterator:
        if word in STAYS:
            next(iterator, None)
        elif not word.startswith(tuple(f"{option}=" for option in STAYS)):
            yield word


def option(words: Sequence[str], flag: str) -> str | None:
    """The value of `--flag V` or `--flag=V`."""
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None


def _check_variable(name: str, value: str, launcher: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r}: DeepSpeed would export it, and it is no variable's name")
    quoted = _QUOTED_BY_DEEPSPEED.search(value) is not None
    if launcher == "pdsh":
        wrong = _NOT_BETWEEN_QUOTES.search(value)
        found = repr(wrong[0]) if wrong else None
    else:  # which pass no shell: the quotes would become part of the value
        found = "blanks or other signs that DeepSpeed quotes" if quoted else None
        if launcher == "slurm" and "," in value:  # srun --export=ALL,K=V,K=V
            found = "','"
    if value != value.strip():
        found = "blanks at an end"
    if found:
        raise InputError(
            f"{name}={value!r}: DeepSpeed exports it to all hosts, where {found} would not arrive as it is "
            f"({launcher}); unset {name}, or set it there where a login sets it"
        )
