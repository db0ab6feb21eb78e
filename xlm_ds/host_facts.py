"""What must be the same on all hosts of a run, or enough on each: looked up on a host, and compared.

    facts = probe(Request(data="OUT", languages=("ar", "en"), mlm_steps=(), save_dir="run", token="4f1c", settings={}))
    problems({"node1": facts, "node2": facts_of_node2}, slots={"node1": 8, "node2": 8}, need_bytes=None)   # sentences

Neither needs torch, nor talks to another host. What takes others is filled in by who talks to them (preflight.py).
"""

import hashlib
import importlib.metadata
import itertools
import os
import platform
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any

import xlm_ds
from xlm_ds import _core
from xlm_ds.dataset import dictionary_path
from xlm_ds.dictionary import Dictionary
from xlm_ds.files import file_sha256
from xlm_ds.log import InputError, sentence_of
from xlm_ds.pair_record import KINDS, PAIR_FIELDS, beside, load_record
from xlm_ds.streams import Choice, choose, stored_split

SPLITS = ("train", "valid", "test")
# Files up to this are read whole, and of larger ones so many pages, so that terabytes take no longer than this.
READ_WHOLE_BYTES = 8 << 20
PAGE_BYTES = 1 << 14
PAGES = 64
READERS = 8  # a page that is not in memory takes a disk 10 ms, and a shared folder 1
HASH_LETTERS = 16
BYTES_PER_PARAMETER = 12  # of a checkpoint: weight and both Adam moments in fp32
CHECKPOINTS = 3  # at least: the last, the best, and one that is being written
LEAST_FREE_BYTES = (
    10_000_000_000  # three of xlm_base with 190,000 symbols, where the model is not known
)
MOST_CLOCK_SECONDS = 1.0
NAMED = 3  # of several files that differ


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be looked up. `settings` are handed back beside the facts: hosts must have been given the same."""

    data: str | None
    languages: tuple[str, ...]  # none: all that the data have
    mlm_steps: tuple[str, ...]
    save_dir: str
    token: str  # of this check: decides which pages are read, and the name of the file written
    settings: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was found on one host."""

    versions: dict[str, str]
    settings: dict[str, str]
    files: dict[str, str]  # of the data, by name: size and hash
    data_bytes: int
    symbols: int | None  # rows of the dictionary
    languages: int
    written: str  # the file that was written, in the run's folder or the nearest above that is there; "" if none
    free_bytes: int
    errors: tuple[str, ...]  # sentences on what could not be looked at
    # What takes others: filled in by who talks to them.
    address: str = ""
    gpus: tuple[str, ...] = ()
    shares_folder: bool = True  # sees what the first host has written
    clock_seconds: float = 0.0  # ahead of a clock that is the same for all hosts
    clock_error_seconds: float = 0.0


def probe(request: Request) -> Facts:
    """Looks at this host, in bounded time unless a folder does not answer. Leaves `token_path(request)`."""
    errors: list[str] = []
    files: dict[str, str] = {}
    languages: tuple[str, ...] = ()
    data_bytes, symbols = 0, None
    if request.data is not None:
        try:
            folder = Path(request.data)
            choice = choose(request.languages, request.mlm_steps, folder)
            languages = choice.languages
            dictionary = dictionary_path(folder, languages)
            symbols = len(Dictionary.load(dictionary))
            paths = [dictionary, *_files_of_pairs(folder, choice)]
            data_bytes = sum(path.stat().st_size for path in paths)
            files = _fingerprints(paths, seed=request.token)
        except (InputError, OSError) as error:
            errors.append(sentence_of(error))
    written, free_bytes = "", 0
    try:
        path = token_path(request)
        free_bytes = shutil.disk_usage(path.parent).free
        path.write_text(request.token, encoding="ascii")
        written = str(path)
    except OSError as error:
        errors.append(f"{request.save_dir}: cannot be written: {sentence_of(error)}")
    return Facts(
        versions=versions(),
        settings=request.settings,
        files=files,
        data_bytes=data_bytes,
        symbols=symbols,
        languages=len(languages),
        written=written,
        free_bytes=free_bytes,
        errors=tuple(errors),
    )


