"""Loading masked batches, shuffled: ours beside HF datasets, MosaicML streaming, litdata and numpy.

    python benchmarks/loader.py [TEXT VOCABULARY] [--million-tokens 200] [--rounds 5] [--no-peers]

TEXT is BPE'd text and VOCABULARY its dictionary; without them, the demo corpus. Its lines' ids are shuffled and
repeated to --million-tokens, as one .bin/.idx pair; peers get --peer-million-tokens of them in their own formats,
because writing those takes long. A batch is (32, 256) int64 ids with 15 % masked (80/10/10) and what they were; all
work on one thread. The first batch is timed from opening the data, imports left out; rates are of those after it.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corpus
import harness
from harness import Column, Contender, Figures, Goal, Job, measured

if TYPE_CHECKING:
    import torch

ROWS, LENGTH = 32, 256
RANKS, RANK_ROWS = 8, 64
STEP_MS = 22  # of those ranks; assumed, not measured: xlm_ds.corpus.micro_batch has the arithmetic
MASK_RATIO = 0.15
EOS, MASK, SPECIALS = 2, 4, 5
IGNORED = -100  # the target where nothing is to be predicted


def load(batches: int, open_loader: Callable[[], Iterator[Any]], rows: int = ROWS) -> Figures:
    """Opens a loader, takes its first batch, and measures `batches` more."""
    begin = time.perf_counter()
    grown = harness.memory_bytes("RssAnon")
    loader = open_loader()
    next(loader)
    first = time.perf_counter() - begin
    with measured() as figures:
        for _ in range(batches):
            next(loader)
    figures["grown_bytes"] = harness.memory_bytes("RssAnon") - grown  # from the opening on
    return figures | {"first_batch_seconds": first, "tokens": batches * rows * LENGTH}


def batches_of(job: Job, share: float) -> int:
    """How many batches a contender is timed on: `share` of what ours is."""
    return max(20, int(job["batches"] * share))


# -------------------------------------------------------------------------------------------- ours


def open_corpus(job: Job) -> Any:
    """What a run reads. The caller has imported these rooms before anything is timed."""
    from xlm_ds.batches import Masking
    from xlm_ds.corpus import Corpus
    from xlm_ds.dataset import open_split
    from xlm_ds.dictionary import Dictionary
    from xlm_ds.order import build_order
    from xlm_ds.steps import Steps
    from xlm_ds.streams import alone

    datasets = open_split(
        Path(job["folder"]),
        "train",
        ["xx"],
        tokens_per_sample=LENGTH,
        break_mode="none",
        vocab_size=job["vocab_size"],
        dictionary_sha256="",
    )
    order = build_order([datasets[0].blocks], alpha=0.7, seed=0)
    masking = Masking(seed=0, mask_ratio=MASK_RATIO, vocab_size=job["vocab_size"])
    dictionary = Dictionary(symbols=(), counts=())
    return Corpus(dictionary, ("xx",), alone(datasets), (), order, masking, Steps((MASK_RATIO,)))


def ours(job: Job) -> Figures:
    """What a micro-batch of a run is made by: Order, and the core's fill_batch into new tensors."""
    import xlm_ds.corpus  # noqa: F401 (open_corpus)
    from xlm_ds.batches import build_batch

    def batches() -> Iterator[Any]:
        corpus = open_corpus(job)
        for first in itertools.count(0, ROWS):
            yield build_batch(corpus.train, corpus.order.samples(first, ROWS), corpus.masking)

    figures = load(job["batches"], batches)
    check_ours(job, next(batches()))
    return figures


