"""Says what a training run will need and take: memory, speed, hours. Needs no GPU, no torch and no data.

    python -m xlm_ds.plan --vocab-size 95000 --gpu h200 --gpus 8 --max-tokens 16384 --max-update 100000
    python -m xlm_ds.plan OUT --config run.toml
    python -m xlm_ds.plan OUT --config run.toml --gpu h100 --bandwidth 50 --scale     # 8 to 1,024 GPUs

Takes the flags and files of train. A configuration that cannot fit ends with exit code 2 and the flag that mends it; of
one that is slower than it need be, that is said. train --dry-run says the same for the machine that it is started on.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from xlm_ds import _core
from xlm_ds.architectures import parameters_by_part, shape_from_config
from xlm_ds.config import (
    DataConfig,
    ModelConfig,
    OptimizationConfig,
    PlanConfig,
    RunConfig,
)
from xlm_ds.costs import (
    USABLE,
    Job,
    fits,
    host_memory,
    memory,
    peak,
    seconds,
)
from xlm_ds.dataset import dictionary_path
from xlm_ds.deepspeed_config import (
    CONFIG_DIRECTORY,
    default_deepspeed_config,
    read_deepspeed_config,
)
from xlm_ds.devices import GIB, GPUS, Device, this_cpu
from xlm_ds.dictionary import Dictionary
from xlm_ds.flags import parse
from xlm_ds.geometry import batch_geometry, rows_that_fit
from xlm_ds.log import EXIT_OK, InputError, logger, run_stage
from xlm_ds.peer_flags import TRAIN_FLAGS
from xlm_ds.streams import choose, open_streams

XLM_LANGUAGES = 15
LARGE_SHARE = 0.2  # of an update, for what is not computing
WORTH_SAYING = 1.1  # times as fast
SCALE = tuple(2**k for k in range(3, 11))  # GPUs: 8 to 1,024
DIVIDED = {
    1: "masters and moments",
    2: "masters, moments and gradients",
    3: "weights, masters, moments and gradients",
}
HOW = (
    "Memory follows from the code; speeds are a model and not measured: shares of the makers' peaks that are mostly "
    "estimates (xlm_ds/costs.py), no waiting for data, validation or checkpoints."
)


class Facts(NamedTuple):
    """What is known of the data."""

    vocab_size: int
    languages: int
    epoch_samples: int | None = None


class Ground(NamedTuple):
    """What the run would stand on."""

    device: Device
    ranks: int
    per_node: int
    bandwidth: float = 12.5e9  # bytes a second, in and out of a node


def build_job(
    data: DataConfig,
    model: ModelConfig,
    optimization: OptimizationConfig,
    run: RunConfig,
    facts: Facts,
    ground: Ground,
) -> Job:
    """Raises InputError for what train would refuse before it starts."""
    device, ranks, per_node, bandwidth = ground
    kind = "cpu" if device.is_cpu else "cuda"
    path = run.deepspeed_config or default_deepspeed_config(kind)
    settings = read_deepspeed_config(path, kind)
    tokens = data.tokens_per_sample
    job = Job(
        shape=shape_from_config(
            model,
            vocab_size=facts.vocab_size,
            languages=facts.languages,
            tokens_per_sample=tokens,
        ),
        geometry=batch_geometry(optimization, tokens, ranks),
        tokens=tokens,
        masked=_core.masked_count(max(data.mask_ratio.values), tokens - 1),
        settings=settings,
        device=device,
        gpus_per_node=per_node,
        bandwidth=bandwidth,
        clips=optimization.clip_norm > 0,
    )
    if job.dtype == "bf16" and not device.has_bf16:
        raise InputError(
            f"{path}: a {device.name} has no bf16; --deepspeed-config {CONFIG_DIRECTORY / 'zero1_fp16.json'}"
        )
    return job


def show(
    job: Job,
    optimization: OptimizationConfig,
    facts: Facts,
    *,
    name: str,
    updates_done: int = 0,
    scale: bool = False,
) -> None:
    """Prints the plan, with `scale` that of other numbers of GPUs too. Raises InputError if it cannot fit."""
    sections = [_model(job, name), _memory(job), _computing(job)]
    if fits(job):
        sections.append(_time(job, optimization, facts, updates_done))
        sections += [f"slow: {sentence}" for sentence in slownesses(job, optimization)]
    if scale:
        sections.append(_scale(job, optimization))
    sys.stdout.write("\n\n".join([*sections, HOW]) + "\n")
    sys.stdout.flush()
    if not fits(job):
        raise InputError(refusal(job, optimization))


# ---------------------------------------------------------------------------------------- sections


def _model(job: Job, name: str) -> str:
    parts = parameters_by_part(job.shape)
    rows = [(part, f"{count:,}") for part, count in parts.items()]
    return _table(f"{name}: parameters", ("",), [*rows, ("sum", f"{job.parameters:,}")])


def _memory(job: Job) -> str:
    parts = memory(job)
    rows = [(part, *(f"{m / GIB:.2f}" for m in moments)) for part, moments in parts.items()]
    sums = [f"{sum(column) / GIB:.2f}" for column in zip(*parts.values(), strict=True)]
    where = "process" if job.device.is_cpu else "GPU"
    lines = [
        _table(f"GiB of a {where}, {job.dtype}", ("backward", "update"), [*rows, ("sum", *sums)]),
        f"The peak is {peak(job) / GIB:.1f} of {job.device.memory / GIB:.0f} GiB ({job.device.name}), of which "
        f"{USABLE:.0%} can be used. ZeRO {job.stage} divides {DIVIDED[job.stage]} among {_ranks(job)}.",
    ]
    if job.offloads:
        lines.append(
            f"Each keeps {host_memory(job) / GIB:.1f} GiB of masters and moments on its host."
        )
    if rows_that_fit := largest_rows(job):
        lines.append(f"The largest --max-tokens that fits is {rows_that_fit * job.tokens}.")
    return "\n".join(lines)


def _computing(job: Job) -> str:
    flops = job.micro_flops
    parts = ", ".join(f"{name} {f / job.micro_tokens / 1e6:.1f}" for name, f in flops.items())
    total = sum(flops.values()) / job.micro_tokens / 1e6
    return (
        f"{total:.1f} million useful floating point operations a token ({parts}): three times the forward matrix "
        "products, attention over the whole row, the head at masked tokens only; nothing that is computed twice."
    )


def _time(job: Job, optimization: OptimizationConfig, facts: Facts, updates_done: int) -> str:
    parts = seconds(job)
    g = job.geometry
    update = (
        f"{job.update_tokens:,} tokens ({g.rows} rows x {g.accumulation} micro-batches x {g.world_size} ranks of "
        f"{job.tokens})"
    )
    if not parts:
        return f"An update is {update}. Speeds of a {job.device.name} are not known here."
    total = sum(parts.values())
    rows = [(part, f"{s * 1e3:.2f}", f"{s / total:.0%}") for part, s in parts.items()]
    rows.append(("sum", f"{total * 1e3:.2f}", ""))
    rate = job.update_tokens / total
    flops = job.update_flops / total
    lines = [
        f"An update is {update}.",
        _table("milliseconds of an update", ("", "share"), rows),
        f"{_figures(rate)} tokens/s, {_figures(rate / job.ranks)} a rank: {flops / 1e12:.3g} useful TFLOP/s, "
        f"{flops / job.flop_peak:.0%} of the peak of {job.flop_peak / 1e12:.3g}. "
        f"The limit is {_limit(parts)}.",
        *(_hours(job, optimization, facts, total, updates_done)),
    ]
    return "\n".join(lines)


def _hours(
    job: Job, optimization: OptimizationConfig, facts: Facts, update_seconds: float, done: int
) -> Iterator[str]:
    def needs(updates: float) -> str:
        tokens = updates * job.update_tokens
        return f"{_figures(tokens)} tokens in {_duration(updates * update_seconds)}"

    if optimization.max_update:
        left = max(0, optimization.max_update - done)
        after = f", {done} of them done" if done else ""
        yield f"--max-update {optimization.max_update}{after}: {needs(left)}."
    if facts.epoch_samples is not None:
        updates = math.ceil(facts.epoch_samples / job.geometry.batch)
        yield f"An epoch is {updates} updates, {needs(updates)}."
        if optimization.max_epoch:
            yield f"--max-epoch {optimization.max_epoch}: {needs(optimization.max_epoch * updates)}."
    if not optimization.max_update and facts.epoch_samples is None:
        yield f"A billion tokens take {_duration(1e9 / job.update_tokens * update_seconds)}."


def _limit(parts: dict[str, float]) -> str:
    largest = max(parts, key=lambda name: parts[name])
    return {"between them": "memory bandwidth between matrix products"}.get(largest, largest)


def _table(title: str, heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """Names to the left, figures to the right."""
    lines = [(title, *heads), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _figures(number: float) -> str:
    """Three of them."""
    if number < 1000:
        return f"{number:.3g}"
    return f"{round(number, 2 - math.floor(math.log10(number))):,.0f}"


def _duration(length_seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if length_seconds >= length:
            return f"{_figures(length_seconds / length)} {unit}"
    return f"{_figures(length_seconds)} seconds"


def _ranks(job: Job) -> str:
    return "1 rank" if job.ranks == 1 else f"{job.ranks} ranks"


# -------------------------------------------------------------------------------------- other jobs


def divided(job: Job, rows: int, accumulation: int) -> Job:
    geometry = job.geometry._replace(rows=rows, accumulation=accumulation)
    return dataclasses.replace(job, geometry=geometry)


def with_settings(job: Job, name: str) -> tuple[Job, Path]:
    """The same under one of the configurations that come with the program."""
    path = CONFIG_DIRECTORY / f"{name}.json"
    settings = read_deepspeed_config(path, "cpu" if job.device.is_cpu else "cuda")
    return dataclasses.replace(job, settings=settings), path


def largest_rows(job: Job) -> int:
    """Rows of the largest micro-batch that fits; 0 if none does."""
    too_many = 1
    while fits(divided(job, too_many, job.geometry.accumulation)):
        too_many *= 2
    fitting = too_many // 2
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if fits(divided(job, middle, job.geometry.accumulation)):
            fitting = middle
        else:
            too_many = middle
    return fitting


def refusal(job: Job, optimization: OptimizationConfig) -> str:
    """Why it cannot run, and what would."""
    found = (
        f"a rank needs {peak(job) / GIB:.1f} GiB, and the {job.device.name} has "
        f"{job.device.memory / GIB:.0f} GiB, of which {USABLE:.0%} can be used"
    )
    return f"{found}; {next(_mends(job, optimization))}"


def _mends(job: Job, optimization: OptimizationConfig) -> Iterator[str]:
    geometry = job.geometry
    # A micro-batch of its own accumulates in fp32 only where there are several: ask for what will be run.
    smaller = largest_rows(divided(job, 1, max(2, geometry.accumulation)))
    if smaller and smaller < geometry.rows:
        yield _smaller_batch(job, smaller, optimization)
    for name in ("zero1_bf16", "zero2_bf16", "zero3_bf16"):
        other, path = with_settings(job, name)
        if not other.device.has_bf16 or other.settings == job.settings:
            continue
        if fits(other):
            yield f"--deepspeed-config {path} fits"
        elif rows := largest_rows(other):
            yield f"--deepspeed-config {path} with --max-tokens {rows * job.tokens} fits"
    if job.device.has_bf16 and not job.device.is_cpu:  # whose ranks would share its memory
        other, path = with_settings(divided(job, 1, geometry.accumulation), "zero3_bf16")
        for doublings in range(1, 11):
            ranks = job.ranks * 2**doublings
            more = other.geometry._replace(world_size=ranks)
            if fits(dataclasses.replace(other, geometry=more)):
                tokens = f"--max-tokens {job.tokens}"
                yield f"{ranks} GPUs with --deepspeed-config {path} and {tokens} fit"
                break
    yield "lower --tokens-per-sample, --encoder-layers or --encoder-embed-dim, or take a device with more memory"


def _smaller_batch(job: Job, rows: int, optimization: OptimizationConfig) -> str:
    samples = job.geometry.rows * job.geometry.accumulation
    rows = next((r for r in range(rows, rows // 2, -1) if samples % r == 0), rows)
    flags = f"--max-tokens {rows * job.tokens} fits"
    if optimization.global_batch_tokens is None:
        flags += f", with --update-freq {math.ceil(samples / rows)} for as many tokens an update"
    return flags


# -------------------------------------------------------------------------------------------- slow


OTHER_MENDS = {
    "optimizer": "more GPUs to divide it among, or one that is not offloaded, may",
    "communication": "a faster network, fewer GPUs or a lower ZeRO stage may",
    "waiting for kernel launches": "a wider model would use such a GPU better",
}


def slownesses(job: Job, optimization: OptimizationConfig) -> Iterator[str]:
    """What makes it slower than it need be, each with the flag that mends it."""
    parts = seconds(job)
    total = sum(parts.values())
    if not total:
        return
    tokens = job.geometry.rows * job.geometry.accumulation * job.tokens
    for part, why in (
        ("optimizer", f"takes {{share:.0%}} of an update of {tokens:,} tokens a rank"),
        ("communication", f"takes {{share:.0%}} of an update of {tokens:,} tokens a rank"),
        ("waiting for kernel launches", "takes {share:.0%}, for micro-batches are small"),
    ):
        share = parts.get(part, 0.0) / total
        if share > LARGE_SHARE:
            mend = (
                _larger_update(job, optimization, part)
                or f"no larger update that fits mends it; {OTHER_MENDS[part]}"
            )
            yield f"{part} {why.format(share=share)}; {mend}"
    if not job.device.is_cpu and job.dtype == "fp32" and job.device.has_bf16:
        other, path = with_settings(job, "zero1_bf16")
        yield f"matrix products in fp32; --deepspeed-config {path} is {_times(other, job):.1f} times as fast"
    yield from _fewer_pieces(job, optimization)


def _larger_update(job: Job, optimization: OptimizationConfig, part: str) -> str | None:
    """The flag for the smallest update, a power of two times this one, in which the part's share is small."""

    def small(other: Job) -> bool:
        parts = seconds(other)
        return parts.get(part, 0.0) <= LARGE_SHARE * sum(parts.values())

    rows, accumulation = job.geometry.rows, job.geometry.accumulation
    ways: list[tuple[str, Callable[[int], Job], Callable[[int], int]]] = [
        ("--max-tokens", lambda k: divided(job, rows * k, accumulation), lambda k: rows * k * job.tokens),
        ("--update-freq", lambda k: divided(job, rows, accumulation * k), lambda k: accumulation * k),
    ]  # fmt: skip
    for flag, change, value in ways:
        for k in (2**doublings for doublings in range(1, 9)):
            other = change(k)
            if not fits(other):
                break
            if small(other):
                said = f"{flag} {value(k)}"
                if optimization.global_batch_tokens is not None:
                    said = f"--global-batch-tokens {other.update_tokens}"
                    said += f" with {flag} {value(k)}" if flag == "--max-tokens" else ""
                return (
                    f"{said} makes it {seconds(other).get(part, 0) / sum(seconds(other).values()):.0%} and training "
                    f"{_times(other, job):.1f} times as fast, in updates of {k} times the tokens: another recipe, in "
                    "which --lr may want to rise"
                )
    return None