def versions() -> dict[str, str]:
    """Of what computes. xlm_ds also by its code, which a version does not tell in a clone."""
    package = Path(xlm_ds.__file__).parent
    code = hashlib.sha256()
    for path in sorted(package.glob("*.py")):
        code.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        "Python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "deepspeed")},
        "xlm_ds": xlm_ds.__version__,
        "xlm_ds's code": code.hexdigest()[:HASH_LETTERS],
        "xlm_ds's extension": file_sha256(Path(_core.__file__))[:HASH_LETTERS],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _files_of_pairs(folder: Path, choice: Choice) -> Iterator[Path]:
    """Those that are there, under our names and fairseq's."""
    for split, stream in itertools.product(SPLITS, choice.streams):
        stored = stored_split(folder, split, stream)
        for language in stream:
            for name in (f"{stored}.{language}", f"{stored}.{language}-None.{language}"):
                paths = (beside(folder / name, kind) for kind in KINDS)
                yield from (path for path in paths if path.is_file())


def _fingerprints(paths: Sequence[Path], *, seed: str) -> dict[str, str]:
    with ThreadPoolExecutor(READERS) as readers:
        hashes = readers.map(partial(_fingerprint, seed=seed), paths)
        return {path.name: found for path, found in zip(paths, hashes, strict=True)}


def _fingerprint(path: Path, *, seed: str) -> str:
    """Size and hash of the file, or of pages of it, other ones for another seed; of a record, what it says of its pair.

    A record has the SHA-256 of .bin and .idx as they were written, so data that were made apart differ there; what a
    large file has lost since is found by its pages only by chance, and by `xlm-ds shards verify` for sure.
    """
    if path.suffix == ".json":
        record = load_record(path.with_suffix(""))
        assert record is not None
        said = sorted((name, str(record[name])) for name in PAIR_FIELDS)
        return hashlib.sha256(repr(said).encode()).hexdigest()[:HASH_LETTERS]
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if size <= READ_WHOLE_BYTES:
            digest = hashlib.file_digest(file, "sha256")
        else:
            for page in _pages(size, seed + path.name):
                digest.update(os.pread(file.fileno(), PAGE_BYTES, page * PAGE_BYTES))
    return f"{size} bytes, {digest.hexdigest()[:HASH_LETTERS]}"