def fill_batch(job: Job) -> Figures:
    """The same into arrays that are used again."""
    import numpy as np

    import xlm_ds.corpus  # noqa: F401 (open_corpus)
    from xlm_ds import _core

    def batches() -> Iterator[Any]:
        corpus = open_corpus(job)
        masked = ROWS * _core.masked_count(MASK_RATIO, LENGTH - 1)
        ids = np.empty((ROWS, LENGTH), np.int64)
        positions, targets = np.empty(masked, np.int64), np.empty(masked, np.int64)
        cores = [stream.core for stream in corpus.train]
        columns = np.empty((3, ROWS), np.int64)
        for first in itertools.count(0, ROWS):
            streams, passes, blocks = corpus.order.samples(first, ROWS)
            _core.fill_batch(
                cores,
                numbers=streams,
                passes=passes,
                blocks=blocks,
                seed=0,
                mask_ratio=MASK_RATIO,
                vocab_size=job["vocab_size"],
                input_ids=ids,
                languages=columns[0],
                second_languages=columns[1],
                second_starts=columns[2],
                masked_positions=positions,
                targets=targets,
            )
            yield ids, targets

    return load(job["batches"], batches)


def one_of_eight_ranks(job: Job) -> Figures:
    """What an update of 8 x 64 samples costs a rank: its micro-batch, and counting the targets of all ranks."""
    from xlm_ds.corpus import micro_batch, update_targets
    from xlm_ds.geometry import Geometry

    geometry = Geometry(RANK_ROWS, 1, RANKS)

    def batches() -> Iterator[Any]:
        corpus = open_corpus(job)
        for first in itertools.count(0, RANKS * RANK_ROWS):
            update_targets(corpus, geometry, first=first)
            yield micro_batch(corpus, geometry, first=geometry.first_sample(first, 0, rank=3))

    return load(batches_of(job, ROWS / (RANKS * RANK_ROWS)), batches, rows=RANK_ROWS)


