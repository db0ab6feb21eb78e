"""What a process of step_gpu.py does: it builds one contender, and then answers a job a line until it is ended.

A contender keeps its process between its turns, as building and compiling take longer than what is measured.
"""

import functools
import json
import os
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import harness
from harness import Contender, Figures, Job, SkippedError

UPDATES_COMPARED = 3
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


if __name__ == "__main__":
    serve(sys.argv[1])
