"""One training step on a CPU: ours through DeepSpeed beside a fairseq-like step and HF's XLM.

    python benchmarks/step_cpu.py [--vocab-size 95000] [--rows 8] [--rounds 5] [--no-peers]

xlm_base, rows of 256 tokens, dropout 0.1; a process each and round, one step to warm up and one that is measured. First
the losses without dropout are compared, and nothing is timed if they differ. Peak memory is the process's.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import Column, Contender, Figures, Goal, Job, Rounds, SkippedError, measured

OURS = "xlm_ds fp32"
FAIRSEQ, HF = "fairseq-like fp32", "HF XLM fp32"
BF16 = "xlm_ds bf16"
LARGEST_DIFFERENCE = 1e-4  # of losses, relative, where numerics are the same
LARGEST_DIFFERENCE_BF16 = 2e-3
LONGER = (2, 4, 8)  # times the tokens of a row, in as many fewer rows


def size_of(job: Job, **changes: Any) -> Any:
    from step_models import Size

    return Size(**{**job["size"], **changes})


def builder(kind: str) -> Any:
    """A function from a Size to an update."""
    import step_models as models
    import torch

    cpu = torch.device("cpu")
    return {
        OURS: partial(models.engine_update, deepspeed_config="zero1_fp32"),
        BF16: partial(models.engine_update, deepspeed_config="zero1_bf16"),
        "plain torch fp32": partial(models.plain_update, dtype=torch.float32, device=cpu),
        "plain torch bf16": partial(models.plain_update, dtype=torch.bfloat16, device=cpu),
        FAIRSEQ: partial(models.fairseq_update, dtype=torch.float32, device=cpu),
        HF: partial(models.huggingface_update, dtype=torch.float32, device=cpu),
    }[kind]


def one_step(job: Job, kind: str, **changes: Any) -> Figures:
    size = size_of(job, **changes)
    update = builder(kind)(size)
    batch = size.batch(0)
    update(batch)
    with measured() as figures:
        loss = float(update(batch))
    return figures | {"tokens": size.rows * size.tokens, "loss": loss}


def first_loss(job: Job, kind: str) -> Figures:
    """Without dropout, of the weights that all start with."""
    size = size_of(job, dropout=0.0)
    return {"loss": float(builder(kind)(size)(size.batch(0)))}


def longer(job: Job, kind: str, times: int) -> Figures:
    rows, tokens = job["size"]["rows"], job["size"]["tokens"]
    if rows < times:
        raise SkippedError(f"as many tokens in fewer rows need {times} rows")
    return one_step(job, kind, tokens=times * tokens, rows=rows // times)


def longer_name(kind: str, times: int) -> str:
    return f"{kind}, rows {times} times as long"


STEPS = [
    Contender(OURS, partial(one_step, kind=OURS), OURS),
    Contender(BF16, partial(one_step, kind=BF16), OURS, note="fp32 masters"),
    Contender(
        "plain torch fp32",
        partial(one_step, kind="plain torch fp32"),
        OURS,
        note="our model, no DeepSpeed",
    ),
    Contender(
        "plain torch bf16",
        partial(one_step, kind="plain torch bf16"),
        BF16,
        note="our model, no DeepSpeed",
    ),
    Contender(FAIRSEQ, partial(one_step, kind=FAIRSEQ), OURS, note="all logits, eager"),
    Contender(HF, partial(one_step, kind=HF), OURS, ("transformers",), note="all logits, eager"),
    *(
        Contender(longer_name(kind, times), partial(longer, kind=kind, times=times), kind)
        for times in LONGER
        for kind in (OURS, BF16)
    ),
]
LOSSES = [
    Contender(f"first loss of {kind}", partial(first_loss, kind=kind), OURS)
    for kind in (OURS, BF16, "plain torch fp32", "plain torch bf16", FAIRSEQ)
]


def memory_ratio(rounds: Rounds, name: str, other: str) -> list[float]:
    pairs = zip(rounds.column(name, "peak_bytes"), rounds.column(other, "peak_bytes"), strict=True)
    return [peak / other_peak for peak, other_peak in pairs]


def goals() -> list[Goal]:
    def speed(text: str, least: float, name: str, other: str) -> Goal:
        return Goal(text, least, lambda r: r.ratios(name, other, "tokens"))

    def memory(text: str, most: float, name: str, other: str) -> Goal:
        # A goal is a least: how many times the most that was allowed.
        return Goal(text, 1.0, lambda r: [most / value for value in memory_ratio(r, name, other)])

    return [
        speed("fp32, times a fairseq-like step", 1.65, OURS, FAIRSEQ),
        speed("bf16, times a fairseq-like step", 3.3, BF16, FAIRSEQ),
        speed("fp32, times HF's XLM", 1.6, OURS, HF),
        memory("bf16, 0.65 of a fairseq-like step's peak memory over ours", 0.65, BF16, FAIRSEQ),
        *(
            memory(f"{kind}, 1.3 times its peak memory over that in rows {times} times as long", 1.3,
                   longer_name(kind, times), kind)
            for times in LONGER
            for kind in (OURS, BF16)
        ),
    ]  # fmt: skip


COLUMNS = [
    harness.NAME,
    *harness.SECONDS,
    Column("tokens/CPU-s", lambda row: f"{row['tokens_per_cpu_second']:.0f}"),
    Column("peak GB", lambda row: f"{row['peak_bytes'] / 1e9:.2f}"),
    Column("ours is times [min … max]", lambda row: harness.shown(row["ratio"])),
    harness.NOTE,
]


def check_losses(job: Job, arguments: Any) -> dict[str, float]:
    """Without dropout, by contender. Ends the run if they differ: a speed of something else is no speed."""
    once = type(arguments)(**{**vars(arguments), "rounds": 1})
    rounds, _ = harness.run(Path(__file__), LOSSES, job, once)
    losses = {
        name.removeprefix("first loss of "): rounds.column(name, "loss")[0]
        for name in rounds.figures
    }
    for kind, loss in losses.items():
        most = LARGEST_DIFFERENCE_BF16 if "bf16" in kind else LARGEST_DIFFERENCE
        if not abs(loss / losses[FAIRSEQ] - 1) <= most:
            sys.exit(
                f"{kind}: the loss is {loss}, but {losses[FAIRSEQ]} in {FAIRSEQ}; nothing is timed"
            )
    return losses


def main() -> None:
    parser = harness.make_parser(__doc__, "step_cpu.json", budget=3600.0)
    for name, default in (
        ("vocab-size", 95_000),
        ("rows", 8),
        ("tokens", 256),
        ("layers", 6),
        ("dim", 1024),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    names = ("vocab_size", "rows", "tokens", "layers", "dim")
    job: Job = {"size": {name: getattr(arguments, name) for name in names}}
    machine = harness.machine()
    losses = check_losses(job, arguments)
    harness.compare(
        "step_cpu",
        job,
        arguments,
        contenders=STEPS,
        unit="tokens",
        about={**job["size"], "first_losses_without_dropout": losses},
        goals=goals(),
        columns=COLUMNS,
        machine=machine,
    )


if __name__ == "__main__":
    harness.start([*STEPS, *LOSSES], main)
