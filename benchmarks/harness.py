"""What the benchmarks share: contenders run side by side in one run, one process each and round, and one table.

A script lists contenders and calls `run`. A contender is a function from the job (what all contenders of a run get,
JSON) to its figures. It runs in a process of its own, where it first imports and loads what it needs, and then works:

    def python_loop(job: Job) -> Figures:
        ids = load(job["vocabulary"])            # start-up: not measured
        with measured() as figures:
            tokens = loop(job["text"], ids)
        return figures | {"bytes": …, "tokens": tokens}

This module imports the standard library only: a child that runs another program has its memory to itself.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))  # this checkout is measured, whichever is installed

Job: TypeAlias = dict[str, Any]
Figures: TypeAlias = dict[str, Any]

# One thread each, unless a contender's name says otherwise; and no peer asks the network for anything.
CHILD_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True)
class Contender:
    """`packages` are distributions of peers.txt; `compared_with` the contender that its ratio says is faster or slower.

    `build` makes, once before the first round and unmeasured, what it reads. `note` stands in the table.
    """

    name: str
    run: Callable[[Job], Figures]
    compared_with: str
    packages: tuple[str, ...] = ()
    build: Callable[[Job], None] | None = None
    note: str = ""


@dataclass(frozen=True)
class Goal:
    """A figure that was aimed at: `figure` gives the value of each round."""

    text: str
    least: float
    figure: Callable[["Rounds"], list[float]]


class SkippedError(Exception):
    """A contender that cannot run on this machine; the message says why."""


class Rounds:
    """The figures of all rounds: `[name]` is a list, one element a round."""

    def __init__(self, figures: Mapping[str, list[Figures]]) -> None:
        self.figures = figures

    def __contains__(self, name: str) -> bool:
        return name in self.figures

    def column(self, name: str, key: str) -> list[float]:
        return [figures[key] for figures in self.figures[name]]

    def rates(self, name: str, unit: str, seconds: str = "cpu_seconds") -> list[float]:
        """`unit` (bytes, tokens) per second, round by round."""
        return [
            amount / time_taken
            for amount, time_taken in zip(
                self.column(name, unit), self.column(name, seconds), strict=True
            )
        ]

    def ratios(self, name: str, other: str, unit: str, seconds: str = "cpu_seconds") -> list[float]:
        """How many times as fast as `other` it is, round by round: what disturbs a round disturbs both."""
        pairs = zip(self.rates(name, unit, seconds), self.rates(other, unit, seconds), strict=True)
        return [rate / other_rate for rate, other_rate in pairs]


# -------------------------------------------------------------------------------------- in a child


@contextmanager
def measured() -> Iterator[Figures]:
    """Fills the figures of what is done inside; all threads of this process count."""
    figures: Figures = {}
    anonymous = memory_bytes("RssAnon")
    cpu, wall = time.process_time(), time.perf_counter()
    yield figures
    figures["wall_seconds"] = time.perf_counter() - wall
    figures["cpu_seconds"] = time.process_time() - cpu
    figures["grown_bytes"] = memory_bytes("RssAnon") - anonymous
    figures["peak_bytes"] = memory_bytes("VmHWM")


def memory_bytes(field: str) -> int:
    """A field of /proc/self/status. VmHWM rather than getrusage's figure, which keeps the parent's through exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured_command(command: Sequence[str]) -> Figures:
    """The figures of another program, from its start to its end. Raises if it fails."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - wall
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_seconds": wall,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_bytes": after.ru_maxrss * 1024,
    }


def line_count(job: Job) -> Figures:
    """`wc -l`: what it costs to find the line ends."""
    text = [job["text"]] * job["scans"]  # often, or its few milliseconds would be its start
    figures = measured_command(["wc", "-l", *text])
    return figures | {"bytes": job["bytes"] * job["scans"], "peak_bytes": None}


def separator_scan(job: Job) -> Figures:
    """benchmarks/scan.cpp: what it costs to find the words and lines, and do nothing with them."""
    program = Path(job["folder"]) / "scan"
    if not program.exists():
        source = ROOT / "benchmarks" / "scan.cpp"
        command = ["g++", "-std=c++20", "-O3", "-march=native", str(source), "-o", str(program)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SkippedError("no g++ that compiles scan.cpp") from error
    figures = measured_command([str(program), *[job["text"]] * job["scans"]])
    return figures | {"bytes": job["bytes"] * job["scans"], "peak_bytes": None}


LINE_COUNT, SCAN = "wc -l", "newline-and-blank scan"


def floors(compared_with: str) -> list[Contender]:
    """The contenders that only look at the text."""
    return [
        Contender(LINE_COUNT, line_count, compared_with),
        Contender(SCAN, separator_scan, compared_with, note="C++, -march=native"),
    ]


def scans_of(size: int) -> int:
    """How often a floor reads a file of this size so that its start does not count."""
    return max(1, round(1_000_000_000 / max(size, 10_000_000)))


# ------------------------------------------------------------------------------------- in the parent


def make_parser(
    description: str | None, output: str, budget: float = math.inf
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=budget, help="seconds that all may take")
    parser.add_argument("--no-peers", action="store_true", help="leave out what peers.txt installs")
    parser.add_argument("--output", type=Path, default=RESULTS / output, help="the JSON to write")
    return parser


def is_child() -> bool:
    return sys.argv[1:2] == ["--contender"]


def run_child(contenders: Sequence[Contender]) -> None:
    """Does in this process what `_child` asked for; the answer is the last line of the output."""
    _, _, name, action = sys.argv
    contender = next(c for c in contenders if c.name == name)
    job = json.load(sys.stdin)
    try:
        if action == "build":
            assert contender.build is not None
            answer: Figures = contender.build(job) or {}
        else:
            answer = contender.run(job)
    except SkippedError as error:
        answer = {"skipped": str(error)}
    print(f"\n{json.dumps(answer)}")


def _child(script: Path, contender: Contender, action: str, job: Job) -> Figures:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(script), "--contender", contender.name, action],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=os.environ | CHILD_ENVIRONMENT | {"PYTHONPATH": path},
    )
    if done.returncode:
        sys.exit(f"{contender.name}: failed\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    answer: Figures = json.loads(done.stdout.splitlines()[-1])
    return answer


def run(
    script: Path,
    contenders: Sequence[Contender],
    job: Job,
    arguments: argparse.Namespace,
) -> tuple[Rounds, dict[str, str]]:
    """(figures, why others were skipped). Every round runs every contender once, in the order given; none is begun that
    would end after the budget, were it as long as the longest.
    """
    figures: dict[str, list[Figures]] = {}
    skipped: dict[str, str] = {}
    for contender in contenders:
        reason = _why_not(contender, not arguments.no_peers)
        if reason is None and contender.build is not None:
            _say(f"building what {contender.name} reads")
            reason = _child(script, contender, "build", job).get("skipped")
        if reason is not None:
            skipped[contender.name] = reason
    started, longest = time.monotonic(), 0.0
    for number in range(arguments.rounds):
        began = time.monotonic()
        if number and began + longest > started + arguments.budget:
            break
        for contender in contenders:
            if contender.name in skipped:
                continue
            _say(f"round {number + 1} of {arguments.rounds}: {contender.name}")
            answer = _child(script, contender, "run", job)
            if "skipped" in answer:
                skipped[contender.name] = answer["skipped"]
            else:
                figures.setdefault(contender.name, []).append(answer)
        longest = max(longest, time.monotonic() - began)
    _say("")
    return Rounds(figures), skipped


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _why_not(contender: Contender, peers: bool) -> str | None:
    if contender.packages and not peers:
        return "--no-peers"
    missing = [name for name in contender.packages if version_of(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The machine as it is now; call it before the rounds."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = [line.partition(": ")[2] for line in cpuinfo.splitlines() if "model name" in line]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(pages / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
        **_gpu(),
    }


def _gpu() -> dict[str, str]:
    """The first GPU's name and driver, where there is one."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    name, _, driver = done.stdout.strip().rpartition(", ")
    return {"gpu": name, "driver": driver}


