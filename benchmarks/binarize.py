"""Binarizing BPE'd text: ours beside loops in Python, HF tokenizers, and programs that only look at the text.

    python benchmarks/binarize.py [TEXT VOCABULARY] [--megabytes 64] [--rounds 5] [--no-peers]

TEXT is BPE'd text and VOCABULARY its dictionary (`symbol count` a line); without them, the demo corpus with 20,000
codes. Its lines are shuffled and repeated to --megabytes. Every contender writes ids to a file, which are compared.
"""

import itertools
import os
import random
import re
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import corpus
import harness
from corpus import EOS, UNK, check_ids, encode_with_dictionary, ids_of, load_symbols
from harness import Contender, Figures, Goal, Job, Rounds, SkippedError, measured

if TYPE_CHECKING:
    import torch

SLICE_BYTES = 4_000_000  # of the text, for the slow
SPECIALS = 5
WIDE_WORDS = 95_000  # symbols of XLM's dictionary for 15 languages; its ids need uint32

# ------------------------------------------------------------------------------------------- peers


class FairseqLike:
    """What fairseq-preprocess does: for every line a position, a regular expression, a tensor and an array; for every
    word a call that looks it up, a call that is told its id, and an item set in the tensor.
    """

    def __init__(self, symbols: list[str]) -> None:
        import torch

        self.new_tensor = torch.IntTensor
        self.ids = {symbol: number for number, symbol in enumerate(symbols)}
        self.replaced: Counter[str] = Counter()
        self.blanks = re.compile(r"\s+")

    def index(self, symbol: str) -> int:
        if symbol in self.ids:
            return self.ids[symbol]
        return UNK

    def count_replaced(self, word: str, number: int) -> None:
        if number == UNK and word != "<unk>":
            self.replaced.update([word])

    def encode_line(self, line: str) -> "torch.Tensor":
        words = self.blanks.sub(" ", line).strip().split()
        encoded = self.new_tensor(len(words) + 1)
        for i, word in enumerate(words):
            number = self.index(word)
            self.count_replaced(word, number)
            encoded[i] = number
        encoded[len(words)] = EOS
        return encoded

    def run(self, text: Path, output: Path) -> int:
        """Returns how many ids it wrote to `output`, whose index is written at the end."""
        import numpy as np

        lengths, tokens = [], 0
        with text.open(encoding="utf-8") as lines, output.open("wb") as out:
            while line := lines.readline():
                lines.tell()  # it looks for the end of the worker's part of the file
                encoded = self.encode_line(line)
                tokens += len(encoded)
                out.write(np.array(encoded.numpy(), dtype=np.uint16).tobytes(order="C"))
                lengths.append(len(encoded))
        starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64) * 2
        output.with_suffix(".idx").write_bytes(
            np.array(lengths, np.int32).tobytes() + starts.tobytes()
        )
        return tokens


def fairseq_like(job: Job) -> Figures:
    import numpy as np

    loop, output = FairseqLike(load_symbols(job["vocabulary"])), output_of(job, "fairseq")
    with measured() as figures:
        tokens = loop.run(Path(job["slice"]), output)
    check_ids(output, np.uint16, job["ids"], job["slice_tokens"])
    return figures | {"bytes": job["slice_bytes"], "tokens": tokens}


def python_loop(job: Job) -> Figures:
    import numpy as np

    ids, output = ids_of(load_symbols(job["vocabulary"])), output_of(job, "python")
    with measured() as figures:
        tokens = encode_with_dictionary(Path(job["slice"]), ids, output, np.uint16)
    check_ids(output, np.uint16, job["ids"], job["slice_tokens"])
    return figures | {"bytes": job["slice_bytes"], "tokens": tokens}


def huggingface_word_level(job: Job, method: str) -> Figures:
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = ids_of(load_symbols(job["vocabulary"]))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encode_batch = getattr(tokenizer, method)
    output, tokens = output_of(job, "huggingface"), 0
    text = Path(job["slice"])
    with measured() as figures, text.open(encoding="utf-8") as lines, output.open("wb") as out:
        while batch := list(itertools.islice(lines, 1000)):
            for encoding in encode_batch(batch, add_special_tokens=False):
                encoded = np.array([*encoding.ids, EOS], np.uint16)
                out.write(encoded.tobytes())
                tokens += len(encoded)
    check_ids(output, np.uint16, job["ids"], job["slice_tokens"])
    return figures | {"bytes": job["slice_bytes"], "tokens": tokens}


