"""Tokenised text to ids through BPE: ours beside fastBPE, subword-nmt, HF tokenizers and gigatoken.

    python benchmarks/bpe.py [TEXT CODES VOCABULARY] [--megabytes 64] [--rounds 5] [--no-peers]

TEXT is tokenised text, CODES fastBPE's merges, VOCABULARY the dictionary of the text split with them; without them,
the demo corpus with 20,000 codes. Two texts are read: its lines as they are, shuffled (a word cache is cold), and
repeated to --megabytes (it is warm). What has pieces of text as its output looks their ids up in a Python dictionary.
All ids are compared but gigatoken's, whose BPE is of bytes: another task, named because it is the fastest there is.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import corpus
import harness
from corpus import EOS, UNK, check_ids, encode_with_dictionary, ids_of, load_symbols
from harness import Contender, Figures, Goal, Job, measured

SLICE_BYTES = 4_000_000  # of a text, for the slow
COLD_BYTES = 20_000_000  # that ours reads of the unique text, which is read anew so often
WORD_END = "</w>"
TEXTS = ("unique", "repeated")


# -------------------------------------------------------------------------------------------- ours


def ours(job: Job, text: str) -> Figures:
    """Text to ids in one pass; every time it begins with an empty word cache."""
    import numpy as np

    from xlm_ds import _core

    dictionary = _core.Dictionary(load_symbols(job["vocabulary"]))
    bpe = _core.Bpe(job["codes"])
    output, whole = output_of(job, "ours"), job[text]
    times = min(20, max(1, COLD_BYTES // whole["bytes"])) if text == "unique" else 1
    with measured() as figures:
        for _ in range(times):
            corpus.write_pair(Path(whole["text"]), dictionary, output, bpe=bpe)
    dtype = np.uint16 if len(dictionary) < 65_500 else np.uint32
    check_ids(output, dtype, whole["ids"], whole["tokens"])
    return figures | {"bytes": times * whole["bytes"], "tokens": times * whole["tokens"]}


# ------------------------------------------------------------------------------------------- peers


def encode_slice(
    job: Job, text: str, encode: Callable[[list[str]], Iterable[list[int]]]
) -> Figures:
    """Measures `encode`, which gets lines and gives the ids of each, on the text's slice."""
    import numpy as np

    part, output = job[f"{text} slice"], output_of(job, "peer")
    path = Path(part["text"])
    with measured() as figures, path.open(encoding="utf-8") as lines, output.open("wb") as out:
        while batch := list(itertools.islice(lines, 1000)):
            for ids in encode(batch):
                ids.append(EOS)
                out.write(np.array(ids, np.uint32).tobytes())
    check_ids(output, np.uint32, job[text]["ids"], part["tokens"])
    return figures | {"bytes": part["bytes"], "tokens": part["tokens"]}


def fastbpe(job: Job, text: str) -> Figures:
    import fastBPE

    bpe, get = fastBPE.fastBPE(job["codes"]), ids_of(load_symbols(job["vocabulary"])).get

    def encode(lines: list[str]) -> Iterable[list[int]]:
        for line in bpe.apply([line.removesuffix("\n") for line in lines]):  # or it is of a word
            yield [get(piece, UNK) for piece in line.split()]

    return encode_slice(job, text, encode)


def subword_nmt(job: Job, text: str) -> Figures:
    from subword_nmt.apply_bpe import BPE

    codes = Path(job["folder"]) / "codes.subword-nmt"
    merges = "".join(f"{left} {right}\n" for left, right in merges_of(job))
    codes.write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    with codes.open(encoding="utf-8") as file:
        bpe = BPE(file)
    get = ids_of(load_symbols(job["vocabulary"])).get

    def encode(lines: list[str]) -> Iterable[list[int]]:
        for line in lines:
            yield [get(piece, UNK) for piece in bpe.process_line(line).split()]

    return encode_slice(job, text, encode)


def huggingface(job: Job, text: str) -> Figures:
    from tokenizers import Tokenizer, models, pre_tokenizers

    merges = merges_of(job)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=huggingface_vocabulary(load_symbols(job["vocabulary"]), merges),
            merges=merges,
            unk_token="<unk>",
            end_of_word_suffix=WORD_END,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    size = len(load_symbols(job["vocabulary"]))

    def encode(lines: list[str]) -> Iterable[list[int]]:
        for encoding in tokenizer.encode_batch_fast(lines, add_special_tokens=False):
            yield [number if number < size else UNK for number in encoding.ids]

    return encode_slice(job, text, encode)


def huggingface_vocabulary(symbols: list[str], merges: list[tuple[str, str]]) -> dict[str, int]:
    """Its symbols end words with `</w>`, ours those inside with `@@`; what only merges know gets ids beyond ours."""
    ids = {
        symbol.removesuffix("@@") if symbol.endswith("@@") else symbol + WORD_END: number
        for number, symbol in enumerate(symbols)
    }
    ids["<unk>"] = UNK
    for left, right in merges:
        for symbol in (left, right, left + right):
            ids.setdefault(symbol, len(ids) + len(symbols))
    return ids


def merges_of(job: Job) -> list[tuple[str, str]]:
    with Path(job["codes"]).open(encoding="utf-8", newline="\n") as lines:
        return [(left, right) for left, right, _ in (line.split(" ") for line in lines)]


