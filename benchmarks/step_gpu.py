"""One training step on a GPU, and its parts: ours beside plain torch, a fairseq-like step and HF's XLM.

    python benchmarks/step_gpu.py [--budget 540] [--no-peers]
    python benchmarks/step_gpu.py --device cpu --small            # a rehearsal of all of it, in about a minute

xlm_base in bf16 with fp32 masters, rows of 256 tokens, dropout 0.1, always the same batch; needs one GPU, torch >= 2.11
and this checkout, in which nothing has to be built. A process each, all kept between the rounds, in which they work in
turn. First their losses without dropout are compared; what differs is not timed, and the run ends with status 1. A
section begins only while half of the time that it may take is left. The JSON is written after every section.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import step_actions
from harness import Column, Contender, Figures, Goal, Job, Report, Rounds
from step_actions import (
    EAGER,
    FAIRSEQ,
    FAIRSEQ_FP32,
    HF,
    LADDER,
    MANY,
    OTHER_SIZES,
    OURS,
    PARTS,
    PLAIN,
    PLAIN_EAGER,
    PRODUCT,
    PRODUCT_BESIDE,
    REFERENCE,
    SIZES,
    STEADY_STEPS,
    STOCK,
    STOCK_EAGER,
    measured_product,
)

USEFUL = (
    "3 x forward, which is 2 x 12 d^2 + 4 T d per token and layer, attention in full, and 2 (V d + d^2) per masked "
    "token; no lookups, norms or softmax, nothing computed twice; the same for those that compute all logits"
)
LARGEST_DIFFERENCE = 2e-3  # of first losses in bf16, relative
# Of how far the loss has then fallen: that updates are made, and of the right size. A first update that Adam's bias
# correction makes 0.74 as large (DeepSpeed's stage 0 in bf16) would be found; the rehearsal's differ by 0.007.
LARGEST_DIFFERENCE_OF_FALL = 0.05
RESERVE = 12.0  # seconds kept for the table
# Seconds of the usual budget; of another, in proportion.
BUDGET = 540.0
LONGEST_ANSWER = 120.0  # compiling is the longest
LONGEST_BUILD = 100.0  # of all processes that start at once


class FailedError(Exception):
    """A process did not give its figures; the message says why. `unexpected` where that is no fact of the machine."""

    def __init__(self, reason: str, *, unexpected: bool = True) -> None:
        super().__init__(reason)
        self.unexpected = unexpected


class Worker:
    """A contender's process: jobs go in, figures come back, until it is closed."""

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        path = os.pathsep.join(filter(None, [str(harness.ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | harness.CHILD_ENVIRONMENT | {"PYTHONPATH": path}
        if device == "cpu":
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(step_actions.__file__)), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def send(self, job: Job) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `receive` finds that it has ended
            print(json.dumps(job), file=self._process.stdin, flush=True)

    def receive(self, seconds: float) -> Figures:
        try:
            line = self._answers.get(timeout=max(seconds, 0.1))
        except queue.Empty:
            raise FailedError("its time was over", unexpected=False) from None
        if line is None:
            raise FailedError(f"ended with {self._process.wait()}: {self.last_words()}")
        answer: Figures = json.loads(line)
        if "failed" in answer:
            raise FailedError(answer["failed"], unexpected=answer.get("unexpected", False))
        return answer

    def last_words(self) -> str:
        self._log.seek(0)
        return " | ".join(self._log.read().splitlines()[-3:])[-400:]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass
class Run:
    """What has been found so far, and the time that is left."""

    job: Job
    deadline: float
    output: Path
    peers: bool
    rounds: int
    scale: float  # how many times the usual budget there is
    machine: dict[str, Any]
    workers: dict[str, Worker] = field(default_factory=dict)
    until: float = 0.0  # of this section
    figures: dict[str, list[Figures]] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def left(self) -> float:
        return self.deadline - RESERVE - time.monotonic()

    def drop(self, name: str, error: FailedError) -> None:
        """A contender or section that gives nothing more."""
        self.skipped[name] = str(error)
        if error.unexpected:
            self.faults.append(name)
        self.close([name])

    def close(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self.workers:
                self.workers.pop(name).close()

    def open(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Starts processes, all at once; returns those that have built what they measure."""
        for contender in contenders:
            missing = [n for n in contender.packages if harness.version_of(n) is None]
            if contender.name == HF and not self.peers:
                self.skipped[HF] = "--no-peers"
            elif missing:
                self.skipped[contender.name] = f"not installed: {', '.join(missing)}"
            elif contender.name not in self.workers:
                self.workers[contender.name] = Worker(contender.name, self.job["device"])
        started = [c for c in contenders if c.name in self.workers]
        building = [c for c in started if c.run is not measured_product]
        for contender in building:
            self.workers[contender.name].send(self.job | {"action": "build"})
        latest = min(self.until, time.monotonic() + self.scale * LONGEST_BUILD)
        for contender in building:
            try:
                self.workers[contender.name].receive(latest - time.monotonic())
            except FailedError as error:
                self.drop(contender.name, error)
        return [c for c in started if c.name in self.workers]

    def ask(self, name: str, action: str, **options: Any) -> Figures:
        if name not in self.workers:
            raise FailedError(f"{name} does not run", unexpected=False)
        worker = self.workers[name]
        worker.send(self.job | {"action": action} | options)
        try:
            return worker.receive(min(self.until - time.monotonic(), self.scale * LONGEST_ANSWER))
        except FailedError:  # it may be broken, or answer late
            self.close([name])
            raise

    def try_to(self, name: str, action: str, **options: Any) -> Figures | None:
        """The figures, or None for a contender that is dropped."""
        try:
            return self.ask(name, action, **options)
        except FailedError as error:
            self.drop(name, error)
            return None

    @contextmanager
    def section(self, name: str, seconds: float) -> Iterator[bool]:
        """True if there is time for it; it may take so many seconds of the usual budget. What goes wrong in it ends no
        other.
        """
        seconds *= self.scale
        enough = self.left() > seconds / 2
        if not enough:
            self.skipped[name] = (
                f"{max(self.left(), 0):.0f} s were left, and it may take {seconds:.0f}"
            )
        self.until = time.monotonic() + min(seconds, self.left())
        began = time.monotonic()
        try:
            yield enough
        except FailedError as error:
            self.drop(name, error)
        except (
            Exception
        ) as error:  # a fault of this script, which should not cost the time on a lent machine
            traceback.print_exc()
            self.drop(name, FailedError(f"{type(error).__name__}: {error}"))
        if enough:
            self.sections.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
            print(f"[{name}: {time.monotonic() - began:.0f} s, {max(self.left(), 0):.0f} s left]")
            sys.stdout.flush()
        self.report().save(self.output)

    def report(self) -> Report:
        size = self.job["sizes"]["first"]
        peak = self.machine.get("peak_flops")
        return Report(
            name="step_gpu",
            unit="tokens",
            contenders=[REFERENCE, *LADDER, *OTHER_SIZES],
            rounds=Rounds(self.figures),
            skipped=self.skipped,
            machine=self.machine,
            about={
                "size": size,
                "useful FLOPs, of TFLOP/s and MFU": USEFUL,
                "MFU is of": f"{peak / 1e12:.0f} TFLOP/s, the datasheet's" if peak else "not known",
            },
            goals=goals(self.sections),
            sections=self.sections,
        )


def measure(run: Run) -> None:
    """All sections, the ones with a goal first."""
    with run.section("ceilings", 60) as has_time:
        if has_time:
            table(run, "ceilings")
    with run.section("reference", 90) as has_time:
        if has_time:
            reference(run)
    ladder: list[Contender] = []
    with run.section("ladder", 240) as has_time:
        if has_time:
            ladder = run.open(LADDER)
            ladder = [c for c in ladder if c.run is measured_product or same_losses(run, c.name)]
            take_turns(run, ladder)
    with run.section("steady steps", 30) as has_time:
        if has_time and ladder:
            look_inside(run)
    with run.section("one row", 20) as has_time:
        if has_time and ladder:
            one_row_each(run)
    run.close([c.name for c in LADDER])
    with run.section("other sizes", 130) as has_time:
        if has_time:
            take_turns(run, run.open(OTHER_SIZES))
    run.close([c.name for c in OTHER_SIZES])
    for name, seconds in (
        ("cross-entropy", 60),
        ("optimizer", 30),
        ("products", 30),
        ("attention", 40),
    ):
        with run.section(name, seconds) as has_time:
            if has_time:
                table(run, name)


def table(run: Run, name: str) -> None:
    """A part's rows, printed at once."""
    if PARTS not in run.workers:  # it broke
        run.workers[PARTS] = Worker(PARTS, run.job["device"])
    rows = run.ask(PARTS, name)["rows"]
    run.sections[name] = rows
    print_rows(name, rows)


def reference(run: Run) -> None:
    """The fairseq-like step in fp32: its losses are what others are compared with; it is timed over two steps."""
    run.open([REFERENCE])
    found = run.ask(FAIRSEQ_FP32, "losses")
    run.sections["losses without dropout"] = {FAIRSEQ_FP32: found["losses"]}
    run.figures[FAIRSEQ_FP32] = [run.ask(FAIRSEQ_FP32, "turn", steps=2, warm_up=1)]
    run.close([FAIRSEQ_FP32])


def same_losses(run: Run, name: str) -> bool:
    """Whether a contender computes what the reference does. HF's network is another one, and is believed."""
    losses = run.sections.get("losses without dropout", {})
    answer = run.try_to(name, "losses")
    if answer is None:
        return False
    found = answer["losses"]
    if name == HF:
        losses[f"{HF} (not compared)"] = found
        return True
    if FAIRSEQ_FP32 not in losses:
        run.drop(name, FailedError("no losses to compare with: nothing is timed"))
        return False
    losses[name] = found
    expected = losses[FAIRSEQ_FP32]
    fall = (found[0] - found[-1]) / (expected[0] - expected[-1])
    same = abs(found[0] / expected[0] - 1) <= LARGEST_DIFFERENCE
    if same and abs(fall - 1) <= LARGEST_DIFFERENCE_OF_FALL:
        return True
    reason = f"losses without dropout are {found}, but {expected} in {FAIRSEQ_FP32}: not timed"
    run.drop(name, FailedError(reason))
    return False


def take_turns(run: Run, contenders: Sequence[Contender]) -> None:
    """Rounds in which each is timed once; only whole rounds count."""
    for number in range(run.rounds):
        # Others had the device's memory in between: the first steps ask for it again.
        warm_up = run.job["warm_up"] if number else run.job["first_warm_up"]
        whole: dict[str, Figures] = {}
        for contender in contenders:
            if contender.name in run.workers:
                found = run.try_to(contender.name, "turn", warm_up=warm_up)
                if found is not None:
                    whole[contender.name] = found
        # One that has dropped out has fewer rounds than the others, and so no ratio.
        for name in [c.name for c in contenders if c.name not in whole]:
            run.figures.pop(name, None)
        for name, found in whole.items():
            run.figures.setdefault(name, []).append(found)
        if time.monotonic() > run.until - 5:
            break


def look_inside(run: Run) -> None:
    """Host synchronisations, and where the time goes."""
    rows = []
    for name in (OURS, STOCK, PLAIN):
        if name in run.workers:
            found = run.try_to(name, "synchronisations")
            if found is not None:
                run.sections.setdefault("host synchronisations", {})[name] = found
                rows += [{"what": name, f"in {STEADY_STEPS} steps": found.get("count")}]
                rows += [{"what": f"  {place}"} for place in sorted(set(found["places"]))]
    print_rows("host synchronisations", rows)
    found = run.ask(OURS, "profile")
    run.sections["profile"] = found
    print_rows(f"profile of {OURS}, busy {found['busy_ms']:.2f} ms a step", found["top"])
    print(f"waits in {STEADY_STEPS} steps and at the profiler's end: {found['waits_of_all_steps']}")


def one_row_each(run: Run) -> None:
    rows = []
    for name in (PLAIN_EAGER, STOCK_EAGER, EAGER):
        if name in run.workers:
            found = run.try_to(name, "one row")
            if found is not None:
                host = found["host_seconds"] * 1e3
                rows.append({"what": name, "ms": found["wall_seconds"] * 1e3, "host ms": host})
    run.sections["one row"] = rows
    print_rows("a step of one row: nearly all optimizer", rows)


def goals(sections: dict[str, Any]) -> list[Goal]:
    def ratio(text: str, least: float, name: str, other: str, unit: str = "tokens") -> Goal:
        return Goal(text, least, lambda r: r.ratios(name, other, unit, "wall_seconds"))

    def waits(_: Rounds) -> list[float]:
        return [1.0 - sections["host synchronisations"][OURS]["count"]]

    return [
        ratio("share of the matrix product's rate", 0.62, OURS, PRODUCT, "useful_flops"),
        ratio("the same, many rows", 0.66, MANY, PRODUCT_BESIDE, "useful_flops"),
        ratio("times HF's XLM", 2.5, OURS, HF),
        ratio("times a fairseq-like bf16 step", 2.7, OURS, FAIRSEQ),
        ratio("of plain torch's rate", 0.97, OURS, PLAIN),
        Goal(f"1 less the host synchronisations of {STEADY_STEPS} steady steps", 1.0, waits),
    ]


# ---------------------------------------------------------------------------------------- the result


def print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, *([cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    print(f"\n{title}")
    for first, *others in lines:
        padded = [f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True)]
        print("  ".join([f"{first:<{widths[0]}}", *padded]).rstrip())


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def columns(report: Report) -> list[Column]:
    rows = {row["name"]: row for row in report.rows()}
    peak = report.machine.get("peak_flops")

    def rate(row: dict[str, Any], unit: str = "tokens") -> float:
        return float(row[unit] / row["wall_seconds"])

    def times(name: str) -> Column:
        return Column(f"x {name}", lambda row: f"{rate(row) / rate(rows[name]):.2f}")

    def share(row: dict[str, Any]) -> str:
        beside = rows[PRODUCT_BESIDE if row["name"] in SIZES else PRODUCT]
        return f"{rate(row, 'useful_flops') / rate(beside, 'useful_flops'):.1%}"

    return [
        harness.NAME,
        Column("batch", lambda row: f"{row['rows']:.0f} x {row['tokens'] / row['rows']:.0f}"),
        Column("V", lambda row: f"{row['vocab_size']:,.0f}"),
        Column("ms", lambda row: f"{row['wall_seconds'] * 1e3:.2f}"),
        Column("host ms", lambda row: f"{row['host_seconds'] * 1e3:.2f}"),
        Column("tokens/s", lambda row: f"{rate(row):,.0f}"),
        Column("TFLOP/s", lambda row: f"{rate(row, 'useful_flops') / 1e12:.1f}"),
        Column("MFU", lambda row: f"{rate(row, 'useful_flops') / peak:.1%}" if peak else "-"),
        Column("of product", share),
        times(FAIRSEQ_FP32),
        times(FAIRSEQ),
        Column("peak GB", lambda row: f"{row['peak_gb']:.2f}"),
        harness.NOTE,
    ]


def plan(small: bool) -> Job:
    """Sizes and repeats. Small ones only show that everything runs."""
    first = {"vocab_size": 95_000, "rows": 64, "tokens": 256, "layers": 6, "dim": 1024}
    many, few, large = 256, 8, 250_000
    job: Job = {"steps": 10, "warm_up": 2, "first_warm_up": 5, "repeats": 20}
    job |= {"product_side": 8192, "copy_bytes": 8_000_000_000}
    if small:
        first |= {"vocab_size": 500, "rows": 2, "tokens": 32, "layers": 2, "dim": 64}
        many, few, large = 4, 1, 1000
        job |= {"steps": 1, "warm_up": 0, "first_warm_up": 1, "repeats": 1}
        job |= {"product_side": 64, "copy_bytes": 8_000}
    sizes = {
        "first": first,
        "few": first | {"rows": few},
        "many": first | {"rows": many},
        "large": first | {"vocab_size": large},
    }
    return job | {"sizes": sizes, "batches": [few, first["rows"], many]}


def main() -> None:
    began = time.monotonic()
    parser = harness.make_parser(__doc__, "step_gpu.json", budget=BUDGET)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: figures mean nothing")
    arguments = parser.parse_args()
    run = Run(
        job=plan(arguments.small) | {"device": arguments.device},
        deadline=began + arguments.budget,
        output=arguments.output,
        peers=not arguments.no_peers,
        rounds=1 if arguments.small else arguments.rounds,
        scale=arguments.budget / BUDGET,
        machine=harness.machine(),
    )
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # `finally` ends the processes
    try:
        parts = run.workers[PARTS] = Worker(PARTS, arguments.device)
        parts.send(run.job | {"action": "device"})
        try:
            facts = parts.receive(LONGEST_ANSWER)
        except FailedError as error:
            sys.exit(f"torch and this checkout do not start: {error}")
        if not facts.pop("available"):
            sys.exit("no GPU that torch can use; --device cpu --small rehearses without one")
        run.machine |= facts
        measure(run)
    finally:
        run.close(list(run.workers))
    report = run.report()
    print()
    report.show(columns(report))
    measured = {row["goal"] for row in report.goal_rows()}
    for goal in report.goals:
        if goal.text not in measured:
            print(f"goal  {goal.text}: not measured")
    report.save(run.output)
    if run.faults:
        sys.exit(f"failed: {', '.join(run.faults)}; why stands above under skipped")


if __name__ == "__main__":
    main()
