"""One training step on a GPU, and its parts: ours beside plain torch, a fairseq-like step and HF's XLM.

    python benchmarks/step_gpu.py [--budget 540] [--no-peers]
    python benchmarks/step_gpu.py --device cpu --small            # a rehearsal of all of it, in about a minute

xlm_base in bf16 with fp32 masters, rows of 256 tokens, dropout 0.1, always the same batch; needs one GPU, torch >= 2.11
and this checkout, in which nothing has to be built. A process each, all kept between the rounds, in which they work in
turn. First their losses without dropout are compared; what differs is not timed, and the run ends with status 1. A
section begins only while half of the time that it may take is left. The JSON is written after every section.
"""

import functools
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
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import Column, Contender, Figures, Goal, Job, Report, Rounds, SkippedError

USEFUL = (
    "3 x forward, which is 2 x 12 d^2 + 4 T d per token and layer, attention in full, and 2 (V d + d^2) per masked "
    "token; no lookups, norms or softmax, nothing computed twice; the same for those that compute all logits"
)
LARGEST_DIFFERENCE = 2e-3  # of first losses in bf16, relative
UPDATES_COMPARED = 3
# Of how far the loss has then fallen: that updates are made, and of the right size. ZeRO's masters start from weights
# rounded to bf16, so that the first updates of many weights are rounded the same way, and fall further or less far.
LARGEST_DIFFERENCE_OF_FALL = 0.25
RESERVE = 12.0  # seconds kept for the table
# Seconds of the usual budget; of another, in proportion.
BUDGET = 540.0
LONGEST_ANSWER = 120.0  # compiling is the longest
LONGEST_BUILD = 100.0  # of all processes that start at once
STEADY_STEPS = 3

OURS, EAGER = "xlm_ds", "xlm_ds, layers not compiled"
STOCK, STOCK_EAGER = "xlm_ds, stock ZeRO path", "xlm_ds, stock ZeRO path, layers not compiled"
PLAIN, PLAIN_EAGER = "plain torch", "plain torch, layers not compiled"
FAIRSEQ, FAIRSEQ_FP32, HF = "fairseq-like bf16", "fairseq-like fp32", "HF XLM bf16"
FEW, MANY, LARGE = "xlm_ds, few rows", "xlm_ds, many rows", "xlm_ds, large vocabulary"
PRODUCT, PRODUCT_BESIDE = "matrix product", "matrix product beside other sizes"
PARTS = "parts"

# Each a change of what `plan` says; the others are of the first size.
SIZES = {FEW: "few", MANY: "many", LARGE: "large"}


# -------------------------------------------------------------------------------------- in a child


def size_of(job: Job, kind: str) -> Any:
    from step_models import Size

    return Size(**job["sizes"][SIZES.get(kind, "first")])


@functools.cache
def prepared(kind: str, size: Any, device_name: str) -> tuple[Any, Any]:
    """(the contender, its batch), made once in a process."""
    import step_models as models
    import torch

    device = torch.device(device_name)
    ours = partial(models.engine_update, deepspeed_config="zero1_bf16", flat=True)
    plain = partial(models.plain_update, dtype=torch.bfloat16, device=device)
    fairseq = partial(models.fairseq_update, device=device)
    make = {
        EAGER: ours,
        STOCK: partial(ours, flat=False, compiled=True),
        STOCK_EAGER: partial(ours, flat=False),
        PLAIN: partial(plain, compiled=True),
        PLAIN_EAGER: plain,
        FAIRSEQ: partial(fairseq, dtype=torch.bfloat16),
        FAIRSEQ_FP32: partial(fairseq, dtype=torch.float32),
        HF: partial(models.huggingface_update, dtype=torch.bfloat16, device=device),
    }.get(kind, partial(ours, compiled=True))
    return make(size), size.batch(0, device)