def train_byte_level(job: Job) -> None:
    """For gigatoken: as many symbols as our dictionary, learnt on the same text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(load_symbols(job["vocabulary"])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([job["unique slice"]["text"]], trainer)
    tokenizer.save(byte_level(job))


def byte_level(job: Job) -> str:
    return str(Path(job["folder"]) / "byte-level.json")


def gigatoken(job: Job, text: str) -> Figures:
    import awkward
    import gigatoken
    import numpy as np

    tokenizer = gigatoken.Tokenizer(byte_level(job))
    whole, output = job[text], output_of(job, "peer")
    source = gigatoken.TextFileSource([whole["text"]], separator="\n")
    with measured() as figures:
        rows = tokenizer.backend.encode_files(source, parallel=False)
        ids = np.asarray(awkward.flatten(rows))
        ids.astype(np.uint16).tofile(output)
    return figures | {"bytes": whole["bytes"], "tokens": len(ids)}


# ------------------------------------------------------------------------------------------ the text


def output_of(job: Job, name: str) -> Path:
    return Path(job["folder"]) / f"{name}.bin"


def build_job(folder: Path, files: list[Path], size: int, slice_size: int) -> tuple[Job, str]:
    """(what the contenders get, what the texts are)."""
    if files:
        texts, codes, vocabulary, source = [files[0]], files[1], files[2], files[0].name
    else:
        prepared = corpus.prepare_demo(folder)
        texts = corpus.demo_texts(prepared / "tokenised")
        codes, vocabulary = prepared / "codes", prepared / "vocab_mlm"
        source = f"the demo corpus, {corpus.DEMO_CODES:,} codes"
    lines = corpus.lines_of(texts)
    job: Job = {"folder": str(folder), "codes": str(codes), "vocabulary": str(vocabulary)}
    ids = ids_of(load_symbols(str(vocabulary)))
    for name, text_size in zip(TEXTS, (sum(map(len, lines)), size), strict=True):
        text, short = folder / name, folder / f"{name} slice"
        about = corpus.write_repeated(lines, text_size, text)
        corpus.write_slice(text, slice_size, short)
        job |= {p.name: describe(p, Path(codes), ids) for p in (text, short)}
    job |= {"text": job["repeated"]["text"], "bytes": job["repeated"]["bytes"]}
    job["scans"] = harness.scans_of(job["bytes"])
    return job, f"{source}: {about}"


def describe(text: Path, codes: Path, ids: dict[str, int]) -> dict[str, Any]:
    """A text's size and ids, the way of two steps: BPE'd text, and then the plain loop."""
    import numpy as np

    from xlm_ds import _core

    split, expected = text.with_suffix(".bpe"), text.with_suffix(".ids")
    _core.Bpe(codes).apply_file(text, split)
    tokens = encode_with_dictionary(split, ids, expected, np.uint32)
    split.unlink()
    return {
        "text": str(text),
        "bytes": text.stat().st_size,
        "tokens": tokens,
        "ids": str(expected),
    }


# ---------------------------------------------------------------------------------------------- run

OURS = {text: f"xlm_ds, {text} text" for text in TEXTS}


def on_text(run: Callable[[Job, str], Figures], text: str) -> Callable[[Job], Figures]:
    return lambda job: run(job, text)


PEERS: list[tuple[str, Callable[[Job, str], Figures], tuple[str, ...], str]] = [
    ("fastBPE", fastbpe, ("fastBPE",), "a slice; then a Python dictionary"),
    ("subword-nmt", subword_nmt, ("subword-nmt",), "a slice; then a Python dictionary"),
    ("HF tokenizers BPE", huggingface, ("tokenizers",), "a slice; WhitespaceSplit, 1 thread"),
    ("gigatoken (of bytes)", gigatoken, ("gigatoken", "tokenizers"), "BPE of bytes: another task"),
]

CONTENDERS = [
    Contender(
        OURS["unique"],
        on_text(ours, "unique"),
        OURS["unique"],
        note="word cache empty at the start of every reading",
    ),
    Contender(OURS["repeated"], on_text(ours, "repeated"), OURS["repeated"]),
    *(
        Contender(
            f"{name}, {text} text",
            on_text(run, text),
            OURS[text],
            packages=packages,
            build=train_byte_level if run is gigatoken else None,
            note=note,
        )
        for name, run, packages, note in PEERS
        for text in TEXTS
    ),
    *harness.floors(OURS["repeated"]),
]


def rate(name: str, least: float) -> Goal:
    def figure(rounds: harness.Rounds) -> list[float]:
        return [value / 1e6 for value in rounds.rates(name, "bytes")]

    return Goal(f"{name}: at least {least:g} MB per CPU-second", least, figure)


def times(peer: str, least: float) -> Goal:
    def figure(rounds: harness.Rounds) -> list[float]:
        return rounds.ratios(OURS["unique"], f"{peer}, unique text", "bytes")

    return Goal(f"{OURS['unique']}: at least {least:g} x {peer}", least, figure)


GOALS = [
    rate(OURS["unique"], 40),
    rate(OURS["repeated"], 120),
    times("fastBPE", 8),
    times("HF tokenizers BPE", 12),
]


def main() -> None:
    parser = harness.make_parser(__doc__, "bpe.json")
    parser.add_argument("files", nargs="*", type=Path, metavar="TEXT CODES VOCABULARY")
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument(
        "--slice-megabytes", type=float, default=SLICE_BYTES / 1e6, help="for the slow"
    )
    arguments = parser.parse_args()
    if len(arguments.files) not in (0, 3):
        parser.error("give TEXT, CODES and VOCABULARY, or none of them")
    machine = harness.machine()
    with tempfile.TemporaryDirectory() as scratch:
        sizes = [int(1e6 * size) for size in (arguments.megabytes, arguments.slice_megabytes)]
        job, about = build_job(Path(scratch), arguments.files, *sizes)
        harness.warm([Path(job[text]["text"]) for text in TEXTS])
        harness.compare(
            "bpe",
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