def _pages(size: int, seed: str) -> list[int]:
    """The first, the last, and others by chance."""
    count = -(-size // PAGE_BYTES)
    if count <= PAGES:
        return list(range(count))
    return [0, *sorted(random.Random(seed).sample(range(1, count - 1), PAGES - 2)), count - 1]


def nearest_folder(path: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def token_path(request: Request) -> Path:
    """The file that this process writes; where hosts share the folder each has its own."""
    name = f".preflight-{request.token}-{os.uname().nodename}-{os.getpid()}"
    return nearest_folder(Path(request.save_dir)) / name


# -------------------------------------------------------------------------------------- comparison


def checkpoint_bytes(parameters: int) -> int:
    """What a run's folder needs at least."""
    return CHECKPOINTS * BYTES_PER_PARAMETER * parameters


def problems(
    hosts: Mapping[str, Facts], *, slots: Mapping[str, int], need_bytes: int | None
) -> list[str]:
    """A sentence, which names the host, for all that would make a run over these hosts fail or go wrong.

    Where hosts differ, most of them are taken to be right, or the first. `slots` by host; `need_bytes` is what the
    run's folder needs, or None where the model is not known.
    """
    if not hosts:
        return []
    return [
        *(f"{host}: {error}" for host, facts in hosts.items() for error in facts.errors),
        *_differing(hosts, "versions", "install the same on every host"),
        *_differing(hosts, "settings", "give every host the same flags and files"),
        *_differing_files(hosts),
        *_folders(hosts, need_bytes),
        *_clocks(hosts),
        *_devices(hosts, slots),
    ]


def _most_common(values: Mapping[str, str | None]) -> tuple[str, str | None]:
    """What most hosts have, and the first of these."""
    value, _ = Counter(values.values()).most_common(1)[0]
    return next((host, v) for host, v in values.items() if v == value)


def _differing(hosts: Mapping[str, Facts], kind: str, advice: str) -> Iterator[str]:
    keys = dict.fromkeys(key for facts in hosts.values() for key in getattr(facts, kind))
    for key in keys:
        values = {host: getattr(facts, kind).get(key) for host, facts in hosts.items()}
        usual_host, usual = _most_common(values)
        for host, value in values.items():
            if value != usual:
                yield f"{host}: {key} is {value}, and {usual} on {usual_host}; {advice}"


def _differing_files(hosts: Mapping[str, Facts]) -> Iterator[str]:
    """One sentence a host, however many of its files are others."""
    read = {host: facts for host, facts in hosts.items() if facts.files}
    names = dict.fromkeys(name for facts in read.values() for name in facts.files)
    others: dict[str, list[str]] = {}
    usual_host = ""
    for name in names:
        values = {host: facts.files.get(name) for host, facts in read.items()}
        usual_host, usual = _most_common(values)
        for host, value in values.items():
            if value != usual:
                lost = " (missing)" if value is None else ""
                others.setdefault(f"{host}\0{usual_host}", []).append(name + lost)
    for pair, found in others.items():
        host, usual_host = pair.split("\0")
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        yield (
            f"{host}: has other data than {usual_host}: {', '.join(found[:NAMED])}{more}; copy them from {usual_host}, "
            "or give a folder that all hosts share"
        )


def _folders(hosts: Mapping[str, Facts], need_bytes: int | None) -> Iterator[str]:
    first = next(iter(hosts))
    for host, facts in hosts.items():
        if not facts.written:
            continue  # said among the errors
        folder = Path(facts.written).parent
        if not facts.shares_folder:
            yield (
                f"{host}: does not see in {Path(hosts[first].written).parent} what {first} has written there; give a "
                "--save-dir that all hosts share"
            )
        if facts.free_bytes < (LEAST_FREE_BYTES if need_bytes is None else need_bytes):
            need = (
                f"at least {_size(LEAST_FREE_BYTES)} are asked for where the model is not known"
                if need_bytes is None
                else f"{CHECKPOINTS} checkpoints of this model take {_size(need_bytes)}"
            )
            yield f"{host}: {_size(facts.free_bytes)} are free in {folder}, and {need}; make room"


def _clocks(hosts: Mapping[str, Facts]) -> Iterator[str]:
    middle = median_low([facts.clock_seconds for facts in hosts.values()])
    usual_host, usual = next((h, f) for h, f in hosts.items() if f.clock_seconds == middle)
    for host, facts in hosts.items():
        ahead = facts.clock_seconds - middle
        if abs(ahead) - facts.clock_error_seconds - usual.clock_error_seconds > MOST_CLOCK_SECONDS:
            where = "ahead of" if ahead > 0 else "behind"
            yield f"{host}: its clock is {abs(ahead):.1f} s {where} that of {usual_host}; set it (NTP)"


def _devices(hosts: Mapping[str, Facts], slots: Mapping[str, int]) -> Iterator[str]:
    """Where no host has a GPU, slots are ranks on CPUs."""
    if not any(facts.gpus for facts in hosts.values()):
        return
    for host, facts in hosts.items():
        if len(facts.gpus) < slots[host]:
            yield (
                f"{host}: has {len(facts.gpus)} GPUs that torch can use, and is given {slots[host]} slots; lower "
                "slots=, or see what torch.cuda.is_available() says there"
            )


def described(facts: Facts, slots: int) -> str:
    """The host's facts in a line."""
    parts = [", ".join(f"{name} {value}" for name, value in facts.versions.items())]
    if facts.files:
        joined = hashlib.sha256(repr(sorted(facts.files.items())).encode()).hexdigest()
        parts.append(
            f"data {joined[:HASH_LETTERS]} ({len(facts.files)} files, {_size(facts.data_bytes)})"
        )
    if facts.written:
        parts.append(f"{_size(facts.free_bytes)} free in {Path(facts.written).parent}")
    parts.append(f"clock {facts.clock_seconds:+.3f} s (+-{facts.clock_error_seconds:.3f})")
    kinds = Counter(facts.gpus)
    parts.append(", ".join(f"{n} x {gpu}" for gpu, n in kinds.items()) if kinds else "no GPU")
    return "; ".join([*parts, f"slots={slots}"])


def _size(count: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.1f} kB"


def from_json(values: Mapping[str, Any]) -> Facts:
    """The inverse of dataclasses.asdict, through JSON, whose arrays are lists."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Facts(**fields)