def versions(contenders: Sequence[Contender]) -> dict[str, str]:
    """Ours by commit, and every peer that is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # Results are no source: a run leaves the commit as it was.
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    commit = _git("rev-parse", "--short", "HEAD")
    names = {"numpy", "torch", "triton", *(name for c in contenders for name in c.packages)}
    found = {name: version_of(name) for name in sorted(names)}
    ours = f"{project['version']} {commit}{'+changes' if changed else ''}"
    return {"xlm_ds": ours} | {name: v for name, v in found.items() if v is not None}


def _git(*arguments: str) -> str:
    """Nothing where git or the history is not."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def warm(paths: Sequence[Path]) -> None:
    """Reads the files, so that the first contender finds them in memory as the others do."""
    for path in paths:
        with path.open("rb") as file:
            while file.read(1 << 22):
                pass


# ---------------------------------------------------------------------------------------- the result


@dataclass(frozen=True)
class Report:
    """What a run found, to be shown and kept. `unit` (bytes or tokens) is what the ratios are of, per CPU-second."""

    name: str
    unit: str
    contenders: Sequence[Contender]
    rounds: Rounds
    skipped: dict[str, str]
    machine: dict[str, Any]
    about: dict[str, Any]
    goals: Sequence[Goal] = ()
    sections: Mapping[str, Any] = field(default_factory=dict)  # what else was found, for the JSON

    def rows(self) -> list[dict[str, Any]]:
        """One a contender that ran: medians over the rounds, and ratios with their spread."""
        return [self._row(c) for c in self.contenders if c.name in self.rounds]

    def _row(self, contender: Contender) -> dict[str, Any]:
        name, rounds = contender.name, self.rounds
        row: dict[str, Any] = {"name": name, "note": contender.note}
        for key in rounds.figures[name][0]:
            values = rounds.column(name, key)
            row[key] = None if None in values else statistics.median(values)
        for unit in ("bytes", "tokens"):
            if unit in row:
                row[f"{unit}_per_cpu_second"] = statistics.median(rounds.rates(name, unit))
                row[f"{unit}_per_second"] = statistics.median(
                    rounds.rates(name, unit, "wall_seconds")
                )
        row["compared_with"] = contender.compared_with
        if contender.compared_with in rounds:
            row["ratio"] = _spread(rounds.ratios(contender.compared_with, name, self.unit))
            row["ratio_wall"] = _spread(
                rounds.ratios(contender.compared_with, name, self.unit, "wall_seconds")
            )
        for floor in (LINE_COUNT, SCAN):
            if floor in rounds:
                row[f"of {floor}"] = statistics.median(rounds.ratios(name, floor, "bytes"))
        return row

    def goal_rows(self) -> list[dict[str, Any]]:
        rows = []
        for goal in self.goals:
            try:
                found = _spread(goal.figure(self.rounds))
            except KeyError:  # a contender that was skipped
                continue
            rows.append(
                {"goal": goal.text, "least": goal.least, "reached": found["median"] >= goal.least}
                | found
            )
        return rows

    def save(self, path: Path) -> None:
        content = {
            "benchmark": self.name,
            "command": shlex.join(["python", f"benchmarks/{self.name}.py", *sys.argv[1:]]),
            "machine": self.machine,
            "versions": versions(self.contenders),
            "about": self.about,
            "contenders": self.rows(),
            "skipped": self.skipped,
            "goals": self.goal_rows(),
            "rounds": self.rounds.figures,
            **self.sections,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")  # killed while it writes, a run leaves the last
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        new.replace(path)

    def show(self, columns: Sequence["Column"]) -> None:
        """Prints the table, what was skipped, and the goals."""
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        print(f"{self.name}: {machine}")
        for key, value in self.about.items():
            print(f"  {key}: {value}")
        if self.machine["load_average_before"] > 0.5:
            print("  the machine was busy before the first round: the spread tells how much")
        lines = [[column.title for column in columns]]
        lines += [[column.text(row) for column in columns] for row in self.rows()]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        for cells in lines:
            first, *others = zip(cells, widths, columns, strict=True)
            others_text = [f"{cell:{column.align}{width}}" for cell, width, column in others]
            print("  ".join([f"{first[0]:<{first[1]}}", *others_text]).rstrip())
        for name, reason in self.skipped.items():
            print(f"skipped  {name}: {reason}")
        for goal in self.goal_rows():
            verdict = "reached" if goal["reached"] else "NOT reached"
            print(f"goal  {goal['goal']}: {shown(goal)}, {verdict}")


@dataclass(frozen=True)
class Column:
    """A column of the table; an empty cell where a row has no such figure."""

    title: str
    cell: Callable[[dict[str, Any]], str]
    align: str = ">"

    def text(self, row: dict[str, Any]) -> str:
        try:
            return self.cell(row)
        except (KeyError, TypeError):  # no such figure, or None
            return "-"


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(spread: Mapping[str, float]) -> str:
    median, least, most = (f"{spread[key]:.3g}" for key in ("median", "min", "max"))
    return f"{median} [{least} … {most}]"


NAME = Column("", lambda row: row["name"])
SECONDS = [
    Column("CPU s", lambda row: f"{row['cpu_seconds']:.3f}"),
    Column("wall s", lambda row: f"{row['wall_seconds']:.3f}"),
]
TOKEN_RATE = Column("Mtok/CPU-s", lambda row: f"{row['tokens_per_cpu_second'] / 1e6:.3g}")
BYTE_RATES = [
    Column("MB/CPU-s", lambda row: f"{row['bytes_per_cpu_second'] / 1e6:.3g}"),
    Column("MB/s", lambda row: f"{row['bytes_per_second'] / 1e6:.3g}"),
]
PEAK = Column("peak MB", lambda row: f"{row['peak_bytes'] / 1e6:.0f}")
RATIO = Column("ours is times [min … max]", lambda row: shown(row["ratio"]))
OF_FLOORS = [
    Column("of wc -l", lambda row: f"{row[f'of {LINE_COUNT}']:.2%}"),
    Column("of scan", lambda row: f"{row[f'of {SCAN}']:.2%}"),
]
NOTE = Column("note", lambda row: row["note"], "<")
TEXT_COLUMNS = [
    NAME,
    Column("MB", lambda row: f"{row['bytes'] / 1e6:.1f}"),
    *SECONDS,
    TOKEN_RATE,
    *BYTE_RATES,
    PEAK,
    RATIO,
    *OF_FLOORS,
    NOTE,
]


def compare(
    name: str,
    job: Job,
    arguments: argparse.Namespace,
    *,
    contenders: Sequence[Contender],
    unit: str,
    about: Mapping[str, Any],
    goals: Sequence[Goal],
    columns: Sequence[Column],
    machine: dict[str, Any],
) -> None:
    """Runs benchmarks/NAME.py's contenders, prints the table and saves the result. `machine` is of before any work."""
    rounds, skipped = run(Path(__file__).with_name(f"{name}.py"), contenders, job, arguments)
    report = Report(
        name=name,
        unit=unit,
        contenders=contenders,
        rounds=rounds,
        skipped=skipped,
        machine=machine,
        about={**about, "rounds": arguments.rounds},
        goals=goals,
    )
    report.show(columns)
    report.save(arguments.output)


def start(contenders: Sequence[Contender], main: Callable[[], None]) -> None:
    """A benchmark's process is the one that was started, or the child of one contender."""
    if is_child():
        run_child(contenders)
    else:
        main()