def _fewer_pieces(job: Job, optimization: OptimizationConfig) -> Iterator[str]:
    samples = job.geometry.rows * job.geometry.accumulation
    fitting = [
        rows
        for rows in range(job.geometry.rows + 1, samples + 1)
        if samples % rows == 0 and fits(divided(job, rows, samples // rows))
    ]
    if not fitting:
        return
    other = divided(job, max(fitting), samples // max(fitting))
    if (times := _times(other, job)) > WORTH_SAYING:
        own = optimization.global_batch_tokens is None
        freq = f" --update-freq {other.geometry.accumulation}" if own else ""
        yield (
            f"micro-batches are small; --max-tokens {other.micro_tokens}{freq} is the same update, {times:.1f} times "
            "as fast"
        )


def _times(faster: Job, job: Job) -> float:
    """How many times as many tokens per second."""
    rates = [j.update_tokens / sum(seconds(j).values()) for j in (faster, job)]
    return rates[0] / rates[1]


# ------------------------------------------------------------------------------------------- scale


class Reached(NamedTuple):
    """What so many GPUs reach."""

    tokens_per_second: float
    efficiency: float
    communication: float  # seconds of an update


def at_stage(job: Job, stage: int) -> Job:
    """The same by our JSON of another stage; in another precision than bf16 with what that says of ZeRO alone."""
    if job.stage == stage:
        return job
    other, _ = with_settings(job, f"zero{stage}_bf16")
    if job.dtype == other.dtype:
        return other
    settings = {**job.settings, "zero_optimization": other.zero}
    return dataclasses.replace(job, settings=settings)


def with_same_batch(job: Job, optimization: OptimizationConfig, gpus: int) -> Job | None:
    """Its update, divided among so many GPUs; nothing if it cannot be."""
    if job.geometry.batch % gpus:
        return None
    fixed = dataclasses.replace(optimization, global_batch_tokens=job.update_tokens)
    return dataclasses.replace(job, geometry=batch_geometry(fixed, job.tokens, gpus))


def with_same_share(job: Job, gpus: int) -> Job:
    """So many GPUs, each with as many tokens of an update as one has now."""
    return dataclasses.replace(job, geometry=job.geometry._replace(world_size=gpus))


def reached(job: Job, optimization: OptimizationConfig) -> Reached:
    """Efficiency is the share, in (0, 1], of the tokens/s that as many GPUs had if an update were its forward and
    backward passes in micro-batches of --max-tokens, and nothing else.
    """
    total = sum(seconds(job).values())
    rows = rows_that_fit(optimization.max_tokens, job.tokens)
    alone = _passes(divided(job, rows, 1)) / rows
    samples = job.geometry.rows * job.geometry.accumulation
    return Reached(
        tokens_per_second=job.update_tokens / total,
        efficiency=samples * alone / total,
        communication=seconds(job).get("communication", 0.0),
    )


def _passes(job: Job) -> float:
    """Seconds of the forward and backward passes of an update."""
    return sum(s for part, s in seconds(job).items() if part not in ("optimizer", "communication"))


def _scale(job: Job, optimization: OptimizationConfig) -> str:
    if job.device.speed is None:
        return (
            f"Speeds of a {job.device.name} are not known here, nor what more of them would reach."
        )
    samples = job.geometry.rows * job.geometry.accumulation
    per_node = f"{job.gpus_per_node} a machine, {job.bandwidth / 1e9:g} GB/s in and out of each"
    return "\n\n".join([
        f"More or fewer GPUs ({job.device.name}, {per_node}). Communication is of an update, and all of it "
        "waited for. Efficiency is the share of the tokens/s that they would reach if an update were its forward and "
        "backward passes in micro-batches of --max-tokens, and nothing else. Of -, the update cannot be divided so, or "
        "does not fit. Assumed: every collective is a ring through all machines, whose slowest link decides, with a "
        "delay at each GPU; nothing of it is hidden behind computing (docs/decisions/0011-scale.md).",
        _scale_table(
            f"updates of {job.update_tokens:,} tokens",
            optimization,
            [with_same_batch(job, optimization, gpus) for gpus in SCALE],
        ),
        _scale_table(
            f"{samples * job.tokens:,} tokens a GPU",
            optimization,
            [with_same_share(job, gpus) for gpus in SCALE],
        ),
    ])  # fmt: skip


def _scale_table(title: str, optimization: OptimizationConfig, jobs: Sequence[Job | None]) -> str:
    heads = [
        f"{what}ZeRO {stage}" if stage == 1 else f"{stage}"
        for what in ("tokens/s: ", "efficiency: ", "communication, ms: ")
        for stage in (1, 2, 3)
    ]
    rows = []
    for gpus, job in zip(SCALE, jobs, strict=True):
        stages = [at_stage(job, stage) for stage in (1, 2, 3)] if job else []
        found = [reached(j, optimization) if fits(j) else None for j in stages] or [None] * 3
        cells = [
            *(_figures(r.tokens_per_second) if r else "-" for r in found),
            *(f"{r.efficiency:.1%}" if r else "-" for r in found),
            *(f"{r.communication * 1e3:.1f}" if r else "-" for r in found),
        ]
        rows.append((f"{gpus} GPUs", *cells))
    return _table(title, heads, rows)


# ------------------------------------------------------------------------------------------- stage


def read_facts(config: PlanConfig) -> Facts:
    """From the data where they are there, else from flags."""
    folder = config.data.data
    if folder is not None and not folder.is_dir():
        if config.vocab_size is None:
            raise InputError(f"{folder}: no such folder; give what binarize wrote, or --vocab-size")
        logger.info(f"{folder}: is not there; planned by --vocab-size and --languages")
        folder = None
    choice = choose(config.data.monolingual_langs, config.data.mlm_steps, folder)
    if folder is None:
        if config.vocab_size is None:
            raise InputError("give DATA, what binarize wrote, or --vocab-size")
        return Facts(config.vocab_size, config.languages or len(choice.languages) or XLM_LANGUAGES)
    dictionary = Dictionary.load(dictionary_path(folder, choice.languages))
    train = open_streams(
        folder,
        "train",
        choice,
        tokens_per_sample=config.data.tokens_per_sample,
        break_mode=config.data.sample_break_mode,
        vocab_size=len(dictionary),
        dictionary_sha256=dictionary.sha256,
    )
    return Facts(
        config.vocab_size or len(dictionary),
        config.languages or len(choice.languages),
        sum(stream.blocks for stream in train),
    )


def main(argv: Sequence[str]) -> int:
    config = parse(PlanConfig, argv, peers=TRAIN_FLAGS, description=__doc__)
    per_node = config.gpus_per_node
    if config.gpu == "cpu":  # its cores are divided among those that there are
        per_node = min(config.gpus, per_node)
    device = this_cpu(per_node) if config.gpu == "cpu" else GPUS[config.gpu]
    ground = Ground(device, config.gpus, per_node, config.bandwidth * 1e9)
    facts = read_facts(config)
    job = build_job(config.data, config.model, config.optimization, config.run, facts, ground)
    show(job, config.optimization, facts, name=config.model.arch, scale=config.scale)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_stage("plan", main, log_to=sys.stderr))  # the plan alone is the output