# -------------------------------------------------------------------------------------------- ours


def core(job: Job, vocabulary: str, ids: str, threads: int) -> Figures:
    """The core at work, without the command around it."""
    import numpy as np

    from xlm_ds import _core

    dictionary = _core.Dictionary(load_symbols(vocabulary))
    output = output_of(job, f"ours{threads}")
    with measured() as figures:
        counts = corpus.write_pair(Path(job["text"]), dictionary, output, threads)
    dtype = np.uint16 if len(dictionary) < 65_500 else np.uint32
    check_ids(output, dtype, ids, job["tokens"])
    return figures | {"bytes": job["bytes"], "tokens": counts.tokens}


def one_worker(job: Job) -> Figures:
    return core(job, job["vocabulary"], job["ids"], 1)


def wide_dictionary(job: Job) -> Figures:
    if job["wide_vocabulary"] is None:
        raise SkippedError(f"the dictionary has {WIDE_WORDS:,} symbols already")
    return core(job, job["wide_vocabulary"], job["wide_ids"], 1)


def two_workers(job: Job) -> Figures:
    if len(os.sched_getaffinity(0)) < 2:
        raise SkippedError("one processor")
    return core(job, job["vocabulary"], job["ids"], 2)


def whole_command(job: Job) -> Figures:
    """The stage from its start to its end, checksums and fsync with it, without what it takes for empty files.

    It gets the text as all three splits, so that the difference is well above the start-up that is taken off.
    """
    figures, start_up = stage(job, job["text"]), stage(job, job["empty"])
    for key in ("wall_seconds", "cpu_seconds"):
        figures[key] -= start_up[key]
    return figures | {"bytes": 3 * job["bytes"], "tokens": 3 * job["tokens"]}


def stage(job: Job, text: str) -> Figures:
    prefix, _, language = text.rpartition(".")
    with tempfile.TemporaryDirectory(dir=job["folder"]) as destination:
        command = [sys.executable, "-m", "xlm_ds.binarize", "--only-source", "--workers=1"]
        command += [f"--{split}pref={prefix}" for split in ("train", "valid", "test")]
        command += [f"--source-lang={language}", f"--srcdict={job['vocabulary']}"]
        return harness.measured_command([*command, f"--destdir={destination}"])


# ------------------------------------------------------------------------------------------ the text


def output_of(job: Job, name: str) -> Path:
    return Path(job["folder"]) / f"{name}.bin"


def write_wide_vocabulary(symbols: list[str], output: Path) -> bool:
    """The words of `symbols` in their order among made-up ones, in all WIDE_WORDS symbols; False if there are more.

    A made-up word is half a real one and a number, about as long as words are, and not in the text, whose words are as
    many as before, but far apart.
    """
    words, size = symbols[SPECIALS:], WIDE_WORDS - SPECIALS
    if len(words) >= size:
        return False
    generator, made = random.Random(corpus.SEED), dict.fromkeys(words)
    for number in itertools.count():
        if len(made) == size:
            break
        word = generator.choice(words)
        made[f"{word[: (len(word) + 1) // 2]}~{number:x}"] = None
    made_up = iter(list(made)[len(words) :])
    real_places = set(generator.sample(range(size), len(words)))
    real = iter(words)
    rows = [next(real if place in real_places else made_up) for place in range(size)]
    output.write_text("".join(f"{row} 1\n" for row in rows), encoding="utf-8")
    return True


def build_job(folder: Path, files: list[Path], size: int, slice_size: int) -> tuple[Job, str]:
    """(what the contenders get, what the text is)."""
    import numpy as np

    if files:
        texts, vocabulary, source = [files[0]], files[1], files[0].name
    else:
        prepared = corpus.prepare_demo(folder)
        texts, vocabulary = corpus.demo_texts(prepared), prepared / "vocab_mlm"
        source = f"the demo corpus, split with {corpus.DEMO_CODES:,} codes"
    text, short, empty = (folder / f"{name}.xx" for name in ("text", "slice", "empty"))
    about = f"{source}: {corpus.write_repeated(corpus.lines_of(texts), size, text)}"
    slice_bytes = corpus.write_slice(text, slice_size, short)
    empty.touch()
    symbols = load_symbols(str(vocabulary))
    ids, wide_ids, wide = folder / "ids", folder / "wide_ids", folder / "wide_vocabulary"
    tokens = encode_with_dictionary(text, ids_of(symbols), ids, np.uint32)
    has_wide = write_wide_vocabulary(symbols, wide)
    if has_wide:
        numbers = ids_of(load_symbols(str(wide)))
        renumbered = np.array([numbers[symbol] for symbol in symbols], np.uint32)
        renumbered[np.fromfile(ids, np.uint32)].tofile(wide_ids)
    job = {
        "folder": str(folder),
        "text": str(text),
        "bytes": text.stat().st_size,
        "tokens": tokens,
        "slice": str(short),
        "slice_bytes": slice_bytes,
        "slice_tokens": encode_with_dictionary(short, {}, folder / "discarded", np.uint32),
        "empty": str(empty),
        "vocabulary": str(vocabulary),
        "ids": str(ids),
        "wide_vocabulary": str(wide) if has_wide else None,
        "wide_ids": str(wide_ids),
        "scans": harness.scans_of(text.stat().st_size),
    }
    return job, f"{about}; {tokens:,} tokens; {len(symbols):,} symbols"