def check_ours(job: Job, batch: Any) -> None:
    """With the targets put back, the rows of the batch are blocks of the file, each another."""
    import numpy as np

    ids = np.memmap(Path(job["folder"]) / "train.xx.bin", np.dtype(job["dtype"]), mode="r")
    rows = batch.input_ids.clone()
    rows.view(-1)[batch.masked_positions] = batch.targets
    blocks = ids[: len(ids) // (LENGTH - 1) * (LENGTH - 1)].reshape(-1, LENGTH - 1)
    assert not batch.has_padding
    assert (rows[:, 0] == EOS).all()
    found = {int(np.flatnonzero((blocks == row).all(1))[0]) for row in rows[:4, 1:].numpy()}
    assert len(found) == 4, "rows that are not distinct blocks of the file"


# ------------------------------------------------------------------------------------------- peers


def numpy_memmap(job: Job) -> Figures:
    """A permutation of the blocks, rows gathered from a memory map, masks drawn for the whole batch at once."""
    import numpy as np

    vocab_size, path = job["vocab_size"], Path(job["folder"]) / "train.xx.bin"

    def batches() -> Iterator[Any]:
        ids = np.memmap(path, np.dtype(job["dtype"]), mode="r")
        blocks = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
        generator = np.random.default_rng(0)
        while True:
            order = generator.permutation(len(blocks)).astype(np.uint32)
            for first in range(0, len(order) - ROWS + 1, ROWS):
                rows = blocks[order[first : first + ROWS]].astype(np.int64)
                masked = generator.random(rows.shape, np.float32) < MASK_RATIO
                targets = np.where(masked, rows, IGNORED)
                fate = generator.random(rows.shape, np.float32)
                rows[masked & (fate < 0.8)] = MASK
                random_word = masked & (fate >= 0.9)
                rows[random_word] = generator.integers(SPECIALS, vocab_size, random_word.sum())
                yield rows, targets

    return load(batches_of(job, 0.1), batches)


def mask_with_torch(rows: "torch.Tensor", vocab_size: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    import torch

    masked = torch.rand(rows.shape) < MASK_RATIO
    targets = torch.where(masked, rows, IGNORED)
    fate = torch.rand(rows.shape)
    rows[masked & (fate < 0.8)] = MASK
    random_word = masked & (fate >= 0.9)
    rows[random_word] = torch.randint(SPECIALS, vocab_size, (int(random_word.sum()),))
    return rows, targets


def peer_blocks(job: Job) -> Any:
    """The ids that peers get, (N, LENGTH) of uint16 or uint32, memory-mapped."""
    import numpy as np

    ids = np.memmap(Path(job["folder"]) / "train.xx.bin", np.dtype(job["dtype"]), mode="r")
    blocks = min(job["peer_tokens"], len(ids)) // LENGTH
    return ids[: blocks * LENGTH].reshape(blocks, LENGTH)


def folder_of(job: Job, name: str) -> str:
    return str(Path(job["folder"]) / name)


def build_huggingface(job: Job) -> None:
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    blocks = peer_blocks(job)
    values = pyarrow.array(blocks.reshape(-1))
    rows = pyarrow.FixedSizeListArray.from_arrays(values, LENGTH)
    table = InMemoryTable(pyarrow.table({"input_ids": rows}))
    Dataset(table).save_to_disk(folder_of(job, "huggingface"))


def huggingface(job: Job) -> Figures:
    from datasets import load_from_disk
    from tokenizers import Tokenizer, models
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    specials = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    words = {f"w{number}": number for number in range(SPECIALS, job["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(specials | words, unk_token="<unk>")),
        mask_token="<mask>",
        pad_token="<pad>",
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASK_RATIO)

    def batches() -> Iterator[Any]:
        dataset = load_from_disk(folder_of(job, "huggingface")).with_format("torch")
        while True:
            yield from DataLoader(
                dataset, batch_size=ROWS, shuffle=True, drop_last=True, collate_fn=collator
            )

    return load(batches_of(job, 0.004), batches)


def build_streaming(job: Job) -> None:
    import_streaming()
    from streaming import MDSWriter

    blocks = peer_blocks(job)
    columns = {"ids": f"ndarray:{job['dtype']}:{LENGTH}"}
    with MDSWriter(out=folder_of(job, "streaming"), columns=columns) as writer:
        for block in blocks:
            writer.write({"ids": block})


def import_streaming() -> None:
    """`import streaming` imports torchvision for its images, of which PyPI has no build for a torch without CUDA."""
    import importlib.util
    import sys
    import types

    import transformers.feature_extraction_utils  # noqa: F401 (looks for torchvision too, and must not find this one)

    if importlib.util.find_spec("torchvision") is not None:
        return
    stand_ins: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.datasets": {"VisionDataset": object},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {"to_tensor": None},
    }
    for name, content in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(content)
    import streaming  # noqa: F401

    for name in stand_ins:
        del sys.modules[name]


def streaming(job: Job) -> Figures:
    import_streaming()
    import numpy as np
    import torch
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    def collate(rows: list[Any]) -> Any:
        stacked = np.stack([row["ids"] for row in rows]).astype(np.int64)
        return mask_with_torch(torch.from_numpy(stacked), job["vocab_size"])

    clean_stale_shared_memory()

    def batches() -> Iterator[Any]:
        dataset = StreamingDataset(
            local=folder_of(job, "streaming"), shuffle=True, batch_size=ROWS, replication=None
        )
        while True:
            yield from DataLoader(dataset, batch_size=ROWS, drop_last=True, collate_fn=collate)

    return load(batches_of(job, 0.004), batches)


def build_litdata(job: Job) -> None:
    import torch
    from litdata import TokensLoader
    from litdata.streaming.cache import Cache

    blocks = peer_blocks(job)
    folder = Path(folder_of(job, "litdata"))
    folder.mkdir()
    cache = Cache(str(folder), chunk_bytes="64MB", item_loader=TokensLoader(LENGTH))
    for number, block in enumerate(blocks.astype("int32")):
        cache[number] = torch.from_numpy(block)
    cache.done()
    cache.merge()


def litdata(job: Job) -> Figures:
    import torch
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    def collate(rows: list[Any]) -> Any:
        return mask_with_torch(torch.stack(rows).long(), job["vocab_size"])

    def batches() -> Iterator[Any]:
        dataset = StreamingDataset(
            folder_of(job, "litdata"),
            item_loader=TokensLoader(LENGTH),
            shuffle=True,
            drop_last=True,
        )
        while True:
            yield from StreamingDataLoader(dataset, batch_size=ROWS, collate_fn=collate)

    return load(batches_of(job, 0.02), batches)


# ------------------------------------------------------------------------------------------ the data


def build_job(folder: Path, arguments: Any) -> tuple[Job, str]:
    """(what the contenders get, what the data are)."""
    if arguments.files:
        text, vocabulary = arguments.files
        source = text.name
    else:
        prepared = corpus.prepare_demo(folder)
        text, vocabulary = folder / "demo.xx", prepared / "vocab_mlm"
        text.write_bytes(b"".join(corpus.lines_of(corpus.demo_texts(prepared))))
        source = "the demo corpus"
    tokens = int(arguments.million_tokens * 1e6)
    unique, dtype, vocab_size = write_tokens(text, vocabulary, tokens, folder)
    job: Job = {
        "folder": str(folder),
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokens": tokens,
        "peer_tokens": int(arguments.peer_million_tokens * 1e6),
        "batches": max(20, tokens // (ROWS * LENGTH)),
    }
    about = (
        f"{source}: {unique:,} ids, their lines shuffled and repeated to {tokens:,} of {dtype}; HF datasets, "
        f"streaming and litdata read {min(tokens, job['peer_tokens']):,} of them; batches of ({ROWS}, {LENGTH}), "
        f"{MASK_RATIO:.0%} masked"
    )
    return job, about


def write_tokens(text: Path, vocabulary: Path, tokens: int, folder: Path) -> tuple[int, str, int]:
    """folder/train.xx.bin and .idx, `tokens` ids in lines of the text; returns (ids in the text, dtype, vocab size)."""
    import numpy as np

    from xlm_ds import _core

    symbols = corpus.load_symbols(str(vocabulary))
    dtype = "uint16" if len(symbols) < 65_500 else "uint32"
    once = folder / "once.bin"
    corpus.write_pair(text, _core.Dictionary(symbols), once)
    ids = np.fromfile(once, dtype)
    lines = np.split(ids, np.flatnonzero(ids == EOS) + 1)[:-1]  # an eos ends a line
    generator, written, lengths = np.random.default_rng(corpus.SEED), 0, []
    with (folder / "train.xx.bin").open("wb") as out:
        while written < tokens:
            order = [lines[number] for number in generator.permutation(len(lines))]
            shuffled = np.concatenate(order)[: tokens - written]
            out.write(shuffled.tobytes())
            written += len(shuffled)
            lengths.append(np.fromiter(map(len, order), np.int64, len(order)))
    write_index(np.concatenate(lengths), tokens, np.dtype(dtype), folder / "train.xx.idx")
    return len(ids), dtype, len(symbols)


def write_index(lengths: Any, tokens: int, dtype: Any, path: Path) -> None:
    """As docs/formats.md says; the last line is the one that `tokens` cuts."""
    import numpy as np

    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, tokens)) + 1
    ends = np.minimum(ends[:count], tokens)
    starts = np.concatenate([[0], ends[:-1]])
    code = {"uint16": 8, "uint32": 9}[dtype.name]
    header = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([code])
    header += count.to_bytes(8, "little")
    with path.open("wb") as file:
        file.write(header)
        file.write((ends - starts).astype("<i4").tobytes())
        file.write((starts * dtype.itemsize).astype("<i8").tobytes())


# ---------------------------------------------------------------------------------------------- run

OURS, FILLED, RANK = "xlm_ds", "xlm_ds fill_batch", f"xlm_ds, one of {RANKS} ranks"
NUMPY = "numpy memmap loop"
DATASETS = "HF datasets + MLM collator"

CONTENDERS = [
    Contender(OURS, ours, OURS, note="build_batch: int64 tensors"),
    Contender(FILLED, fill_batch, OURS, note="into arrays used again"),
    Contender(
        RANK, one_of_eight_ranks, OURS, note=f"{RANK_ROWS} rows, and the targets of all counted"
    ),
    Contender(NUMPY, numpy_memmap, OURS, note="gather and mask a batch at a time"),
    Contender(
        DATASETS,
        huggingface,
        OURS,
        packages=("datasets", "transformers", "tokenizers"),
        build=build_huggingface,
        note="arrow on disk, DataCollatorForLanguageModeling",
    ),
    Contender(
        "mosaicml-streaming",
        streaming,
        OURS,
        packages=("mosaicml-streaming", "transformers"),
        build=build_streaming,
        note="local MDS, masked with torch",
    ),
    Contender(
        "litdata",
        litdata,
        OURS,
        packages=("litdata",),
        build=build_litdata,
        note="TokensLoader, masked with torch",
    ),
]


def times(other: str, least: float) -> Goal:
    def figure(rounds: harness.Rounds) -> list[float]:
        return rounds.ratios(OURS, other, "tokens")

    return Goal(f"at least {least:g} x {other} (CPU time)", least, figure)


def million_per_cpu_second(what: str, name: str, least: float) -> Goal:
    return Goal(what, least, lambda rounds: [rate / 1e6 for rate in rounds.rates(name, "tokens")])


GOALS = [
    million_per_cpu_second("fill_batch: at least 300 million tokens per CPU-second", FILLED, 300),
    million_per_cpu_second(
        f"one of {RANKS} ranks: {RANK_ROWS} x {LENGTH} tokens within 0.5 % of a step of {STEP_MS} ms (million tokens "
        "per CPU-second)",
        RANK,
        RANK_ROWS * LENGTH / (0.005 * STEP_MS * 1e3),
    ),
    Goal(
        "first batch within 5 ms (per second: at least 200)",
        200,
        lambda rounds: [1 / seconds for seconds in rounds.column(OURS, "first_batch_seconds")],
    ),
    times(NUMPY, 5),
    times(DATASETS, 200),
]

COLUMNS = [
    harness.NAME,
    Column("Mtok", lambda row: f"{row['tokens'] / 1e6:.1f}"),
    *harness.SECONDS,
    harness.TOKEN_RATE,
    Column("Mtok/s", lambda row: f"{row['tokens_per_second'] / 1e6:.3g}"),
    Column("first batch ms", lambda row: f"{row['first_batch_seconds'] * 1e3:.2f}"),
    Column("anonymous growth MB", lambda row: f"{row['grown_bytes'] / 1e6:.1f}"),
    harness.PEAK,
    harness.RATIO,
    harness.NOTE,
]


def main() -> None:
    parser = harness.make_parser(__doc__, "loader.json")
    parser.add_argument("files", nargs="*", type=Path, metavar="TEXT VOCABULARY")
    parser.add_argument("--million-tokens", type=float, default=200)
    parser.add_argument("--peer-million-tokens", type=float, default=20)
    arguments = parser.parse_args()
    if len(arguments.files) not in (0, 2):
        parser.error("give TEXT and VOCABULARY, or neither")
    machine = harness.machine()
    with tempfile.TemporaryDirectory() as scratch:
        job, about = build_job(Path(scratch), arguments)
        harness.warm([Path(scratch) / "train.xx.bin"])
        harness.compare(
            "loader",
            job,
            arguments,
            contenders=CONTENDERS,
            unit="tokens",
            about={"data": about},
            goals=GOALS,
            columns=COLUMNS,
            machine=machine,
        )


if __name__ == "__main__":
    harness.start(CONTENDERS, main)
