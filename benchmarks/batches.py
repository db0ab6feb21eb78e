"""Batches per CPU-second: shuffled, masked, 200 million tokens as uint16, int64 out, one process.

    python benchmarks/batches.py [--tokens 200000000] [--rounds 7]

Rounds are interleaved; figures are medians. Beside the rates: the time from opening the files to the first batch, and
what an update's data cost one of eight ranks, to be held against the step of a GPU.
"""

import argparse
import json
import os
import platform
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from xlm_ds import _core
from xlm_ds.batches import Masking, build_batch
from xlm_ds.corpus import Corpus, Geometry, micro_batch, update_targets
from xlm_ds.dataset import TokenDataset
from xlm_ds.dictionary import Dictionary
from xlm_ds.order import Order, build_order, evaluation_samples
from xlm_ds.steps import Steps

ROOT = Path(__file__).parent.parent
VOCAB, LENGTH, RATIO, ROWS = 60_000, 256, 0.15, 32
LINE = 25
BATCHES = 1000


def write_pair(prefix: Path, tokens: int) -> None:
    """Lines of 25 ids, frequent ones as frequent as words are."""
    rng = np.random.default_rng(0)
    lines = tokens // LINE
    with Path(f"{prefix}.bin").open("wb") as data:
        for first in range(0, lines * LINE, 10_000_000):
            count = min(10_000_000, lines * LINE - first)
            (5 + (VOCAB - 5) ** rng.random(count)).clip(max=VOCAB - 1).astype("<u2").tofile(data)
    with Path(f"{prefix}.idx").open("wb") as index:
        index.write(b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, 8, lines))
        np.full(lines, LINE, "<i4").tofile(index)
        (np.arange(lines, dtype="<i8") * 2 * LINE).tofile(index)


def open_pair(prefix: Path) -> TokenDataset:
    core = _core.TokenDataset(prefix, mode=_core.BreakMode.none, block_size=LENGTH - 1)
    return TokenDataset(
        language="xx",
        split="train",
        prefix=prefix,
        tokens_per_sample=LENGTH,
        vocab_size=VOCAB,
        core=core,
    )


def cpu_seconds(call: Callable[[int], object], numbers: range) -> float:
    """CPU seconds of one call, user and system."""
    before = time.process_time()
    for number in numbers:
        call(number)
    return (time.process_time() - before) / len(numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/batches.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    masking = Masking(seed=0, mask_ratio=RATIO, vocab_size=VOCAB)
    ids = np.empty((ROWS, LENGTH), np.int64)
    positions, targets = (np.empty(ROWS * 39, np.int64) for _ in range(2))

    with tempfile.TemporaryDirectory() as scratch:
        prefix = Path(scratch) / "train.xx"
        write_pair(prefix, arguments.tokens)
        starts = []
        for _ in range(arguments.rounds):
            begun = time.perf_counter()
            dataset = open_pair(prefix)
            order = build_order([dataset.blocks], alpha=0.7, seed=0)
            build_batch((dataset,), order.samples(0, ROWS), masking)
            starts.append(time.perf_counter() - begun)

        def fill(samples: tuple[np.ndarray, ...]) -> None:
            names = ("languages", "passes", "blocks")
            _core.fill_batch(
                [dataset.core],
                **dict(zip(names, samples, strict=True)),
                seed=0,
                mask_ratio=RATIO,
                vocab_size=VOCAB,
                input_ids=ids,
                masked_positions=positions,
                targets=targets,
            )

        rank = Geometry(64, 1, 8)
        corpus = corpus_of(dataset, order, masking)
        calls: dict[str, Callable[[int], object]] = {
            "order and fill_batch": lambda i: fill(order.samples(i * ROWS, ROWS)),
            "in sequence, fill_batch": lambda i: fill(in_sequence(i)),
            "order and build_batch": lambda i: build_batch(
                (dataset,), order.samples(i * ROWS, ROWS), masking
            ),
            "64 x 256 micro-batch": lambda i: micro_batch(
                corpus, rank, first=512 * i, micro=0, rank=3
            ),
            "targets of 8 x 64 rows": lambda i: update_targets(corpus, rank, first=512 * i),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(arguments.rounds):
            numbers = range(
                turn * BATCHES, (turn + 1) * BATCHES
            )  # no data twice: the cache would know them
            for name, call in calls.items():
                seconds[name].append(cpu_seconds(call, numbers))
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        },
        "first_batch_ms": 1e3 * statistics.median(starts[1:]),
        "million_tokens_per_cpu_second": {
            name: round(ROWS * LENGTH / statistics.median(seconds[name]) / 1e6)
            for name in list(calls)[:3]
        },
        "cpu_microseconds": {
            name: round(1e6 * statistics.median(seconds[name]), 1) for name in list(calls)[3:]
        },
    }
    print(json.dumps(result, indent=1))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def in_sequence(number: int) -> tuple[np.ndarray, ...]:
    first = number * ROWS
    return evaluation_samples(0, range(first, first + ROWS), draw=0)


def corpus_of(dataset: TokenDataset, order: Order, masking: Masking) -> Corpus:
    dictionary = Dictionary(symbols=(), counts=())
    return Corpus(dictionary, (dataset,), (), order, masking, Steps((RATIO,)))


if __name__ == "__main__":
    main()
