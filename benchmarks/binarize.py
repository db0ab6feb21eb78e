"""Binarizing, side by side in one run: ours, a per-line loop as fairseq's, and a plain Python loop.

    python benchmarks/binarize.py [TEXT VOCABULARY] [--rounds 5]

Without files, the text is the tests' BPE'd lines, repeated. Rounds are interleaved; figures are medians. CPU seconds
are user + system of the call, start-up left out.
"""

import argparse
import json
import os
import platform
import re
import statistics
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from xlm_ds import _core
from xlm_ds.dictionary import Dictionary

ROOT = Path(__file__).parent.parent
SLOW_BYTES = 4_000_000  # of the text, for the Python loops
REPEATED_BYTES = 64_000_000


def repository_text(folder: Path) -> tuple[Path, Path]:
    """The tests' golden text, repeated, and its dictionary."""
    with tarfile.open(ROOT / "tests" / "data" / "golden" / "fairseq.tar.xz") as archive:
        members = [archive.extractfile(f"text/train.{lg}") for lg in ("ar", "de", "en", "fr", "hi")]
        once = b"".join(member.read() for member in members if member is not None)
        vocabulary = archive.extractfile("vocab.small")
        assert vocabulary is not None
        (folder / "vocab.small").write_bytes(vocabulary.read())
    (folder / "text.all").write_bytes(once * (REPEATED_BYTES // len(once)))
    return folder / "text.all", folder / "vocab.small"


class FairseqLike:
    """What fairseq does for every line: a regular expression, a tensor; for each word a call, a look-up, a consumer."""

    def __init__(self, symbols: Sequence[str]) -> None:
        self.ids = {symbol: number for number, symbol in enumerate(symbols)}
        self.replaced: Counter[str] = Counter()
        self.blanks = re.compile(r"\s+")

    def index(self, symbol: str) -> int:
        return self.ids[symbol] if symbol in self.ids else 3  # noqa: SIM401 (as it is there)

    def count_replaced(self, word: str, number: int) -> None:
        if number == 3 and word != "<unk>":
            self.replaced[word] += 1

    def encode_line(self, line: str) -> torch.Tensor:
        words = self.blanks.sub(" ", line).strip().split()
        encoded = torch.IntTensor(len(words) + 1)
        for i, word in enumerate(words):
            number = self.index(word)
            self.count_replaced(word, number)
            encoded[i] = number
        encoded[len(words)] = 2
        return encoded

    def run(self, text: Path, output: Path) -> None:
        with text.open(encoding="utf-8") as lines, output.open("wb") as out:
            for line in lines:
                out.write(
                    np.array(self.encode_line(line).numpy(), dtype=np.uint16).tobytes(order="C")
                )


def python_loop(text: Path, ids: dict[str, int], output: Path) -> None:
    get = ids.get
    with text.open(encoding="utf-8") as lines, output.open("wb") as out:
        for line in lines:
            encoded = [get(word, 3) for word in line.split()]
            encoded.append(2)
            out.write(np.array(encoded, dtype=np.uint16).tobytes())


def ours(text: Path, dictionary: _core.Dictionary, output: Path, threads: int) -> None:
    lengths, pieces = output.parent / "ours.lengths", [_core.Piece(text)]
    mmap, progress = _core.IndexKind.mmap, _core.Progress()
    _core.encode_text(pieces, dictionary, mmap, output, lengths, threads, progress)
    _core.write_text_index(output.parent / "ours.idx", mmap, len(dictionary), lengths)


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    before, wall = os.times(), time.perf_counter()
    call()
    after = os.times()
    return time.perf_counter() - wall, (after.user + after.system) - (before.user + before.system)


def cut(text: Path, size: int, folder: Path) -> Path:
    """The first `size` bytes or so, whole lines."""
    content = text.read_bytes()[:size]
    short = folder / "short"
    short.write_bytes(content[: content.rindex(b"\n") + 1])
    return short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="TEXT VOCABULARY")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/binarize.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text, vocabulary = arguments.files or repository_text(folder)
        dictionary = Dictionary.load(vocabulary)
        ids = {symbol: number for number, symbol in enumerate(dictionary.symbols)}
        fairseq = FairseqLike(dictionary.symbols)
        core = _core.Dictionary(dictionary.symbols)
        short = cut(text, SLOW_BYTES, folder)
        outputs = [folder / name for name in ("a.bin", "b.bin", "c.bin", "d.bin")]
        runs: dict[str, tuple[Path, Callable[[], None]]] = {
            "fairseq-like loop": (short, lambda: fairseq.run(short, outputs[0])),
            "plain Python loop": (short, lambda: python_loop(short, ids, outputs[1])),
            "xlm_ds, 1 worker": (text, lambda: ours(text, core, outputs[2], 1)),
            "xlm_ds, 2 workers": (text, lambda: ours(text, core, outputs[3], 2)),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, (_, call) in runs.items():
                seconds[name].append(timed(call))
        if len(dictionary) < 65500:
            same = outputs[2].read_bytes().startswith(outputs[0].read_bytes())
            assert same, "the loops do not give the same ids, so their times say nothing"
    rates = {}
    print(f"{'':20} {'MB/s wall':>10} {'MB/CPU-s':>10} {'x fairseq-like (CPU)':>22}")
    for name, (path_text, _) in runs.items():
        size = (
            SLOW_BYTES
            if path_text == short
            else REPEATED_BYTES
            if not arguments.files
            else text.stat().st_size
        ) / 1e6
        wall, cpu = (statistics.median(column) for column in zip(*seconds[name], strict=True))
        rates[name] = {"mb_per_second": size / wall, "mb_per_cpu_second": size / cpu}
        ratio = rates[name]["mb_per_cpu_second"] / rates["fairseq-like loop"]["mb_per_cpu_second"]
        rates[name]["times_fairseq_like"] = ratio
        print(f"{name:20} {size / wall:10.1f} {size / cpu:10.1f} {ratio:22.1f}")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine |= {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": machine, "rates": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