def act(job: Job, kind: str) -> Figures:
    """One of the actions below, in a process that keeps the contender for the next."""
    import torch
    from step_parts import release

    size = size_of(job, kind)
    update, batch = prepared(kind, size, job["device"])
    actions = {
        "build": lambda: {},
        "losses": partial(losses_without_dropout, update, batch, size.dropout),
        "turn": partial(turn, update, batch, size, job),
        "one row": partial(one_row, update, size, job),
        "synchronisations": partial(synchronisations, update, batch),
        "profile": partial(profile, update, batch),
    }
    figures: Figures = actions[job["action"]]()
    release(torch.device(job["device"]))
    return figures


def losses_without_dropout(update: Any, batch: Any, dropout: float) -> Figures:
    """Of the first updates, from the weights that all start with, in the processes that are timed."""
    import torch
    from step_models import set_dropout

    set_dropout(update.network, 0.0)
    losses = [float(update(batch)) for _ in range(UPDATES_COMPARED)]
    set_dropout(update.network, dropout)
    torch._dynamo.reset()  # or a number that has changed may be compiled as one that varies
    return {"losses": losses}


def turn(update: Any, batch: Any, size: Any, job: Job) -> Figures:
    """Medians of some steps."""
    import step_parts as parts
    from step_models import useful_flops

    device = batch.input_ids.device
    row: dict[str, Any] = {}
    with parts.peak_memory(device, row):
        found = parts.laps(
            device, lambda: update(batch), repeats=job["steps"], warm_up=job["warm_up"]
        )
    return {
        "tokens": size.rows * size.tokens,
        "useful_flops": useful_flops(size),
        "wall_seconds": found.median,
        "host_seconds": found.host_seconds,
        "cpu_seconds": max(found.cpu_seconds, 1e-9),
        "peak_gb": row.get("peak GB"),
        "slowest_seconds": max(found.seconds),
        "rows": size.rows,
        "vocab_size": size.vocab_size,
    }


def one_row(update: Any, size: Any, job: Job) -> Figures:
    """A step of one row, which is nearly all optimizer: what its path costs, the passes in backward included."""
    small = replace(size, rows=1)
    batch = small.batch(0, update.network.token_embedding.weight.device)
    return turn(update, batch, small, job)