# ---------------------------------------------------------------------------------------------- run

OURS, COMMAND = "xlm_ds, 1 worker", "xlm_ds command, 1 worker"
WIDE, TWO = f"xlm_ds, {WIDE_WORDS:,} symbols", "xlm_ds, 2 workers"
FAIRSEQ, PYTHON = "fairseq-like loop", "Python loop"
HUGGINGFACE = {method: f"HF WordLevel {method}" for method in ("encode_batch", "encode_batch_fast")}

CONTENDERS = [
    Contender(OURS, one_worker, OURS, note="the call for one file; uint16"),
    Contender(COMMAND, whole_command, OURS, note="with checksums and fsync, start-up off"),
    Contender(WIDE, wide_dictionary, OURS, note="uint32; made-up words between"),
    Contender(TWO, two_workers, OURS),
    Contender(FAIRSEQ, fairseq_like, OURS, note="a slice of the text"),
    Contender(PYTHON, python_loop, OURS, note="a slice of the text"),
    *(
        Contender(
            name,
            partial(huggingface_word_level, method=method),
            OURS,
            packages=("tokenizers",),
            note="a slice of the text; WhitespaceSplit, 1 thread",
        )
        for method, name in HUGGINGFACE.items()
    ),
    *harness.floors(OURS),
]


def megabytes_per_cpu_second(name: str) -> Goal:
    return Goal(
        f"at least 400 MB per CPU-second, {name}",
        400,
        lambda rounds: [rate / 1e6 for rate in rounds.rates(name, "bytes")],
    )


def times(ours: str, other: str, least: float, seconds: str = "cpu_seconds") -> Goal:
    of = "wall time" if seconds == "wall_seconds" else "CPU time"

    def figure(rounds: Rounds) -> list[float]:
        return rounds.ratios(ours, other, "bytes", seconds)

    return Goal(f"{ours}: at least {least:g} x {other} ({of})", least, figure)


GOALS = [
    megabytes_per_cpu_second(OURS),
    megabytes_per_cpu_second(COMMAND),
    times(OURS, FAIRSEQ, 200),
    times(COMMAND, FAIRSEQ, 200),
    *(times(ours, theirs, 100) for theirs in HUGGINGFACE.values() for ours in (OURS, COMMAND)),
    times(WIDE, OURS, 0.6),
    times(TWO, OURS, 1.6, "wall_seconds"),
]


def main() -> None:
    parser = harness.make_parser(__doc__, "binarize.json")
    parser.add_argument("files", nargs="*", type=Path, metavar="TEXT VOCABULARY")
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument(
        "--slice-megabytes", type=float, default=SLICE_BYTES / 1e6, help="for the slow"
    )
    arguments = parser.parse_args()
    if len(arguments.files) not in (0, 2):
        parser.error("give TEXT and VOCABULARY, or neither")
    machine = harness.machine()
    with tempfile.TemporaryDirectory() as scratch:
        sizes = [int(1e6 * size) for size in (arguments.megabytes, arguments.slice_megabytes)]
        job, about = build_job(Path(scratch), arguments.files, *sizes)
        harness.warm([Path(job["text"]), Path(job["slice"])])
        harness.compare(
            "binarize",
            job,
            arguments,
            contenders=CONTENDERS,
            unit="bytes",
            about={"text": about},
            goals=GOALS,
            columns=harness.TEXT_COLUMNS,
            machine=machine,
        )


if __name__ == "__main__":
    harness.start(CONTENDERS, main)