def synchronisations(update: Any, batch: Any) -> Figures:
    """How often the host waits for the device in steady steps, and where: as torch warns, and its explicit waits."""
    import warnings

    import torch

    update(batch)
    places: list[str] = []
    if batch.input_ids.device.type != "cuda":  # a rehearsal
        for _ in range(STEADY_STEPS):
            update(batch)
        return {"places": places}

    def counted(name: str, wait: Callable[..., Any]) -> Callable[..., Any]:
        def waits(*arguments: Any, **options: Any) -> Any:
            caller = traceback.extract_stack(limit=2)[0]
            places.append(f"{name} from {caller.filename}:{caller.lineno}")
            return wait(*arguments, **options)

        return waits

    # torch warns of none of these.
    explicit = [
        (torch.cuda, "synchronize"),
        (torch.cuda.Stream, "synchronize"),
        (torch.cuda.Event, "synchronize"),
    ]
    waits = [getattr(owner, name) for owner, name in explicit]
    torch.cuda.synchronize()
    for (owner, name), wait in zip(explicit, waits, strict=True):
        setattr(owner, name, counted(f"{owner.__name__}.{name}", wait))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(STEADY_STEPS):
                update(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for (owner, name), wait in zip(explicit, waits, strict=True):
            setattr(owner, name, wait)
    torch.cuda.synchronize()
    places += [
        f"{warning.filename}:{warning.lineno}"
        for warning in caught
        if "synchronizing" in str(warning.message)
    ]
    return {"count": len(places), "places": sorted(places)}


def profile(update: Any, batch: Any) -> Figures:
    """The kernels that take longest, and the calls by which the host waited (two of them are the profiler's own)."""
    import torch
    from step_parts import synchronize

    update(batch)
    cuda = batch.input_ids.device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[kinds.CPU, kinds.CUDA] if cuda else [kinds.CPU]
    ) as trace:
        for _ in range(STEADY_STEPS):
            update(batch)
        synchronize(batch.input_ids.device)
    events = list(trace.key_averages())

    def seconds(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6

    def is_work(event: Any) -> bool:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        is_range = getattr(event, "is_user_annotation", False) or event.key.startswith("##")
        return on_device and not is_range

    work = [event for event in events if is_work(event)] if cuda else events
    work.sort(key=seconds, reverse=True)
    whole = sum(map(seconds, work))
    top = [
        {
            "what": event.key[:90],
            "calls": event.count / STEADY_STEPS,
            "ms": seconds(event) / STEADY_STEPS * 1e3,
            "share": seconds(event) / whole,
        }
        for event in work[:20]
    ]
    waits = {event.key: event.count for event in events if "ynchronize" in event.key}
    return {"busy_ms": whole / STEADY_STEPS * 1e3, "top": top, "waits_of_all_steps": waits}


def part(job: Job) -> Figures:
    import step_parts as parts

    if job["action"] == "device":
        return parts.device_facts(job)
    rows = parts.PARTS[job["action"]](job | {"size": job["sizes"]["first"]})
    return {"rows": rows}


def measured_product(job: Job) -> Figures:
    from step_parts import product

    return product(job)


def serve(name: str) -> None:
    """Answers every job on standard input by a line of JSON; what others print goes to the log."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path.insert(0, str(harness.ROOT))
    stand_in_for_core()
    contender = next(c for c in CONTENDERS if c.name == name)
    for line in sys.stdin:
        try:
            answer = contender.run(json.loads(line))
        except SkippedError as error:
            answer = {"failed": str(error)}
        except Exception as error:  # whatever it is, the parent says it and goes on with the others
            traceback.print_exc()
            first = next(iter(str(error).splitlines()), "")
            answer = {"failed": f"{type(error).__name__}: {first[:200]}", "unexpected": True}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # no tear-down of what is only measured


def stand_in_for_core() -> None:
    """A step needs nothing of the C++ core, but the rooms import it; a bare machine with a GPU need not build it."""
    import importlib.util

    if importlib.util.find_spec("xlm_ds._core") is None:
        from unittest.mock import MagicMock

        core = types.ModuleType("xlm_ds._core")
        vars(core).update(BOS=0, PAD=1, EOS=2, UNK=3, MASK=4)
        vars(core)["InputError"] = type("InputError", (Exception,), {})
        vars(core)["__getattr__"] = lambda name: MagicMock(name=name)
        sys.modules["xlm_ds._core"] = core


def contender(name: str, packages: Sequence[str] = (), note: str = "") -> Contender:
    return Contender(name, partial(act, kind=name), OURS, tuple(packages), note=note)


LADDER = [
    contender(FAIRSEQ, note="all logits, eager"),
    contender(HF, ["transformers"], "all logits, eager, autocast"),
    contender(PLAIN_EAGER, note="our model"),
    contender(PLAIN, note="our model"),
    contender(STOCK_EAGER, ["deepspeed"]),
    contender(STOCK, ["deepspeed"]),
    contender(EAGER, ["deepspeed"]),
    contender(OURS, ["deepspeed"]),
    Contender(PRODUCT, measured_product, ""),
]
OTHER_SIZES = [
    contender(FEW, ["deepspeed"]),
    contender(MANY, ["deepspeed"]),
    contender(LARGE, ["deepspeed"]),
    Contender(PRODUCT_BESIDE, measured_product, ""),
]
REFERENCE = Contender(
    FAIRSEQ_FP32,
    partial(act, kind=FAIRSEQ_FP32),
    "",
    note="as its README has it, without TF32",
)
CONTENDERS = [REFERENCE, *LADDER, *OTHER_SIZES, Contender(PARTS, part, "")]


# ------------------------------------------------------------------------------------- in the parent


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
            [sys.executable, str(Path(__file__).resolve()), "--contender", name, "serve"],
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
    parser = harness.make_parser(__doc__, "step_gpu.json")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds that all may take")
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
    if harness.is_child():
        serve(sys.argv[2])
    else:
        main()
